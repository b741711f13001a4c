"""The Square attack: the published schedule and moves, optima that are known, and nothing outside the threat, ever."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from redan.attacks import Outcome, SearchModel, cw_margin
from redan.attacks.square import MOVES, Square, share
from redan.errors import UserError
from redan.threats import L1, L2, THREATS, Linf, LpBall

NORMS = pytest.mark.parametrize("norm", THREATS.values(), ids=THREATS)


def draws(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def pixels(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=draws(seed))


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


class Watched(nn.Module):
    """Notes all it is asked, and answers by ``margin``, how far class 1 is ahead of class 0: ``(n, c, h, w) -> (n,)``.

    It cannot be traced, so that the search comes through here as well.
    """

    def __init__(self, margin: Any = None, classes: int = 2) -> None:
        super().__init__()
        self.margin, self.classes = margin, classes
        self.queries: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.queries.append(x.clone())
        logits = torch.full((len(x), self.classes), -1e6)
        logits[:, 0] = 0
        logits[:, 1] = -1 if self.margin is None else self.margin(x)  # None is a model that nothing moves
        return logits


def asked(attack: Square, images: Tensor, margin: Any = None, seed: int = 0) -> tuple[list[Tensor], Outcome]:
    """The queries of an attack on images of class 0, and what came of it. Preparing and judging are no queries."""
    model = Watched(margin).eval()
    search = SearchModel(model, precision="float32")
    search.logits(images)
    model.queries.clear()
    outcome = attack.run(search, images, zeros(len(images)), draws(seed))
    return model.queries[: attack.queries], outcome


def corner(threat: LpBall, center: Tensor, signs: Tensor) -> Tensor:
    return threat.project(center + 2 * threat.radius * signs, center)


# The schedule


def test_the_windows_shrink_as_published() -> None:
    # p = 0.8, halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 proposals; on CIFAR a window has p * 1024
    # pixels. In L2 and L1 its side is odd and at least 3.
    first_and_last = (
        [0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001],
        [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000],
    )
    square = [29, 20, 14, 10, 7, 5, 4, 3, 2, 1]
    odd = [29, 21, 15, 11, 7, 5, 5, 3, 3, 3]
    for proposals in first_and_last:
        for proposal, linf, other in zip(proposals, square, odd, strict=False):
            sides = [MOVES[norm](threat(1.0)).side(0.8 * share(proposal), 1024) for norm, threat in THREATS.items()]
            assert sides == [linf, other, other]


def test_windows_are_squares_of_that_side_anywhere_in_the_image() -> None:
    # Nothing moves this model, so that each candidate is the start, vertical stripes, with one window of its own.
    images = torch.full((400, 1, 9, 13), 0.5)
    queries, _ = asked(Square(Linf(0.1), queries=14, p_init=0.3), images)
    start = queries[0]
    assert torch.equal(start, start[:, :, :1].expand_as(start))
    for query in range(1, 14):
        side = 6 if query <= 11 else 4  # round(sqrt(0.3 * 117)), round(sqrt(0.15 * 117))
        changed = (queries[query] != start)[:, 0]
        assert changed.flatten(1).any(1).all()  # never a candidate that is known
        tall, wide = changed.any(2), changed.any(1)
        assert (tall.sum(1) == side).all()  # along a stripe
        assert wide.sum(1).max() == side
        assert (changed == (tall[:, :, None] & wide[:, None, :])).all()
        tops = tall.int().argmax(1)
        assert tops.unique().tolist() == list(range(9 - side + 1))
        assert wide[:, 0].any() and wide[:, -1].any()


# What is tried


def test_in_linf_every_pixel_is_at_an_end_of_its_range() -> None:
    images, threat = pixels(1, 6, 3, 7, 5), Linf(0.2)
    queries, _ = asked(Square(threat, queries=60), images, margin=lambda x: x.flatten(1).sum(1) - 1e3)
    low, high = (corner(threat, images, torch.tensor(sign)) for sign in (-1.0, 1.0))
    for query in queries:
        assert ((query == low) | (query == high)).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("threat", [L2(0.3), L1(0.4)], ids=str)  # no pixel of 0.5 can leave the box by these
def test_in_l2_and_l1_the_radius_is_spent(threat: LpBall, channels: int) -> None:
    images = torch.full((6, channels, 12, 10), 0.5)
    w = torch.randn(channels, 12, 10, generator=draws(3))
    queries, _ = asked(Square(threat, queries=120), images, margin=lambda x: (w * x).flatten(1).sum(1) - 1e3)
    for query in queries:
        length = threat.distance(query, images)
        assert (length <= threat.radius).all()
        assert (length > threat.radius * (1 - 1e-4)).all()


def hills(h: int, w: int, power: int, decay: int) -> Any:
    """Eq. 2: one window above the other, with opposite signs; pixel by pixel, counted from 1 as in the paper."""

    def one(h: int, w: int) -> Any:
        n = max(h, w) // 2
        eta = np.zeros((h, w))
        for r in range(1, h + 1):
            for s in range(1, w + 1):
                last = n - max(abs(r - h // 2 - 1), abs(s - w // 2 - 1))
                eta[r - 1, s - 1] = sum((n + 1 - k) ** -decay for k in range(last + 1))
        return eta / (eta**power).sum() ** (1 / power)

    both = np.concatenate([one(h // 2, w), -one(h - h // 2, w)])
    return both / (abs(both) ** power).sum() ** (1 / power)


@pytest.mark.parametrize(("side", "size"), [(3, (12, 10)), (5, (12, 10)), (7, (8, 8)), (9, (5, 14)), (9, (4, 14))])
@pytest.mark.parametrize("threat", [L2(0.4), L1(2.0)], ids=str)
def test_a_proposal_is_the_published_one(threat: LpBall, side: int, size: tuple[int, int]) -> None:
    # Algorithm 3 for one image after the other, with the positions that explain what the attack did.
    power, decay = (2, 2) if threat.norm == "l2" else (1, 4)
    (h, w), c = size, 3
    moves, generator = MOVES[threat.norm](threat), draws(4)
    center = 0.3 + 0.4 * pixels(5, 4, c, h, w)
    best = moves.start(center, generator)
    state = generator.get_state()
    candidate = moves.propose(best, center, side**2 / (h * w), generator)
    generator.set_state(state)
    u = torch.rand(4, 5 + c, generator=generator).numpy()
    rows, columns = min(side, h), min(side, w)
    for i in range(4):
        old = (best - center)[i].double().numpy()
        top, left, top2, left2 = (int(u[i, j] * room) for j, room in enumerate([h - rows + 1, w - columns + 1] * 2))
        one, two = (np.s_[:, a : a + rows, b : b + columns] for a, b in ((top, left), (top2, left2)))
        union = np.zeros((c, h, w), bool)
        union[one] = union[two] = True
        eta = hills(columns, rows, power, decay).T if u[i, 4] < 0.5 else hills(rows, columns, power, decay)
        unused = threat.radius**power - (abs(old) ** power).sum()
        expected = np.where(union, 0, old)
        for channel in range(c):
            window = old[one][channel]
            sign = 1 if u[i, 5 + channel] < 0.5 else -1
            shape = sign * eta + window / max((abs(window) ** power).sum() ** (1 / power), 1e-12)
            mass = (abs(old[channel]) ** power)[union[channel]].sum() + unused / c
            mass *= 1 if power == 2 else c
            expected[one][channel] = shape / (abs(shape) ** power).sum() ** (1 / power) * mass ** (1 / power)
        moved = threat.project(center[i : i + 1] + torch.tensor(expected[None]).float(), center[i : i + 1])
        torch.testing.assert_close(candidate[i : i + 1], moved, rtol=0, atol=2e-5 * threat.radius + 1e-6)


# What is reached


def test_linf_on_a_linear_model_reaches_the_corner() -> None:
    w = torch.randn(2, 4, 5, generator=draws(1))
    images, threat = pixels(2, 8, 2, 4, 5), Linf(0.2)
    _, outcome = asked(Square(threat, queries=1500), images, margin=lambda x: (w * x).flatten(1).sum(1) - 1e3)
    assert torch.equal(outcome.images, corner(threat, images, w.sign()))


@pytest.mark.parametrize("threat", [L2(0.3), L1(0.4)], ids=str)
def test_l2_and_l1_climb_a_linear_model_above_the_best_of_as_many_random_points(threat: LpBall) -> None:
    w = torch.randn(1, 14, 13, generator=draws(1))
    images = torch.full((8, 1, 14, 13), 0.5)

    def gain(x: Tensor) -> Tensor:
        return (w * (x - 0.5)).flatten(1).sum(1)

    _, outcome = asked(Square(threat, queries=300), images, lambda x: gain(x) - 1e3)
    generator = draws(2)
    random = torch.stack([gain(threat.random_start(images, generator)) for _ in range(300)]).amax(0)
    assert (gain(outcome.images) > random).all()


@NORMS
def test_more_queries_go_on_where_fewer_ended_and_are_never_worse(norm: type[LpBall]) -> None:
    threat = norm({"linf": 0.1, "l2": 0.6, "l1": 2.0}[norm.norm])
    images, w = pixels(1, 5, 1, 6, 6), torch.randn(3, 36, generator=draws(2))

    def rough(x: Tensor) -> Tensor:
        return torch.sin(8 * x.flatten(1) @ w.T).sum(1) - 1e3

    budgets = [1, 2, 10, 60, 300]
    results = [asked(Square(threat, queries=budget), images, rough) for budget in budgets]
    longest = results[-1][0]
    assert [len(queries) for queries, _ in results] == budgets
    for queries, outcome in results:
        assert all(torch.equal(query, same) for query, same in zip(queries, longest, strict=False))
        best = torch.stack([rough(query) for query in queries]).amax(0)
        assert torch.equal(rough(outcome.images), best)
    worst, best = rough(results[0][1].images), rough(results[-1][1].images)
    assert (best >= worst).all() and (best > worst + 0.1).float().mean() > 0.5


def test_restarts_are_for_those_that_stand() -> None:
    # One query is the start alone: images fall once a start happens to have both signs right.
    images = torch.full((64, 1, 1, 2), 0.5)

    def margin(x: Tensor) -> Tensor:
        return x.flatten(1).sum(1) - 1.15

    fallen = [
        (margin(asked(Square(Linf(0.1), queries=1, restarts=restarts), images, margin)[1].images) > 0).float().mean()
        for restarts in (1, 3)
    ]
    assert 0.05 < fallen[0] < 0.45  # a quarter
    assert 0.4 < fallen[1] < 0.75  # 1 - (3/4)^3 = 0.58


def test_of_a_model_that_draws_the_mean_margin_is_climbed() -> None:
    class Turning(nn.Module):
        """Three classes; one pass after the other fears class 1 or class 2, the more the brighter an image is.

        The mean logits of both passes do not depend on the image, their margins do, alike in each.
        """

        def __init__(self) -> None:
            super().__init__()
            self.passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            fear = x.flatten(1).mean(1) * (1 if self.passes % 2 else -1)
            return torch.stack([torch.full_like(fear, 9.0), fear, -fear], 1)

    images, threat = pixels(3, 4, 1, 4, 4), Linf(0.2)
    search = SearchModel(Turning(), precision="float32", draws=2)
    logits, values = search.values(images, cw_margin, zeros(4))
    mean = images.flatten(1).mean(1)
    assert torch.allclose(values, mean - 9) and torch.allclose(cw_margin(logits, zeros(4)), torch.full((4,), -9.0))
    outcome = Square(threat, queries=600).run(search, images, zeros(4), draws())
    assert torch.equal(outcome.images, corner(threat, images, torch.ones(1)))
    assert (outcome.calls == 2 * (600 + 600 + 1)).all()  # asked for the margin, judged as often, and once at the end


# What is inside, and what counts


@settings(max_examples=60, deadline=None)
@given(
    norm=st.sampled_from(list(THREATS)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    radius=st.sampled_from([0.0, 1e-9, 1e-4, 8 / 255, 0.3, 1.0, 12.0, 1e6, 1e200]),
    edge=st.floats(0, 1),
    p_init=st.sampled_from([1e-6, 0.05, 0.8, 1.0]),
    seed=st.integers(0, 1000),
)
@example(norm="linf", shape=(1, 4, 4), radius=1e200, edge=0.5, p_init=0.8, seed=0)
@example(norm="l2", shape=(3, 4, 4), radius=1e200, edge=0.5, p_init=0.8, seed=0)
@example(norm="l1", shape=(3, 4, 4), radius=1e200, edge=0.5, p_init=0.8, seed=0)
def test_no_query_is_ever_outside(
    norm: str, shape: tuple[int, int, int], radius: float, edge: float, p_init: float, seed: int
) -> None:
    threat = THREATS[norm](radius)
    images = pixels(seed, 3, *shape)
    images = torch.where(images < edge / 2, 0.0, torch.where(images > 1 - edge / 2, 1.0, images))
    w = torch.randn(shape, generator=draws(seed))
    attack = Square(threat, queries=30, p_init=p_init)
    queries, outcome = asked(attack, images, lambda x: (w * x).flatten(1).sum(1) - 1e3, seed)
    for query in [*queries, outcome.images]:
        assert threat.contains(query, images).all()
        if radius == 0:
            assert torch.equal(query, images)


@pytest.mark.parametrize("threat", [L2(0.5), L1(3.0), L2(1e-3)], ids=str)
def test_rounding_does_not_add_up_over_a_long_run(threat: LpBall) -> None:
    # A model that likes every candidate more than the one before: all are accepted.
    images, count = torch.full((2, 1, 8, 8), 0.5), iter(range(10**6))  # the box is no limit in L2, which would hide it
    queries, _ = asked(Square(threat, queries=800), images, lambda x: torch.full((len(x),), next(count) - 1e4))
    assert all(threat.contains(query, images).all() for query in queries)
    last = threat.distance(queries[-1], images)
    assert (last > 0.9 * threat.radius).all()
    if threat.norm == "l2":  # what the start had of the room for rounding was given back
        assert (last < (1 - 8e-6) * threat.radius).all()


def test_who_fell_costs_nothing_more() -> None:
    images = torch.stack([torch.full((1, 4, 4), level) for level in (0.95, 0.05, 0.95)])
    attack = Square(Linf(0.02), queries=40)
    queries, outcome = asked(attack, images, lambda x: x.flatten(1).mean(1) - 0.5)
    assert outcome.calls.tolist() == [2, 41, 2]  # the judge looks once: at a suspect, or at the end
    assert [len(query) for query in queries[:3]] == [3, 2, 1]  # the second is the judge's look
    assert attack.cost(2) == 40
    assert Square(Linf(0.02), queries=40, restarts=3).cost(2) == 120


@NORMS
def test_radius_0_and_constant_models_leave_an_image_that_stands(norm: type[LpBall]) -> None:
    images = pixels(0, 3, 2, 6, 5)
    queries, outcome = asked(Square(norm(0.0), queries=12), images, lambda x: x.flatten(1).sum(1) - 1e3)
    assert len(queries) == 12 and torch.equal(outcome.images, images)
    _, outcome = asked(Square(norm(0.2), queries=12), images)
    assert (outcome.calls == 13).all()


@NORMS
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_one_pixel_finds_its_way(norm: type[LpBall], channels: int) -> None:
    # Any move is good, so that the way from one side to the other does not lead over the image itself.
    w = torch.tensor([1.0, -1.0, 1.0])[:channels, None, None]
    reach = 0.3 * {"linf": channels, "l2": channels**0.5, "l1": 1}[norm.norm]  # by the dual norm

    def margin(x: Tensor) -> Tensor:
        return (w * (x - 0.5) + 3 * (x - 0.5).abs()).flatten(1).sum(1) - 3.75 * reach

    _, outcome = asked(Square(norm(0.3), queries=200), torch.full((10, channels, 1, 1), 0.5), margin)
    assert (margin(outcome.images) > 0).all()


@NORMS
@pytest.mark.parametrize("size", [(1, 9), (7, 2), (3, 20), (8, 8)], ids=str)
def test_no_pixel_of_an_oblong_image_is_out_of_reach(norm: type[LpBall], size: tuple[int, int]) -> None:
    # Nothing moves this model: all windows are tried on the start.
    (start, *others), _ = asked(Square(norm(0.3), queries=80), torch.full((20, 1, *size), 0.5))
    changed = torch.stack([query != start for query in others])
    assert changed.any(0).any(0).all()


@NORMS
def test_logits_that_are_no_numbers_are_a_defeat(norm: type[LpBall]) -> None:
    images = pixels(0, 4, 1, 5, 5)
    _, outcome = asked(Square(norm(0.2), queries=9), images, lambda x: torch.full((len(x),), math.nan))
    assert (outcome.calls == 2).all()
    assert norm(0.2).contains(outcome.images, images).all()


@pytest.mark.parametrize("classes", [2, 3, 8])
@NORMS
def test_any_number_of_classes(norm: type[LpBall], classes: int) -> None:
    torch.manual_seed(classes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, classes)).eval()
    images = pixels(1, 30, 1, 6, 6)
    labels = model(images).argmax(1)
    radius = {"linf": 0.5, "l2": 3.0, "l1": 18.0}[norm.norm]
    attacked = Square(norm(radius), queries=300)(model, images, labels, generator=draws())
    assert (model(attacked).argmax(1) != labels).float().mean() > 0.9


# What must not change


@NORMS
def test_the_generator_decides_and_nothing_else_is_touched(norm: type[LpBall]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).train()
    images = pixels(1, 12, 1, 6, 6)
    labels = model.eval()(images).argmax(1)
    model.train()
    attack = Square(norm({"linf": 0.02, "l2": 0.1, "l1": 0.3}[norm.norm]), queries=25)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given, randomness = images.clone(), torch.get_rng_state()
    first = attack(model, images, labels, generator=draws(1))
    assert torch.equal(torch.get_rng_state(), randomness)
    torch.manual_seed(99)
    assert torch.equal(attack(model, images, labels, generator=draws(1)), first)
    with torch.inference_mode():
        assert torch.equal(attack(model, images, labels, generator=draws(1)), first)
    assert not torch.equal(attack(model, images, labels, generator=draws(2)), first)
    assert torch.equal(images, given) and not first.requires_grad
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_without_a_generator_the_global_randomness_decides() -> None:
    images = pixels(1, 4, 1, 6, 6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).eval()

    def attacked(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return Square(Linf(1e-3), queries=5)(model, images, model(images).argmax(1))

    assert torch.equal(attacked(0), attacked(0))
    assert not torch.equal(attacked(0), attacked(1))


@NORMS
def test_the_memory_layout_of_the_images_makes_no_difference(norm: type[LpBall]) -> None:
    images, w = pixels(1, 3, 2, 6, 5), torch.randn(2, 6, 5, generator=draws(2))
    layouts = [
        images,
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        images.flip(0).expand(3, 2, 6, 5).flip(0),
    ]
    attack = Square(norm(0.3), queries=40)
    plain, *others = (asked(attack, layout, lambda x: (w * x).flatten(1).sum(1) - 1e3)[1].images for layout in layouts)
    for other in others:
        torch.testing.assert_close(other, plain, rtol=0, atol=1e-5)


@NORMS
def test_no_images_are_no_work(norm: type[LpBall]) -> None:
    queries, outcome = asked(Square(norm(0.1), queries=5), torch.zeros(0, 1, 4, 4))
    assert not queries and outcome.images.shape == (0, 1, 4, 4)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": 0}, "Square takes at least 1 query and 1 restart, got 0 and 1"),
        ({"restarts": 0}, "Square takes at least 1 query and 1 restart, got 5000 and 0"),
        ({"p_init": 0.0}, "Square takes a p_init above 0 and at most 1, got 0.0"),
        ({"p_init": 1.5}, "Square takes a p_init above 0 and at most 1, got 1.5"),
        ({"p_init": math.nan}, "Square takes a p_init above 0 and at most 1, got nan"),
        ({"threat": "linf"}, "Square needs an Lp threat such as linf:8/255, got 'linf'"),
    ],
)
def test_settings_that_make_no_attack_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        Square(**{"threat": Linf(0.1), **arguments})
    assert str(raised.value) == message
