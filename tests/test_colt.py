"""COLT against its definition: regions, attack, loss and phases; and whole runs of it."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import redan
from redan.attacks.base import Attack
from redan.attacks.pgd import FGSM, PGD
from redan.certification.cauchy import estimate_bounds, lines
from redan.certification.chain import read_chain
from redan.certification.interval import Interval
from redan.certification.latent import Latent
from redan.certification.network import Network
from redan.certification.reading import read_network
from redan.certification.regions import Region, Specification
from redan.certification.zonotope import Zonotope, _Propagation
from redan.data.types import Batch, Facts
from redan.errors import UserError
from redan.methods import colt
from redan.methods.base import Adversary, OptimizerConfig, Phase, ScheduleConfig
from redan.methods.colt import COLT
from redan.methods.targets import LabelSmoothing
from redan.models.convnet import conv_med, conv_med_big, small_cnn
from redan.models.norms import Normalise
from redan.models.resnet import ResNet
from redan.recipes.build import build
from redan.recipes.schema import load_recipe
from redan.tensors import load_tensors
from redan.threats import L2, Linf
from redan.training import trainer
from redan.training.optim import build_optimizer, learning_rate_factor

EPS = 0.05
PLANNED = Phase("training", 10, OptimizerConfig(lr=0.1, weight_decay=0.01), ScheduleConfig())
NORMALISE = ([0.3], [0.4])


def batch(n: int = 4, seed: int = 0) -> Batch:
    draws = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 1, 8, 8, generator=draws)
    return Batch(images, torch.randint(4, (n,), generator=draws), torch.arange(n))


def tiny(big: bool = False) -> nn.Sequential:
    """ConvMedBig or ConvMed on 8x8 images, with 4 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decided: dict[str, Any] = {"in_channels": 1, "size": 8, "classes": 4, "hidden": 12}
        if big:
            return conv_med_big(Normalise(*NORMALISE), w1=1, w2=1, w3=1, **decided)
        return conv_med(Normalise(*NORMALISE), w1=1, w2=1, **decided)


def make(phase: str = "input", *, done: float = 0.0, network: nn.Module | None = None, **options: Any) -> COLT:
    """A method in a phase, before a step, so many epochs of the phase being done; phases have 10, of which 4 mix."""
    attack = PGD(Linf(EPS), steps=3, step_size=EPS / 4, drop_broken=False)
    method = COLT(
        network or tiny(),
        adversary=Adversary(attack, precision="float32"),
        targets=LabelSmoothing(),
        **{"mixing": 4.0, "projections": 20} | options,
    )
    stages = method.phases(PLANNED)
    names = [it.name for it in stages]
    method.enter(stages[names.index(phase)])
    method.before_step(10 * names.index(phase) + done, torch.Generator().manual_seed(7))
    return method


# Regions.


def graphs() -> dict[str, Network]:
    torch.manual_seed(0)
    normalise = Normalise(*NORMALISE)
    residual = ResNet(normalise, depths=(1, 1, 1, 1), classes=4, in_channels=1, width=2)
    return {"chain": read_network(tiny(big=True), (1, 8, 8)), "residual": read_network(residual, (1, 8, 8))}


@pytest.mark.parametrize("kind", ["chain", "residual"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_point_of_given_coefficients_is_the_exact_zonotopes(kind: str, depth: int) -> None:
    network = graphs()[kind]
    position = network.relus[depth - 1]
    region = Region.around(batch().images, Linf(EPS))
    exact = _Propagation(Network(network.layers[: position + 1]), region, "off", {}, given={})
    bounds = {i: exact.bounds[i] for i in network.bent if i < position}
    latent = Latent(network, region, bounds, position)
    coefficients = latent.start(torch.Generator().manual_seed(1))
    element = exact.elements[position]
    expected = element.centre
    for origin, generators in element.groups.items():
        if origin:
            open_ = lines(*bounds[network.layers[origin].inputs[0]])[1] > 0
        else:
            open_ = region.upper > region.lower
        image, neuron = open_.flatten(1).nonzero(as_tuple=True)
        assert torch.equal(image, exact.images[origin])
        e = coefficients[origin].flatten(1)[image, neuron]
        moved = e.view(-1, *(1,) * (generators.dim() - 1)) * generators
        expected = expected.index_add(0, image, moved)
    torch.testing.assert_close(latent(coefficients), expected)
    assert (expected - element.centre).abs().max() > 1e-3
    assert set(latent.shapes) == set(element.groups)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), radius=st.floats(0.001, 0.5), corner=st.booleans(), exact=st.booleans())
