"""Reports: one HTML page made from the folders of runs. It reads files and never a model."""

from redan.reporting.html import write_report

__all__ = ["write_report"]
