"""Methods against their papers' formulas in NumPy, and what wrappers add against closed forms."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from redan.attacks.base import Attack, Outcome
from redan.attacks.objectives import Objective, cross_entropy, kl_divergence
from redan.attacks.pgd import PGD, Start
from redan.attacks.search import Mode, SearchModel
from redan.data.types import Batch
from redan.errors import UserError
from redan.methods.base import (
    Adversary,
    Method,
    NetworkMethod,
    OptimizerConfig,
    Phase,
    ScheduleConfig,
    StepOutput,
    Wrapper,
)
from redan.methods.mart import MART
from redan.methods.pgd_at import PGDAT
from redan.methods.registry import METHODS, build_method, method_options
from redan.methods.standard import Standard
from redan.methods.targets import LabelSmoothing, soft_cross_entropy
from redan.methods.trades import TRADES
from redan.methods.weight_averaging import WeightAveraging, WeightAveragingConfig
from redan.methods.weight_perturbation import WeightPerturbation, WeightPerturbationConfig
from redan.seeds import generator
from redan.threats import Linf

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
EPS = 0.1
LABELS = torch.tensor([0, 2, 1, 2, 0])
ATTACKING: list[type[NetworkMethod]] = [PGDAT, TRADES, MART]


class Identity(nn.Module):
    """Pixels are logits, so that a test can choose the logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def network(seed: int = 0) -> nn.Sequential:
    """Tiny, with everything that matters: a convolution, BatchNorm, vectors and matrices of weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))


def batch(seed: int = 0, n: int = 5) -> Batch:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=draws)
    return Batch(torch.rand(n, 1, 4, 4, generator=draws), labels, torch.arange(n))


def adversary(mode: Mode = "eval", *, objective: Objective = cross_entropy, start: Start = "random") -> Adversary:
    attack = PGD(Linf(EPS), steps=2, step_size=EPS, objective=objective, start=start, drop_broken=False)
    return Adversary(attack, mode=mode, precision="float32")


def make(family: type[NetworkMethod], *, mode: Mode = "eval", seed: int = 0, smoothing: float = 0.0) -> NetworkMethod:
    attacker = adversary(mode, objective=family.attack_objective, start=family.attack_start)
    method = family(network(seed), adversary=attacker if family.attacks else None, targets=LabelSmoothing(smoothing))
    method.before_step(0.0, torch.Generator().manual_seed(7))
    return method


def draws() -> Generator:
    return torch.Generator().manual_seed(7)


# The papers' formulas, in float64.


def softmax(logits: Array) -> Array:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def smooth(labels: Labels, amount: float, classes: int) -> Array:
    return (1 - amount) * np.eye(classes)[labels] + amount / classes


def ce(logits: Array, targets: Array) -> Array:
    return -(targets * np.log(softmax(logits))).sum(1)


def kl(clean: Array, attacked: Array) -> Array:
    p, q = softmax(clean), softmax(attacked)
    return (p * np.log(p / q)).sum(1)


def trades(clean: Array, attacked: Array, y: Labels, beta: float, amount: float) -> float:
    return float(np.mean(ce(clean, smooth(y, amount, clean.shape[1])) + beta * kl(clean, attacked)))


def mart(clean: Array, attacked: Array, y: Labels, beta: float, amount: float) -> float:
    rows, q = np.arange(len(y)), softmax(attacked)
    wrong = q.copy()
    wrong[rows, y] = -1
    bce = ce(attacked, smooth(y, amount, clean.shape[1])) - np.log(1 - wrong.max(1))
    return float(np.mean(bce + beta * kl(clean, attacked) * (1 - softmax(clean)[rows, y])))


def pgd_at(clean: Array, attacked: Array, y: Labels, beta: float, amount: float) -> float:
    return float(np.mean(ce(attacked, smooth(y, amount, clean.shape[1]))))


def standard(clean: Array, attacked: Array, y: Labels, beta: float, amount: float) -> float:
    return float(np.mean(ce(clean, smooth(y, amount, clean.shape[1]))))


Formula = Callable[[Array, Array, Labels, float, float], float]
FORMULAS: dict[str, Formula] = {"standard": standard, "pgd-at": pgd_at, "trades": trades, "mart": mart}


def step(name: str, clean: Tensor, attacked: Tensor, labels: Tensor, beta: float, amount: float) -> StepOutput:
    """The method's loss where the clean and the attacked images have these logits."""
    options: dict[str, Any] = {"beta": beta} if "beta" in method_options(name) else {}
    method = build_method(name, Identity(), adversary=None, targets=LabelSmoothing(amount), **options)
    images = Batch(clean[:, :, None, None], labels, torch.arange(len(labels)))
    return method(images, attacked[:, :, None, None])


