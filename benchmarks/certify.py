"""Bounds of COLT's two networks: redan beside a plain implementation that keeps every layer as one dense matrix.

    python benchmarks/certify.py --weights colt_mnist_0.1.pt --weights-big RUN --json

Of each network, bound and batch: CPU-seconds an image (the two take turns), and by how much the memory in use rises at
the most. Both must find the same margins. The images are MNIST's and CIFAR-10's where REDAN_DATA has them.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine
from torch import Tensor, nn

from redan.certification.alpha_crown import AlphaCrown
from redan.certification.crown import Crown
from redan.certification.interval import Box, Interval
from redan.certification.memory import keep_freed_memory
from redan.certification.network import Network, Relu
from redan.certification.reading import read_network
from redan.certification.regions import Region, Specification
from redan.data.pipeline import to_float
from redan.data.registry import load_dataset
from redan.errors import UserError
from redan.models.convnet import conv_med, conv_med_big
from redan.models.norms import Normalise
from redan.run import read_run
from redan.threats import Linf

BOUNDS: dict[str, Any] = {
    "interval": Interval(sound="off"),
    "crown-ibp": Crown("interval", sound="off"),
    "crown": Crown(sound="off"),
    "alpha-crown": AlphaCrown(iterations=20, until_shown=False, sound="off"),
}
RADII = {"conv-med": 0.1, "conv-med-big": 2 / 255}
SPREAD = 2.0  # of a random network's biases, in standard deviations of what they are added to
PLAIN_FLOPS = 5e12  # products of a plain bound that are worth waiting for


class Dense:
    """The same bounds of a chain of layers as the formulas have them: dense matrices, every bound of every neuron.

    Args:
        network: affine layers and ReLUs one after the other.
    """

    def __init__(self, network: Network) -> None:
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []  # W, |W|, b of what lies between two ReLUs
        blocks: list[list[Any]] = [[]]
        for layer in network.layers[1:]:
            blocks[-1].append(layer)
            if isinstance(layer, Relu):
                blocks.append([])
        shape = network.input_shape
        for block in blocks:
            affine = [layer for layer in block if not isinstance(layer, Relu)]
            columns, size = [], torch.Size(shape).numel()
            for units in torch.eye(size).split(1024):
                x = units.view(-1, *shape)
                for layer in affine:
                    x = layer.linear(x)
                columns.append(x.flatten(1))
            bias = torch.zeros(1, *shape)
            for layer in affine:
                bias = layer(bias)
            weight = torch.cat(columns).t().contiguous()
            self.layers.append((weight, weight.abs(), bias.flatten()))
            shape = affine[-1].shape
        self.widths = [weight.shape[0] for weight, _, _ in self.layers]

    def products(self, name: str) -> float:
        """Multiplications of one image's bounds."""
        cost = [0.0]
        for weight, _, _ in self.layers:
            cost.append(cost[-1] + weight.numel())  # of one row on its way back from there
        if name == "interval":
            return 2 * cost[-1]
        if name == "crown-ibp":
            return 2 * cost[-1] + 10 * cost[-1]
        once = sum(2 * rows * before for rows, before in zip(self.widths[1:], cost[1:], strict=False)) + cost[-1]
        return once * (1 if name == "crown" else 60)

    def margins(self, name: str, lower: Tensor, upper: Tensor, weights: Tensor) -> Tensor:
        """Lower bounds ``(m,)`` of the logits' functions ``weights`` ``(m, classes)`` on the box of one image."""
        boxes: list[Box] = [(lower.flatten(), upper.flatten())]
        for i in range(len(self.layers) - 1):
            low, high = self._interval(i, boxes[-1] if i == 0 else (boxes[-1][0].relu(), boxes[-1][1].relu()))
            if i and name in ("crown", "alpha-crown"):
                weight, _, bias = self.layers[i]
                low = torch.maximum(low, self._bound(name, weight, bias, boxes))
                high = torch.minimum(high, -self._bound(name, -weight, -bias, boxes))
            boxes.append((low, high))
        weight, _, bias = self.layers[-1]
        rows, constants = weights @ weight, weights @ bias
        if name == "interval":
            low, high = boxes[-1][0].relu(), boxes[-1][1].relu()
            return rows.clamp(min=0) @ low + rows.clamp(max=0) @ high + constants
        return self._bound(name, rows, constants, boxes)

    def _interval(self, i: int, box: Box) -> Box:
        weight, size, bias = self.layers[i]
        centre, radius = weight @ ((box[0] + box[1]) / 2) + bias, size @ ((box[1] - box[0]) / 2)
        return centre - radius, centre + radius

    def _bound(self, name: str, rows: Tensor, constants: Tensor, boxes: list[Box]) -> Tensor:
        """Lower bounds of functions of the ReLU behind the last of the boxes; its slopes optimised by alpha-CROWN."""
        slopes = [(high > -low).float().expand(len(rows), -1) for low, high in boxes[1:]]
        if name != "alpha-crown":
            return self._back(rows, constants, boxes, slopes)
        slopes = [it.clone().requires_grad_() for it in slopes]
        ours = BOUNDS[name]
        adam = torch.optim.Adam(slopes, lr=ours.rate, eps=1e-30)
        schedule = torch.optim.lr_scheduler.ExponentialLR(adam, ours.decay)
        best = torch.full((len(rows),), -torch.inf)
        for step in range(ours.iterations + 1):
            found = self._back(rows, constants, boxes, slopes)
            best = torch.maximum(best, found.detach())
            if step < ours.iterations:
                adam.zero_grad()
                (-found.sum()).backward()
                adam.step()
                schedule.step()
                for it in slopes:
                    it.data.clamp_(0, 1)
        return best

    def _back(self, rows: Tensor, found: Tensor, boxes: list[Box], slopes: list[Tensor]) -> Tensor:
        for j in range(len(boxes) - 2, -1, -1):
            low, high = boxes[j + 1]
            is_open = (low < 0) & (high > 0)
            chord = torch.where(is_open, high / (high - low), (low >= 0).float())
            above, below = rows.clamp(min=0), rows.clamp(max=0)
            found = found - below @ (chord * low * is_open)
            rows = above * torch.where(is_open, slopes[j], chord) + below * chord
            found, rows = found + rows @ self.layers[j][2], rows @ self.layers[j][0]
        low, high = boxes[0]
        return found + rows.clamp(min=0) @ low + rows.clamp(max=0) @ high


