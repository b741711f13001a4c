"""A run folder seen from outside: what was trained, and its network."""

import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from redan.data.types import Dataset, Facts
from redan.errors import UserError
from redan.methods.atop import AToP
from redan.methods.base import Method, Phase
from redan.methods.colt import COLT
from redan.methods.dpls import DPLS, Measure
from redan.methods.targets import LabelSmoothing, Targets
from redan.models.purified import Purified
from redan.recipes.build import build, positions, training_labels
from redan.recipes.schema import NamedOptions, Recipe, load_recipe
from redan.tensors import below, load_tensors

Checkpoint = Literal["best", "last"]

WEIGHTS = {"best": "model.safetensors", "last": "model-last.safetensors"}
STATE = Path("checkpoint") / "state.safetensors"


def read_run(run: str | Path, checkpoint: Checkpoint = "best") -> tuple[Recipe, Facts, nn.Module]:
    """The recipe of a run, the facts of its images, and its deployed network in evaluation mode.

    Raises:
        UserError: where the folder is not a run, has no weights yet, or they are damaged.
    """
    recipe, facts, tensors = _read_weights(run, checkpoint)
    try:
        network = build(recipe, facts).deployed()
        network.load_state_dict(tensors)
    except (ValueError, RuntimeError) as error:
        raise _misfit(Path(run) / WEIGHTS[checkpoint], error) from error
    return recipe, facts, network.eval()


def read_facts(run: str | Path) -> tuple[Recipe, Facts]:
    """The recipe of a run and the facts of its images.

    Raises:
        UserError: where the folder is not a run, has no weights yet, or they are damaged.
    """
    recipe, facts, _ = _read_weights(run, "last")
    return recipe, facts


def _read_weights(run: str | Path, checkpoint: Checkpoint) -> tuple[Recipe, Facts, dict[str, Tensor]]:
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is a file, not a run folder" if folder.exists() else f"there is no run folder {folder}"
        )
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder} is not a run folder: it has no recipe.yaml")
    path = folder / WEIGHTS[checkpoint]
    if not path.exists():
        other = "; --checkpoint last is there" if (folder / WEIGHTS["last"]).exists() else ""
        raise UserError(f"{folder} has no {checkpoint} weights yet: {path.name} comes with the first validation{other}")
    recipe = load_recipe(folder)
    tensors, metadata = load_tensors(path)
    try:
        return recipe, Facts.from_json(metadata["facts"]), tensors
    except (KeyError, TypeError, ValueError) as error:
        raise _misfit(path, error) from error


def _misfit(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} does not fit its recipe: {str(error).splitlines()[-1].strip()}")


def read_method(run: str | Path, dataset: Dataset) -> tuple[Method, float]:
    """The whole method of a run as its last checkpoint left it, and how many epochs are done.

    Raises:
        UserError: where the folder is not a run, has no checkpoint yet, or one that is damaged.
    """
    recipe, facts = read_facts(run)
    path = Path(run) / STATE
    tensors, place = load_tensors(path)
    targets = build_targets(recipe, dataset, begun=True)
    method = build(recipe, facts, targets=targets, precision=recipe.attack.precision)
    try:
        method.load_state_dict(below("method/", tensors))
    except RuntimeError as error:
        raise _misfit(path, error) from error
    end = 0
    for phase in method.phases(Phase("training", recipe.epochs, recipe.optimizer, recipe.schedule)):
        if place["epoch"] >= end:  # the phase that the checkpoint lies in; the last, at the very end
            method.enter(phase)
        end += phase.epochs
    return method, float(place["epoch"])


def read_difficulty(
    run: str | Path, dataset: Dataset, *, measure: Measure | None = None, given_labels: bool = False
) -> Tensor:
    """How hard each training image of the data set was in a run with DPLS: ``(images,)`` in [0, 1], or NaN.

    Args:
        run: the run folder.
        dataset: that the run is on.
        measure: that the run must have taken; any if None.
        given_labels: also of images that the run had given a wrong label, which NaN stands for otherwise.

    Raises:
        UserError: where the folder is no such run, one on other data, or one that has measured nothing yet.
    """
    recipe, _ = read_facts(run)
    if recipe.dpls is None:
        raise UserError(f"{run} did not measure difficulty; train it with -o dpls.scale=0")
    if recipe.data.name != dataset.name:
        raise UserError(f"{run} is a run on {recipe.data.name}, not on {dataset.name}")
    if measure is not None and recipe.dpls.difficulty != measure:
        raise UserError(f"{run} measured {recipe.dpls.difficulty}, and {measure} is asked for; the two do not mix")
    targets = build_targets(recipe, dataset, begun=True)
    assert isinstance(targets, DPLS)
    tensors, place = load_tensors(Path(run) / STATE)
    # Of the method that trained, not of an average around it.
    marked = {k.rpartition("targets.")[2]: v for k, v in tensors.items() if "targets." in k and "average." not in k}
    targets.load_state_dict(marked)
    difficulty = targets.difficulty(unknown=torch.nan)
    if difficulty.isnan().all():
        raise UserError(f"{run} has measured no difficulty yet: no epoch after dpls.first is done")
    if not recipe.dpls.sources and place["epoch"] < min(recipe.dpls.warmup, recipe.epochs):
        warnings.warn(
            f"{run} is in its warm-up, at epoch {place['epoch'] + 1}: its difficulty may change", stacklevel=2
        )
    chosen, _ = positions(recipe, dataset)
    if not given_labels:
        right = training_labels(recipe, dataset, chosen) == dataset.train.labels[chosen]
        difficulty = difficulty.where(right, torch.nan)
    found = torch.full((len(dataset.train),), torch.nan)
    found[chosen] = difficulty
    return found


