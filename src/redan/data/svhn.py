"""SVHN: house numbers seen from the street, 32 x 32 colour images of one digit each (Netzer et al., "Reading Digits
in Natural Images with Unsupervised Feature Learning", 2011), in the MATLAB files of the original distribution.
"""

from pathlib import Path

import numpy as np
from scipy.io import loadmat

from redan.data.arrays import image_set
from redan.data.sources import Download, Layout, Origin
from redan.data.types import Dataset, ImageSet
from redan.errors import DataError

_FILES = ("train_32x32.mat", "test_32x32.mat")
_HOST = "http://ufldl.stanford.edu/housenumbers"

SVHN = Origin(
    "svhn",
    (Layout("svhn", _FILES), Layout(".", _FILES)),
    (
        Download(f"{_HOST}/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", "svhn/train_32x32.mat"),
        Download(f"{_HOST}/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", "svhn/test_32x32.mat"),
    ),
)


def load_svhn(folder: Path) -> Dataset:
    """SVHN (without its "extra" images) from ``folder``, which holds ``train_32x32.mat`` and ``test_32x32.mat``.

    The files call the digit 0 "10"; here its label is 0.

    Raises:
        DataError: where a file is truncated, corrupt or of the wrong shape.
    """
    return Dataset(
        "svhn",
        _read(folder / "train_32x32.mat"),
        _read(folder / "test_32x32.mat"),
        class_names=tuple("0123456789"),
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
    )


def _read(path: Path) -> ImageSet:
    try:
        entries = loadmat(path, variable_names=("X", "y"))
    except Exception as error:  # a corrupt MATLAB file raises almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} is not a readable MATLAB file: {reason}") from error
    images, labels = entries.get("X"), entries.get("y")
    if images is None or labels is None:
        raise DataError(f"{path} is not an SVHN file: it has no 'X' and 'y'")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise DataError(f"{path} is not an SVHN file: 'X' is not bytes of shape (32, 32, 3, n)")
    if labels.dtype.kind not in "iu" or labels.ndim != 2 or labels.shape[1] != 1:
        raise DataError(f"{path} is not an SVHN file: 'y' is not whole numbers of shape (n, 1)")
    if labels.size and not (labels.min() >= 1 and labels.max() <= 10):
        raise DataError(f"{path}: a label is out of range, SVHN files have labels 1 to 10")
    return image_set(images.transpose(3, 2, 0, 1), labels[:, 0] % 10, 10, path)
