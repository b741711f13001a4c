"""What an attack maximises: ``(logits, reference) -> (n,)``.

The reference is the labels, or the logits of the clean images for an objective that compares with those.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from redan.errors import UserError, unknown


@dataclass(frozen=True)
class Objective:
    """An objective with what it is measured against.

    Args:
        name: as recipes and the command line spell it.
        value: ``(logits (n, classes), reference) -> (n,)``, float32, to be maximised.
        reference: ``labels``, int64 ``(n,)``, or ``clean_logits``, ``(n, classes)``.
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    reference: Literal["labels", "clean_logits"] = "labels"

    def __call__(self, logits: Tensor, reference: Tensor) -> Tensor:
        return self.value(logits, reference)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _strongest_other(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, labels[:, None], float("-inf")).amax(1)


def _true(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None]).squeeze(1)


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    return _strongest_other(logits, labels) - _true(logits, labels)


def _dlr(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[1] < 3:
        raise UserError("the DLR objective needs at least 3 classes; use the margin objective 'cw'")
    ordered = logits.sort(1, descending=True).values
    return _margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def _kl(logits: Tensor, clean_logits: Tensor) -> Tensor:
    target = clean_logits.log_softmax(1)
    return F.kl_div(logits.log_softmax(1), target, reduction="none", log_target=True).sum(1)


cross_entropy = Objective("ce", _cross_entropy)
"""Cross-entropy, -log p_y."""

cw_margin = Objective("cw", _margin)
"""Margin of the strongest other logit over the true one (Carlini & Wagner, S&P 2017)."""

dlr = Objective("dlr", _dlr)
"""Difference of logits ratio, blind to the scale of the logits (Croce & Hein, ICML 2020, eq. 6)."""

kl_divergence = Objective("kl", _kl, reference="clean_logits")
"""KL(clean || adversarial), the inner objective of TRADES (Zhang et al., ICML 2019, eq. 5)."""

OBJECTIVES = {objective.name: objective for objective in (cross_entropy, cw_margin, dlr, kl_divergence)}


def find_objective(name: str) -> Objective:
    """The objective of that name. Raises: UserError where there is none."""
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    """Where the prediction differs from the label: bool ``(n,)``. Logits that are not finite predict nothing."""
    return (logits.argmax(1) != labels) | ~torch.isfinite(logits).all(1)
