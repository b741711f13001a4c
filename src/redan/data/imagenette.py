"""Imagenette: ten classes of ImageNet that are easy to tell apart (fast.ai, 2019), shortest side 160 pixels."""

from dataclasses import replace
from pathlib import Path

from redan.data.folder import class_folders, load_folder
from redan.data.sources import Download, Layout, Origin
from redan.data.types import Dataset
from redan.errors import DataError

IMAGENETTE = Origin(
    "imagenette",
    (Layout("imagenette2-160", ("train", "val")),),
    (Download("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),),
)

SYNSETS = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def load_imagenette(folder: Path) -> Dataset:
    """Imagenette, 160 x 160, from ``folder``, which holds ``{train,val}/<synset>/*.JPEG``; ``val`` is for testing.

    Raises:
        DataError: where a class is missing or not one of Imagenette's, or an image cannot be read.
    """
    odd = sorted({entry.name for entry in class_folders(folder / "train")} ^ SYNSETS.keys())
    if odd:
        what = "has no" if odd[0] in SYNSETS else "is not Imagenette's: it has a"
        raise DataError(f"{folder / 'train'} {what} folder {odd[0]}")
    return replace(load_folder(folder, 160, "imagenette"), class_names=tuple(SYNSETS.values()))
