"""Lines above and below the sigmoid ``f(x) = 1 / (1 + exp(-x))`` on an interval.

It rises, is convex below 0 and concave above, and ``f(-x) = 1 - f(x)``. A line of any slope ``s`` in [0, 1/4] lies
above it on ``[l, u]`` if its offset is the largest value of ``f(x) - s x`` there, which an end of the interval has or
the ``x >= 0`` where ``f'(x) = s``: how well the slope was chosen decides how tight the line is, never whether it is
true. The slopes leave the least area: the line above that is lowest in the middle of the interval carries the curve's
concave hull there, which is the tangent that starts at the left end up to where it touches (the chord, where it never
does), and the curve itself beyond.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from redan.certification.rounding import SoundFloat, gamma

# Roundings by which a computed sigmoid may be off, redan's and, in mode ``network``, any runtime's.
ROUNDINGS = 8

# Halvings of the interval in which a tangent touches.
HALVINGS = 30

# Beyond, the curve is flat in float64.
FLAT = 1e3


@dataclass(frozen=True, eq=False)
class Line:
    """``slope * x + offset``: the slope in the bounds' type, the offset in float64."""

    slope: Tensor
    offset: Tensor


def error(dtype: torch.dtype, sound: SoundFloat) -> float:
    """Relative error of a sigmoid that is computed in ``dtype``, and is to be."""
    if sound == "off":
        return 0.0
    return gamma(ROUNDINGS, dtype) + (gamma(ROUNDINGS, torch.float32) if sound == "network" else 0.0)


def box(lower: Tensor, upper: Tensor, sound: SoundFloat) -> tuple[Tensor, Tensor]:
    """Bounds of the sigmoid on ``[lower, upper]``, in their type."""
    share, lost = error(lower.dtype, sound), 0.0 if sound == "off" else torch.finfo(torch.float32).tiny
    return (lower.sigmoid() * (1 - share) - lost).clamp(min=0), (upper.sigmoid() * (1 + share) + lost).clamp(max=1)


def derivative(x: Tensor) -> Tensor:
    """``f'(x)``, at most 1/4."""
    return x.sigmoid() * (-x).sigmoid()


def lines(lower: Tensor, upper: Tensor, sound: SoundFloat) -> tuple[Line, Line]:
    """A line above the sigmoid on ``[lower, upper]``, and one below."""
    above, mirrored = _above(lower, upper, sound), _above(-upper, -lower, sound)
    return above, Line(mirrored.slope, 1 - mirrored.offset)


def band(lower: Tensor, upper: Tensor, sound: SoundFloat) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, middle and half the height of the band between two parallel lines, the sigmoid within; float64.

    The slope, the least that the curve has on the interval, is a number of the bounds' type (DeepZ: Singh et al.,
    NeurIPS 2018).
    """
    low, high, flat = _finite(lower, upper)
    least = torch.minimum(derivative(low), derivative(high)).masked_fill(flat, 0)
    slope = (least * (1 - 2 * torch.finfo(lower.dtype).eps)).to(lower.dtype).double()  # no steeper than the curve
    ends = low.sigmoid() - slope * low, high.sigmoid() - slope * high
    slack = _slack(slope, low, high, sound)
    return slope, (ends[0] + ends[1]) / 2, (ends[1] - ends[0]).abs() / 2 + slack


def _above(lower: Tensor, upper: Tensor, sound: SoundFloat) -> Line:
    low, high, flat = _finite(lower, upper)
    at_low = low.sigmoid()

    def exceeds(x: Tensor) -> Tensor:
        """By how much the tangent at ``x`` passes above the curve's lower end."""
        return x.sigmoid() + derivative(x) * (low - x) - at_low

    chord = ((high.sigmoid() - at_low) / (high - low)).nan_to_num(0.0)
    left, right = torch.zeros_like(low), high.clamp(min=0)
    for _ in range(HALVINGS):
        middle = (left + right) / 2
        beyond = exceeds(middle) > 0
        left, right = torch.where(beyond, left, middle), torch.where(beyond, middle, right)
    tangent = derivative(torch.maximum(right, (low + high) / 2))
    slope = torch.where((low >= 0) | (exceeds(high.clamp(min=0)) > 0), tangent, chord)
    slope = slope.clamp(0, 0.25).masked_fill(flat, 0).to(lower.dtype)
    s = slope.double()
    root = (1 - 4 * s).clamp(min=0).sqrt()
    touching = (2 * root.log1p() - (4 * s).log()).clamp(low, high)  # f'(x) = s; infinite for s = 0
    offset = torch.stack([x.sigmoid() - s * x for x in (low, high, touching)]).amax(0)
    return Line(slope, offset + _slack(s, low, high, sound))


def _finite(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The interval in float64, cut where the curve is flat; and where it was cut, so that only level lines are true."""
    low, high = (it.double().clamp(-FLAT, FLAT) for it in (lower, upper))
    return low, high, (lower < -FLAT) | (upper > FLAT)


def _slack(slope: Tensor, low: Tensor, high: Tensor, sound: SoundFloat) -> Tensor:
    """What float64 may err here by, and what a runtime's own sigmoid may."""
    size = 1 + slope * torch.maximum(low.abs(), high.abs())
    return size * (0.0 if sound == "off" else 16 * torch.finfo(torch.float64).eps) + error(torch.float64, sound)
