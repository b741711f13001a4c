"""Adam (Kingma & Ba, ICLR 2015), for the multipliers and slopes of bounds: upwards, one tensor at a time."""

import torch
from torch import Tensor


class Moments:
    """The running mean and the running mean square of one tensor's gradients.

    Args:
        like: the tensor.
    """

    def __init__(self, like: Tensor) -> None:
        self._first, self._second = torch.zeros_like(like), torch.zeros_like(like)

    def direction(self, gradient: Tensor, i: int) -> Tensor:
        """Take the gradient of step ``i``, counted from 0, and give where to go, shaped alike; about 1 in size."""
        self._first.lerp_(gradient, 0.1)
        self._second.lerp_(gradient.square(), 0.001)
        mean, square = self._first / (1 - 0.9 ** (i + 1)), self._second / (1 - 0.999 ** (i + 1))
        return mean / (square.sqrt() + 1e-30)
