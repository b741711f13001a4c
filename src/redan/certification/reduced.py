"""A network on one region, with all that does not bend there folded away.

Of a network that was trained to be certified only some hundred ReLUs are open on a region; the rest is linear. The
open ones, layer by layer, obey

    y_k = B_k x + sum_{j < k} C_kj ReLU(y_j) + c_k,        margins = the same, last,

with ``x`` the image as a vector: small dense matrices in float64, on which splitting a thousand sub-problems costs as
much as one pass of the network.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redan.certification.network import Network
from redan.certification.regions import Region, Specification
from redan.certification.relaxation import Functions, Relaxation
from redan.certification.rounding import SoundFloat, gamma
from redan.certification.rows import Rows


@dataclass(frozen=True, eq=False)
class Block:
    """Functions ``y`` of the image and of the blocks before, of ``p`` problems with ``n`` functions each.

    Attributes:
        pixels: ``B``, ``(p, n, d)``.
        before: ``C``, one ``(p, n, n_j)`` a block ``j`` before.
        constant: ``c``, ``(p, n)``.
        slack: up to which the constant is known, ``(p, n)``, at least 0.
        lower: bounds of ``y``, ``(p, n)``.
        upper: likewise.
    """

    pixels: Tensor
    before: tuple[Tensor, ...]
    constant: Tensor
    slack: Tensor
    lower: Tensor
    upper: Tensor


@dataclass(frozen=True, eq=False)
class Reduced:
    """Problems of one shape: the region of each, its open ReLUs and its margins, all in float64.

    Attributes:
        lower: of the image, ``(p, d)``.
        upper: likewise.
        blocks: the layers with open ReLUs, in order.
        margins: the last functions, of which one is to be above 0 everywhere.
    """

    lower: Tensor
    upper: Tensor
    blocks: tuple[Block, ...]
    margins: Block

    def __len__(self) -> int:
        return len(self.lower)

    def part(self, which: Tensor) -> "Reduced":
        """Some of the problems."""

        def some(block: Block) -> Block:
            tensors = {k: v[which] for k, v in vars(block).items() if isinstance(v, Tensor)}
            return replace(block, **tensors, before=tuple(it[which] for it in block.before))

        return Reduced(self.lower[which], self.upper[which], tuple(map(some, self.blocks)), some(self.margins))

    @property
    def open(self) -> int:
        """How many ReLUs are open."""
        return sum(block.lower.shape[1] for block in self.blocks)


def reduce(
    network: Network,
    region: Region,
    specification: Specification,
    layers: dict[int, tuple[Tensor, Tensor]],
    rows: list[Tensor],
    sound: SoundFloat,
) -> Reduced:
    """The reduced problems of one image.

    Args:
        network: the network, in float64.
        region: of the one image.
        specification: likewise.
        layers: bounds by position of the layers that ReLUs take, as bounders give them, ``(1, *shape)``.
        rows: of each problem, which functions of the specification it has, as many in each: ``(m,)`` int64.
        sound: which rounding errors the reduced problems cover.
    """
    relaxation = Relaxation(network, region, sound)
    for _ in network.layers:
        position = relaxation.extend()
        if position in layers:
            lower, upper = layers[position]
            relaxation.tighten(position, lower.to(network.dtype), upper.to(network.dtype))
    blocks: dict[int, Block] = {}
    for position in sorted(layers):
        lower, upper = relaxation.boxes[position]
        neuron = ((lower < 0) & (upper > 0)).flatten().nonzero().squeeze(1)
        if not len(neuron):
            continue
        parts = []
        for chunk in relaxation.chunks(position, len(neuron)):
            some = neuron[chunk]
            signs = torch.ones_like(some, dtype=network.dtype)
            parts.append(relaxation.linearise(relaxation.neurons(position, torch.zeros_like(some), some, signs)))
        found = _block(relaxation, parts, blocks)
        blocks[position] = replace(found, lower=lower.flatten(1)[:, neuron], upper=upper.flatten(1)[:, neuron])
    weights = specification.weights[0].to(network.dtype)
    last, offsets = len(network.layers) - 1, specification.offsets[0]
    functions = Functions(
        {last: Rows(weights, torch.zeros(len(weights), dtype=torch.int64, device=weights.device))},
        offsets,
        torch.zeros_like(offsets),
    )
    margins = _block(relaxation, [relaxation.linearise(functions)], blocks)
    count = len(rows)
    chosen = [_rows(margins, it) for it in rows]

    def every(block: Block) -> Block:
        tensors = {k: v.expand(count, *v.shape[1:]) for k, v in vars(block).items() if isinstance(v, Tensor)}
        return replace(block, **tensors, before=tuple(it.expand(count, *it.shape[1:]) for it in block.before))

    return Reduced(
        relaxation.region.lower.flatten(1).expand(count, -1),
        relaxation.region.upper.flatten(1).expand(count, -1),
        tuple(every(block) for block in blocks.values()),
        _join(chosen),
    )


def _block(
    relaxation: Relaxation,
    parts: list[tuple[Tensor, dict[int, Tensor], Tensor, Tensor]],
    blocks: dict[int, Block],
) -> Block:
    pixels = torch.cat([it[0] for it in parts])
    bent = {k: torch.cat([it[1][k] for it in parts]) for k in parts[0][1]}
    constant, slack = torch.cat([it[2] for it in parts]), torch.cat([it[3] for it in parts])
    before = tuple(bent[k] if k in bent else pixels.new_zeros(len(pixels), b.lower.shape[1]) for k, b in blocks.items())
    # Products with these matrices are rounded, too, and so are the coefficients that are pushed through them.
    image = torch.maximum(relaxation.region.lower.abs(), relaxation.region.upper.abs()).flatten()
    size = pixels.abs() @ image + constant.abs()
    for matrix, block in zip(before, blocks.values(), strict=True):
        size = size + matrix.abs() @ block.upper[0]
    terms = sum(pixels.shape) + sum(it.shape[1] for it in before) + 16
    if relaxation.sound != "off":
        slack = slack + gamma(terms, pixels.dtype) * size + terms * torch.finfo(pixels.dtype).tiny
    unknown = torch.full_like(constant, torch.inf)
    tensors = (constant, slack, -unknown, unknown)
    return Block(pixels[None], tuple(it[None] for it in before), *(it[None] for it in tensors))


def _rows(block: Block, rows: Tensor) -> Block:
    tensors = {k: v[:, rows] for k, v in vars(block).items() if isinstance(v, Tensor)}
    return replace(block, **tensors, before=tuple(it[:, rows] for it in block.before))


def _join(blocks: list[Block]) -> Block:
    tensors = {
        k: torch.cat([getattr(b, k) for b in blocks]) for k, v in vars(blocks[0]).items() if isinstance(v, Tensor)
    }
    before = tuple(torch.cat(parts) for parts in zip(*(b.before for b in blocks), strict=True))
    return replace(blocks[0], **tensors, before=before)


def stack(problems: list[Reduced]) -> Reduced:
    """Problems of several images as one, filled up with functions that are 0 and bounds that are closed.

    Blocks are matched from the last, which all have in common.
    """
    if len(problems) == 1:
        return problems[0]
    depth = max(len(it.blocks) for it in problems)
    sizes = [0] * depth
    for it in problems:
        for k, block in enumerate(it.blocks, depth - len(it.blocks)):
            sizes[k] = max(sizes[k], block.lower.shape[1])
    return Reduced(
        torch.cat([it.lower for it in problems]),
        torch.cat([it.upper for it in problems]),
        tuple(_join([_filled(it, k, depth, sizes) for it in problems]) for k in range(depth)),
        _join([_filled(it, depth, depth, sizes) for it in problems]),
    )


def _filled(problem: Reduced, k: int, depth: int, sizes: list[int]) -> Block:
    """Block ``k`` of ``depth`` (the margins, where that is ``depth``) with as many functions as ``sizes`` says."""
    first = depth - len(problem.blocks)
    count, pixels = len(problem), problem.lower.shape[1]
    new = problem.lower.new_zeros
    if k < first:
        n = sizes[k]
        # Between 0 and 0: no choice, no slope, no split.
        zeros = [new(count, n) for _ in range(4)]
        return Block(new(count, n, pixels), tuple(new(count, n, sizes[j]) for j in range(k)), *zeros)
    block = problem.margins if k == depth else problem.blocks[k - first]
    n = block.constant.shape[1] if k == depth else sizes[k]

    def fill(x: Tensor, *shape: int) -> Tensor:
        out = new(count, *shape)
        out[tuple(slice(size) for size in x.shape)] = x
        return out

    before = [new(count, n, sizes[j]) for j in range(first)]
    before += [fill(it, n, sizes[first + j]) for j, it in enumerate(block.before)]
    tensors = [fill(it, n) for it in (block.constant, block.slack, block.lower, block.upper)]
    return Block(fill(block.pixels, n, pixels), tuple(before), *tensors)
