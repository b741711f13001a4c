"""The demonstration: seven methods on scikit-learn's digits, attacked, some of them certified, and reported."""

from pathlib import Path
from typing import Any

from redan.analysis.analyse import analyse
from redan.analysis.hard_examples import study_difficulty
from redan.errors import UserError
from redan.evaluation.bracket import bracket
from redan.evaluation.certify import certify
from redan.evaluation.evaluate import evaluate
from redan.evaluation.results import Evaluation
from redan.reporting import write_report
from redan.training.trainer import train

# Cheaper than the recipes, so that all of it ends in three minutes on two cores without bfloat16, too.
SHORT: dict[str, Any] = {"epochs": 18, "optimizer.lr": 0.1}
FEW_STEPS: dict[str, Any] = SHORT | {"attack.steps": 5, "attack.step_size": 0.06}
RECIPES: dict[str, dict[str, Any]] = {
    "standard-digits": SHORT,
    "pgd-at-digits": FEW_STEPS,
    "trades-digits": FEW_STEPS,
    "dpls-digits": FEW_STEPS | {"dpls.warmup": 12},
    "arat-digits": FEW_STEPS,
    "atop-digits": {"purification.pretraining.epochs": 10, "epochs": 15},
    "pgd-at-digits-convmed": {"validation.every": 12},  # of COLT's network and length, beside it
    "colt-digits": {},
}
SAMPLES = 240
# The smallest, and by bounds alone: to decide every image would take minutes.
CERTIFIED = ("pgd-at-digits-convmed", "colt-digits")
# A network that draws costs each attack its draws, too: these few show what is counted, and are no hard attack.
FEW_DRAWS: dict[str, Any] = {"attack": "pgd-10:cw", "draws": 5}


def demo(out: str | Path = "redan-demo", *, progress: bool = True) -> tuple[list[Evaluation], Path]:
    """Train, attack, certify and report on digits; needs no network and less than three minutes.

    Args:
        out: an empty or new folder; runs and ``report.html`` go there.
        progress: show it on standard error.

    Returns:
        One evaluation a method, and the report's path.

    Raises:
        UserError: where the folder is not empty.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; choose another --out")
    runs = [train(name, folder / name, overrides=overrides, progress=progress) for name, overrides in RECIPES.items()]
    results = [
        evaluate(run, samples=SAMPLES, progress=progress, **(FEW_DRAWS if "atop" in run.name else {})) for run in runs
    ]
    for k, run in enumerate(runs):
        if run.name in CERTIFIED:
            results[k] = bracket(results[k], certify(run, method="crown", samples=SAMPLES, progress=progress))
    study_difficulty(folder / "dpls-digits", progress=progress)
    analyse(folder / "arat-digits", progress=progress)
    return results, write_report(runs, folder / "report.html")
