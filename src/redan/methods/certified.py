"""What the trainers on interval bounds share: how the radius grows, how weights begin, what is asked of the bounds.

Initialisation and regularisers are Shi et al.'s (NeurIPS 2021, arXiv:2103.17268): without them boxes explode through a
fresh network, and it learns to switch its ReLUs off instead.
"""

from collections.abc import Iterable
from math import pi, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redan.certification.interval import Box
from redan.errors import UserError

# Of the growth, how much is not linear yet, and its power there (Zhang et al., ICLR 2020; Xu et al., NeurIPS 2020).
CURVED, POWER = 0.25, 4

# tau of Shi et al.: what a ratio is to reach.
ENOUGH = 0.5


def check(holds: bool, needed: str, got: object) -> None:
    """Raise UserError unless it holds."""
    if not holds:
        raise UserError(f"certified training takes {needed}, got {got}")


def growth(progress: float) -> float:
    """The share of the final radius at a share of the ramp, both in [0, 1]: a power, then its tangent up to 1."""
    done = min(max(progress, 0.0), 1.0)
    slope = POWER * CURVED ** (POWER - 1)
    end = CURVED**POWER + slope * (1 - CURVED)
    return done**POWER / end if done < CURVED else (CURVED**POWER + slope * (done - CURVED)) / end


@torch.no_grad()
def draw_weights(layers: Iterable[nn.Module]) -> None:
    """Draw weights with which boxes neither grow nor shrink from ReLU to ReLU, by torch's own generator.

    ``E|w| = 2 / fan_in``, so that a layer doubles what a ReLU halves: normal, of deviation ``sqrt(2 pi) / fan_in``.

    Args:
        layers: of a network; of its convolutions and linear layers all but the last, whose output is no ReLU's.
    """
    weights = [it.weight for it in layers if isinstance(it, nn.Conv2d | nn.Linear)]
    for weight in weights[:-1]:
        weight.normal_(0, sqrt(2 * pi) / weight[0].numel())


def looseness(entered: Box, bent: list[Box]) -> Tensor:
    """``mean over the ReLU layers of max(0, tau - R_0 / R_i) / tau``, R the mean radius of a box: their L_tightness.

    Args:
        entered: the box of what enters the network, normalised.
        bent: of what each ReLU layer takes.
    """
    first = _radius(entered)
    ratios = torch.stack([first / _radius(box).clamp(min=1e-12) for box in bent])
    return F.relu(ENOUGH - ratios).mean() / ENOUGH


def imbalance(bent: list[Box]) -> Tensor:
    """By how much the ReLUs that are on outweigh those that are off, or they these: their L_relu.

    The mean over the layers of ``(max(0, tau - a) + max(0, tau - b)) / tau``: a is the smaller sum of centres, of the
    ReLUs on and of those off, over the larger; b likewise of their squared distances from the layer's mean centre.
    """
    losses = []
    for lower, upper in bent:
        centre = (lower + upper) / 2
        spread = (centre - centre.mean()).square()
        on, off = lower > 0, upper < 0
        sums = _evenness((centre * on).mean(), -(centre * off).mean())
        spreads = _evenness((spread * on).mean(), (spread * off).mean())
        losses.append(F.relu(ENOUGH - sums) + F.relu(ENOUGH - spreads))
    return torch.stack(losses).mean() / ENOUGH


def _radius(box: Box) -> Tensor:
    return (box[1] - box[0]).mean() / 2


def _evenness(a: Tensor, b: Tensor) -> Tensor:
    """The smaller over the larger; 0, with a finite gradient, where one of them is 0."""
    return torch.minimum(a, b) / torch.maximum(a, b).clamp(min=1e-12)
