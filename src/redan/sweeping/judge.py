"""What of a run's held-out images can be certified."""

from pathlib import Path

import torch

from redan.certification.verifier import Robustness, Verifier
from redan.data.pipeline import center_crop, to_float
from redan.data.registry import load_dataset
from redan.evaluation.certify import graph_of
from redan.evaluation.results import Accuracy
from redan.recipes.build import image_size, split
from redan.run import read_run

BATCH = 50


def certified(run: Path, verifier: Verifier, data_dir: Path | None) -> Accuracy:
    """The share of a run's held-out images that its shipped weights classify rightly and the verifier certifies.

    Raises:
        UserError: where the network cannot be read as a graph.
    """
    recipe, facts, model = read_run(run)
    dataset = load_dataset(recipe.data.name, data_dir)
    _, held_out = split(recipe, dataset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    everything = center_crop(to_float(held_out.images), image_size(recipe, facts))
    model = model.to(device)
    classes = len(dataset.class_names)
    network = graph_of(model, tuple(everything.shape[1:]), classes).to(device=device)
    proved = 0
    for places in torch.arange(len(held_out)).split(BATCH):
        images, labels = everything[places].to(device), held_out.labels[places].to(device)
        with torch.no_grad():
            right = model(images).argmax(1) == labels
        if right.any():
            mine = places[right.cpu()]
            question = Robustness(
                model, images[right], labels[right], mine, recipe.parsed_threat(), classes=classes, seed=0
            )
            proved += sum(verdict.outcome == "certified" for verdict in verifier(network, question))
    return Accuracy.of(proved, len(held_out))
