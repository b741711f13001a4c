"""FAB: exact projections, the nearest adversarial image where it is known, and the published algorithm step by step."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linprog
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn

from redan.attacks import PGD, SearchModel, cw_margin
from redan.attacks.base import Attack
from redan.attacks.fab import FAB, _Verdicts, fill_l1, fill_l2, fill_linf, move_to_hyperplane
from redan.errors import UserError
from redan.spatial import SPATIAL
from redan.threats import L1, L2, THREATS, Linf, LpBall

Array = NDArray[np.float64]

NORMS = pytest.mark.parametrize("norm", THREATS)
FILLS = {"linf": fill_linf, "l2": fill_l2, "l1": fill_l1}
ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}
DUALS = {"linf": 1, "l2": 2, "l1": math.inf}
RADII = {"linf": 0.1, "l2": 0.5, "l1": 1.5}


def draws(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=draws(seed))


def ball(norm: str, factor: float = 1.0) -> LpBall:
    return THREATS[norm](factor * RADII[norm])


def exact(model: nn.Module) -> SearchModel:
    return SearchModel(model, precision="float32")


class Affine(nn.Module):
    """Logits ``scale * (weights @ x + bias)``."""

    def __init__(self, weights: Tensor, bias: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.weights, self.bias = nn.Parameter(weights), nn.Parameter(bias)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.scale * (x.flatten(1) @ self.weights.T + self.bias)
        return z


class Counting(nn.Module):
    """Counts the images that pass; cannot be traced, so that searching passes through here as well."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen, self.inputs = inner, 0, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        self.inputs.append(x.detach().clone())
        out: Tensor = self.inner(x)
        return out


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)


@pytest.fixture(scope="module")
def net(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """A small network that is right about most digits."""
    images, labels = digits
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for step in range(150):
        rows = torch.randint(1400, (64,), generator=draws(step))
        x = (images[rows] + 0.2 * torch.randn(64, 1, 8, 8, generator=draws(step))).clamp(0, 1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def batch(digits: tuple[Tensor, Tensor], net: nn.Module) -> tuple[Tensor, Tensor]:
    """30 digits, all of which the network gets right."""
    images, labels = digits[0][1400:], digits[1][1400:]
    right = (net(images).argmax(1) == labels).nonzero().squeeze(1)[:30]
    return images[right], labels[right]


# Projections


def least_move(x: Array, w: Array, gap: float, norm: str) -> tuple[float, Array | None]:
    """Least length of a move inside the box with ``<w, move> = gap``, and in L2 the move; infinite where there is none.

    Linf and L1 by linear programming; L2 by trying every set of pixels that end at the edge of the box, all others
    going along ``w``.
    """
    d = len(x)
    if norm != "l2":
        # Variables: the move as plus - minus, and for Linf the largest of all; minimise their sum or the largest.
        bounds = [(0, 1 - value) for value in x] + [(0, value) for value in x] + [(0, None)]
        cost = np.append(np.zeros(2 * d), 1) if norm == "linf" else np.append(np.ones(2 * d), 0)
        below = np.hstack([np.eye(d), np.eye(d), -np.ones((d, 1))]) if norm == "linf" else None
        limit = np.zeros(d) if norm == "linf" else None
        equal = np.concatenate([w, -w, [0]])[None]
        solved = linprog(cost, A_ub=below, b_ub=limit, A_eq=equal, b_eq=[gap], bounds=bounds)
        return (math.inf if solved.fun is None else float(solved.fun)), None
    best, best_move = math.inf, None
    way = np.sign(w) * np.sign(gap)
    edge = np.where(way > 0, 1 - x, np.where(way < 0, -x, 0))
    for full in itertools.product([False, True], repeat=d):
        mask = np.array(full)
        left = gap - w[mask] @ edge[mask]
        free = np.where(mask, 0, w)
        if not free.any() and abs(left) > 1e-9:
            continue
        move = np.where(mask, edge, free * left / max(float(free @ free), 1e-300))
        if np.all(x + move >= -1e-9) and np.all(x + move <= 1 + 1e-9) and np.linalg.norm(move) < best:
            best, best_move = float(np.linalg.norm(move)), move
    return best, best_move


pixels = st.sampled_from([0.0, 1.0, 0.25, 0.5]) | st.floats(0, 1, width=32)
slopes = st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-1, 1, width=32)


@st.composite
def hyperplanes(draw: st.DrawFn) -> tuple[list[float], list[float], float]:
    d = draw(st.integers(1, 5))
    x, w = (draw(st.lists(values, min_size=d, max_size=d)) for values in (pixels, slopes))
    return x, w, draw(st.floats(-2, 2, width=32))


@NORMS
@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=hyperplanes())
def test_moves_to_a_hyperplane_are_the_shortest(norm: str, problem: tuple[list[float], list[float], float]) -> None:
    x, w = torch.tensor(problem[0]), torch.tensor(problem[1])
    gap = problem[2]
    # Neither slopes or gaps that float32 does not resolve, nor hyperplanes that just touch the box.
    assume(all(value == 0 or abs(value) > 1e-2 for value in problem[1]) and abs(gap) > 1e-3)
    corner = torch.where(w * gap > 0, 1 - x, torch.where(w * gap < 0, -x, 0))
    assume(abs(float(w @ corner) - gap) > 1e-3)
    move = move_to_hyperplane(x[None], w[None], torch.tensor([gap]), FILLS[norm])[0]
    least, unique = least_move(x.double().numpy(), w.double().numpy(), gap, norm)
    if math.isinf(least):
        torch.testing.assert_close(move, corner)
        return
    assert (x + move).min() >= 0 and (x + move).max() <= 1
    assert float(w.double() @ move.double()) == pytest.approx(gap, abs=1e-5)
    assert float(torch.linalg.vector_norm(move, ORDERS[norm])) == pytest.approx(least, rel=1e-4, abs=1e-5)
    if unique is not None:
        np.testing.assert_allclose(move.numpy(), unique, rtol=0, atol=1e-3)


