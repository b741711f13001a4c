"""The best values of a space, searched by trials: Optuna draws them, a run is trained with each, held-out images judge.

The judge is the accuracy of a run's shipped weights (clean of ``standard``, else robust), or what of it can be
certified, on training images that the recipe holds out; the test set is never looked at. A search's folder holds one
run folder a trial, ``sweep.json`` and ``sweep.md`` (the trials), ``space.yaml``, ``best.yaml`` (the best trial's
recipe) and, unless another storage is named, ``sweep.sqlite``.
"""

import shlex
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.exceptions import StorageInternalError, TrialPruned, UpdateFinishedTrialError
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from redan.certification.verifier import Verifier
from redan.data.registry import load_dataset
from redan.errors import Stopped, UserError
from redan.evaluation.results import Accuracy
from redan.evaluation.trials import TRIALS, State, Trial, Trials
from redan.files import write_atomically
from redan.methods.base import Phase
from redan.recipes.build import build
from redan.recipes.schema import Recipe, load_recipe
from redan.run import STATE, take_over
from redan.seeds import derive_seed
from redan.sweeping.judge import certified
from redan.sweeping.runs import train_run, trained
from redan.sweeping.space import Space, load_space
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
from redan.training.trainer import Validation
from redan.version import __version__

# SQLite and not Optuna's journal file: a transaction is kept whole or not at all, so that a kill in the middle of a
# write costs nothing and leaves no lock behind; a journal's torn last line makes the next writer's unreadable, too.
# Several processes on one machine take turns at it; network file systems do not lock well enough, hence --storage.
STORAGE = "sweep.sqlite"
LOCKED_SECONDS = 60.0
BEAT, SILENCE = 15, 60  # seconds: a trial whose process has not been heard of for so long was cut off
POLL_SECONDS = 3.0

