"""The evidence behind AR-AT (Waseda, Chang & Echizen, ICLR 2025), for a run of any method.

Gradient conflict on training batches, from where the last checkpoint is; branches and their invariance on test images.
"""

import copy
import time
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redan.analysis.progress import progress_bar
from redan.analysis.results import ANALYSIS, AS_TRAINED, Analysis, BranchFound, ConflictFound, NormGap, Spread
from redan.attacks.pgd import PGD
from redan.attacks.search import SearchModel
from redan.data.pipeline import Augmentation, TrainingBatches, center_crop, to_float
from redan.data.registry import load_dataset
from redan.data.types import Batch, ImageSet
from redan.errors import UserError
from redan.evaluation.results import Accuracy
from redan.methods.arat import ARAT, cosine_distance
from redan.methods.base import Method, Wrapper
from redan.methods.conflict import Conflict, conflict
from redan.methods.weight_averaging import WeightAveraging
from redan.models.purified import FixedDraw, Purified
from redan.models.split_norm import SplitBatchNorm2d
from redan.models.taps import HeadTap
from redan.recipes.build import image_size, split
from redan.run import read_facts, read_method
from redan.seeds import generator
from redan.training.hardware import resolved
from redan.version import __version__

ATTACK_STEPS = 20  # of the PGD on test images
PART = 250  # test images at a time


