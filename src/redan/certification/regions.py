"""What is to be shown: a region of inputs, and linear functions of the logits that must be above zero on all of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redan.certification.rows import Rows, total, total_above
from redan.threats import L1, L2, Linf, LpBall


@dataclass(frozen=True, eq=False)
class Region:
    """A box of images each, for L2 and L1 threats the part of it that lies in a ball.

    Attributes:
        lower: ``(n, *input_shape)``, float64 from ``around``; a float32 copy is rounded outwards.
        upper: likewise, at least ``lower``.
        centre: of the balls, or None for the box alone.
        ball: which balls, or None.
    """

    lower: Tensor
    upper: Tensor
    centre: Tensor | None = None
    ball: LpBall | None = None

    @classmethod
    def around(cls, images: Tensor, threat: LpBall) -> "Region":
        """All that a threat lets become of images ``(n, c, h, w)`` in [0, 1]."""
        centre = images.double()
        # One unit outwards, for the rounding of the sum itself.
        lower = torch.nextafter(centre - threat.radius, centre - 2 * threat.radius - 1).clamp(min=0)
        upper = torch.nextafter(centre + threat.radius, centre + 2 * threat.radius + 1).clamp(max=1)
        if isinstance(threat, Linf):
            return cls(lower, upper)
        return cls(lower, upper, centre, threat)

    def __len__(self) -> int:
        return len(self.lower)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "Region":
        """The region in that type, rounded outwards so that it holds all it held."""
        lower, upper = self.lower.to(dtype), self.upper.to(dtype)
        lower = torch.where(lower > self.lower, torch.nextafter(lower, torch.full_like(lower, -torch.inf)), lower)
        upper = torch.where(upper < self.upper, torch.nextafter(upper, torch.full_like(upper, torch.inf)), upper)
        centre = self.centre if self.centre is None else self.centre.to(device)
        return Region(lower.to(device), upper.to(device), centre, self.ball)

    def inner(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest float32 numbers inside the boxes: what a counterexample may reach."""
        lower, upper = self.lower.float(), self.upper.float()
        lower = torch.where(lower < self.lower, torch.nextafter(lower, torch.full_like(lower, torch.inf)), lower)
        upper = torch.where(upper > self.upper, torch.nextafter(upper, torch.full_like(upper, -torch.inf)), upper)
        return lower, upper

    def part(self, which: Tensor | slice) -> "Region":
        """The regions of some images."""
        centre = None if self.centre is None else self.centre[which]
        return Region(self.lower[which], self.upper[which], centre, self.ball)

    def least(self, rows: Rows) -> Tensor:
        """A lower bound of each row's least value on its region, ``(rows,)`` in float64; differentiable."""
        values = rows.values
        positive = values.relu()
        terms = torch.addcmul(positive * rows.look(self.lower), values - positive, rows.look(self.upper))
        # Products in the rows' type, each rounded once; their sum in float64.
        size = torch.maximum(self.lower.abs(), self.upper.abs()).flatten(1).amax(1)
        slack = 2 * torch.finfo(values.dtype).eps * total_above(values.abs()) * size[rows.image]
        least = total(terms) - slack
        if self.ball is None or self.centre is None:
            return least
        coefficients = rows.inside(self.lower.shape[1:]).values.double()
        centre = rows.look(self.centre)
        flat = coefficients.flatten(1)
        dual = flat.norm(dim=1) if isinstance(self.ball, L2) else flat.abs().amax(1)
        assert isinstance(self.ball, L1 | L2)
        at_centre = (coefficients * centre).flatten(1)
        slack = 1e-12 * (at_centre.abs().sum(1) + self.ball.radius * dual)
        return torch.maximum(least, at_centre.sum(1) - self.ball.radius * dual - slack)


