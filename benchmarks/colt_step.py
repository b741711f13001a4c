"""CPU-seconds of one training iteration of COLT, in each of its phases: ConvMedBig, batches of 100 CIFAR-sized images.

python benchmarks/colt_step.py --json

``ratio`` is the least, over phases, of the public code's seconds over redan's while the losses of two phases are mixed,
as the public code always has them.
"""

import argparse
import json
import statistics
import time

import torch
from common import batch, machine

from redan.attacks.pgd import PGD
from redan.data.types import Batch
from redan.methods.base import Adversary, OptimizerConfig, Phase, ScheduleConfig
from redan.methods.colt import COLT
from redan.methods.targets import LabelSmoothing
from redan.models.norms import Normalise
from redan.models.registry import build_model
from redan.threats import Linf
from redan.training.hardware import resolved

RADIUS = 2 / 255

# CPU-seconds of the public code (eth-sri/colt) for one iteration, less some 4 of start-up; of "layer 2" none known.
PUBLIC = {"input": 18 - 4, "layer 4": 45 - 4, "layer 6": 47 - 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--projections", type=int, default=50)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = batch(args.batch)
    data = Batch(images, labels, torch.arange(len(labels)))
    normalise = Normalise((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    network = build_model("convmedbig", normalise, in_channels=3, size=32, classes=10)
    adversary = Adversary(PGD(Linf(RADIUS), 7, RADIUS / 4, drop_broken=False), precision=args.precision)
    method = COLT(network, adversary=adversary, targets=LabelSmoothing(), projections=args.projections)
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    bfloat16 = resolved(args.precision, torch.device("cpu")) == "bfloat16"
    rows: dict[str, float] = {}
    for phase in method.phases(Phase("training", 200, OptimizerConfig(lr=1e-3), ScheduleConfig())):
        method.enter(phase)
        method.zero_grad()
        optimizer = torch.optim.SGD([it for it in method.parameters() if it.requires_grad], lr=1e-3, momentum=0.9)
        for part, done in (("mixing", 30.0), ("mixed", 60.0)):
            begins = 200 * len({name.split(",")[0] for name in rows} - {phase.name})
            seconds = []
            for i in range(args.rounds + 1):
                method.before_step(begins + done, torch.Generator().manual_seed(i))
                started = time.process_time()
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    loss = method(data).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seconds.append(time.process_time() - started)
            rows[f"{phase.name}, {part}"] = round(statistics.median(seconds[1:]), 3)
    ratio = round(min(seconds / rows[f"{phase}, mixing"] for phase, seconds in PUBLIC.items()), 1)
    if args.json:
        document = {"benchmark": "colt_step", "ratio": ratio, "cpu_seconds": rows, "public_cpu_seconds": PUBLIC}
        print(json.dumps(document | vars(args) | {"machine": machine()}))
        return
    print(f"colt_step, ratio {ratio}, {vars(args)}, {machine()}")
    for name, seconds_ in rows.items():
        print(f"{name:>20}: {seconds_} CPU-s")


if __name__ == "__main__":
    main()
