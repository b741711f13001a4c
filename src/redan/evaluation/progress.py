"""What a person sees while an evaluation runs."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor


class EvaluationProgress:
    """On standard error: a line for each attack that is done, and on a terminal a bar with the time left.

    The bar counts forward passes; how many are still to come falls as images do, so the time left is a bound for the
    attacks ahead.

    Args:
        show: False shows nothing.
    """

    def __init__(self, *, show: bool) -> None:
        self._show = show
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.fields[state]}"),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            disable=not show or not sys.stderr.isatty(),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, state="")
        self._done = 0.0
        self._started = time.perf_counter()

    def __enter__(self) -> "EvaluationProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, attack: str, stands: Tensor, cost: int) -> None:
        """``attack`` begins; those that stand, bool ``(n,)``, may cost so many passes each from here to the end."""
        total = self._done + cost * int(stands.sum())
        self._bar.update(self._task, total=total, state=f"{attack}: {share(stands)} stand")

    def beat(self, passes: int) -> None:
        """So many images have been through a pass."""
        self._done += passes
        self._bar.update(self._task, completed=self._done)

    def end(self, attack: str, stands: Tensor) -> None:
        """``attack`` is done, and these stand."""
        if self._show:
            seconds = time.perf_counter() - self._started
            self._console.print(f"after {attack}: {share(stands)} of {len(stands)} stand ({seconds:.0f} s)")


class CertificationProgress:
    """On standard error: on a terminal a bar with the verdicts so far and the time left, elsewhere a line a minute.

    Args:
        count: images.
        show: False shows nothing.
    """

    def __init__(self, count: int, *, show: bool) -> None:
        self._show, self._count = show, count
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._lively = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.fields[state]}"),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            disable=not show or not self._lively,
            transient=True,
        )
        self._task = self._bar.add_task("", total=count, state="")
        self._told = time.perf_counter()

    def __enter__(self) -> "CertificationProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, verdicts: Mapping[str, int], stage: str) -> None:
        """So many images have each verdict, and ``stage`` was at work."""
        done = sum(verdicts.values())
        told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
        state = f"{done} of {self._count}" + (f": {told}" if told else "") + (f" ({stage})" if stage else "")
        self._bar.update(self._task, completed=done, state=state)
        if self._show and not self._lively and time.perf_counter() - self._told > 60:
            self._told = time.perf_counter()
            self._console.print(state)


def share(stands: Tensor) -> str:
    """As a percentage."""
    return f"{100 * float(stands.float().mean()):.2f} %"