@pytest.mark.parametrize("name", FORMULAS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    classes=st.integers(2, 6),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    beta=st.sampled_from([0.0, 1.0, 6.0]),
    amount=st.sampled_from([0.0, 0.1]),
)
def test_the_loss_is_the_papers(name: str, seed: int, classes: int, scale: float, beta: float, amount: float) -> None:
    draws = np.random.default_rng(seed)
    clean, attacked = draws.normal(size=(2, 4, classes)).astype(np.float32) * scale
    y = draws.integers(classes, size=4)
    output = step(name, torch.tensor(clean), torch.tensor(attacked), torch.tensor(y), beta, amount)
    expected = FORMULAS[name](clean.astype(np.float64), attacked.astype(np.float64), y, beta, amount)
    assert output.loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("amount", [0.0, 0.2])
def test_gradients_flow_into_every_term(name: str, amount: float) -> None:
    draws = np.random.default_rng(3)
    logits = draws.normal(size=(2, 5, 3))
    y = LABELS.numpy()
    expected = np.zeros_like(logits)
    for place in np.ndindex(logits.shape):
        moved = np.zeros_like(logits)
        moved[place] = 1e-6
        up, down = (
            FORMULAS[name](clean, attacked, y, 6.0, amount) for clean, attacked in (logits + moved, logits - moved)
        )
        expected[place] = (up - down) / 2e-6
    leaf = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    step(name, leaf[0], leaf[1], LABELS, 6.0, amount).loss.backward()
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad.numpy(), expected, atol=2e-6)


def test_mart_is_finite_where_a_wrong_class_is_certain() -> None:
    clean, attacked = torch.zeros(1, 3), torch.tensor([[0.0, 60.0, 0.0]], requires_grad=True)
    output = step("mart", clean, attacked, torch.tensor([0]), 0.0, 0.0)
    # -log p_y = 60; 1 - p_wrong = 2 e^-60, which is 0 in float32 when computed as a difference.
    assert output.loss.item() == pytest.approx(60 + 60 - np.log(2), rel=1e-6)
    output.loss.backward()
    assert attacked.grad is not None and torch.isfinite(attacked.grad).all()


def test_what_is_logged() -> None:
    clean, attacked = torch.randn(2, 5, 3, generator=draws())
    trades, mart = (step(name, clean, attacked, LABELS, 6.0, 0.0) for name in ("trades", "mart"))
    for output in (trades, mart):
        assert output.clean_logits is not None and torch.equal(output.clean_logits, clean)
        assert output.adversarial_logits is not None and torch.equal(output.adversarial_logits, attacked)
    assert trades.scalars is not None and mart.scalars is not None
    p, q = clean.double().numpy(), attacked.double().numpy()
    assert float(trades.scalars["loss_natural"]) == pytest.approx(float(F.cross_entropy(clean, LABELS)))
    assert float(trades.scalars["loss_robust"]) == pytest.approx(kl(p, q).mean(), rel=1e-5)
    assert float(mart.scalars["weight"]) == pytest.approx(1 - softmax(p)[range(5), LABELS].mean(), rel=1e-5)
    assert trades.loss.item() == pytest.approx(
        float(trades.scalars["loss_natural"] + 6 * trades.scalars["loss_robust"]), rel=1e-6
    )
    assert mart.loss.item() == pytest.approx(float(mart.scalars["loss_bce"] + 6 * mart.scalars["loss_kl"]), rel=1e-6)
    only_clean = step("standard", clean, attacked, LABELS, 0.0, 0.0)
    assert only_clean.adversarial_logits is None and only_clean.clean_logits is not None
    only_attacked = step("pgd-at", clean, attacked, LABELS, 0.0, 0.0)
    assert only_attacked.clean_logits is None and only_attacked.adversarial_logits is not None


