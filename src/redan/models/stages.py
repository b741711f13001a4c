"""What all residual networks share: stages of blocks, which halve the image between them, and projection shortcuts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Projection(nn.Conv2d):
    """The 1x1 convolution of a shortcut, without bias.

    On a CPU without AVX-512, oneDNN writes beyond its memory for the gradient by such weights if they have a stride and
    fewer than 8 channels (oneDNN's issue 6035). There the stride is taken first, which comes to the same.

    Args:
        channels_in: of the input.
        channels_out: of the output.
        stride: in both directions.

    Shape: ``(n, channels_in, h, w)`` to ``(n, channels_out, ceil(h / stride), ceil(w / stride))``.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        # What is exported has no gradient by its weights, and the certifier knows convolutions.
        if self.in_channels < 8 and self.weight.requires_grad and not torch.compiler.is_exporting():
            return F.conv2d(input[:, :, :: self.stride[0], :: self.stride[0]], self.weight)
        return super().forward(input)


def stages(
    block: Callable[[int, int, int], nn.Module],
    channels_in: int,
    widths: Sequence[int],
    depths: Sequence[int],
    second_stride: int = 2,
) -> list[nn.Sequential]:
    """One ``nn.Sequential`` a stage.

    Args:
        block: ``block(channels_in, channels_out, stride)``.
        channels_in: that come into the first stage.
        widths: channels of each stage.
        depths: blocks of each stage.
        second_stride: of the second stage; the first has 1, all further ones 2.
    """
    strides = [1, second_stride, *(2 for _ in widths[2:])]
    built = []
    for width, depth, stride in zip(widths, depths, strides, strict=True):
        blocks = [block(channels_in, width, stride), *(block(width, width, 1) for _ in range(depth - 1))]
        built.append(nn.Sequential(*blocks))
        channels_in = width
    return built
