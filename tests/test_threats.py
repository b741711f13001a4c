"""Threats: what is projected is inside and nearest, what is drawn is uniform, what ascends is steepest."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Generator, Tensor

from redan.errors import UserError
from redan.threats import L1, L2, THREATS, Linf, LpBall, parse_number, parse_threat

Array = NDArray[np.float64]

NORMS = pytest.mark.parametrize("norm", THREATS.values(), ids=THREATS)
RADII = st.sampled_from([0.0, 1e-9, 1e-6, 1e-3, 8 / 255, 0.3, 1.0, 2.5, 100.0, 1e30])
SPREADS = st.sampled_from([0.0, 1e-8, 1e-3, 0.1, 1.0, 30.0, 1e6, 1e15, 1e30])


def draws(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draws(seed))


def centers(seed: int, n: int, d: int) -> Tensor:
    """Images of which about half the pixels are exactly 0 or 1."""
    return (3 * torch.rand((n, 1, 1, d), generator=draws(seed)) - 1).clamp(0, 1)


def norm_of(delta: Array, threat: LpBall) -> Array:
    order = {"linf": np.inf, "l2": 2, "l1": 1}[threat.norm]
    return np.linalg.norm(delta.reshape(len(delta), -1), order, axis=1)


def by_bisection(x: Array, center: Array, threat: LpBall) -> Array:
    """The nearest point by its optimality conditions: one multiplier, found by bisection."""

    def at(multiplier: float) -> Array:
        delta = x - center
        if threat.norm == "l2":
            moved = delta / (1 + multiplier)
        else:
            moved = np.sign(delta) * np.maximum(np.abs(delta) - multiplier, 0)
        return np.clip(center + moved, 0, 1)

    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        inside = norm_of((at(middle) - center)[None], threat)[0] <= threat.radius
        low, high = (low, middle) if inside else (middle, high)
    return at(high)


@NORMS
@given(seed=st.integers(0, 2**32), d=st.integers(1, 40), radius=RADII, spread=SPREADS)
@settings(deadline=None, max_examples=150)
def test_what_is_projected_is_inside_exactly(
    norm: type[LpBall], seed: int, d: int, radius: float, spread: float
) -> None:
    threat, center = norm(radius), centers(seed, 3, d)
    projected = threat.project(center + spread * normal(seed + 1, 3, 1, 1, d), center)
    assert projected.dtype == torch.float32
    delta = projected.double().numpy() - center.double().numpy()
    assert (norm_of(delta, threat) <= radius).all()
    assert projected.min() >= 0
    assert projected.max() <= 1
    assert threat.contains(projected, center).all()


@NORMS
def test_projection_is_exact_for_photographs_too(norm: type[LpBall]) -> None:
    center = torch.rand(2, 3, 64, 64, generator=draws(0))
    for radius in (8 / 255, 0.5, 12.0):
        assert norm(radius).contains(norm(radius).project(center + normal(1, 2, 3, 64, 64), center), center).all()


@NORMS
@pytest.mark.parametrize("radius", [0.05, 0.4, 1.5])
def test_projection_uses_the_whole_radius(norm: type[LpBall], radius: float) -> None:
    center = torch.full((4, 1, 5, 5), 0.5)
    threat = norm(radius)
    distance = threat.distance(threat.project(center + 10 * normal(0, 4, 1, 5, 5), center), center)
    reachable = min(radius, {"linf": 0.5, "l2": 2.5, "l1": 12.5}[threat.norm])
    torch.testing.assert_close(distance, torch.full_like(distance, reachable), rtol=1e-4, atol=0)


@NORMS
@pytest.mark.parametrize("spread", [0.05, 0.5, 20.0])
def test_projecting_twice_changes_nothing(norm: type[LpBall], spread: float) -> None:
    threat, center = norm(0.3), centers(2, 8, 16)
    once = threat.project(center + spread * normal(3, 8, 1, 1, 16), center)
    torch.testing.assert_close(threat.project(once, center), once, rtol=0, atol=1e-6)


@NORMS
def test_points_inside_stay_where_they_are(norm: type[LpBall]) -> None:
    center = torch.rand(5, 1, 1, 12, generator=draws(1))
    inside = (center + 1e-3 * normal(4, 5, 1, 1, 12)).clamp(0, 1)
    torch.testing.assert_close(norm(0.5).project(inside, center), inside, rtol=0, atol=1e-7)


@NORMS
@pytest.mark.parametrize("spread", [0.2, 2.0, 50.0])
def test_projection_satisfies_the_variational_inequality(norm: type[LpBall], spread: float) -> None:
    # p is the nearest point of a convex set to x if and only if <x - p, q - p> <= 0 for every q of the set.
    threat, center = norm(0.7), centers(5, 6, 10)
    x = center + spread * normal(6, 6, 1, 1, 10)
    p = threat.project(x, center)
    for seed in range(60):
        q = center + 0.7 * normal(seed, 6, 1, 1, 10) if seed % 2 else p + 0.05 * normal(seed, 6, 1, 1, 10)
        q = threat.project(q, center)
        assert (((x - p) * (q - p)).flatten(1).sum(1) <= 2e-5 * max(spread, 1)).all()


@pytest.mark.parametrize("norm", [L2, L1])
@given(seed=st.integers(0, 2**32), d=st.integers(1, 12), radius=st.floats(0.01, 3), spread=st.floats(0.01, 20))
@settings(deadline=None, max_examples=150)
def test_projection_agrees_with_bisection(norm: type[LpBall], seed: int, d: int, radius: float, spread: float) -> None:
    threat, center = norm(radius), centers(seed, 1, d)
    x = center + spread * normal(seed + 1, 1, 1, 1, d)
    expected = by_bisection(x.double().numpy().ravel(), center.double().numpy().ravel(), threat)
    np.testing.assert_allclose(threat.project(x, center).numpy().ravel(), expected, atol=5e-5)


@NORMS
@pytest.mark.parametrize("seed", range(5))
def test_projection_agrees_with_a_general_solver(norm: type[LpBall], seed: int) -> None:
    center = torch.tensor([0.0, 0.9, 0.4]).view(1, 1, 1, 3)
    x = center + normal(seed, 1, 1, 1, 3)
    c, target = center.double().numpy().ravel(), x.double().numpy().ravel()

    # Moves up and moves down, each at least 0, so that every norm is smooth.
    def squared_distance(moves: Array) -> float:
        return float(((c + moves[:3] - moves[3:] - target) ** 2).sum())

    def slack(moves: Array) -> float:
        size = {"linf": moves.max(), "l2": ((moves[:3] - moves[3:]) ** 2).sum() / 0.5, "l1": moves.sum()}
        return 0.5 - float(size[norm.norm])

    solution = minimize(
        squared_distance,
        np.full(6, 1e-3),
        bounds=[(0.0, float(room)) for room in np.minimum(np.concatenate([1 - c, c]), 0.5)],
        constraints={"type": "ineq", "fun": slack},
        method="SLSQP",
        tol=1e-14,
    )
    expected = c + solution.x[:3] - solution.x[3:]
    np.testing.assert_allclose(norm(0.5).project(x, center).numpy().ravel(), expected, atol=1e-4)


@NORMS
@pytest.mark.parametrize("radius", [0.0, 8 / 255, 0.5, 3.0, 1e6])
def test_random_starts_are_inside_and_seeded(norm: type[LpBall], radius: float) -> None:
    threat, center = norm(radius), centers(7, 50, 9)
    drawn = threat.random_start(center, draws(1))
    assert threat.contains(drawn, center).all()
    assert torch.equal(drawn, threat.random_start(center, draws(1)))
    assert radius == 0 or not torch.equal(drawn, threat.random_start(center, draws(2)))


def test_random_starts_use_the_given_generator_only() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for norm in THREATS.values():
        norm(0.1).random_start(centers(0, 2, 4), draws(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_linf_starts_are_uniform_in_every_pixel() -> None:
    center = torch.full((1, 1, 200, 200), 0.5)
    move = (Linf(0.2).random_start(center, draws(0)) - center).double()
    assert abs(move.mean()) < 0.003  # 5 standard errors
    assert move.var().item() == pytest.approx(0.2**2 / 3, rel=0.03)
    assert move.abs().max() > 0.1999


def test_l2_starts_are_uniform_in_the_ball() -> None:
    # The share of the ball within a fraction t of its radius is t^d, and no direction is favoured.
    center = torch.full((20_000, 1, 1, 3), 0.5)
    move = (L2(0.4).random_start(center, draws(0)) - center).flatten(1).double()
    share = (move.norm(dim=1) / 0.4) ** 3
    assert share.mean().item() == pytest.approx(1 / 2, abs=0.01)
    assert share.var().item() == pytest.approx(1 / 12, rel=0.05)
    covariance = move.T @ move / len(move)
    torch.testing.assert_close(covariance, 0.4**2 / 5 * torch.eye(3).double(), rtol=0.05, atol=0.001)


def test_l1_starts_are_uniform_in_the_ball() -> None:
    # Likewise; the absolute moves are Dirichlet(1, ..., 1), whose mean is 1 / (d + 1).
    center = torch.full((20_000, 1, 1, 3), 0.5)
    move = (L1(0.4).random_start(center, draws(0)) - center).flatten(1).double()
    share = (move.abs().sum(1) / 0.4) ** 3
    assert share.mean().item() == pytest.approx(1 / 2, abs=0.01)
    assert share.var().item() == pytest.approx(1 / 12, rel=0.05)
    torch.testing.assert_close(move.abs().mean(0), torch.full((3,), 0.1).double(), rtol=0.03, atol=0)
    assert move.mean(0).abs().max() < 0.005


@NORMS
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-6, 1.0, 1e30])
def test_a_step_has_its_length_whatever_the_gradient_s(norm: type[LpBall], scale: float) -> None:
    x = torch.full((3, 1, 5, 8), 0.5)
    gradient = scale * normal(0, 3, 1, 5, 8)
    moved = norm(1.0).ascend(x, gradient, 0.25)
    delta = moved.double().numpy() - x.double().numpy()
    np.testing.assert_allclose(norm_of(delta, norm(1.0)), 0.25, rtol=1e-4)


@NORMS
def test_step_sizes_may_differ_by_image(norm: type[LpBall]) -> None:
    x = torch.full((3, 1, 5, 8), 0.5)
    moved = norm(1.0).ascend(x, normal(0, 3, 1, 5, 8), torch.tensor([0.0, 0.1, 0.2]).view(3, 1, 1, 1))
    delta = moved.double().numpy() - x.double().numpy()
    np.testing.assert_allclose(norm_of(delta, norm(1.0)), [0, 0.1, 0.2], rtol=1e-4)


@pytest.mark.parametrize("norm", [Linf, L2])
def test_a_step_is_the_steepest(norm: type[LpBall]) -> None:
    # No direction of the same length gains more: the gain is the dual norm of the gradient.
    x, gradient = torch.zeros(1, 1, 1, 6), normal(0, 1, 1, 1, 6)
    gain = float((norm(1.0).ascend(x, gradient, 1.0) * gradient).sum())
    dual = {"linf": gradient.abs().sum(), "l2": gradient.norm()}[norm.norm]
    assert gain == pytest.approx(float(dual), rel=1e-6)
    others = normal(1, 500, 6)
    others = others / torch.linalg.vector_norm(others, {"linf": math.inf, "l2": 2}[norm.norm], dim=1, keepdim=True)
    assert (others @ gradient.flatten()).max() <= gain


def test_l1_steps_are_sparse_and_go_up_where_pixels_can_move() -> None:
    x = torch.full((1, 1, 10, 10), 0.5)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1.0, 0.0
    gradient = torch.linspace(-1, 1, 100).view(1, 1, 10, 10)
    gradient[0, 0, 0, 0], gradient[0, 0, 0, 1] = 9.0, -9.0  # the largest, of pixels that cannot go that way
    delta = (L1(1.0).ascend(x, gradient, 0.5) - x).flatten()
    expected = torch.zeros(100)
    largest = gradient.flatten().abs().clone()
    largest[:2] = 0
    expected[largest.topk(5).indices] = 0.1
    torch.testing.assert_close(delta, expected * gradient.flatten().sign())
    gradient[0, 0, 0, 0] = -9.0  # this way it can
    assert (L1(1.0).ascend(x, gradient, 0.5) - x)[0, 0, 0, 0] == pytest.approx(-0.1)


@NORMS
def test_without_a_gradient_nothing_moves(norm: type[LpBall]) -> None:
    x = centers(0, 2, 6)
    assert torch.equal(norm(0.5).ascend(x, torch.zeros_like(x), 0.1), x)


@NORMS
def test_distance_is_that_of_numpy(norm: type[LpBall]) -> None:
    a, b = torch.rand(4, 3, 5, 5, generator=draws(0)), torch.rand(4, 3, 5, 5, generator=draws(1))
    expected = norm_of(a.double().numpy() - b.double().numpy(), norm(1.0))
    distance = norm(1.0).distance(a, b)
    assert distance.dtype == torch.float64
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-14)


@NORMS
def test_contains_is_exact(norm: type[LpBall]) -> None:
    threat, center = norm(0.25), torch.full((1, 1, 1, 4), 0.5)

    def contains(*pixels: float) -> bool:
        return bool(threat.contains(torch.tensor(pixels).view(1, 1, 1, 4), center))

    assert contains(0.5, 0.5, 0.5, 0.5)
    assert contains(0.75, 0.5, 0.5, 0.5)  # on the boundary: these numbers are exact in binary
    assert contains(0.5, 0.5, 0.5, 0.25)
    assert not contains(0.75 + 1e-6, 0.5, 0.5, 0.5)
    assert not contains(math.nan, 0.5, 0.5, 0.5)
    assert not contains(0.5, 0.5, 0.5, math.inf)


@NORMS
@pytest.mark.parametrize(("pixel", "center"), [(-1e-6, 0.0), (1 + 1e-6, 1.0)])
def test_contains_nothing_outside_the_box(norm: type[LpBall], pixel: float, center: float) -> None:
    assert not norm(0.5).contains(torch.full((1, 1, 1, 1), pixel), torch.full((1, 1, 1, 1), center))


def test_contains_judges_each_image() -> None:
    center = torch.zeros(3, 1, 1, 2)
    images = torch.tensor([[0.1, 0.0], [0.3, 0.0], [0.1, 0.1]]).view(3, 1, 1, 2)
    assert Linf(0.2).contains(images, center).tolist() == [True, False, True]
    assert L1(0.15).contains(images, center).tolist() == [True, False, False]


def test_a_threat_s_text_says_what_it_is() -> None:
    assert str(Linf(8 / 255)) == "linf:8/255"
    assert str(Linf(0.3)) == "linf:0.3"
    assert str(Linf(1.0)) == "linf:255/255"
    assert str(L2(0.5)) == "l2:0.5"
    assert str(L1(12)) == "l1:12"
    assert str(Linf(0)) == "linf:0"


@NORMS
@given(radius=st.floats(0, 1e6) | st.integers(0, 255).map(lambda grey: grey / 255))
@settings(deadline=None, max_examples=200)
def test_text_and_threat_are_one_to_one(norm: type[LpBall], radius: float) -> None:
    parsed = parse_threat(str(norm(radius)))
    assert type(parsed) is norm
    # Within a billionth of a grey level of a whole one, Linf is written as that.
    assert parsed.radius == pytest.approx(radius, abs=1e-11 if norm is Linf else 0, rel=0)


@pytest.mark.parametrize(
    ("text", "number"), [("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("0.5", 0.5), ("1e-3", 1e-3), (2, 2.0)]
)
def test_numbers_may_be_fractions(text: str | float, number: float) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize("text", ["", "x", "1/0", "nan", "inf", "8/255/2", "1e400", "8 255"])
def test_what_is_no_number_is_said_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match="is not a number such as 0.5 or 8/255"):
        parse_number(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linf", "a threat is written NORM:RADIUS"),
        ("linff:8/255", "no threat 'linff'; did you mean 'linf'"),
        ("l2:-1", "at least 0, got -1.0"),
        ("l2:big", "'big' is not a number"),
    ],
)
def test_what_is_no_threat_is_said_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        parse_threat(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("radius", [-0.1, math.nan, math.inf, "8/255"])
def test_a_radius_is_a_number_of_at_least_0(radius: float) -> None:
    with pytest.raises(UserError, match="radius is a number of at least 0"):
        Linf(radius)
