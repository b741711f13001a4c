"""The tables of docs/results/dpls.md, from the runs of dpls_table.sh; a dash is what is not measured yet.

    python benchmarks/dpls_tables.py runs/dpls

Differences are taken on the same images: of each image the share of seeds with which it withstands the attack, the mean
of the differences over the images, a 95 % interval from their deviation. Seeds are thus pooled, and the interval is of
the images alone. Two best checkpoints are compared only where both lie behind the warm-up: before it no run smooths.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from common import line, percent, table

from redan.evaluation.results import Evaluation

ATTACKS = {"PGD-20": "pgd-20-", "CW-PGD-20": "pgd-20_cw-", "AutoAttack": "autoattack-"}
CHECKPOINTS = ("best", "last")
LABELS = {"none": "off-", "uniform": "uniform-", "permuted": "permuted-", "inverse": "inverse-", "DPLS": ""}
# What is trained, seeds.
SETTINGS = {
    "pgd-at-cifar10-mini": (0, 1, 2),
    "trades-cifar10-mini": (0,),
    "arat-cifar10-mini": (0,),
    "pgd-at-cifar100-mini": (0,),
}
WARMUP = 14
FEW = 300  # images that AutoAttack had


@dataclass(frozen=True)
class Run:
    """One trained network of one of the tables."""

    folder: Path

    @property
    def seed(self) -> str:
        """Of its training."""
        return self.folder.name.rpartition("seed")[2]

    def evaluation(self, attack: str, checkpoint: str) -> Evaluation | None:
        """The evaluation by that attack; None where there is none."""
        found = [*(self.folder / "results").glob(f"{ATTACKS[attack]}*-{checkpoint}-*.json")]
        return Evaluation.load(found[0]) if found else None

    def stands(self, attack: str, checkpoint: str, images: int | None = None) -> list[bool] | None:
        """Whether each image stood, of the first so many."""
        found = self.evaluation(attack, checkpoint)
        return None if found is None else [row.verdict == "unknown" for row in found.per_image[:images]]

    @cached_property
    def epochs(self) -> list[Any]:
        """The epochs that were validated."""
        rows = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [row for row in rows if row["validation_robust_accuracy"] is not None]

    @property
    def best(self) -> Any:
        """The epoch of the best checkpoint."""
        return max(self.epochs, key=lambda row: row["validation_robust_accuracy"])


def runs(root: Path, base: str, labels: str) -> list[Run]:
    """Those of all seeds that are trained and attacked."""
    stem = f"dpls-{labels}{base}"
    found = [next(iter(root.glob(f"*/{stem}-seed{seed}")), None) for seed in SETTINGS[base]]
    return [Run(folder) for folder in found if folder is not None and (folder / "results").exists()]


def rows(root: Path, base: str) -> Iterator[tuple[str, list[Run]]]:
    """What a setting has been trained with."""
    for name, labels in {**LABELS, "pruned": "pruned-"}.items():
        if found := runs(root, base, labels):
            yield name, found


def spread(values: Sequence[float | None]) -> str:
    """Mean and sample standard deviation of percentages."""
    known = [100 * value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    return f"{mean(known):.1f} ± {stdev(known):.1f}" if len(known) > 1 else f"{known[0]:+.1f}"


def pooled(root: Path, base: str, images: int | None) -> None:
    """Means of the seeds, with the gap between best and last; on the first images alone if so asked."""
    table("labels", "checkpoint", *(() if images else ("clean",)), *ATTACKS)
    for name, found in rows(root, base):
        if len(found) < len(SETTINGS[base]):
            continue  # a control of one seed
        columns: list[Callable[[Run, str], float | None]] = [] if images else [clean]
        columns += [partial(robust, attack, images) for attack in ATTACKS]
        for checkpoint in CHECKPOINTS:
            line(name, checkpoint, *(spread([column(run, checkpoint) for run in found]) for column in columns))
        line(name, "best − last", *(gap(found, column) for column in columns))


def robust(attack: str, images: int | None, run: Run, checkpoint: str) -> float | None:
    stood = run.stands(attack, checkpoint, images)
    return None if stood is None else mean(map(float, stood))


def clean(run: Run, checkpoint: str) -> float | None:
    found = run.evaluation("PGD-20", checkpoint)
    return None if found is None else found.clean.value


def gap(found: Sequence[Run], column: Callable[[Run, str], float | None]) -> str:
    pairs = [(column(run, "best"), column(run, "last")) for run in found]
    return spread([None if a is None or b is None else a - b for a, b in pairs])


def single(root: Path, base: str) -> None:
    """Each run, with intervals over images and the checkpoint's epoch; a star: before any smoothing."""
    table("labels", "seed", "checkpoint", "epoch", "clean", *ATTACKS)
    for name, found in rows(root, base):
        for run in found:
            for checkpoint in CHECKPOINTS:
                epoch = run.best["epoch"] if checkpoint == "best" else run.epochs[-1]["epoch"]
                each = [run.evaluation(attack, checkpoint) for attack in ATTACKS]
                accuracies = [None if it is None else it.robust for it in each]
                accuracies = [None if each[0] is None else each[0].clean, *accuracies]
                line(name, run.seed, checkpoint, f"{epoch}{'*' if epoch <= WARMUP else ''}", *map(percent, accuracies))
            columns: list[Callable[[Run, str], float | None]] = [clean]
            columns += [partial(robust, attack, None) for attack in ATTACKS]
            line(name, run.seed, "best − last", "–", *(gap([run], column) for column in columns))


