"""Where the result of an evaluation is kept, under which name, and whether it is there already."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redan.errors import UserError
from redan.evaluation.results import Evaluation
from redan.tensors import save_tensors

DRAWS = 20  # passes that average a gradient and judge a candidate of a model that draws at random


class Kept:
    """The files of one evaluation.

    Args:
        folder: that holds them; None keeps nothing.
        settings: all that the result depends on, JSON-able.
        diagnose: whether it has a diagnosis, too.

    Attributes:
        fingerprint: a digest of the settings, the weights and images among them.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], *, diagnose: bool) -> None:
        self._folder, self._stem = folder, _stem(settings, diagnose=diagnose)
        self.fingerprint = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def partial(self) -> Path | None:
        """The folder of the journal, while the evaluation is under way."""
        return self._path(".partial")

    def finished(self, *, with_images: bool) -> Evaluation | None:
        """The result, where it is there, made by the same settings and not being made anew."""
        path, images = self._path(".json"), self._path(".images.safetensors")
        if path is None or images is None or not path.exists() or (with_images and not images.exists()):
            return None
        if self.partial is not None and self.partial.exists():
            return None
        try:
            result = Evaluation.load(path)
        except UserError:  # of another version of redan, or damaged: it is to be replaced
            return None
        return result if result.fingerprint == self.fingerprint else None

    def update(self, result: Evaluation) -> None:
        """Write the JSON file anew: the pictures beside it stay right."""
        if self._folder is not None:
            result.save(self._named(".json"))

    def keep(self, result: Evaluation, pictures: dict[str, Tensor], images: dict[str, Tensor] | None) -> None:
        """Write the files. The JSON file goes first and comes last: it never stands beside others' pictures."""
        if self._folder is None:
            return
        files = {".safetensors": pictures, ".images.safetensors": images}
        for suffix in (".json", *files):
            self._named(suffix).unlink(missing_ok=True)
        for suffix, tensors in files.items():
            if tensors:
                save_tensors(self._named(suffix), tensors)
        result.save(self._named(".json"))

    def _path(self, suffix: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{self._stem}{suffix}"

    def _named(self, suffix: str) -> Path:
        path = self._path(suffix)
        assert path is not None
        return path


def _stem(settings: dict[str, Any], *, diagnose: bool) -> str:
    """The name of the files; evaluations that differ in any setting that a user gives have files of their own."""
    parts = [settings["run"]] if settings["out"] else []
    parts += [settings[key] for key in ("attack", "threat", "samples", "checkpoint")]
    usual = {"data": settings["run_data"], "precision": "auto", "draws": DRAWS, "curve": True, "convergence": True}
    usual |= {"input_mean": None, "input_std": None}
    parts += [f"{key}_{settings[key]}" for key, value in usual.items() if settings[key] != value]
    stem = "-".join(map(str, parts)) + f"-seed{settings['seed']}" + ("-diagnosed" if diagnose else "")
    return "".join(c if c.isalnum() or c in "-+." else "_" for c in stem)


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A digest of names and contents."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
