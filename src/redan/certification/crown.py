"""CROWN (Zhang et al., NeurIPS 2018, arXiv:1811.00866): every bound a linear function pushed back to the input.

Every neuron that interval bounds leave open is bounded so, layer by layer, each through the bounds before it
(``intermediate="crown"``), or only the specification is (CROWN-IBP: Zhang et al., ICLR 2020, arXiv:1906.06316). The
lower slope of an open ReLU is 1 where it is mostly open upwards and 0 elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from redan.certification.interval import CACHED
from redan.certification.network import Network
from redan.certification.regions import Bounds, Region, Specification, parts
from redan.certification.relaxation import Functions, Relaxation
from redan.certification.rounding import SoundFloat, full_products, known
from redan.certification.rows import Rows

# Lower bounds of functions: a relaxation and the functions, to ``(r,)`` in float64.
Improve = Callable[[Relaxation, Functions], Tensor]


@dataclass(frozen=True)
class Crown:
    """CROWN's bounds.

    Args:
        intermediate: how the layers before the last are bounded: ``crown``, or ``interval`` for CROWN-IBP.
        sound: which rounding errors the bounds cover.
    """

    intermediate: Literal["crown", "interval"] = "crown"
    sound: SoundFloat = "exact"

    @full_products()
    @torch.no_grad()
    def __call__(self, network: Network, region: Region, specification: Specification) -> Bounds:
        some = parts(region, specification, CACHED // network.widest)
        return Bounds.join([self._bound(network, *it) for it in some])

    def _bound(self, network: Network, region: Region, specification: Specification) -> Bounds:
        relaxation = Relaxation(network, region, self.sound)
        targets = network.bent
        for _ in network.layers:
            position = relaxation.extend()
            if self.intermediate == "crown" and position in targets and not relaxation.interval_is_exact(position):
                tighten_open(relaxation, position)
        margins = specify(relaxation, specification)
        return Bounds({i: relaxation.boxes[i] for i in targets}, margins)


def plain(relaxation: Relaxation, functions: Functions) -> Tensor:
    """CROWN's own lower bounds, with the default slopes."""
    return relaxation.least(functions)


def tighten_open(relaxation: Relaxation, position: int, improve: Improve = plain) -> None:
    """Bound all neurons of a layer whose sign its box leaves open; all there are, where a sigmoid takes them.

    The bound that may settle the sign comes first: from above where the box lies mostly below zero, from below
    elsewhere. The other side is bounded only where that leaves the sign open.
    """
    curved = position in relaxation.network.curved
    lower, upper = (it.clone().flatten(1) for it in relaxation.boxes[position])
    shape = relaxation.boxes[position][0].shape
    image, neuron = (lower < upper if curved else (lower < 0) & (upper > 0)).nonzero(as_tuple=True)
    sign = torch.where(lower[image, neuron] + upper[image, neuron] > 0, 1.0, -1.0)
    for _ in range(2):
        for part in relaxation.chunks(position, len(image)):
            some, which, signs = image[part], neuron[part], sign[part].to(lower.dtype)
            found = improve(relaxation, relaxation.neurons(position, some, which, signs)).to(lower.dtype)
            # To float32 and outwards.
            found = found - found.abs() * torch.finfo(lower.dtype).eps
            up = signs > 0
            lower[some[up], which[up]] = torch.maximum(lower[some[up], which[up]], found[up])
            upper[some[~up], which[~up]] = torch.minimum(upper[some[~up], which[~up]], -found[~up])
        left = ((lower[image, neuron] < 0) & (upper[image, neuron] > 0)) | curved
        image, neuron, sign = image[left], neuron[left], -sign[left]
    relaxation.tighten(position, *known(lower.view(shape), upper.view(shape)))


def specify(relaxation: Relaxation, specification: Specification, improve: Improve = plain) -> Tensor:
    """Lower bounds ``(n, m)`` of the specification's functions."""
    n, m = specification.offsets.shape
    last = len(relaxation.network.layers) - 1
    image = torch.arange(n, device=relaxation.network.device).repeat_interleave(m)
    rows = Rows(specification.weights.flatten(0, 1).to(relaxation.network.dtype), image)
    offsets = specification.offsets.flatten()
    found = [
        improve(relaxation, Functions({last: rows.part(part)}, offsets[part], torch.zeros_like(offsets[part])))
        for part in relaxation.chunks(last, n * m)
    ]
    return torch.cat(found).view(n, m)
