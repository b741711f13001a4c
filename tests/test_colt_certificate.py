"""COLT's certificate: against exact minima of small networks, and its parts against what they are made of."""

import inspect
import itertools
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from redan.certification import colt, verifier, zonotope
from redan.certification.building import Builder
from redan.certification.colt import TRIES, LateMilp
from redan.certification.interval import Interval
from redan.certification.milp import Binaries, Encoding, Minima, lp_refine, minimise
from redan.certification.network import Linear, Network
from redan.certification.regions import Bounds, Region, Specification
from redan.certification.verifier import Verifier
from redan.certification.zonotope import Zonotope, learn
from redan.threats import Linf
from tests.certification_cases import NETWORKS, Asked, dense, exactly, points, problem, violations


def least(network: Network, region: Region, specification: Specification, bounds: Bounds, binaries: Binaries) -> Tensor:
    found = minimise(
        network,
        region,
        specification,
        bounds.layers,
        image=0,
        binaries=binaries,
        timeout=20,
        stop_below=None,
        stop_above=None,
        all_rows=True,
    )
    return found.lower


@pytest.mark.parametrize("name", ["dense", "convolutional", "residual"])
def test_exact_layers_at_the_end_lie_between_triangles_and_the_minimum(name: str) -> None:
    network = NETWORKS[name](0)
    region, specification = problem(network, Linf(0.25), images=1)
    bounds = Interval()(network, region, specification)
    late = [
        least(network, region, specification, bounds, Binaries(last_layers=k)) for k in range(len(network.relus) + 1)
    ]
    triangles = least(network, region, specification, bounds, Binaries(per_layer=0))
    exact = least(network, region, specification, bounds, Binaries())
    slack = 1e-3  # what is taken off for the solvers' tolerances
    assert (late[0] - triangles).abs().max() < slack
    assert (late[-1] - exact).abs().max() < slack
    for fewer, more in itertools.pairwise(late):
        assert (fewer <= more + slack).all()
    assert (late[1] > late[0] + slack).any() and (late[-1] > late[1] + slack).any()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["dense", "convolutional"])
def test_what_it_certifies_is_so_and_with_all_exact_it_certifies_all_that_is(name: str, seed: int) -> None:
    network = NETWORKS[name](seed)
    region, specification = problem(network, Linf(0.03), seed, images=1)
    bounds = Zonotope()(network.to(torch.float32), region, specification)
    exact = least(network, region, specification, Interval()(network, region, specification), Binaries())
    asked: list[Tensor] = []

    def tried(image: Tensor) -> bool:
        asked.append(image)
        return False

    def certifies(certificate: LateMilp) -> bool:
        return certificate(network, region, specification, bounds, deadline=time.monotonic() + 20, tried=tried)

    if certifies(LateMilp((Binaries(1, per_layer=1),))):
        assert (exact > 0).all()
    assert certifies(LateMilp((Binaries(1, per_layer=1), Binaries()))) == bool((exact > 1e-6).all())
    for image in asked:
        assert (image >= region.lower[0] - 1e-9).all() and (image <= region.upper[0] + 1e-9).all()


def test_a_counterexample_ends_it() -> None:
    network = NETWORKS["dense"](4)
    region, specification = problem(network, Linf(0.5), 4, images=1)
    bounds = Zonotope()(network.to(torch.float32), region, specification)
    found = []

    def tried(image: Tensor) -> bool:
        found.append(specification.values(network(image[None])).min())
        return True

    certificate = LateMilp((Binaries(),))
    assert not certificate(network, region, specification, bounds, deadline=time.monotonic() + 20, tried=tried)
    assert len(found) == 1 and found[0] < 1e-6


def test_nothing_is_begun_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS["dense"](4)
    region, specification = problem(network, Linf(0.5), 4, images=1)
    bounds = Zonotope()(network.to(torch.float32), region, specification)
    asked: list[Any] = []

    def tried(image: Tensor) -> bool:
        asked.append(image)
        return False

    # Writing a program down takes long, too, where there are thousands of neurons.
    monkeypatch.setattr(Encoding, "program", lambda *which: asked.append(which))
    assert not LateMilp()(network, region, specification, bounds, deadline=time.monotonic(), tried=tried)
    position = network.bent[1]
    layers = {i: (low.double(), high.double()) for i, (low, high) in bounds.layers.items()}
    low, high = lp_refine(network, region, layers, position, image=0, deadline=time.monotonic())
    assert not asked and (low == layers[position][0][0]).all() and (high == layers[position][1][0]).all()


