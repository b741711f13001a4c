"""Zonotopes whose radii are estimated by Cauchy projections, as COLT trains with (Balunović & Vechev, ICLR 2020).

A generator matrix is never built. Of each group of error terms (the image's, and each ReLU's) ``k`` vectors of standard
Cauchy draws times the coefficients are pushed through the layers; by 1-stability a neuron's projection is Cauchy with
the scale of that group's L1 norm there, which the median of the absolute values estimates, with a relative standard
deviation of pi / (2 sqrt(k)). Norms of groups add up. The lower median is taken, the 25th of 50.

These are **estimates, not bounds**: they serve training, never a certificate.
"""

import torch
from torch import Generator, Tensor

from redan.certification.interval import Box, step
from redan.certification.network import Affine, Network, Relu
from redan.certification.regions import Region

# Draws are clipped to this size, as in the published code.
LARGEST = 1e10


def estimate_bounds(
    network: Network, region: Region, *, projections: int = 50, generator: Generator | None = None
) -> dict[int, Box]:
    """Estimated bounds of what each ReLU takes, all groups in one pass; differentiable in the network's weights.

    Layers whose box is exact have it.

    Args:
        network: the network.
        region: boxes around ``n`` images.
        projections: how many each group has, ``k``; at least 1.
        generator: of the draws, on the CPU.

    Returns:
        By position of the layer that a ReLU takes: lower and upper, ``(n, *shape)``.
    """
    region = region.to(network.dtype, network.device)
    boxes: dict[int, Box] = {0: (region.lower, region.upper)}
    centres: dict[int, Tensor] = {0: (region.lower + region.upper) / 2}
    groups: dict[int, dict[int, Tensor]] = {0: {0: _draws((region.upper - region.lower) / 2, projections, generator)}}
    found: dict[int, Box] = {}
    for position, layer in enumerate(network.layers[1:], 1):
        inputs = layer.inputs
        if network.box_is_exact(position):
            boxes[position] = step(layer, [boxes[i] for i in inputs], "off")
        if isinstance(layer, Relu):
            (before,) = inputs
            if before not in found:
                radius = sum((_scale(it) for it in groups[before].values()), torch.zeros_like(centres[before]))
                estimate = (centres[before] - radius, centres[before] + radius)
                found[before] = boxes.get(before, estimate)
            lower, upper = found[before]
            is_open = (lower < 0) & (upper > 0)
            slope = torch.where(is_open, upper / (upper - lower).clamp(min=1e-12), (lower >= 0).to(lower))
            mu = torch.where(is_open, -slope * lower / 2, 0.0)
            centres[position] = slope * centres[before] + mu
            groups[position] = {origin: slope[:, None] * it for origin, it in groups[before].items()}
            groups[position][position] = _draws(mu, projections, generator)
        else:
            assert isinstance(layer, Affine)
            centres[position] = layer(*(centres[i] for i in inputs))
            groups[position] = {
                origin: _pushed(
                    layer, [groups[i].get(origin) for i in inputs], [centres[i] for i in inputs], projections
                )
                for origin in {origin for i in inputs for origin in groups[i]}
            }
    return found


def _pushed(layer: Affine, parts: list[Tensor | None], centres: list[Tensor], projections: int) -> Tensor:
    """One group's projections ``(n, k, ...)`` through a layer; zero on inputs that the group does not reach."""
    whole = [
        it.new_zeros(len(it), projections, *it.shape[1:]) if part is None else part
        for part, it in zip(parts, centres, strict=True)
    ]
    pushed = layer.linear(*(it.flatten(0, 1) for it in whole))
    return pushed.unflatten(0, (-1, projections))


def _draws(size: Tensor, projections: int, generator: Generator | None) -> Tensor:
    """``(n, k, ...)`` standard Cauchy draws times ``size``."""
    shape = (len(size), projections, *size.shape[1:])
    draws = torch.empty(shape, dtype=size.dtype).cauchy_(generator=generator).clamp_(-LARGEST, LARGEST)
    return size[:, None] * draws.to(size.device)


def _scale(projected: Tensor) -> Tensor:
    """The estimated L1 norm, ``(n, k, ...)`` to ``(n, ...)``."""
    return projected.abs().median(1).values