def build_targets(recipe: Recipe, dataset: Dataset, *, begun: bool = False) -> Targets:
    """The target-maker that a recipe asks for, on its training images.

    Args:
        recipe: that asks.
        dataset: that it trains on.
        begun: whether its state comes from a checkpoint, so that the runs it took difficulties from are not needed.

    Raises:
        UserError: where a run that it takes difficulties from is none, or they know less than half of its images.
    """
    if recipe.dpls is None:
        return LabelSmoothing(recipe.label_smoothing)
    chosen, _ = positions(recipe, dataset)
    known = None
    if recipe.dpls.sources and begun:
        known = torch.full((len(chosen),), torch.nan)
    elif recipe.dpls.sources:
        measure = recipe.dpls.difficulty
        found = [read_difficulty(source, dataset, measure=measure) for source in recipe.dpls.sources]
        known = torch.stack(found).nanmean(0)[chosen]
        unknown = int(known.isnan().sum())
        if 2 * unknown > len(known):
            raise UserError(
                f"dpls.sources know {len(known) - unknown} of the {len(known)} images that this recipe trains on; "
                "train them and it on the same images, by the same data.indices or the same seed"
            )
        if unknown:
            warnings.warn(
                f"{unknown} of {len(known)} training images are known to none of dpls.sources and count as hard as the "
                "mean of the others",
                stacklevel=2,
            )
    return DPLS(recipe.dpls, training_labels(recipe, dataset, chosen), known=known, seed=recipe.seed)


def take_over(method: Method, recipe: Recipe, dataset: Dataset) -> None:
    """Give a method that is to begin what its recipe takes from other runs: a network, a classifier, a purifier.

    Raises:
        UserError: where such a run is none, or its network is not the one that the recipe describes.
    """
    if isinstance(method, COLT) and method.trained_network is not None:
        _fill(method.network, _trained_network(method.trained_network, recipe, dataset), method.trained_network)
    if recipe.purification is None:
        return
    assert isinstance(method, AToP)
    if (source := recipe.purification.trained_classifier) is not None:
        _fill(method.pipeline.classifier, _trained_network(source, recipe, dataset), source)
    if (source := recipe.purification.trained_purifier) is not None:
        other, done = read_method(source, dataset)
        described = load_recipe(source).purification
        if not isinstance(other, AToP) or described is None:
            raise UserError(f"purification.trained_purifier: {source} trained no purifier")
        before = described.classifier_training.epochs + described.pretraining.epochs
        if done < before and described.trained_purifier is None:
            raise UserError(
                f"purification.trained_purifier: {source} has not finished training its purifier: go on with "
                f"redan train {source} --out {source} --resume"
            )
        _check_alike("purifier", described.purifier, recipe.purification.purifier, source)
        _fill(method.pipeline.purifier, other.pipeline.purifier, source)
        if method.discriminator is not None:
            if other.discriminator is None:
                raise UserError(
                    f"purification.trained_purifier: {source} trained no discriminator to go on with; set "
                    "purification.discriminator to null"
                )
            _fill(method.discriminator, other.discriminator, source)


def _trained_network(source: str, recipe: Recipe, dataset: Dataset) -> nn.Module:
    """The network that a run trained, the classifier alone of a purified one; a like one to the recipe's."""
    trained, facts, network = read_run(source)
    _check_alike("model", trained.model, recipe.model, source)
    if facts != dataset.facts:
        raise UserError(
            f"{source} is a run on {trained.data.name}, whose classes or normalisation are not those of "
            f"{recipe.data.name}"
        )
    return network.classifier if isinstance(network, Purified) else network


def _check_alike(kind: str, trained: NamedOptions, asked: NamedOptions, source: str) -> None:
    """Raise UserError unless a run trained what is asked for: strides and heads, say, leave no trace in weights."""
    if trained != asked:
        raise UserError(f"{source} trained {kind} {trained}, and this recipe describes {asked}")


def _fill(module: nn.Module, trained: nn.Module, source: str) -> None:
    """Copy the weights and statistics of a module into a like one."""
    try:
        module.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"what {source} trained is not what this recipe describes: {reason}") from error


def load(run: str | Path, checkpoint: Checkpoint = "best") -> nn.Module:
    """The network that a run trained: images ``(n, c, h, w)`` in [0, 1] to logits ``(n, classes)``.

    Args:
        run: the run folder.
        checkpoint: ``best`` by accuracy on the held-out images, or ``last``.

    Raises:
        UserError: where the folder is not a run, has no weights yet, or they are damaged.
    """
    return read_run(run, checkpoint)[2]
