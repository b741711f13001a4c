"""Accuracy, clean and under attack: the upper side of the bracket.

Each image is classified clean; who is right meets the attacks one after another while it stands; who falls is checked
again in float32, in evaluation mode and inside the exact threat; one row an image.
"""

import dataclasses
import importlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from redan.attacks.base import Attack
from redan.attacks.objectives import cw_margin
from redan.attacks.pgd import PGD
from redan.attacks.search import SearchModel
from redan.data.pipeline import center_crop, to_float
from redan.data.registry import load_dataset
from redan.data.types import ImageSet
from redan.errors import UserError
from redan.evaluation.progress import EvaluationProgress
from redan.evaluation.protocol import DEFAULT, parse_protocol
from redan.evaluation.results import Accuracy, CurvePoint, Evaluation, GalleryEntry, Row
from redan.models.norms import Normalise
from redan.run import Checkpoint, read_run
from redan.seeds import generator
from redan.tensors import save_tensors
from redan.threats import Threat, parse_threat
from redan.version import __version__

BATCH = 250
CURVE_RADII = (0.25, 0.5, 0.75, 1.5, 2.0)  # in units of the threat's radius, at which the attacks themselves stand
CURVE = "curve"  # what an image fell to that only the search at another radius could break
GALLERY = 12


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a network with the name, threat, data and image size that it comes with."""

    name: str
    network: nn.Module
    folder: Path | None
    data: str | None
    size: int | None
    threat: str | None


def evaluate(
    run: str | Path | nn.Module,
    *,
    threat: str | Threat | None = None,
    attack: str = DEFAULT,
    samples: int | None = None,
    seed: int = 0,
    checkpoint: Checkpoint = "best",
    curve: bool = True,
    data: str | None = None,
    data_dir: str | Path | None = None,
    input_mean: Sequence[float] | None = None,
    input_std: Sequence[float] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a network on test images, clean and under attack.

    Args:
        run: a run folder, ``package.module:function`` that returns a module, or a module.
        threat: such as ``linf:8/255``; the run's own if None.
        attack: a protocol, see ``redan.evaluation.protocol``.
        samples: the first so many test images, in order; all if None.
        seed: of the attacks.
        checkpoint: of a run: ``best`` or ``last``.
        curve: also find the accuracy at smaller and larger radii, by PGD-20 on the margin.
        data: the data set; the run's own if None.
        data_dir: the folder of data sets.
        input_mean: for a network without its normalisation, subtracted from the images.
        input_std: likewise, divided by.
        progress: show it on standard error.

    Returns:
        The evaluation; for a run folder it is also written to its ``results/``.

    Raises:
        UserError: for a mistake in any of these.
    """
    subject = _subject(run, checkpoint)
    network = _normalised(subject.network, input_mean, input_std)
    parsed = _threat(threat, subject)
    attacks = parse_protocol(attack, parsed)
    name = data or subject.data
    if name is None:
        raise UserError(f"{subject.name} does not say which images it is for; name them with --data")
    dataset = load_dataset(name, Path(data_dir) if data_dir is not None else None)
    count = len(dataset.test) if samples is None else samples
    if not 1 <= count <= len(dataset.test):
        raise UserError(f"--samples is between 1 and {len(dataset.test)} for {name}, got {samples}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    # The last attack searches in float32: bfloat16 misses a few in a thousand images, and few are left to pay for it.
    fast, exact = SearchModel(network), SearchModel(network, precision="float32")
    started = time.perf_counter()
    rows: list[Row] = []
    pictures: list[tuple[Tensor, Tensor]] = []
    least = torch.full((count,), math.inf, dtype=torch.float64)  # distance of the nearest adversarial image known
    gallery: list[GalleryEntry] = []
    with EvaluationProgress(count, show=progress) as bar:
        for start in range(0, count, BATCH):
            images, labels = _batch(dataset.test, start, min(start + BATCH, count), subject.size, device)
            examined = _Batch(fast, images, labels, start, len(dataset.class_names))
            for i, (title, method) in enumerate(attacks.items()):
                bar.update(start, title, sum(row.verdict == "unknown" for row in rows) + int(examined.stands.sum()))
                search = exact if i == len(attacks) - 1 else fast
                examined.meet(title, method, search, generator(seed, "evaluate", i, start))
            for scale in CURVE_RADII if curve else ():
                bar.update(start, f"radius x{scale:g}", None)
                examined.probe(dataclasses.replace(parsed, radius=scale * parsed.radius), parsed.radius, seed)
            least[start : start + len(labels)] = examined.least.cpu()
            new_rows = examined.rows()
            for k in [k for k, row in enumerate(new_rows) if row.verdict == "falsified"][: GALLERY - len(pictures)]:
                pictures.append((images[k].cpu(), examined.adversarial[k].cpu()))
                gallery.append(_gallery_entry(new_rows[k]))
            rows += new_rows
            bar.update(start + len(labels), "", sum(row.verdict == "unknown" for row in rows))
    clean = Accuracy.of(sum(row.verdict != "misclassified" for row in rows), count)
    robust = Accuracy.of(sum(row.verdict == "unknown" for row in rows), count)
    standing, after = clean.correct, {}
    for title in [*attacks, *([CURVE] if curve else [])]:
        standing -= sum(row.by == title for row in rows)
        after[title] = standing / count
    result = Evaluation(
        redan_version=__version__,
        run=subject.name,
        checkpoint=checkpoint if subject.folder is not None else "-",
        dataset=name,
        class_names=dataset.class_names,
        threat=str(parsed),
        attack=attack,
        seed=seed,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        samples=count,
        clean=clean,
        robust=robust,
        clean_accuracy=clean.value,
        robust_accuracy=robust.value,
        attacks=after,
        seconds=round(time.perf_counter() - started, 3),
        model_calls=sum(row.model_calls for row in rows),
        curve=_curve(parsed, clean, least) if curve else (),
        gallery=tuple(gallery),
        per_image=tuple(rows),
    )
    if subject.folder is not None:
        _save(result, subject.folder / "results", pictures)
    return result


class _Batch:
    """A batch of test images on its way through the attacks."""

    def __init__(self, search: SearchModel, images: Tensor, labels: Tensor, start: int, classes: int) -> None:
        self.search, self.images, self.labels, self.start = search, images, labels, start
        try:
            logits = search.exact_logits(images)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the network cannot take images of shape {tuple(images.shape[1:])}: {reason}") from error
        if logits.shape != (len(images), classes):
            raise UserError(
                f"the network gives {tuple(logits.shape[1:])} outputs an image; the data have {classes} classes"
            )
        if not torch.isfinite(logits).all():
            raise UserError("the network gives logits that are not finite on clean images")
        self.confidence, self.prediction = logits.softmax(1).max(1)
        self.stands = self.prediction == labels
        self.right = self.stands.clone()
        self.adversarial = images.clone()
        self.fallen_to: list[str | None] = [None] * len(labels)
        self.calls = torch.ones_like(labels)
        self.least = torch.where(self.stands, math.inf, 0.0).double()

    def meet(self, title: str, attack: Attack, search: SearchModel, draws: torch.Generator) -> None:
        """Those that stand meet an attack; who falls is confirmed once more and keeps its adversarial image."""
        fell, images, distances = self._attack(attack, search, self.stands, draws)
        self.adversarial[fell] = images
        self.least[fell] = torch.minimum(self.least[fell], distances)
        self.stands[fell] = False
        for k in fell.tolist():
            self.fallen_to[k] = title

    def probe(self, threat: Threat, asked: float, seed: int) -> None:
        """Look for adversarial images within another radius than the one ``asked`` for, for the curve.

        What is found within the asked radius counts there, too: no counterexample is ever dropped.
        """
        unbroken = self.least > threat.radius
        draws = generator(seed, "curve", repr(threat.radius), self.start)
        fell, images, distances = self._attack(PGD(threat, steps=20, objective=cw_margin), self.search, unbroken, draws)
        self.least[fell] = torch.minimum(self.least[fell], distances)
        newly = self.stands[fell] & (distances <= asked)
        self.adversarial[fell[newly]] = images[newly]
        self.stands[fell[newly]] = False
        for k in fell[newly].tolist():
            self.fallen_to[k] = CURVE

    def _attack(
        self, attack: Attack, search: SearchModel, who: Tensor, draws: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of those that fell, their adversarial images, and how far these are in the threat's norm."""
        positions = who.nonzero().squeeze(1)
        if not len(positions):
            return positions, self.images[positions], self.least[positions]
        images, labels = self.images[positions], self.labels[positions]
        outcome = attack.run(search, images, labels, draws)
        self.calls[positions] += outcome.calls + 1
        fell = self.search.broken(outcome.images, labels) & attack.threat.contains(outcome.images, images)
        distances = attack.threat.distance(outcome.images, images)
        return positions[fell], outcome.images[fell], distances[fell]

    def rows(self) -> list[Row]:
        """One row an image."""
        logits = self.search.exact_logits(self.adversarial)
        confidence, prediction = (values.tolist() for values in logits.softmax(1).max(1))
        rows = []
        for k, by in enumerate(self.fallen_to):
            right = bool(self.right[k])
            rows.append(
                Row(
                    index=self.start + k,
                    label=int(self.labels[k]),
                    prediction=int(self.prediction[k]),
                    confidence=float(self.confidence[k]),
                    verdict="misclassified" if not right else "unknown" if by is None else "falsified",
                    by=by,
                    adversarial_prediction=None if by is None else prediction[k],
                    adversarial_confidence=None if by is None else confidence[k],
                    distance=None if by is None else float(self.least[k]),
                    model_calls=int(self.calls[k]),
                )
            )
        return rows


def _curve(threat: Threat, clean: Accuracy, least: Tensor) -> tuple[CurvePoint, ...]:
    """Accuracy at each radius: an image stands where no adversarial image as near as that is known."""
    radii = [0.0, *sorted(scale * threat.radius for scale in (*CURVE_RADII, 1.0))]
    standing = [clean.correct if radius == 0 else int((least > radius).sum()) for radius in radii]
    return tuple(
        CurvePoint(radius=radius, accuracy=Accuracy.of(correct, clean.samples))
        for radius, correct in zip(radii, standing, strict=True)
    )


def _gallery_entry(row: Row) -> GalleryEntry:
    assert row.adversarial_prediction is not None and row.adversarial_confidence is not None
    return GalleryEntry(
        index=row.index,
        label=row.label,
        prediction=row.prediction,
        confidence=row.confidence,
        adversarial_prediction=row.adversarial_prediction,
        adversarial_confidence=row.adversarial_confidence,
    )


def _save(result: Evaluation, folder: Path, pictures: list[tuple[Tensor, Tensor]]) -> None:
    """Keep the result; evaluations that differ in any setting have files of their own."""
    stem = f"{result.attack}-{result.threat}-{result.samples}-{result.checkpoint}-seed{result.seed}"
    stem = "".join(c if c.isalnum() or c in "-+." else "_" for c in stem)
    if pictures:
        images, adversarials = (torch.stack(side) for side in zip(*pictures, strict=True))
        save_tensors(folder / f"{stem}.safetensors", {"images": images, "adversarials": adversarials})
    result.save(folder / f"{stem}.json")


def _batch(test: ImageSet, start: int, stop: int, size: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    images = to_float(test.images[start:stop].to(device))
    return images if size is None else center_crop(images, size), test.labels[start:stop].to(device)


def _threat(threat: str | Threat | None, subject: Subject) -> Threat:
    if isinstance(threat, Threat):
        return threat
    text = threat or subject.threat
    if text is None:
        raise UserError(f"{subject.name} does not say what it withstands; name the threat with --threat linf:8/255")
    return parse_threat(text)


def _subject(run: str | Path | nn.Module, checkpoint: Checkpoint) -> Subject:
    """What ``run`` names: a run folder, a function that returns a module, or a module itself."""
    if isinstance(run, nn.Module):
        return Subject(type(run).__name__, run, None, None, None, None)
    text = str(run)
    module, separator, function = text.partition(":")
    if separator and not Path(text).exists():
        return Subject(text, _imported(text, module, function), None, None, None, None)
    recipe, facts, network = read_run(run, checkpoint)
    size = recipe.data.crop or facts.size
    return Subject(Path(run).resolve().name, network, Path(run), recipe.data.name, size, recipe.threat)


def _imported(text: str, module: str, function: str) -> nn.Module:
    try:
        network = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"cannot get a network from {text}: {error}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{text} returns {type(network).__name__}, not a torch module")
    return network.eval()


def _normalised(network: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    """The network with its normalisation as first layer, where the caller says that it lacks one."""
    if mean is None and std is None:
        return network
    if mean is None or std is None:
        raise UserError("--input-mean and --input-std go together")
    try:
        return nn.Sequential(Normalise(mean, std), network)
    except ValueError as error:
        raise UserError(str(error)) from error
