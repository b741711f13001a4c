"""The Square attack: random search by square windows, which asks the model for logits and never for a gradient.

For Linf and L2 as in Andriushchenko et al. (ECCV 2020), for L1 as in Croce & Hein (ICML 2021). Each image has windows
of its own, drawn from all positions, the last row and column included, where public code leaves these out. A window
that is taller or wider than the image is cut to it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Generator, Tensor

from redan.attacks.base import Attack, Outcome, Standing, keep
from redan.attacks.objectives import cw_margin
from redan.attacks.search import SearchModel
from redan.errors import UserError
from redan.threats import ROUNDING, LpBall, uniform

# The window's share of the image halves after these proposals (section 3.2 and the authors' code, for 10,000 queries).
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

TILES = 5  # L2 and L1 start from this many tiles along the shorter side (section 3.4)

TINY = 1e-12  # keeps an unchanged window from dividing by its length


def share(proposal: int) -> float:
    """The window's share of the image, as part of the first one, at a proposal that is counted from 0.

    The schedule does not depend on the number of queries, as in AutoAttack, so that a longer run goes on where a
    shorter one ends.

    >>> [share(proposal) for proposal in (0, 10, 11, 50, 51, 4999)]
    [1.0, 1.0, 0.5, 0.5, 0.25, 0.0078125]
    """
    return 0.5 ** sum(proposal > halving for halving in HALVINGS)


@dataclass(frozen=True)
class Square(Attack):
    """The Square attack: keeps a random change of a square window wherever it raises the margin.

    Of a model that draws at random that is the mean margin of the draws.

    Args:
        threat: Linf, L2 or L1.
        queries: forward passes a restart, its start included, at least 1.
        p_init: share of the image that the first windows cover, above 0 and at most 1.
        restarts: runs from new random starts on the images that still stand, at least 1.

    Raises:
        UserError: for another threat, and where the others are out of their range.
    """

    threat: LpBall
    queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1

    def __post_init__(self) -> None:
        LpBall.require(self.threat, "Square")
        if self.queries < 1 or self.restarts < 1:
            raise UserError(f"Square takes at least 1 query and 1 restart, got {self.queries} and {self.restarts}")
        if not 0 < self.p_init <= 1:
            raise UserError(f"Square takes a p_init above 0 and at most 1, got {self.p_init}")

    def cost(self, classes: int) -> int:
        """See ``Attack.cost``."""
        return self.queries * self.restarts

    def run(self, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        """See ``Attack.run``."""
        standing = Standing(self.threat, search, images, labels)
        for _ in range(self.restarts):
            if len(standing):
                self._one_run(standing, generator)
        return standing.outcome()

    def _one_run(self, standing: Standing, generator: Generator | None) -> None:
        moves = MOVES[self.threat.norm](self.threat)
        best, best_value = standing.center.clone(), torch.full_like(standing.labels, -torch.inf, dtype=torch.float32)
        for query in range(self.queries):
            if query == 0:
                candidate = moves.start(standing.center, generator)
            else:
                candidate = moves.propose(best, standing.center, self.p_init * share(query - 1), generator)
            logits, value = standing.values(candidate, cw_margin, standing.labels)
            better = (value > best_value).nonzero().squeeze(1)
            if len(better):
                best[better], best_value[better] = candidate[better], value[better]
            stands = standing.settle(candidate, logits)
            if stands is not None:
                best, best_value = keep(stands, best, best_value)
                if not len(standing):
                    return
        standing.conclude(best)


class _Moves(ABC):
    """Where the search starts, and what it tries next. All tensors of images are ``(k, c, h, w)``."""

    least_side: ClassVar[int]  # of a window

    def __init__(self, threat: LpBall) -> None:
        self.threat = threat

    @abstractmethod
    def start(self, center: Tensor, generator: Generator | None) -> Tensor:
        """A random point of the threat."""

    @abstractmethod
    def propose(self, best: Tensor, center: Tensor, p: float, generator: Generator | None) -> Tensor:
        """The best point so far, changed in a window of about ``p`` of the image; inside the threat."""

    def side(self, p: float, pixels: int) -> int:
        """Side of the square that covers about the share ``p`` of an image of so many pixels."""
        return max(round(math.sqrt(p * pixels)), self.least_side)


class _Corners(_Moves):
    """Linf: every pixel is at the end of its range, up or down."""

    least_side = 1

    def start(self, center: Tensor, generator: Generator | None) -> Tensor:
        """Vertical stripes: a sign for each column of each channel."""
        k, c, _, w = center.shape
        rises = uniform(torch.Size((k, c, 1, w)), center, generator) < 0.5
        return self._ends(center, rises)

    def propose(self, best: Tensor, center: Tensor, p: float, generator: Generator | None) -> Tensor:
        """One sign for each channel of the window."""
        k, c, h, w = center.shape
        draws = uniform(torch.Size((k, 2 + c)), center, generator)
        side = self.side(p, h * w)
        window = _windows(draws[:, :2], min(side, h), min(side, w), center)
        middle, rises = center.flatten(2).gather(2, window), draws[:, 2:, None] < 0.5
        # Where all of the window is as it would become, a query would tell nothing: go the other way.
        idle = self._ends(middle, rises) == best.flatten(2).gather(2, window)
        ends = self._ends(middle, rises ^ idle.flatten(1).all(1)[:, None, None])
        return best.flatten(2).scatter(2, window, ends).unflatten(2, (h, w))

    def _ends(self, center: Tensor, rises: Tensor) -> Tensor:
        radius = min(self.threat.radius, 1.0)  # no pixel has more room than that
        return self.threat.project(center + torch.where(rises, radius, -radius), center)


class _Masses(_Moves):
    """L2 and L1: what was spent on two windows is spent anew on one of them, towards a pair of opposite hills.

    The mass of a change is what the radius limits: the sum of its squares in L2, of its magnitudes in L1.
    """

    least_side = 3
    power: ClassVar[int]  # mass is length to this power
    decay: ClassVar[int]  # of the hills, from ring to ring

    def start(self, center: Tensor, generator: Generator | None) -> Tensor:
        """Tiles of hills all over the image, each with its own direction, and a sign for each channel."""
        k, c, h, w = center.shape
        side = max(min(h, w) // TILES, 1)
        rows, columns = h // side, w // side
        draws = uniform(torch.Size((k, 1 + c, rows, columns)), center, generator) < 0.5
        hills = _hills(side, side, self.power, self.decay, center.device)[draws[:, :1].long()]
        signed = torch.where(draws[:, 1:, ..., None, None], hills, -hills)
        tiles = signed.transpose(3, 4).reshape(k, c, rows * side, columns * side)
        # Each tile has mass 1; of what exceeds the radius, the projection in L1 leaves the summits.
        scale = max(min(self.threat.radius, c * h * w) / (c * rows * columns) ** (1 / self.power), 1.0)
        top, left = (h - rows * side) // 2, (w - columns * side) // 2
        move = torch.zeros(center.shape, device=center.device)
        move[:, :, top : top + rows * side, left : left + columns * side] = tiles * scale
        return self.threat.project(center + move, center)

    def propose(self, best: Tensor, center: Tensor, p: float, generator: Generator | None) -> Tensor:
        """Move the mass of a second window, and what is unused, into a first one (algorithm 3)."""
        k, c, h, w = center.shape
        draws = uniform(torch.Size((k, 5 + c)), center, generator)
        side = self.side(p, h * w)
        rows, columns = min(side, h), min(side, w)
        into, out_of = _windows(draws[:, :2], rows, columns, center), _windows(draws[:, 2:4], rows, columns, center)
        hills = _hills(rows, columns, self.power, self.decay, center.device).flatten(1)[(draws[:, 4:5] < 0.5).long()]
        hills = torch.where(draws[:, 5:, None] < 0.5, hills, -hills)
        move = (best - center).flatten(2)
        unused = self.limit(c * h * w) - self.mass(move).sum(1, keepdim=True)
        old = move.gather(2, into)
        old_mass = self.mass(old)
        move.scatter_(2, into, 0.0)
        taken = old_mass + self.mass(move.gather(2, out_of))
        move.scatter_(2, out_of, 0.0)
        new = old / self.length(old_mass).clamp(min=TINY) + hills
        length = self.length(self.mass(new))
        # Where hills and window cancel, as they can where it covers all of the image, the window is turned over.
        new, length = torch.where(length < 1e-3, hills, new), torch.where(length < 1e-3, 1.0, length)
        move.scatter_(2, into, new * (self.length(self.available(unused, taken).clamp(min=0)) / length))
        return self.inside(move.unflatten(2, (h, w)), center)

    def side(self, p: float, pixels: int) -> int:
        """Odd, so that a hill has a middle."""
        return super().side(p, pixels) | 1

    def length(self, mass: Tensor) -> Tensor:
        """Of a change of this mass."""
        return mass ** (1 / self.power)

    @abstractmethod
    def mass(self, move: Tensor) -> Tensor:
        """``(k, c, pixels)`` to ``(k, c, 1)``."""

    @abstractmethod
    def limit(self, numbers: int) -> float:
        """Mass of the largest change of an image of so many numbers, each of which has room for 1."""

    @abstractmethod
    def available(self, unused: Tensor, taken: Tensor) -> Tensor:
        """Mass of the new window, from the image's unused mass ``(k, 1, 1)`` and what the windows had ``(k, c, 1)``."""

    @abstractmethod
    def inside(self, move: Tensor, center: Tensor) -> Tensor:
        """``center + move``, brought inside the threat."""


