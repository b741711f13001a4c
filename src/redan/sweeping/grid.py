"""Many runs in one table: recipes times options times seeds, each trained and attacked, resumable.

A sweep's folder holds one run folder a row, ``sweep.json`` (what is finished, and what failed) and ``sweep.md`` (the
table for readers).
"""

import copy
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from redan.analysis.analyse import analyse as run_analysis
from redan.analysis.results import AS_TRAINED, Analysis
from redan.data.registry import load_dataset
from redan.errors import Stopped, UserError
from redan.evaluation.evaluate import evaluate
from redan.evaluation.protocol import default_protocol, parse_protocol
from redan.evaluation.results import Accuracy, Frozen
from redan.files import write_atomically
from redan.recipes.build import build
from redan.recipes.schema import Recipe, load_recipe
from redan.run import WEIGHTS, Checkpoint
from redan.sweeping.runs import begun, train_run, trained
from redan.sweeping.text import (
    as_text,
    differences,
    duration,
    flow,
    folder_name,
    markdown_table,
    plain_value,
    short_keys,
)
from redan.version import __version__


class SweepRow(Frozen):
    """One run of a sweep under one attack.

    ``overrides`` has the row's changes to its recipe by dotted key, without the seed; ``samples`` counts test images.
    What is None is not known yet; ``error`` says why, where the row failed.
    """

    title: str
    recipe: str
    seed: int
    overrides: dict[str, Any]
    run: str
    threat: str
    attack: str
    samples: int
    checkpoint: Checkpoint = "best"
    clean: Accuracy | None = None
    robust: Accuracy | None = None
    epochs: int | None = None
    training_seconds: float | None = None
    evaluation_seconds: float | None = None
    analysis: Analysis | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """The name of the run's folder, unique within the sweep."""
        return Path(self.run).name

    def finished(self, analyse: bool) -> bool:
        """Whether nothing is left to do, of the analysis either where one is asked for."""
        return self.robust is not None and (self.analysis is not None or not analyse)


class _Entry(Frozen):
    """A row with the recipe behind it, as ``sweep.json`` keeps it."""

    recipe: Recipe
    row: SweepRow

    @property
    def key(self) -> tuple[str, str, int, Checkpoint]:
        """Evaluations of the same run that differ in these stand beside each other."""
        return self.row.name, self.row.attack, self.row.samples, self.row.checkpoint

    def having(self, **known: Any) -> "_Entry":
        """The same with more of the row known."""
        return self.model_copy(update={"row": self.row.model_copy(update=known)})


class _Kept(Frozen):
    """The content of ``sweep.json``."""

    redan_version: str
    entries: tuple[_Entry, ...]


