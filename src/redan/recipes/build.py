"""From a recipe to the objects it names."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from redan.attacks.pgd import PGD
from redan.attacks.search import Precision
from redan.data.indices import read_indices
from redan.data.pipeline import balanced_subset, split_validation
from redan.data.types import Dataset, Facts, ImageSet
from redan.errors import UserError
from redan.methods.base import Adversary, Method
from redan.methods.registry import METHODS, build_method
from redan.methods.targets import LabelSmoothing, Targets
from redan.methods.weight_averaging import WeightAveraging
from redan.methods.weight_perturbation import WeightPerturbation
from redan.models.norms import Normalise
from redan.models.purified import Purified
from redan.models.purifiers.discriminator import PatchDiscriminator
from redan.models.purifiers.registry import build_purifier
from redan.models.random_transforms import build_transform
from redan.models.registry import build_model
from redan.recipes.schema import NamedOptions, PurificationConfig, Recipe
from redan.seeds import derive_seed, generator


def positions(recipe: Recipe, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Where in the data set's training images those lie that a recipe trains on and holds out, by its seed: int64."""
    config, labels = recipe.data, dataset.train.labels
    seed = derive_seed(recipe.seed, "split")
    allowed = dataset.exact
    chosen: Tensor
    if config.validation_samples:
        chosen, held_out = split_validation(labels, config.validation_samples, seed, allowed)
    else:
        chosen, held_out = torch.arange(len(labels)), torch.empty(0, dtype=torch.int64)
    if config.indices is not None:
        indexed = read_indices(config.indices, dataset)
        chosen = indexed[torch.isin(indexed, chosen)]
        if not len(chosen):
            raise UserError(f"data.indices: all images in {config.indices} are held out for validation, none is left")
    if config.train_samples is not None:
        permitted = None if allowed is None else allowed[chosen]
        chosen = chosen[balanced_subset(labels[chosen], config.train_samples, seed, permitted)]
    return chosen, held_out


def split(recipe: Recipe, dataset: Dataset) -> tuple[ImageSet, ImageSet]:
    """The training images that a recipe chooses, with the labels it gives them, and the held-out validation images."""
    chosen, held_out = positions(recipe, dataset)
    if recipe.data.indices is not None:
        indexed = read_indices(recipe.data.indices, dataset)
        if lost := int(torch.isin(indexed, held_out).sum()):
            warnings.warn(
                f"{lost} of the {len(indexed)} images in {recipe.data.indices} are held out for validation and not "
                "trained on",
                stacklevel=2,
            )
    training = ImageSet(dataset.train.images[chosen], training_labels(recipe, dataset, chosen))
    return training, dataset.train.subset(held_out)


def training_labels(recipe: Recipe, dataset: Dataset, chosen: Tensor) -> Tensor:
    """The labels, int64 ``(n,)``, that a recipe trains the images at ``chosen`` with: right but for a share."""
    labels, share = dataset.train.labels[chosen], recipe.data.wrong_labels
    if share:
        draws = generator(recipe.seed, "wrong labels")
        order = torch.randperm(len(labels), generator=draws)
        order = order[labels[order].argsort(stable=True)]  # class after class, at random within each
        due = (share * torch.arange(len(labels) + 1, dtype=torch.float64)).round()
        wrong = order[due.diff() > 0]  # spread evenly along it: each class has its share of them, within one
        classes = len(dataset.class_names)
        labels[wrong] = (labels[wrong] + torch.randint(1, classes, (len(wrong),), generator=draws)) % classes
    return labels


def image_size(recipe: Recipe, facts: Facts) -> int:
    """Side of the images that the network sees: the crop's, or the data set's."""
    size = recipe.data.crop or facts.size
    if size > facts.size:  # validation and evaluation take the middle of an image, where there is no padding
        raise UserError(f"data.crop: {size} is more than the {facts.size} pixels of an image's side")
    return size


def _network(recipe: Recipe, facts: Facts, named: NamedOptions, part: str) -> nn.Module:
    """A fresh network, initialised by the recipe's seed for this part."""
    with _initialised(recipe, part):
        return build_model(
            named.name,
            Normalise(facts.mean, facts.std),
            in_channels=facts.channels,
            size=image_size(recipe, facts),
            classes=facts.classes,
            **named.options,
        )


@contextmanager
def _initialised(recipe: Recipe, part: str) -> Iterator[None]:
    """What is drawn inside is drawn by the recipe's seed for this part."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, part))
        yield


def _purified(
    recipe: Recipe, facts: Facts, config: PurificationConfig, classifier: nn.Module
) -> tuple[Purified, PatchDiscriminator | None]:
    """The classifier behind a fresh purifier, and a fresh discriminator if the recipe asks for one."""
    shape = {"channels": facts.channels, "size": image_size(recipe, facts)}
    transform = build_transform(config.transform.name, size=shape["size"], **config.transform.options)
    with _initialised(recipe, "purifier"):
        purifier = build_purifier(config.purifier.name, **shape, **config.purifier.options)
    discriminator = None
    if config.discriminator is not None:
        with _initialised(recipe, "discriminator"):
            discriminator = PatchDiscriminator(**shape, width=config.discriminator)
    return Purified(transform, purifier, classifier, votes=config.votes), discriminator


def build(
    recipe: Recipe,
    facts: Facts,
    *,
    targets: Targets | None = None,
    precision: Precision = "auto",
    compile: bool = False,
) -> Method:
    """The method of a recipe around fresh networks, initialised by the recipe's seed.

    Args:
        recipe: what to build.
        facts: of the images that the network is for.
        targets: that the recipe asks for, see ``redan.run.build_targets``; without them it smooths uniformly, which is
            enough for who wants the network alone.
        precision: of the training attack.
        compile: whether the attack's search copy is compiled.
    """
    family, config = METHODS[recipe.method.name], recipe.attack
    network: nn.Module = _network(recipe, facts, recipe.model, "weights")
    parts: dict[str, Any] = {}
    if family.takes_teacher:
        parts["teacher"] = _network(recipe, facts, recipe.teacher or recipe.model, "teacher")
    if recipe.purification is not None:
        network, parts["discriminator"] = _purified(recipe, facts, recipe.purification, network)
        parts["config"] = recipe.purification
    adversary = None
    if family.attacks:
        attack = PGD(
            recipe.parsed_threat(),
            steps=config.steps,
            step_size=config.step_size,
            objective=family.attack_objective,
            start=config.start or family.attack_start,
            drop_broken=False,
        )
        adversary = Adversary(attack, config.mode, config.bn_momentum_in_attack, precision, compile)
    targets = LabelSmoothing(recipe.label_smoothing) if targets is None else targets
    with _initialised(recipe, "method"):  # what a method adds to its networks
        method: Method = build_method(
            recipe.method.name, network, adversary=adversary, targets=targets, parts=parts, **recipe.method.options
        )
    if recipe.weight_perturbation is not None:
        method = WeightPerturbation(method, recipe.weight_perturbation)
    if recipe.weight_averaging is not None:
        method = WeightAveraging(method, recipe.weight_averaging)
    return method
