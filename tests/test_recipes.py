"""Recipes: what ships holds, what is misspelt is named, what is resolved reads back, what is built is what they say."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from redan.attacks.objectives import kl_divergence
from redan.attacks.pgd import PGD
from redan.data.registry import DATASETS
from redan.data.types import Batch, Dataset, Facts, ImageSet
from redan.errors import UserError
from redan.methods.base import NetworkMethod, Wrapper
from redan.methods.registry import METHODS, method_options
from redan.methods.trades import TRADES
from redan.methods.weight_averaging import WeightAveraging
from redan.methods.weight_perturbation import WeightPerturbation
from redan.models.registry import MODELS
from redan.models.split_norm import SplitBatchNorm2d
from redan.recipes.build import build, image_size, split
from redan.recipes.schema import NamedOptions, Recipe, load_recipe, parse_overrides, shipped_recipes
from redan.run import load, read_run
from redan.tensors import save_tensors
from redan.threats import Linf
from redan.training.optim import learning_rate_factor

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"name": "digits", "validation_samples": 10},
    "model": {"name": "small-cnn", "width": 2},
    "threat": "linf:0.1",
    "method": {"name": "trades", "beta": 3.0},
    "optimizer": {"lr": 0.1},
    "epochs": 2,
}
NORMED = SMALL | {"model": {"name": "small-cnn-bn", "width": 2}}
PURIFICATION: dict[str, Any] = {
    "purifier": {"name": "inpainting", "width": 4, "halvings": 1, "dilations": 1, "attention": False},
    "classifier_training": {"epochs": 1, "optimizer": {"lr": 0.1}},
    "pretraining": {"epochs": 1, "optimizer": {"lr": 0.1}},
}
DIGITS = Facts(1, 8, tuple("0123456789"), (0.3,), (0.4,))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def facts(name: str) -> Facts:
    """Of a data set as the registry describes it, without its files."""
    info = DATASETS[name]
    channels = 1 if name in ("digits", "mnist", "fashion-mnist") else 3
    return Facts(channels, info.size, tuple(map(str, range(info.classes))), (0.5,) * channels, (0.2,) * channels)


def refused(path: Path | str, *assignments: str) -> str:
    """The one line that a recipe with these overrides is refused with."""
    with pytest.raises(UserError) as error:
        load_recipe(path, parse_overrides(list(assignments)))
    message = str(error.value)
    assert "\n" not in message and message
    return message


# What ships.


def test_recipes_ship() -> None:
    assert {"standard-digits", "pgd-at-digits", "trades-digits"} <= set(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_holds(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description.strip().endswith(".")
    assert recipe.optimizer.lr > 0 and max(recipe.schedule.milestones, default=0) < recipe.epochs
    assert recipe.schedule.warmup < recipe.epochs
    method = build(recipe, facts(recipe.data.name))
    size = image_size(recipe, facts(recipe.data.name))
    images = torch.rand(2, facts(recipe.data.name).channels, size, size)
    with torch.no_grad():
        logits = method.deployed().eval()(images)
    assert logits.shape == (2, facts(recipe.data.name).classes) and bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_reads_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert Recipe.model_validate(json.loads(json.dumps(recipe.resolved()))) == recipe
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path) == load_recipe(str(tmp_path)) == recipe
    assert load_recipe(tmp_path / "recipe.yaml").resolved() == recipe.resolved()


NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"name": "resnet18"},
    "wrn34-10": {"name": "wide-resnet", "depth": 34, "width": 10},
}


def named(model: dict[str, Any]) -> NamedOptions:
    """A model with all its options."""
    return Recipe.model_validate(SMALL | {"model": model}).model


class Published(NamedTuple):
    """Hyper-parameters of a method's public code; learning rates by the epoch, from 1, from which they hold."""

    weight: dict[str, float]
    radius: float
    step: float
    decay: float
    epochs: int
    rates: dict[int, float]


def published(name: str, network: str) -> Published:
    wide = network == "wrn34-10"
    match name:
        case "arat" | "arat-swa":
            rates = {1: 0.02, 2: 0.1, 77: 0.01, 92: 0.001}
            return Published({"gamma": 100 if wide else 30}, 8 / 255, 2 / 255, 5e-4, 100, rates)
        case "lbgat":
            return Published({"beta": 0}, 0.031, 0.007, 2e-4, 100, {1: 0.02, 2: 0.1, 76: 0.01, 91: 0.001})
        case "trades":
            return Published({"beta": 6}, 0.031, 0.007, 2e-4, 76, {1: 0.1, 75: 0.01})
        case "mart" if wide:
            return Published({"beta": 6}, 0.031, 0.007, 7e-4, 90, {1: 0.1, 75: 0.01, 90: 0.001})
        case _:
            return Published({"beta": 5}, 0.031, 0.007, 3.5e-3, 120, {1: 0.01, 75: 1e-3, 90: 1e-4, 100: 1e-5})


