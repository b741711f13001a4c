"""Digits: 1,797 grey 8 x 8 images of handwritten digits, which scikit-learn brings along (Alpaydin and Kaynak, the
UCI "Optical Recognition of Handwritten Digits" data set, 1998).
"""

from pathlib import Path

import numpy as np

from redan.data.arrays import image_set
from redan.data.types import Dataset


def digits_folder() -> Path:
    """The folder of scikit-learn's data."""
    import sklearn  # here, as it takes half a second

    return Path(sklearn.__file__).parent / "datasets" / "data"


def load_digits() -> Dataset:
    """The digits: 1,437 images for training, 360 for testing.

    Their values 0 .. 16 are scaled to 0 .. 255 and rounded. The split is fixed: the images are shuffled (NumPy's
    RandomState of seed 0, whose stream never changes), stably sorted by label, and every fifth is for testing, so that
    each class has its share; both parts are in scikit-learn's order.
    """
    from sklearn import datasets

    found = datasets.load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = found.target
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    test = np.zeros(len(labels), dtype=bool)
    test[by_label[::5]] = True
    folder = digits_folder()
    return Dataset(
        "digits",
        image_set(images[~test], labels[~test], 10, folder),
        image_set(images[test], labels[test], 10, folder),
        class_names=tuple("0123456789"),
        mean=(0.3054,),
        std=(0.3758,),
    )