@NORMS
def test_many_moves_at_once_are_the_moves_one_by_one(norm: str) -> None:
    points, normal = uniform(0, 2, 7, 20), 2 * uniform(1, 7, 20) - 1
    gap = 3 * uniform(2, 2, 7) - 1.5
    together = move_to_hyperplane(points, normal, gap, FILLS[norm])
    for i, j in itertools.product(range(2), range(7)):
        alone = move_to_hyperplane(points[i, j : j + 1], normal[j : j + 1], gap[i, j : j + 1], FILLS[norm])
        torch.testing.assert_close(together[i, j], alone[0], rtol=0, atol=1e-6)


@NORMS
def test_a_level_plane_and_an_endless_gap_move_nothing_to_nan(norm: str) -> None:
    points = uniform(0, 1, 3, 4)
    normal = torch.tensor([[0.0, 0, 0, 0], [1, -1, 0, 1e-30], [1, 0.5, -0.5, 0]])
    gap = torch.tensor([[1.0, math.inf, 0]])
    expected = torch.zeros(1, 3, 4)
    expected[0, 1] = torch.stack([1 - points[0, 1, 0], -points[0, 1, 1], torch.tensor(0.0), torch.tensor(0.0)])
    move = move_to_hyperplane(points, normal, gap, FILLS[norm])
    torch.testing.assert_close(move[..., :3], expected[..., :3])  # a slope of 1e-30 is on neither side of the edge
    assert move.isfinite().all()


# Known distances


def linear_distance(model: Affine, x: Tensor, label: int, norm: str) -> float:
    """To the nearest of the hyperplanes between the label and another class, inside the box."""
    weights, bias = model.weights.detach().double().numpy(), model.bias.detach().double().numpy()
    point = x.flatten().double().numpy()
    logits = weights @ point + bias
    others = [k for k in range(len(bias)) if k != label]
    return min(least_move(point, weights[k] - weights[label], logits[label] - logits[k], norm)[0] for k in others)


