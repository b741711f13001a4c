"""Rotations and translations tried out (Engstrom et al., ICML 2019): where gradients fail, trying does not."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Generator, Tensor

from redan.attacks.base import Attack, Outcome, Standing, keep
from redan.attacks.objectives import cw_margin
from redan.attacks.search import SearchModel
from redan.errors import UserError
from redan.spatial import RotationTranslation


@dataclass(frozen=True)
class RotationGrid(Attack):
    """Every rotation with every translation of an even grid that reaches the threat's bounds: the strongest one known.

    Args:
        threat: a rotation threat, such as ``rotation:30+3``.
        rotations: angles, at least 1; an odd number has the image as it stands among them.
        shifts: translations in each of the two directions, likewise. The paper has 31 x 5 x 5.

    Raises:
        UserError: for another threat, and where there is nothing to try.
    """

    threat: RotationTranslation
    rotations: int = 31
    shifts: int = 5

    def __post_init__(self) -> None:
        RotationTranslation.require(self.threat, "RotationGrid")
        if self.rotations < 1 or self.shifts < 1:
            raise UserError(
                f"RotationGrid takes at least 1 rotation and 1 shift, got {self.rotations} and {self.shifts}"
            )

    def cost(self, classes: int) -> int:
        """See ``Attack.cost``."""
        return self.rotations * self.shifts**2 + 1

    def run(self, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        """See ``Attack.run``."""
        angles, moves = _even(self.threat.degrees, self.rotations), _even(self.threat.shift, self.shifts)
        grid = torch.tensor(list(product(angles, moves, moves)), device=images.device)
        tries = ((one[:1].expand(len(images)), one[1:].expand(len(images), 2)) for one in grid)
        return _worst(self.threat, search, images, labels, tries)


@dataclass(frozen=True)
class RandomRotation(Attack):
    """The worst of some random rotations and translations of each image: what training and quick looks can afford.

    Args:
        threat: a rotation threat, such as ``rotation:30+3``.
        tries: how many, at least 1; 10 in the paper.

    Raises:
        UserError: for another threat, and where there is nothing to try.
    """

    threat: RotationTranslation
    tries: int = 10

    def __post_init__(self) -> None:
        RotationTranslation.require(self.threat, "RandomRotation")
        if self.tries < 1:
            raise UserError(f"RandomRotation takes at least 1 try, got {self.tries}")

    def cost(self, classes: int) -> int:
        """See ``Attack.cost``."""
        return self.tries + 1

    def run(self, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        """See ``Attack.run``."""
        tries = (self.threat.draw(images, generator) for _ in range(self.tries))
        return _worst(self.threat, search, images, labels, tries)


def _even(bound: float, count: int) -> list[float]:
    """``count`` numbers from -bound to bound at even distances; 0 if there is but one."""
    return [bound * (2 * i / (count - 1) - 1) for i in range(count)] if count > 1 else [0.0]


def _worst(
    threat: RotationTranslation,
    search: SearchModel,
    images: Tensor,
    labels: Tensor,
    tries: Iterable[tuple[Tensor, Tensor]],
) -> Outcome:
    """Try rotations ``(n,)`` with translations ``(n, 2)``; who withstands all gets the one of largest margin."""
    standing = Standing(threat, search, images, labels)
    worst, largest = images, torch.full(labels.shape, -torch.inf, device=images.device)
    for degrees, shift in tries:
        if not len(standing):
            break
        x = threat.warp(standing.center, degrees[standing.rows], shift[standing.rows])
        logits = standing.logits(x)
        margin = cw_margin(logits, standing.labels)
        worse = margin > largest
        worst, largest = torch.where(worse[:, None, None, None], x, worst), torch.where(worse, margin, largest)
        stands = standing.settle(x, logits)
        if stands is not None:
            worst, largest = keep(stands, worst, largest)
    standing.conclude(worst)
    return standing.outcome()
