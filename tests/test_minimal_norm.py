"""DDN, FMN and Carlini-Wagner: they come near the nearest adversarial image wherever that is known."""

import itertools
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from redan.attacks import SearchModel
from redan.attacks.base import Attack, Outcome
from redan.attacks.carlini_wagner import CarliniWagner
from redan.attacks.ddn import DDN
from redan.attacks.fmn import BALLS, FMN
from redan.attacks.search import Precision
from redan.errors import UserError
from redan.spatial import Flow
from redan.threats import L1, L2, THREATS, Linf, LpBall, Threat

ATTACKS: dict[str, Attack] = {
    "ddn": DDN(L2(0.5)),
    "cw": CarliniWagner(L2(0.5), steps=150, init_c=1.0, searches=6),
    "fmn l2": FMN(L2(0.5)),
    "fmn linf": FMN(Linf(0.1)),
    "fmn l1": FMN(L1(2.0)),
}
EVERY = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def draws(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=draws(seed))


class Linear(nn.Module):
    """Logits ``W x + b``, times ``scale``."""

    def __init__(self, weight: Tensor, bias: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = nn.Parameter(weight), nn.Parameter(bias), scale

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.scale * nn.functional.linear(x.flatten(1), self.weight, self.bias)
        return z


def linear(classes: int, scale: float = 1.0) -> tuple[Linear, Tensor, Tensor]:
    """A linear model with images in the middle of the box, and their labels.

    Each class looks at pixels of its own with the same weights but for signs and order, so that all boundaries are
    equally steep in every norm and the class of least margin is also the nearest.
    """
    each = 24 // classes
    order = torch.rand(classes, each, generator=draws(3)).argsort(1)
    signs = torch.rand(classes, each, generator=draws(4)).sub(0.5).sign()
    weight = torch.block_diag(*(torch.linspace(0.3, 1, each)[order] * signs))
    model = Linear(weight, -weight.sum(1) / 2, scale)
    x = 0.3 + 0.4 * uniform(1, 40, 1, 4, 6)
    return model, x, model(x).argmax(1)


def least_distance(model: Linear, x: Tensor, labels: Tensor, dual: float) -> Tensor:
    """By the textbook: the least of margin over dual norm of the difference of weights, over all other classes."""
    with torch.no_grad():
        z = model.scale * (x.flatten(1) @ model.weight.T + model.bias)
        margins = z.gather(1, labels[:, None]) - z
        differences = model.scale * (model.weight[labels][:, None] - model.weight[None])
        lengths = torch.linalg.vector_norm(differences, dual, dim=2)
        distances = torch.where(nn.functional.one_hot(labels, z.shape[1]) == 1, torch.inf, margins / lengths)
    return distances.amin(1).double()


def distances(attack: Attack, outcome: Outcome, x: Tensor) -> Tensor:
    assert isinstance(attack.threat, LpBall)
    return attack.threat.distance(outcome.images, x)


# What is known in closed form


DUALS = {"linf": 1, "l2": 2, "l1": math.inf}


@pytest.mark.parametrize("classes", [2, 3, 8])
@EVERY
def test_the_nearest_image_of_a_linear_model_is_found(attack: Attack, classes: int) -> None:
    # Cross-entropy, DDN's objective, pulls towards all other classes at once unless the logits are far apart.
    model, x, labels = linear(classes, scale=100.0 if isinstance(attack, DDN) else 1.0)
    assert isinstance(attack.threat, LpBall)
    expected = least_distance(model, x, labels, DUALS[attack.threat.norm])
    # Nearer than DDN's sphere can shrink in a hundred steps, or further than the box leaves room for.
    near = (expected > 0.015) & (expected < 0.3)
    assert near.sum() > 15
    outcome = attack.run(SearchModel(model, precision="float32"), x, labels, draws())
    ratio = (distances(attack, outcome, x) / expected)[near]
    assert (model(outcome.images).argmax(1) != labels)[near].all()
    assert ratio.min() > 1 - 1e-4  # no image is nearer, so none can be found
    assert ratio.median() < 1.01
    assert ratio.max() < 1.04


@pytest.mark.parametrize("scale", [1e-2, 30.0])
@EVERY
def test_the_scale_of_the_logits_is_no_defence(attack: Attack, scale: float) -> None:
    if isinstance(attack, CarliniWagner):  # wants a c of about 1 / scale, and finds it
        attack = CarliniWagner(attack.threat, steps=150, init_c=1e-2)
    model, x, labels = linear(2, scale)
    assert isinstance(attack.threat, LpBall)
    expected = least_distance(model, x, labels, DUALS[attack.threat.norm])
    near = (expected > 0.015) & (expected < 0.3)
    outcome = attack.run(SearchModel(model, precision="float32"), x, labels, draws())
    ratio = (distances(attack, outcome, x) / expected)[near]
    assert (model(outcome.images).argmax(1) != labels)[near].all()
    assert ratio.median() < 1.02


class Disc(nn.Module):
    """Class 0 inside a disc of two pixels, class 1 outside: a network that is curved."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.tensor([0.45, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        outside = (x.flatten(1) - self.centre).square().sum(1) - 0.3**2
        return torch.stack([torch.zeros_like(outside), outside], 1)


@EVERY
def test_the_nearest_point_outside_a_disc_is_found(attack: Attack) -> None:
    # Found beside the attack by going round the circle.
    angles = torch.tensor([0.3, 1.1, 2.0, 2.8, 4.3, 5.9])
    x = torch.tensor([0.45, 0.5]) + 0.15 * torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.zeros(6, dtype=torch.int64)
    assert isinstance(attack.threat, LpBall)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[attack.threat.norm]
    round_it = np.linspace(0, 2 * np.pi, 100_001)
    circle = np.array([0.45, 0.5]) + 0.3 * np.stack([np.cos(round_it), np.sin(round_it)], 1)
    expected = [np.linalg.norm(circle - point, order, axis=1).min() for point in x.double().numpy()]
    images = x.view(6, 1, 1, 2)
    outcome = attack.run(SearchModel(Disc(), precision="float32"), images, labels, draws())
    ratio = distances(attack, outcome, images) / torch.tensor(expected)
    assert ratio.min() > 1 - 1e-4
    assert ratio.max() < 1.03


@pytest.fixture(scope="module")
def tiny() -> tuple[nn.Module, Tensor, Tensor]:
    """A two-layer network of three pixels that tells a ball from what is around it, with images and their labels."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    x = uniform(0, 2000, 1, 1, 3)
    target = (x.flatten(1).square().sum(1) > 0.9).long()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), target).backward()
        optimizer.step()
    optimizer.zero_grad()
    images = uniform(5, 20, 1, 1, 3)
    return net.eval(), images, net(images).argmax(1)


