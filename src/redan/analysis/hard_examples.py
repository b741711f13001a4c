"""Which training examples are hard, how their difficulty grows with the radius, and how they are fitted in the end.

The questions are those of Lee, Lee, Bae & Yoon (JMLR 26, 2025): that training against an attack makes hard examples
harder still, and that it fits them by memorising their labels, as it does wrong ones. Their definitions are not public;
these are ours. Difficulty is 1 - p_y, the confidence in the label that training was given, in [0, 1].
"""

import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import Progress
from scipy.stats import ConstantInputWarning, spearmanr
from torch import Tensor, nn

from redan.analysis.progress import progress_bar
from redan.analysis.results import (
    DIFFICULTY,
    Correlations,
    DifficultEntry,
    Difficulty,
    Fitted,
    Growth,
    GrowthPoint,
    Memorisation,
)
from redan.attacks.pgd import PGD
from redan.attacks.search import SearchModel
from redan.data.pipeline import center_crop, to_float
from redan.data.registry import load_dataset
from redan.data.types import Dataset, ImageSet
from redan.errors import UserError
from redan.methods.base import Phase
from redan.methods.dpls import DPLSConfig
from redan.methods.registry import METHODS
from redan.recipes.build import build, image_size, positions, split
from redan.recipes.schema import Recipe
from redan.run import STATE, read_difficulty, read_facts, read_run
from redan.seeds import generator
from redan.tensors import load_tensors, save_tensors
from redan.threats import LpBall
from redan.training.monitor import EXAMPLES
from redan.version import __version__

STEPS = 10  # of the PGD that measures difficulty
SHARES = (0.0, 0.25, 0.5, 1.0)  # of the run's radius, where no radii are asked for
DECILES = 10
GALLERY_CLASSES, GALLERY_IMAGES = 10, 3  # the first so many classes; so many hardest and easiest of each
PART = 250  # images at a time
LEAST = 2.0**-24  # of float16, in which a record keeps confidences


class _Examples(NamedTuple):
    """Training examples: ``positions`` in the data set's training images and ``labels``, both int64 ``(n,)``."""

    positions: Tensor
    labels: Tensor


@dataclass(frozen=True)
class _Subject:
    """A run and its training examples, in order of their positions in the data set's training images."""

    name: str
    folder: Path
    recipe: Recipe
    network: nn.Module
    dataset: Dataset
    positions: Tensor
    training: ImageSet

    @property
    def threat(self) -> LpBall:
        return self.recipe.parsed_threat()

    @property
    def trained_threat(self) -> LpBall:
        """What it was trained against: a ball of radius 0 where its method has no attack."""
        attacks = METHODS[self.recipe.method.name].attacks
        return self.threat if attacks else replace(self.threat, radius=0.0)

    def rows(self, wanted: _Examples) -> tuple[Tensor, Tensor]:
        """Which of the wanted it was trained with, under the same label: bool ``(n,)``, and their rows here, int64."""
        (there,) = torch.isin(wanted.positions, self.positions).nonzero(as_tuple=True)
        rows = torch.searchsorted(self.positions, wanted.positions[there])
        same = self.training.labels[rows] == wanted.labels[there]
        shared = torch.zeros(len(wanted.positions), dtype=torch.bool)
        shared[there[same]] = True
        return shared, rows[same]


@dataclass(frozen=True)
class _Record:
    """What ``examples.safetensors`` holds: ``(epochs, examples)`` each."""

    confidence: Tensor
    correct: Tensor


class _Measured(NamedTuple):
    """What a measure, in words, says of examples: difficulties ``(n,)``, NaN where it does not know one."""

    measure: str
    values: Tensor


