"""What DPLS gains over its controls on the same images, from the runs of dpls_table.sh.

Of each image, the share of seeds with which it withstands the attack; the mean of the differences over the images, with
a 95 % interval from their deviation. Seeds are thus pooled, and the interval is of the images alone.

    python benchmarks/dpls_differences.py runs/dpls
"""

import argparse
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from redan.evaluation.results import Evaluation

ATTACKS = {"PGD-20": "pgd-20-", "CW-PGD-20": "pgd-20_cw-", "AutoAttack": "autoattack-"}
# Table, what DPLS is added to, seeds.
SETTINGS = (
    ("pgd-at", "pgd-at-cifar10-mini", (0, 1, 2)),
    ("others", "trades-cifar10-mini", (0,)),
    ("others", "arat-cifar10-mini", (0,)),
    ("cifar100", "pgd-at-cifar100-mini", (0,)),
)
CONTROLS = ("off", "uniform", "permuted", "inverse")


def stands(run: Path, attack: str, checkpoint: str) -> list[bool] | None:
    """Whether each image stood; None where the run was not attacked so."""
    for file in (run / "results").glob(f"{attack}*-{checkpoint}-*.json"):
        return [row.verdict == "unknown" for row in Evaluation.load(file).per_image]
    return None


def difference(folder: Path, ours: str, theirs: str, seeds: Sequence[int], attack: str, checkpoint: str) -> str | None:
    """In points, with its interval; None where a run is not there yet."""
    pairs = []
    for seed in seeds:
        found = [stands(folder / f"{name}-seed{seed}", attack, checkpoint) for name in (ours, theirs)]
        if found[0] is None or found[1] is None:
            return None
        pairs.append([100.0 * (a - b) for a, b in zip(*found, strict=True)])
    each = [mean(values) for values in zip(*pairs, strict=True)]
    half = 1.96 * stdev(each) / sqrt(len(each))
    return f"{mean(each):+.1f} [{mean(each) - half:+.1f}, {mean(each) + half:+.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/dpls"))
    folder = parser.parse_args().folder
    print(f"| DPLS over | checkpoint | {' | '.join(ATTACKS)} |\n| --- | --- | {' | '.join('---' for _ in ATTACKS)} |")
    for table, base, seeds in SETTINGS:
        for control in CONTROLS:
            theirs = f"dpls-{control}-{base}"
            if not (folder / table / f"{theirs}-seed0").exists():
                continue
            for checkpoint in ("last", "best"):
                found = [
                    difference(folder / table, f"dpls-{base}", theirs, seeds, attack, checkpoint) or "–"
                    for attack in ATTACKS.values()
                ]
                print(f"| {theirs} | {checkpoint} | {' | '.join(found)} |")


if __name__ == "__main__":
    main()