# Targets.


@given(amount=st.floats(0, 1, exclude_max=True), classes=st.integers(2, 100))
def test_label_smoothing_gives_distributions(amount: float, classes: int) -> None:
    labels = torch.arange(classes)
    rows = LabelSmoothing(amount)(labels, labels, classes)
    torch.testing.assert_close(rows.sum(1), torch.ones(classes))
    torch.testing.assert_close(rows.diagonal(), torch.full((classes,), 1 - amount + amount / classes))
    assert (rows >= 0).all() and (rows[0, 1:] == rows[0, 1]).all()


def test_no_smoothing_is_cross_entropy() -> None:
    logits = torch.randn(5, 3, generator=draws())
    targets = LabelSmoothing()(LABELS, LABELS, 3)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), F.cross_entropy(logits, LABELS, reduction="none"))


def test_smoothing_is_torchs() -> None:
    logits = torch.randn(5, 3, generator=draws())
    theirs = F.cross_entropy(logits, LABELS, reduction="none", label_smoothing=0.3)
    torch.testing.assert_close(soft_cross_entropy(logits, LabelSmoothing(0.3)(LABELS, LABELS, 3)), theirs)


@pytest.mark.parametrize("amount", [-0.1, 1.0, float("nan")])
def test_label_smoothing_out_of_range_is_refused(amount: float) -> None:
    with pytest.raises(UserError, match="label smoothing"):
        LabelSmoothing(amount)


# The attack inside training.


def test_what_each_training_attack_maximises_and_where_it_starts() -> None:
    assert {name: (family.attack_objective, family.attack_start) for name, family in METHODS.items()} == {
        "arat": (cross_entropy, "random"),
        "standard": (cross_entropy, "random"),
        "pgd-at": (cross_entropy, "random"),
        "trades": (kl_divergence, "near"),
        "mart": (cross_entropy, "near"),
        "lbgat": (kl_divergence, "near"),
        "arrest": (cross_entropy, "random"),
        "atop": (cross_entropy, "image"),
        "colt": (cross_entropy, "random"),
        "ibp": (cross_entropy, "random"),
        "crown-ibp": (cross_entropy, "random"),
        "sabr": (cross_entropy, "random"),
        "mtl-ibp": (cross_entropy, "random"),
    }
    assert {name for name, family in METHODS.items() if not family.attacks} == {"standard"}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("family", ATTACKING)
def test_the_attack_leaves_the_network_alone(family: type[NetworkMethod], mode: Mode) -> None:
    method, examples = make(family, mode=mode), batch()
    before, images = snapshot(method), examples.images.clone()
    attacked = method.perturb(examples)
    assert_same(method, before)
    assert method.network.training
    assert all(p.grad is None and p.requires_grad for p in method.parameters())
    assert torch.equal(examples.images, images) and not attacked.requires_grad
    distance = (attacked - images).abs().amax()
    assert 0 < distance <= EPS and attacked.amin() >= 0 and attacked.amax() <= 1


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("family", "forwards"), [(Standard, 1), (PGDAT, 1), (TRADES, 2), (MART, 2)])
def test_the_loss_updates_batch_norm_once_a_forward(family: type[NetworkMethod], forwards: int, mode: Mode) -> None:
    method, examples = make(family, mode=mode), batch()
    before = copy.deepcopy(method.network)
    attacked = method.perturb(examples)
    method(examples, attacked)
    assert int(method.network[1].num_batches_tracked) == forwards  # type: ignore[index]
    seen = {Standard: [examples.images], PGDAT: [attacked]}.get(family, [examples.images, attacked])
    for images in seen:
        before(images)
    assert_same(method.network, snapshot(before))


