"""Zonotopes whose radii are estimated by Cauchy projections, as COLT trains with (Balunović & Vechev, ICLR 2020).

A generator matrix is never built. Of each group of error terms (the image's, and each ReLU's) ``k`` vectors of standard
Cauchy draws times the coefficients are pushed through the layers; by 1-stability a neuron's projection is Cauchy with
the scale of that group's L1 norm there, which the median of the absolute values estimates, with a relative standard
deviation of pi / (2 sqrt(k)). Norms of groups add up. The lower median is taken, the 25th of 50. A group that has met
no more than one layer that mixes is a box still: its norm |W| r is exact and needs no draws.

These are **estimates, not bounds**: they serve training, never a certificate.
"""

import torch
from torch import Generator, Tensor

from redan.certification.interval import Box, step
from redan.certification.memory import keep_freed_memory
from redan.certification.network import Affine, Network, Relu
from redan.certification.regions import Region
from redan.seeds import generator_on

# Draws are clipped to this size, as in the published code.
LARGEST = 1e10

# Draws that a group takes at the most, unless one image needs more: more would take longer than all else.
DRAWS = 2**22

# Medians that are taken at once: as many as a processor's cache holds.
CHUNK = 2048


def estimate_bounds(
    network: Network,
    region: Region,
    *,
    projections: int = 50,
    generator: Generator | None = None,
    until: int | None = None,
    dtype: torch.dtype | None = None,
) -> dict[int, Box]:
    """Estimated bounds of what each ReLU takes, in one pass; differentiable in the network's weights.

    Layers whose box is exact have it; of the others, so has the part of each group that is a box there. A layer takes
    one group after the other: joined for one call, convolutions took up to twice as long.

    Args:
        network: the network.
        region: boxes around ``n`` images.
        projections: how many each group has, ``k``; at least 1.
        generator: of the draws, on the CPU.
        until: position of the last layer whose bounds are asked for; of all if None.
        dtype: of the projections, the network's if None. bfloat16 errs by much less than the estimate itself.

    Returns:
        By position of the layer that a ReLU takes: lower and upper, ``(n, *shape)``.
    """
    keep_freed_memory()
    region = region.to(network.dtype, network.device)
    dtype = network.dtype if dtype is None else dtype
    wanted = [i for i in network.bent if until is None or i <= until]
    estimated = [i for i in wanted if not network.box_is_exact(i)]
    boxes: dict[int, Box] = {0: (region.lower, region.upper)}
    centres: dict[int, Tensor] = {0: (region.lower + region.upper) / 2}
    drawn = {i for i in (0, *network.relus) if any(i < k and not network.box_is_exact(k, i) for k in estimated)}
    groups: dict[int, dict[int, Tensor]] = {}
    if drawn:
        groups[0] = {0: _draws(((region.upper - region.lower) / 2).to(dtype), projections, generator)}
    norms: dict[int, tuple[int, Tensor]] = {}  # by layer: the latest group, while it is a box, and its norm
    last = {i: position for position, layer in enumerate(network.layers) for i in layer.inputs}
    found: dict[int, Box] = {}
    for position, layer in enumerate(network.layers[: max(wanted, default=0) + 1]):
        if not layer.inputs:
            continue
        inputs = layer.inputs
        if network.box_is_exact(position):
            boxes[position] = step(layer, [boxes[i] for i in inputs], "off")
        pushes = position <= max(estimated, default=0)
        if isinstance(layer, Relu):
            slope, mu = lines(*found[inputs[0]])
            centres[position] = slope * centres[inputs[0]] + mu
            norms[position] = position, mu
            if pushes:
                rounded = _channels_first(_channels_last(slope).to(dtype).contiguous())
                groups[position] = {origin: rounded * it for origin, it in groups[inputs[0]].items()}
                if position in drawn:
                    groups[position][position] = _draws(mu.to(dtype), projections, generator)
        else:
            assert isinstance(layer, Affine)
            centres[position] = layer(*(centres[i] for i in inputs))
            if inputs[0] in norms and network.box_is_exact(position, norms[inputs[0]][0]):
                origin, norm = norms[inputs[0]]
                norms[position] = origin, layer.absolute(norm)
            if pushes:
                light = layer.to(dtype, network.device)
                # In the order that the groups came in: the draws that follow are the same each time.
                origins = dict.fromkeys(origin for i in inputs for origin in groups[i])
                empty = {i: centres[i].new_zeros(()).to(dtype).expand(projections, *centres[i].shape) for i in inputs}
                groups[position] = {
                    origin: light.linear(*(groups[i].get(origin, empty[i]).flatten(0, 1) for i in inputs)).unflatten(
                        0, (projections, -1)
                    )
                    for origin in origins
                }
        if position in estimated:
            latest, norm = norms.get(position, (None, torch.zeros(())))
            others = (it for origin, it in groups[position].items() if origin != latest)
            radius = sum((_scale(it).to(network.dtype) for it in others), norm)
            found[position] = (centres[position] - radius, centres[position] + radius)
        elif position in wanted:
            found[position] = boxes[position]
        for done in [i for i in groups if last.get(i, 0) <= position]:
            del groups[done]
    return found


