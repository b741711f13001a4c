"""MNIST (LeCun, Cortes, Burges) and Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017): 28 x 28 grey images in IDX files.

An IDX file is two zero bytes, the type of its elements (8: unsigned bytes), the number of its dimensions, each
dimension as four bytes (most significant first), then the elements in row-major order.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from redan.data.arrays import image_set, read_bytes
from redan.data.sources import Download, Layout, Origin
from redan.data.types import Dataset, ImageSet
from redan.errors import DataError

_STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _origin(name: str, folder: str, host: str, sums: tuple[str, str, str, str]) -> Origin:
    zipped = tuple(f"{stem}.gz" for stem in _STEMS)
    return Origin(
        name,
        (Layout(folder, zipped), Layout(folder, _STEMS)),
        tuple(Download(f"{host}/{file}", md5, f"{folder}/{file}") for file, md5 in zip(zipped, sums, strict=True)),
    )


MNIST = _origin(
    "mnist",
    "MNIST/raw",
    "https://ossci-datasets.s3.amazonaws.com/mnist",  # the mirror of the PyTorch project: the first host gives no more
    (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
)
FASHION_MNIST = _origin(
    "fashion-mnist",
    "FashionMNIST/raw",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
)

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load_mnist(folder: Path) -> Dataset:
    """MNIST from ``folder``, which holds its four IDX files, gzipped or not.

    Raises:
        DataError: where a file is truncated, corrupt or of the wrong shape.
    """
    classes = tuple("0123456789")
    return Dataset("mnist", _split(folder, "train"), _split(folder, "t10k"), classes, mean=(0.1307,), std=(0.3081,))


def load_fashion_mnist(folder: Path) -> Dataset:
    """Fashion-MNIST from ``folder``; as ``load_mnist``."""
    return Dataset(
        "fashion-mnist",
        _split(folder, "train"),
        _split(folder, "t10k"),
        FASHION_CLASSES,
        mean=(0.2860,),
        std=(0.3530,),
    )


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The unsigned bytes of an IDX file, gzipped or not, as a writable array of ``dimensions`` dimensions.

    Raises:
        DataError: where the file is no such IDX file, is truncated or goes on after its end.
    """
    content = read_bytes(path)
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} is truncated or corrupt: {error}") from error
    head = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < head:
        raise DataError(f"{path} is not an IDX file of bytes in {dimensions} dimension{'s'[: dimensions > 1]}")
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, head, 4))
    if len(content) - head != math.prod(shape):
        raise DataError(f"{path} has {len(content) - head} bytes after its head, which promises {math.prod(shape)}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape).copy()


def _split(folder: Path, stem: str) -> ImageSet:
    images = read_idx(_file(folder, f"{stem}-images-idx3-ubyte"), 3)
    labels = read_idx(_file(folder, f"{stem}-labels-idx1-ubyte"), 1)
    if images.shape[1:] != (28, 28):
        raise DataError(f"{folder}: the images of {stem} are {images.shape[1]} x {images.shape[2]}, not 28 x 28")
    return image_set(images[:, None], labels, 10, folder)


def _file(folder: Path, stem: str) -> Path:
    zipped = folder / f"{stem}.gz"
    return zipped if zipped.exists() else folder / stem
