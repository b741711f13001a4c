"""One training step of every method beside one of PGD-AT, and AR-AT beside a plain implementation of it.

python benchmarks/method_steps.py --network resnet18-w16 --json

``ratio`` is the plain AR-AT's time over redan's; ``against_pgd_at`` each method's time over that of redan's PGD-AT.
The plain implementation attacks in training mode, as the public code does; redan both ways, which changes BatchNorm.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import plain
import torch
from common import RADIUS, STEP_SIZE, arguments, batch, machine, network
from torch import nn

from redan.attacks import PGD
from redan.attacks.search import Mode, has_fast_bfloat16
from redan.data.types import Batch
from redan.methods.base import Adversary
from redan.methods.registry import METHODS, build_method
from redan.methods.targets import LabelSmoothing
from redan.threats import Linf


def step(method: Any, data: Batch, bfloat16: bool) -> Callable[[], float]:
    """One step of a method, optimiser included, as a function."""
    method = method.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(method.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def run() -> float:
        method.before_step(0.0, torch.Generator().manual_seed(0))
        method.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = method(data).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return run


def built(name: str, net: nn.Module, args: Any, mode: Mode = "eval") -> nn.Module:
    """A method as its recipe has it, around the network."""
    family = METHODS[name]
    attack = PGD(
        Linf(RADIUS),
        steps=args.steps,
        step_size=STEP_SIZE,
        objective=family.attack_objective,
        start=family.attack_start,
        drop_broken=False,
    )
    adversary = Adversary(attack, mode, mode == "train", args.precision, args.compile)
    parts = {"teacher": copy.deepcopy(net)} if family.takes_teacher else {}
    options: dict[str, Any] = {"clean_epochs": 0} if name == "arrest" else {}
    method = build_method(name, net, adversary=adversary, targets=LabelSmoothing(), parts=parts, **options)
    if name == "arrest":
        method.finetuning.fill_(True)  # type: ignore[operator]
    return method


def over(times: list[float], others: list[float]) -> float:
    """The median of the ratios round by round, so that both sides of each saw the same machine."""
    return round(statistics.median(a / b for a, b in zip(times, others, strict=True)), 2)


def main() -> None:
    args = arguments(__doc__ or "")
    bfloat16 = args.precision == "bfloat16" or (args.precision == "auto" and has_fast_bfloat16(torch.device("cpu")))
    found = {}
    for name in args.network:
        images, labels = batch(args.batch)
        data = Batch(images, labels, torch.arange(len(labels)))
        model = network(name).train()
        layers = tuple(model.activations)  # type: ignore[arg-type]
        public = plain.PlainARAT(model, layers)
        optimizer = torch.optim.SGD(public.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

        def run_plain(public: Any = public, optimizer: Any = optimizer, data: Batch = data) -> float:
            loss: float = public.step(optimizer, data.images, data.labels, RADIUS, STEP_SIZE, args.steps)
            return loss

        runs: dict[str, Callable[[], float]] = {"plain arat": run_plain}
        for method in ("pgd-at", "trades", "mart", "lbgat", "arrest", "arat"):
            runs[method] = step(built(method, network(name), args), data, bfloat16)
        for method in ("pgd-at", "arat"):
            runs[f"{method}, train mode"] = step(built(method, network(name), args, "train"), data, bfloat16)
        seconds: dict[str, list[float]] = {title: [] for title in runs}
        for turn in range(args.rounds + 1):  # the first does not count
            for title, run in runs.items():
                started = time.perf_counter()
                run()
                if turn:
                    seconds[title].append(time.perf_counter() - started)
        found[name] = {
            "ratio": over(seconds["plain arat"], seconds["arat, train mode"]),
            "seconds": {title: round(statistics.median(times), 4) for title, times in seconds.items()},
            "against_pgd_at": {
                title: over(times, seconds["pgd-at, train mode" if "train mode" in title else "pgd-at"])
                for title, times in seconds.items()
                if title != "plain arat"
            },
        }
    settings = {key: getattr(args, key) for key in ("batch", "steps", "rounds", "precision", "compile")}
    if args.json:
        ratio = next(iter(found.values()))["ratio"]
        document = {"benchmark": "method_steps", "ratio": ratio, "networks": found}
        print(json.dumps(document | settings | {"machine": machine()}))
        return
    print(f"method_steps, {settings}, {machine()}")
    for name, row in found.items():
        print(f"{name}: plain AR-AT over redan's, both in training mode: {row['ratio']}")
        for title, relative in row["against_pgd_at"].items():  # type: ignore[attr-defined]
            print(f"{title:>20}: {row['seconds'][title]} s, {relative} of PGD-AT")  # type: ignore[index]


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
