"""Results: one row an image; every figure and table is made from rows.

An evaluation is kept in a run's ``results/`` folder as ``<name>.json`` (this file's ``Evaluation``) beside
``<name>.safetensors``, which holds the pictures of its gallery.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from scipy.stats import binomtest

from redan.errors import UserError
from redan.files import write_atomically

CERTIFICATES = "certificates"  # the folder within a run's that holds them


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ResultFile(Frozen):
    """A result that is kept as a JSON file.

    Attributes:
        kind: what it is, in words; for messages.
    """

    kind: ClassVar[str]

    def save(self, path: Path) -> None:
        """Write the JSON file whole or not at all."""
        write_atomically(path, self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Raises: UserError where the file is not such a result of redan's."""
        try:
            return cls.model_validate_json(Path(path).read_text())
        except (OSError, ValidationError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not {cls.kind} of redan's: {str(error).splitlines()[0]}") from error


class Accuracy(Frozen):
    """A share of images with its exact 95 % interval (Clopper & Pearson 1934)."""

    correct: int
    samples: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, correct: int, samples: int) -> "Accuracy":
        """Args: correct in [0, samples]; samples at least 1."""
        interval = binomtest(correct, samples).proportion_ci(confidence_level=0.95, method="exact")
        return cls(
            correct=correct,
            samples=samples,
            value=correct / samples,
            low=float(interval.low),
            high=float(interval.high),
        )

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


class Row(Frozen):
    """What became of one image.

    ``verdict`` is ``misclassified`` (wrong without any attack), ``falsified`` (a confirmed adversarial example
    exists; ``by`` names the attack that found it), ``certified`` (none exists) or ``unknown`` (it stood against every
    attack, and nothing was proved).
    """

    index: int
    label: int
    prediction: int
    confidence: float
    verdict: Literal["misclassified", "falsified", "certified", "unknown"]
    by: str | None = None
    adversarial_prediction: int | None = None
    adversarial_confidence: float | None = None
    distance: float | None = None
    model_calls: int


class CurvePoint(Frozen):
    """Accuracy under attack when the threat's radius is ``radius``."""

    radius: float
    accuracy: Accuracy


class ConvergencePoint(Frozen):
    """Mean accuracy over new draws after so many steps of PGD whose gradients are means over so many draws."""

    steps: int
    draws: int
    accuracy: Accuracy


class GalleryEntry(Frozen):
    """One picture of the gallery; tensor row ``i`` of the safetensors file belongs to entry ``i``."""

    index: int
    label: int
    prediction: int
    confidence: float
    adversarial_prediction: int
    adversarial_confidence: float


class Counts(Frozen):
    """Accuracy of a model that draws at random, by rule of counting.

    ``mean`` of the draws; images that are right in every draw (``worst``), in most draws (``majority``), and with one
    draw that is ``fixed`` and known to the attacker.
    """

    mean: Accuracy
    worst: Accuracy
    majority: Accuracy
    fixed: Accuracy


class Randomised(Frozen):
    """What was counted of a model that draws at random, over ``draws`` passes.

    ``after`` is the mean accuracy after each attack in order, of each image's worst candidate so far; an image without
    one counts as it is. Draws of its own judge each candidate, not those that chose it.
    """

    draws: int
    clean: Counts
    robust: Counts
    after: dict[str, float] = {}


class Check(Frozen):
    """One check for gradient masking.

    ``passed`` is None where the check does not apply. ``figure`` is what was measured, in words for a person;
    ``values`` are the numbers behind it, by label.
    """

    name: str
    passed: bool | None
    figure: str
    values: dict[str, float] = {}