def test_standard_training_attacks_nothing() -> None:
    examples = batch()
    assert make(Standard).perturb(examples) is examples.images


@pytest.mark.parametrize("family", ATTACKING)
def test_the_attack_follows_the_weights(family: type[NetworkMethod]) -> None:
    method, fresh = make(family), make(family, seed=1)
    stale = method.perturb(batch())
    method.load_state_dict(fresh.state_dict())
    method.before_step(0.0, draws())
    followed = method.perturb(batch())
    assert torch.equal(followed, fresh.perturb(batch()))
    assert not torch.equal(followed, stale)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("family", [Standard, *ATTACKING])
def test_clean_logits_are_the_present_networks_in_evaluation_mode(family: type[NetworkMethod], mode: Mode) -> None:
    method, examples = make(family, mode=mode), batch()
    method.perturb(examples)
    method.clean_logits(examples.images)
    method.load_state_dict(make(family, seed=1).state_dict())
    method(batch(1), batch(2).images)  # moves BatchNorm's statistics
    before = snapshot(method)
    logits = method.clean_logits(examples.images)
    assert_same(method, before)
    assert method.network.training and not logits.requires_grad
    torch.testing.assert_close(logits, copy.deepcopy(method.network).eval()(examples.images))


def test_the_adversary_is_not_part_of_what_is_trained() -> None:
    method = make(TRADES)
    method.perturb(batch())
    assert {name.split(".")[0] for name in method.state_dict()} == {"network"}
    assert method.deployed() is method.network


def test_who_chooses_the_best_checkpoint() -> None:
    assert make(Standard).selects_by == "clean"
    assert make(PGDAT).selects_by == "robust"


def test_a_network_method_trains_in_the_one_phase_that_was_planned() -> None:
    planned = Phase("training", 3, OptimizerConfig(lr=0.1), ScheduleConfig())
    assert make(TRADES).phases(planned) == [planned]


# Methods by name.


def test_method_options_are_checked() -> None:
    assert method_options("trades") == {"beta": 6.0}
    assert method_options("mart") == {"beta": 5.0}
    assert method_options("standard") == method_options("pgd-at") == {}
    with pytest.raises(UserError, match="did you mean 'trades'"):
        method_options("tradse")
    with pytest.raises(UserError, match="no option of method trades 'betta'; did you mean 'beta'"):
        build_method("trades", network(), adversary=None, targets=LabelSmoothing(), betta=1.0)


@pytest.mark.parametrize("name", ["trades", "mart"])
@pytest.mark.parametrize("beta", [-1, "six", None, float("nan"), float("inf"), [1]])
def test_a_beta_that_is_none_is_refused_in_one_line(name: str, beta: Any) -> None:
    with pytest.raises(UserError, match="beta") as error:
        build_method(name, network(), adversary=None, targets=LabelSmoothing(), beta=beta)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("beta", [0.5, "5e-1", "1/2"])
def test_a_beta_may_be_written_as_yaml_leaves_it(beta: Any) -> None:
    method = build_method("trades", network(), adversary=None, targets=LabelSmoothing(), beta=beta)
    assert isinstance(method, TRADES) and method.beta == 0.5


# Adversarial weight perturbation.