PLACE = "place"  # of a trial that was cut off and is tried again: the place of the first try
STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def search(
    recipe: str | Path,
    *,
    space: str | Path | Mapping[str, Any],
    trials: int,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    pruning: bool = True,
    certify: str | None = None,
    storage: str | None = None,
    out: str | Path = "runs/sweep",
    data_dir: str | Path | None = None,
    progress: bool = True,
) -> Trials:
    """Train a recipe with values drawn from a space, until so many trials are finished.

    The same call goes on where an earlier one was stopped or killed, in the middle of a trial, too. Trial by trial it
    draws what an uninterrupted one would have drawn: values depend on the seed, the trial's place and what is finished.

    Args:
        recipe: the name of a shipped recipe, a YAML file or a run folder.
        space: the name of a shipped space, a YAML file, or its content; see ``redan.sweeping.space``.
        trials: how many are to be complete or pruned in the end, those of earlier calls counted.
        overrides: recipe values by dotted key, for every trial.
        seed: of what is drawn; that of the training is the recipe's.
        pruning: end a trial whose accuracy falls behind the median of the complete ones at the same epoch; not in the
            first quarter of its epochs, those of all phases, and not before five trials are complete.
        certify: judge by the held-out images that this method certifies at the end, see ``redan.certify``; no trial is
            pruned then, for the accuracy on the way says little about it.
        storage: the URL of a database, for processes on several machines; by default a file in ``out``.
        out: the folder of the search.
        data_dir: the folder of data sets.
        progress: show it on standard error.

    Returns:
        The trials. One that failed, such as by a loss that is not finite, has ``error`` and is not counted; a later
        call draws another in its place.

    Raises:
        UserError: for a mistake in any of these, before the first trial starts; or where folder or storage fail.
        Stopped: on Ctrl-C, or SIGTERM in training; the same call goes on.
    """
    changes = {key: plain_value(key, value) for key, value in (overrides or {}).items()}
    data = None if data_dir is None else Path(data_dir)
    if trials < 1:
        raise UserError(f"--trials is at least 1, got {trials}")
    read = load_space(space)
    base, epochs = _checked(recipe, changes, read, data)
    verifier = None if certify is None else Verifier(certify)
    folder = Path(out)
    if (folder / TRIALS).exists():
        Trials.load(folder / TRIALS)  # a grid's folder is no search's
    given = folder / "space.yaml" if isinstance(space, Mapping) else space
    command = _command(recipe, changes, given, trials, seed, pruning, certify, storage, folder)
    pruner = MedianPruner(n_warmup_steps=epochs // 4 + 1) if pruning and certify is None else NopPruner()
    with _storage_errors(storage or str(folder / STORAGE)):
        study = _opened(storage, folder, base.name, pruner)
        this = {"recipe": base.resolved(), "space": _plain(read), "seed": seed, "certify": certify}
        _refuse_another(study, this, storage or str(folder))
        return _Search(recipe, changes, read, trials, seed, verifier, study, folder, data, command, progress).run()


def summary(found: Trials) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and lines of the table, one line a trial; accuracies with the exact 95 % interval over images."""
    keys = list(dict.fromkeys(key for trial in found.trials for key in trial.parameters))
    short = short_keys(keys)
    lines = [
        [
            str(trial.number),
            "best" if trial == found.best else trial.state,
            *(_brief(trial.parameters[key]) if key in trial.parameters else "–" for key in keys),
            "–" if trial.value is None else str(trial.value),
            "–" if trial.epochs is None else str(trial.epochs),
            "–" if trial.seconds is None else duration(trial.seconds),
        ]
        for trial in found.trials
    ]
    return ("trial", "state", *(short[key] for key in keys), "validation", "epochs", "time"), lines


class _Search:
    """A search under way in this process."""

    def __init__(
        self,
        source: str | Path,
        overrides: dict[str, Any],
        space: Space,
        wanted: int,
        seed: int,
        verifier: Verifier | None,
        study: Study,
        folder: Path,
        data_dir: Path | None,
        command: str,
        progress: bool,
    ) -> None:
        self.source, self.overrides, self.space = source, overrides, space
        self.wanted, self.seed, self.verifier, self.study = wanted, seed, verifier, study
        self.folder, self.data_dir, self.command, self.progress = folder, data_dir, command, progress
        self.failed = 0  # in this call: what fails every time must not go on for ever
        self.present: int | None = None  # Optuna's number of the trial in work
        self.durations: list[float] = []

    def run(self) -> Trials:
        """Trials until enough are finished."""
        found = self._write()  # a folder that cannot be written is told before hours of training
        write_atomically(self.folder / "space.yaml", yaml.safe_dump(_plain(self.space), sort_keys=False).encode())
        try:
            self._await_cut_off()
            while (left := self._left()) > 0:
                if self._running() >= left:
                    time.sleep(POLL_SECONDS)  # others are at the last ones, or were: then these come back
                    _return_cut_off(self.study)
                    continue
                started = time.monotonic()
                _return_cut_off(self.study)
                try:
                    self.study.optimize(self._try, n_trials=1, catch=(UserError,))
                except (UpdateFinishedTrialError, ValueError):  # the storage refuses, or Optuna itself
                    if not self._taken_over():
                        raise
                    self._say("the trial was handed to another process, for this one was silent for too long")
                self.durations.append(time.monotonic() - started)
                found = self._write()
                self._tell(found)
                self.present = None
        except (Stopped, KeyboardInterrupt) as stop:
            raise Stopped(f"stopped{self._hand_back_present()}; the same command goes on") from stop
        return found

    def _try(self, trial: optuna.Trial) -> float:
        """Train a trial's run, from where it is, to its end or until it is pruned."""
        self.present = trial.number
        place = self._present_place()
        # Randomness has no state: what is drawn does not depend on when this process began.
        self.study.sampler = TPESampler(seed=derive_seed(self.seed, "trial", place) % 2**32)
        values = {key: entry.draw(trial, key) for key, entry in self.space.items()}
        short = short_keys(values)
        left = f" (about {duration(statistics.fmean(self.durations) * self._left())} left)" if self.durations else ""
        drawn = " ".join(f"{short[key]}={_brief(value)}" for key, value in values.items())
        self._say(f"trial {place} of {self.wanted}: {drawn}{left}")
        folder = self.folder / folder_name(f"{self._recipe({}).name}-trial{place:03d}")
        trial.set_user_attr("run", str(folder))

        def look(validation: Validation) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an epoch that a kill undid has been reported already
                trial.report(validation.score, validation.epoch)
            if self.verifier is None:
                images = recipe.data.validation_samples
                trial.set_user_attr("value", {"correct": round(validation.best * images), "samples": images})
            if not validation.last and trial.should_prune():
                raise TrialPruned

        try:
            recipe = self._recipe(values)
            train_run(recipe, folder, data_dir=self.data_dir, progress=self.progress, on_validation=look)
            if self.verifier is not None:
                proved = certified(folder, self.verifier, self.data_dir)
                trial.set_user_attr("value", {"correct": proved.correct, "samples": proved.samples})
            if "value" not in trial.user_attrs:
                raise UserError(f"{folder} holds a run that is not of this search; choose another --out")
        except TrialPruned:
            _lighten(folder)
            raise
        except UserError as error:
            self.failed += 1
            trial.set_user_attr("error", str(error))
            raise
        finally:
            if (folder / "metrics.jsonl").exists():
                epochs, seconds = trained(folder)
                trial.set_user_attr("trained", {"epochs": epochs, "seconds": seconds})
        return Accuracy.of(**trial.user_attrs["value"]).value

    def _recipe(self, values: dict[str, Any]) -> Recipe:
        return load_recipe(self.source, self.overrides | values)

    def _left(self) -> int:
        """Trials still to be begun or finished, by whomever."""
        finished = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        return self.wanted - len(finished) - self.failed

    def _running(self) -> int:
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    def _await_cut_off(self) -> None:
        """Where trials are said to be running, wait until it is known whether they are; what was cut off goes first."""
        known = time.monotonic() + SILENCE + BEAT
        _return_cut_off(self.study)
        if self._running() and self._left() > 0:
            self._say("a trial is under way in another process, or was cut off; this shows within about a minute")
        while self._running() and self._left() > 0 and time.monotonic() < known:
            time.sleep(POLL_SECONDS)
            _return_cut_off(self.study)

    def _hand_back_present(self) -> str:
        """Keep the trial in work for the next call; the words that name it."""
        if self.present is None:
            return ""
        trial = next(trial for trial, _ in _placed(self.study) if trial.number == self.present)
        if trial.state == TrialState.FAIL:  # as Optuna leaves it
            _hand_back(self.study, trial)
            self._write()
        return f" in trial {self._present_place()} of {self.wanted}"

    def _taken_over(self) -> bool:
        """Whether the trial in work has been handed back, so that it is somebody else's now."""
        if self.present is None:
            return False
        last = [trial.number for trial, place in _placed(self.study) if place == self._present_place()][-1]
        return last != self.present

    def _present_place(self) -> int:
        return next(place for trial, place in _placed(self.study) if trial.number == self.present)

    def _write(self) -> Trials:
        """Write what the storage knows into the folder."""
        found = Trials(
            redan_version=__version__,
            command=self.command,
            wanted=self.wanted,
            certify=None if self.verifier is None else self.verifier.method,
            trials=tuple(_trials(self.study, self.space)),
        )
        if found.best is not None:
            self._recipe(found.best.parameters).save(self.folder / "best.yaml")
        write_atomically(self.folder / TRIALS, found.model_dump_json(indent=1).encode())
        write_atomically(self.folder / "sweep.md", _markdown(found).encode())
        return found

    def _tell(self, found: Trials) -> None:
        """Say what became of the trial that has just ended."""
        trial = next(trial for trial in found.trials if trial.number == self._present_place())
        best = ", the best so far" if trial == found.best else ""
        value = "" if trial.value is None else f" at {trial.value}"
        self._say(f"trial {trial.number} {trial.state}{f': {trial.error}' if trial.error else value}{best}")

    def _say(self, line: str) -> None:
        if self.progress:
            print(line, file=sys.stderr)


def _checked(source: str | Path, overrides: dict[str, Any], space: Space, data_dir: Path | None) -> tuple[Recipe, int]:
    """The recipe that values are drawn for, and how long a trial is; what does not take the space's ends is told here.

    Returns:
        The recipe, and the epochs of all phases of the trial that has the last of all ends.
    """
    for key in space:
        if key in overrides:
            raise UserError(f"{key} has a value for every trial and values in the space; leave one of them out")
        if key == "seed":
            raise UserError("a seed is no value to search for: it would choose the held-out images, too")
    base = load_recipe(source, overrides)
    if not base.data.validation_samples:
        raise UserError("trials are judged on held-out images, and none are; set data.validation_samples")
    ends = [load_recipe(source, overrides | {key: end}) for key, entry in space.items() for end in entry.ends()]
    corner = load_recipe(source, overrides | {key: entry.ends()[-1] for key, entry in space.items()})
    ends.append(corner)
    datasets = {name: load_dataset(name, data_dir) for name in {recipe.data.name for recipe in ends}}
    for recipe in ends:
        dataset = datasets[recipe.data.name]
        method = build(recipe, dataset.facts)  # options that do not fit the network are told here
    take_over(method, corner, dataset)
    planned = Phase("training", corner.epochs, corner.optimizer, corner.schedule)
    return base, sum(phase.epochs for phase in method.phases(planned))


@contextmanager
def _storage_errors(storage: str) -> Iterator[None]:
    """What a storage says in many lines, in one; Optuna itself is silent, for redan speaks."""
    spoken = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error.__cause__ or error
        reason = str(getattr(cause, "orig", None) or cause).splitlines()[0]
        raise UserError(f"the storage {_shown(storage)} cannot be used: {reason}") from error
    finally:
        optuna.logging.set_verbosity(spoken)


def _shown(storage: str) -> str:
    """The storage without a password."""
    try:
        return make_url(storage).render_as_string(hide_password=True)
    except ArgumentError:
        return storage


def _opened(url: str | None, folder: Path, name: str, pruner: BasePruner) -> Study:
    """The search in its storage; a new one where there is none."""
    options: dict[str, Any] = {}
    if url is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {error.strerror}") from error
        url, name = f"sqlite:///{folder / STORAGE}", "sweep"
    if url.startswith("sqlite"):
        options = {"connect_args": {"timeout": LOCKED_SECONDS}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls heartbeats experimental
            backend = RDBStorage(
                url,
                engine_kwargs=options,
                heartbeat_interval=BEAT,
                grace_period=SILENCE,
                heartbeat_stale_trial_callback=_hand_back,
            )
    except (ArgumentError, ImportError, RuntimeError) as error:
        raise UserError(
            f"--storage {_shown(url)}: {str(error).splitlines()[0]} It is the URL of a database whose driver is "
            "installed, such as postgresql://user@host/name"
        ) from error
    return optuna.create_study(
        storage=backend, study_name=name, direction="maximize", pruner=pruner, load_if_exists=True
    )


def _refuse_another(study: Study, this: dict[str, Any], where: str) -> None:
    """Raises: UserError where the storage holds another search of the same name."""
    if "search" not in study.user_attrs:
        study.set_user_attr("search", this)
    if differing := differences(study.user_attrs["search"], this):
        raise UserError(f"{_shown(where)} holds another search: {differing}; choose another --out, or -o name=NEW")


def _placed(study: Study) -> list[tuple[FrozenTrial, int]]:
    """Every try with its trial's place, from 1: a trial that was cut off is tried again and keeps its place."""
    again = 0
    placed = []
    for trial in study.get_trials(deepcopy=False):
        again += PLACE in trial.user_attrs
        placed.append((trial, trial.user_attrs.get(PLACE, trial.number + 1 - again)))
    return placed


def _hand_back(study: Study, trial: FrozenTrial) -> None:
    """Queue a trial that was cut off once more, with its values and all that it has reported."""
    place = next(place for other, place in _placed(study) if other.number == trial.number)
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=trial.user_attrs | {PLACE: place},
            intermediate_values=trial.intermediate_values,
        )
    )


