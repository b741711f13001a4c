"""Threats that move pixels instead of changing them: a smooth flow, or a rotation with a translation.

No look at two images tells cheaply whether one is a warp of the other. An attack on these threats makes its images by
warping the clean one with what the threat allows and in no other way, so they are members by construction, and
``contains`` checks only what the images themselves show.

All sampling is bilinear with ``align_corners=False``: the corners of the coordinates [-1, 1] are those of the image
and not the centres of its corner pixels, so that a coordinate has the same meaning at every size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from redan.errors import UserError
from redan.threats import Threat, check_size, number_text, parse_number, uniform, valid


@dataclass(frozen=True)
class Spatial(Threat):
    """What the threats of this module share."""

    def contains(self, images: Tensor, center: Tensor) -> Tensor:
        """Which images lie in [0, 1]: bool ``(n,)``. That they are warped images of ``center`` is not checked."""
        return valid(images)


@dataclass(frozen=True)
class Flow(Spatial):
    """Each pixel takes its value from a place nearby, at most ``radius`` off in x and in y (Xiao et al., ICLR 2018).

    Args:
        radius: in the coordinates [-1, 1] of ``grid_sample``, in which a side is 2 long: ``radius * side / 2`` pixels.
            These are the units of mister_ed's implementation and of the scripts that built on it (Laidlaw et al., ICLR
            2021; DiffPure: Nie et al., ICML 2022), where the usual bound is 0.05: 0.8 pixels of CIFAR.
    """

    radius: float
    kind: ClassVar[str] = "a flow threat such as stadv:0.05"

    def __post_init__(self) -> None:
        check_size("radius", self.radius)

    def __str__(self) -> str:
        return f"stadv:{number_text(self.radius)}"

    def project(self, flow: Tensor) -> Tensor:
        """The nearest flow that the threat allows; ``(n, h, w, 2)`` to the same."""
        return flow.clamp(-self.radius, self.radius)

    def warp(self, images: Tensor, flow: Tensor) -> Tensor:
        """The images sampled where the flow points to, in [0, 1]; beyond an edge lies more of the edge pixel.

        Args:
            images: ``(n, c, h, w)``.
            flow: ``(n, h, w, 2)``, rightwards and downwards; the result is differentiable with respect to it.
        """
        identity = torch.eye(2, 3, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
        places = F.affine_grid(identity, list(images.shape), align_corners=False) + flow
        return _sample(images, places, "border")


@dataclass(frozen=True)
class RotationTranslation(Spatial):
    """A rotation about the image's centre, then a translation (Engstrom et al., ICML 2019).

    Args:
        degrees: the largest rotation to either side, at most 180; 30 in the paper.
        shift: the largest translation in pixels, in each of the four directions; 3 in the paper for CIFAR.
    """

    degrees: float
    shift: float
    kind: ClassVar[str] = "a rotation threat such as rotation:30+3"

    def __post_init__(self) -> None:
        check_size("rotation", self.degrees)
        check_size("translation", self.shift)
        if self.degrees > 180:
            raise UserError(f"a rotation is at most 180 degrees to either side, got {self.degrees}")

    def __str__(self) -> str:
        return f"rotation:{number_text(self.degrees)}+{number_text(self.shift)}"

    def draw(self, center: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """A rotation ``(n,)`` and a translation ``(n, 2)`` for each image, uniform in what is allowed."""
        draws = 2 * uniform(torch.Size((len(center), 3)), center, generator) - 1
        return self.degrees * draws[:, 0], self.shift * draws[:, 1:]

    def warp(self, images: Tensor, degrees: Tensor, shift: Tensor) -> Tensor:
        """The images rotated, then moved, in [0, 1]; what comes in from outside is black, as in the paper.

        Args:
            images: ``(n, c, h, w)``.
            degrees: ``(n,)``, counter-clockwise.
            shift: ``(n, 2)``, pixels rightwards and downwards.
        """
        h, w = images.shape[2:]
        angle = degrees.to(images) * (math.pi / 180)
        cos, sin = angle.cos(), angle.sin()
        right, down = shift.to(images).unbind(1)
        # Where an output pixel takes its value from, in pixels from the centre: the inverse map.
        from_x = torch.stack([cos, -sin, sin * down - cos * right], 1)
        from_y = torch.stack([sin, cos, -sin * right - cos * down], 1)
        pixels = torch.stack([from_x, from_y], 1)
        # In coordinates a side is 2 whatever its pixels.
        to_pixels = torch.tensor([w / 2, h / 2, 1.0], dtype=images.dtype, device=images.device)
        matrix = pixels * to_pixels / to_pixels[:2, None]
        return _sample(images, F.affine_grid(matrix, list(images.shape), align_corners=False), "zeros")


def _sample(images: Tensor, places: Tensor, padding: str) -> Tensor:
    sampled = F.grid_sample(images, places, mode="bilinear", padding_mode=padding, align_corners=False)
    # The weights of four neighbours may sum to a little over 1. Clamping must not cost white pixels their gradient.
    return sampled + (sampled.clamp(0, 1) - sampled).detach()


def _parse_rotation(size: str) -> RotationTranslation:
    degrees, separator, shift = size.partition("+")
    if not separator:
        raise UserError(f"a rotation is written rotation:DEGREES+PIXELS, such as rotation:30+3, got 'rotation:{size}'")
    return RotationTranslation(parse_number(degrees), parse_number(shift))


SPATIAL: dict[str, Callable[[str], Threat]] = {
    "stadv": lambda size: Flow(parse_number(size)),
    "rotation": _parse_rotation,
}
