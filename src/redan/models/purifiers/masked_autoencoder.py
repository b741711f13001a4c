"""DMAE: a masked autoencoder that also denoises (Wu et al., ICLR 2023), after MAE (He et al., CVPR 2022)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redan.models.purifiers.base import Purifier


class Block(nn.Module):
    """A transformer's block, normalised before each half (Dosovitskiy et al., ICLR 2021).

    Shape: tokens ``(n, t, width)`` and bool ``(n, 1, 1, t)``, which of them are attended to, to ``(n, t, width)``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class MaskedAutoencoder(Purifier):
    """A vision transformer encodes the patches that are seen; a smaller one decodes all of them to pixels.

    The decoder gets one learnt token for every missing patch, and both get fixed positions. A patch is missing where
    any of its pixels is. Nobody attends to missing patches in the encoder, which is as if they were not there; images
    of a batch may miss different numbers of them.

    Published as Base are ``patch=16, width=768, depth=12, heads=12, decoder_width=512, decoder_depth=8,
    decoder_heads=16`` for images of 224x224; the defaults are for 32x32, and 8x8 takes ``patch=1`` or ``2``.

    Args:
        channels: of the images.
        size: side of the images, in pixels.
        patch: side of a patch, in pixels.
        width: of the encoder's tokens.
        depth: blocks of the encoder.
        heads: of its attention.
        decoder_width: of the decoder's tokens.
        decoder_depth: blocks of the decoder.
        decoder_heads: of its attention.

    Shape: as a ``Purifier``; one attempt.

    Raises:
        ValueError: for a patch that does not divide the size, or a width that is no multiple of 4 and of its heads.
    """

    criterion = "mse"
    positions: Tensor
    decoder_positions: Tensor

    def __init__(
        self,
        *,
        channels: int,
        size: int,
        patch: int = 4,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        decoder_width: int = 128,
        decoder_depth: int = 2,
        decoder_heads: int = 4,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"patch divides the images' side, {size}, got {patch}")
        for prefix, wide, split in (("", width, heads), ("decoder_", decoder_width, decoder_heads)):
            if wide % 4 or wide % split:
                raise ValueError(f"{prefix}width is a multiple of 4 and of {prefix}heads, {split}, got {wide}")
        self.patch, self.side = patch, size // patch
        # Constants of the architecture, not of the training: they stay out of the weights file.
        self.register_buffer("positions", _positions(self.side, width), persistent=False)
        self.register_buffer("decoder_positions", _positions(self.side, decoder_width), persistent=False)
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.summary = nn.Parameter(torch.empty(1, 1, width))  # the class token of a ViT: always there to attend to
        self.encoder = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.narrow = nn.Linear(width, decoder_width)
        self.unknown = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder = nn.Sequential(
            *(Block(decoder_width, decoder_heads) for _ in range(decoder_depth)),
            nn.LayerNorm(decoder_width, eps=1e-6),
            nn.Linear(decoder_width, channels * patch**2),
        )
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: the patches' convolution is a linear layer
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.summary, std=0.02)
        nn.init.normal_(self.unknown, std=0.02)

    def attempts(self, images: Tensor, holes: Tensor) -> tuple[Tensor, ...]:
        # (n, 1 + patches): which tokens are of patches that are seen; the summary, in front, always is.
        seen = F.pad(F.max_pool2d(holes, self.patch).flatten(1), (1, 0)) == 0
        x = self.embed(2 * images - 1).flatten(2).transpose(1, 2)
        x = torch.cat([self.summary.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.encoder:
            x = block(x, seen[:, None, None])
        x = torch.where(seen[:, :, None], self.narrow(self.norm(x)), self.unknown) + self.decoder_positions
        patches = self.decoder(x)[:, 1:].transpose(1, 2).unflatten(2, (self.side, self.side))
        return ((F.pixel_shuffle(patches, self.patch) + 1) / 2,)


def _positions(side: int, width: int) -> Tensor:
    """Sines and cosines of a patch's row and column, ``(1, 1 + side**2, width)``; zeros for the summary in front."""
    frequencies = 10_000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies  # (side, width / 4)
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return F.pad(torch.cat([rows, columns], 2).flatten(0, 1), (0, 0, 1, 0))[None]