def analyse(
    run: str | Path,
    *,
    samples: int | None = None,
    batches: int = 20,
    seed: int = 0,
    data_dir: str | Path | None = None,
    progress: bool = True,
) -> Analysis:
    """Look inside a run, and keep what is found as its ``analysis.json``.

    Args:
        run: a run folder; its last checkpoint is analysed.
        samples: the first so many test images, in order; all if None.
        batches: training batches on which gradients are compared, at least 1.
        seed: of the batches and attacks.
        data_dir: the folder of data sets.
        progress: show it on standard error.

    Returns:
        The analysis.

    Raises:
        UserError: where the folder is not a run with a checkpoint, or a number is out of range.
    """
    started = time.perf_counter()
    folder = Path(run)
    recipe, facts = read_facts(folder)
    dataset = load_dataset(recipe.data.name, Path(data_dir) if data_dir is not None else None)
    method, epoch = read_method(folder, dataset)
    number = len(dataset.test) if samples is None else samples
    if not 1 <= number <= len(dataset.test):
        raise UserError(f"--samples is from 1 to {len(dataset.test)}, the test images there are; got {samples}")
    if batches < 1:
        raise UserError(f"--batches is at least 1, got {batches}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = image_size(recipe, facts)
    augmentation = Augmentation(size, recipe.data.padding, recipe.data.flip)
    training, _ = split(recipe, dataset)
    drawn = TrainingBatches(training, recipe.batch_size, augmentation, seed=seed, device=device)
    attack = PGD(recipe.parsed_threat(), steps=ATTACK_STEPS, drop_broken=False)
    test = dataset.test.subset(torch.arange(number))

    bar = progress_bar(show=progress)
    with bar:
        # The test images come first: training passes move BatchNorm's statistics.
        parts = list(_parts(test, size, device))
        branches = {}
        for name, network in _branches(method).items():
            network = _at_one_draw(network, parts[0][0], seed)
            branches[name] = _branch(network, attack, bar.track(parts, description=f"BatchNorm {name}"), seed)
        core = _unwrapped(method, ships=True)
        gaps = _norm_gaps(core.trained())
        conflicts: dict[str, list[Conflict]] = {}
        training_batches = islice(_endless(drawn), batches)
        for i, batch in enumerate(bar.track(training_batches, total=batches, description="gradient conflict")):
            method.train()
            method.before_step(epoch, generator(seed, "analyse", i))
            with torch.autocast(device.type, torch.bfloat16, enabled=resolved(recipe.precision, device) == "bfloat16"):
                found = _conflicts(method, batch)
            if not found:
                break  # a loss of one part has none on any batch
            for name, one in found.items():
                conflicts.setdefault(name, []).append(one)
    result = Analysis(
        redan_version=__version__,
        run=folder.resolve().name,
        checkpoint="last",
        method=recipe.method.name,
        threat=recipe.threat,
        attack=f"pgd-{ATTACK_STEPS}",
        seed=seed,
        batches=batches,
        batch_size=recipe.batch_size,
        samples=number,
        conflicts={
            name: ConflictFound(
                share=_spread(torch.tensor([one.share for one in several])),
                cosine=_spread(torch.tensor([one.cosine for one in several])),
            )
            for name, several in conflicts.items()
        },
        branches=branches,
        shipped=core.deploy_branch if isinstance(core, ARAT) and core.split_bn else "shared",
        norm_gaps=gaps,
        seconds=round(time.perf_counter() - started, 3),
    )
    result.save(folder / ANALYSIS)
    return result


def _parts(images: ImageSet, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(images), PART):
        part = slice(start, start + PART)
        yield center_crop(to_float(images.images[part].to(device)), size), images.labels[part].to(device)


def _endless(batches: TrainingBatches) -> Iterator[Batch]:
    for epoch in count():
        yield from batches.epoch(epoch)


def _unwrapped(method: Method, *, ships: bool) -> Method:
    """The method inside all wrappers: the one that ships, where they average, or the one that trains."""
    while isinstance(method, Wrapper):
        method = method.average if ships and isinstance(method, WeightAveraging) else method.inner
    return method


def _branches(method: Method) -> dict[str, nn.Module]:
    """The networks that can be shipped, by branch."""
    core = _unwrapped(method, ships=True)
    if isinstance(core, ARAT) and core.split_bn:
        return {"adversarial": core.branch("adversarial"), "clean": core.branch("clean")}
    return {"shared": method.deployed()}


def _at_one_draw(network: nn.Module, images: Tensor, seed: int) -> nn.Module:
    """A network that purifies with one draw of its transform, the same for all images; any other as it is."""
    if not isinstance(network, Purified):
        return network
    return FixedDraw(network, [network.transform.sample(images[:1], generator(seed, "analyse", "draw"))])


@torch.no_grad()
def _branch(network: nn.Module, attack: PGD, parts: Iterable[tuple[Tensor, Tensor]], seed: int) -> BranchFound:
    network = copy.deepcopy(network).eval()
    search, head = SearchModel(network), HeadTap(network)
    right, cosines, distances = [], [], []
    for i, (images, labels) in enumerate(parts):
        attacked = attack.run(search, images, labels, generator(seed, "analyse", "test", i)).images
        with head.listening() as features:
            logits = [network(images), network(attacked)]
        right.append(torch.stack([one.argmax(1) == labels for one in logits]))
        cosines.append(F.cosine_similarity(features[0], features[1], dim=1))
        distances.append((features[1] - features[0]).norm(dim=1))
    clean, robust = torch.cat(right, 1)
    return BranchFound(
        clean=Accuracy.of(int(clean.sum()), len(clean)),
        robust=Accuracy.of(int((clean & robust).sum()), len(clean)),
        cosine=_spread(torch.cat(cosines)),
        distance=_spread(torch.cat(distances)),
    )


def _norm_gaps(network: nn.Module) -> tuple[NormGap, ...]:
    gaps = []
    for name, pair in network.named_modules():
        if isinstance(pair, SplitBatchNorm2d) and pair.clean.running_mean is not None:
            means = [norm.get_buffer("running_mean") for norm in (pair.adversarial, pair.clean)]
            variances = [norm.get_buffer("running_var") + norm.eps for norm in (pair.adversarial, pair.clean)]
            mean = ((means[0] - means[1]).abs() / variances[1].sqrt()).mean()
            scale = ((variances[0] / variances[1]).log().abs() / 2).mean()
            gaps.append(NormGap(layer=name, mean=float(mean), scale=float(scale)))
    return tuple(gaps)


def _conflicts(method: Method, batch: Batch) -> dict[str, Conflict]:
    """On one training batch against the training attack; the halves at the weights themselves, without AWP."""
    attacked = method.perturb(batch)
    terms = method.loss(batch, attacked).terms
    if terms is None:
        return {}
    classification, network = terms["classification"], method.trained()
    found = {AS_TRAINED: conflict(classification, terms["invariance"], network)}
    core = _unwrapped(method, ships=False)
    if isinstance(core, ARAT):
        passes = core.passes(batch, attacked)
        for name, half in (
            ("towards clean", cosine_distance(passes.z_adversarial, _still(passes.z))),
            ("towards adversarial", cosine_distance(passes.z, _still(passes.z_adversarial))),
        ):
            found[name] = conflict(classification, half, network)
    return found


def _still(z: dict[str, Tensor]) -> dict[str, Tensor]:
    return {layer: features.detach() for layer, features in z.items()}


def _spread(values: Tensor) -> Spread:
    deviation = float(values.double().std()) if len(values) > 1 else 0.0
    return Spread(mean=float(values.double().mean()), deviation=deviation, n=len(values))