@dataclass(frozen=True, eq=False)
class Specification:
    """Linear functions ``C y + d`` of the logits ``y``; shown where in every group at least one is above 0 everywhere.

    Attributes:
        weights: ``C``, ``(n, m, classes)`` float64.
        offsets: ``d``, ``(n, m)`` float64.
        groups: which group each of the ``m`` functions belongs to, ``(m,)`` int64, numbered from 0.
    """

    weights: Tensor
    offsets: Tensor
    groups: Tensor

    @classmethod
    def robust(cls, labels: Tensor, classes: int) -> "Specification":
        """The label's logit exceeds every other: labels ``(n,)`` int64; function ``j`` is about the j-th other."""
        identity = torch.eye(classes, dtype=torch.float64, device=labels.device)
        others = torch.arange(classes - 1, device=labels.device).expand(len(labels), -1)
        others = others + (others >= labels[:, None])
        weights = identity[labels][:, None] - identity[others]
        offsets = weights.new_zeros(weights.shape[:2])
        return cls(weights, offsets, torch.arange(classes - 1, device=labels.device))

    def to(self, device: torch.device) -> "Specification":
        """The same there."""
        return Specification(*(it.to(device) for it in vars(self).values()))

    def part(self, which: Tensor | slice) -> "Specification":
        """Those of some images."""
        return Specification(self.weights[which], self.offsets[which], self.groups)

    def row(self, which: int) -> "Specification":
        """That function alone."""
        alone = slice(which, which + 1)
        return Specification(self.weights[:, alone], self.offsets[:, alone], self.groups.new_zeros(1))

    def values(self, logits: Tensor) -> Tensor:
        """``C y + d`` for logits ``(n, classes)``: ``(n, m)`` float64."""
        return torch.einsum("nmk,nk->nm", self.weights, logits.double()) + self.offsets

    def worst(self, margins: Tensor) -> Tensor:
        """Of ``(n, m)`` values or lower bounds, the largest of each group's, the least of these: ``(n,)``."""
        count = int(self.groups.max()) + 1
        best = margins.new_full((len(margins), count), -torch.inf)
        best = best.scatter_reduce(1, self.groups.expand_as(margins), margins, "amax")
        return best.amin(1)

    def left(self, lower: Tensor) -> list[Tensor]:
        """The functions of each group in which no one of an image's lower bounds ``(m,)`` is above 0."""
        groups = [(self.groups == group).nonzero().squeeze(1) for group in self.groups.unique().tolist()]
        return [rows for rows in groups if not (lower[rows] > 0).any()]

    def shown(self, lower: Tensor) -> Tensor:
        """For which images lower bounds ``(n, m)`` show it: bool ``(n,)``."""
        return self.worst(lower) > 0


def parts(region: Region, specification: Specification, images: int) -> Iterator[tuple[Region, Specification]]:
    """So many images at a time, at least one."""
    for first in range(0, len(region), max(1, images)):
        some = slice(first, first + max(1, images))
        yield region.part(some), specification.part(some)


@dataclass(frozen=True, eq=False)
class Bounds:
    """What is known of a network on regions.

    Attributes:
        layers: by position of each layer that a ReLU or sigmoid takes, its lower and upper bounds ``(n, *shape)``.
        margins: lower bounds of the specification's functions, ``(n, m)`` float64.
    """

    layers: dict[int, tuple[Tensor, Tensor]]
    margins: Tensor

    def part(self, k: int) -> "Bounds":
        """Of the k-th image alone."""
        alone = slice(k, k + 1)
        return Bounds({i: (low[alone], high[alone]) for i, (low, high) in self.layers.items()}, self.margins[alone])

    @staticmethod
    def join(bounds: Sequence["Bounds"]) -> "Bounds":
        """Those of several images as one."""
        if len(bounds) == 1:
            return bounds[0]
        layers = {
            i: (torch.cat([it.layers[i][0] for it in bounds]), torch.cat([it.layers[i][1] for it in bounds]))
            for i in bounds[0].layers
        }
        return Bounds(layers, torch.cat([it.margins for it in bounds]))

    @property
    def open(self) -> int:
        """How many ReLUs may be on or off, of all images; a sigmoid whose input may have either sign counts, too."""
        return sum(int(((lower < 0) & (upper > 0)).sum()) for lower, upper in self.layers.values())
