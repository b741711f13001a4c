"""The report: run folders in, one self-contained HTML page out."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from redan.analysis.results import DifficultEntry, Difficulty, Growth
from redan.errors import UserError
from redan.evaluation.bracket import bracket
from redan.evaluation.results import Accuracy, CurvePoint, Evaluation, Row
from redan.evaluation.trials import TRIALS, Trials
from redan.files import write_atomically
from redan.reporting.figures import (
    MARKERS,
    convergence_figure,
    growth_figure,
    line_style,
    magnified,
    png,
    radius_figure,
    training_figures,
    trials_figure,
)
from redan.reporting.runs import Result, Run, Study, read_run

_Points = Sequence[CurvePoint]


@dataclass(frozen=True)
class _Picture:
    """One line of a gallery: what was seen, and what the model made of it.

    Attributes:
        index: of the test image.
        truth: its class.
        cells: (source, what it shows, what stands below) of each picture.
    """

    index: int
    truth: str
    cells: list[tuple[str, str, str]]


@dataclass(frozen=True)
class _Hard:
    """A study of hard examples: what was found, the figures of growth, and (source, text) a picture, by class.

    ``pictures`` has the hardest and the easiest of each class, by its name.
    """

    found: Difficulty
    figures: list[tuple[Growth, Markup]]
    pictures: dict[str, dict[str, list[tuple[str, DifficultEntry]]]]


@dataclass(frozen=True)
class _Curves:
    """One figure of accuracy against radius, and its legend: (colour, marker, label) a line."""

    title: str
    figure: Markup
    legend: list[tuple[str, str, str]]


@dataclass(frozen=True)
class _Step:
    """One step of the waterfall from all images down to those that stand.

    Attributes:
        title: of the attack.
        took: how many images it took; None for those that are left in the end.
        after: who stands after it.
        calls: mean model calls of the images that it took, or that are left; None where there are none.
    """

    title: str
    took: int | None
    after: Accuracy
    calls: float | None


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one HTML page about ``runs`` to ``out``, whole or not at all.

    The page needs nothing but itself: styles, curves and pictures are inside, and it asks no server for anything.
    The same folders give the same bytes.

    Args:
        runs: run folders, in the order in which the page shows them; the folder of a search stands for its best run,
            with all trials in a table.
        out: the HTML file; its folder is made where it does not exist.

    Returns:
        ``out``.

    Raises:
        UserError: where a folder is not a run, a file in it is damaged, or ``out`` cannot be written.
    """
    if not runs:
        raise UserError("a report needs at least one run folder")
    searches = {str(folder): Trials.load(folder / TRIALS) for folder in runs if (folder / TRIALS).is_file()}
    runs = list(dict.fromkeys(_best(folder, searches.get(str(folder))) for folder in runs))
    read = {name: _whole(read_run(folder)) for name, folder in zip(_names(runs), runs, strict=True)}
    evaluated = {f"{name}, {result.name}": result for name, run in read.items() for result in run.results}
    environment = Environment(
        loader=PackageLoader("redan.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.get_template("template.html.j2").render(
        runs=read,
        evaluated=evaluated,
        date=max(run.date for run in read.values()),
        searches=searches,
        trials_figures=_trials_figures,
        curves=_curves(read),
        randomised={title: result.evaluation for title, result in evaluated.items() if result.evaluation.randomised},
        analyses={name: run.analysis for name, run in read.items() if run.analysis is not None},
        studies={name: _study(name, run.study) for name, run in read.items() if run.study is not None},
        diagnostics={title: checks for title, result in evaluated.items() if (checks := result.evaluation.diagnostics)},
        galleries={title: _gallery(result) for title, result in evaluated.items() if len(result.images)},
        certificates={name: run.certificates for name, run in read.items() if run.certificates},
        share=_share,
        convergence=_convergence,
        steps=_steps,
        training_figures=training_figures,
        train=lambda run: shlex.join(["redan", "train", run.part("name")]),
        evaluate=_evaluate,
    )
    # A folder's name may hold bytes that are no text: they show as question marks.
    write_atomically(out, page.encode("utf-8", errors="replace"))
    return out


def _best(folder: Path, search: Trials | None) -> Path:
    """The folder itself or, of a search, that of its best run."""
    if search is None:
        return folder
    if search.best is None:
        raise UserError(f"no trial of {folder} is complete yet; it goes on with: {search.command}")
    run = Path(search.best.run)
    return folder / run.name if (folder / run.name).exists() else run  # another process may have its own folder


def _trials_figures(name: str, search: Trials) -> list[Markup]:
    """What the trials came to, one after another, and against each number that they differ in."""
    known = [trial for trial in search.trials if trial.value is not None]
    series: dict[str, list[Any]] = {"trial": [trial.number for trial in known]}
    for key in dict.fromkeys(key for trial in known for key in trial.parameters):
        series[key] = [trial.parameters.get(key) for trial in known]
    return [
        trials_figure(
            f"{name}: {search.judge} of {len(known)} trials against {key}",
            key,
            [(x, trial.value, trial.state == "complete") for x, trial in zip(xs, known, strict=True) if trial.value],
        )
        for key, xs in series.items()
        if all(isinstance(x, int | float) and not isinstance(x, bool) for x in xs)
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """What each run is called: its folder's name, or the whole path where two share that name."""
    names = [folder.resolve().name for folder in folders]
    counts = Counter(names)
    return [name if counts[name] == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


def _evaluate(run: Run, evaluation: Evaluation | None = None) -> str:
    """The command line that evaluates ``run``, as ``evaluation`` was made where one is given."""
    options: dict[str, object] = {}
    if evaluation is not None:
        options = {"--threat": evaluation.threat, "--attack": evaluation.attack}
        options |= {"--samples": evaluation.samples, "--seed": evaluation.seed}
        options |= {"--precision": evaluation.precision} if evaluation.precision != "auto" else {}
        options |= {"--checkpoint": "last"} if evaluation.checkpoint == "last" else {}
        options |= {"--draws": evaluation.randomised.draws} if evaluation.randomised else {}
    words = [str(word) for option in options.items() for word in option]
    return shlex.join(["redan", "evaluate", str(run.folder), *words])


def _share(value: float, samples: int) -> Accuracy:
    """A share that the results keep as one number, with its interval."""
    return Accuracy.of(round(value * samples), samples)


def _steps(evaluation: Evaluation) -> list[_Step]:
    """What each attack of the protocol took, counted in the rows; first those that no attack was needed for."""
    rows, left = evaluation.per_image, evaluation.samples
    groups = [("no attack", [row for row in rows if row.verdict == "misclassified"])]
    for attack in evaluation.attacks:
        groups.append((attack, [row for row in rows if row.verdict == "falsified" and row.by == attack]))
    steps = []
    for title, taken in groups:
        left -= len(taken)
        steps.append(_Step(title, len(taken), Accuracy.of(left, evaluation.samples), _mean_calls(taken)))
    standing = [row for row in rows if row.verdict in ("certified", "unknown")]
    return [*steps, _Step("every attack", None, steps[-1].after, _mean_calls(standing))]


def _mean_calls(rows: Sequence[Row]) -> float | None:
    return fmean(row.model_calls for row in rows) if rows else None


def _curves(runs: dict[str, Run]) -> list[_Curves]:
    """One figure for each data set and norm that has curves."""
    groups: dict[tuple[str, str], list[tuple[str, str, _Points, _Points]]] = {}
    for name, run in runs.items():
        drawn: list[_Points] = []
        for result in run.results:
            it = result.evaluation
            lower = it.certified_curve
            if it.curve or lower:
                drawn.append(lower)
                key = (it.dataset, it.threat.partition(":")[0])
                groups.setdefault(key, []).append((name, result.name, it.curve, lower))
        for proved in run.certificates:
            if proved.curve and proved.curve not in drawn:
                key = (proved.dataset, proved.threat.partition(":")[0])
                covers = "" if proved.sound_float == "exact" else f" (rounding: {proved.sound_float})"
                groups.setdefault(key, []).append((name, f"certified by {proved.method}{covers}", (), proved.curve))
    figures = []
    for (dataset, norm), members in groups.items():
        lines = Counter(name for name, *_ in members)
        labels = [name if lines[name] == 1 else f"{name}, {title}" for name, title, *_ in members]
        ends = [
            f"{label} {100 * points[0].accuracy.value:.1f} %{what} at {points[0].radius:.3g}, "
            f"{100 * points[-1].accuracy.value:.1f} % at {points[-1].radius:.3g}"
            for label, (*_, standing, certified) in zip(labels, members, strict=True)
            for points, what in ((standing, ""), (certified, " certified"))
            if points
        ]
        title = f"{dataset}, {norm}"
        pairs = [(standing, certified) for *_, standing, certified in members]
        figure = radius_figure(f"Accuracy against radius on {title}: {'; '.join(ends)}", norm, pairs)
        styles = [line_style(position) for position in range(len(members))]
        legend = [(colour, MARKERS[marker], label) for (colour, marker), label in zip(styles, labels, strict=True)]
        figures.append(_Curves(title, figure, legend))
    return figures


def _whole(run: Run) -> Run:
    """The run with its evaluations as brackets, where the same images within the same threat were certified apart."""

    def bracketed(it: Evaluation) -> Evaluation:
        asked = (it.dataset, it.threat, it.checkpoint, it.samples, it.samples)
        proofs = [
            proof
            for proof in run.certificates
            if (proof.dataset, proof.threat, proof.checkpoint, proof.images, proof.samples) == asked
            and proof.sound_float != "off"
        ]
        if it.certified is not None or it.randomised is not None or not proofs:
            return it
        return bracket(it, max(proofs, key=lambda proof: proof.proved.correct))

    return replace(run, results=[replace(it, evaluation=bracketed(it.evaluation)) for it in run.results])


def _gallery(result: Result) -> list[_Picture]:
    """The pictures of one evaluation."""
    names = result.evaluation.class_names

    def said(label: int, confidence: float) -> str:
        return f"{names[label]} {100 * confidence:.1f} %"

    pictures = []
    for i, entry in enumerate(result.evaluation.gallery):
        image, adversarial = result.images[i], result.adversarials[i]
        difference, magnification = magnified(image, adversarial)
        before = said(entry.prediction, entry.confidence)
        after = said(entry.adversarial_prediction, entry.adversarial_confidence)
        times = f"{magnification:.3g}"
        cells = [
            (png(image), names[entry.label], before),
            (png(adversarial), f"after the attack, taken for {after}", after),
            *((png(stage[i]), f"after the attack, {name}", name) for name, stage in result.inside.items()),
            (
                png(difference),
                f"difference by the attack, magnified {times} times",
                f"difference ×\N{NO-BREAK SPACE}{times}",
            ),
        ]
        pictures.append(_Picture(entry.index, names[entry.label], cells))
    return pictures


def _convergence(title: str, evaluation: Evaluation) -> list[Markup]:
    """Accuracy against PGD's steps, and against the draws behind each gradient."""
    points, drawn = evaluation.convergence, evaluation.randomised
    if not points or drawn is None:
        return []
    # Steps vary at the evaluation's own number of draws; the points at any other number share their steps.
    fixed = {point.steps for point in points if point.draws != drawn.draws}
    by_steps = {point.steps: point for point in points if point.draws == drawn.draws}
    by_draws = {point.draws: point for point in points if point.steps in fixed}
    figures = []
    for what, series in (("steps of PGD", by_steps), ("draws behind a gradient", by_draws)):
        if series:
            at = sorted(series.items())
            ends = ", ".join(f"{100 * point.accuracy.value:.1f} % at {x}" for x, point in (at[0], at[-1]))
            figures.append(convergence_figure(f"{title}: accuracy against {what}, {ends}", what, at))
    return figures


def _study(name: str, study: Study) -> _Hard:
    """The figures and pictures of a study of hard examples."""
    found = study.found
    figures = []
    for growth in (found.growth, found.training_growth):
        if growth is not None:
            ends = (
                f"{which} {getattr(growth.points[0], key):.3f} to {getattr(growth.points[-1], key):.3f}"
                for which, key in (("hardest tenth", "hardest"), ("all", "mean"), ("easiest tenth", "easiest"))
            )
            alt = f"{name}, {growth.measure}, from the least radius to the greatest: {', '.join(ends)}"
            figures.append((growth, growth_figure(alt, found.threat.partition(":")[0], growth)))
    pictures: dict[str, dict[str, list[tuple[str, DifficultEntry]]]] = {}
    for entry, image in zip(found.gallery, study.images, strict=True):
        ends_of_class = pictures.setdefault(found.class_names[entry.label], {"hardest": [], "easiest": []})
        ends_of_class[entry.end].append((png(image / 255), entry))
    return _Hard(found, figures, pictures)
