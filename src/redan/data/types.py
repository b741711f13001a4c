"""The types that images travel in."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """What the data pipeline yields.

    Attributes:
        images: float32 ``(n, c, h, w)`` in [0, 1], augmented, on the device.
        labels: int64 ``(n,)``.
        indices: int64 ``(n,)``, each example's position in the training set.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class ImageSet:
    """Images as they are kept: uint8, all in one tensor.

    Attributes:
        images: uint8 ``(n, c, h, w)``; may be a view of a memory-mapped file.
        labels: int64 ``(n,)``.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "ImageSet":
        """The examples at ``indices`` (int64), in that order."""
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Facts:
    """What a network needs to know of its images.

    Attributes:
        channels: of an image.
        size: its side, in pixels.
        class_names: one a class; label ``k`` is ``class_names[k]``.
        mean: per-channel mean that networks for these images normalise with, in [0, 1].
        std: per-channel standard deviation, likewise.
    """

    channels: int
    size: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def classes(self) -> int:
        """How many."""
        return len(self.class_names)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Facts":
        """The inverse of ``dataclasses.asdict`` after a way through JSON, which knows no tuples.

        Raises: KeyError or TypeError where something is missing.
        """
        names, mean, std = (tuple(value[key]) for key in ("class_names", "mean", "std"))
        return cls(int(value["channels"]), int(value["size"]), names, mean, std)


@dataclass(frozen=True)
class Dataset:
    """A data set: training and test images with the names of their classes.

    Attributes:
        name: as it was asked for, such as ``cifar10``.
        train: the training images, in the order of the original distribution.
        test: the test images, likewise.
        class_names: one a class.
        mean: per-channel mean that networks for this set normalise with, in [0, 1].
        std: per-channel standard deviation, likewise.
        exact: bool, one a training image, False for stand-ins of images that are not the original's bit for bit;
            None where the folder does not say.
    """

    name: str
    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    exact: Tensor | None = None

    @property
    def facts(self) -> Facts:
        """What a network for these images needs to know."""
        channels, size = self.train.images.shape[1:3]
        return Facts(int(channels), int(size), self.class_names, self.mean, self.std)