class _Dense(_Masses):
    """L2."""

    power, decay = 2, 2

    def mass(self, move: Tensor) -> Tensor:
        """See ``_Masses``."""
        return move.square().sum(2, keepdim=True)

    def limit(self, numbers: int) -> float:
        """So much less than the threat allows as float32 can lose, for ``inside`` only cuts."""
        length = min(self.threat.radius, numbers) * (1 - 1e-5) - ROUNDING * numbers**0.5
        return max(length, 0.0) ** 2

    def available(self, unused: Tensor, taken: Tensor) -> Tensor:
        """The channels share what is unused."""
        return unused / taken.shape[1] + taken

    def inside(self, move: Tensor, center: Tensor) -> Tensor:
        """No mass was made, so that only [0, 1] is left to care for."""
        return (center + move).clamp_(0, 1)


class _Sparse(_Masses):
    """L1. Each window is offered more than there is, and the projection takes it from the smallest changes anywhere."""

    power, decay = 1, 4

    def mass(self, move: Tensor) -> Tensor:
        """See ``_Masses``."""
        return move.abs().sum(2, keepdim=True)

    def limit(self, numbers: int) -> float:
        """See ``_Masses``."""
        return min(self.threat.radius, numbers)

    def available(self, unused: Tensor, taken: Tensor) -> Tensor:
        """Each channel is offered all that is unused, and as many times what it had as there are channels."""
        return unused + taken.shape[1] * taken

    def inside(self, move: Tensor, center: Tensor) -> Tensor:
        """The projection, of the changed pixels alone: there are few, and it sorts them."""
        changes, pixels = move.flatten(1), center.flatten(1)
        rows, places = changes.nonzero(as_tuple=True)
        counts = rows.bincount(minlength=len(center))
        slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        packed = pixels.new_zeros(2, len(center), max(int(counts.amax()), 1))
        packed[0, rows, slots] = pixels[rows, places]
        packed[1, rows, slots] = pixels[rows, places] + changes[rows, places]
        candidate = pixels.clone()
        candidate[rows, places] = self.threat.project(packed[1], packed[0])[rows, slots]
        return candidate.view(center.shape)