def gradients(method: Method, examples: Batch, attacked: Tensor) -> dict[str, Tensor]:
    method.zero_grad()
    method.loss(examples, attacked).loss.backward()
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", [Standard, *ATTACKING])
def test_weight_perturbation_by_hand(family: type[NetworkMethod]) -> None:
    gamma, examples, attacked = 0.1, batch(), batch(1).images
    wrapped = WeightPerturbation(make(family), WeightPerturbationConfig(gamma=gamma))
    before = snapshot(wrapped)

    ascent = gradients(make(family), examples, attacked)
    by_hand = make(family)
    with torch.no_grad():
        for name, w in by_hand.named_parameters():
            if w.dim() > 1:
                w.add_(gamma * w.norm() * ascent[name] / ascent[name].norm())
    expected = gradients(by_hand, examples, attacked)
    expected_loss = make_loss(by_hand, examples, attacked)

    found = gradients(wrapped, examples, attacked)
    assert {name.removeprefix("inner.") for name in found} == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"inner.{name}"], gradient, rtol=1e-3, atol=1e-6)
    plain = gradients(make(family), examples, attacked)
    assert not torch.allclose(plain["network.4.weight"], expected["network.4.weight"], rtol=1e-2)

    # The weights are where they were; BatchNorm saw each batch once, at the perturbed weights.
    for name, p in wrapped.named_parameters():
        assert torch.equal(p, before[name])
    for name, buffer in by_hand.named_buffers():
        torch.testing.assert_close(wrapped.get_buffer(f"inner.{name}"), buffer)
    assert make_loss(wrapped, examples, attacked) == pytest.approx(expected_loss, rel=1e-4)


def make_loss(method: Method, examples: Batch, attacked: Tensor) -> float:
    """The loss without a trace in BatchNorm."""
    return float(copy.deepcopy(method).loss(examples, attacked).loss.detach())


def test_weight_perturbation_raises_the_loss() -> None:
    examples = batch()
    inner = make(PGDAT)
    attacked = inner.perturb(examples)
    wrapped = WeightPerturbation(inner, WeightPerturbationConfig(gamma=0.01))
    assert make_loss(wrapped, examples, attacked) > make_loss(inner, examples, attacked)


def test_weight_perturbation_waits_for_its_start() -> None:
    examples, attacked = batch(), batch(1).images
    wrapped = WeightPerturbation(make(TRADES), WeightPerturbationConfig(gamma=0.1, start=2.0))
    plain = gradients(make(TRADES), examples, attacked)
    wrapped.before_step(1.99, draws())
    before = gradients(wrapped, examples, attacked)
    assert all(torch.equal(before[f"inner.{name}"], plain[name]) for name in plain)
    wrapped.before_step(2.0, draws())
    after = gradients(wrapped, examples, attacked)
    assert not torch.allclose(after["inner.network.4.weight"], plain["network.4.weight"], rtol=1e-2)


def test_weight_perturbation_makes_its_images_at_the_weights_themselves() -> None:
    wrapped = WeightPerturbation(make(TRADES), WeightPerturbationConfig(gamma=0.5))
    assert torch.equal(wrapped.perturb(batch()), make(TRADES).perturb(batch()))


def test_frozen_weights_are_not_perturbed() -> None:
    examples, attacked = batch(), batch(1).images

    def frozen() -> Method:
        method = make(PGDAT)
        method.network[0].weight.requires_grad_(False)  # type: ignore[index]
        return method

    by_hand, gamma = frozen(), 0.1
    ascent = gradients(frozen(), examples, attacked)["network.4.weight"]
    with torch.no_grad():
        w = by_hand.get_parameter("network.4.weight")
        w.add_(gamma * w.norm() * ascent / ascent.norm())
    wrapped = WeightPerturbation(frozen(), WeightPerturbationConfig(gamma=gamma))
    assert make_loss(wrapped, examples, attacked) == pytest.approx(make_loss(by_hand, examples, attacked), rel=1e-5)


def test_weight_perturbation_without_gradients_is_the_inner_loss() -> None:
    examples, attacked = batch(), batch(1).images
    wrapped = WeightPerturbation(make(TRADES), WeightPerturbationConfig(gamma=0.5))
    with torch.no_grad():
        assert make_loss(wrapped, examples, attacked) == make_loss(wrapped.inner, examples, attacked)


