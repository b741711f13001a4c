"""Pickles of arrays, read without the power that pickles have.

The CIFAR batches are Python 2 pickles of a dictionary of arrays and lists. A pickle may name any function of any
module and have it called, so this reader maps the few names that a pickled array needs to stand-ins, which only
remember their arguments, and refuses every other name. No function of numpy is ever called by the pickle.
"""

import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redan.errors import DataError


def read_pickled_dict(content: bytes, path: Path) -> dict[str, object]:
    """The dictionary that ``content`` pickles: its keys as text, arrays of whole numbers as (read-only) numpy arrays.

    Text of Python 2 comes as bytes. Entries whose keys are no text are left out.

    Args:
        path: the file to name in errors.

    Raises:
        DataError: where the pickle is truncated or corrupt, is no dictionary, or names anything but arrays.
    """
    try:
        value = _Unpickler(content, path).load()
    except DataError:
        raise
    except Exception as error:  # a corrupt pickle raises almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} is truncated or corrupt: {reason}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a CIFAR batch: it holds no dictionary")
    entries = {}
    for key, entry in value.items():
        if isinstance(key, bytes | str):
            text = key.decode("latin1") if isinstance(key, bytes) else key
            entries[text] = entry.array if isinstance(entry, _Array) else entry
    return entries


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str) -> object:
        try:
            return _ALLOWED[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise DataError(
                f"{self._path} is refused: it asks for {module}.{name}, which an array does not need (nothing was run)"
            ) from None


class _Function:
    """A function that a pickle may call but, unlike a plain one, not alter: BUILD on it fails."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("state for a function")


class _Type:
    """The stand-in of ``numpy.dtype``: whole numbers of 1 to 8 bytes."""

    def __init__(self, code: object, *_: object) -> None:
        text = code.decode("latin1") if isinstance(code, bytes) else str(code)
        if not re.fullmatch("[iu][1248]", text):
            raise pickle.UnpicklingError(f"an array of type {text[:20]!r}, not of whole numbers")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        if state[1] in (b">", ">"):
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """The stand-in of ``numpy.ndarray``; ``array`` is filled by ``__setstate__``, as a pickle does it."""

    array: NDArray[Any] | None = None

    def __init__(self, *_: object) -> None:
        """The arguments of ``_reconstruct`` describe an empty array: nothing to remember."""

    def __setstate__(self, state: tuple[object, ...]) -> None:
        _, shape, kind, fortran, content = state
        self._fill(content, kind, shape, "F" if fortran else "C")

    @classmethod
    def from_buffer(cls, content: object, kind: object, shape: object, order: object, *_: object) -> "_Array":
        """As ``numpy.core.numeric._frombuffer``, which pickles of protocol 5 name."""
        made = cls()
        made._fill(content, kind, shape, order)
        return made

    def _fill(self, content: object, kind: object, shape: object, order: object) -> None:
        if not (isinstance(content, bytes | bytearray) and isinstance(kind, _Type) and isinstance(shape, tuple)):
            raise pickle.UnpicklingError("an array of another kind than whole numbers")
        if order not in ("C", "F") or not all(type(side) is int and side >= 0 for side in shape):
            raise pickle.UnpicklingError("an array of no possible shape")
        if math.prod(shape) * kind.dtype.itemsize != len(content):
            raise pickle.UnpicklingError(f"an array of shape {shape} in {len(content)} bytes")
        self.array = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: object) -> bytes:
    """As ``_codecs.encode`` of Latin-1, by which Python 3 writes bytes in old protocols."""
    if encoding not in (b"latin1", "latin1"):
        raise pickle.UnpicklingError("text in another encoding than Latin-1")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): _Function(_Array),
    ("numpy.core.numeric", "_frombuffer"): _Function(_Array.from_buffer),
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument of _reconstruct, so a mere word will do
    ("numpy", "dtype"): _Function(_Type),
    ("_codecs", "encode"): _Function(_encode),
}
