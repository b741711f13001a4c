"""Does the fast path cost accuracy? One recipe trained by redan and by the plain implementation, evaluated alike.

Both train the same network, on the same images in the same order, with the same learning rates and the attack in
evaluation mode; they differ in arithmetic, folding and memory layout, and in the draws of the random starts.

    python benchmarks/accuracy.py --path plain --data-dir DIR --json
"""

import argparse
import json
import time
from pathlib import Path

import plain
import torch

import redan
from redan.data.pipeline import Augmentation, TrainingBatches
from redan.data.registry import load_dataset
from redan.recipes.build import build, image_size, split
from redan.training.optim import build_optimizer, learning_rate_factor


def train_plainly(recipe: redan.Recipe, data_dir: Path | None) -> torch.nn.Module:
    """The recipe's PGD-AT with the plain step; the last weights."""
    dataset = load_dataset(recipe.data.name, data_dir)
    training, _ = split(recipe, dataset)
    network = build(recipe, dataset.facts).deployed()
    augmentation = Augmentation(image_size(recipe, dataset.facts), recipe.data.padding, recipe.data.flip)
    device = torch.device("cpu")
    batches = TrainingBatches(training, recipe.batch_size, augmentation, seed=recipe.seed, device=device)
    optimizer = build_optimizer(recipe.optimizer, network.parameters())
    attack = (recipe.parsed_threat().radius, recipe.attack.step_size, recipe.attack.steps)
    torch.manual_seed(recipe.seed)
    for epoch in range(recipe.epochs):
        losses = []
        for step, batch in enumerate(batches.epoch(epoch)):
            factor = learning_rate_factor(recipe.schedule, epoch + step / len(batches), recipe.epochs)
            for group in optimizer.param_groups:
                group["lr"] = recipe.optimizer.lr * factor
            network.eval()
            adversarial = plain.attack(network, batch.images, batch.labels, *attack)
            network.train()
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(adversarial), batch.labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{recipe.epochs}: loss {sum(losses) / len(losses):.4f}", flush=True)
    return network.eval()


def main() -> None:
    """Train by one path, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", choices=("fast", "plain"), required=True)
    parser.add_argument("--recipe", default="pgd-at-cifar10-mini")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("runs") / "accuracy-fast", help="run folder of the fast path")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    overrides = {"seed": args.seed} | ({"epochs": args.epochs} if args.epochs else {})
    recipe = redan.load_recipe(args.recipe, overrides)
    started = time.perf_counter()
    subject: torch.nn.Module
    if args.path == "fast":
        subject = redan.load(redan.train(recipe, args.out, data_dir=args.data_dir), "last")
    else:
        subject = train_plainly(recipe, args.data_dir)
    minutes = (time.perf_counter() - started) / 60
    result = redan.evaluate(
        subject, data=recipe.data.name, data_dir=args.data_dir, threat=recipe.threat, samples=args.samples, curve=False
    )
    row = {
        "path": args.path,
        "recipe": recipe.name,
        "epochs": recipe.epochs,
        "seed": recipe.seed,
        "threads": torch.get_num_threads(),
        "training_minutes": round(minutes, 1),
        "samples": result.samples,
        "clean": str(result.clean),
        "robust": str(result.robust),
        "attack": result.attack,
    }
    if args.json:
        print(json.dumps(row))
    else:
        print("\n".join(f"{key:>18}: {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
