"""What a loss compares the logits with: targets made from labels.

A target-maker is a part of a method, not a method; it may learn from what training sees of each example.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from redan.errors import UserError


class Targets(Protocol):
    """Makes target distributions."""

    def __call__(self, labels: Tensor, indices: Tensor, classes: int) -> Tensor:
        """Probabilities ``(n, classes)`` for labels ``(n,)`` of the examples at ``indices`` ``(n,)``."""
        ...

    def observe(self, logits: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Take note of the logits ``(n, classes)`` that training saw for these examples, detached."""
        ...


class LabelSmoothing:
    """``(1 - amount) one-hot + amount / classes`` (Szegedy et al., CVPR 2016); amount 0 is the label itself."""

    def __init__(self, amount: float = 0.0) -> None:
        if not 0 <= amount < 1:
            raise UserError(f"label smoothing takes an amount of at least 0 and below 1, got {amount}")
        self.amount = amount

    def __call__(self, labels: Tensor, indices: Tensor, classes: int) -> Tensor:
        """See ``Targets``."""
        return (1 - self.amount) * F.one_hot(labels, classes).float() + self.amount / classes

    def observe(self, logits: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Uniform smoothing does not depend on what training sees."""


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``-sum_c t_c log p_c`` per example: logits and targets ``(n, classes)`` to ``(n,)``, float32."""
    return -(targets * torch.log_softmax(logits.float(), 1)).sum(1)
