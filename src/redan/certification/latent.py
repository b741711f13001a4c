"""What a zonotope lets reach a layer, as a map from a unit cube: the regions that COLT's attack searches.

A zonotope is ``{centre + sum_i e_i generator_i : e_i in [-1, 1]}`` (Balunović & Vechev, ICLR 2020). Its coefficients
are one tensor of the image's shape and one of each passed ReLU's. No generator is ever built: affine layers and slopes
are linear, so that all error terms go through the layers as one image, each from where it enters.
"""

import torch
from torch import Generator, Tensor

from redan.certification.cauchy import lines
from redan.certification.interval import Box
from redan.certification.network import Affine, Network, Relu
from redan.certification.regions import Region
from redan.seeds import generator_on


class Latent:
    """The zonotopes of ``n`` images at the output of one layer.

    Args:
        network: its layers up to that one count.
        region: boxes around the images.
        bounds: of what each ReLU takes, by position, exact or estimated; sound ones make the regions sound.
        position: of the layer; 0 is the image itself, whose region is the box.

    Attributes:
        centre: ``(n, *shape)``.
        shapes: of the coefficients, ``(n, ...)``, by the position of the layer that they enter at: 0 or a ReLU's.
    """

    def __init__(self, network: Network, region: Region, bounds: dict[int, Box], position: int) -> None:
        region = region.to(network.dtype, network.device)
        self._layers = network.layers[: position + 1]
        self._radius = (region.upper - region.lower) / 2
        self._lines: dict[int, tuple[Tensor, Tensor]] = {}
        self.shapes = {0: self._radius.shape}
        centres = [(region.lower + region.upper) / 2]
        for i, layer in enumerate(self._layers[1:], 1):
            if isinstance(layer, Relu):
                (before,) = layer.inputs
                slope, mu = self._lines[i] = lines(*bounds[before])
                self.shapes[i] = mu.shape
                centres.append(slope * centres[before] + mu)
            else:
                centres.append(layer(*(centres[k] for k in layer.inputs)))
        self.centre = centres[-1]

    def start(self, generator: Generator | None) -> dict[int, Tensor]:
        """Coefficients drawn uniformly from the unit cube; the generator is the CPU's."""
        device, dtype = self.centre.device, self.centre.dtype
        draws = generator_on(device, generator)
        return {
            i: torch.empty(shape, device=device).uniform_(-1, 1, generator=draws).to(dtype)
            for i, shape in self.shapes.items()
        }

    def __call__(self, coefficients: dict[int, Tensor]) -> Tensor:
        """The points ``(n, *shape)`` of coefficients in [-1, 1]."""
        moved = [self._radius * coefficients[0]]
        for i, layer in enumerate(self._layers[1:], 1):
            inputs = [moved[k] for k in layer.inputs]
            if isinstance(layer, Relu):
                slope, mu = self._lines[i]
                moved.append(torch.addcmul(slope * inputs[0], mu, coefficients[i]))
            else:
                assert isinstance(layer, Affine)
                moved.append(layer.linear(*inputs))
        return self.centre + moved[-1]

    def to(self, dtype: torch.dtype) -> "Latent":
        """The same regions, computed in another type."""
        other = object.__new__(Latent)
        other._layers = tuple(layer.to(dtype, self.centre.device) for layer in self._layers)
        other._radius, other.centre = self._radius.to(dtype), self.centre.to(dtype)
        other._lines = {i: (slope.to(dtype), mu.to(dtype)) for i, (slope, mu) in self._lines.items()}
        other.shapes = self.shapes
        return other
