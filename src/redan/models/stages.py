"""What all residual networks share: stages of blocks, each stage but the first halving the image."""

from collections.abc import Callable, Sequence

from torch import nn


def stages(
    block: Callable[[int, int, int], nn.Module], channels_in: int, widths: Sequence[int], depths: Sequence[int]
) -> list[nn.Sequential]:
    """One ``nn.Sequential`` a stage.

    Args:
        block: ``block(channels_in, channels_out, stride)``.
        channels_in: that come into the first stage.
        widths: channels of each stage.
        depths: blocks of each stage.
    """
    built = []
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        blocks = [block(channels_in, width, 1 if i == 0 else 2), *(block(width, width, 1) for _ in range(depth - 1))]
        built.append(nn.Sequential(*blocks))
        channels_in = width
    return built
