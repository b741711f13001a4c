"""Interval bounds (IBP; Gowal et al. 2018, arXiv:1810.12715): each layer's box from the box before it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redan.certification import sigmoid
from redan.certification.network import Affine, Layer, Linear, Network, Relu, Reshape, Sigmoid
from redan.certification.regions import Bounds, Region, Specification, parts
from redan.certification.rounding import SoundFloat, full_products, known, pulled_error, relative_error, smallest
from redan.certification.rows import Rows

Box = tuple[Tensor, Tensor]

# Numbers of a layer that a processor's cache holds some copies of: so many are worked on at once.
CACHED = 2**20


def magnitude(layer: Affine, boxes: Sequence[Box]) -> Tensor:
    """``|W| |x| + |b|``, the size that rounding errors are relative to: ``(n, *shape)``."""
    size = layer.absolute(*(torch.maximum(lower.abs(), upper.abs()) for lower, upper in boxes))
    return size if layer.bias_size is None else size + layer.bias_size


def step(layer: Layer, boxes: Sequence[Box], sound: SoundFloat) -> Box:
    """The box of a layer's output from the boxes of its inputs."""
    if isinstance(layer, Sigmoid):
        return sigmoid.box(*boxes[0], sound)
    if isinstance(layer, Relu) or not isinstance(layer, Affine) or not layer.roundings:
        lower, upper = (layer(*ends) for ends in zip(*boxes, strict=True))
        return lower, upper
    error = relative_error(layer, boxes[0][0].dtype, sound)
    centres = [(lower + upper) * 0.5 for lower, upper in boxes]
    radii = [(upper - lower) * 0.5 + error * torch.maximum(lower.abs(), upper.abs()) for lower, upper in boxes]
    centre, radius = layer(*centres), layer.absolute(*radii) + smallest(layer, boxes[0][0].dtype, sound)
    if layer.bias_size is not None:
        radius = radius + error * layer.bias_size
    return known(centre - radius, centre + radius)


def propagate(network: Network, region: Region, sound: SoundFloat) -> list[Box]:
    """The box of every layer, in the network's type."""
    region = region.to(network.dtype, network.device)
    boxes: list[Box] = []
    for layer in network.layers:
        boxes.append(
            step(layer, [boxes[i] for i in layer.inputs], sound) if layer.inputs else (region.lower, region.upper)
        )
    return boxes


@dataclass(frozen=True)
class Interval:
    """The cheapest bounds: two passes of the network a batch.

    The functions of the specification are joined with the linear layer that gives the logits.

    Args:
        sound: which rounding errors the bounds cover.
    """

    sound: SoundFloat = "exact"

    def __call__(self, network: Network, region: Region, specification: Specification) -> Bounds:
        some = parts(region, specification, CACHED // network.widest)
        return Bounds.join([self._bound(network, *it) for it in some])

    @full_products()
    def _bound(self, network: Network, region: Region, specification: Specification) -> Bounds:
        boxes = propagate(network, region, self.sound)
        layers = {i: boxes[i] for i in network.bent}
        n, m = specification.offsets.shape
        image = torch.arange(n, device=network.device).repeat_interleave(m)
        rows = Rows(specification.weights.flatten(0, 1).to(network.dtype), image)
        margins = specification.offsets.flatten().clone()
        position = len(network.layers) - 1
        while isinstance(layer := network.layers[position], Linear | Reshape):
            (before,) = layer.inputs
            if isinstance(layer, Linear):
                error = pulled_error(layer, network.dtype, self.sound) * magnitude(layer, [boxes[before]])
                noise = error + smallest(layer, network.dtype, self.sound)
                margins += (rows.values * layer.bias - rows.values.abs() * noise[image]).double().sum(1)
            (rows,) = layer.pull(rows)
            position = before
        lower, upper = boxes[position]
        margins += Region(lower, upper).least(rows)
        return Bounds(layers, margins.view(n, m).nan_to_num(-torch.inf, torch.inf, -torch.inf))
