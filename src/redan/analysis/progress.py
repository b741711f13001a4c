"""What a person sees while an analysis runs."""

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(*, show: bool) -> Progress:
    """A bar on standard error with the time left, for ``track``; nothing elsewhere than on a terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(stderr=True),
        transient=True,
        disable=not show or not sys.stderr.isatty(),
    )