@dataclass(frozen=True, eq=False)
class Case:
    """One network and its images: ``what`` says where both come from."""

    network: Network
    images: Tensor
    labels: Tensor
    what: str


def images_of(name: str, shape: tuple[int, ...], count: int) -> tuple[Tensor, str]:
    """The first test images of a data set, or random ones."""
    with suppress(UserError):
        return to_float(load_dataset(name, download=False).test.images[:count]), f"{name}'s first test images"
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1)), "random images"


def spread_biases(model: nn.Sequential, images: Tensor) -> None:
    """Give each neuron or filter a seeded normal bias, ``SPREAD`` times the deviation of its layer's outputs on images.

    So some are always on, some always off and some open, as in a network trained to be certified; with torch's own
    biases nearly all are open.
    """
    draws = torch.Generator().manual_seed(0)
    x = images
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer is not model[-1]:
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
            layer.bias.copy_(SPREAD * layer(x).std() * torch.randn(len(layer.bias), generator=draws))
        x = layer(x)


@torch.no_grad()
def case(name: str, count: int, weights: Path | None, run: str | None) -> Case:
    """The network of that name, on as many images."""
    torch.manual_seed(0)
    if name == "conv-med":
        shape: tuple[int, ...] = (1, 28, 28)
        images, where = images_of("mnist", shape, count)
        normalise = Normalise((0.1307,), (0.3081,))
        model: Any = conv_med(normalise, in_channels=1, size=28, classes=10, w1=2, w2=2, hidden=100)
    else:
        shape = (3, 32, 32)
        images, where = images_of("cifar10", shape, count)
        normalise = Normalise((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
        model = conv_med_big(normalise, in_channels=3, size=32, classes=10)
    if name == "conv-med" and weights is not None:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        found = [it for key, it in state.items() if key.endswith((".weight", ".bias"))]
        for parameter, value in zip(model.parameters(), found, strict=True):
            parameter.copy_(value)
        what = weights.name
    elif name == "conv-med-big" and run is not None:
        what, model = Path(run).name, read_run(run)[2].eval()
    else:
        spread_biases(model, images)
        what = f"random weights, biases of {SPREAD} standard deviations"
    network = read_network(model, shape).to(torch.float32)
    return Case(network, images, network(images).argmax(1), f"{what}; {where}")


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Of all threads of this process."""
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


def peak(work: Callable[[], Any]) -> tuple[float | None, Any]:
    """By how many MiB the resident memory rises at the most: Linux's high-water mark, reset before. None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None, work()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work freed and malloc kept would hide the rise
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    found = work()
    return round((_status("VmHWM") - before) / 1024, 1), found


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def agree(name: str, ours: Tensor, plain: Tensor) -> None:
    """Stop unless both implementations found the same margins; for alpha-CROWN redan's may be tighter."""
    lost = plain.double() - ours if name == "alpha-crown" else (plain.double() - ours).abs()
    allowed = (1e-2 if name == "alpha-crown" else 1e-3) * plain.abs().clamp(min=1)
    if bool((lost > allowed).any()):
        raise SystemExit(f"{name}: the margins differ by {float(lost.max()):.3g}")


def measure(name: str, it: Case, dense: Dense | None, bound: str, batch: int, args: argparse.Namespace) -> Any:
    """One row of the table."""
    region = Region.around(it.images[:batch], Linf(RADII[name]))
    specification = Specification.robust(it.labels[:batch], it.network.classes)
    boxes, few = region.to(torch.float32), min(batch, args.plain_images)

    def redan() -> Any:
        return BOUNDS[bound](it.network, region, specification)

    def plain() -> Tensor:
        assert dense is not None
        rows = specification.weights.float()
        with torch.set_grad_enabled(bound == "alpha-crown"):
            return torch.stack([dense.margins(bound, boxes.lower[i], boxes.upper[i], rows[i]) for i in range(few)])

    memory, (first, found) = peak(lambda: cpu_seconds(redan))
    seconds: dict[str, list[float]] = {"redan": [first / batch], "plain": []}
    shares = [float(((lower < 0) & (upper > 0)).float().mean()) for lower, upper in found.layers.values()]
    row = {
        "network": name,
        "bound": bound,
        "batch": batch,
        "redan_cpu_seconds_an_image": 0.0,
        "plain_cpu_seconds_an_image": None,
        "ratio": None,
        "redan_peak_mib": memory,
        "plain_peak_mib": None,
        "shown": int(specification.shown(found.margins).sum()),
        "open": [round(share, 3) for share in shares],
    }
    rounds = 0 if bound == "alpha-crown" else args.rounds  # its first run is long enough to be timed
    work = dense.products(bound) if dense is not None else 0.0
    if dense is None:
        row["no_plain"] = "not asked for"
    elif work > PLAIN_FLOPS:
        row["no_plain"] = f"it would multiply {work / 1e12:.0f}e12 times an image"
    else:
        row["plain_peak_mib"], (first, margins) = peak(lambda: cpu_seconds(plain))
        seconds["plain"].append(first / few)
        agree(bound, found.margins[:few], margins)
    if rounds:
        seconds = {"redan": [], "plain": []}
    for _ in range(rounds):
        seconds["redan"].append(cpu_seconds(redan)[0] / batch)
        if "no_plain" not in row:
            seconds["plain"].append(cpu_seconds(plain)[0] / few)
    row["redan_cpu_seconds_an_image"] = round(statistics.median(seconds["redan"]), 5)
    if seconds["plain"]:
        row["plain_cpu_seconds_an_image"] = round(statistics.median(seconds["plain"]), 5)
        pairs = zip(seconds["plain"], seconds["redan"], strict=True)
        row["ratio"] = round(statistics.median(p / r for p, r in pairs), 1)
    return row


def dear(network: str, bound: str, batch: int) -> bool:
    """Whether it takes minutes and is left out unless its batch is asked for."""
    many = 1 if network == "conv-med" else 0
    return (bound == "alpha-crown" and batch > many) or (network == "conv-med-big" and bound == "crown" and batch > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", choices=tuple(RADII), nargs="+", default=list(RADII))
    parser.add_argument("--bounds", choices=tuple(BOUNDS), nargs="+", default=list(BOUNDS))
    parser.add_argument("--batches", type=int, nargs="+", help="images at once (1 and 100, without what takes minutes)")
    parser.add_argument("--weights", type=Path, help="COLT's MNIST network, a state dict; random weights if not given")
    parser.add_argument("--weights-big", metavar="RUN", help="run folder of a ConvMedBig; random weights if not given")
    parser.add_argument("--plain-images", type=int, default=1, help="that the plain one bounds; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    rows, cases = [], {}
    for name in args.networks:
        it = case(name, max(args.batches or [100]), args.weights, args.weights_big)
        cases[name] = it.what
        dense = Dense(it.network) if args.plain_images else None
        for bound in args.bounds:
            for batch in args.batches or [b for b in (1, 100) if not dear(name, bound, b)]:
                rows.append(measure(name, it, dense, bound, batch, args))
                print({key: value for key, value in rows[-1].items() if value is not None}, flush=True)
    compared = sorted((row for row in rows if row["ratio"]), key=lambda row: row["bound"] != "crown")
    main_row = compared[0] if compared else {"ratio": None}
    result = {
        "benchmark": "certify",
        "ratio": main_row["ratio"],
        "ratio_of": {key: main_row.get(key) for key in ("network", "bound", "batch")},
        "rows": rows,
        "networks": cases,
        "rounds": args.rounds,
        "machine": machine(),
    }
    print(json.dumps(result) if args.json else f"ratio {result['ratio']}; {cases}; {result['machine']}")


if __name__ == "__main__":
    main()