def study_difficulty(
    run: str | Path,
    *,
    against: Sequence[str | Path] = (),
    radii: Sequence[float] | None = None,
    samples: int | None = None,
    seed: int = 0,
    data_dir: str | Path | None = None,
    progress: bool = True,
) -> Difficulty:
    """Study which training examples of a run are hard; kept as its ``difficulty.json`` and ``difficulty.safetensors``.

    The second file holds ``positions`` int64 ``(n,)`` of the examples in the data set's training images, their
    ``difficulty`` float32 ``(n, radii)``, ``training`` float32 ``(n,)``, what the run itself measured (of DPLS alone),
    and ``images`` uint8 ``(k, c, h, w)``, row by row those of the gallery: the three hardest and the three easiest of
    each of the first ten classes.

    The measures that are correlated: what DPLS measured in the run; of its record of examples the mean confidence and
    the mean loss (whose rank is DPLS's ``loss-rank``) over the epochs that DPLS counts, all epochs in a run without,
    and the confidence in the last of these alone; the last weights at the least and the greatest of the radii; in each
    further run what DPLS measured there, or else its last weights at that greatest radius; and the mean of two or more
    further runs that measured alike, of an example over those that know it. Confidence stands for 1 - p_y.

    Args:
        run: a run folder; its last weights are studied.
        against: further runs on the same data, to compare with on the examples that they share, labels included.
        radii: of the attack, in the norm of the run's threat and in pixels of [0, 1], in any order; 0 is no attack.
            0, 1/4, 1/2 and all of the run's own radius if None.
        samples: the first so many training images, in order of position, at least 10; all if None.
        seed: of the attacks.
        data_dir: the folder of data sets.
        progress: show it on standard error.

    Returns:
        The study.

    Raises:
        UserError: where a folder is not a run, or one on other data, or a number is out of range.
    """
    started = time.perf_counter()
    recipe, _ = read_facts(run)
    dataset = load_dataset(recipe.data.name, Path(data_dir) if data_dir is not None else None)
    subject, *others = _subjects([run, *against], dataset)
    available = len(subject.positions)
    number = available if samples is None else samples
    if not DECILES <= number <= available:
        raise UserError(f"--samples is from {DECILES} to {available}, the training images of this run; got {number}")
    chosen = _Examples(subject.positions[:number], subject.training.labels[:number])
    threats = _threats(subject.threat, radii)
    bar = progress_bar(show=progress)
    missing = []
    with bar:
        difficulty = torch.stack([_attacked(subject, chosen, threat, seed, bar) for threat in threats])
        training, record = _measured(subject, chosen), _recorded(subject)
        measures = {}
        if training is None:
            missing.append("difficulty in training needs a run that measures its own: train with -o dpls.scale=0")
        else:
            measures[training.measure] = training.values
        if record is None:
            missing.append("difficulty by epoch needs a record of examples: train with -o monitor.examples=true")
        elif not (by_epoch := _by_epoch(subject, record.confidence[:, :number])):
            missing.append("difficulty by epoch needs an epoch after dpls.first in the record of examples")
        else:
            measures |= by_epoch
        for threat, values in ((threats[0], difficulty[0]), (threats[-1], difficulty[-1])):
            measures[_last_weights(threat)] = values
        found = [
            _measured(other, chosen)
            or _Measured(_last_weights(threats[-1]), _attacked(other, chosen, threats[-1], seed, bar))
            for other in others
        ]
        measures |= {f"run {other.name}: {it.measure}": it.values for other, it in zip(others, found, strict=True)}
        if len({it.measure for it in found}) > 1:
            missing.append("the mean of the runs compared with needs them to measure alike")
        elif len(found) > 1:
            mean = torch.stack([it.values for it in found]).nanmean(0)
            measures[f"mean of {len(found)} runs: {found[0].measure}"] = mean
        over_runs = _training_growth([subject, *others], chosen, seed, bar)
    if isinstance(over_runs, str):
        missing.append(over_runs)
    fitted = "memorisation needs the same record" if record is None else _memorisation(subject, record)
    if isinstance(fitted, str):
        missing.append(fitted)
    growth = _growth(
        f"1 - p_y of PGD-{STEPS} on the last weights",
        [subject.name] * len(threats),
        [threat.radius for threat in threats],
        difficulty,
        losses=True,
    )
    assert growth is not None  # of at least ten examples, all measured
    gallery = _gallery(subject, difficulty.mean(0))
    result = Difficulty(
        redan_version=__version__,
        run=subject.name,
        against=tuple(other.name for other in others),
        method=recipe.method.name,
        threat=recipe.threat,
        attack=f"pgd-{STEPS}",
        seed=seed,
        samples=number,
        class_names=dataset.class_names,
        correlations=_correlations(measures),
        growth=growth,
        training_growth=over_runs if isinstance(over_runs, Growth) else None,
        memorisation=fitted if isinstance(fitted, Memorisation) else None,
        gallery=gallery,
        missing=tuple(missing),
        seconds=round(time.perf_counter() - started, 3),
    )
    shown = torch.tensor([entry.position for entry in gallery])
    tensors = {"positions": chosen.positions, "difficulty": difficulty.T, "images": dataset.train.images[shown]}
    tensors |= {} if training is None else {"training": training.values}
    path = subject.folder / DIFFICULTY
    save_tensors(path.with_suffix(".safetensors"), tensors)
    result.save(path)
    return result