@pytest.mark.parametrize(
    ("data", "network"), [*itertools.product(("cifar10", "cifar100"), NETWORKS), ("imagenette", "resnet18")]
)
@pytest.mark.parametrize("name", ["arat", "arat-swa", "lbgat", "mart", "trades"])
def test_hyper_parameters_are_the_published_ones(name: str, data: str, network: str) -> None:
    recipe, expected = load_recipe(f"{name}-{data}-{network}"), published(name, network)
    method, attack, average = recipe.method, recipe.attack, recipe.weight_averaging
    imagenette = data == "imagenette"
    lowered = imagenette and name == "lbgat"  # its learning rate, as in Waseda et al.; by how much is ours

    assert recipe.model == named(NETWORKS[network])
    assert recipe.teacher == (named({"name": "resnet18", "second_stride": 1}) if name == "lbgat" else None)
    assert (recipe.data.name, recipe.data.crop, recipe.data.padding) == (data, 128 if imagenette else None, 4)
    assert recipe.data.flip and recipe.data.train_samples is None and recipe.batch_size == 128
    assert method.name == name.removesuffix("-swa")
    assert method.options == method_options(method.name) | expected.weight
    assert recipe.parsed_threat() == Linf(expected.radius)
    assert (attack.steps, attack.step_size, attack.start) == (10, expected.step, None)
    assert (attack.mode, attack.bn_momentum_in_attack) == (
        ("train", True) if method.name == "arat" else ("eval", False)
    )

    optimizer = recipe.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.9, False)
    assert (optimizer.weight_decay, recipe.epochs) == (expected.decay, expected.epochs)
    assert recipe.gradient_clip == (1.0 if lowered else None)
    for epoch in range(1, recipe.epochs + 1):
        rate = expected.rates[max(first for first in expected.rates if first <= epoch)] / (5 if lowered else 1)
        for done in (epoch - 1, epoch - 0.5, epoch - 1e-6):
            factor = learning_rate_factor(recipe.schedule, done, recipe.epochs)
            assert optimizer.lr * factor == pytest.approx(rate), epoch
    if name == "arat-swa":
        assert average is not None
        assert (average.kind, average.start, average.every) == ("swa", 75, 100 if imagenette else 500)
    else:
        assert average is None


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rate=st.floats(0, 1e6, exclude_min=True),
    step=st.integers(1, 255),
    seed=st.integers(0, 2**62),
    words=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20),
    kind=st.sampled_from(["ema", "swa", None]),
)
def test_any_recipe_reads_back(tmp_path: Path, rate: float, step: int, seed: int, words: str, kind: str | None) -> None:
    changes = {
        "optimizer": {"lr": rate},
        "attack": {"step_size": f"{step}/255"},
        "seed": seed,
        "description": words,
        "weight_averaging": kind and {"kind": kind},
    }
    recipe = Recipe.model_validate(SMALL | changes)
    assert recipe.attack.step_size == step / 255
    recipe.save(tmp_path / "any.yaml")
    assert load_recipe(tmp_path / "any.yaml") == recipe


def test_resolved_names_every_key() -> None:
    resolved = Recipe.model_validate(SMALL).resolved()
    assert set(resolved) == set(Recipe.model_fields)
    assert resolved["method"] == {"name": "trades", "beta": 3.0}
    assert resolved["schedule"] == {
        "name": "constant",
        "milestones": [],
        "factor": 0.1,
        "peak": 0.4,
        "warmup": 0.0,
        "warmup_factor": None,
    }


# Overrides.


