"""Input normalisation as a network's first layer, so that every threat is measured in pixels of [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """``(images - mean) / std`` per channel.

    Args:
        mean: one value a channel, or a single one for all.
        std: likewise, each above 0.

    Shape: images ``(n, c, h, w)`` in [0, 1] to the same shape.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if any(s <= 0 for s in std):
            raise ValueError(f"std must be above 0, got {tuple(std)}")
        # Constants of the architecture, not of the training: they stay out of the weights file.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std
