"""Methods with a second network, LBGAT and ARREST, against their equations; and the recipe's way to a teacher."""

import copy
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

import redan
from redan.attacks.objectives import kl_divergence
from redan.attacks.pgd import PGD
from redan.data.types import Batch, Facts
from redan.errors import UserError
from redan.methods.arrest import ARREST, angular_distance
from redan.methods.base import Adversary, Method, NetworkMethod, OptimizerConfig, Phase, ScheduleConfig
from redan.methods.lbgat import LBGAT
from redan.methods.registry import METHODS, build_method, method_options
from redan.methods.targets import LabelSmoothing
from redan.methods.weight_averaging import WeightAveraging, WeightAveragingConfig
from redan.methods.weight_perturbation import WeightPerturbation, WeightPerturbationConfig
from redan.models.norms import Normalise
from redan.models.resnet import ResNet
from redan.models.taps import FeatureTaps, HeadTap, without_taps
from redan.recipes.build import build
from redan.recipes.schema import Recipe, load_recipe
from redan.run import read_run
from redan.tensors import load_tensors, save_tensors
from redan.threats import Linf
from redan.training import trainer

EPS = 0.1
PLANNED = Phase("training", 3, OptimizerConfig(lr=0.1), ScheduleConfig())
CLEAN, FINETUNING = (Phase(name, 3, PLANNED.optimizer, PLANNED.schedule) for name in ("clean", "finetuning"))