MOVES: dict[str, type[_Moves]] = {"linf": _Corners, "l2": _Dense, "l1": _Sparse}


def _windows(draws: Tensor, rows: int, columns: int, center: Tensor) -> Tensor:
    """Positions in ``center.flatten(2)`` of one window an image, int64 ``(k, c, rows * columns)``.

    ``draws``, ``(k, 2)`` in [0, 1), say where each window is.
    """
    k, c, h, w = center.shape
    top = (draws[:, 0] * (h - rows + 1)).long()
    left = (draws[:, 1] * (w - columns + 1)).long()
    down, across = torch.arange(rows, device=center.device), torch.arange(columns, device=center.device)
    positions = (top * w + left)[:, None, None] + (down[:, None] * w + across)
    return positions.view(k, 1, rows * columns).expand(k, c, -1)


@lru_cache(maxsize=64)
def _hills(rows: int, columns: int, power: int, decay: int, device: torch.device) -> Tensor:
    """Two opposite hills of mass 1 together, first one above the other, then side by side: ``(2, rows, columns)``."""

    def pair(rows: int, columns: int) -> Tensor:
        above = rows // 2
        both = torch.cat([_hill(above, columns, power, decay), -_hill(rows - above, columns, power, decay)])
        return both / both.abs().pow(power).sum() ** (1 / power)

    return torch.stack([pair(rows, columns), pair(columns, rows).T]).to(device)


def _hill(rows: int, columns: int, power: int, decay: int) -> Tensor:
    """A hill of square rings around the middle, of mass 1: ``(rows, columns)``.

    Ring ``r`` is as high as the sum of ``1 / (i + 1) ** decay`` over ``i`` from ``r`` to the outermost ring (eq. 2).
    """
    down, across = (torch.arange(length) - length // 2 for length in (rows, columns))
    rings = torch.maximum(down.abs()[:, None], across.abs())
    steps = 1 / torch.arange(1, max(rows, columns) // 2 + 2) ** decay
    hill = steps.flip(0).cumsum(0).flip(0)[rings]
    return hill / hill.pow(power).sum() ** (1 / power)
