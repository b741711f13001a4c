"""The run of one row or trial: trained from where it is, and what that took."""

import json
from pathlib import Path

from redan.recipes.schema import Recipe
from redan.run import STATE
from redan.training.trainer import OnValidation, train


def begun(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from; a run that failed before its first may be begun anew."""
    return (folder / STATE).exists()


def train_run(
    recipe: Recipe, folder: Path, *, data_dir: Path | None, progress: bool, on_validation: OnValidation | None = None
) -> None:
    """Train the run in ``folder``, from where it is, to its end."""
    train(recipe, folder, data_dir=data_dir, resume=begun(folder), progress=progress, on_validation=on_validation)


def trained(folder: Path) -> tuple[int, float]:
    """How many epochs a run has done, and the seconds that they took."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return len(records), round(sum(record["seconds"] for record in records), 3)
