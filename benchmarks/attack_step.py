"""PGD on one batch: redan beside the plain implementation, which leaves the model in training mode.

python benchmarks/attack_step.py --network resnet18 --json
"""

from typing import Any

import plain
import torch
from common import RADIUS, STEP_SIZE, arguments, batch, interleaved, network, publish

from redan.attacks import PGD, SearchModel
from redan.threats import Linf


def main() -> None:
    args = arguments(__doc__ or "")
    seconds = {}
    for name in args.network:
        images, labels = batch(args.batch)
        model, ours = network(name), network(name)
        search = SearchModel(ours, precision=args.precision, compile=args.compile)
        attack = PGD(Linf(RADIUS), steps=args.steps, step_size=STEP_SIZE, drop_broken=False)

        def run_plain(model: Any = model, images: Any = images, labels: Any = labels) -> None:
            plain.attack(model.train(), images, labels, RADIUS, STEP_SIZE, args.steps)

        def run_redan(search: Any = search, attack: Any = attack, images: Any = images, labels: Any = labels) -> None:
            search.refresh()  # as in training, where the weights have moved since the last batch
            attack(search, images, labels)

        seconds[name] = interleaved(run_plain, run_redan, args.rounds)
    publish("attack_step", args, seconds)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