def affine(classes: int, seed: int, scale: float = 1.0) -> Affine:
    return Affine(2 * uniform(seed, classes, 6) - 1, 0.2 * uniform(seed + 1, classes), scale)


@NORMS
@pytest.mark.parametrize("targets", [None, 9])
@pytest.mark.parametrize("classes", [2, 3, 8])
def test_the_nearest_image_of_a_linear_model(classes: int, targets: int | None, norm: str) -> None:
    # Images near the edges of the box, so that it is often in the way.
    images = (1.6 * uniform(3, 25, 1, 2, 3) - 0.3).clamp(0, 1)
    model = affine(classes, 5)
    labels = model(images).argmax(1)
    attack = FAB(ball(norm), steps=30, targets=targets, nearest=True)
    attacked = attack(exact(model), images, labels)
    expected = torch.tensor(
        [linear_distance(model, x, int(y), norm) for x, y in zip(images, labels, strict=True)], dtype=torch.float64
    )
    reachable = expected < math.inf
    assert reachable.sum() > 10
    assert ((model(attacked).argmax(1) != labels) == reachable).all()
    ratio = attack.threat.distance(attacked, images)[reachable] / expected[reachable]
    assert ratio.min() > 1 - 1e-4
    # The untargeted attack takes the hyperplane that would be nearest without the box, and can miss another.
    assert (ratio < 1 + 2e-3).float().mean() >= (1 if targets or classes == 2 else 0.7)


@NORMS
@pytest.mark.parametrize("targets", [None, 1])
def test_without_the_box_the_distance_is_the_margin_over_the_dual_norm(targets: int | None, norm: str) -> None:
    w = 2 * uniform(0, 48) - 1
    images = 0.45 + 0.1 * uniform(1, 8, 3, 4, 4)
    bias = 0.1 - 0.5 * float(w.sum())
    for scale in (1.0, 1e-25):  # how steep the logits are does not matter
        model = Affine(torch.stack([torch.zeros(48), w]), torch.tensor([0.0, bias]), scale)
        margin = (images.flatten(1) @ w + bias).double()
        labels = (margin > 0).long()
        attack = FAB(ball(norm), steps=5, targets=targets, nearest=True)
        distance = attack.threat.distance(attack(exact(model), images, labels), images)
        expected = margin.abs() / torch.linalg.vector_norm(w.double(), DUALS[norm])
        assert expected.min() > 1e-4
        torch.testing.assert_close(distance, expected, rtol=2e-3, atol=1e-6)


@NORMS
def test_the_nearest_image_of_a_small_network_by_brute_force(norm: str) -> None:
    torch.manual_seed(9)
    first, second = nn.Linear(2, 24), nn.Linear(24, 3)
    with torch.no_grad():
        first.weight.mul_(6)
        first.bias.sub_(first.weight.sum(1) / 2)
        second.bias.zero_()
    model = nn.Sequential(nn.Flatten(), first, nn.Tanh(), second)
    side = torch.linspace(0, 1, 801)
    grid = torch.cartesian_prod(side, side).view(-1, 1, 1, 2)
    images = 0.1 + 0.8 * uniform(8, 40, 1, 1, 2)
    classes = model(grid).argmax(1)
    labels = model(images).argmax(1)
    assert len(labels.unique()) == 3
    attack = FAB(ball(norm), steps=50, restarts=3, nearest=True)
    attacked = attack(exact(model), images, labels, generator=draws())
    assert (model(attacked).argmax(1) != labels).all()
    distance = attack.threat.distance(attacked, images)
    least = torch.stack(
        [
            attack.threat.distance(grid, x.expand_as(grid))[classes != y].min()
            for x, y in zip(images, labels, strict=True)
        ]
    )
    assert (distance > least - 2 / 800).all()  # no nearer than the grid is fine
    assert (distance < 1.02 * least + 1e-3).float().mean() > 0.85  # a local search need not find all


# The published algorithm