def test_weight_perturbation_runs_in_mixed_precision() -> None:
    examples, attacked = batch(), batch(1).images
    exact = gradients(WeightPerturbation(make(PGDAT), WeightPerturbationConfig(gamma=0.1)), examples, attacked)
    wrapped = WeightPerturbation(make(PGDAT), WeightPerturbationConfig(gamma=0.1))
    with torch.autocast("cpu", torch.bfloat16):
        output = wrapped(examples, attacked)
    output.loss.backward()
    for name in ("inner.network.4.weight", "inner.network.4.bias"):
        gradient = wrapped.get_parameter(name).grad
        assert gradient is not None
        assert (gradient - exact[name]).norm() < 0.1 * exact[name].norm()


# Averages of the weights.


def averaging(inner: Method, **config: Any) -> WeightAveraging:
    return WeightAveraging(inner, WeightAveragingConfig(**config))


def walk(method: WeightAveraging, steps: int, *, per_epoch: int = 4) -> Iterator[dict[str, Tensor]]:
    """Steps that move the weights at random, as an optimiser might; yields the inner state after each."""
    noise = torch.Generator().manual_seed(1)
    for i in range(steps):
        method.before_step(i / per_epoch, draws())
        with torch.no_grad():
            for tensor in method.inner.state_dict().values():
                if tensor.is_floating_point():
                    tensor += torch.rand(tensor.shape, generator=noise)
                else:
                    tensor += 1
        method.after_step()
        yield snapshot(method.inner)