def test_what_is_reachable_lies_in_the_region_of_sound_bounds(
    seed: int, radius: float, corner: bool, exact: bool
) -> None:
    network = read_network(tiny(big=True), (1, 8, 8))
    draws = torch.Generator().manual_seed(seed)
    images, labels, _ = batch(seed=seed)
    region = Region.around(images, Linf(radius))
    share = torch.rand(images.shape, generator=draws, dtype=torch.float64)
    reached = region.lower + (share.round() if corner else share) * (region.upper - region.lower)
    bounder = Zonotope() if exact else Interval()
    bounds = bounder(network, region, Specification.robust(labels, 4)).layers
    outputs = network.outputs(reached)
    position = network.relus[2]
    coefficients = {0: 2 * (reached - region.lower) / (region.upper - region.lower) - 1}
    for relu in network.relus[:3]:
        (before,) = network.layers[relu].inputs
        slope, mu = lines(*bounds[before])
        # slope x + mu + mu e = ReLU(x) must have a solution in [-1, 1].
        error = outputs[relu] - slope * outputs[before] - mu
        coefficients[relu] = torch.where(mu > 0, error / mu.clamp(min=1e-300), 0.0)
        assert torch.all((mu > 0) | (error.abs() < 1e-12))
    assert all(it.abs().max() <= 1 + 1e-9 for it in coefficients.values())
    torch.testing.assert_close(Latent(network, region, bounds, position)(coefficients), outputs[position])


def test_a_region_in_bfloat16_is_close() -> None:
    graph = read_chain(tiny(), (1, 8, 8))
    with torch.no_grad():
        region = Region.around(batch().images, Linf(EPS))
        bounds = estimate_bounds(graph, region, generator=torch.Generator().manual_seed(0))
        latent = Latent(graph, region, bounds, 5)
        e = latent.start(torch.Generator().manual_seed(0))
        exact, rounded = latent(e), latent.to(torch.bfloat16)({i: it.bfloat16() for i, it in e.items()})
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()


# The chain.


@pytest.mark.parametrize("big", [False, True])
def test_a_chain_is_read_as_any_network_is(big: bool) -> None:
    network, images = tiny(big), batch().images
    chain, other = read_chain(network, (1, 8, 8)), read_network(network, (1, 8, 8))
    assert [(type(it), it.inputs, it.shape) for it in chain.layers] == [
        (type(it), it.inputs, it.shape) for it in other.layers
    ]
    with torch.no_grad():
        for i, found in enumerate(chain.outputs(images)[1:]):
            torch.testing.assert_close(found, network[: i + 1](images))
    chain(images).sum().backward()
    assert all(it.grad is not None for it in network.parameters())


# Phases.


