"""alpha-CROWN (Xu et al., ICLR 2021, arXiv:2011.13824): CROWN with the lower slopes of its ReLUs optimised.

Every row (a neuron's bound, or a function of the specification) has slopes of its own in every ReLU layer before it,
and climbs its own bound. Tighter bounds of one layer never loosen those of the next, so that layers are optimised one
after the other and each row by itself: memory does not grow with the number of rows.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from redan.certification.adam import Moments
from redan.certification.crown import specify, tighten_open
from redan.certification.network import Network
from redan.certification.regions import Bounds, Region, Specification
from redan.certification.relaxation import Functions, Relaxation
from redan.certification.rounding import SoundFloat, full_products
from redan.certification.rows import Rows


@dataclass(frozen=True)
class AlphaCrown:
    """Optimised bounds of every layer that CROWN leaves open, and of the specification.

    Args:
        iterations: steps of Adam (Kingma & Ba, ICLR 2015), at least 1.
        rate: their size; slopes lie in [0, 1].
        decay: factor of the rate, a step.
        until_shown: no more steps for a function that is above 0, or whose image has lost all hope to be improved.
        intermediate: how the layers before the last are bounded: optimised, too, or by ``crown``, which takes a small
            part of the time where many neurons are open.
        sound: which rounding errors the bounds cover.
    """

    iterations: int = 20
    rate: float = 0.25
    decay: float = 0.95
    until_shown: bool = False
    intermediate: Literal["alpha-crown", "crown"] = "alpha-crown"
    sound: SoundFloat = "exact"

    @full_products()
    def __call__(
        self, network: Network, region: Region, specification: Specification, crown: Bounds | None = None
    ) -> Bounds:
        """As every bounder; ``crown`` are CROWN's bounds of the same network on the same regions, if they are there."""
        relaxation = Relaxation(network, region, self.sound)
        targets = network.bent
        for _ in network.layers:
            position = relaxation.extend()
            if position in targets and not relaxation.interval_is_exact(position):
                if crown is not None:
                    relaxation.tighten(position, *crown.layers[position])
                else:
                    with torch.no_grad():
                        tighten_open(relaxation, position)
                if self.intermediate == "alpha-crown":
                    tighten_open(relaxation, position, self.optimise)
        margins = specify(relaxation, specification, self.optimise)
        if crown is not None:  # from tighter boxes, default slopes are others and may be worse
            margins = torch.maximum(margins, crown.margins)
        return Bounds({i: relaxation.boxes[i] for i in targets}, margins)

    def optimise(self, relaxation: Relaxation, functions: Functions) -> Tensor:
        """The best lower bounds that were seen on the way, ``(r,)`` float64; the first are CROWN's."""
        slopes: dict[int, Tensor] = {}
        rows_of: dict[int, Rows] = {}

        def choose(rows: Rows, position: int) -> Tensor:
            if position not in slopes:
                slopes[position] = rows.look(relaxation.lines(position)[2]).requires_grad_()
                rows_of[position] = rows
            return slopes[position]

        best = torch.full_like(functions.constant, -torch.inf)
        moments: dict[int, Moments] = {}
        for i in range(self.iterations + 1):
            with torch.enable_grad():
                found = relaxation.least(functions, choose)
            best = torch.maximum(best, found.detach())
            if i == self.iterations or not slopes or (self.until_shown and bool((best > 0).all())):
                break
            gradients = torch.autograd.grad(found.clamp(min=-1e30).sum(), list(slopes.values()), allow_unused=True)
            rate = self.rate * self.decay**i
            for position, gradient in zip(slopes, gradients, strict=True):
                if gradient is None:
                    continue
                if position not in moments:
                    # Only where the ReLU is open has the slope a choice.
                    is_open = rows_of[position].look((relaxation.lines(position)[1] < 0).to(gradient))
                    moments[position] = Moments(gradient)
                    rows_of[position] = rows_of[position].with_values(is_open)
                step = moments[position].direction(gradient * rows_of[position].values, i)
                with torch.no_grad():
                    slopes[position].add_(step, alpha=rate).clamp_(0, 1)
        return best
