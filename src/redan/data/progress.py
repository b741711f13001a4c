"""How long a download or a decoding still takes."""

import sys

from rich.console import Console
from rich.progress import Progress


def progress_bar() -> Progress:
    """A progress bar on standard error, silent where that is no terminal."""
    return Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