def sweep(
    recipes: Sequence[str | Path],
    *,
    overrides: Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] = (0,),
    attack: str | None = None,
    samples: int | None = None,
    checkpoint: Checkpoint = "best",
    analyse: bool = False,
    out: str | Path = "runs/sweep",
    data_dir: str | Path | None = None,
    progress: bool = True,
) -> list[SweepRow]:
    """Train and attack every recipe with every choice from the grid and every seed.

    The same call goes on where an earlier one was stopped, tries again what failed, and repeats nothing.

    Args:
        recipes: names of shipped recipes, YAML files or run folders.
        overrides: recipe values by dotted key, for every row.
        grid: the values to choose from, by dotted key; the first key varies slowest.
        seeds: of the training; the attacks have seed 0.
        attack: a protocol, see ``redan.evaluation.protocol``; by default one that fits the threat.
        samples: the first so many test images; all if None.
        checkpoint: of each run, ``best`` or ``last``.
        analyse: look inside each run, too, on as many test images; see ``redan.analyse``.
        out: the folder of the sweep.
        data_dir: the folder of data sets.
        progress: show it on standard error.

    Returns:
        The rows: by recipe, then choice, then seed. A row that failed, such as by a loss that is not finite, has
        ``error``.

    Raises:
        UserError: for a mistake in any of these, before the first row starts; or where the folder cannot be written.
        Stopped: on Ctrl-C, or SIGTERM in training; the same call goes on.
    """
    folder, data = Path(out), None if data_dir is None else Path(data_dir)
    choices = {key: _plain_list(key, values) for key, values in (grid or {}).items()}
    changes = {key: plain_value(key, value) for key, value in (overrides or {}).items()}
    plan = _plan(recipes, changes, choices, seeds, attack, checkpoint, folder)
    plan = _with_samples(plan, samples, data)
    book = _Book(folder / "sweep.json")
    for entry in plan:
        book.refuse_another_recipe(entry)
    command = _command(recipes, changes, choices, seeds, attack, samples, checkpoint, analyse, folder)

    def write_table() -> list[SweepRow]:
        rows = [book.current(entry).row for entry in plan]
        write_atomically(folder / "sweep.md", _markdown(rows, command).encode())
        return rows

    def say(line: str) -> None:
        if progress:
            print(line, file=sys.stderr)

    rows = write_table()  # a folder that cannot be written is told before hours of training
    durations: list[float] = []
    left = sum(not row.finished(analyse) for row in rows)
    for number, entry in enumerate(plan, 1):
        known = book.current(entry)
        if known.row.finished(analyse):
            continue
        place = f"row {number} of {len(plan)}"
        soon = f" (about {duration(statistics.fmean(durations) * left)} left)" if durations else ""
        say(f"{place}: {entry.row.title} seed {entry.row.seed}{soon}")
        started = time.monotonic()
        try:
            entry = _trained(entry, book.trained(entry), data_dir=data, progress=progress)
            book.keep(entry)
            if known.row.robust is None:
                entry = _attacked(entry, data_dir=data, progress=progress)
            else:
                entry = known.having(error=None)
            if analyse:
                book.keep(entry)
                found = run_analysis(entry.row.run, samples=entry.row.samples, data_dir=data, progress=progress)
                entry = entry.having(analysis=found)
            durations.append(time.monotonic() - started)
        except UserError as error:
            entry = entry.having(error=str(error))
            say(f"{place} failed: {error}")
        except (Stopped, KeyboardInterrupt) as stop:
            raise Stopped(f"stopped in {place}; the same command goes on") from stop
        book.keep(entry)
        rows = write_table()
        left -= 1
    return rows


def parse_grid(assignments: list[str]) -> dict[str, list[Any]]:
    """``["optimizer.lr=0.1,0.2", "method.layers=[a,b],[c]"]`` as a mapping; values are read as YAML's ``[V1,V2]``.

    Raises:
        UserError: where one is not ``KEY=V1,V2`` or a key comes twice.
    """
    grid: dict[str, list[Any]] = {}
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        try:
            values = yaml.safe_load(f"[{text}]")
        except (ValueError, yaml.YAMLError):
            values = None
        if not key or not values:
            raise UserError(f"a grid is written KEY=V1,V2, such as optimizer.lr=0.05,0.1, got {assignment!r}")
        if key in grid:
            raise UserError(f"the grid has {key} twice; write all its values in one: {key}=V1,V2")
        grid[key] = values
    return grid