def move_by_bisection(x: Array, w: Array, gap: float, norm: str) -> Array:
    """The shortest move to the hyperplane in the box: slower, and another way than the attack's."""
    way = np.sign(w) * np.sign(gap)
    room = np.where(way > 0, 1 - x, x)
    if norm == "l1":
        left, move = abs(gap), np.zeros_like(x)
        for i in np.argsort(-abs(w)):
            move[i] = min(room[i], left / abs(w[i]))
            left -= move[i] * abs(w[i])
        return way * move
    speed = np.ones_like(w) if norm == "linf" else abs(w)
    low, high = 0.0, float((1 / speed).max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if abs(w) @ np.minimum(middle * speed, room) < abs(gap) else (low, middle)
    return way * np.minimum(high * speed, room)


def fab_by_the_book(
    model: nn.Module, image: Tensor, label: int, target: int | None, steps: int, norm: str, start: Tensor | None = None
) -> Array:
    """Algorithm 1 for one image, in float64 and without the final search; one target, or None for all classes."""
    origin = image.double().flatten().numpy()

    def linearise(x: Array, k: int) -> tuple[float, Array]:
        leaf = torch.tensor(x).view(1, *image.shape).requires_grad_()
        z = model(leaf)[0]
        margin = z[k] - z[label]
        (gradient,) = torch.autograd.grad(margin, leaf)
        return float(margin.detach()), gradient.flatten().numpy()

    def size(move: Array) -> float:
        return float(np.linalg.norm(move, ORDERS[norm]))

    x, best = origin if start is None else start.double().flatten().numpy(), origin
    classes = model(image[None].double()).shape[1]
    for _ in range(steps):
        planes = [linearise(x, k) for k in ([target] if target is not None else range(classes)) if k != label]
        value, w = min(planes, key=lambda plane: abs(plane[0]) / np.linalg.norm(plane[1], DUALS[norm]))
        here = move_by_bisection(x, w, -value, norm)
        there = move_by_bisection(origin, w, -value - w @ (origin - x), norm)
        a, b = max(size(here), 1e-8), max(size(there), 1e-8)
        alpha = min(a / (a + b), 0.1)
        x = np.clip((1 - alpha) * (x + 1.05 * here) + alpha * (origin + 1.05 * there), 0, 1)
        if int(model(torch.tensor(x).view(1, *image.shape)).argmax()) != label:
            if best is origin or size(x - origin) < size(best - origin):
                best = x
            x = origin + 0.9 * (x - origin)
    return best if best is not origin else x


class Curved(nn.Module):
    """Four classes on 12 pixels, with boundaries that are nowhere straight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 4)
        with torch.no_grad():
            self.first.weight.mul_(4)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.second(torch.tanh(self.first(x.flatten(1))))
        return z


@NORMS
@pytest.mark.parametrize("targets", [None, 1])
@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_fab_is_the_published_algorithm(
    steps: int, targets: int | None, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redan.attacks.fab.FINAL_STEPS", 0)
    model = Curved().eval()
    images = (1.2 * uniform(2, 20, 1, 3, 4) - 0.1).clamp(0, 1)
    logits = model(images)
    ranks = logits.argsort(1, descending=True)
    attack = FAB(ball(norm), steps=steps, targets=targets, nearest=True)
    attacked = attack(exact(model), images, ranks[:, 0])
    double = Curved().double().eval()
    agree = 0
    for i in range(20):
        target = None if targets is None else int(ranks[i, 1])
        expected = fab_by_the_book(double, images[i], int(ranks[i, 0]), target, steps, norm)
        agree += np.allclose(attacked[i].flatten().numpy(), expected, rtol=0, atol=1e-4)
    assert agree >= 18  # what ends up on the boundary is on another side in float64


@NORMS
def test_far_from_the_boundary_the_step_leans_to_the_image(norm: str) -> None:
    # A random start is far enough from the boundary, and from the image, for the weight of the image to be at its most.
    model = Curved().eval()
    images = 0.3 + 0.4 * uniform(2, 60, 1, 3, 4)
    logits = model(images)
    ranks = logits.argsort(1, descending=True)
    sure = logits.sort(1).values.diff(dim=1)[:, -1].argsort()[-10:]
    images, ranks = images[sure], ranks[sure]
    counting = Counting(model).eval()
    attack = FAB(ball(norm, 0.2), steps=1, targets=1, restarts=2)
    attack.run(SearchModel(counting), images, ranks[:, 0], draws())
    start, step = [x for x in counting.inputs if len(x) == 10][4:6]
    double = Curved().double().eval()
    for i in range(10):
        expected = fab_by_the_book(double, images[i], int(ranks[i, 0]), int(ranks[i, 1]), 1, norm, start[i])
        np.testing.assert_allclose(step[i].flatten().numpy(), expected, rtol=0, atol=1e-5)


def test_the_final_search_ends_on_the_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Curved().eval()
    images = 0.2 + 0.6 * uniform(2, 40, 1, 3, 4)
    labels = model(images).argmax(1)
    attack = FAB(L2(1.0), steps=2, nearest=True)
    with_search = attack(exact(model), images, labels)
    monkeypatch.setattr("redan.attacks.fab.FINAL_STEPS", 0)
    without = attack(exact(model), images, labels)
    found = model(without).argmax(1) != labels
    assert found.sum() > 20
    assert (model(with_search).argmax(1) != labels)[found].all()
    searched, raw = attack.threat.distance(with_search, images), attack.threat.distance(without, images)
    assert (searched <= raw)[found].all()
    assert (searched < 0.999 * raw)[found].float().mean() > 0.5
    # On the line that was searched, a little nearer to the image is not adversarial any more.
    nearer = model(images + 0.9999 * (with_search - images)).argmax(1) == labels
    assert nearer[found].float().mean() > 0.8


# What is found and what it costs


@NORMS
@pytest.mark.parametrize("targets", [None, 9])
def test_an_image_is_broken_where_the_nearest_image_is_inside(
    targets: int | None, norm: str, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch
    search = exact(net)
    far = FAB(ball(norm), steps=25, targets=targets, nearest=True)
    nearest = far(search, images, labels)
    distance = far.threat.distance(nearest, images)
    assert (net(nearest).argmax(1) != labels).all()
    assert nearest.min() >= 0 and nearest.max() <= 1
    threat = THREATS[norm](float(distance.median()))
    verdict = dataclasses.replace(far, threat=threat, nearest=False)(search, images, labels)
    assert threat.contains(verdict, images).all()
    broken = net(verdict).argmax(1) != labels
    assert (broken == (distance <= threat.radius)).sum() >= len(images) - 1


@NORMS
def test_more_steps_restarts_and_targets_find_no_farther_images(
    norm: str, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch

    def distance(**more: Any) -> Tensor:
        attack = dataclasses.replace(FAB(ball(norm), steps=25, targets=1, nearest=True), **more)
        attacked = attack(exact(net), images, labels, generator=draws())
        found = attack.threat.distance(attacked, images)
        return torch.where(net(attacked).argmax(1) != labels, found, math.inf)

    base = distance()
    for less, more in ((distance(steps=3), base), (base, distance(restarts=8)), (base, distance(targets=4))):
        assert (more <= less * (1 + 5e-3)).all()  # the final search starts elsewhere
        assert (more < less * (1 - 5e-3)).any()


@NORMS
def test_fab_is_about_as_strong_as_pgd(norm: str, net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    threat = THREATS[norm]({"linf": 0.1, "l2": 0.45, "l1": 1.2}[norm])

    def broken(attack: Attack) -> float:
        return float((net(attack(exact(net), images, labels, generator=draws())).argmax(1) != labels).float().mean())

    pgd = broken(PGD(threat, steps=40, objective=cw_margin))
    assert 0.2 < pgd < 0.95
    assert broken(FAB(threat, steps=30)) >= pgd - 0.04
    assert broken(FAB(threat, steps=30, targets=None)) >= pgd - 0.1


def test_later_restarts_begin_within_half_the_radius_or_half_the_least_distance() -> None:
    w = torch.ones(300)
    images = torch.full((2, 3, 10, 10), 0.5)
    model = Affine(torch.stack([torch.zeros(300), w]), torch.tensor([149.9, 0.0])).eval()
    labels = model(images).argmax(1)
    assert (labels == 1).all()
    nearest = 0.1 / 300**0.5
    for radius, reach in ((1e-3, 1e-3), (1.0, nearest)):
        counting = Counting(model).eval()
        FAB(L2(radius), steps=1, targets=1, restarts=2, nearest=True).run(exact(counting), images, labels, draws())
        starts = [x for x in counting.inputs if len(x) == 2 and x.std() > 1e-6 and (x[0] - x[1]).abs().max() > 1e-6]
        distance = L2(0.0).distance(starts[0], images)
        assert (distance <= 0.53 * reach).all()
        assert (distance > 0.45 * reach).all()


@pytest.mark.parametrize("targets", [None, 2])
@pytest.mark.parametrize("nearest", [False, True])
def test_calls_are_the_forward_passes_and_what_is_broken_costs_one(nearest: bool, targets: int | None) -> None:
    model = affine(4, 5)
    images = uniform(3, 12, 1, 2, 3)
    labels = model(images).argmax(1)
    labels[:4] = (labels[:4] + 1) % 4
    counting = Counting(model).eval()
    attack = FAB(Linf(0.05), steps=6, targets=targets, nearest=nearest)
    outcome = attack.run(SearchModel(counting), images, labels, None)
    assert counting.seen == outcome.calls.sum()
    assert (outcome.calls[:4] == 1).all()
    assert torch.equal(outcome.images[:4], images[:4])
    if not nearest:
        fell = attack.threat.distance(outcome.images, images)[4:] < 0.05 * 0.99
        assert (outcome.calls[4:][fell] < outcome.calls.max()).all() and fell.any() and not fell.all()


@pytest.mark.parametrize("targets", [None, 2])
def test_a_model_that_is_asked_twice_costs_twice(targets: int | None) -> None:
    model = affine(4, 5)
    images = uniform(3, 12, 1, 2, 3)
    labels = model(images).argmax(1)
    attack = FAB(Linf(0.05), steps=3, targets=targets)
    once = attack.run(SearchModel(Counting(model).eval()), images, labels, None)
    counting = Counting(model).eval()
    twice = attack.run(SearchModel(counting, draws=2), images, labels, None)
    assert counting.seen == twice.calls.sum()
    stands = model(once.images).argmax(1) == labels
    assert stands.any() and torch.equal(model(twice.images).argmax(1) == labels, stands)


@pytest.mark.parametrize(("targets", "classes"), [(None, 5), (2, 5), (9, 3)])
def test_an_image_that_stands_costs_what_is_announced(targets: int | None, classes: int) -> None:
    model = Counting(affine(classes, 5)).eval()
    images = uniform(3, 7, 1, 2, 3)
    labels = model(images).argmax(1)
    search = SearchModel(model)
    search.logits(images)  # what preparing costs is not the attack's
    beats: list[int] = []
    search.heartbeat = beats.append
    attack = FAB(Linf(0.0), steps=4, targets=targets, restarts=2)
    attack.run(search, images, labels, draws())
    assert sum(beats) == 7 * attack.cost(classes)


# What must not happen


ALL = {
    "fab-t linf": FAB(Linf(0.07), steps=2, restarts=3),
    "fab linf": FAB(Linf(0.1), steps=5, targets=None, restarts=2),
    "fab-t l2": FAB(L2(0.5), steps=5, targets=3, restarts=2),
    "fab l1 nearest": FAB(L1(2.0), steps=5, targets=None, restarts=2, nearest=True),
    "fab-t linf nearest": FAB(Linf(0.1), steps=20, targets=2, restarts=4, nearest=True),
}
EVERY = pytest.mark.parametrize("attack", ALL.values(), ids=ALL)


@EVERY
def test_the_generator_decides(attack: FAB, net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    first = attack(net, *batch, generator=draws(1))
    assert torch.equal(first, attack(net, *batch, generator=draws(1)))
    # After one step, as longer runs come to the same point from most starts.
    short = dataclasses.replace(attack, steps=1, nearest=True)
    assert not torch.equal(short(net, *batch, generator=draws(1)), short(net, *batch, generator=draws(2)))
    once = dataclasses.replace(attack, restarts=1)
    assert torch.equal(once(net, *batch, generator=draws(1)), once(net, *batch, generator=draws(2)))


@EVERY
@pytest.mark.parametrize("training", [False, True])
def test_the_model_the_images_and_the_global_randomness_are_left_alone(
    attack: FAB, training: bool, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch[0].clone().requires_grad_(), batch[1].clone()
    expected = attack(exact(net), *batch, generator=draws())
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.manual_seed(5)
    randomness = torch.get_rng_state()
    net.train(training)
    try:
        attacked = attack(exact(net), images, labels, generator=draws())
        assert all(module.training == training for module in net.modules())
    finally:
        net.eval()
    assert torch.equal(attacked, expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), randomness)
    assert torch.equal(images, batch[0]) and torch.equal(labels, batch[1])
    assert images.grad is None and not attacked.requires_grad


@EVERY
def test_the_mode_of_the_caller_makes_no_difference(attack: FAB, net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    expected = attack(exact(net), *batch, generator=draws())
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            assert torch.equal(attack(exact(net), *batch, generator=draws()), expected)
    with torch.inference_mode():
        inside = batch[0].clone(), batch[1].clone()
        assert torch.equal(attack(exact(net), *inside, generator=draws()), expected)


@EVERY
def test_batches_of_none_and_of_one(attack: FAB, net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    assert attack(net, images[:0], labels[:0]).shape == (0, 1, 8, 8)
    once = dataclasses.replace(attack, restarts=1)
    together = once(exact(net), images, labels)
    alone = torch.cat([once(exact(net), images[i : i + 1], labels[i : i + 1]) for i in range(8)])
    assert ((together[:8] - alone).abs() < 1e-3).float().mean() > 0.95


@pytest.mark.parametrize("targets", [None, 2])
@pytest.mark.parametrize("nearest", [False, True])
def test_the_model_is_never_shown_a_batch_of_none(nearest: bool, targets: int | None) -> None:
    model = affine(3, 5)
    images = uniform(3, 6, 1, 2, 3)
    labels = model(images).argmax(1)
    counting = Counting(model).eval()
    attack = FAB(Linf(1.0), steps=4, targets=targets, restarts=2, nearest=nearest)
    attack.run(SearchModel(counting), images[:0], labels[:0], draws())
    assert not counting.inputs
    attack.run(SearchModel(counting), images, (labels + 1) % 3, draws())
    assert len(counting.inputs) == 1  # all are broken as they are
    attack.run(SearchModel(counting), images, labels, draws())  # all are broken on the way, unless it goes on
    assert all(len(x) for x in counting.inputs)


def test_the_nearest_point_is_remembered_of_those_outside_the_threat() -> None:
    model = affine(2, 5)
    images = uniform(3, 4, 1, 2, 3)
    labels = model(images).argmax(1)
    wrong = nn.functional.one_hot(1 - labels, 2).float()
    right = 1 - wrong
    book = _Verdicts(Linf(0.01), exact(model), images, labels)
    moved = [images + shift for shift in (0.1, 0.3, 0.2, 0.4, 0.05)]
    book.note(moved[0], right)
    assert torch.equal(book.best, moved[0]) and book.distance.isinf().all()  # nothing is known: the last attempt
    for attempt, logits, best in ((1, wrong, 1), (2, wrong, 2), (3, wrong, 2), (4, right, 2)):
        assert book.note(moved[attempt], logits) is None
        assert torch.equal(book.best, moved[best])
        assert torch.equal(book.distance, Linf(0.0).distance(moved[best], images))


@NORMS
@pytest.mark.parametrize("targets", [None, 9])
def test_radius_zero_gives_the_image(
    targets: int | None, norm: str, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch[0], batch[1].clone()
    labels[0] = (labels[0] + 1) % 10
    attack = FAB(THREATS[norm](0.0), steps=3, targets=targets, restarts=2)
    assert torch.equal(attack(net, images, labels, generator=draws()), images)


class Flat(nn.Module):
    """Depends on the images by a gradient of zero."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x.flatten(1)[:, :3] + torch.tensor([1.0, 0.5, 0.0])


class Constant(nn.Module):
    """Does not depend on the images at all."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.5, 0.0]).expand(len(x), 3)


@NORMS
@pytest.mark.parametrize("targets", [None, 9])
@pytest.mark.parametrize("nearest", [False, True])
def test_without_a_slope_nothing_moves_and_nothing_breaks(nearest: bool, targets: int | None, norm: str) -> None:
    images, labels = uniform(0, 4, 1, 2, 3), torch.zeros(4, dtype=torch.int64)
    attack = FAB(ball(norm), steps=3, targets=targets, nearest=nearest)
    assert torch.equal(attack(Flat(), images, labels), images)
    with pytest.raises(UserError, match="do not depend on the images by any gradient"):
        attack(Constant(), images, labels)


class Wild(nn.Module):
    """Slopes that are infinite on black pixels, and logits of infinity or NaN far from the image."""

    def forward(self, x: Tensor) -> Tensor:
        root = x.flatten(1).sqrt().sum(1)
        beyond = torch.where(root > 3.0, math.inf, 0) - torch.where(root > 3.1, math.inf, 0)
        return torch.stack([3.5 - root, torch.zeros_like(root), beyond - 1], 1)


@NORMS
@pytest.mark.parametrize("targets", [None, 9])
@pytest.mark.parametrize("nearest", [False, True])
def test_infinite_slopes_and_logits_are_survived(nearest: bool, targets: int | None, norm: str) -> None:
    images = (uniform(0, 10, 1, 2, 3) - 0.6).clamp(min=0)
    labels = torch.zeros(10, dtype=torch.int64)
    threat = THREATS[norm]({"linf": 0.7, "l2": 1.5, "l1": 3.0}[norm])
    attacked = FAB(threat, steps=10, targets=targets, nearest=nearest)(Wild(), images, labels)
    assert attacked.isfinite().all() and attacked.min() >= 0 and attacked.max() <= 1
    # Logits that are not finite predict nothing: from the root of 3 on an image is broken, and where they are NaN, from
    # 3.1 on, there is a way back. (In L1 all goes to the black pixels, whose slopes promise too much.)
    root = attacked.flatten(1).sqrt().sum(1)
    assert norm == "l1" or (root > 3.0).float().mean() >= 0.5
    assert not nearest or norm == "l1" or (root < 3.16).all()


class Single(nn.Module):
    """One class, which nothing can be mistaken for."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("targets", [None, 9])
def test_one_class_stands(targets: int | None) -> None:
    images = uniform(0, 4, 1, 2, 3)
    attack = FAB(Linf(0.1), steps=2, targets=targets)
    assert torch.equal(attack(Single(), images, torch.zeros(4, dtype=torch.int64)), images)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "FAB takes at least 1 step and 1 restart, got 0 and 1"),
        ({"restarts": 0}, "1 restart, got 100 and 0"),
        ({"targets": 0}, "at least 1 target, or None for the untargeted attack, got 0"),
    ],
)
def test_settings_that_make_no_attack_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAB(Linf(0.1), **values)


def test_other_threats_are_refused() -> None:
    threat: Any = SPATIAL["stadv"]("0.05")
    with pytest.raises(UserError, match="FAB needs an Lp threat such as linf:8/255, got stadv:0.05"):
        FAB(threat)
