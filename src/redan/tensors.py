"""Tensors in safetensors files: written whole or not at all, read without executing anything."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from redan.errors import UserError
from redan.files import write_atomically


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write tensors and a JSON-able mapping beside them into one safetensors file, atomically."""
    # Each entry gets memory of its own: the format knows no shared tensors, and no layout but the contiguous.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, save(own, {"redan": json.dumps(metadata or {})}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save_tensors`` wrote.

    Raises:
        UserError: where the file is missing, truncated or not safetensors.
    """
    try:
        tensors = load_file(path)
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return tensors, json.loads(header.get("__metadata__", {}).get("redan", "{}"))
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from error
