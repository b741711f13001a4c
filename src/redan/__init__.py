"""redan: train image classifiers to withstand adversarial examples, attack them, and report what can be trusted."""

from redan.demo import demo
from redan.errors import DataError, Stopped, UserError
from redan.evaluation.evaluate import evaluate
from redan.recipes.schema import Recipe, load_recipe
from redan.report import write_report as report
from redan.run import load
from redan.training.trainer import train
from redan.version import __version__

__all__ = [
    "DataError",
    "Recipe",
    "Stopped",
    "UserError",
    "__version__",
    "demo",
    "evaluate",
    "load",
    "load_recipe",
    "report",
    "train",
]
