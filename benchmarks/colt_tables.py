"""The tables of docs/results/colt.md, from the runs of colt_table.sh; a dash is what is not there.

python benchmarks/colt_tables.py runs/colt
"""

import argparse
import json
from pathlib import Path

from common import line, percent, table

from redan.evaluation.results import Certificates, Evaluation

METHODS = ("interval", "zonotope", "colt", "cascade")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/colt"))
    runs = sorted(file.parent for file in parser.parse_args().folder.glob("*/recipe.yaml"))
    proofs = {run: sorted(map(Certificates.load, run.glob("certificates/*.json")), key=_order) for run in runs}

    print("## Accuracies\n")
    table("run", "training, minutes", "clean", "AutoAttack", *METHODS, "not refuted by the last")
    for run in runs:
        seconds = sum(json.loads(row)["seconds"] for row in (run / "metrics.jsonl").read_text().splitlines())
        attacked = [Evaluation.load(file) for file in run.glob("results/autoattack-*.json")]
        robust = attacked[0].robust if attacked else None
        last = {it.method: it for it in proofs[run]}  # on the most images, with the most time
        proved = (percent(last[method].proved if method in last else None) for method in METHODS)
        clean, standing = (proofs[run][-1].clean, proofs[run][-1].standing) if last else (None, None)
        line(run.name, f"{seconds / 60:.0f}", percent(clean), percent(robust), *proved, percent(standing))

    print("\n## Verdicts and times\n")
    table("run", "method", "timeout", "images", "certified", "falsified", "open", "misclassified", "seconds in all")
    for run, found in proofs.items():
        for it in found:
            counts = (it.images, it.certified, it.falsified, it.unknown, it.misclassified)
            line(run.name, it.method, f"{it.timeout:g}", *counts, f"{it.seconds:.0f}")

    print("\n## By what\n")
    table("run", "method", "timeout", "verdict", "by", "images", "seconds each", "at most")
    for run, found in proofs.items():
        for it in found:
            for verdict, by, images, each, most in it.settled:
                row = (verdict, by or "–", images, f"{each:.3g}", f"{most:.3g}")
                line(run.name, it.method, f"{it.timeout:g}", *row)


def _order(it: Certificates) -> tuple[int, int, float]:
    return METHODS.index(it.method), it.images, it.timeout


if __name__ == "__main__":
    main()
