"""What the benchmarks share: the networks, interleaved timing, and the machine in words."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redan.evaluation.results import Accuracy
from redan.models.norms import Normalise
from redan.models.registry import build_model

NETWORKS = {
    "resnet18": ("resnet18", {"width": 64}),
    "resnet18-w16": ("resnet18", {"width": 16}),
    "preact-resnet18-w16": ("preact-resnet18", {"width": 16}),
    "wrn-16-1": ("wide-resnet", {"depth": 16, "width": 1}),
}
RADIUS, STEP_SIZE = 8 / 255, 2 / 255


def network(name: str) -> nn.Module:
    """A network on CIFAR-sized images, with statistics of its BatchNorm that are not the initial ones."""
    family, options = NETWORKS[name]
    torch.manual_seed(0)
    normalise = Normalise((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    model = build_model(family, normalise, in_channels=3, size=32, classes=10, **options)
    with torch.no_grad():
        model.train()(torch.rand(64, 3, 32, 32))
    return model


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Random images and labels: the time of an attack does not depend on them."""
    draws = torch.Generator().manual_seed(0)
    return torch.rand(size, 3, 32, 32, generator=draws), torch.randint(10, (size,), generator=draws)


def interleaved(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each, run in turn after one uncounted call each, so that both see the same machine."""
    first(), second()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, times in zip((first, second), seconds, strict=True):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return seconds


def table(*head: str) -> None:
    """The head of a Markdown table."""
    line(*head)
    print(f"|{' --- |' * len(head)}")


def line(*cells: object) -> None:
    """One more line of it."""
    print(f"| {' | '.join(map(str, cells))} |")


def percent(it: Accuracy | None) -> str:
    """An accuracy with its interval, or a dash."""
    return "–" if it is None else f"{100 * it.value:.1f} [{100 * it.low:.1f}, {100 * it.high:.1f}]"


def machine() -> dict[str, Any]:
    """The machine in words."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    features = {
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "avx512": torch.cpu._is_avx512_supported(),
    }
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [name for name, present in features.items() if present],
        "torch": torch.__version__,
    }


def arguments(description: str) -> argparse.Namespace:
    """The options of both benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--network", choices=tuple(NETWORKS), nargs="+", default=["resnet18", "preact-resnet18-w16"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--compile", action="store_true", help="compile redan's search copy")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def publish(what: str, args: argparse.Namespace, seconds: dict[str, tuple[list[float], list[float]]]) -> None:
    """Print the ratios: a table, or one JSON object whose ``ratio`` is that of the first network."""
    rows = {}
    for name, (plain, redan) in seconds.items():
        rows[name] = {
            "ratio": round(statistics.median(p / r for p, r in zip(plain, redan, strict=True)), 2),
            "plain_seconds": round(statistics.median(plain), 4),
            "redan_seconds": round(statistics.median(redan), 4),
        }
    settings = {key: getattr(args, key) for key in ("batch", "steps", "rounds", "precision", "compile")}
    if args.json:
        ratio = next(iter(rows.values()))["ratio"]
        print(json.dumps({"benchmark": what, "ratio": ratio, "networks": rows} | settings | {"machine": machine()}))
        return
    print(f"{what}, {settings}, {machine()}")
    for name, row in rows.items():
        print(f"{name:>20}: plain {row['plain_seconds']} s, redan {row['redan_seconds']} s, ratio {row['ratio']}")