def lines(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """A ReLU's zonotope of least area, ``slope x + mu + mu e``: slope and mu, like the bounds of what it takes."""
    is_open = (lower < 0) & (upper > 0)
    slope = torch.where(is_open, upper / (upper - lower).clamp(min=1e-12), (lower >= 0).to(lower))
    return slope, torch.where(is_open, -slope * lower / 2, 0.0)


def _draws(size: Tensor, projections: int, generator: Generator | None) -> Tensor:
    """``(k, n, ...)`` standard Cauchy draws times ``size``, laid out channels-last.

    Those of one image are independent of each other. Those of two images are, too, unless that takes too many: then
    each image's begin a little further on in one long row, so that a neuron sees other draws in each image.
    """
    flat = _channels_last(size).flatten(1)
    n, numbers = flat.shape
    apart = max(1, min(numbers, DRAWS // (projections * n)))
    pool = torch.empty(projections, numbers + (n - 1) * apart, device=size.device)
    pool.cauchy_(generator=generator_on(size.device, generator))  # millions: on a GPU, the CPU would take longer
    pool = pool.clamp_(-LARGEST, LARGEST).to(size.dtype)
    draws = flat * pool.unfold(1, numbers, apart)
    draws = draws.view(projections, *_channels_last(size).shape)
    return _channels_first(draws) if size.dim() > 3 else draws


def _scale(projected: Tensor) -> Tensor:
    """The estimated L1 norm, ``(k, n, ...)`` to ``(n, ...)``: the lower median of the absolute values."""
    last = _channels_last(projected)
    flat = last.reshape(len(last), -1)
    return _channels_first(flat.gather(0, _median(flat.detach())[None])[0].abs().view(last.shape[1:]))


def _median(values: Tensor) -> Tensor:
    """Which of each column's ``(k, m)`` is the lower median by absolute value: ``(m,)`` int64."""
    if values.device.type != "cpu":
        return values.abs().median(0).indices
    # NumPy selects among integers in a tenth of the time that torch takes among floats. The bits of floats of at least
    # 0 are in the order of the floats; the index is what is left over a multiple of k.
    k, m = values.shape
    index = torch.arange(k)
    found = torch.empty(m, dtype=torch.int64)
    for first in range(0, m, CHUNK):
        part = values[:, first : first + CHUNK].t().contiguous().abs()
        bits = part.view(torch.int16).int() if part.dtype == torch.bfloat16 else part.float().view(torch.int32).long()
        keys = bits.mul_(k).add_(index).numpy()
        keys.partition((k - 1) // 2, axis=1)
        found[first : first + CHUNK] = torch.from_numpy(keys[:, (k - 1) // 2] % k)
    return found


def _channels_last(x: Tensor) -> Tensor:
    """``(..., c, h, w)`` as ``(..., h, w, c)``; what is no image stays as it is."""
    return x.movedim(-3, -1) if x.dim() > 3 else x


def _channels_first(x: Tensor) -> Tensor:
    """Back."""
    return x.movedim(-1, -3) if x.dim() > 3 else x
