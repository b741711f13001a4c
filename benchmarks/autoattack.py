"""AutoAttack, standard version: redan beside the public implementation on the same trained network and images.

Each round both attack the same images, one after the other. The public implementation is installed into a folder of its
own the first time (pip, without dependencies), and is no dependency of redan.

    python benchmarks/autoattack.py runs/pgd-at-cifar10-mini --samples 50 --rounds 3 --data-dir DIR --json
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import machine
from torch import Tensor, nn

from redan.attacks.search import SearchModel
from redan.data.pipeline import to_float
from redan.data.registry import load_dataset
from redan.evaluation.protocol import parse_protocol
from redan.run import read_run
from redan.seeds import generator
from redan.threats import LpBall, parse_threat

PEER = "pyautoattack==0.2.0"
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def public(folder: Path) -> Any:
    """The public class, installed if it is not there yet."""
    if not (folder / "pyautoattack").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PEER]
        subprocess.run(pip, check=True)
    sys.path.append(str(folder))
    from pyautoattack import AutoAttack  # type: ignore[import-not-found]

    return AutoAttack


class Passes:
    """Images that go through a network, counted."""

    def __init__(self, network: nn.Module) -> None:
        self.images = 0
        network.register_forward_hook(lambda _, inputs, __: self._count(inputs[0]))

    def _count(self, images: Tensor) -> None:
        self.images += len(images)


def ours(
    network: nn.Module, images: Tensor, labels: Tensor, threat: LpBall, precision: Any, seed: int
) -> tuple[Tensor, int, dict[str, float]]:
    """Who stands against redan's version, the passes it took, and the seconds of each attack."""
    search = SearchModel(network, precision=precision)
    stands, passes, seconds = ~search.broken(images, labels), len(labels), {}
    attacks = parse_protocol("autoattack", threat, classes=search.classes(images))
    for i, (title, attack) in enumerate(attacks.items()):
        started = time.perf_counter()
        rows = stands.nonzero().squeeze(1)
        if len(rows):
            found, calls = attack.run(search, images[rows], labels[rows], generator(seed, i))
            stands[rows] = ~(search.broken(found, labels[rows]) & threat.contains(found, images[rows]))
            passes += int(calls.sum()) + len(rows)
        seconds[title] = round(time.perf_counter() - started, 2)
    return stands, passes, seconds


def theirs(peer: Any, network: nn.Module, images: Tensor, labels: Tensor, threat: LpBall, seed: int) -> Tensor:
    """Who stands against the public version."""
    adversary = peer(network, norm=NORMS[threat.norm], eps=threat.radius, version="standard", seed=seed)
    found, _ = adversary.run_standard_evaluation(images, labels)
    with torch.no_grad():
        return network(found).argmax(1) == labels


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="run folder of a trained network")
    parser.add_argument("--threat", help="the run's own if not given")
    parser.add_argument("--samples", type=int, default=50, help="test images a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--peer", type=Path, default=Path("build/peer"), help="folder for the public implementation")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peer = public(args.peer)
    recipe, _, network = read_run(args.run)
    threat = parse_threat(args.threat or recipe.threat)
    assert isinstance(threat, LpBall)
    network.requires_grad_(True)  # as the public implementation finds it in a script
    counted = Passes(network)
    test = load_dataset(recipe.data.name, args.data_dir).test
    times: dict[str, list[float]] = {"public": [], "redan": []}
    calls = {"public": 0, "redan": 0}
    agreement = {"both robust": 0, "both broken": 0}
    differing: dict[str, list[int]] = {"only public breaks": [], "only redan breaks": []}
    parts: list[dict[str, float]] = []
    for turn in range(args.rounds):
        chosen = torch.arange(turn * args.samples, (turn + 1) * args.samples)
        images, labels = to_float(test.images[chosen]), test.labels[chosen]
        counted.images, started = 0, time.perf_counter()
        their_verdict = theirs(peer, network, images, labels, threat, seed=turn)
        times["public"].append(round(time.perf_counter() - started, 2))
        calls["public"] += counted.images
        started = time.perf_counter()
        our_verdict, passes, seconds = ours(network, images, labels, threat, args.precision, seed=turn)
        times["redan"].append(round(time.perf_counter() - started, 2))
        calls["redan"] += passes
        parts.append(seconds)
        agreement["both robust"] += int((their_verdict & our_verdict).sum())
        agreement["both broken"] += int((~their_verdict & ~our_verdict).sum())
        differing["only public breaks"] += chosen[~their_verdict & our_verdict].tolist()
        differing["only redan breaks"] += chosen[their_verdict & ~our_verdict].tolist()
        print(f"round {turn + 1}: public {times['public'][-1]} s, redan {times['redan'][-1]} s {seconds}", flush=True)
    n = args.rounds * args.samples
    result = {
        "benchmark": "autoattack",
        "run": recipe.name,
        "threat": str(threat),
        "samples": n,
        "ratio": round(sum(times["public"]) / sum(times["redan"]), 2),
        "ratios": [round(p / r, 2) for p, r in zip(times["public"], times["redan"], strict=True)],
        "seconds": times,
        "redan_seconds_by_attack": {k: round(sum(part[k] for part in parts), 2) for k in parts[0]},
        "calls_per_image": {k: round(v / n, 1) for k, v in calls.items()},
        "robust": {
            "public": agreement["both robust"] + len(differing["only redan breaks"]),
            "redan": agreement["both robust"] + len(differing["only public breaks"]),
        },
        "agreement": agreement | differing,
        "precision": args.precision,
        "machine": machine(),
    }
    print(json.dumps(result) if args.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
