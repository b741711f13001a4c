"""One whole step of PGD adversarial training: redan beside the plain implementation.

python benchmarks/train_step.py --network resnet18 --json
"""

from typing import Any

import plain
import torch
from common import RADIUS, STEP_SIZE, arguments, batch, interleaved, network, publish

from redan.attacks import PGD
from redan.attacks.search import has_fast_bfloat16
from redan.data.types import Batch
from redan.methods.base import Adversary
from redan.methods.pgd_at import PGDAT
from redan.methods.targets import LabelSmoothing
from redan.threats import Linf


def main() -> None:
    args = arguments(__doc__ or "")
    bfloat16 = args.precision == "bfloat16" or (args.precision == "auto" and has_fast_bfloat16(torch.device("cpu")))
    seconds = {}
    for name in args.network:
        images, labels = batch(args.batch)
        model = network(name).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

        attack = PGD(Linf(RADIUS), steps=args.steps, step_size=STEP_SIZE, drop_broken=False)
        adversary = Adversary(attack, precision=args.precision, compile=args.compile)
        method: Any = PGDAT(network(name), adversary=adversary, targets=LabelSmoothing())
        method = method.to(memory_format=torch.channels_last).train()
        ours = torch.optim.SGD(method.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        data = Batch(images, labels, torch.arange(len(labels)))

        def run_plain(model: Any = model, optimizer: Any = optimizer, data: Batch = data) -> None:
            plain.training_step(model, optimizer, data.images, data.labels, RADIUS, STEP_SIZE, args.steps)

        def run_redan(method: Any = method, optimizer: Any = ours, data: Batch = data) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = method(data).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

        seconds[name] = interleaved(run_plain, run_redan, args.rounds)
    publish("train_step", args, seconds)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
