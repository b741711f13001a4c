"""redan: train image classifiers to withstand adversarial examples, attack them, and report what can be trusted."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redan.analysis.analyse import analyse
    from redan.analysis.hard_examples import study_difficulty
    from redan.demonstration import demo
    from redan.errors import DataError, Stopped, UserError
    from redan.evaluation.certify import certify
    from redan.evaluation.evaluate import evaluate
    from redan.evaluation.properties import decide, decide_all, export
    from redan.pruning import prune
    from redan.recipes.schema import Recipe, load_recipe
    from redan.reporting import write_report as report
    from redan.run import load
    from redan.sweeping.grid import sweep
    from redan.sweeping.search import search
    from redan.training.trainer import train
    from redan.version import __version__

__all__ = [
    "DataError",
    "Recipe",
    "Stopped",
    "UserError",
    "__version__",
    "analyse",
    "certify",
    "decide",
    "decide_all",
    "demo",
    "evaluate",
    "export",
    "load",
    "load_recipe",
    "prune",
    "report",
    "search",
    "study_difficulty",
    "sweep",
    "train",
]

# Where each name lives. Imported on first use: `redan --help` should not wait for torch.
_HOMES = {
    "DataError": ("redan.errors", "DataError"),
    "Recipe": ("redan.recipes.schema", "Recipe"),
    "Stopped": ("redan.errors", "Stopped"),
    "UserError": ("redan.errors", "UserError"),
    "__version__": ("redan.version", "__version__"),
    "analyse": ("redan.analysis.analyse", "analyse"),
    "certify": ("redan.evaluation.certify", "certify"),
    "decide": ("redan.evaluation.properties", "decide"),
    "decide_all": ("redan.evaluation.properties", "decide_all"),
    "demo": ("redan.demonstration", "demo"),
    "evaluate": ("redan.evaluation.evaluate", "evaluate"),
    "export": ("redan.evaluation.properties", "export"),
    "load": ("redan.run", "load"),
    "load_recipe": ("redan.recipes.schema", "load_recipe"),
    "prune": ("redan.pruning", "prune"),
    "report": ("redan.reporting", "write_report"),
    "search": ("redan.sweeping.search", "search"),
    "study_difficulty": ("redan.analysis.hard_examples", "study_difficulty"),
    "sweep": ("redan.sweeping.grid", "sweep"),
    "train": ("redan.training.trainer", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'redan' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value
