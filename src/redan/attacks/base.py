"""What all attacks share: their form, the check of their input, and the book of who still stands."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from redan.attacks.objectives import Objective, misclassified
from redan.attacks.search import SearchModel
from redan.errors import UserError
from redan.threats import LpBall, Threat


class Outcome(NamedTuple):
    """What an attack leaves behind.

    Attributes:
        images: ``(n, c, h, w)``, the adversarial images; where the attack failed, its last attempt.
        calls: int64 ``(n,)``, forward passes that each image took part in.
    """

    images: Tensor
    calls: Tensor


@dataclass(frozen=True)
class Attack(ABC):
    """An attack is its hyper-parameters: ``attack(model, images, labels)`` gives the adversarial images.

    The model may be in any mode and is left exactly as it was. Nothing is written into ``images``. With the same
    generator state, model and images the result is the same.

    Args:
        threat: what the attacker may do.
    """

    threat: Threat

    def __call__(
        self, model: nn.Module | SearchModel, images: Tensor, labels: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: images to logits; a ``SearchModel`` where many batches are to be attacked.
            images: float32 ``(n, c, h, w)`` in [0, 1].
            labels: int64 ``(n,)``.
            generator: source of randomness; torch's default one if None.

        Returns:
            Adversarial images, float32 ``(n, c, h, w)``, inside the threat and [0, 1].

        Raises:
            UserError: where images or labels are not as above.
        """
        search = model if isinstance(model, SearchModel) else SearchModel(model)
        check_input(images, labels)
        if len(labels) and labels.amax() >= search.classes(images):
            raise UserError(f"the model has {search.classes(images)} classes, and a label is {labels.amax()}")
        return self.run(search, images.detach(), labels, generator).images

    def cost(self, classes: int) -> int:
        """What an image costs that stands to the end: forward passes, a gradient counted as 3. Progress shows it."""
        return 1

    @abstractmethod
    def run(self, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        """The attack itself, on input that was checked."""


def check_input(images: Tensor, labels: Tensor) -> None:
    """Raise UserError unless images are float32 ``(n, c, h, w)`` in [0, 1] and labels int64, one an image."""
    if images.dtype != torch.float32 or images.dim() != 4:
        raise UserError(
            f"an attack takes float32 images (n, c, h, w) in [0, 1], got {images.dtype} of shape {tuple(images.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise UserError(
            f"an attack takes one int64 label an image, got {labels.dtype} of shape {tuple(labels.shape)} "
            f"for {len(images)} images"
        )
    if len(labels) and labels.amin() < 0:
        raise UserError(f"an attack takes labels that count from 0, got {labels.amin()}")
    if len(images) and not (images.amin() >= 0 and images.amax() <= 1):
        raise UserError(
            f"an attack takes images in [0, 1], got values from {images.amin():.3g} to {images.amax():.3g}; "
            "normalisation belongs into the model, as its first layer"
        )


class Standing:
    """The images of a batch that still stand, and what is known of those that fell.

    An image falls when the original model misclassifies it in float32, inside the exact threat set; from then on it
    costs nothing. A model that draws at random must misclassify it in every draw: one lucky draw is no defeat and ends
    nothing, and of each image's candidates the one that most draws get wrong is kept. Attributes named below concern
    those that stand, ``k`` of ``n``.

    Args:
        threat: the threat that an adversarial image must lie in.
        search: the model.
        images: ``(n, c, h, w)``.
        labels: ``(n,)``.
        drop: whether images leave once they fall; training attacks all of them to the end.

    Attributes:
        threat: as given.
        rows: ``(k,)`` positions in the batch.
        center: ``(k, c, h, w)`` clean images.
        labels: ``(k,)``.
    """

    def __init__(
        self, threat: Threat, search: SearchModel, images: Tensor, labels: Tensor, *, drop: bool = True
    ) -> None:
        self.threat, self._search, self._drop = threat, search, drop
        self._adversarial = images.clone()
        self._calls = torch.zeros_like(labels)
        self._score = torch.zeros(len(labels), device=labels.device)  # share of draws that the kept candidate fools
        self.rows = torch.arange(len(labels), device=labels.device)
        self.center, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.rows)

    def reference(self, objective: Objective) -> Tensor:
        """What the objective compares with: the labels, or the clean logits. A targeted attack knows its own."""
        return self.labels if objective.reference == "labels" else self.logits(self.center)

    def logits(self, images: Tensor) -> Tensor:
        """Logits at ``images`` ``(k, c, h, w)``, one forward pass and no gradient."""
        self._calls[self.rows] += self._search.draws
        with torch.no_grad():
            return self._search.logits(images)

    def values(self, images: Tensor, objective: Objective, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and objective at ``images`` ``(k, c, h, w)``, one forward pass and no gradient."""
        self._calls[self.rows] += self._search.draws
        return self._search.values(images, objective, reference)

    def gradient(self, images: Tensor, objective: Objective, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, objective and gradient at ``images`` ``(k, c, h, w)``, one forward and one backward pass."""
        self._calls[self.rows] += self._search.draws
        return self._search.gradient(images, objective, reference)

    def settle(self, images: Tensor, logits: Tensor) -> Tensor | None:
        """Let those fall that ``images`` break.

        Args:
            images: ``(k, c, h, w)``, one attempt for each that stands.
            logits: the search copy's logits of these.

        Returns:
            None if nobody fell, else which of the ``k`` still stand, bool ``(k,)``, for the attack to sort out its
            own tensors with ``keep``.
        """
        if not self._drop:
            return None
        if self._search.draws > 1:
            return self._let_fall(images, torch.arange(len(self), device=images.device))
        return self._let_fall(images, misclassified(logits, self.labels).nonzero().squeeze(1))

    def conclude(self, images: Tensor) -> None:
        """The last attempt on those that stand, ``(k, c, h, w)``: note it, and let those fall that it breaks."""
        nothing_better = self._score[self.rows] == 0
        self._adversarial[self.rows[nothing_better]] = images[nothing_better]
        if self._drop and len(self):
            self._let_fall(images, torch.arange(len(self), device=images.device))

    def _let_fall(self, images: Tensor, suspects: Tensor) -> Tensor | None:
        """Confirm the suspects, positions among those that stand, on the original; see ``settle``."""
        suspects = suspects[self.threat.contains(images[suspects], self.center[suspects])]
        if not len(suspects):
            return None
        rows = self.rows[suspects]
        self._calls[rows] += self._search.draws
        score = self._search.score(images[suspects], self.labels[suspects])
        better = score > self._score[rows]
        self._adversarial[rows[better]] = images[suspects[better]]
        self._score[rows[better]] = score[better]
        fallen = suspects[score == 1]
        if not len(fallen):
            return None
        stands = torch.ones_like(self.labels, dtype=torch.bool)
        stands[fallen] = False
        self.rows, self.center, self.labels = keep(stands, self.rows, self.center, self.labels)
        return stands

    def outcome(self) -> Outcome:
        """What to return."""
        return Outcome(self._adversarial, self._calls)


class Nearest:
    """The nearest adversarial image known of each image of a batch: the book of attacks that look for the least norm.

    What counts is what the original model misclassifies in float32, inside [0, 1]; the threat gives the norm, and its
    radius is not looked at.

    Args:
        threat: measures distances.
        search: the model.
        images: ``(n, c, h, w)``.
        labels: ``(n,)``.

    Attributes:
        best: ``(n, c, h, w)``; where nothing is known, the last attempt, or the image itself before any.
        distance: float64 ``(n,)``; infinite where nothing is known.
    """

    def __init__(self, threat: LpBall, search: SearchModel, images: Tensor, labels: Tensor) -> None:
        self._threat, self._search, self._images, self._labels = threat, search, images, labels
        self._calls = torch.zeros_like(labels)
        self.best = images.clone()
        self.distance = torch.full(labels.shape, torch.inf, dtype=torch.float64, device=labels.device)

    def logits(self, images: Tensor) -> Tensor:
        """Logits at ``images`` ``(n, c, h, w)``, one forward pass and no gradient."""
        self._calls += self._search.draws
        with torch.no_grad():
            return self._search.logits(images)

    def gradient(self, images: Tensor, objective: Objective, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, objective and gradient at ``images`` ``(n, c, h, w)``, one forward and one backward pass."""
        self._calls += self._search.draws
        return self._search.gradient(images, objective, reference)

    def offer(self, images: Tensor, logits: Tensor) -> Tensor:
        """One attempt for each image, ``(n, c, h, w)`` in [0, 1], with the search copy's logits of it.

        Returns:
            Which images the search copy holds to be misclassified, bool ``(n,)``.
        """
        wrong = misclassified(logits, self._labels)
        self.best = torch.where((self.distance == torch.inf)[:, None, None, None], images, self.best)
        distance = self._threat.distance(images, self._images)
        nearer = (wrong & (distance < self.distance)).nonzero().squeeze(1)
        if len(nearer):
            self._calls[nearer] += self._search.draws
            confirmed = nearer[self._search.broken(images[nearer], self._labels[nearer])]
            self.best[confirmed], self.distance[confirmed] = images[confirmed], distance[confirmed]
        return wrong

    def outcome(self) -> Outcome:
        """What to return."""
        return Outcome(self.best, self._calls)


def keep(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows of each tensor where ``mask`` holds."""
    return tuple(tensor[mask] for tensor in tensors)