@pytest.mark.parametrize("big", [False, True])
def test_a_phase_changes_nothing_before_its_layer(big: bool) -> None:
    method = make(network=tiny(big))
    stages = method.phases(PLANNED)
    assert [it.name for it in stages] == ["input", "layer 2", "layer 4", "layer 6"][: 4 if big else 3]
    for j, stage in enumerate(stages):
        method.enter(stage)
        method.zero_grad()
        before = {name: it.clone() for name, it in method.network.state_dict().items()}
        optimizer = build_optimizer(stage.optimizer, method.parameters())
        for i in range(3):
            method.before_step(10 * j + 2.0 * i, torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            method(batch(seed=i)).loss.backward()
            optimizer.step()
        after = method.network.state_dict()
        attacked = method.stage.attacked
        frozen = {name for name in before if int(name.split(".")[0]) < attacked}
        assert frozen == {name for name in before if torch.equal(before[name], after[name])}
        assert len(frozen) == 2 * j


# Of the attack in the authors' script: points that are computed. It stops at the last, so takes one step fewer.
EVALUATIONS = 8

PUBLISHED: dict[str, dict[str, Any]] = {
    "colt-cifar10-2-convmedbig": {
        "radius": [2.795, 2.541, 2.310, 2.100],
        "rate": [0.03, 0.0225, 0.016875, 0.01265625],
        "stability": [0.005, 0.0075, 0.01125],
        "attacked": [0, 3, 5, 7],
        "model": ("convmedbig", {"w1": 2, "w2": 2, "w3": 4, "hidden": 250}),
        "batch_size": 100,
        "l1": 1e-5,
    },
    "colt-cifar10-8-convmed": {
        "radius": [12.096, 10.080, 8.400],
        "rate": [0.03, 0.015, 0.0075],
        "stability": [0.003, 0.0045],
        "attacked": [0, 3, 5],
        "model": ("convmed", {"w1": 2, "w2": 4, "hidden": 250}),
        "batch_size": 150,
        "l1": 5e-6,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_numbers(name: str) -> None:
    recipe, published = load_recipe(name), PUBLISHED[name]
    method = build(recipe, Facts(3, 32, tuple("0123456789"), (0.5,), (0.2,)))
    assert isinstance(method, COLT)
    stages = method.phases(Phase("training", recipe.epochs, recipe.optimizer, recipe.schedule))
    assert [it.epochs for it in stages] == [200] * len(published["radius"])
    assert [it.optimizer.lr for it in stages] == pytest.approx(published["rate"])
    assert all((it.optimizer.momentum, it.optimizer.weight_decay) == (0.9, 0) for it in stages)
    found: dict[str, list[float | None]] = {"radius": [], "stability": [], "attacked": [], "before": [], "after": []}
    for stage in stages:
        method.enter(stage)
        for key, values in found.items():
            values.append(getattr(method.stage, key))
    assert found["radius"] == pytest.approx([it / 255 for it in published["radius"]], rel=1e-3)
    assert found["stability"][:-1] == pytest.approx(published["stability"])
    attacked = found["attacked"]
    assert attacked == published["attacked"]
    assert found["before"] == [None, *attacked[:-1]] and found["after"] == [*attacked[1:], None]
    assert method.attack.steps == EVALUATIONS - 1
    assert method._share == pytest.approx(0.25) and method.mixing == 60
    assert (method.l1, method.projections) == (published["l1"], 50)
    assert (recipe.batch_size, recipe.seed) == (published["batch_size"], 100)
    assert (recipe.model.name, recipe.model.options) == published["model"]
    data = recipe.data
    assert (data.name, data.padding, data.flip) == ("cifar10", 4, True)
    assert (data.validation_samples, data.train_samples, data.indices) == (0, None, None)  # all 50,000
    # Halved after 70, 80, ... epochs.
    factors = [learning_rate_factor(recipe.schedule, epoch, 200) for epoch in (0, 69.9, 70, 79.9, 80, 195)]
    assert factors == [1, 1, 0.5, 0.5, 0.25, 0.5**13]


@pytest.mark.parametrize(
    ("name", "data", "radius", "widths"),
    [
        ("colt-mnist-0.1-convmed", "mnist", 0.1, {"w1": 2, "w2": 2, "hidden": 100}),
        ("colt-mnist-0.3-convmed", "mnist", 0.3, {"w1": 2, "w2": 4, "hidden": 250}),
        ("colt-svhn-0.01-convmed", "svhn", 0.01, {"w1": 2, "w2": 2, "hidden": 100}),
    ],
)
def test_recipes_whose_numbers_are_not_published_have_what_is(
    name: str, data: str, radius: float, widths: dict[str, int]
) -> None:
    recipe = load_recipe(name)
    assert (recipe.data.name, recipe.data.padding, recipe.data.flip) == (data, 0, False)
    assert recipe.parsed_threat() == Linf(radius)
    assert (recipe.model.name, recipe.model.options) == ("convmed", widths)
    assert recipe.attack.steps == EVALUATIONS - 1
    assert recipe.attack.step_size == pytest.approx(radius / 4)
    assert (recipe.epochs, recipe.method.options["mixing"]) == (200, 60)


# The attack.


def test_as_many_evaluations_as_steps_and_the_losss_own() -> None:
    calls: list[int] = []
    real = F.cross_entropy

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return real(*args, **kwargs)

    first, last = nn.Linear(64, 4), nn.Linear(4, 4)
    network = nn.Sequential(Normalise(*NORMALISE), nn.Flatten(), first, nn.ReLU(), last)
    with torch.no_grad():
        first.bias.fill_(100.0)  # all ReLUs are on, so that the gradient's sign is the same everywhere
        last.weight.copy_(torch.eye(4))
        last.bias.copy_(torch.tensor([0.0, 0.0, -1e4, -1e4]))  # two classes
    examples = Batch(batch().images, torch.tensor([0, 1, 0, 1]), torch.arange(4))
    method = make(network=network, layers=("input",), start_factor=1.0, radius_factor=1.0, done=5.0)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(F, "cross_entropy", counted)
        points = method.perturb(examples)
    assert len(calls) == 3
    # Three steps of a quarter from the start that the same generator gives.
    start = torch.empty(4, 1, 8, 8).uniform_(-1, 1, generator=torch.Generator().manual_seed(7))
    difference = (first.weight[1] - first.weight[0]).view(1, 8, 8)
    sign = torch.stack([difference, -difference, difference, -difference]).sign()
    lower, upper = (examples.images - EPS).clamp(min=0), (examples.images + EPS).clamp(max=1)
    e = (start + 3 * 0.25 * sign).clamp(-1, 1)
    torch.testing.assert_close(points, (lower + upper) / 2 + (upper - lower) / 2 * e)


def test_the_attack_finds_a_higher_loss_within_the_region() -> None:
    method, examples = make("layer 2", done=5.0), batch(40)
    graph, region, bounds = method._look(examples)
    points = method._attack(graph, region, bounds, 3, examples.labels)
    assert not points.requires_grad
    with torch.no_grad():
        start = Latent(graph, region, bounds, 3)(Latent(graph, region, bounds, 3).start(torch.Generator()))
        losses = [F.cross_entropy(method.chain[3:](it), examples.labels) for it in (start, points)]
    assert losses[1] > losses[0] + 0.01
    # Behind the first convolution a zonotope's box is centre +- |W| radius, through the ReLU's two lines.
    lower, upper = bounds[2]
    assert torch.all(points <= upper.clamp(min=0) + 1e-5)
    assert torch.all(
        points >= torch.where((lower < 0) & (upper > 0), lower * upper / (upper - lower), 0.0).clamp(max=0) - 1e-5
    )


# The loss.


def fixed(method: COLT) -> tuple[dict[int, Tensor], list[int]]:
    """The points that the attack is to find behind each layer, instead of searching; and a list of the searches."""
    points = {i: torch.rand(4, *shape, generator=torch.Generator().manual_seed(i)) for i, shape in SHAPES.items()}
    asked: list[int] = []

    def attack(graph: Any, region: Any, bounds: Any, layer: int, labels: Tensor) -> Tensor:
        asked.append(layer)
        return points[layer]

    method._attack = attack  # type: ignore[method-assign]
    return points, asked


SHAPES = {0: (1, 8, 8), 3: (16, 4, 4), 5: (32, 2, 2)}


@pytest.mark.parametrize(("done", "kappa"), [(0.0, 0.0), (1.0, 0.25), (4.0, 1.0), (9.5, 1.0)])
@pytest.mark.parametrize("phase", ["input", "layer 2", "layer 4"])
def test_the_loss_goes_from_the_phase_before_to_the_present_one(phase: str, done: float, kappa: float) -> None:
    rho, l1 = 0.3, 0.01
    method = make(phase, done=done, stability=rho, l1=l1)
    layers = {"input": (None, 0), "layer 2": (0, 3), "layer 4": (3, 5)}[phase]
    points, asked = fixed(method)
    twin, examples = copy.deepcopy(method.chain), batch()
    output = method(examples)
    before, present = layers
    # Of what counts for nothing, nothing is searched.
    assert asked == ([present] if kappa == 1 or before is None else [present, before])
    loss = kappa * F.cross_entropy(twin[present:](points[present]), examples.labels)
    earlier = examples.images if before is None else points[before]
    loss = loss + (1 - kappa) * F.cross_entropy(twin[before or 0 :](earlier), examples.labels)
    for i, module in enumerate(twin):
        if isinstance(module, nn.Conv2d | nn.Linear) and i >= present:
            loss = loss + l1 * module.weight.abs().sum()
    if phase == "input":
        radius = EPS * 1.05 * 1.1**2
        lower, upper = (examples.images - radius).clamp(min=0), (examples.images + radius).clamp(max=1)
        centre = twin[:2]((lower + upper) / 2)
        spread = F.conv2d((upper - lower) / 2 / 0.4, twin.get_parameter("1.weight").abs(), None, 2, 2)
        low, high = centre - spread, centre + spread
        loss = loss + kappa * rho * ((-low).clamp(min=0) * high.clamp(min=0)).sum() / 4
    if phase == "layer 2":
        draws = torch.Generator().manual_seed(7)
        region = Region.around(examples.images, Linf(EPS * 1.05 * 1.1))
        low, high = estimate_bounds(read_chain(twin, (1, 8, 8)), region, projections=20, generator=draws, until=4)[4]
        loss = loss + kappa * rho * 1.5 * ((-low).clamp(min=0) * high.clamp(min=0)).sum() / 4
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    output.loss.backward()
    twin.requires_grad_(True)
    loss.backward()
    for i, (mine, theirs) in enumerate(zip(method.chain, twin, strict=True)):
        for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            if i >= present:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
            else:
                assert one.grad is None
    assert (output.scalars or {}).keys() == {"kappa"} | ({"stability"} if phase != "layer 4" else set())


def test_without_stability_no_bound_beyond_the_attacked_layer_is_estimated() -> None:
    for stability, known in ((0.0, {2}), (0.1, {2, 4})):
        method = make("layer 2", stability=stability)
        assert set(method._look(batch())[2]) == known
    bounds = make("layer 2")._look(batch())[2]
    assert not bounds[2][0].requires_grad and bounds[4][0].requires_grad


def test_in_bfloat16_the_loss_is_close() -> None:
    found = []
    for precision in ("float32", "bfloat16"):
        method = make("layer 2", done=2.0)
        assert method.adversary is not None
        method.adversary = replace(method.adversary, precision=precision)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            found.append(method(batch(40)).loss.item())
    assert found[0] != found[1] == pytest.approx(found[0], rel=0.02)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_estimates_and_searches_are_in_the_adversarys_type(
    precision: Literal["float32", "bfloat16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.dtype] = []
    convert = Latent.to

    def estimated(*arguments: Any, dtype: torch.dtype, **options: Any) -> Any:
        asked.append(dtype)
        return estimate_bounds(*arguments, dtype=dtype, **options)

    def converted(latent: Latent, dtype: torch.dtype) -> Latent:
        asked.append(dtype)
        return convert(latent, dtype)

    monkeypatch.setattr(colt, "estimate_bounds", estimated)
    monkeypatch.setattr(Latent, "to", converted)
    method = make("layer 2", done=5.0)
    assert method.adversary is not None
    method.adversary = replace(method.adversary, precision=precision)
    points = method.perturb(batch(4))
    assert asked == [getattr(torch, precision)] * 2 and points.dtype == torch.float32


# Whole runs.

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "train_samples": 200, "validation_samples": 50},
    "model": {"name": "convmed", "w1": 1, "w2": 1, "hidden": 10},
    "threat": "linf:0.05",
    "method": {"name": "colt", "mixing": 1, "projections": 10},
    "attack": {"steps": 2, "step_size": 0.0125},
    "optimizer": {"lr": 0.1, "weight_decay": 0.0},
    "epochs": 2,
    "batch_size": 50,
}


def run(folder: Path, recipe: dict[str, Any] = TINY, **options: Any) -> Path:
    folder.parent.mkdir(exist_ok=True, parents=True)
    path = folder.parent / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return redan.train(path, folder, progress=False, **options)


def weights(folder: Path, name: str = "model-last") -> dict[str, Tensor]:
    return load_tensors(folder / f"{name}.safetensors")[0]


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("colt") / "whole")


def test_a_run_goes_through_its_phases(whole: Path) -> None:
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [it["phase"] for it in records] == ["input"] * 2 + ["layer 2"] * 2 + ["layer 4"] * 2
    assert [it["learning_rate"] for it in records] == pytest.approx([0.1] * 2 + [0.075] * 2 + [0.05625] * 2)
    assert [it["kappa"] for it in records] == pytest.approx([0.375, 1] * 3)
    assert ["stability" in it for it in records] == [True] * 4 + [False] * 2


def test_the_last_weights_are_shipped_whatever_validation_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    monkeypatch.setattr(trainer._Training, "_validate", lambda self: (0.5, 1 / (1 + self.epoch)))
    folder = run(tmp_path / "run")
    assert equal(weights(folder, "model"), weights(whole))


@pytest.mark.parametrize("steps", [3, 8, 11, 14, 18, 22])  # in each phase, while it mixes and after, and between two
def test_a_resumed_run_comes_to_bitwise_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, steps: int
) -> None:
    real, taken = trainer._Training._train_step, []

    def counted(self: Any, *args: Any) -> None:
        real(self, *args)
        taken.append(1)
        self.stop.requested = len(taken) == steps

    with monkeypatch.context() as context:
        context.setattr(trainer._Training, "_train_step", counted)
        with pytest.raises(redan.Stopped, match="--resume"):
            run(tmp_path / "parts")
    torch.manual_seed(steps)  # another process's randomness is elsewhere
    run(tmp_path / "parts", resume=True)
    assert equal(weights(tmp_path / "parts"), weights(whole))


@pytest.mark.parametrize("before", ["pgd-at", {"name": "arat", "split_bn": False, "layers": ["3"]}], ids=str)
def test_another_runs_network_takes_the_place_of_the_first_phase(tmp_path: Path, whole: Path, before: Any) -> None:
    plain = TINY | {"method": before, "epochs": 1}
    source = run(tmp_path / "source" / "run", plain)
    method = TINY["method"] | {"trained_network": str(source)}
    still = {"method": method, "optimizer": {"lr": 1e-30, "weight_decay": 0.0}}
    folder = run(tmp_path / "still" / "run", TINY | still)
    assert equal(weights(folder), weights(source, "model"))
    phases = [json.loads(line)["phase"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert phases == ["layer 2"] * 2 + ["layer 4"] * 2
    moved = run(tmp_path / "moved" / "run", TINY | {"method": method})
    changed = {name for name, it in weights(moved).items() if not torch.equal(it, weights(source, "model")[name])}
    assert changed == {f"{i}.{part}" for i in (3, 6, 8) for part in ("weight", "bias")}
    shutil.rmtree(source)
    assert redan.load(folder)(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(UserError, match="trained model convmed with"):
        run(tmp_path / "other" / "run", TINY | {"method": method | {"trained_network": str(whole)}, "model": "convmed"})


# What cannot be.


def refused(**options: Any) -> str:
    with pytest.raises(UserError) as error:
        make(**options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_networks_that_are_no_chain_are_refused() -> None:
    shape: dict[str, Any] = {"in_channels": 1, "size": 8, "classes": 4, "width": 2}
    message = refused(network=small_cnn(Normalise(*NORMALISE), batch_norm=True, **shape))
    assert message.startswith("a chain of convolutions, linear layers and ReLUs is needed, such as convmed; layer '2' ")
    assert "BatchNorm2d" in message
    residual = ResNet(Normalise(*NORMALISE), depths=(1, 1, 1, 1), classes=4, in_channels=1, width=2)
    assert refused(network=residual).endswith("this is a ResNet")
    circular = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.ReLU())
    assert "padding_mode=circular" in refused(network=circular)
    with pytest.raises(UserError, match="a chain of convolutions"):
        make(network=nn.Sequential(nn.Conv2d(1, 2, 3, padding="same")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ("2", "4")}, "from 'input' on, each once and in order"),
        ({"layers": ("input", "4", "2")}, "from 'input' on, each once and in order"),
        ({"layers": ("input", "2", "2")}, "from 'input' on, each once and in order"),
        ({"layers": ("input", "3")}, "no layer that COLT may attack '3'"),
        ({"layers": ("input",), "trained_network": "runs/any"}, "name more layers"),
        ({"mixing": 11.0}, "mixing of 11 epochs is longer than a phase, which has 10"),
        ({"mixing": -1.0}, "mixing of at least 0"),
        ({"l1": float("nan")}, "l1 of at least 0"),
        ({"stability": -1.0}, "stability of at least 0"),
        ({"rate_factor": 0.0}, "rate_factor above 0"),
        ({"radius_factor": 1e300}, "radius_factor above 0 and up to 100"),
        ({"projections": 0}, "at least 1 of projections"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], message: str) -> None:
    assert message in refused(**options)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (PGD(L2(0.5), 2, 0.1), "COLT"),
        (PGD(Linf(0.0), 2, 0.1), "a threat whose radius is above 0"),
        (PGD(Linf(0.1), 2, 0.1, start="image"), "starts at random in a zonotope, not 'image'"),
        (FGSM(Linf(0.1)), "its adversary is a PGD"),
    ],
)
def test_other_attacks_are_refused(attack: Attack, message: str) -> None:
    with pytest.raises(UserError, match=message):
        COLT(tiny(), adversary=Adversary(attack), targets=LabelSmoothing())


@pytest.mark.parametrize("adversary", [{"mode": "train"}, {"bn_momentum_in_attack": True}], ids=str)
def test_modes_of_batch_norm_are_refused(adversary: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no BatchNorm; leave attack.mode"):
        COLT(tiny(), adversary=Adversary(PGD(Linf(0.1), 2, 0.1), **adversary), targets=LabelSmoothing())


@pytest.mark.parametrize("key", ["weight_perturbation", "weight_averaging"])
def test_wrappers_that_move_frozen_layers_are_refused(key: str, tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(TINY | {key: {}}))
    with pytest.raises(UserError, match="it goes without weight_perturbation and weight_averaging"):
        load_recipe(tmp_path / "it.yaml")