def assert_average(method: WeightAveraging, expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(method.average.state_dict()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", [0.0, 1.0, 1.1])
def test_the_exponential_average_is_the_closed_form(start: float) -> None:
    method, decay = averaging(make(PGDAT), kind="ema", decay=0.9, start=start), 0.9
    states = list(walk(method, 9))
    first = next(i for i in range(9) if i / 4 >= start)
    weights = [decay ** (8 - first)] + [(1 - decay) * decay ** (8 - i) for i in range(first + 1, 9)]
    assert sum(weights) == pytest.approx(1)
    expected = {
        name: sum(w * state[name] for w, state in zip(weights, states[first:], strict=True))
        if value.is_floating_point()
        else value
        for name, value in states[-1].items()
    }
    assert_average(method, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_swa_is_the_mean_of_its_snapshots(start: float, every: int) -> None:
    method = averaging(make(PGDAT), kind="swa", start=start, every=every)
    taken: list[dict[str, Tensor]] = []
    for i, state in enumerate(walk(method, 10)):
        if i / 4 >= start and (i + 1) % every == 0:
            taken.append(state)
        weights = {name: v for name, v in method.average.state_dict().items() if v.is_floating_point()}
        # Until the first snapshot the average is the weights.
        expected = {n: torch.stack([s[n] for s in taken]).mean(0) if taken else state[n] for n in weights}
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    assert int(method.snapshots) == len(taken) > 1


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_what_ships_is_the_average(kind: Literal["ema", "swa"]) -> None:
    inner = make(PGDAT)
    method = averaging(inner, kind=kind)
    for _ in walk(method, 4):
        pass
    shipped, trained = method.deployed(), inner.deployed()
    assert shipped is method.average.deployed() and shipped is not trained
    assert not torch.allclose(shipped.state_dict()["0.weight"], trained.state_dict()["0.weight"])
    assert not any(p.requires_grad for p in shipped.parameters())
    assert all(p.requires_grad for p in trained.parameters())


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averaging_goes_on_from_its_state(kind: Literal["ema", "swa"]) -> None:
    def fresh() -> WeightAveraging:
        return averaging(make(PGDAT), kind=kind, every=2, start=0.5)

    whole, first, second = fresh(), fresh(), fresh()
    for i, state in enumerate(walk(whole, 8)):
        target = first if i < 5 else second
        if i == 5:
            second.load_state_dict(first.state_dict())
        target.before_step(i / 4, draws())
        target.inner.load_state_dict(state)
        target.after_step()
    assert_same(second, snapshot(whole))


def cumulative(batches: list[Tensor]) -> tuple[Array, Array]:
    """Mean over batches of the batches' own mean and unbiased variance, per channel."""
    arrays = [b.detach().double().numpy() for b in batches]
    means = [a.mean((0, 2, 3)) for a in arrays]
    variances = [a.transpose(1, 0, 2, 3).reshape(a.shape[1], -1).var(1, ddof=1) for a in arrays]
    return np.mean(means, 0), np.mean(variances, 0)


@pytest.mark.parametrize(
    ("family", "perturbed"), [(Standard, False), (PGDAT, False), (TRADES, False), (MART, True), (TRADES, True)]
)
def test_swa_estimates_batch_norm_anew(family: type[NetworkMethod], perturbed: bool) -> None:
    inner: Method = make(family)
    if perturbed:
        inner = WeightPerturbation(inner, WeightPerturbationConfig(gamma=0.1))
    method = averaging(inner, kind="swa", batches=3)
    for _ in walk(method, 3):
        pass
    before = snapshot(method.inner)
    weights = {name: p.clone() for name, p in method.average.named_parameters()}
    examples = [batch(seed) for seed in range(4)]
    network = copy.deepcopy(method.deployed())
    assert isinstance(network, nn.Sequential)

    # What the averaged network is attacked with: images made against it as it was.
    seen: list[Tensor] = []
    attacks = {Standard: "clean", PGDAT: "attacked"}.get(family, "both")
    method.after_epoch(lambda: examples)
    attacker = adversary(objective=family.attack_objective, start=family.attack_start).attack
    for i, example in enumerate(examples[:3]):
        if attacks != "attacked":
            seen.append(example.images)
        if attacks != "clean":
            frozen = SearchModel(copy.deepcopy(network).eval(), precision="float32")
            seen.append(attacker(frozen, example.images, example.labels, generator=generator("statistics", i)))
    mean, variance = cumulative([network[0](images) for images in seen])

    norm = method.deployed()[1]  # type: ignore[index]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=1e-4, atol=1e-5)
    assert int(norm.num_batches_tracked) == len(seen)  # type: ignore[arg-type]
    assert norm.momentum == 0.1
    # Nothing else moved.
    assert_same(method.inner, before)
    assert all(torch.equal(p, weights[name]) for name, p in method.average.named_parameters())


def test_each_batch_norm_keeps_its_momentum() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2, momentum=0.3),
        nn.Flatten(),
        nn.BatchNorm1d(8, momentum=None),
        nn.Linear(8, 3),
    )
    method = averaging(Standard(network, adversary=None, targets=LabelSmoothing()), kind="swa")
    for _ in walk(method, 1):
        pass
    method.after_epoch(lambda: [batch()])
    shipped = method.deployed()
    assert [m.momentum for m in shipped.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)] == [0.3, None]


@pytest.mark.parametrize("config", [{"kind": "ema"}, {"kind": "swa", "start": 5.0}])
def test_batch_norm_is_not_estimated_where_there_is_no_mean_of_snapshots(config: dict[str, Any]) -> None:
    method = averaging(make(Standard), **config)
    for _ in walk(method, 2):
        pass
    before = snapshot(method)

    def unwanted() -> list[Batch]:
        raise AssertionError("no batch is needed")

    method.after_epoch(unwanted)
    assert_same(method, before)