def watched(monkeypatch: pytest.MonkeyPatch, *, lower: float = -1.0) -> list[dict[str, Any]]:
    """The mixed-integer programs asked for, each of which comes to that bound in no time; no slope is learned."""
    asked: list[dict[str, Any]] = []

    def answered(*arguments: Any, **options: Any) -> Minima:
        asked.append(options | {"layers": arguments[3]})
        bound = torch.tensor([lower]).double()
        return Minima((0,), bound, bound, (None,))

    monkeypatch.setattr(colt, "minimise", answered)
    monkeypatch.setattr(colt, "ITERATIONS", 0)
    return asked


def test_linear_programs_and_learning_leave_time_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS["dense"](4)
    region, specification = problem(network, Linf(0.5), 4, images=1)
    bounds = Zonotope()(network.to(torch.float32), region, specification)
    clock = [100.0]
    monkeypatch.setattr(colt, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    asked, limits = watched(monkeypatch), []

    def takes_all(limited: Any) -> Any:
        def call(*arguments: Any, deadline: float, **options: Any) -> Any:
            limits.append(deadline)
            clock[0] = deadline
            return limited(*arguments, **options)

        return call

    for name in ("lp_refine", "learn"):
        monkeypatch.setattr(colt, name, takes_all(getattr(colt, name)))
    assert not LateMilp()(network, region, specification, bounds, deadline=108.0, tried=lambda _: False)
    assert limits == [104.0, 106.0]
    assert [it["timeout"] for it in asked] == [2.0] * len(asked) and asked


def test_programs_take_what_was_refined_and_what_is_most_urgent(monkeypatch: pytest.MonkeyPatch) -> None:
    published = (colt.REFINED, colt.LP_SECONDS, colt.ITERATIONS, inspect.signature(learn).parameters["rate"].default)
    assert published == (1, 10.0, 500, 0.1)
    network = NETWORKS["dense"](4)
    region, specification = problem(network, Linf(0.5), 4, images=1)
    bounds = Zonotope()(network.to(torch.float32), region, specification)
    position = network.bent[1]
    refined = [0.9 * it[0].double() for it in bounds.layers[position]]
    learned: list[Any] = []

    def learns(*arguments: Any, **options: Any) -> Any:
        for mine, it in zip(options["given"][position], refined, strict=True):
            assert torch.equal(mine[0], it)
        learned.append(learn(*arguments, **options | {"iterations": 2}))
        return learned[-1]

    monkeypatch.setattr(colt, "lp_refine", lambda *_, **__: refined)
    monkeypatch.setattr(colt, "learn", learns)
    asked = watched(monkeypatch)
    late = time.monotonic() + 60
    assert not LateMilp()(network, region, specification, bounds, deadline=late, tried=lambda _: False)
    (found,) = learned  # the first class that is not shown ends it
    assert found.urgency is not None and asked
    for options in asked:
        layers = options["layers"]
        assert options["binaries"].priorities is found.urgency
        for place, (low, high) in found.bounds.layers.items():
            known = refined if place == position else [it[0].double() for it in bounds.layers[place]]
            assert torch.equal(layers[place][0][0], torch.maximum(known[0], low[0]))
            assert torch.equal(layers[place][1][0], torch.minimum(known[1], high[0]))


def test_tries_go_on_until_the_class_is_shown_and_none_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    published = [(1, 30, None), (1, 100, None), (2, 60, None)]
    wide = [(1, 30, None), (1, 60, None), (1, None, None), (2, None, 120)]
    of = {name: [(it.last_layers, it.per_layer, it.in_all) for it in tries] for name, tries in TRIES.items()}
    assert of == {"colt": published, "colt-8": wide}
    network = dense(0, hidden=(70, 120), inputs=6)
    region, specification = problem(network, Linf(0.5), images=1)
    bounds = Zonotope()(network.to(torch.float32), region, specification)
    first, last = (int(((low < 0) & (high > 0)).sum()) for low, high in bounds.layers.values())
    assert first > 60 and last > 100 and not specification.shown(bounds.margins)

    def tries(certificate: LateMilp, lower: float = -1.0, asks: Any = (network, region, specification)) -> Any:
        network, region, specification = asks
        known = Zonotope()(network, region, specification)
        with monkeypatch.context() as context:
            asked = watched(context, lower=lower)
            late = time.monotonic() + 60
            shown = certificate(network, region, specification, known, deadline=late, tried=lambda _: False)
        made = [it["binaries"] for it in asked]
        return shown, [(it.last_layers, it.per_layer, it.in_all) for it in made]

    # The first class that none shows ends it; one that is shown takes no second.
    monkeypatch.setattr(colt, "lp_refine", lambda *_, **__: [it[0].double() for it in bounds.layers[network.bent[1]]])
    assert tries(LateMilp()) == (False, published)
    assert tries(LateMilp(TRIES["colt-8"])) == (False, wide)
    groups = specification.left(bounds.margins[0])
    assert tries(LateMilp(), lower=1.0) == (True, published[:1] * len(groups))
    monkeypatch.undo()
    # Of layers with at most 6 and 5 open ReLUs, all that are in the last one are exact at once.
    few = NETWORKS["dense"](4)
    small = (few, *problem(few, Linf(0.5), 4, images=1))
    assert tries(LateMilp(), asks=small) == (False, [published[0], published[2]])
    assert tries(LateMilp(TRIES["colt-8"]), asks=small) == (False, [wide[0], wide[3]])
    growing = tuple(Binaries(*it) for it in ((1, 2), (1, 3), (1, 99), (2, 99, 7), (2, 99, 8), (2, 99, 99), (2, 99)))
    made = [(it.last_layers, it.per_layer, it.in_all) for it in growing]
    assert tries(LateMilp(growing), asks=small)[1] == made[:-1]
    # Where all ReLUs of the layer before are on, the last two are the last one.
    closed = {i: (low.abs() + 1, low.abs() + 2) for i, (low, _) in bounds.layers.items()}
    closed[network.bent[1]] = bounds.layers[network.bent[1]]
    one, two = Binaries(1), Binaries(2)
    assert list(LateMilp((one, two))._tries(network, closed)) == [one]


def test_learning_ends_at_the_deadline_with_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS["dense"](3)
    region, specification = problem(network, Linf(0.3), 3)

    def learned(iterations: int, *ticks: float) -> Bounds:
        clock = iter(ticks)
        with monkeypatch.context() as context:
            if ticks:
                context.setattr(zonotope, "time", SimpleNamespace(monotonic=lambda: next(clock)))
            deadline = 10.0 if ticks else float("inf")
            return learn(network, region, specification, iterations=iterations, deadline=deadline).bounds

    least_area, three, whole = learned(0), learned(3), learned(50)
    assert (three.margins > least_area.margins).any() and (whole.margins > three.margins).any()
    # The first pass ends late, or leaves less time than it took; three steps leave the last pass as much as the first.
    late, short, enough = (1.0, 10.5, 10.5), (1.0, 6.0, 6.0), (1.0, 3.0, 5.0, 6.0, 7.0, 8.0)
    for found, expected in (
        (learned(50, *late), least_area),
        (learned(50, *short), least_area),
        (learned(50, *enough), three),
    ):
        assert torch.equal(found.margins, expected.margins)
        for position, (low, high) in expected.layers.items():
            assert torch.equal(found.layers[position][0], low) and torch.equal(found.layers[position][1], high)
        assert violations(found, exactly(network, points(network, region, specification, 0)), specification) == 0


def test_what_slopes_show_has_its_margin() -> None:
    network = NETWORKS["dense"](0)
    region, specification = problem(network, Linf(0.1), images=40)
    plain, learned = (Zonotope(steps)(network, region, specification) for steps in (0, colt.ITERATIONS))
    better = (specification.shown(learned.margins) & ~specification.shown(plain.margins)).nonzero().flatten()
    region, specification = region.part(better[:1]), specification.part(better[:1])
    (found,) = Verifier("learned-zonotope")(network, Asked(network, region, specification))
    assert (found.outcome, found.by) == ("certified", "learned-zonotope")
    learned = Zonotope(colt.ITERATIONS)(network, region, specification)
    assert found.margin is not None and found.margin > 0
    assert found.margin == pytest.approx(specification.worst(learned.margins).item())


@pytest.mark.parametrize("method", ["learned-zonotope", "colt", "colt-8"])
def test_each_image_s_slopes_have_a_time_of_their_own(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS["dense"](4)
    region, specification = problem(network, Linf(0.5), 4, images=3)
    learning: list[tuple[int, float]] = []

    class Watched(Zonotope):
        def __call__(self, network: Network, region: Region, specification: Specification) -> Bounds:
            if self.iterations:
                learning.append((len(region), self.deadline - time.monotonic()))
            return super().__call__(network, region, specification)

    class Unbroken(Asked):
        def refutes(self, candidates: Tensor, who: Tensor) -> Tensor:
            return torch.zeros(len(candidates), dtype=torch.bool)

    monkeypatch.setattr(verifier, "Zonotope", Watched)
    monkeypatch.setattr(verifier, "ITERATIONS", 1)
    made: list[Any] = []

    def late(tries: Any, *_: Any) -> Any:
        made.append(tries)
        return lambda *_, **__: False

    monkeypatch.setattr(verifier, "LateMilp", late)
    Verifier(method, timeout=50)(network, Unbroken(network, region, specification))
    assert [images for images, _ in learning] == [1, 1, 1]
    assert made == ([] if method == "learned-zonotope" else [TRIES[method]] * 3)
    share = {"learned-zonotope": 1.0, "colt": 0.4, "colt-8": 0.4}[method]
    assert all(share * 50 - 5 < seconds <= share * 50 for _, seconds in learning)


def test_given_bounds_are_taken() -> None:
    network = NETWORKS["dense"](0)
    region, specification = problem(network, Linf(1.0), 2)
    plain = learn(network, region, specification, iterations=0).bounds
    last = network.bent[-1]
    lower, upper = plain.layers[last]
    assert (lower < 0).all() and (upper > 0).any()
    dead = {last: (lower, torch.zeros_like(upper))}
    found = learn(network, region, specification, iterations=2, given=dead).bounds
    assert (found.layers[last][1] <= 0).all()
    # With the last ReLU layer dead the logits are the last bias.
    output = network.layers[-1]
    assert isinstance(output, Linear) and output.bias is not None
    assert (found.margins - specification.values(output.bias.expand(2, -1))).abs().max() < 1e-6


def test_urgency_is_the_gradient_by_the_slope() -> None:
    network = NETWORKS["dense"](3)
    region, specification = problem(network, Linf(0.3), 3, images=1)
    row = specification.row(0)
    learned = learn(network, region, row, iterations=1)
    plain = learn(network, region, row, iterations=0)
    assert plain.urgency is None and learned.urgency is not None
    for position, values in learned.urgency.items():
        lower, upper = learned.bounds.layers[position]
        stable = (plain.bounds.layers[position][0] >= 0) | (plain.bounds.layers[position][1] <= 0)
        assert not values[stable].any() and (values >= 0).all() and lower.shape == upper.shape
    assert any(values.any() for values in learned.urgency.values())


@pytest.mark.parametrize("method", ["learned-zonotope", "colt"])
def test_weights_that_float32_rounds_up_prove_nothing(method: str) -> None:
    """x / 3 - 1 / 6 - 1e-10 is below 0 at x = 1/2; with the float32 number next to 1/3 it is 5e-9 there."""
    b = Builder((1,))
    third_of_x = b.relu(b.linear(0, torch.ones(1, 1).double() / 3, None))
    network = b.network(b.linear(third_of_x, torch.tensor([[1.0], [0.0]]), None))
    third = Region(torch.tensor([[0.5]]).double(), torch.tensor([[0.75]]).double())
    asked = Specification.robust(torch.tensor([0]), 2)
    asked = replace(asked, offsets=asked.offsets - 1 / 6 - 1e-10)

    class Silent:
        region, specification = third, asked

        def attack(self, name: str, who: Tensor) -> Tensor:
            return self.region.upper[who].float()

        def refutes(self, candidates: Tensor, who: Tensor) -> Tensor:
            return torch.zeros(len(candidates), dtype=torch.bool)

    (found,) = Verifier(method, timeout=5)(network, Silent())
    assert found.outcome == "unknown" and found.margin is not None and found.margin < 0