def network(seed: int = 0, width: int = 3) -> nn.Sequential:
    """Tiny, with BatchNorm and a hidden layer before the head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = (nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(4 * width, 6))
        return nn.Sequential(*body, nn.Tanh(), nn.Linear(6, 3))


def batch(seed: int = 0, n: int = 8) -> Batch:
    draws = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(n, 1, 4, 4, generator=draws), torch.randint(3, (n,), generator=draws), torch.arange(n))


def perturbed(seed: int = 5) -> Tensor:
    return Linf(EPS).random_start(batch().images, torch.Generator().manual_seed(seed))


def adversary(family: type[NetworkMethod]) -> Adversary:
    attack = PGD(Linf(EPS), 2, EPS, objective=family.attack_objective, start=family.attack_start, drop_broken=False)
    return Adversary(attack, precision="float32")


def lbgat(smoothing: float = 0.0, **options: Any) -> LBGAT:
    targets = LabelSmoothing(smoothing)
    method = LBGAT(network(), adversary=adversary(LBGAT), targets=targets, teacher=network(1, width=5), **options)
    method.before_step(0.0, torch.Generator().manual_seed(7))
    return method


def arrest(*, finetuning: bool = True, moved: bool = True, **options: Any) -> ARREST:
    """In the phase of finetuning, and ``moved`` away from its frozen network, unless told otherwise."""
    method = ARREST(network(), adversary=adversary(ARREST), targets=LabelSmoothing(), **options)
    method.before_step(0.0, torch.Generator().manual_seed(7))
    method.train()
    if finetuning:
        method.network(batch(3).images)  # BatchNorm's statistics are part of what is frozen
        method.enter(FINETUNING)
    if moved:
        method.network.load_state_dict(network(2).state_dict())
    return method


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    after = module.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


# LBGAT.


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_lbgats_loss_and_gradients_are_the_papers(beta: float, smoothing: float) -> None:
    method = lbgat(smoothing, beta=beta).double()
    images, adversarial, y = batch().images.double(), perturbed().double(), batch().labels
    f, g = copy.deepcopy(method.network), copy.deepcopy(method.teacher)
    output = method.loss(Batch(images, y, batch().indices), adversarial)
    output.loss.backward()

    attacked, taught, clean = f(adversarial), g(images), f(images)
    mse = ((attacked - taught) ** 2).sum() / (8 * 3)
    p, q = clean.softmax(1), attacked.softmax(1)
    ce, kl = F.cross_entropy(taught, y, label_smoothing=smoothing), (p * (p / q).log()).sum() / 8
    (mse + ce + beta * kl).backward()
    assert output.loss.item() == pytest.approx((mse + ce + beta * kl).item(), abs=1e-6)
    for mine, theirs in ((method.network, f), (method.teacher, g)):
        pairs = list(zip(mine.parameters(), theirs.parameters(), strict=True))
        assert all(p.grad is not None and q.grad is not None for p, q in pairs)
        for p, q in pairs:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)

    assert output.scalars is not None
    assert float(output.scalars["loss_mse"]) == pytest.approx(mse.item(), abs=1e-6)
    assert float(output.scalars["loss_teacher"]) == pytest.approx(ce.item(), abs=1e-6)
    assert float(output.scalars["teacher_accuracy"]) == float((taught.argmax(1) == y).double().mean())
    torch.testing.assert_close(output.adversarial_logits, attacked, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_lbgats_networks_see_clean_images_both_and_adversarial_ones_the_student(beta: float) -> None:
    method = lbgat(beta=beta)
    output = method(batch())
    assert int(method.network[1].num_batches_tracked) == 2  # type: ignore[index]
    assert int(method.teacher[1].num_batches_tracked) == 1  # type: ignore[index]
    assert output.clean_logits is not None and output.clean_logits.requires_grad == (beta > 0)


def test_lbgats_attack_climbs_the_kl_on_the_network_and_touches_neither() -> None:
    method, other = lbgat(), lbgat()
    before = snapshot(method)
    found = method.perturb(batch())
    assert same(method, before) and method.network.training and not gradients(method)
    assert bool(Linf(EPS).contains(found, batch().images).all())
    other.teacher.load_state_dict(network(9, width=5).state_dict())
    assert torch.equal(other.perturb(batch()), found)
    f = copy.deepcopy(method.network).eval()
    clean = f(batch().images).detach()
    near = PGD(Linf(EPS), 1, 1e-6, objective=kl_divergence, start="near").run(
        method.search, batch().images, batch().labels, torch.Generator().manual_seed(7)
    )
    assert kl_divergence(f(found), clean).sum() > 10 * kl_divergence(f(near.images), clean).sum()


def test_lbgat_ships_and_logs_the_network() -> None:
    method = lbgat()
    assert method.deployed() is method.trained() is method.network
    torch.testing.assert_close(method.clean_logits(batch().images), network().eval()(batch().images))


@pytest.mark.parametrize("beta", [-1.0, float("nan"), float("inf")])
def test_a_beta_that_is_none_is_refused(beta: float) -> None:
    with pytest.raises(UserError, match="LBGAT takes a beta of at least 0"):
        lbgat(beta=beta)


# The angular distance.


def test_the_angular_distance_is_arccos() -> None:
    draws = torch.Generator().manual_seed(0)
    z, other = torch.randn(2, 50, 7, generator=draws)
    a, b = z.double(), other.double()
    expected = ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).acos() / math.pi
    torch.testing.assert_close(angular_distance(z, other).double(), expected, rtol=0, atol=1e-6)
    right = torch.tensor([[1.0, 0.0]])
    for turned, share in (([0.0, 3.0], 0.5), ([2.0, 2.0], 0.25), ([-1.0, 0.0], 1.0), ([5.0, 0.0], 0.0)):
        assert float(angular_distance(right, torch.tensor([turned]))) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("factor", [2.0, -2.0, 0.0])
def test_the_angular_distance_has_a_finite_slope_everywhere(factor: float) -> None:
    z = torch.tensor([[0.0, 1.0, 0.0]], requires_grad=True)  # its cosines are 1 and -1 to the last bit
    angular_distance(z, factor * z.detach()).sum().backward()
    assert z.grad is not None and bool(torch.isfinite(z.grad).all())


# ARREST.


def by_hand(net: nn.Module, images: Tensor) -> Tensor:
    """The representation of the tiny network, layer by layer."""
    for layer in list(net)[:-1]:  # type: ignore[call-overload]
        images = layer(images)
    return images


def angle(z: Tensor, other: Tensor) -> Tensor:
    z, other = z.double(), other.double()
    return ((z * other).sum(1) / (z.norm(dim=1) * other.norm(dim=1))).acos() / math.pi


def test_arrests_loss_and_gradient_are_its_equation() -> None:
    method = arrest(weight=3.0)
    f, f0 = copy.deepcopy(method.network), copy.deepcopy(method.frozen)
    output = method.loss(batch(), perturbed())
    output.loss.backward()
    assert not f0.training
    ce = F.cross_entropy(f(perturbed()), batch().labels)
    again = copy.deepcopy(method.network)  # its running statistics do not matter in training mode
    distance = angle(by_hand(again, perturbed()), by_hand(f0, batch().images)).mean()
    assert output.loss.item() == pytest.approx((ce + 3 * distance).item(), abs=1e-5)
    assert output.terms is not None and output.scalars is not None
    assert output.terms["classification"].item() == pytest.approx(ce.item(), abs=1e-6)
    assert output.terms["invariance"].item() == pytest.approx(3 * distance.item(), abs=1e-5)
    assert float(output.scalars["distance"]) == pytest.approx(distance.item(), abs=1e-5)
    cosine = F.cosine_similarity(by_hand(again, perturbed()), by_hand(f0, batch().images)).mean()
    assert float(output.scalars["invariance"]) == pytest.approx(cosine.item(), abs=1e-5)
    assert not output.scalars["invariance"].requires_grad
    reference = copy.deepcopy(again)
    reference.zero_grad()
    z = by_hand(reference, perturbed())
    loss = F.cross_entropy(reference[-1](z), batch().labels) + 3 * angle(z, by_hand(f0, batch().images)).mean()  # type: ignore[index]
    loss.backward()
    for mine, theirs in zip(method.network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_the_frozen_network_never_moves() -> None:
    method = arrest()
    before = snapshot(method.frozen)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, weight_decay=0.1)
    for i in range(3):
        method.train()
        assert method.network.training and not any(m.training for m in method.frozen.modules())
        method(batch(i)).loss.backward()
        optimizer.step()
    assert same(method.frozen, before) and not gradients(method.frozen)
    assert not any(p.requires_grad for p in method.frozen.parameters())
    assert all(p.requires_grad for p in method.network.parameters())
    method.eval()
    assert not method.network.training
    assert {name.split(".")[0] for name in method.state_dict()} == {"network", "frozen", "finetuning"}


def test_the_clean_phase_is_standard_training() -> None:
    method = arrest(finetuning=False, moved=False)
    method.enter(CLEAN)
    examples = batch()
    assert method.perturb(examples) is examples.images
    output = method(examples)
    expected = copy.deepcopy(network())(examples.images)
    assert output.loss.item() == pytest.approx(F.cross_entropy(expected, examples.labels).item(), abs=1e-6)
    assert output.terms is None and output.adversarial_logits is None
    assert output.clean_logits is not None and torch.equal(output.clean_logits, expected)


def test_entering_finetuning_freezes_the_network_as_it_is_and_a_resume_does_not_again() -> None:
    method = arrest(finetuning=False)
    method.enter(CLEAN)
    assert not method.finetuning
    method.network(batch().images)
    method.enter(FINETUNING)
    kept = snapshot(method.network)
    assert method.finetuning and same(method.frozen, kept)
    method.network.load_state_dict(network(5).state_dict())
    resumed = arrest(finetuning=False)
    resumed.load_state_dict(method.state_dict())
    resumed.enter(FINETUNING)
    assert same(resumed.frozen, kept) and not same(resumed.network, kept)


def test_the_phases() -> None:
    clean, finetuning = arrest(clean_epochs=7).phases(PLANNED)
    assert clean == Phase("clean", 7, PLANNED.optimizer, PLANNED.schedule)
    assert finetuning == Phase("finetuning", 3, PLANNED.optimizer, PLANNED.schedule)
    assert arrest(clean_epochs=0).phases(PLANNED) == [finetuning]


def distances_by_hand(method: ARREST, adversarial: Tensor) -> Tensor:
    f = copy.deepcopy(method.network).eval()
    return angle(by_hand(f, adversarial), by_hand(method.frozen, batch().images))


def test_distances_are_of_the_network_in_evaluation_mode_and_leave_no_trace() -> None:
    method = arrest()
    before = snapshot(method)
    torch.testing.assert_close(
        method.distances(batch().images, perturbed()).double(),
        distances_by_hand(method, perturbed()),
        rtol=0,
        atol=1e-5,
    )
    assert same(method, before) and method.network.training and not gradients(method)


def test_replay_replaces_exactly_those_above_the_threshold() -> None:
    without = arrest(threshold=1.0)
    plain = without.perturb(batch())
    distances = distances_by_hand(without, plain).detach()
    threshold = float(distances.sort().values[2:4].mean())  # between two images, far from both
    method = arrest(threshold=threshold)
    before = snapshot(method)
    found = method.perturb(batch())
    replaced = ~(found == plain).flatten(1).all(1)
    assert torch.equal(replaced, distances > threshold) and int(replaced.sum()) == 5
    assert bool(Linf(EPS).contains(found, batch().images).all())
    assert same(method, before) and method.network.training and not found.requires_grad
    # Uniform noise: no pixel at rest, few at the radius, where an attack's steps end.
    noise = (found - batch().images)[replaced].abs()
    assert (noise > 0).all() and (noise < 0.99 * EPS).float().mean() > 0.9
    output = method.loss(batch(), found)
    assert output.scalars is not None and float(output.scalars["replayed"]) == 5 / 8
    again = arrest(threshold=threshold)
    assert torch.equal(again.perturb(batch()), found)


def test_a_threshold_of_0_replays_all_and_of_1_does_not_even_look(monkeypatch: pytest.MonkeyPatch) -> None:
    always, never = arrest(threshold=0.0), arrest(threshold=1.0)
    shares = [(always(batch()).scalars or {})["replayed"]]
    monkeypatch.delattr(ARREST, "distances")
    shares.append((never(batch()).scalars or {})["replayed"])
    assert shares == [1, 0]


def test_replay_is_decided_by_where_the_network_is_before_the_step() -> None:
    method = arrest(moved=False, threshold=0.001)
    # As long as f is f0, clean images have not moved: only what the attack does counts.
    assert bool((method.distances(batch().images, batch().images) < 0.001).all())
    assert bool((method.distances(batch().images, perturbed()) > 0.001).any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clean_epochs": -1}, "ARREST takes at least 0 clean_epochs, got -1"),
        ({"clean_epochs": 1.5}, "method arrest: clean_epochs: Input should be a valid integer"),
        ({"weight": -1}, "ARREST takes a weight of at least 0, got -1.0"),
        ({"weight": float("inf")}, "ARREST takes a weight of at least 0, got inf"),
        ({"threshold": 1.1}, "ARREST takes a threshold from 0 to 1, got 1.1"),
        ({"threshold": "nan"}, "method arrest: threshold: 'nan' is not a number"),
        ({"treshold": 0.1}, "no option of method arrest 'treshold'; did you mean 'threshold'"),
    ],
)
def test_wrong_options_of_arrest_are_named_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_method("arrest", network(), adversary=None, targets=LabelSmoothing(), **options)
    assert "\n" not in str(error.value)


def test_without_an_adversary_nothing_is_attacked_or_replayed() -> None:
    method = ARREST(network(), adversary=None, targets=LabelSmoothing(), threshold=0.0)
    method.enter(FINETUNING)
    examples = batch()
    assert method.perturb(examples) is examples.images


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def test_arrest_ships_the_plain_network() -> None:
    method = arrest()
    shipped = method.deployed()
    assert same(shipped, snapshot(method.network)) and shipped.state_dict().keys() == network().state_dict().keys()
    assert hooks(shipped) == 0 and hooks(method.network) == hooks(method.frozen) == 1
    assert all(p.requires_grad for p in shipped.parameters())
    torch.testing.assert_close(method.clean_logits(batch().images), shipped.eval()(batch().images))


# The tap on the head.


def test_a_head_tap_hears_the_input_of_the_last_linear_layer() -> None:
    net = network().eval()
    tap = HeadTap(net)
    net(batch().images)
    with tap.listening() as heard:
        assert heard == []
        net(batch().images)
        net(perturbed())
    net(batch(1).images)
    assert len(heard) == 2
    torch.testing.assert_close(heard[0], by_hand(net, batch().images))
    torch.testing.assert_close(heard[1], by_hand(net, perturbed()))


def test_the_representation_of_a_residual_network_is_its_pooled_feature() -> None:
    net = ResNet(Normalise([0.5], [0.25]), depths=(1, 1, 1, 1), classes=3, in_channels=1, width=2).eval()
    taps, head = FeatureTaps(net, ["layer4"]), HeadTap(net)
    with taps.listening() as features, head.listening() as heard:
        net(torch.rand(2, 1, 16, 16))
    torch.testing.assert_close(heard[0], features["layer4"])  # which ends in a ReLU
    assert hooks(without_taps(net)) == 0


def test_a_copy_has_a_tap_of_its_own() -> None:
    pair = nn.ModuleList([network()])
    pair.tap = HeadTap(pair[0])  # type: ignore[assignment]
    other = copy.deepcopy(pair)
    with other.tap.listening() as theirs, pair.tap.listening() as mine:  # type: ignore[union-attr, operator]
        other[0](batch().images)
    assert len(theirs) == 1 and mine == []


def test_a_network_without_a_head_is_refused() -> None:
    with pytest.raises(UserError, match="no linear layer"):
        HeadTap(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten()))


# Wrappers.


@pytest.mark.parametrize("name", ["lbgat", "arrest"])
@pytest.mark.parametrize("kind", ["awp", "ema", "swa", "both"])
def test_wrappers_go_around_them(name: str, kind: str) -> None:
    inner: NetworkMethod = lbgat() if name == "lbgat" else arrest(threshold=0.2)
    method: Method = inner
    if kind in ("awp", "both"):
        method = WeightPerturbation(method, WeightPerturbationConfig(gamma=0.01))
    if kind != "awp":
        method = WeightAveraging(method, WeightAveragingConfig(kind="swa" if kind == "swa" else "ema"))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05)
    for i in range(3):
        method.train()
        method.before_step(float(i), torch.Generator().manual_seed(i))
        loss = method(batch(i)).loss
        assert bool(torch.isfinite(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step()
    method.after_epoch(lambda: [batch(3), batch(4)])
    shipped = method.deployed()
    assert shipped.state_dict().keys() == network().state_dict().keys() and hooks(shipped) == 0
    assert bool(torch.isfinite(shipped.eval()(batch().images)).all())


def test_the_average_of_arrest_attacks_and_listens_to_itself() -> None:
    method = WeightAveraging(arrest(), WeightAveragingConfig())
    average, inner = method.average, method.inner
    assert isinstance(average, ARREST) and isinstance(inner, ARREST)
    assert average.search is not inner.search and average.search._original is average.network
    assert average.tap is not inner.tap and average.tap in average.network[6]._forward_hooks.values()  # type: ignore[index]
    assert average.frozen_tap in average.frozen[6]._forward_hooks.values()  # type: ignore[index]
    inner.network.load_state_dict(network(8).state_dict())
    expected = angle(by_hand(network(2).eval(), perturbed()), by_hand(average.frozen, batch().images))
    torch.testing.assert_close(average.distances(batch().images, perturbed()).double(), expected, rtol=0, atol=1e-5)


def test_an_average_begun_before_finetuning_enters_it_with_the_weights() -> None:
    method = WeightAveraging(arrest(finetuning=False), WeightAveragingConfig(start=5))
    average, inner = method.average, method.inner
    assert isinstance(average, ARREST) and isinstance(inner, ARREST)
    method.enter(FINETUNING)
    assert inner.finetuning and not average.finetuning
    method.before_step(1.0, torch.Generator())
    method.after_step()
    assert average.finetuning and same(average.frozen, snapshot(inner.frozen))


# Recipes.


DIGITS = Facts(1, 8, tuple("0123456789"), (0.3,), (0.4,))
SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"name": "digits", "validation_samples": 10},
    "model": {"name": "small-cnn", "width": 2},
    "threat": "linf:0.1",
    "method": {"name": "lbgat", "beta": 3.0},
    "optimizer": {"lr": 0.1},
    "epochs": 2,
}
TEACHER = {"name": "resnet18", "width": 2, "second_stride": 1}


def built(**changes: Any) -> NetworkMethod:
    method = build(Recipe.model_validate(SMALL | changes), DIGITS)
    assert isinstance(method, NetworkMethod)
    return method


def test_only_lbgat_takes_a_teacher_and_it_is_no_option() -> None:
    assert {name for name, family in METHODS.items() if family.takes_teacher} == {"lbgat"}
    assert method_options("lbgat") == {"beta": 0.0}
    assert set(method_options("arrest")) == {"clean_epochs", "weight", "threshold"}


def test_the_teacher_is_the_recipes_or_a_second_network_like_the_first() -> None:
    named, default = built(teacher=TEACHER), built()
    assert isinstance(named, LBGAT) and isinstance(default, LBGAT)
    assert isinstance(named.teacher, ResNet) and named.teacher.layer2[0].conv1.stride == (1, 1)
    assert named.teacher.normalise.mean.flatten().tolist() == pytest.approx([0.3])
    assert named.teacher(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    mine, theirs = default.network.state_dict(), default.teacher.state_dict()
    assert mine.keys() == theirs.keys()
    assert not any(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_seeds_of_network_and_teacher_are_apart() -> None:
    first, again, other, plain = built(), built(), built(seed=1), built(method={"name": "trades"})
    assert isinstance(first, LBGAT) and isinstance(again, LBGAT) and isinstance(other, LBGAT)
    assert same(again.teacher, snapshot(first.teacher)) and not same(other.teacher, snapshot(first.teacher))
    assert same(plain.network, snapshot(first.network))  # a teacher beside it changes no network
    assert same(built(teacher=TEACHER).network, snapshot(first.network))


@pytest.mark.parametrize("teacher", [None, "small-cnn", TEACHER])
def test_a_teacher_reads_back(tmp_path: Path, teacher: Any) -> None:
    recipe = Recipe.model_validate(SMALL | {"teacher": teacher})
    assert recipe.resolved()["teacher"] == ({"name": teacher, "width": 16} if teacher == "small-cnn" else teacher)
    assert Recipe.model_validate(json.loads(json.dumps(recipe.resolved()))) == recipe
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path) == recipe


def test_a_recipe_written_before_there_were_teachers_reads_back(tmp_path: Path) -> None:
    resolved = Recipe.model_validate(SMALL).resolved()
    del resolved["teacher"]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(resolved))
    assert load_recipe(tmp_path / "old.yaml") == Recipe.model_validate(SMALL)


def test_a_teacher_is_overridden_like_a_model(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL | {"teacher": "resnet18"}))
    teacher = load_recipe(tmp_path / "small.yaml", {"teacher.width": 4}).teacher
    assert teacher is not None and (teacher.name, teacher.options) == ("resnet18", {"width": 4, "second_stride": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "trades", "teacher": TEACHER},
            "method trades takes no teacher; leave it out (one goes with: lbgat)",
        ),
        ({"method": "arrest", "teacher": "small-cnn"}, "method arrest takes no teacher"),
        ({"teacher": "resnet81"}, "no model 'resnet81'; did you mean 'resnet18'"),
        ({"teacher": {"name": "resnet18", "widht": 2}}, "no option of model resnet18 'widht'; did you mean 'width'"),
        ({"teacher": {"width": 2}}, "recipe small: the key 'teacher.name' is missing"),
        ({"teacher": 5}, "recipe small: teacher: "),
        ({"method": {"name": "lbgat", "teacher": "resnet18"}}, "no option of method lbgat 'teacher'"),
        ({"teacher": TEACHER | {"second_stride": 4}}, "model resnet18: second_stride is 1 or 2, got 4"),
    ],
)
def test_a_wrong_teacher_is_said_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL | changes))
    with pytest.raises(UserError) as error:
        build(load_recipe(tmp_path / "small.yaml"), DIGITS)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["lbgat", "arrest"])
@pytest.mark.parametrize("averaged", [None, {}])
def test_a_run_folder_gives_the_network_alone(tmp_path: Path, name: str, averaged: dict[str, Any] | None) -> None:
    recipe = Recipe.model_validate(SMALL | {"method": name, "weight_averaging": averaged})
    recipe.save(tmp_path / "recipe.yaml")
    weights = build(recipe.model_copy(update={"seed": 9}), DIGITS).deployed().state_dict()
    plain = build(Recipe.model_validate(SMALL | {"method": "standard"}), DIGITS).deployed()
    assert weights.keys() == plain.state_dict().keys()
    save_tensors(tmp_path / "model.safetensors", weights, {"facts": asdict(DIGITS)})
    _, _, found = read_run(tmp_path)
    assert same(found, weights) and hooks(found) == 0 and not found.training


# Whole runs.


FAST: dict[str, Any] = {"model.width": 2, "attack.steps": 2, "epochs": 2, "validation.every": 2}
ARREST_FAST: dict[str, Any] = {**FAST, "method": {"name": "arrest", "clean_epochs": 2, "threshold": 0.1}}
LBGAT_FAST: dict[str, Any] = {**FAST, "method": {"name": "lbgat"}, "model": "small-cnn-bn", "model.width": 2}


def run(folder: Path, overrides: dict[str, Any], **options: Any) -> Path:
    return redan.train("pgd-at-digits", folder, overrides=overrides, progress=False, **options)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("arrest") / "whole", ARREST_FAST)


def test_a_run_of_arrest_goes_through_its_phases(whole: Path) -> None:
    records = rows(whole)
    assert [record["phase"] for record in records] == ["clean", "clean", "finetuning", "finetuning"]
    assert all(("distance" in record) == (record["phase"] == "finetuning") for record in records)
    assert [record["robust_accuracy"] is None for record in records] == [True, True, False, False]
    assert redan.load(whole)(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    tensors, _ = load_tensors(whole / "checkpoint" / "state.safetensors")
    assert bool(tensors["method/finetuning"])
    frozen = {k.removeprefix("method/frozen."): v for k, v in tensors.items() if k.startswith("method/frozen.")}
    last, _ = load_tensors(whole / "model-last.safetensors")
    assert frozen.keys() == last.keys() and not any(torch.equal(frozen[key], last[key]) for key in last)


@pytest.mark.parametrize("place", ["clean", "end of clean", "finetuning", "end of finetuning's first epoch"])
def test_a_resumed_run_of_arrest_comes_to_bitwise_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, place: str
) -> None:
    steps = rows(whole)[0]["step"]  # of an epoch
    after = {"clean": steps + 3, "end of clean": 2 * steps, "finetuning": 2 * steps + 4}.get(place, 3 * steps)
    real, taken = trainer._Training._train_step, []

    def counted(self: Any, *args: Any) -> None:
        real(self, *args)
        taken.append(1)
        self.stop.requested = len(taken) == after

    with monkeypatch.context() as context:
        context.setattr(trainer._Training, "_train_step", counted)
        with pytest.raises(redan.Stopped, match="--resume"):
            run(tmp_path / "parts", ARREST_FAST)
    parts = run(tmp_path / "parts", ARREST_FAST, resume=True)
    for name in ("model.safetensors", "model-last.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert rows(whole) == rows(parts)


@pytest.mark.parametrize("extra", [{}, {"weight_averaging": {"kind": "swa"}, "weight_perturbation": {}}])
def test_a_run_of_lbgat_trains_both_networks_and_ships_one(tmp_path: Path, extra: dict[str, Any]) -> None:
    folder = run(tmp_path / "run", {**LBGAT_FAST, **extra})
    first, last = rows(folder)
    assert last["teacher_accuracy"] > first["teacher_accuracy"] and last["loss_teacher"] < first["loss_teacher"]
    network = redan.load(folder)
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert not any("teacher" in key for key in load_tensors(folder / "model.safetensors")[0])


def test_swa_leaves_the_frozen_network_its_statistics() -> None:
    method = WeightAveraging(arrest(), WeightAveragingConfig(kind="swa", batches=2))
    method.before_step(0.0, torch.Generator().manual_seed(0))
    method(batch())
    method.after_step()
    average = method.average
    assert isinstance(average, ARREST)
    frozen, own = snapshot(average.frozen), snapshot(average.network)
    method.after_epoch(lambda: iter([batch(1), batch(2)]))
    assert same(average.frozen, frozen) and not same(average.network, own)
