"""From arrays that a file gave to checked tensors."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from redan.data.types import ImageSet
from redan.errors import DataError


def read_bytes(path: Path) -> bytes:
    """The content of ``path``.

    Raises:
        DataError: where it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def image_set(images: NDArray[np.uint8], labels: NDArray[Any], classes: int, source: Path) -> ImageSet:
    """The images and labels of one split, checked.

    Args:
        images: uint8 ``(n, c, h, w)``, writable (the tensor shares their memory where they are contiguous).
        labels: whole numbers ``(n,)`` in ``0 .. classes - 1``.
        source: the file or folder to name in errors.

    Raises:
        DataError: without images, where the counts differ, or a label is out of range.
    """
    if len(images) != len(labels):
        raise DataError(f"{source}: {len(images)} images but {len(labels)} labels")
    if not len(labels):
        raise DataError(f"{source} holds no images")
    for extreme in (int(labels.min()), int(labels.max())):
        if not 0 <= extreme < classes:
            raise DataError(f"{source}: label {extreme} is out of range, the labels are 0 to {classes - 1}")
    return ImageSet(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))