def test_overrides_are_dotted_and_typed(small: Path) -> None:
    assignments = [
        "optimizer.lr=5e-4",  # which YAML 1.1 takes for text
        "epochs=7",
        "data.flip=true",
        "schedule.milestones=[3, 5.5]",
        "attack.step_size=3/255",
        "method.beta=1.5",
        "model.width=3",
        "weight_averaging.kind=swa",
        "threat=l2:1/2",
        "name=a=b",
    ]
    recipe = load_recipe(small, parse_overrides(assignments))
    assert (recipe.optimizer.lr, recipe.epochs, recipe.data.flip) == (5e-4, 7, True)
    assert recipe.schedule.milestones == (3, 5.5) and recipe.attack.step_size == 3 / 255
    assert recipe.method.options == {"beta": 1.5} and recipe.model.options == {"width": 3}
    assert recipe.weight_averaging is not None and recipe.weight_averaging.kind == "swa"
    assert recipe.parsed_threat().radius == 0.5 and recipe.name == "a=b"


def test_null_takes_a_part_away(small: Path) -> None:
    assignments = ["weight_averaging.kind=swa", "weight_averaging=null", "data.train_samples=null"]
    recipe = load_recipe(small, parse_overrides(assignments))
    assert recipe.weight_averaging is None and recipe.data.train_samples is None


def test_the_short_form_of_a_model_or_method_has_keys_too(small: Path) -> None:
    recipe = load_recipe(small, {"method": "mart", "method.beta": 2, "model": "convmed", "model.hidden": 5})
    assert recipe.method.name == "mart" and recipe.method.options == {"beta": 2}
    assert recipe.model.name == "convmed" and recipe.model.options == {"w1": 2, "w2": 4, "hidden": 5}


def test_options_come_with_their_defaults_and_are_checked_by_kind() -> None:
    resolved = load_recipe("arat-digits", {"method.layers": [2, "5"]}).resolved()
    assert resolved["model"] == {"name": "small-cnn-bn", "width": 16}
    assert resolved["method"] == {"name": "arat"} | method_options("arat") | {"layers": ["2", "5"]}
    assert "layers: Input should be a valid list, got 5" in refused("arat-digits", "method.layers=5")
    assert "stop_gradient: Input should be a valid boolean" in refused("arat-digits", "method.stop_gradient=perhaps")
    assert "'six' is not a number" in refused("trades-digits", "method.beta=six")


def test_overrides_do_not_linger() -> None:
    load_recipe("trades-digits", {"epochs": 1, "method.beta": 1.0})
    assert load_recipe("trades-digits").epochs == 40
    assert load_recipe("trades-digits").method.options == {"beta": 6.0}


@pytest.mark.parametrize("assignment", ["epochs", "=5", "", "epochs:5"])
def test_an_override_without_a_key_or_value_is_refused(assignment: str) -> None:
    with pytest.raises(UserError, match="KEY=VALUE"):
        parse_overrides([assignment])


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_override_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        parse_overrides([f"name={text}"])
    except UserError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("value", ["[1", "0b_", "2024-99-99", "{a: b: c}", "!!python/object/apply:os.getcwd []"])
def test_an_override_that_is_not_yaml_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="not valid YAML"):
        parse_overrides([f"name={value}"])


def test_an_override_below_a_value_is_refused(small: Path) -> None:
    assert refused(small, "epochs.x=1") == "override 'epochs.x': epochs has no keys below it"
    assert refused(small, "threat.radius=1") == "override 'threat.radius': threat has no keys below it"


# Misspelt keys and wrong values.


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("epohcs", "epochs"),
        ("optimiser.lr", "optimizer"),
        ("data.pading", "padding"),
        ("attack.stepsize", "step_size"),
        ("weight_perturbation.gama", "gamma"),
        ("weight_averaging.knd", "kind"),
        ("optimizer.wieght_decay", "weight_decay"),
        ("schedule.milestone", "milestones"),
        ("validation.evry", "every"),
        ("model.widht", "width"),
        ("method.betta", "beta"),
    ],
)
def test_a_misspelt_key_names_the_nearest(small: Path, misspelt: str, meant: str) -> None:
    message = refused(small, f"{misspelt}=1")
    assert f"did you mean '{meant}'?" in message
    assert misspelt.split(".")[0 if meant == "optimizer" else -1] in message


@pytest.mark.parametrize(
    ("assignment", "nearest"),
    [
        ("method.name=tradse", "no method 'tradse'; did you mean 'trades'"),
        ("model.name=resnet81", "no model 'resnet81'; did you mean 'resnet18'"),
        ("threat=lnif:0.1", "did you mean 'linf'"),
        ("optimizer.name=sdg", "optimizer.name: Input should be 'sgd', 'adam' or 'adamw', got 'sdg'"),
        ("schedule.name=cosin", "schedule.name"),
        ("attack.start=middle", "'random', 'near' or 'image'"),
        ("attack.mode=test", "attack.mode"),
        ("precision=float16", "precision"),
        ("weight_averaging={kind: sma}", "weight_averaging.kind"),
    ],
)
def test_a_name_that_does_not_exist_is_refused(small: Path, assignment: str, nearest: str) -> None:
    assert nearest in refused(small, assignment)


