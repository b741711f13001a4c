"""``python -m redan``."""

from redan.cli import app

app(prog_name="redan")