def _return_cut_off(study: Study) -> None:
    """Hand back the trials whose process has not been heard of for long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna.storages.fail_stale_trials(study)
    silent = datetime.now() - timedelta(seconds=SILENCE)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if "run" not in trial.user_attrs and trial.datetime_start is not None and trial.datetime_start < silent:
            with suppress(ValueError):  # another process was faster
                study.tell(trial.number, state=TrialState.FAIL)  # cut off before it could be heard of at all
                _hand_back(study, trial)


def _trials(study: Study, space: Space) -> list[Trial]:
    """The trials by place, each as its last try left it."""
    last = {place: trial for trial, place in _placed(study)}
    return [
        Trial(
            number=place,
            state=STATES[trial.state],
            parameters={key: entry.value(trial.params[key]) for key, entry in space.items() if key in trial.params},
            value=Accuracy.of(**trial.user_attrs["value"]) if "value" in trial.user_attrs else None,
            run=trial.user_attrs.get("run", ""),
            **trial.user_attrs.get("trained", {}),
            error=trial.user_attrs.get("error"),
        )
        for place, trial in sorted(last.items(), key=lambda item: item[0])
    ]


def _lighten(folder: Path) -> None:
    """Leave of a pruned run what tells about it: recipe, environment, metrics, TensorBoard."""
    shutil.rmtree(folder / STATE.parent, ignore_errors=True)
    for path in folder.glob("*.safetensors"):
        path.unlink()


def _brief(value: Any) -> str:
    """A value for readers; ``sweep.json`` has all digits."""
    return f"{value:.4g}" if isinstance(value, float) else as_text(value)


def _plain(space: Space) -> dict[str, Any]:
    return {key: entry.model_dump(mode="json", exclude_defaults=True) for key, entry in space.items()}


def _markdown(found: Trials) -> str:
    """The table for readers."""
    best = found.best
    chosen = "No trial is complete yet.\n" if best is None else f"Best: trial {best.number}, in `best.yaml`.\n"
    failures = "".join(f"* trial {trial.number} failed: {trial.error}\n" for trial in found.trials if trial.error)
    return (
        f"# Search\n\n```\n{found.command}\n```\n\n{chosen}"
        "Validation is the accuracy of the run's shipped weights on held-out training images, clean of `standard`,\n"
        "else robust, or, with `--certify`, what of it could be certified [95 % interval]; the greatest of many\n"
        "such is too high by chance, so the test set has the last word. "
        f"redan {found.redan_version}.\n\n{markdown_table(*summary(found))}" + (f"\n{failures}" if failures else "")
    )


def _command(
    recipe: str | Path,
    overrides: dict[str, Any],
    space: str | Path,
    trials: int,
    seed: int,
    pruning: bool,
    certify: str | None,
    storage: str | None,
    folder: Path,
) -> str:
    """The command line that goes on with the search."""
    words = ["redan", "sweep", str(recipe), "--space", str(space), "--trials", str(trials)]
    for key, value in overrides.items():
        words += ["-o", f"{key}={flow(value)}"]
    words += ["--seed", str(seed)] if seed else []
    words += [] if pruning else ["--no-pruning"]
    words += [] if certify is None else ["--certify", certify]
    words += [] if storage is None else ["--storage", _shown(storage)]
    return shlex.join([*words, "--out", str(folder)])