def _threats(threat: LpBall, radii: Sequence[float] | None) -> list[LpBall]:
    """The balls of the study, the smallest first."""
    if radii is None:
        radii = [share * threat.radius for share in SHARES]
    if not radii:
        raise UserError("radii is a list of at least one radius, such as 0,2/255,4/255,8/255")
    return sorted((replace(threat, radius=radius) for radius in set(radii)), key=lambda it: it.radius)


def _subjects(runs: Sequence[str | Path], dataset: Dataset) -> list[_Subject]:
    names = [Path(run).resolve().name for run in runs]
    subjects = []
    for run, name in zip(runs, names, strict=True):
        recipe, _, network = read_run(run, "last")
        if recipe.data.name != dataset.name:
            raise UserError(f"{run} is a run on {recipe.data.name}, not on {dataset.name}")
        name = name if Counter(names)[name] == 1 else str(run)
        training, _ = split(recipe, dataset)
        subjects.append(_Subject(name, Path(run), recipe, network, dataset, positions(recipe, dataset)[0], training))
    return subjects


@torch.no_grad()
def _attacked(subject: _Subject, wanted: _Examples, threat: LpBall, seed: int, bar: Progress) -> Tensor:
    """1 - p_y under PGD, or of the clean image at radius 0: ``(n,)``, NaN where the run has no such example."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = subject.network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    search = SearchModel(network)
    attack = PGD(threat, steps=STEPS, drop_broken=False)
    size = image_size(subject.recipe, subject.dataset.facts)
    shared, rows = subject.rows(wanted)
    parts = []
    for start in bar.track(range(0, len(rows), PART), description=f"{subject.name}, {threat}"):
        part = rows[start : start + PART]
        images = center_crop(to_float(subject.training.images[part].to(device)), size)
        labels = subject.training.labels[part].to(device)
        if threat.radius:
            images = attack.run(search, images, labels, generator(seed, "difficulty", start)).images
        confidence = network(images).float().softmax(1).gather(1, labels[:, None]).squeeze(1)
        parts.append(1 - confidence.cpu())
    found = torch.full(wanted.labels.shape, torch.nan)
    found[shared] = torch.cat(parts) if parts else torch.empty(0)
    return found


def _last_weights(threat: LpBall) -> str:
    return f"{f'PGD-{STEPS} {threat}' if threat.radius else 'clean'}, last weights"


def _measured(subject: _Subject, wanted: _Examples) -> _Measured | None:
    """The difficulty that a run with DPLS measured itself; None without."""
    dpls = subject.recipe.dpls
    if dpls is None or dpls.sources:
        return None
    try:
        found = read_difficulty(subject.folder, subject.dataset, given_labels=True)[wanted.positions]
    except UserError:  # it has measured nothing yet
        return None
    _, place = load_tensors(subject.folder / STATE)
    # The epoch in progress counts, too.
    epochs = _spelt(_counted(dpls, place["epoch"] + (place["step"] > 0)))
    return _Measured(f"DPLS ({dpls.difficulty}, {epochs})", found.where(subject.rows(wanted)[0], torch.nan))


def _counted(dpls: DPLSConfig | None, epochs: int) -> range:
    """Those of the first so many epochs, from 0, over which DPLS measures; all where a run measures nothing itself."""
    return range(epochs) if dpls is None or dpls.sources else range(epochs)[dpls.first : dpls.warmup]


def _spelt(epochs: range) -> str:
    """As people count them, from 1."""
    return f"epoch {epochs[-1] + 1}" if len(epochs) == 1 else f"epochs {epochs[0] + 1}-{epochs[-1] + 1}"


def _by_epoch(subject: _Subject, confidence: Tensor) -> dict[str, Tensor]:
    """Measures of difficulty in a record ``(epochs, n)``; none where it has no epoch that DPLS counts."""
    epochs = _counted(subject.recipe.dpls, len(confidence))
    if not epochs:
        return {}
    kind = "adversarial" if METHODS[subject.recipe.method.name].attacks else "clean"
    counted = confidence[epochs.start : epochs.stop]
    return {
        f"mean {kind} confidence, {_spelt(epochs)}": 1 - counted.nanmean(0),
        f"mean {kind} loss, {_spelt(epochs)}": -counted.clamp(min=LEAST).log().nanmean(0),
        f"{kind} confidence, {_spelt(epochs[-1:])}": 1 - counted[-1],
    }


def _recorded(subject: _Subject) -> _Record | None:
    """The record of its examples that a run kept; None where it has none."""
    path = subject.folder / EXAMPLES
    if not path.exists():
        return None
    tensors, _ = load_tensors(path)
    try:
        confidence, correct, where = (tensors[name] for name in ("adversarial", "correct", "positions"))
        whole = confidence.shape == correct.shape == (len(confidence), len(where)) and len(confidence) > 0
    except (KeyError, TypeError):
        whole = False
    if not whole or not torch.equal(where, subject.positions):
        raise UserError(f"{path} is not a record of this run's {len(subject.positions)} training examples")
    return _Record(confidence.float(), correct)


def _correlations(measures: dict[str, Tensor]) -> Correlations:
    rows = [[_spearman(one, other) for other in measures.values()] for one in measures.values()]
    return Correlations(
        names=tuple(measures),
        spearman=tuple(tuple(value for value, _ in row) for row in rows),
        examples=tuple(tuple(number for _, number in row) for row in rows),
    )


def _spearman(one: Tensor, other: Tensor) -> tuple[float | None, int]:
    """The correlation, and of how many examples that both know."""
    known = ~(one.isnan() | other.isnan())
    number = int(known.sum())
    if number < 2:
        return None, number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        found = float(spearmanr(one[known].numpy(), other[known].numpy()).statistic)
    return None if found != found else found, number


def _deciles(difficulty: Tensor) -> Sequence[Tensor]:
    """Rows of the examples in tenths, the easiest first; the sizes differ by at most one."""
    return difficulty.argsort(stable=True).tensor_split(DECILES)


def _growth(
    measure: str, runs: Sequence[str], radii: Sequence[float], difficulty: Tensor, *, losses: bool
) -> Growth | None:
    """Of difficulties ``(points, examples)``, on the examples that every point knows; None where these are too few.

    With ``losses``, of 1 - p_y of one pass, also of -log p_y, at most -log ``LEAST``.
    """
    difficulty = difficulty[:, ~difficulty.isnan().any(0)]
    examples = difficulty.shape[1]
    if examples < DECILES:
        return None
    tenths = _deciles(difficulty.mean(0))
    loss = (1 - difficulty).clamp(min=LEAST).log().neg()
    points = tuple(
        GrowthPoint(
            run=run,
            radius=radius,
            easiest=float(values[tenths[0]].mean()),
            hardest=float(values[tenths[-1]].mean()),
            mean=float(values.mean()),
            easiest_loss=float(its_loss[tenths[0]].mean()) if losses else None,
            hardest_loss=float(its_loss[tenths[-1]].mean()) if losses else None,
        )
        for run, radius, values, its_loss in zip(runs, radii, difficulty, loss, strict=True)
    )
    return Growth(measure=measure, examples=examples, points=points)


def _training_growth(subjects: Sequence[_Subject], wanted: _Examples, seed: int, bar: Progress) -> Growth | str:
    """Over the radii that runs were trained with, by one measure for all; or what is missing for it."""
    subjects = sorted(
        (one for one in subjects if one.threat.norm == subjects[0].threat.norm), key=lambda it: it.trained_threat.radius
    )
    radii = [subject.trained_threat.radius for subject in subjects]
    if len(set(radii)) < 2:
        return "growth over the radius of training needs --against runs of the same norm and another radius"
    records = [_recorded(subject) for subject in subjects]
    # Of confidence, and over the same epochs in all.
    windows = {(dpls.first, dpls.warmup) for subject in subjects if (dpls := subject.recipe.dpls) is not None}
    by_dpls = [
        len(windows) == 1 and (dpls := subject.recipe.dpls) is not None and dpls.difficulty == "confidence"
        for subject in subjects
    ]
    measured = [_measured(subject, wanted) if ours else None for subject, ours in zip(subjects, by_dpls, strict=True)]
    if all(found is not None for found in measured):
        measure, values = "1 - mean p_y in training (DPLS)", [found.values for found in measured if found is not None]
    elif all(record is not None for record in records):
        measure, values = "1 - mean p_y in training", []
        for subject, record in zip(subjects, records, strict=True):
            assert record is not None
            shared, rows = subject.rows(wanted)
            own = torch.full(wanted.labels.shape, torch.nan)
            own[shared] = 1 - record.confidence[:, rows].nanmean(0)
            values.append(own)
    else:
        measure = f"1 - p_y of PGD-{STEPS} within the radius of training, on the last weights"
        values = [_attacked(subject, wanted, subject.trained_threat, seed, bar) for subject in subjects]
    names, one_pass = [subject.name for subject in subjects], measure.startswith("1 - p_y")
    growth = _growth(measure, names, radii, torch.stack(values), losses=one_pass)
    return f"the runs share fewer than {DECILES} training examples: no growth over runs" if growth is None else growth


def _memorisation(subject: _Subject, record: _Record) -> Memorisation | str:
    """How the first drop of the learning rate, and what comes after, fits each tenth; or what is missing for it."""
    recipe = subject.recipe
    planned = Phase("training", recipe.epochs, recipe.optimizer, recipe.schedule)
    earlier = sum(phase.epochs for phase in build(recipe, subject.dataset.facts).phases(planned)[:-1])
    epochs = len(record.confidence)
    milestones = recipe.schedule.milestones if recipe.schedule.name == "multistep" else ()
    drops = [earlier + int(milestone) for milestone in milestones if milestone >= 1]
    before = min(drops, default=epochs) - 1  # the last whole epoch at the first rate, counted from 0
    if not 1 <= before < epochs - 1:
        return (
            "memorisation needs a drop of the learning rate between the record's third and last epoch: train with "
            "-o schedule.name=multistep -o schedule.milestones=[...]"
        )
    difficulty = 1 - record.confidence[:before].nanmean(0)
    wrong = subject.training.labels != subject.dataset.train.labels[subject.positions]
    right = (~wrong & ~difficulty.isnan()).nonzero().squeeze(1)
    groups = {f"decile {i}": right[tenth] for i, tenth in enumerate(_deciles(difficulty[right]), 1)}
    if wrong.any():
        groups["wrong labels"] = wrong.nonzero().squeeze(1)
    fitted = tuple(
        Fitted(
            group=name,
            examples=len(rows),
            before=_accuracy(record, before, rows),
            after=_accuracy(record, epochs - 1, rows),
        )
        for name, rows in groups.items()
    )
    return Memorisation(before=before + 1, after=epochs, groups=fitted)


def _accuracy(record: _Record, epoch: int, rows: Tensor) -> float | None:
    """Share of those at ``rows`` that an epoch got right, of those that it saw."""
    correct = record.correct[epoch, rows][~record.confidence[epoch, rows].isnan()]
    return float(correct.double().mean()) if len(correct) else None


def _gallery(subject: _Subject, difficulty: Tensor) -> tuple[DifficultEntry, ...]:
    """The hardest, hardest first, and the easiest, easiest first, of each of the first classes, of ``(n,)``."""
    labels = subject.training.labels[: len(difficulty)]
    true = subject.dataset.train.labels[subject.positions]
    entries = []
    for label in range(min(len(subject.dataset.class_names), GALLERY_CLASSES)):
        members = (labels == label).nonzero().squeeze(1)
        order = members[difficulty[members].argsort(stable=True)].tolist()
        hardest = order[::-1][: min(GALLERY_IMAGES, (len(order) + 1) // 2)]
        easiest = order[: min(GALLERY_IMAGES, len(order) // 2)]
        for end, rows in (("hardest", hardest), ("easiest", easiest)):
            for row in rows:
                entries.append(
                    DifficultEntry(
                        position=int(subject.positions[row]),
                        label=label,
                        wrong_label=bool(labels[row] != true[row]),
                        end="hardest" if end == "hardest" else "easiest",
                        difficulty=float(difficulty[row]),
                    )
                )
    return tuple(entries)