@pytest.mark.parametrize(
    ("assignment", "where"),
    [
        ("epochs=0", "epochs"),
        ("epochs=1.5", "epochs"),
        ("batch_size=0", "batch_size"),
        ("seed=-1", "seed"),
        ("optimizer.lr=0", "optimizer.lr"),
        ("optimizer.lr=.inf", "optimizer.lr"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("optimizer.momentum=1", "optimizer.momentum"),
        ("optimizer={lr: 0.1, momentum: 0, nesterov: true}", "optimizer: nesterov needs sgd with momentum"),
        ("optimizer={lr: 0.1, name: adam, nesterov: true}", "optimizer: nesterov needs sgd with momentum, got adam"),
        ("schedule.milestones=[1, x]", "schedule.milestones.1"),
        ("schedule.factor=0", "schedule.factor"),
        ("attack.steps=0", "attack.steps"),
        ("attack.step_size=0", "attack.step_size"),
        ("attack.step_size=8/0", "attack.step_size: '8/0' is not a number such as 0.5 or 8/255"),
        ("attack.step_size=.inf", "attack.step_size"),
        ("label_smoothing=1", "label_smoothing"),
        ("weight_perturbation.gamma=0", "weight_perturbation.gamma"),
        ("weight_averaging.decay=1", "weight_averaging.decay"),
        ("weight_averaging.every=0", "weight_averaging.every"),
        ("gradient_clip=0", "gradient_clip"),
        ("validation.every=0", "validation.every"),
        ("data.validation_samples=-1", "data.validation_samples"),
        ("data.train_samples=0", "data.train_samples"),
        ("data=5", "data"),
        ("model=null", "model"),
        ("model=[1]", "model"),
        ("threat=linf", "NORM:RADIUS"),
        ("threat=linf:-1", "radius"),
    ],
)
def test_a_wrong_value_is_refused_where_it_stands(small: Path, assignment: str, where: str) -> None:
    assert where in refused(small, assignment)


@pytest.mark.parametrize("key", ["name", "data", "model", "threat", "method", "optimizer", "epochs"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "part.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in SMALL.items() if k != key}))
    assert refused(path) == f"recipe part: the key '{key}' is missing"


@pytest.mark.parametrize("key", ["model", "method"])
def test_a_missing_name_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "part.yaml"
    path.write_text(yaml.safe_dump(SMALL | {key: {"nmae": "trades"}}))
    assert refused(path) == f"recipe part: the key '{key}.name' is missing"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: [1,\nb: 2", "line 2: expected ',' or ']'"),
        (b"name: x\n  epochs: 3", "line 2: mapping values are not allowed here"),
        (b"name: [1, 2\n", "line 2"),
        (b"name: !!python/name:os.system", "line 1: could not determine a constructor"),
        (b"name: 2024-99-99", "month must be in 1..12"),
        (b"\xff\xfe\xfd", "utf-8"),
        (b"name: \x00", "special characters are not allowed"),
        (b"- 1\n- 2", "is not a mapping of keys to values"),
        (b"", "is not a mapping of keys to values"),
        (b"just text", "is not a mapping of keys to values"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    message = refused(path)
    assert reason in message and "bad" in message


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_no_file_gives_a_traceback(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    refused(path)


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "no recipe 'trades-digit'; did you mean 'trades-digits'?" in refused("trades-digit")
    assert "cannot read the recipe" in refused(tmp_path / "none.yaml")
    assert "recipe.yaml: No such file or directory" in refused(tmp_path)


# What is built.


def unwrapped(method: nn.Module) -> NetworkMethod:
    while isinstance(method, Wrapper):
        method = method.inner
    assert isinstance(method, NetworkMethod)
    return method


def test_what_is_built_is_what_the_recipe_says() -> None:
    changes = {
        "attack": {"steps": 3, "step_size": "1/255", "mode": "train"},
        "label_smoothing": 0.2,
        "weight_perturbation": {"gamma": 0.1},
        "weight_averaging": {"kind": "swa"},
    }
    method = build(Recipe.model_validate(SMALL | changes), DIGITS)
    assert isinstance(method, WeightAveraging) and method.config.kind == "swa"
    assert isinstance(method.inner, WeightPerturbation) and method.inner.config.gamma == 0.1
    trades = unwrapped(method)
    assert isinstance(trades, TRADES) and trades.beta == 3.0
    assert trades.targets(torch.tensor([0]), torch.tensor([0]), 10)[0, 1] == pytest.approx(0.02)
    assert trades.adversary is not None and trades.adversary.mode == "train"
    assert trades.adversary.attack == PGD(
        Linf(0.1), steps=3, step_size=1 / 255, objective=kl_divergence, start="near", drop_broken=False
    )


@pytest.mark.parametrize(("moves", "times"), [(True, 11), (False, 1)])
def test_the_recipe_says_whether_the_attack_moves_the_statistics(moves: bool, times: int) -> None:
    attack = {"steps": 10, "mode": "train", "bn_momentum_in_attack": moves}
    method = build(Recipe.model_validate(NORMED | {"method": "arat", "attack": attack}), DIGITS).train()
    method.before_step(0.0, torch.Generator().manual_seed(0))
    method(Batch(torch.rand(4, 1, 8, 8), torch.arange(4), torch.arange(4)))
    pairs = [module for module in method.modules() if isinstance(module, SplitBatchNorm2d)]
    counts = {tuple(int(norm.get_buffer("num_batches_tracked")) for norm in (p.adversarial, p.clean)) for p in pairs}
    assert len(pairs) == 3 and counts == {(times, 1)}


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"colt"}))  # which starts in a zonotope, always at random
def test_the_start_of_the_attack_is_the_methods_unless_the_recipe_says(name: str) -> None:
    family = METHODS[name]
    other = "random" if family.attack_start == "near" else "near"
    asked = NORMED | {"method": name} | ({"purification": PURIFICATION} if family.purifies else {})
    usual = build(Recipe.model_validate(asked), DIGITS)
    told = build(Recipe.model_validate(asked | {"attack": {"start": other}}), DIGITS)
    attacks = [adversary.attack for m in (usual, told) if (adversary := unwrapped(m).adversary) is not None]
    assert isinstance(usual, family) and len(attacks) == 2 * family.attacks
    for attack, start in zip(attacks, (family.attack_start, other), strict=False):
        assert isinstance(attack, PGD)
        assert attack.start == start and attack.objective == family.attack_objective and not attack.drop_broken


def test_the_seed_makes_what_a_method_adds() -> None:
    def predictors(seed: int, elsewhere: int) -> list[torch.Tensor]:
        torch.manual_seed(elsewhere)
        method = build(Recipe.model_validate(NORMED | {"method": "arat", "seed": seed}), DIGITS)
        return [tensor for name, tensor in method.state_dict().items() if name.startswith("predictors")]

    first, same, other = predictors(0, 1), predictors(0, 2), predictors(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])


def test_the_seed_makes_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (
        build(Recipe.model_validate(SMALL | {"seed": seed}), DIGITS).state_dict() for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["network.1.weight"], other["network.1.weight"])


@pytest.mark.parametrize("name", MODELS)
def test_every_network_can_be_named(name: str) -> None:
    method = build(Recipe.model_validate(SMALL | {"model": name}), facts("cifar10"))
    assert method.deployed().eval()(torch.rand(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_numbers_can_be_set(name: str) -> None:
    for option, default in method_options(name).items():
        if isinstance(default, int | float) and not isinstance(default, bool):
            value = 3 if isinstance(default, int) else 0.25
            changes = {"model": "convmed"} if name == "colt" else {}  # which takes no BatchNorm
            method = build(Recipe.model_validate(NORMED | {"method": {"name": name, option: value}} | changes), DIGITS)
            assert getattr(method, option) == value


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"name": "small-cnn", "width": 0}}, "width"),
        ({"model": {"name": "small-cnn", "width": "wide"}}, "width"),
        ({"method": {"name": "trades", "beta": -1}}, "beta"),
        ({"data": {"name": "digits", "crop": 9}}, "data.crop: 9 is more than the 8 pixels"),
        ({"data": {"name": "digits", "crop": 9, "padding": 2}}, "data.crop: 9 is more than the 8 pixels"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(changes: dict[str, Any], reason: str) -> None:
    recipe = Recipe.model_validate(SMALL | changes)
    with pytest.raises(UserError, match=reason) as error:
        build(recipe, DIGITS)
    assert "\n" not in str(error.value)


def test_the_network_sees_the_crop() -> None:
    recipe = Recipe.model_validate(SMALL | {"data": {"name": "digits", "crop": 5}})
    assert image_size(recipe, DIGITS) == 5
    assert image_size(Recipe.model_validate(SMALL), DIGITS) == 8
    assert build(recipe, DIGITS).deployed()(torch.rand(1, 1, 5, 5)).shape == (1, 10)


# The images that a recipe chooses.


def dataset(*, exact: bool) -> Dataset:
    """100 images whose first pixel is their number, of 10 classes; the first 30 are stand-ins where ``exact``."""
    numbers = torch.arange(100)
    images = ImageSet(numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8), numbers % 10)
    return Dataset("digits", images, images, DIGITS.class_names, (0.3,), (0.4,), numbers >= 30 if exact else None)


def numbers(images: ImageSet) -> list[int]:
    return images.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("samples", [None, 20])
@pytest.mark.parametrize("held", [0, 20])
def test_the_split_is_disjoint_balanced_and_seeded(exact: bool, samples: int | None, held: int) -> None:
    def chosen(seed: int) -> tuple[list[int], list[int]]:
        data = {"name": "digits", "train_samples": samples, "validation_samples": held}
        training, held_out = split(Recipe.model_validate(SMALL | {"data": data, "seed": seed}), dataset(exact=exact))
        for part in (training, held_out):
            assert part.labels.tolist() == [number % 10 for number in numbers(part)]
            assert len(part) == 0 or len(set(part.labels.bincount(minlength=10).tolist())) == 1
        return numbers(training), numbers(held_out)

    training, held_out = chosen(0)
    assert len(held_out) == held and len(training) == (samples or 100 - held)
    assert not set(training) & set(held_out) and len(set(training)) == len(training)
    if exact:  # stand-ins are trained on only where all images are
        assert min(held_out, default=30) >= 30
        assert samples is None or min(training) >= 30
    assert chosen(0) == (training, held_out)
    assert (chosen(1) == (training, held_out)) == (samples is None and held == 0)


def test_more_images_than_there_are_is_refused() -> None:
    for data in ({"train_samples": 101, "validation_samples": 0}, {"train_samples": 1, "validation_samples": 100}):
        with pytest.raises(UserError, match="images to choose from"):
            split(Recipe.model_validate(SMALL | {"data": {"name": "digits", **data}}), dataset(exact=False))


# A run folder, read back.


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    recipe = Recipe.model_validate(SMALL | {"weight_averaging": {}})
    recipe.save(folder / "recipe.yaml")
    network = build(recipe.model_copy(update={"seed": 9}), DIGITS).deployed()
    save_tensors(folder / "model.safetensors", network.state_dict(), {"facts": asdict(DIGITS)})
    return folder


def test_a_run_gives_recipe_facts_and_network(run: Path) -> None:
    recipe, found, network = read_run(run)
    assert recipe == Recipe.model_validate(SMALL | {"weight_averaging": {}}) and found == DIGITS
    expected = build(recipe.model_copy(update={"seed": 9}), DIGITS).deployed().state_dict()
    assert not network.training
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
    assert load(run)(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("metadata", "width"),
    [
        ({}, 2),
        ({"facts": None}, 2),
        ({"facts": {"channels": 1}}, 2),
        ({"facts": asdict(DIGITS) | {"size": "big"}}, 2),
        ({"facts": asdict(DIGITS) | {"std": [0.0]}}, 2),
        ({"facts": asdict(DIGITS)}, 3),
    ],
)
def test_weights_that_do_not_fit_their_recipe_are_refused(run: Path, metadata: dict[str, Any], width: int) -> None:
    other = Recipe.model_validate(SMALL | {"model": {"name": "small-cnn", "width": width}})
    save_tensors(run / "model.safetensors", build(other, DIGITS).deployed().state_dict(), metadata)
    with pytest.raises(UserError, match=r"model\.safetensors does not fit its recipe") as error:
        load(run)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run folder"):
        load(tmp_path / "none")
    with pytest.raises(UserError, match="is not a run folder"):
        load(tmp_path)
    with pytest.raises(UserError, match="weights"):
        load(run, "last")
    (run / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="damaged"):
        load(run)