def summary(rows: Sequence[SweepRow]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and lines of the table, one line a title, its seeds together.

    Accuracies are in percent: of one seed with the exact 95 % interval over images, of several as mean and sample
    standard deviation over seeds. The threat has a column where rows differ in it; an analysis has three: the mean
    cosine between the shipped network's features of clean and attacked images, and the gradient conflict as trained.
    """
    analysed = any(row.analysis is not None for row in rows)
    lines = []
    for title in dict.fromkeys(row.title for row in rows):
        group = [row for row in rows if row.title == title]
        failed = sum(row.error is not None for row in group)
        finished = sum(row.robust is not None for row in group)
        lines.append(
            [
                title,
                group[0].threat,
                str(group[0].samples),
                f"{finished}, {failed} failed" if failed else str(finished),
                _over_seeds([row.clean for row in group]),
                _over_seeds([row.robust for row in group]),
                *(_analysed([row.analysis for row in group]) if analysed else []),
            ]
        )
    header: tuple[str, ...] = ("recipe", "threat", "images", "seeds", "clean", "robust")
    header += ("invariance", "conflict", "gradient cosine") if analysed else ()
    if len({row.threat for row in rows}) == 1:
        return (header[0], *header[2:]), [[line[0], *line[2:]] for line in lines]
    return header, lines


class _Book:
    """What ``sweep.json`` knows: what is finished is never run again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[tuple[str, str, int, Checkpoint], _Entry] = {}
        if path.exists():
            try:
                kept = _Kept.model_validate_json(path.read_bytes())
            except (OSError, ValidationError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{path} is not a sweep of redan's: {reason}; choose another --out") from error
            self._entries = {entry.key: entry for entry in kept.entries}

    def current(self, entry: _Entry) -> _Entry:
        """The entry with what is known of it."""
        known = self._entries.get(entry.key, entry)
        return known.having(title=entry.row.title, overrides=entry.row.overrides, run=entry.row.run)

    def trained(self, entry: _Entry) -> _Entry | None:
        """An entry, if under another attack, of the same run, whose training is finished."""
        known = (other for other in self._entries.values() if other.row.name == entry.row.name)
        return next((other for other in known if other.row.epochs is not None), None)

    def refuse_another_recipe(self, entry: _Entry) -> None:
        """Raises: UserError where the row's run was made, or begun, with another recipe."""
        folder = Path(entry.row.run)
        trained = self.trained(entry)
        if trained is not None:
            known = trained.recipe
        elif begun(folder):
            known = load_recipe(folder)
        else:
            return
        if differing := differences(known.resolved(), entry.recipe.resolved()):
            raise UserError(f"{folder} holds a run of another recipe: {differing}; choose another --out")

    def keep(self, entry: _Entry) -> None:
        """Put the entry into the file."""
        self._entries[entry.key] = entry
        kept = _Kept(redan_version=__version__, entries=tuple(self._entries.values()))
        write_atomically(self._path, kept.model_dump_json(indent=1).encode())


def _plan(
    recipes: Sequence[str | Path],
    overrides: dict[str, Any],
    grid: dict[str, list[Any]],
    seeds: Sequence[int],
    attack: str | None,
    checkpoint: Checkpoint,
    folder: Path,
) -> list[_Entry]:
    """All rows in order, every one of them checked; ``samples`` is still open."""
    if isinstance(recipes, str | Path):
        raise UserError(f"recipes is a list, such as [{str(recipes)!r}]")
    if not recipes or not seeds:
        raise UserError(f"a sweep needs at least one {'seed' if recipes else 'recipe'}")
    for key in grid:
        if key in overrides:
            raise UserError(f"{key} has a value for every row and values in the grid; leave one of them out")
    if "seed" in overrides | grid:
        raise UserError("the seeds of a sweep are named by --seeds, such as --seeds 0,1,2")
    short = short_keys(grid)
    plan: list[_Entry] = []
    names: dict[str, int] = {}
    resolved: dict[str, int] = {}
    for source, values, seed in itertools.product(recipes, itertools.product(*grid.values()), seeds):
        chosen = dict(zip(grid, values, strict=True))
        changes = overrides | chosen
        recipe = load_recipe(source, {**copy.deepcopy(changes), "seed": seed})  # it writes into what it is given
        parts = [recipe.name, *(f"{short[key]}={as_text(value)}" for key, value in chosen.items())]
        name = folder_name(f"{'+'.join(parts)}-seed{seed}")
        number = len(plan) + 1
        if (twin := resolved.setdefault(json.dumps(recipe.resolved()), number)) != number:
            raise UserError(f"rows {twin} and {number} are the same run, {name}; name it once")
        if (twin := names.setdefault(name, number)) != number:
            raise UserError(f"rows {twin} and {number} would share the folder {name}; give their recipes two names")
        threat = recipe.parsed_threat()
        protocol = attack or default_protocol(threat)
        parse_protocol(protocol, threat, classes=10)
        row = SweepRow(
            title=" ".join(parts),
            recipe=recipe.name,
            seed=recipe.seed,
            overrides=changes,
            run=str(folder / name),
            threat=str(threat),
            attack=protocol,
            samples=0,
            checkpoint=checkpoint,
        )
        plan.append(_Entry(recipe=recipe, row=row))
    return plan


def _with_samples(plan: list[_Entry], samples: int | None, data_dir: Path | None) -> list[_Entry]:
    """The plan with its numbers of test images; what is missing, too few or cannot be built is told here."""
    names = {entry.recipe.data.name for entry in plan}
    counts, facts = {}, {}
    for name in names:
        dataset = load_dataset(name, data_dir)
        counts[name], facts[name] = len(dataset.test), dataset.facts
    for entry in plan:
        build(entry.recipe, facts[entry.recipe.data.name])  # options that do not fit the network are told here
    for name, count in counts.items():
        if samples is not None and not 1 <= samples <= count:
            raise UserError(f"--samples is between 1 and {count} for {name}, got {samples}")
    return [entry.having(samples=samples or counts[entry.recipe.data.name]) for entry in plan]


def _trained(entry: _Entry, earlier: _Entry | None, *, data_dir: Path | None, progress: bool) -> _Entry:
    """Train the row's run, from where it is, to its end; ``earlier`` says that it is there already."""
    folder = Path(entry.row.run)
    if earlier is not None and (folder / WEIGHTS["best"]).exists():
        return entry.having(epochs=earlier.row.epochs, training_seconds=earlier.row.training_seconds)
    train_run(entry.recipe, folder, data_dir=data_dir, progress=progress)
    epochs, seconds = trained(folder)
    return entry.having(epochs=epochs, training_seconds=seconds)


def _attacked(entry: _Entry, *, data_dir: Path | None, progress: bool) -> _Entry:
    """Evaluate the row's run, from where an earlier evaluation with the same settings is."""
    row = entry.row
    result = evaluate(
        row.run,
        attack=row.attack,
        samples=row.samples,
        checkpoint=row.checkpoint,
        curve=False,
        data_dir=data_dir,
        resume=None,
        progress=progress,
    )
    return entry.having(clean=result.clean, robust=result.robust, evaluation_seconds=result.seconds)


def _over_seeds(accuracies: Sequence[Accuracy | None]) -> str:
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    if len(known) < 2:
        return str(known[0]) if known else "–"
    values = [100 * accuracy.value for accuracy in known]
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f} %"


def _analysed(analyses: Sequence[Analysis | None]) -> list[str]:
    """Invariance of the shipped branch, conflict share and cosine; means over seeds."""
    known = [analysis for analysis in analyses if analysis is not None]
    conflicts = [analysis.conflicts[AS_TRAINED] for analysis in known if AS_TRAINED in analysis.conflicts]
    cells = []
    for values, form in (
        ([analysis.branches[analysis.shipped].cosine.mean for analysis in known], "{:.4f}"),
        ([100 * conflict.share.mean for conflict in conflicts], "{:.1f} %"),
        ([conflict.cosine.mean for conflict in conflicts], "{:+.3f}"),
    ):
        cells.append(form.format(statistics.fmean(values)) if values else "–")
    return cells


def _markdown(rows: Sequence[SweepRow], command: str) -> str:
    header, lines = summary(rows)
    attacks, threats, samples = (
        ", ".join(dict.fromkeys(str(getattr(row, key)) for row in rows)) for key in ("attack", "threat", "samples")
    )
    analysed = any(row.analysis is not None for row in rows)
    inside = f"Accuracies are of the {rows[0].checkpoint} checkpoint"
    inside += "; invariance and conflict of the last weights.\n" if analysed else ".\n"
    failures = "".join(f"* {row.name} failed: {row.error}\n" for row in rows if row.error is not None)
    return (
        f"# Sweep\n\n```\n{command}\n```\n\n"
        f"Attack {attacks} within {threats} on the first {samples} test images; redan {__version__}.\n"
        "One seed: accuracy [95 % interval]. Several: mean ± sample standard deviation over seeds.\n"
        f"{inside}\n"
        f"{markdown_table(header, lines)}" + (f"\n{failures}" if failures else "")
    )


def _command(
    recipes: Sequence[str | Path],
    overrides: dict[str, Any],
    grid: dict[str, list[Any]],
    seeds: Sequence[int],
    attack: str | None,
    samples: int | None,
    checkpoint: Checkpoint,
    analyse: bool,
    folder: Path,
) -> str:
    """The command line that makes the same table."""
    words = ["redan", "sweep", *map(str, recipes)]
    for key, value in overrides.items():
        words += ["-o", f"{key}={flow(value)}"]
    for key, values in grid.items():
        words += ["--grid", f"{key}={','.join(flow(value) for value in values)}"]
    words += ["--seeds", ",".join(map(str, seeds))]
    words += [] if attack is None else ["--attack", attack]
    words += [] if samples is None else ["--samples", str(samples)]
    words += [] if checkpoint == "best" else ["--checkpoint", checkpoint]
    words += ["--analyse"] if analyse else []
    return shlex.join([*words, "--out", str(folder)])


def _plain_list(key: str, values: Sequence[Any]) -> list[Any]:
    plain = plain_value(key, values)
    if not isinstance(plain, list) or not plain:
        raise UserError(f"the grid needs a list of values for {key}, got {values!r}")
    return plain