def overfitting(root: Path) -> None:
    """Robust accuracies by the training's own attack, of the runs without smoothing."""
    table("without smoothing", "seed", "best epoch", "held out, best", "held out, last", "training, last")
    for base in SETTINGS:
        for run in runs(root, base, LABELS["none"]):
            ends = (run.best, run.epochs[-1])
            held = (f"{100 * row['validation_robust_accuracy']:.1f}" for row in ends)
            training = f"{100 * ends[1]['robust_accuracy']:.1f}"
            line(base, run.seed, ends[0]["epoch"], *held, training)


def difference(ours: Sequence[Run], theirs: Sequence[Run], attack: str, checkpoint: str) -> str:
    """In points, with its interval."""
    each = []
    for a, b in zip(ours, theirs, strict=True):
        first, second = a.stands(attack, checkpoint), b.stands(attack, checkpoint)
        if first is None or second is None:
            return "–"
        each.append([100.0 * (x - y) for x, y in zip(first, second, strict=True)])
    images = [mean(values) for values in zip(*each, strict=True)]
    half = 1.96 * stdev(images) / sqrt(len(images))
    return f"{mean(images):+.1f} [{mean(images) - half:+.1f}, {mean(images) + half:+.1f}]"


def differences(root: Path) -> None:
    """What DPLS gains over each control."""
    table("with", "DPLS over", "checkpoint", "seeds", *ATTACKS)
    for base in SETTINGS:
        ours = runs(root, base, LABELS["DPLS"])
        for name, theirs in rows(root, base):
            for checkpoint in ("last", "best") if name != "DPLS" else ():
                pairs = [*zip(ours, theirs, strict=False)]  # some controls are of the first seed alone
                if checkpoint == "best":
                    pairs = [(a, b) for a, b in pairs if min(a.best["epoch"], b.best["epoch"]) > WARMUP]
                if pairs:
                    a, b = zip(*pairs, strict=True)
                    seeds = ", ".join(run.seed for run in a)
                    line(base, name, checkpoint, seeds, *(difference(a, b, attack, checkpoint) for attack in ATTACKS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/dpls"))
    root = parser.parse_args().folder
    print("## Overfitting\n")
    overfitting(root)
    first = next(iter(SETTINGS))
    print(f"\n## {first}, means ± sample standard deviations of the seeds\n")
    pooled(root, first, None)
    print(f"\n## {first}, the first {FEW} images\n")
    pooled(root, first, FEW)
    for base in SETTINGS:
        print(f"\n## {base}, each run\n")
        single(root, base)
    print("\n## Differences\n")
    differences(root)


if __name__ == "__main__":
    main()
