"""DeepFill v2's generator: free-form inpainting by gated convolutions (Yu et al., ICCV 2019).

The contextual attention is that of DeepFill v1 (Yu et al., CVPR 2018).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redan.models.purifiers.base import Purifier


class GatedConv(nn.Module):
    """``activation(feature) * sigmoid(gate)``, each by a convolution that keeps the size at stride 1."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        activation: Callable[[Tensor], Tensor] = F.elu,
    ) -> None:
        super().__init__()
        # Two convolutions and not the halves of one, which no memory layout stores densely.
        self.feature = nn.Conv2d(channels_in, channels_out, kernel, stride, dilation * (kernel // 2), dilation)
        self.gate = nn.Conv2d(channels_in, channels_out, kernel, stride, dilation * (kernel // 2), dilation)
        self.activation = activation
        # Gates begin at about a half: features twice as large make up for it, or thirty layers would leave no signal.
        for conv, gain in ((self.feature, 2.0), (self.gate, 1.0)):
            nn.init.normal_(conv.weight, std=gain * (channels_in * kernel**2) ** -0.5)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.feature(x)) * torch.sigmoid(self.gate(x))


class ContextualAttention(nn.Module):
    """Every place of a feature map, put together anew from those patches of the map that no hole touches.

    Patches of 3x3 are compared on every second row and column (rate 2): by inner products with the normalised
    patches, summed over diagonal neighbours (fuse 3), so that patches side by side are taken from side by side. A
    softmax of 10 times that weighs patches of 4x4, which are pasted overlapping. A patch with a hole in it scores 0 and
    weighs nothing; where all have one, the result is 0.

    Args:
        side: of the feature map, even.
        scale: pixels of the image to one of the map.

    Shape: features ``(n, c, side, side)`` and holes ``(n, 1, scale * side, scale * side)`` to the features' shape.
    """

    def __init__(self, side: int, scale: int) -> None:
        super().__init__()
        self.side, self.grid, self.scale = side, side // 2, scale

    def forward(self, x: Tensor, holes: Tensor) -> Tensor:
        patches = F.unfold(x[:, :, ::2, ::2], 3, padding=1)  # (n, 9 c, places)
        scores = F.normalize(patches, dim=1, eps=1e-4).transpose(1, 2) @ patches  # (n, patches, places)
        scores = self._turned(self._fused(self._turned(self._fused(scores))))
        touched = F.max_pool2d(F.max_pool2d(holes, 2 * self.scale), 3, stride=1, padding=1)
        whole = 1 - touched.flatten(2).transpose(1, 2)  # (n, patches, 1)
        weights = torch.softmax(10 * scores * whole, 1) * whole
        pasted = F.unfold(x, 4, padding=1, stride=2) @ weights
        return F.fold(pasted, (self.side, self.side), 4, padding=1, stride=2) / 4  # as many patches meet in a pixel

    def _fused(self, scores: Tensor) -> Tensor:
        """The score of a patch at a place, with those of the next patches at the next places before and after."""
        padded = F.pad(scores, (1, 1, 1, 1))
        return padded[:, :-2, :-2] + scores + padded[:, 2:, 2:]

    def _turned(self, scores: Tensor) -> Tensor:
        """Patches and places counted down the columns in place of along the rows, or back."""
        grid = self.grid
        return scores.reshape(-1, grid, grid, grid, grid).permute(0, 2, 1, 4, 3).reshape(-1, grid**2, grid**2)


class AttentionBranch(nn.Module):
    """The half of the second stage that looks for what it misses elsewhere in the image.

    Shape: images ``(n, channels, size, size)`` in [-1, 1] and holes to ``(n, c, size / 2**halvings, ...)``.
    """

    def __init__(self, channels: int, size: int, width: int, halvings: int) -> None:
        super().__init__()
        scale = 2**halvings
        wide = width * scale // 2
        # ReLU, so that no two patches score below 0, which is what a patch with a hole does.
        query = GatedConv(wide, wide, activation=torch.relu)
        self.before = nn.Sequential(*_encoder(channels, width, halvings, early=1), query)
        self.attention = ContextualAttention(size // scale, scale)
        self.after = nn.Sequential(GatedConv(wide, wide), GatedConv(wide, wide))

    def forward(self, x: Tensor, holes: Tensor) -> Tensor:
        x = self.after(self.attention(self.before(x), holes))
        return x


class Inpainting(Purifier):
    """Two stages: the first fills the holes roughly, the second makes the whole image anew.

    Published are ``width=48, halvings=2, dilations=5`` with attention, at 256x256. Small images, of 8x8 to 32x32, take
    ``halvings=1, attention=False``: theirs would be a map of too few patches that no hole touches.

    Args:
        channels: of the images.
        size: side of the images, in pixels.
        width: features after the first halving; half as many before it, twice as many after each further one.
        halvings: of the resolution, by a convolution of stride 2 each.
        dilations: convolutions of dilation 1, 2, 4, ... at the lowest resolution, in each stage; those that reach
            across the whole map are left out.
        attention: whether the second stage has a branch of contextual attention beside the dilated one.

    Shape: as a ``Purifier``; two attempts, that of each stage.

    Raises:
        ValueError: for a width that is no multiple of 4, or a size that cannot be halved so often (with attention,
            once more).
    """

    criterion = "l1"

    def __init__(
        self,
        *,
        channels: int,
        size: int,
        width: int = 48,
        halvings: int = 2,
        dilations: int = 5,
        attention: bool = True,
    ) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"width is a multiple of 4, got {width}")
        if halvings < 1:
            raise ValueError(f"halvings is at least 1, got {halvings}")
        if size % (divisor := 2 ** (halvings + attention)):
            also = " and attention" if attention else ""
            raise ValueError(f"with {halvings} halvings{also} the images' side is a multiple of {divisor}, got {size}")
        wide, side = width * 2 ** (halvings - 1), size // 2**halvings
        steps = [2**k for k in range(dilations) if 2**k < side]
        self.coarse = nn.Sequential(
            *_encoder(channels + 2, width, halvings, early=halvings),
            *(GatedConv(wide, wide, dilation=step) for step in [*steps, 1, 1]),
            *_decoder(channels, width, halvings),
        )
        self.dilated = nn.Sequential(
            *_encoder(channels, width, halvings, early=0),
            *(GatedConv(wide, wide, dilation=step) for step in steps),
        )
        self.attending = AttentionBranch(channels, size, width, halvings) if attention else None
        self.joined = nn.Sequential(
            GatedConv(2 * wide if attention else wide, wide),
            GatedConv(wide, wide),
            *_decoder(channels, width, halvings),
        )

    def attempts(self, images: Tensor, holes: Tensor) -> tuple[Tensor, ...]:
        signed = 2 * images - 1
        coarse = self.coarse(torch.cat([signed, torch.ones_like(holes), holes], 1))
        filled = coarse * holes + signed * (1 - holes)
        found = self.dilated(filled)
        if self.attending is not None:
            found = torch.cat([found, self.attending(filled, holes)], 1)
        fine = self.joined(found)
        return (coarse + 1) / 2, (fine + 1) / 2


def _encoder(channels: int, width: int, halvings: int, early: int) -> list[nn.Module]:
    """From images down to ``width * 2**(halvings - 1)`` features.

    Each halving doubles the features, in its second convolution; the last ``early`` ones do so in their first.
    """
    layers: list[nn.Module] = [GatedConv(channels, width // 2, 5)]
    for i in range(halvings):
        narrow, wide = width * 2**i // 2, width * 2**i
        middle = wide if i >= halvings - early else narrow
        layers += [GatedConv(narrow, middle, stride=2), GatedConv(middle, wide)]
    return layers


def _decoder(channels: int, width: int, halvings: int) -> list[nn.Module]:
    """From ``width * 2**(halvings - 1)`` features up to images in [-1, 1]."""
    layers: list[nn.Module] = []
    for i in reversed(range(halvings)):
        narrow, wide = width * 2**i // 2, width * 2**i
        last = narrow if i else narrow // 2
        layers += [nn.Upsample(scale_factor=2), GatedConv(wide, narrow), GatedConv(narrow, last)]
    return [*layers, nn.Conv2d(width // 4, channels, 3, padding=1), nn.Tanh()]
