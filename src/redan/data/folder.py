"""Any folder of images: one sub-folder a class."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from redan.data.arrays import image_set
from redan.data.decoded import decode_images, square_side
from redan.data.types import Dataset, ImageSet
from redan.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def load_folder(folder: Path, size: int | None, name: str) -> Dataset:
    """The images in ``folder``; classes are its sub-folders in alphabetical order, images likewise in each.

    ``folder`` has the sub-folders ``train`` and ``test`` (or else ``val``) with one sub-folder a class; or it has the
    sub-folders of the classes itself, and then a fixed 20 % of each class (at least one image, chosen by a hash of its
    name, so that new images move no old ones of other classes) are for testing. Hidden files and those without an
    image's suffix are passed over.

    Args:
        size: the side of the images in pixels; ``None`` where all images are squares of one size.
        name: the name of the data set.

    Raises:
        DataError: without class folders, where a class has no images for training or testing, where an image cannot
            be read, or where the size must be told.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    train, test = _splits(folder)
    if size is None:
        size = square_side(train.files + test.files)
        if size is None:
            raise DataError(f"the images in {folder} are not squares of one size: add the side wanted, such as @64")
    return Dataset(
        name,
        _images(train, size, folder),
        _images(test, size, folder),
        class_names=train.classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def class_folders(folder: Path) -> list[Path]:
    """The sub-folders of ``folder`` in alphabetical order, hidden ones left out."""
    return [entry for entry in _visible(folder) if entry.is_dir()]


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error


@dataclass(frozen=True)
class _Split:
    """The files of one split, class after class, and the labels ``(n,)`` of the files."""

    classes: tuple[str, ...]
    files: list[Path]
    labels: list[int]

    @classmethod
    def of(cls, by_class: dict[str, list[Path]]) -> "_Split":
        files = [file for files in by_class.values() for file in files]
        labels = [label for label, files in enumerate(by_class.values()) for _ in files]
        return cls(tuple(by_class), files, labels)


def _splits(folder: Path) -> tuple[_Split, _Split]:
    if not (folder / "train").is_dir():
        return _held_out(_list(folder))
    held = next((folder / split for split in ("test", "val") if (folder / split).is_dir()), None)
    if held is None:
        raise DataError(f"{folder} has a folder train but neither test nor val")
    train, test = _list(folder / "train"), _list(held)
    odd = sorted(train.keys() ^ test.keys())
    if odd:
        raise DataError(f"class {odd[0]!r} is missing from {held if odd[0] in train else folder / 'train'}")
    return _Split.of(train), _Split.of(test)


def _list(folder: Path) -> dict[str, list[Path]]:
    found = {
        entry.name: [file for file in _visible(entry) if file.suffix.lower() in _SUFFIXES]
        for entry in class_folders(folder)
    }
    if len(found) < 2:
        raise DataError(f"{folder} needs a sub-folder of images for each class, at least two; it has {len(found)}")
    for name, files in found.items():
        if not files:
            raise DataError(f"{folder / name} holds no images")
    return found


def _held_out(by_class: dict[str, list[Path]]) -> tuple[_Split, _Split]:
    train, test = {}, {}
    for name, files in by_class.items():
        if len(files) < 2:
            raise DataError(f"{files[0].parent} holds one image; it needs two, one to train with and one to test")
        shuffled = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
        held = max(1, round(len(files) / 5))
        test[name], train[name] = sorted(shuffled[:held]), sorted(shuffled[held:])
    return _Split.of(train), _Split.of(test)


def _images(split: _Split, size: int, folder: Path) -> ImageSet:
    images = decode_images(split.files, size)
    return image_set(images.numpy(), np.array(split.labels), len(split.classes), folder)
