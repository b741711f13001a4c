"""Image files, decoded once: their pixels are kept in a file of the user's cache and memory-mapped from there."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from redan.data.progress import progress_bar
from redan.data.sources import user_cache
from redan.errors import DataError, UserError


def decode_images(files: Sequence[Path], size: int) -> Tensor:
    """Image files as uint8 ``(n, 3, size, size)``, RGB.

    The shortest side is resized (bilinear, antialiased) to ``size`` pixels, and the centre is cut out. The
    tensor is a private view of a memory-mapped file, named after the files' paths, lengths and times of change (and
    the size and the version of Pillow): files that changed are decoded anew.

    Raises:
        DataError: where a file is no readable image.
        UserError: where the cache cannot be written.
    """
    facts = json.dumps([PIL.__version__, size, [_fact(file) for file in files]])
    key = hashlib.sha256(facts.encode()).hexdigest()
    target = user_cache() / "decoded" / f"{key[:32]}.npy"
    if not target.exists():
        try:
            _decode_into(target, files, size)
        except OSError as error:
            raise UserError(f"cannot keep decoded images in {target.parent}: {error.strerror}") from error
    try:
        return torch.from_numpy(np.load(target, mmap_mode="c"))
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{target} is corrupt: remove it, and the images are decoded anew") from error


def square_side(files: Sequence[Path]) -> int | None:
    """The side that all images share, in pixels, if all are square and as large as the first; else ``None``.

    Raises:
        DataError: where a file is no readable image.
    """
    side: int | None = None
    for file in files:
        try:
            with Image.open(file) as image:
                width, height = image.size
        except Exception as error:
            raise _unreadable(file, error) from error
        if width != height or side not in (None, width):
            return None
        side = width
    return side


def _fact(file: Path) -> tuple[str, int, int]:
    try:
        stat = file.stat()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    return str(file.absolute()), stat.st_size, stat.st_mtime_ns


def _decode_into(target: Path, files: Sequence[Path], size: int) -> None:
    """Write to a temporary file and rename it: the cache holds all of the images or none.

    Written as a stream and not through a memory map, where a full disk would kill the process.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as output, progress_bar() as progress:
            shape = (len(files), 3, size, size)
            npy.write_array_header_1_0(output, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for file in progress.track(files, description="decoding images"):
                output.write(_decode(file, size).transpose(2, 0, 1).tobytes())
            output.flush()
            os.fsync(output.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _decode(file: Path, size: int) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as image:
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR))
    except Exception as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> DataError:
    """Pillow raises almost anything at a damaged file."""
    return DataError(f"{file} is not a readable image ({type(error).__name__})")
