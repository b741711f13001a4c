"""Attacks: they reach the optimum where it is known, count only what is real, and leave everything as it was."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn

from redan.attacks import (
    APGD,
    FGSM,
    PGD,
    Attack,
    SearchModel,
    TargetedAPGD,
    cross_entropy,
    cw_margin,
    dlr,
    kl_divergence,
)
from redan.attacks.apgd import checkpoints
from redan.attacks.objectives import OBJECTIVES, Objective
from redan.errors import UserError
from redan.models.norms import Normalise
from redan.threats import L1, L2, THREATS, Linf, LpBall

EPS = 0.1
ALL_ATTACKS: dict[str, Attack] = {
    "fgsm": FGSM(Linf(EPS)),
    "pgd": PGD(Linf(EPS), steps=4),
    "pgd to the end": PGD(Linf(EPS), steps=4, drop_broken=False),
    "pgd l2": PGD(L2(1.0), steps=4, restarts=2),
    "pgd l1": PGD(L1(5.0), steps=4),
    "pgd kl": PGD(Linf(EPS), steps=4, objective=kl_divergence, start="near"),
    "apgd": APGD(Linf(EPS), steps=6),
    "apgd dlr": APGD(L2(1.0), steps=6, objective=dlr, restarts=2),
    "apgd l1": APGD(L1(5.0), steps=6),
    "apgd-t linf": TargetedAPGD(Linf(0.1), steps=4, targets=3),
    "apgd-t l1": TargetedAPGD(L1(5.0), steps=6, targets=2),
}
EVERY = pytest.mark.parametrize("attack", ALL_ATTACKS.values(), ids=ALL_ATTACKS)


def draws(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=draws(seed))


class Linear(nn.Module):
    """Two classes: logits ``(0, bias + <w, x>)`` times ``scale``."""

    w: Tensor

    def __init__(self, w: Tensor, bias: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("w", w)
        self.bias, self.scale = bias, scale

    def forward(self, x: Tensor) -> Tensor:
        z = self.scale * (x.flatten(1) @ self.w + self.bias)
        return torch.stack([torch.zeros_like(z), z], 1)


class Counting(nn.Module):
    """Counts the images that pass; cannot be traced, so that searching passes through here as well."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        out: Tensor = self.inner(x)
        return out


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)


