"""The tables of docs/results/atop.md, from the runs of atop_table.sh; a dash is what is not there.

    python benchmarks/atop_tables.py runs/atop

"Transfer" is how such papers often judge: adversarial examples of the bare classifier, shown to the whole network.
"""

import argparse
from pathlib import Path

from common import line, percent, table

from redan.evaluation.results import Evaluation

OWN = "linf:8/255"
RULES = ("mean", "worst", "majority", "fixed")


def evaluations(root: Path, attack: str) -> dict[str, list[Evaluation]]:
    """Those by an attack whose name begins so, by table and run."""
    found: dict[str, list[Evaluation]] = {}
    for file in sorted(root.glob(f"*/*/results/{attack}-*.json")):
        run = file.parent.parent
        found.setdefault(f"{run.parent.name}: {run.name}", []).append(Evaluation.load(file))
    return found


def rules(name: str, it: Evaluation) -> None:
    """Print what each rule counts, of a network that draws at random."""
    if (counts := it.randomised) is not None:
        pairs = ((getattr(counts.clean, rule), getattr(counts.robust, rule)) for rule in RULES)
        line(name, *(f"{percent(clean)}, {percent(robust)}" for clean, robust in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/atop"))
    folder = parser.parse_args().folder
    runs = evaluations(folder, "purification")
    own = {name: it for name, each in runs.items() for it in each if it.threat == OWN}

    print(f"## Within {OWN}\n")
    table("run", "clean", "transfer", "robust")
    for name, it in own.items():
        line(name, percent(it.clean), percent(it.transferred), percent(it.robust))

    print("\n## By each rule of counting: clean, robust\n")
    table("run", *RULES)
    for name, it in own.items():
        rules(name, it)

    print("\n## By longer attacks, likewise\n")
    table("run", *RULES)
    for name, each in evaluations(folder, "pgd").items():
        for it in each:
            rules(f"{name}, {it.attack}, {it.samples} images", it)

    print("\n## After each attack\n")
    for name, it in own.items():
        print(f"* {name}: " + ", ".join(f"{title} {100 * value:.1f}" for title, value in it.attacks.items()))

    print("\n## Convergence of PGD by exact gradients\n")
    for name, it in own.items():
        points = (f"{point.steps} x {point.draws}: {100 * point.accuracy.value:.1f}" for point in it.convergence)
        print(f"* {name}: " + ", ".join(points))

    print("\n## Other threats\n")
    table("run", "threat", "clean", "transfer", "robust")
    for name, each in runs.items():
        for it in each:
            if it.threat != OWN:
                line(name, it.threat, percent(it.clean), percent(it.transferred), percent(it.robust))


if __name__ == "__main__":
    main()