def test_wrappers_compose() -> None:
    """Averaging around perturbation around TRADES: two steps by hand."""
    gamma, decay, rate = 0.1, 0.8, 0.1
    method = averaging(WeightPerturbation(make(TRADES), WeightPerturbationConfig(gamma=gamma)), kind="ema", decay=decay)
    by_hand = WeightPerturbation(make(TRADES), WeightPerturbationConfig(gamma=gamma))
    optimizers = [
        torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=rate) for module in (method, by_hand)
    ]
    states = []
    for i in range(2):
        for module, optimizer in zip((method, by_hand), optimizers, strict=True):
            module.before_step(i / 2, draws())
            optimizer.zero_grad()
            module(batch(i)).loss.backward()
            optimizer.step()
            module.after_step()
        states.append(snapshot(by_hand.deployed()))
    assert_same(method.inner.deployed(), states[1])
    shipped = method.deployed().state_dict()
    for name, value in shipped.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, decay * states[0][name] + (1 - decay) * states[1][name])
    assert method.selects_by == "robust"


# The base of all wrappers.


@dataclass(frozen=True)
class Noting(Attack):
    """Writes down what it was given; its images are ones."""

    seen: list[Any]

    def run(self, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        self.seen.append((images, labels, generator))
        return Outcome(torch.ones_like(images), torch.zeros_like(labels))


def test_the_attack_gets_the_batch_and_the_steps_own_randomness() -> None:
    seen: list[Any] = []
    method = Wrapper(PGDAT(Identity(), adversary=Adversary(Noting(Linf(EPS), seen)), targets=LabelSmoothing()))
    examples, randomness = batch(), draws()
    method.before_step(1.5, randomness)
    output = method(examples)
    (given_to_attack,) = seen
    assert given_to_attack[0] is examples.images and given_to_attack[1] is examples.labels
    assert given_to_attack[2] is randomness and method.epoch == 1.5
    assert output.loss.item() == pytest.approx(np.log(16), rel=1e-5)  # sixteen equal logits


class Recorder(Method):
    """Answers every question of a method with something of its own, and notes what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def perturb(self, batch: Batch) -> Tensor:
        return batch.images + 1

    def loss(self, batch: Batch, adversarial: Tensor) -> StepOutput:
        return StepOutput(adversarial.sum())

    def clean_logits(self, images: Tensor) -> Tensor:
        return images + 2

    def trained(self) -> nn.Module:
        return nn.Sigmoid()

    def deployed(self) -> nn.Module:
        return nn.Tanh()

    @property
    def selects_by(self) -> Literal["clean", "robust"]:
        return "clean"

    def phases(self, planned: Phase) -> list[Phase]:
        return [planned, planned]

    def enter(self, phase: Phase) -> None:
        self.told.append(phase)

    def after_step(self) -> None:
        self.told.append("step")

    def after_epoch(self, batches: Callable[[], Any]) -> None:
        self.told.append(batches)


def test_a_wrapper_passes_on_everything() -> None:
    inner, examples, planned = Recorder(), batch(), Phase("x", 1, OptimizerConfig(lr=1), ScheduleConfig())
    wrapper, randomness = Wrapper(inner), draws()
    assert torch.equal(wrapper.perturb(examples), examples.images + 1)
    assert wrapper.loss(examples, examples.images).loss == examples.images.sum()
    assert wrapper(examples).loss == (examples.images + 1).sum()
    assert wrapper(examples, examples.images).loss == examples.images.sum()
    assert torch.equal(wrapper.clean_logits(examples.images), examples.images + 2)
    assert isinstance(wrapper.trained(), nn.Sigmoid)
    assert isinstance(wrapper.deployed(), nn.Tanh)
    assert wrapper.selects_by == "clean"
    assert wrapper.phases(planned) == [planned, planned]
    wrapper.before_step(2.5, randomness)
    assert (inner.epoch, wrapper.epoch) == (2.5, 2.5) and inner.draws is wrapper.draws is randomness
    wrapper.enter(planned)
    wrapper.after_step()
    wrapper.after_epoch(list)
    assert inner.told == [planned, "step", list]
    # Nothing that a method can do is left out; forward is made of the parts.
    public = {name for name in vars(Method) if not name.startswith("_")} - {"forward"}
    assert public <= set(vars(Wrapper))
