"""What a person sees while an evaluation runs."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class EvaluationProgress:
    """A bar over the images with the present attack and how many still stand, on standard error, on a terminal only.

    Args:
        samples: images in all.
        show: False shows nothing.
    """

    def __init__(self, samples: int, *, show: bool) -> None:
        self._bar = Progress(
            TextColumn("images"),
            MofNCompleteColumn(),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[state]} "),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
            disable=not show or not sys.stderr.isatty(),
            transient=True,
        )
        self._task = self._bar.add_task("", total=samples, state="")
        self._standing = 0

    def __enter__(self) -> "EvaluationProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, attack: str, standing: int | None) -> None:
        """``done`` images are finished, ``attack`` is at work, ``standing`` images stand so far (None: as before)."""
        self._standing = self._standing if standing is None else standing
        self._bar.update(self._task, completed=done, state=f"{self._standing} stand  {attack}")
