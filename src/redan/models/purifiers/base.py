"""What every purifier is: a network that denoises images and completes what is missing of them."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor, nn


class Purifier(nn.Module, ABC):
    """Noisy images with holes to whole images, of which every pixel is generated and none copied.

    Attributes:
        criterion: how training compares an attempt with its target: mean absolute or mean squared difference.

    Shape: images ``(n, c, h, w)`` in [0, 1], mid-grey (0.5) where pixels are missing, and holes ``(n, 1, h, w)``, 1
    where a pixel is missing and 0 where it is seen, to images ``(n, c, h, w)`` in [0, 1].
    """

    criterion: ClassVar[Literal["l1", "mse"]]

    @abstractmethod
    def attempts(self, images: Tensor, holes: Tensor) -> tuple[Tensor, ...]:
        """Every output that training compares with the target, ``(n, c, h, w)`` each, best last.

        The last one is what ``forward`` gives, before it is clamped to [0, 1].
        """

    def forward(self, images: Tensor, holes: Tensor) -> Tensor:
        return self.attempts(images, holes)[-1].clamp(0, 1)


class Plain(Purifier):
    """Any module that takes images and holes and gives images.

    Args:
        network: that module.

    Shape: as a ``Purifier``.
    """

    criterion = "l1"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def attempts(self, images: Tensor, holes: Tensor) -> tuple[Tensor, ...]:
        return (self.network(images, holes),)
