"""The random transforms of AToP (Lin et al., ICLR 2024): noise and missing pixels, which take perturbations with them.

RT1 hides a quarter of the image, RT2 adds noise before it does; RT3 adds noise and hides one quarter after the other,
so that every pixel of what is put together was hidden once. All is differentiable but the draw.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor, nn

from redan.errors import UserError, unknown
from redan.models.options import check_options, defaults, settable
from redan.seeds import generator as seeded
from redan.threats import standard_normal, uniform

GREY = 0.5  # of a missing pixel

Masks = Literal["image", "batch", "fixed"]


class Draw(NamedTuple):
    """What a transform draws for a batch; with ``n`` = 1, the same for all images of any batch.

    Attributes:
        noise: ``(n, c, h, w)``, to be added.
        holes: ``(views, n, 1, h, w)``, 1 where a pixel is missing and 0 elsewhere.
    """

    noise: Tensor
    holes: Tensor


class RandomTransform(nn.Module):
    """Gaussian noise, then missing cells on a square grid.

    Args:
        size: side of the images, in pixels; a multiple of ``cells``.
        sigma: standard deviation of the noise, at least 0; noisy images are cut to [0, 1].
        missing: share of the cells that each view hides, in [0, 1): exactly ``int(missing * cells ** 2)`` of them.
        cells: of the grid, along each side; its pixels are missing together.
        masks: which images share a mask: none (``image``), those of a batch, as the public code has it (``batch``), or
            all, always the same one (``fixed``). Noise is each image's own.
        cover: RT3: ``1 / missing`` views whose holes are disjoint and cover the image.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(
        self,
        *,
        size: int,
        sigma: float = 0.25,
        missing: float = 0.25,
        cells: int = 8,
        masks: Masks = "image",
        cover: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= sigma < float("inf"):
            raise ValueError(f"sigma is at least 0, got {sigma}")
        if not 0 <= missing < 1:
            raise ValueError(f"missing is a share of at least 0 and below 1, got {missing}")
        if cells < 1 or size % cells:
            raise ValueError(f"cells must divide the {size} pixels of an image's side, got {cells}")
        if masks not in get_args(Masks):
            raise ValueError(f"masks are one of {', '.join(get_args(Masks))}, got {masks}")
        self.size, self.sigma, self.cells, self.masks, self.cover = size, sigma, cells, masks, cover
        self.hidden = int(missing * cells**2)
        self.views = 1
        if cover:
            if not self.hidden or cells**2 % self.hidden:
                raise ValueError(f"missing must cut the {cells**2} cells into equal parts, got {missing}")
            self.views = cells**2 // self.hidden

    def sample(self, images: Tensor, generator: Generator | None = None) -> Draw:
        """A draw for images ``(n, c, h, w)``.

        Args:
            images: whose shape and device count.
            generator: source of randomness; torch's default one if None.
        """
        noise = torch.zeros_like(images)
        if self.sigma:
            noise = self.sigma * standard_normal(images, generator)
        if self.masks == "fixed":
            generator = seeded("fixed mask")
        rows = len(images) if self.masks == "image" else 1
        order = uniform(torch.Size((rows, self.cells**2)), images, generator).argsort(1).argsort(1)
        first = self.hidden * torch.arange(self.views, device=images.device)[:, None, None]
        holes = ((order >= first) & (order < first + self.hidden)).to(images.dtype)
        holes = holes.view(self.views, rows, 1, self.cells, self.cells)
        pixels = self.size // self.cells
        return Draw(noise, holes.repeat_interleave(pixels, 3).repeat_interleave(pixels, 4))

    def forward(self, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """What a draw leaves to be seen of images.

        Args:
            images: ``(n, c, h, w)`` in [0, 1].
            draw: for as many images, or for one.

        Returns:
            One view after the other: noisy images with grey holes, ``(views * n, c, h, w)`` in [0, 1], and their holes,
            ``(views * n, 1, h, w)``.
        """
        noisy = (images + draw.noise).clamp(0, 1) if self.sigma else images
        seen = noisy * (1 - draw.holes) + GREY * draw.holes
        holes = draw.holes.expand(self.views, images.shape[0], 1, self.size, self.size)
        return seen.flatten(0, 1), holes.flatten(0, 1)

    def join(self, completed: Tensor, holes: Tensor) -> Tensor:
        """One image of its completed views: the only one, or, with ``cover``, of each what was missing there.

        Args:
            completed: ``(views * n, c, h, w)``.
            holes: ``(views * n, 1, h, w)``, as ``forward`` gave them.

        Returns:
            ``(n, c, h, w)``: sum over i of m_i * g((1 - m_i) * (x + noise), m_i) for RT3.
        """
        if not self.cover:
            return completed
        return (completed * holes).unflatten(0, (self.views, -1)).sum(0)


TRANSFORMS: dict[str, Callable[..., RandomTransform]] = {
    "rt1": partial(RandomTransform, sigma=0.0),
    "rt2": RandomTransform,
    "rt3": partial(RandomTransform, cover=True),
}


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    if name not in TRANSFORMS:
        raise unknown("transform", name, TRANSFORMS)
    return settable(TRANSFORMS[name], {"size", "cover"})


def transform_options(name: str) -> dict[str, Any]:
    """The options of a transform with their defaults. Raises: UserError for an unknown name."""
    return defaults(_parameters(name))


def build_transform(name: str, *, size: int, **options: Any) -> RandomTransform:
    """A transform by name: rt1, rt2 or rt3.

    Args:
        name: a key of ``TRANSFORMS``.
        size: side of the images, in pixels.
        options: see ``RandomTransform``.

    Raises:
        UserError: for an unknown name or option, or an option out of range.
    """
    check_options(f"transform {name}", _parameters(name), options)
    try:
        return TRANSFORMS[name](size=size, **options)
    except ValueError as error:
        raise UserError(f"transform {name}: {error}") from error