@EVERY
def test_brute_force_finds_nothing_nearer(attack: Attack, tiny: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, images, labels = tiny
    assert len(labels.unique()) == 2
    assert isinstance(attack.threat, LpBall)
    axis = torch.linspace(0, 1, 81)
    cube = torch.tensor(list(itertools.product(axis.tolist(), repeat=3))).view(-1, 1, 1, 3)
    classes = net(cube).argmax(1)
    outcome = attack.run(SearchModel(net, precision="float32"), images, labels, draws())
    found = distances(attack, outcome, images)
    assert (net(outcome.images).argmax(1) != labels).all()
    for i, label in enumerate(labels):
        others = cube[classes != label]
        nearest = attack.threat.distance(others, images[i : i + 1].expand_as(others)).amin()
        assert found[i] < 1.06 * nearest + 1e-3


@pytest.mark.parametrize("norm", BALLS)
@given(seed=st.integers(0, 2**32), d=st.integers(1, 30), radius=st.sampled_from([0.0, 1e-6, 0.1, 1.0, 5.0, math.inf]))
@settings(deadline=None, max_examples=60)
def test_projections_onto_balls_are_those_of_the_threats(norm: str, seed: int, d: int, radius: float) -> None:
    # Of a centre so far from 0 and 1 that the box does not matter: the threat's own projection, one radius at a time.
    delta = torch.randn(2, d, generator=draws(seed)) * 0.4
    project, _ = BALLS[norm]
    got = project(delta, torch.tensor([[radius], [0.3]]))
    order = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    lengths = torch.linalg.vector_norm(got.double(), order, dim=1)
    assert lengths[0] <= radius * (1 + 1e-5) + 1e-6
    assert lengths[1] <= 0.3 * (1 + 1e-5)
    if radius == math.inf:
        assert torch.equal(got[0], delta[0])
    # Around middle grey and less than half away, so that the box of the threat's own projection does not matter.
    center = torch.full((1, 1, 1, d), 0.5)
    near = 0.4 * (delta[1:] / delta[1:].abs().amax().clamp(min=1e-9))
    threat = THREATS[norm](0.2)
    expected = (threat.project(center + near.view_as(center), center) - center).flatten(1)
    torch.testing.assert_close(project(near, torch.tensor([[0.2]])), expected, rtol=0, atol=2e-5)


# What counts, and what must not happen


@EVERY
def test_the_radius_is_not_looked_at(attack: Attack, tiny: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, images, labels = tiny
    other = type(attack)(**{**vars(attack), "threat": type(attack.threat)(123.0)})  # type: ignore[call-arg]
    assert torch.equal(attack(net, images, labels, generator=draws()), other(net, images, labels, generator=draws()))


@EVERY
def test_what_is_misclassified_already_is_left_as_it_is(attack: Attack, tiny: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, images, labels = tiny
    wrong = 1 - labels
    assert torch.equal(attack(net, images, wrong, generator=draws()), images)


@EVERY
def test_what_is_found_is_valid_and_reproducible(attack: Attack, tiny: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, images, labels = tiny
    images = images.round()  # black and white, where tanh has its infinities
    labels = net(images).argmax(1)  # Adam needs about 700 steps to leave infinity: what CW finds is not asked for
    before = [parameter.clone() for parameter in net.parameters()]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    outcome = attack.run(SearchModel(net), images, labels, draws(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert outcome.images.dtype == torch.float32
    assert outcome.images.min() >= 0 and outcome.images.max() <= 1
    assert (net(outcome.images).argmax(1) != labels).float().mean() > 0.5 or isinstance(attack, CarliniWagner)
    assert torch.equal(outcome.images, attack.run(SearchModel(net), images, labels, draws(1)).images)
    with torch.inference_mode():
        assert torch.equal(outcome.images, attack(net, images, labels, generator=draws(1)))
    assert all(torch.equal(now, then) for now, then in zip(net.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())


class Flat(nn.Module):
    """A gradient that is zero everywhere, with one class in one half of the cube and the other in the other."""

    def forward(self, x: Tensor) -> Tensor:
        side = (x.flatten(1).sum(1) > 0.9 * x[0].numel()).float() + 0 * x.flatten(1).sum(1)
        return torch.stack([1 - side, side], 1)


@EVERY
def test_without_a_gradient_nothing_breaks_down(attack: Attack) -> None:
    x, labels = uniform(0, 3, 1, 3, 3), torch.tensor([0, 0, 1])
    outcome = attack.run(SearchModel(Flat()), x, labels, draws())
    assert torch.isfinite(outcome.images).all()
    assert outcome.images.min() >= 0 and outcome.images.max() <= 1
    assert torch.equal(outcome.images[2], x[2])  # of the wrong label from the start


def test_ddn_looks_around_where_there_is_no_gradient() -> None:
    class Left(nn.Module):
        """Class 1 where the first pixel is dark, without a gradient that says so."""

        def forward(self, x: Tensor) -> Tensor:
            dark = (x[:, 0, 0, 0] < 0.5).float() + 0 * x[:, 0, 0, 0]
            return torch.stack([1 - dark, dark], 1)

    x, labels = torch.full((8, 1, 1, 2), 0.6), torch.zeros(8, dtype=torch.int64)
    first, second = (DDN(L2(1.0))(Left(), x, labels, generator=draws(seed)) for seed in (0, 1))
    assert (Left()(first).argmax(1) == 1).all()
    assert not torch.equal(first, second)


class Steep(nn.Module):
    """A root, whose slope is infinite where an image is black."""

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1).sqrt().sum(1)
        return torch.stack([1 - z, z], 1)


@EVERY
def test_an_infinite_slope_makes_no_nan(attack: Attack) -> None:
    x, labels = torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    x[1] = 0.01
    found = attack(Steep(), x, labels, generator=draws())
    assert torch.isfinite(found).all()
    assert Steep()(found)[1].argmax() == 1  # at black itself, a linearisation says that the boundary is here


@pytest.mark.parametrize("attack", [DDN(L2(1.0), steps=7), FMN(L1(1.0), steps=7)], ids=["ddn", "fmn"])
def test_every_step_is_a_pass_and_the_last_point_is_judged_too(
    attack: Attack, tiny: tuple[nn.Module, Tensor, Tensor]
) -> None:
    net, images, labels = tiny
    far = nn.Sequential(net, Favourite())
    outcome = attack.run(SearchModel(far), images, torch.zeros_like(labels), draws())
    assert (outcome.calls == 8).all()


class Favourite(nn.Module):
    """Class 0 wins by far."""

    def forward(self, z: Tensor) -> Tensor:
        return z + 1000 * torch.eye(1, z.shape[1])


def test_carlini_and_wagner_stop_early_where_they_get_nowhere(tiny: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, images, labels = tiny
    search = SearchModel(net, precision="float32")
    kept = CarliniWagner(L2(1.0), steps=200, searches=3, abort_early=False).run(search, images, labels, None)
    left = CarliniWagner(L2(1.0), steps=200, searches=3).run(search, images, labels, None)
    assert kept.calls.min() >= 3 * 200 + 1
    assert left.calls.max() < kept.calls.min()  # at c = 0.001 the distance alone is minimised, from 0


@pytest.mark.parametrize("kind", [DDN, CarliniWagner])
@pytest.mark.parametrize("threat", [Linf(0.1), L1(1.0), Flow(0.05)], ids=str)
def test_what_knows_l2_alone_refuses_the_rest_in_one_line(kind: Any, threat: Threat) -> None:
    with pytest.raises(UserError, match=f"{kind.__name__} needs an L2 threat such as l2:0.5, got {threat}") as raised:
        kind(threat)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "norm", "options", "message"),
    [
        (DDN, L2, {"steps": 0}, "at least 1 step, got 0"),
        (DDN, L2, {"gamma": 1.0}, "gamma between 0 and 1, got 1.0"),
        (DDN, L2, {"gamma": math.nan}, "gamma between 0 and 1, got nan"),
        (DDN, L2, {"init_norm": 0.0}, "init_norm above 0, got 0.0"),
        (FMN, L1, {"steps": 0}, "at least 1 step, got 0"),
        (FMN, L1, {"step_size": -1.0}, "step size above 0, got -1.0"),
        (FMN, L1, {"gamma": 0.0}, "gamma between 0 and 1, got 0.0"),
        (CarliniWagner, L2, {"steps": 0}, "at least 1 step and 1 search, got 0 and 9"),
        (CarliniWagner, L2, {"searches": 0}, "at least 1 step and 1 search, got 1000 and 0"),
        (CarliniWagner, L2, {"init_c": 0.0}, "init_c above 0, got 0.0"),
        (CarliniWagner, L2, {"step_size": math.inf}, "step size above 0, got inf"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(kind: Any, norm: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        kind(norm(1.0), **options)
    assert "\n" not in str(raised.value)


def test_fmn_needs_a_ball() -> None:
    with pytest.raises(UserError, match="FMN needs an Lp threat such as linf:8/255, got stadv:0.05"):
        FMN(Flow(0.05))  # type: ignore[arg-type]


@EVERY
def test_the_boundary_is_searched_in_float32_whatever_the_search_is(
    attack: Attack, tiny: tuple[nn.Module, Tensor, Tensor]
) -> None:
    net, images, labels = tiny
    exact, coarse = (
        attack.run(SearchModel(net, precision=precision), images, labels, draws()).images
        for precision in get_args(Precision)[1:]
    )
    assert torch.equal(exact, coarse)