@pytest.fixture(scope="module")
def net(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """A small network with BatchNorm that is right about most digits and a little robust."""
    images, labels = digits
    torch.manual_seed(0)
    model = nn.Sequential(
        Normalise([0.3], [0.4]),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(120):
        rows = torch.randint(1400, (64,), generator=draws(step))
        x = (images[rows] + 0.15 * torch.randn(64, 1, 8, 8, generator=draws(step))).clamp(0, 1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()
    assert (model(images[1400:]).argmax(1) == labels[1400:]).float().mean() > 0.85
    return model


@pytest.fixture(scope="module")
def batch(digits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return digits[0][1400:1500], digits[1][1400:1500]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def robust(attack: Attack, net: nn.Module, batch: tuple[Tensor, Tensor], seed: int = 0) -> float:
    return accuracy(net, attack(net, *batch, generator=draws(seed)), batch[1])


# What is known in closed form


def climbers(threat: LpBall) -> list[Attack]:
    return [
        PGD(threat, steps=60, drop_broken=False, step_size=threat.radius),
        PGD(threat, steps=60, start="image"),
        PGD(threat, steps=60, step_size=threat.radius / 4, objective=cw_margin, restarts=2),
        APGD(threat, steps=60),
        APGD(threat, steps=60, objective=cw_margin, restarts=2),
    ]


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("which", range(6))
def test_linf_attacks_on_a_linear_model_reach_the_corner(which: int, label: int) -> None:
    # The class 1 side gains most in the corner x + eps sign(w), cut with the box; the biases keep all labels right.
    w = torch.randn(12, generator=draws(1))
    x, labels = uniform(2, 5, 1, 3, 4), torch.full((5,), label)
    model = Linear(w, bias=-50.0 if label == 0 else 50.0, scale=0.05)
    attack = [FGSM(Linf(0.2)), *climbers(Linf(0.2))][which]
    corner = (x + 0.2 * (1 - 2 * label) * w.sign().view(1, 1, 3, 4)).clamp(0, 1)
    torch.testing.assert_close(attack(model, x, labels, generator=draws()), corner, rtol=0, atol=1e-6)


@pytest.mark.parametrize("which", range(5))
def test_l2_attacks_on_a_linear_model_go_along_its_weights(which: int) -> None:
    w = torch.randn(12, generator=draws(1))
    x, labels = 0.4 + 0.2 * uniform(2, 5, 1, 3, 4), torch.zeros(5, dtype=torch.int64)
    end = x + 0.3 * (w / w.norm()).view(1, 1, 3, 4)
    assert end.min() > 0 and end.max() < 1
    search = SearchModel(Linear(w, bias=-50.0, scale=0.05), precision="float32")
    attacked = climbers(L2(0.3))[which](search, x, labels, generator=draws())
    torch.testing.assert_close(attacked, end, rtol=0, atol=2e-3)


@pytest.mark.parametrize("which", range(5))
def test_l1_attacks_on_a_linear_model_spend_all_on_the_best_pixel(which: int) -> None:
    w = torch.randn(12, generator=draws(1))
    x, labels = 0.4 + 0.2 * uniform(2, 5, 1, 3, 4), torch.zeros(5, dtype=torch.int64)
    search = SearchModel(Linear(w, bias=-50.0, scale=0.05), precision="float32")
    attacked = climbers(L1(0.3))[which](search, x, labels, generator=draws())
    gain = ((attacked - x).flatten(1) * w).sum(1)
    torch.testing.assert_close(gain, torch.full((5,), 0.3 * float(w.abs().max())), rtol=2e-3, atol=0)


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_confidence_is_no_defence(scale: float) -> None:
    # All images whose margin the corner overcomes are broken, however steep the logits.
    w = torch.randn(16, generator=draws(1))
    model = Linear(w - w.mean(), scale=scale)
    x = 0.3 + 0.4 * uniform(2, 200, 1, 4, 4)
    labels = model(x).argmax(1)
    breakable = (x.flatten(1) @ model.w).abs() < 0.05 * model.w.abs().sum() * (1 - 1e-3)
    assert 20 < breakable.sum() < 180
    for attack in (FGSM(Linf(0.05)), PGD(Linf(0.05)), APGD(Linf(0.05), steps=20)):
        broken = model(attack(model, x, labels, generator=draws())).argmax(1) != labels
        assert broken[breakable].all()


def test_fgsm_is_the_formula(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    right = net(images).argmax(1) == labels
    leaf = images[right].double().requires_grad_()  # in float64, or it lacks the gradient where the net is certain
    exact = copy.deepcopy(net).double()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(exact(leaf), labels[right], reduction="sum"), leaf)
    expected = (leaf + EPS * gradient.sign()).clamp(0, 1).float()
    attacked = FGSM(Linf(EPS))(SearchModel(net, precision="float32"), images[right], labels[right])
    assert ((attacked - expected).abs() < 1e-6).float().mean() > 0.999  # a gradient of 0 may round to either side


def test_apgd_reviews_its_step_size_as_published() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    shares = [0.0, 0.22]  # section 3.1 in whole percents, so that nothing rounds
    while shares[-1] < 1:
        shares.append(round(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06), 2))
    assert checkpoints(100) == [math.ceil(round(100 * share, 6)) for share in shares[1:-1]]
    for steps in range(1, 60):
        reviews = checkpoints(steps)
        assert reviews == sorted(set(reviews))
        assert reviews[0] >= 1 and reviews[-1] <= steps


class Hilly(nn.Module):
    """A rough landscape, the second logit less the third, in which the first always wins."""

    def __init__(self, steepness: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 30), nn.Linear(30, 3)
        with torch.no_grad():
            self.first.weight.mul_(steepness)
            self.second.bias[0] = 1000

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.second(torch.sin(self.first(x.flatten(1))))
        return z


hill = Objective("hill", lambda logits, labels: logits[:, 1] - logits[:, 2])


def apgd_by_the_book(model: nn.Module, threat: LpBall, center: Tensor, start: Tensor, steps: int) -> Tensor:
    """Algorithm 1 with alpha = rho = 0.75, for one image, with its whole history kept."""

    def f(x: Tensor) -> float:
        z = model(x).detach()[0]
        return float(z[1] - z[2])

    def gradient(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        z = model(leaf)[0]
        return torch.autograd.grad(z[1] - z[2], leaf)[0]

    def up(x: Tensor) -> Tensor:
        return threat.project(threat.ascend(x, gradient(x), eta), center)

    eta, reviews = 2 * threat.radius, [0, *checkpoints(steps)]
    etas, bests = [eta], [f(start)]
    x = [start, up(start)]
    best, rises = max(x, key=f), [f(x[1]) > f(x[0])]
    for k in range(1, steps + 1):
        if k in reviews[1:]:
            since = reviews[reviews.index(k) - 1]
            too_few = sum(rises[since:]) < 0.75 * (k - since)
            stuck = etas[-1] == eta and bests[-1] == f(best)
            etas, bests = [*etas, eta], [*bests, f(best)]
            if too_few or stuck:
                eta, x[k] = eta / 2, best
        if k < steps:
            x.append(threat.project(x[k] + 0.75 * (up(x[k]) - x[k]) + 0.25 * (x[k] - x[k - 1]), center))
            rises.append(f(x[k + 1]) > f(x[k]))
            best = max(best, x[k + 1], key=f)
    return best


@pytest.mark.parametrize(
    ("threat", "steepness", "steps", "count"),
    [
        (Linf(0.1), 10, 1, 3),
        (Linf(0.1), 10, 5, 3),
        (Linf(0.1), 10, 60, 6),
        (L2(0.3), 10, 60, 6),
        # Rare: the objective rises at most steps, and yet the best of it does not.
        (Linf(0.1), 10, 25, 100),
        (Linf(0.5), 30, 25, 100),
    ],
    ids=str,
)
def test_apgd_is_the_published_algorithm(threat: LpBall, steepness: float, steps: int, count: int) -> None:
    torch.manual_seed(0)
    model = Hilly(steepness).eval()
    center, labels = uniform(1, count, 1, 3, 4), torch.zeros(count, dtype=torch.int64)
    search = SearchModel(model, precision="float32")
    attacked = APGD(threat, steps=steps, objective=hill)(search, center, labels, generator=draws())
    starts = threat.random_start(center, draws())
    differs = 0
    for i in range(count):
        expected = apgd_by_the_book(model, threat, center[i : i + 1], starts[i : i + 1], steps)
        differs += not torch.allclose(attacked[i : i + 1], expected, rtol=0, atol=1e-3)
    assert differs == 0


# What is stronger than what


def test_more_work_breaks_more(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    clean = accuracy(net, *batch)
    one, ten, many = (robust(attack, net, batch) for attack in (FGSM(Linf(EPS)), PGD(Linf(EPS)), PGD(Linf(EPS), 50)))
    assert clean > one > 0.05
    assert one >= ten >= many
    assert one > many


@pytest.mark.parametrize("threat", [Linf(EPS), L2(0.7)], ids=str)
def test_apgd_is_not_weaker_than_pgd(threat: LpBall, net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    for objective in (cross_entropy, cw_margin):
        pgd = robust(PGD(threat, steps=40, objective=objective), net, batch)
        apgd = robust(APGD(threat, steps=40, objective=objective), net, batch)
        assert 0.05 < apgd <= pgd < 0.9


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_restarts_break_more(kind: Any, net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    once = robust(kind(Linf(EPS), steps=2), net, batch)
    often = robust(kind(Linf(EPS), steps=2, restarts=12), net, batch)
    assert often < once - 0.015


@pytest.mark.parametrize("norm", THREATS.values(), ids=THREATS)
@pytest.mark.parametrize("kind", [PGD, APGD])
def test_a_large_enough_radius_breaks_everything(
    kind: Any, norm: type[LpBall], net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    radius = {"linf": 0.6, "l2": 5.0, "l1": 40.0}[norm.norm]
    assert robust(kind(norm(radius), steps=30), net, batch) == 0
    assert robust(kind(norm(0.0), steps=3), net, batch) == accuracy(net, *batch)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("kind", [PGD, APGD])
def test_every_objective_finds_adversarial_images(
    kind: Any, objective: Objective, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    assert robust(kind(Linf(0.2), steps=20, objective=objective), net, batch) < 0.3 * accuracy(net, *batch)


# What counts as broken


@EVERY
def test_what_is_returned_is_inside_and_what_was_dropped_is_broken(
    attack: Attack, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch
    outcome = attack.run(SearchModel(net), images, labels, draws())
    assert outcome.images.dtype == torch.float32
    assert attack.threat.contains(outcome.images, images).all()
    dropped = outcome.calls < outcome.calls.max()
    assert dropped.any() == (
        isinstance(attack, APGD | TargetedAPGD) or (isinstance(attack, PGD) and attack.drop_broken)
    )
    assert (net(outcome.images).argmax(1) != labels)[dropped].all()


def test_the_original_judges_and_not_the_copy(
    net: nn.Module, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A search copy that is fooled by anything: each look suspects all images, and the original clears those it gets
    # right, so that they go on to the end.
    images, labels = batch
    right = net(images).argmax(1) == labels
    search = SearchModel(net)
    honest = search._logits
    monkeypatch.setattr(search, "_logits", lambda x: honest(x) - 100 * nn.functional.one_hot(labels[right], 10))
    tiny = Linf(1e-4)
    for attack, calls in ((PGD(tiny, steps=5), 5 + 5 + 1), (APGD(tiny, steps=5), 6 + 6 + 1)):
        outcome = attack.run(search, images[right], labels[right], draws())
        assert (net(outcome.images).argmax(1) == labels[right]).all()
        assert (outcome.calls == calls).all()


def test_what_left_the_threat_is_not_broken() -> None:
    class Leaky(Linf):
        """Projects onto the box alone."""

        def project(self, images: Tensor, center: Tensor) -> Tensor:
            return images.clamp(0, 1)

    w = torch.ones(12)
    x, labels = torch.full((3, 1, 3, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    model = Linear(w, bias=-7.0)  # breaks from a move of 1/12 in every pixel
    outcome = PGD(Leaky(0.05), steps=6, step_size=0.2, start="image").run(SearchModel(model), x, labels, None)
    assert (model(outcome.images).argmax(1) == 1).all()
    assert (outcome.calls == 6).all()  # six steps, and no pass of the original for what is outside anyway


@pytest.mark.parametrize("attack", [PGD(Linf(EPS), steps=7), APGD(Linf(EPS), steps=7), FGSM(Linf(EPS))], ids=str)
def test_who_is_broken_at_the_first_look_costs_two_calls(attack: Attack) -> None:
    model = Linear(torch.ones(12), bias=100.0)
    x, labels = uniform(0, 6, 1, 3, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    counting = Counting(model).eval()
    outcome = attack.run(SearchModel(counting), x, labels, draws())
    steps = 1 if isinstance(attack, FGSM) else 7
    looks = steps + isinstance(attack, APGD) + 1  # who stands is looked at by the original once, at the end
    assert outcome.calls.tolist() == [2, looks] * 3
    assert counting.seen == outcome.calls.sum()


def test_training_attacks_every_image_to_the_end(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    attack = PGD(Linf(0.3), steps=7, drop_broken=False)
    outcome = attack.run(SearchModel(net), images, labels, draws())
    assert (outcome.calls == 7).all()
    compared = dataclasses.replace(attack, objective=kl_divergence).run(SearchModel(net), images, labels, draws())
    assert (compared.calls == 8).all()  # the clean logits cost a pass
    stopped = dataclasses.replace(attack, drop_broken=True).run(SearchModel(net), images, labels, draws())

    def loss(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(x), labels, reduction="none")

    assert loss(outcome.images).mean() > 1.5 * loss(stopped.images).mean()


# Starts


def test_starts_are_what_they_are_called(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = 0.3 + 0.4 * batch[0], batch[1]

    def moved(start: Any) -> Tensor:
        attack = PGD(Linf(EPS), steps=1, step_size=1e-9, start=start, drop_broken=False)
        return (attack(net, images, labels, generator=draws()) - images).double()

    assert moved("image").abs().max() < 1e-6
    assert moved("near").std().item() == pytest.approx(0.001, rel=0.05)
    assert moved("random").std().item() == pytest.approx(EPS / 3**0.5, rel=0.05)


def test_the_step_size_is_two_and_a_half_radii_over_all_steps(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    usual, explicit = PGD(Linf(EPS), steps=5), PGD(Linf(EPS), steps=5, step_size=0.5 * EPS)
    assert torch.equal(usual(net, *batch, generator=draws()), explicit(net, *batch, generator=draws()))


# What must not change


@EVERY
@pytest.mark.parametrize("training", [False, True])
def test_the_model_the_images_and_the_global_randomness_are_left_alone(
    attack: Attack, training: bool, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch[0].clone().requires_grad_(), batch[1].clone()
    net.train(training)
    net.get_submodule("2").eval()
    net.get_parameter("1.weight").requires_grad_(False)
    net.get_parameter("1.bias").grad = torch.ones(16)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    torch.manual_seed(5)
    randomness = torch.get_rng_state()
    try:
        attacked = attack(net, images, labels, generator=draws())
        assert [module.training for module in net.modules()] == modes
        assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
        for name, parameter in net.named_parameters():
            assert parameter.requires_grad == (name != "1.weight")
            if name == "1.bias":
                assert parameter.grad is not None and torch.equal(parameter.grad, torch.ones(16))
            else:
                assert parameter.grad is None
    finally:
        net.eval().zero_grad()
        net.requires_grad_()
    assert torch.equal(torch.get_rng_state(), randomness)
    assert torch.equal(images, batch[0])
    assert torch.equal(labels, batch[1])
    assert images.grad is None
    assert not attacked.requires_grad
    assert attacked.data_ptr() != images.data_ptr()


@EVERY
def test_the_generator_decides(attack: Attack, net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    first = attack(net, *batch, generator=draws(1))
    assert torch.equal(first, attack(net, *batch, generator=draws(1)))
    assert torch.equal(first, attack(net, *batch, generator=draws(2))) == isinstance(attack, FGSM)


def test_without_a_generator_the_global_randomness_decides(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    def attacked(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return PGD(Linf(EPS), steps=2)(net, *batch)

    assert torch.equal(attacked(0), attacked(0))
    assert not torch.equal(attacked(0), attacked(1))


@EVERY
def test_the_mode_of_model_and_caller_makes_no_difference(
    attack: Attack, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    search = SearchModel(net, precision="float32")
    expected = attack(search, *batch, generator=draws())
    net.train()
    try:
        in_training = attack(SearchModel(net, precision="float32"), *batch, generator=draws())
    finally:
        net.eval()
    assert torch.equal(in_training, expected)
    with torch.no_grad():
        assert torch.equal(attack(search, *batch, generator=draws()), expected)
    with torch.inference_mode():
        assert torch.equal(attack(search, *batch, generator=draws()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attack(search, *batch, generator=draws()), expected)


@EVERY
def test_batches_of_none_and_of_one(attack: Attack, net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    assert attack(net, images[:0], labels[:0], generator=draws()).shape == (0, 1, 8, 8)
    one = attack(net, images[:1], labels[:1], generator=draws())
    assert one.shape == (1, 1, 8, 8)
    assert attack.threat.contains(one, images[:1])


def test_neighbours_in_the_batch_make_no_difference(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch[0][:20], batch[1][:20]
    attack = PGD(Linf(EPS), steps=5, start="image")
    together = attack(net, images, labels)
    alone = torch.cat([attack(net, images[i : i + 1], labels[i : i + 1]) for i in range(20)])
    assert ((together - alone).abs() < 1e-5).float().mean() > 0.99


# What is refused


@EVERY
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
            None,
            r"float32 images \(n, c, h, w\) in \[0, 1\], got torch.uint8",
        ),
        (torch.zeros(2, 1, 8, 8, dtype=torch.float64), None, "got torch.float64"),
        (torch.zeros(2, 64), None, r"got torch.float32 of shape \(2, 64\)"),
        (torch.full((2, 1, 8, 8), 255.0), None, "got values from 255 to 255; normalisation belongs into the model"),
        (torch.full((2, 1, 8, 8), -1e-6), None, "got values from -1e-06"),
        (torch.full((2, 1, 8, 8), math.nan), None, "got values from nan"),
        (None, torch.zeros(2, dtype=torch.int32), "one int64 label an image, got torch.int32"),
        (None, torch.zeros(3, dtype=torch.int64), r"of shape \(3,\) for 2 images"),
        (None, torch.zeros(2, 10, dtype=torch.int64), r"of shape \(2, 10\) for 2 images"),
        (None, torch.tensor([0, -1]), "labels that count from 0, got -1"),
    ],
)
def test_wrong_input_is_said_in_one_line(
    attack: Attack, images: Tensor | None, labels: Tensor | None, message: str, net: nn.Module
) -> None:
    images = torch.zeros(2, 1, 8, 8) if images is None else images
    labels = torch.zeros(2, dtype=torch.int64) if labels is None else labels
    with pytest.raises(UserError, match=message) as raised:
        attack(net, images, labels)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PGD, {"steps": 0}, "PGD takes at least 1 step"),
        (PGD, {"restarts": 0}, "1 restart, got 10 and 0"),
        (PGD, {"step_size": 0.0}, "PGD takes a step size above 0, got 0.0"),
        (PGD, {"step_size": math.nan}, "PGD takes a step size above 0, got nan"),
        (PGD, {"start": "rand"}, "no start of PGD 'rand'; did you mean 'random'"),
        (PGD, {"start": "image", "objective": kl_divergence}, "'kl' has no gradient at the image itself"),
        (PGD, {"restarts": 2, "drop_broken": False}, "restarts are for images that still stand"),
        (FGSM, {"objective": kl_divergence}, "'kl' has no gradient at the image itself"),
        (APGD, {"steps": 0}, "APGD takes at least 1 step"),
        (APGD, {"restarts": 0}, "1 restart, got 100 and 0"),
    ],
)
def test_settings_that_make_no_attack_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(Linf(EPS), **settings)


def test_dlr_on_two_classes_is_refused() -> None:
    with pytest.raises(UserError, match="at least 3 classes"):
        PGD(Linf(EPS), objective=dlr)(Linear(torch.ones(4)), uniform(0, 2, 1, 2, 2), torch.tensor([0, 1]))
