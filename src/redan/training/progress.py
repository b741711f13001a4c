"""What a person sees while training runs: a bar on a terminal, a line an epoch elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def percent(share: float | None) -> str:
    """A share as people read it; a dash for none."""
    return "–" if share is None else f"{100 * share:.1f} %"


class TrainingProgress:
    """Shows epoch, loss, training accuracies and the time left, on standard error.

    Args:
        epochs: in all.
        steps: an epoch.
        done: steps that an earlier session finished.
        show: False shows nothing.
    """

    def __init__(self, epochs: int, steps: int, done: int, *, show: bool) -> None:
        self._epochs, self._steps, self._done = epochs, steps, done
        self._console = Console(stderr=True, quiet=not show)
        self._started, self._began_at = time.monotonic(), done
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            disable=not show or not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=epochs * steps, completed=done, epoch="", state="")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, epoch: int, loss: float, clean: float | None, robust: float | None) -> None:
        """One step is done, in epoch number ``epoch`` (from 1); the figures are of this epoch so far."""
        self._done += 1
        state = f"loss {loss:.3f}  clean {percent(clean)}  robust {percent(robust)} "
        self._bar.update(self._task, completed=self._done, epoch=f"{epoch}/{self._epochs}", state=state)

    def epoch(self, record: dict[str, float | int | str | None]) -> None:
        """An epoch is done, with its record for ``metrics.jsonl``."""
        per_step = (time.monotonic() - self._started) / max(self._done - self._began_at, 1)
        left = per_step * (self._epochs * self._steps - self._done)
        validation = ""
        if record.get("validation_clean_accuracy") is not None:
            clean, robust = record["validation_clean_accuracy"], record["validation_robust_accuracy"]
            assert isinstance(clean, float) and isinstance(robust, float)
            validation = f"  validation {percent(clean)} clean, {percent(robust)} robust"
        training = [record["clean_accuracy"], record["robust_accuracy"]]
        shares = [percent(share if isinstance(share, float) else None) for share in training]
        self._console.print(
            f"epoch {record['epoch']}/{self._epochs}  lr {record['learning_rate']:.4g}  loss {record['loss']:.4f}  "
            f"training {shares[0]} clean, {shares[1]} robust{validation}  ({left / 60:.1f} min left)",
            highlight=False,
            soft_wrap=True,
        )
