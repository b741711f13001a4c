"""CIFAR-10 and CIFAR-100: 32 x 32 colour images (Krizhevsky, "Learning Multiple Layers of Features from Tiny
Images", 2009), in the "python version" of the original distribution.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redan.data.arrays import image_set, read_bytes
from redan.data.pickles import read_pickled_dict
from redan.data.sources import Download, Layout, Origin, check_published
from redan.data.types import Dataset, ImageSet
from redan.errors import DataError

CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CIFAR100_MD5 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}

CIFAR10 = Origin(
    "cifar10",
    (Layout("cifar-10-batches-py", tuple(CIFAR10_MD5)),),
    (Download("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),),
)
CIFAR100 = Origin(
    "cifar100",
    (Layout("cifar-100-python", tuple(CIFAR100_MD5)),),
    (Download("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),),
)

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_CLASSES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
    shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()
)


def load_cifar10(folder: Path) -> Dataset:
    """CIFAR-10 from ``folder``, which holds ``data_batch_1`` to ``data_batch_5`` and ``test_batch``.

    Images that differ from the published ones are told of by a warning.

    Raises:
        DataError: where a batch is truncated, corrupt or of the wrong shape, or asks for more than arrays.
    """
    batches = _batches(folder, CIFAR10_MD5, "labels")
    training = [f"data_batch_{i}" for i in range(1, 6)]
    return Dataset(
        "cifar10",
        train=_join([batches[file] for file in training], len(CIFAR10_CLASSES)),
        test=_join([batches["test_batch"]], len(CIFAR10_CLASSES)),
        class_names=CIFAR10_CLASSES,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        exact=_exact([batches[file] for file in training]),
    )


def load_cifar100(folder: Path) -> Dataset:
    """CIFAR-100 with its 100 fine labels from ``folder``, which holds ``train`` and ``test``; as ``load_cifar10``."""
    batches = _batches(folder, CIFAR100_MD5, "fine_labels")
    return Dataset(
        "cifar100",
        train=_join([batches["train"]], len(CIFAR100_CLASSES)),
        test=_join([batches["test"]], len(CIFAR100_CLASSES)),
        class_names=CIFAR100_CLASSES,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    )


@dataclass(frozen=True)
class _Batch:
    path: Path
    images: NDArray[np.uint8]
    labels: NDArray[Any]
    md5: str


def _batches(folder: Path, published: dict[str, str], key: str) -> dict[str, _Batch]:
    batches = {file: _batch(folder / file, key) for file in published}
    check_published(folder, [file for file, batch in batches.items() if batch.md5 != published[file]])
    return batches


def _batch(path: Path, key: str) -> _Batch:
    content = read_bytes(path)
    entries = read_pickled_dict(content, path)
    for needed in ("data", key):
        if needed not in entries:
            raise DataError(f"{path} is not a CIFAR batch: it has no {needed!r}")
    data = entries["data"]
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072):
        raise DataError(f"{path} is not a CIFAR batch: 'data' is not bytes of shape (n, 3072)")
    images = data.reshape(-1, 3, 32, 32)
    labels = _whole_numbers(entries[key], key, path)
    if len(images) != len(labels):
        raise DataError(f"{path}: {len(images)} images but {len(labels)} labels")
    return _Batch(path, images, labels, hashlib.md5(content, usedforsecurity=False).hexdigest())


def _whole_numbers(value: object, key: str, path: Path) -> NDArray[Any]:
    # The type of each is looked at first: numpy would walk through lists of lists, which a pickle can make endless.
    if isinstance(value, list) and all(type(label) is int for label in value):
        value = np.array(value)
    if not (isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu"):
        raise DataError(f"{path}: {key!r} is not a list of whole numbers")
    return value


def _exact(batches: list[_Batch]) -> Tensor | None:
    """Which images are the original's bit for bit, where a folder with stand-ins says so in ``<batch>.exact.npy``."""
    flags = []
    for batch in batches:
        path = batch.path.with_name(f"{batch.path.name}.exact.npy")
        if not path.exists():
            return None
        try:
            flag = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not an array of flags: {error}") from error
        if flag.dtype != np.bool_ or flag.shape != batch.labels.shape:
            raise DataError(f"{path} does not hold one flag for each of {len(batch.labels)} images")
        flags.append(torch.from_numpy(flag))
    return torch.cat(flags)


def _join(batches: list[_Batch], classes: int) -> ImageSet:
    images = np.concatenate([batch.images for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches])
    first = batches[0].path
    return image_set(images, labels, classes, first if len(batches) == 1 else first.parent)
