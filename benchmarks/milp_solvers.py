"""SCIP beside HiGHS on the images that CROWN leaves open: all undecided ReLUs exact, and COLT's linear programs.

A network of the ConvMed family, as a state dict of its layers' weights in order (COLT's released MNIST network, say),
attacked at a Linf radius. Of each open image the margins that CROWN leaves open are minimised one after the other, each
until its sign is known or the time is up; the first whose bound is not above 0 ends an image. The linear programs are
those of each open neuron of the second layer that ReLUs take.

    python benchmarks/milp_solvers.py mnist_0.1_convmed_flat_2_2_100.pt --data-dir DIR --json
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import machine
from torch import Tensor, nn

from redan.certification.crown import Crown
from redan.certification.milp import lp_refine, minimise
from redan.certification.reading import read_network
from redan.certification.regions import Region, Specification
from redan.certification.solvers import Solver
from redan.data.pipeline import to_float
from redan.data.registry import load_dataset
from redan.models.norms import Normalise
from redan.models.registry import build_model
from redan.threats import Linf

SOLVERS: tuple[Solver, ...] = ("highs", "scip")


def load(file: Path) -> nn.Module:
    """COLT's MNIST network, whose sizes are read off the weights."""
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    weights = [value for key, value in state.items() if key.endswith((".weight", ".bias"))]
    options = {"w1": len(weights[0]) // 16, "w2": len(weights[2]) // 32, "hidden": len(weights[4])}
    model = build_model("convmed", Normalise((0.1307,), (0.3081,)), in_channels=1, size=28, classes=10, **options)
    model.load_state_dict(dict(zip((key for key, _ in model.named_parameters()), weights, strict=True)), strict=False)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--radius", type=float, default=0.1)
    parser.add_argument("--images", type=int, default=100, help="the first so many test images are bounded")
    parser.add_argument("--open", type=int, default=3, help="so many of those left open are solved, the first ones")
    parser.add_argument("--timeout", type=float, default=100.0, help="seconds an image")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    torch.set_num_threads(1)

    network = read_network(load(args.weights), (1, 28, 28)).to(torch.float32)
    test = load_dataset("mnist", args.data_dir).test
    rows: list[dict[str, Any]] = []
    for index in range(args.images):
        image, label = to_float(test.images[index : index + 1]), test.labels[index : index + 1]
        region, specification = Region.around(image, Linf(args.radius)), Specification.robust(label, 10)
        bounds = Crown()(network, region, specification)
        left = torch.nonzero(bounds.margins[0] <= 0).flatten()
        if not len(left) or int(network(image).argmax()) != int(label):
            continue
        # The smallest margin is the likeliest to fail.
        order = left[bounds.margins[0, left].argsort()].tolist()
        crossing = sum(int(((lower < 0) & (upper > 0)).sum()) for lower, upper in bounds.layers.values())
        row: dict[str, Any] = {"image": index, "margins": len(order), "crossing": crossing}
        for solver in SOLVERS:
            started, verdict = time.perf_counter(), "proved"
            for j in order:
                seconds = args.timeout - (time.perf_counter() - started)
                if seconds <= 0:
                    verdict = "timeout"
                    break
                found = minimise(
                    network, region, specification, bounds.layers, image=0, rows=[j], solver=solver, timeout=seconds
                )
                if found.lower[0] <= 0:
                    verdict = "broken" if found.upper[0] < 0 else "timeout"
                    break
            row[solver] = {"seconds": round(time.perf_counter() - started, 2), "verdict": verdict}
            started, second = time.perf_counter(), network.bent[1]
            lower, upper = lp_refine(network, region, bounds.layers, second, image=0, solver=solver)
            old = bounds.layers[second]
            row[solver] |= {
                "programs_seconds": round(time.perf_counter() - started, 2),
                "neurons": int(((old[0] < 0) & (old[1] > 0)).sum()),
                "left": int(((lower < 0) & (upper > 0)).sum()),
            }
        rows.append(row)
        if not args.json:
            print(row, flush=True)
        if len(rows) == args.open:
            break
    ratios = {
        name: round(statistics.median(row["highs"][key] / row["scip"][key] for row in rows), 2) if rows else None
        for name, key in (("mixed-integer", "seconds"), ("linear", "programs_seconds"))
    }
    if args.json:
        settings: dict[str, Any] = {"radius": args.radius, "images": args.images, "timeout": args.timeout}
        document: dict[str, Any] = {"benchmark": "milp_solvers", "ratios": ratios, "rows": rows}
        print(json.dumps(document | settings | {"machine": machine()}))
    else:
        print(f"HiGHS over SCIP, median of {len(rows)} images: {ratios}; {machine()}")


if __name__ == "__main__":
    main()