class Evaluation(ResultFile):
    """The result of ``redan evaluate``: who stood, who fell, to what, and at which price.

    ``attacks`` is the accuracy after each attack in order: the share of images that are right and have not fallen, or
    of a model that draws at random ``Randomised.after``. ``transferred`` is the accuracy on the images of the attack
    ``transfer`` alone, of all images and the mean of the draws, as papers have it that attack the bare classifier:
    above the clean accuracy it says that the attack saw nothing of the network. ``account`` is one line on what was
    done, where the attack's name does not say it; ``fingerprint`` is a digest of all that the result depends on.
    """

    kind = "an evaluation"

    redan_version: str
    run: str
    checkpoint: str
    dataset: str
    class_names: tuple[str, ...]
    threat: str
    attack: str
    seed: int
    precision: str = "auto"
    device: str
    samples: int
    clean: Accuracy
    robust: Accuracy
    clean_accuracy: float
    robust_accuracy: float
    certified: Accuracy | None = None
    certified_accuracy: float | None = None
    certified_curve: tuple[CurvePoint, ...] = ()
    certified_timeout: float | None = None
    certified_sound_float: str | None = None
    attacks: dict[str, float]
    transferred: Accuracy | None = None
    seconds: float
    model_calls: int
    randomised: Randomised | None = None
    diagnostics: tuple[Check, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    convergence: tuple[ConvergencePoint, ...] = ()
    account: str = ""
    fingerprint: str = ""
    gallery: tuple[GalleryEntry, ...] = ()
    per_image: tuple[Row, ...]


class CertifiedRow(Frozen):
    """What became of one image under certification.

    ``verdict`` is ``misclassified``, ``certified`` (no image of the threat changes the label), ``falsified`` (a
    confirmed counterexample is kept) or ``unknown`` (``by`` is what tried last); ``margin`` is a lower bound of how far
    the label's logit stays ahead.
    """

    index: int
    label: int
    prediction: int
    verdict: Literal["misclassified", "certified", "falsified", "unknown"]
    by: str | None = None
    margin: float | None = None
    seconds: float


class Certificates(ResultFile):
    """The result of ``redan certify``: what was proved, refuted, and left open within a threat.

    ``shard`` is (i, n) where only the i-th of n parts was looked at; ``images`` are how many that were, of the first
    ``samples`` of the test set. ``certified``, ``falsified``, ``unknown`` and ``misclassified`` are counts, the
    accuracies shares of ``images``: at least ``certified_accuracy`` of them are robust, at most ``standing``.
    """

    kind = "a set of certificates"

    redan_version: str
    run: str
    checkpoint: str
    dataset: str
    threat: str
    method: str
    sound_float: str
    timeout: float
    seed: int
    device: str
    samples: int
    shard: tuple[int, int]
    images: int
    certified: int
    falsified: int
    unknown: int
    misclassified: int
    clean: Accuracy
    standing: Accuracy
    proved: Accuracy
    certified_accuracy: float
    seconds: float
    fingerprint: str
    curve: tuple[CurvePoint, ...] = ()
    per_image: tuple[CertifiedRow, ...]

    @property
    def settled(self) -> list[tuple[str, str | None, int, float, float]]:
        """By verdict and stage: how many images, the mean seconds of each, and the most."""
        groups: dict[tuple[str, str], list[float]] = {}
        for row in self.per_image:
            groups.setdefault((row.verdict, row.by or ""), []).append(row.seconds)
        return [
            (verdict, by or None, len(times), fmean(times), max(times))
            for (verdict, by), times in sorted(groups.items())
        ]

    @classmethod
    def of(cls, rows: Sequence[CertifiedRow], **facts: Any) -> "Certificates":
        """With everything that is counted in rows, which are put in order."""
        rows = sorted(rows, key=lambda row: row.index)
        count = Counter(row.verdict for row in rows)
        right = len(rows) - count["misclassified"]
        return cls(
            images=len(rows),
            certified=count["certified"],
            falsified=count["falsified"],
            unknown=count["unknown"],
            misclassified=count["misclassified"],
            clean=Accuracy.of(right, len(rows)),
            standing=Accuracy.of(right - count["falsified"], len(rows)),
            proved=Accuracy.of(count["certified"], len(rows)),
            certified_accuracy=count["certified"] / len(rows),
            per_image=tuple(rows),
            **facts,
        )

    @classmethod
    def join(cls, shards: Sequence["Certificates"]) -> "Certificates":
        """Shards of one certification (of one fingerprint) as one; what is missing is missing in ``images``."""
        first = shards[0]
        if len(shards) == 1:
            return first
        rows = {row.index: row for part in shards for row in part.per_image}
        radii = {tuple(point.radius for point in part.curve) for part in shards}
        proved: dict[float, int] = {}
        for part in shards:
            for point in part.curve:
                proved[point.radius] = proved.get(point.radius, 0) + point.accuracy.correct
        kept = ("redan_version", "run", "checkpoint", "dataset", "threat", "method", "sound_float", "timeout", "seed")
        return cls.of(
            list(rows.values()),
            **{k: getattr(first, k) for k in (*kept, "device", "samples", "fingerprint")},
            shard=(1, 1),
            seconds=sum(part.seconds for part in shards),
            curve=tuple(
                CurvePoint(radius=radius, accuracy=Accuracy.of(correct, len(rows)))
                for radius, correct in sorted(proved.items())
            )
            if len(radii) == 1
            else (),
        )
