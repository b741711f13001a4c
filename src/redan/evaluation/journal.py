"""The journal of an evaluation: each finished piece of work in a file of its own, so that a kill repeats none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from redan.errors import Stopped, UserError
from redan.tensors import load_tensors, save_tensors

SETTINGS = "settings.safetensors"


class Journal:
    """Pieces of work by name, kept until the evaluation is whole.

    Args:
        folder: where to keep them; None keeps nothing.
        settings: what the pieces depend on, JSON-able; pieces of other settings are refused.
        resume: take up what the folder holds; without it, a folder that holds something is refused. None takes up what
            there is, if anything.

    Raises:
        UserError: see above.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], *, resume: bool | None) -> None:
        self._folder = folder
        self._names: set[str] = set()
        if folder is None:
            return
        if not (folder / SETTINGS).exists():
            if resume:
                raise UserError(f"there is no unfinished evaluation in {folder}; start it without --resume")
            save_tensors(folder / SETTINGS, {}, settings)
            return
        if resume is False:
            raise UserError(f"{folder} holds an unfinished evaluation: go on with --resume, or delete it")
        _, found = load_tensors(folder / SETTINGS)
        differing = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
        if differing:
            raise UserError(f"{folder} was begun with another {differing[0]}; delete it to start anew")
        self._names = {path.stem for path in folder.glob("*.safetensors") if path.name != SETTINGS}

    def pieces(self, work: str) -> list[dict[str, Tensor]]:
        """The finished pieces of that work, in order."""
        names = sorted(name for name in self._names if name.rpartition("@")[0] == work)
        return [load_tensors(self._path(name))[0] for name in names]

    def write(self, work: str, position: int, piece: dict[str, Tensor]) -> None:
        """Keep a finished piece; ``position`` orders the pieces of one work."""
        if self._folder is not None:
            name = f"{work}@{position:09d}"
            save_tensors(self._path(name), piece)
            self._names.add(name)

    @contextmanager
    def kept_when_stopped(self) -> Iterator[None]:
        """Turn Ctrl-C into a word on how to go on; leave no journal where nothing was finished."""
        try:
            yield
        except KeyboardInterrupt as stop:
            if self._folder is None:
                raise
            raise Stopped(f"stopped; what was finished is in {self._folder}, go on with --resume") from stop
        except UserError:
            if not self._names:
                self.close()
            raise

    def close(self) -> None:
        """The evaluation is whole: the pieces have served."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"
