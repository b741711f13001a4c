"""What an attack maximises: ``(logits, reference) -> (n,)``.

The reference is the labels; for a targeted objective, label and target of each image; for one that compares with the
clean images, their logits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
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
        reference: ``labels``, int64 ``(n,)``; ``targets``, int64 ``(n, 2)``, label and target; or ``clean_logits``,
            ``(n, classes)``.
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    reference: Literal["labels", "targets", "clean_logits"] = "labels"

    def __call__(self, logits: Tensor, reference: Tensor) -> Tensor:
        return self.value(logits, reference)


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits with the true class out of the race."""
    return logits.scatter(1, labels[:, None], float("-inf"))


def _true(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None]).squeeze(1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    # -log p_y = log(1 + sum over k != y of exp(z_k - z_y)). The usual form rounds p_y to 1 from a margin of 17 on, and
    # the attack on a confident network then climbs a gradient that lacks the true class, or none.
    return F.softplus(_others(logits, labels).logsumexp(1) - _true(logits, labels))


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    return _others(logits, labels).amax(1) - _true(logits, labels)


def _dlr(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[1] < 3:
        raise UserError("the DLR objective needs at least 3 classes; use the margin objective 'cw'")
    ordered = logits.sort(1, descending=True).values
    return _margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def _targeted_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -_cross_entropy(logits, targets[:, 1])


def _targeted_margin(logits: Tensor, targets: Tensor) -> Tensor:
    return _true(logits, targets[:, 1]) - _true(logits, targets[:, 0])


def _targeted_dlr(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.shape[1] < 4:
        raise UserError("the targeted DLR objective needs at least 4 classes; use the targeted margin")
    ordered = logits.sort(1, descending=True).values
    return _targeted_margin(logits, targets) / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)


def _kl(logits: Tensor, clean_logits: Tensor) -> Tensor:
    # In float64: where both are nearly certain, their difference is lost to float32.
    log_p, log_q = clean_logits.double().log_softmax(1), logits.double().log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1).float()


cross_entropy = Objective("ce", _cross_entropy)
"""Cross-entropy, -log p_y."""

cw_margin = Objective("cw", _margin)
"""Margin of the strongest other logit over the true one (Carlini & Wagner, S&P 2017)."""

dlr = Objective("dlr", _dlr)
"""Difference of logits ratio, blind to the scale of the logits (Croce & Hein, ICML 2020, eq. 6)."""

targeted_cross_entropy = Objective("ce-t", _targeted_cross_entropy, reference="targets")
"""Log-probability of the target, log p_t."""

targeted_margin = Objective("cw-t", _targeted_margin, reference="targets")
"""Margin of the target's logit over the true one."""

targeted_dlr = Objective("dlr-t", _targeted_dlr, reference="targets")
"""DLR towards a target (Croce & Hein, ICML 2020, eq. 7)."""

kl_divergence = Objective("kl", _kl, reference="clean_logits")
"""KL(clean || adversarial), the inner objective of TRADES (Zhang et al., ICML 2019, eq. 5)."""

OBJECTIVES = {objective.name: objective for objective in (cross_entropy, cw_margin, dlr, kl_divergence)}


def find_objective(name: str) -> Objective:
    """The objective of that name. Raises: UserError where there is none."""
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def best_targeted(classes: int) -> Objective:
    """The targeted DLR, or the margin where there are too few classes for it."""
    return targeted_dlr if classes >= 4 else targeted_margin


def best_untargeted(classes: int) -> Objective:
    """The DLR, or the margin where there are too few classes for it."""
    return dlr if classes >= 3 else cw_margin


def misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    """Where the prediction differs from the label: bool ``(n,)``. Logits that are not finite predict nothing."""
    return (logits.argmax(1) != labels) | ~torch.isfinite(logits).all(1)
