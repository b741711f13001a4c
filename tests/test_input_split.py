"""Input splitting: against exact minima of tiny networks, MILP's and those over all patterns of ReLUs."""

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from redan.certification import input_split, verifier
from redan.certification.building import Builder
from redan.certification.crown import Crown
from redan.certification.input_split import InputSplit
from redan.certification.milp import minimise
from redan.certification.network import Network
from redan.certification.regions import Region, Specification
from redan.certification.verifier import Verifier
from redan.errors import UserError
from redan.threats import L2, Linf, LpBall
from tests.certification_cases import Asked, dense, draws, exact_minima, points, problem, shifted, specification_values

HORIZON = 60.0  # seconds, far more than any problem here takes


def residual(seed: int) -> Network:
    """3 inputs, a shortcut around a ReLU."""
    normal = draws(seed)
    b = Builder((3, 1, 1))
    x = b.linear(b.reshape(0, (3,)), normal(5, 3), normal(5))
    y = b.add(x, b.linear(b.relu(x), normal(5, 5), normal(5)))
    return b.network(b.linear(b.relu(y), normal(3, 5), normal(3)))


def convolutional(seed: int) -> Network:
    """4 pixels."""
    normal = draws(seed)
    b = Builder((1, 2, 2))
    x = b.relu(b.convolution(0, normal(3, 1, 2, 2), normal(3), padding=(1, 1)))
    return b.network(b.linear(b.reshape(x, (27,)), normal(3, 27), normal(3)))


def curved(seed: int) -> Network:
    """3 inputs, sigmoid and tanh."""
    normal = draws(seed)
    b = Builder((3, 1, 1))
    x = b.sigmoid(b.linear(b.reshape(0, (3,)), 3 * normal(5, 3), normal(5)))
    return b.network(b.linear(b.tanh(b.linear(x, 2 * normal(4, 5), normal(4))), normal(3, 4), normal(3)))


TINY: dict[str, Callable[[int], Network]] = {
    "dense": lambda seed: dense(seed, inputs=3),
    "residual": residual,
    "convolutional": convolutional,
}


class Judge:
    """Says whether one of some images is a counterexample, and keeps it."""

    def __init__(self, network: Network, region: Region, specification: Specification) -> None:
        self.network, self.region, self.specification = network, region, specification
        self.image: Tensor | None = None

    def __call__(self, images: Tensor) -> bool:
        assert images.dtype == torch.float64 and images.dim() == 2
        same = torch.zeros(len(images), dtype=torch.int64)
        asked = self.specification.part(same)
        broken = asked.worst(asked.values(self.network(images.view(-1, *self.network.input_shape)))) <= 0
        inside = (images >= self.region.lower.flatten()) & (images <= self.region.upper.flatten())
        assert inside.all()
        if self.region.ball is not None and self.region.centre is not None:
            broken &= self.region.ball.distance(images, self.region.centre.flatten(1)) <= self.region.ball.radius
        if broken.any():
            self.image = images[broken][0]
        return bool(broken.any())


def solve(
    network: Network, region: Region, specification: Specification, search: InputSplit | None = None
) -> tuple[bool | None, float, int, Judge]:
    judge = Judge(network, region, specification)
    search = search or InputSplit()
    return *search(network, region, specification, deadline=time.monotonic() + HORIZON, refuted=judge), judge


def tiny(kind: str, seed: int, threat: LpBall | None = None) -> tuple[Network, Region, Specification]:
    network = TINY[kind](seed)
    return network, *problem(network, threat or Linf(0.3), seed, images=1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", TINY)
def test_verdict_is_the_sign_of_the_minimum(kind: str, seed: int) -> None:
    network, region, specification = tiny(kind, seed)
    exact = torch.tensor([exact_minima(network, region, specification, 0)], dtype=torch.float64)
    verdict, lower, visited, judge = solve(network, region, shifted(specification, 0.02 - exact))
    assert (verdict, judge.image) == (True, None) and 0 <= lower <= 0.02 and visited > 1
    for least in ([[0.02, -0.02]], [[-0.02, 0.02]]):
        verdict, lower, _, judge = solve(network, region, shifted(specification, torch.tensor(least) - exact))
        assert verdict is False and judge.image is not None and lower <= -0.02


def test_minimum_of_a_mixed_integer_solver() -> None:
    network, region, specification = tiny("dense", 5)
    layers = Crown()(network, region, specification).layers
    found = minimise(
        network,
        region,
        specification,
        layers,
        image=0,
        timeout=HORIZON,
        stop_below=None,
        stop_above=None,
        all_rows=True,
    )
    least = found.lower[None].double()
    assert solve(network, region, shifted(specification, 1e-3 - least))[0] is True
    assert solve(network, region, shifted(specification, -1e-3 - least))[0] is False


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(TINY)),
    seed=st.integers(0, 2**20),
    radius=st.sampled_from([0.05, 0.3, 1.0]),
    offset=st.floats(-3, 3),
    ball=st.booleans(),
)
def test_no_point_contradicts_what_is_shown(kind: str, seed: int, radius: float, offset: float, ball: bool) -> None:
    network, region, specification = tiny(kind, seed, L2(radius) if ball else Linf(radius))
    specification = shifted(specification, torch.tensor(offset))
    verdict, lower, _, judge = solve(network, region, specification, InputSplit(limit=500))
    values = specification_values(specification, network, points(network, region, specification, seed))
    least = float(values.amin())
    assert lower <= max(least, 0.0)
    assert verdict is not True or least > 0
    assert (verdict is False) == (judge.image is not None)


def test_verdicts_do_not_depend_on_the_batch() -> None:
    for seed in range(2):
        network, region, specification = tiny("residual", seed)
        exact = torch.tensor([exact_minima(network, region, specification, 0)], dtype=torch.float64)
        for least in (0.1, -0.1):
            case = shifted(specification, least - exact)
            assert {solve(network, region, case, InputSplit(batch=it))[0] for it in (2, 8, 256)} == {least > 0}


@pytest.mark.parametrize("gap", [0.01, -0.01])
def test_one_function_here_another_there(gap: float) -> None:
    """Of a number in [0, 1], ``x - 1/2 + gap`` or ``1/2 - x + gap`` is above 0: neither is everywhere."""
    b = Builder((1, 1, 1))
    x = b.relu(b.linear(b.reshape(0, (1,)), torch.tensor([[1.0], [-1.0]]), torch.tensor([-0.5, 0.5])))
    network = b.network(b.linear(x, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.full((2,), gap)))
    region = Region(torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double())
    both = Specification(torch.eye(2).double()[None], torch.zeros(1, 2).double(), torch.tensor([0, 0]))
    assert solve(network, region, both)[0] is (gap > 0)
    assert solve(network, region, replace(both, groups=torch.tensor([0, 1])))[0] is False


def test_a_ball_is_not_its_box() -> None:
    """``1.2 - |x| - |y|`` is above 0 in the ball of radius 0.8 about 0, where ``|x| + |y| <= 1.14``, not in its box."""
    b = Builder((2, 1, 1))
    signs = torch.cat([torch.eye(2), -torch.eye(2)])
    x = b.relu(b.linear(b.reshape(0, (2,)), signs, None))
    network = b.network(b.linear(x, torch.cat([-torch.ones(1, 4), torch.zeros(1, 4)]), torch.tensor([1.2, 0.0])))
    centre = torch.zeros(1, 2, 1, 1).double()
    specification = Specification.robust(torch.tensor([0]), 2)
    box = Region(centre - 0.8, centre + 0.8)
    assert solve(network, box, specification)[0] is False
    assert solve(network, replace(box, centre=centre, ball=L2(0.8)), specification)[0] is True
    verdict, _, _, judge = solve(network, replace(box, centre=centre, ball=L2(0.87)), specification)
    assert verdict is False and judge.image is not None and judge.image.norm() <= 0.87


def test_an_input_that_does_nothing_is_not_cut() -> None:
    """However wide it is; and of two that do something, the one that does more is cut."""
    normal = draws(1)
    first = normal(6, 2)
    counts = []
    for weight in (first, torch.cat([first, torch.zeros(6, 1).double()], 1)):
        b = Builder((weight.shape[1], 1, 1))
        x = b.relu(b.linear(b.reshape(0, (weight.shape[1],)), weight, 0.3 * draws(2)(6)))
        network = b.network(b.linear(x, draws(3)(2, 6), None))
        upper = torch.tensor([1.0, 1.0, 100.0])[: weight.shape[1]].double().view(1, -1, 1, 1)
        region, specification = Region(-upper, upper), Specification.robust(torch.tensor([0]), 2)
        least = exact_minima(network, region, specification, 0)
        counts.append(solve(network, region, shifted(specification, torch.tensor(0.01 - least[0])))[2])
    assert counts[0] == counts[1] > 3


def test_no_time_left_or_too_many_boxes() -> None:
    network, region, specification = tiny("dense", 0)
    exact = torch.tensor([exact_minima(network, region, specification, 0)], dtype=torch.float64)
    case = shifted(specification, 0.001 - exact)
    verdict, lower, visited = InputSplit()(network, region, case, deadline=0.0, refuted=lambda images: False)
    assert verdict is None and -torch.inf < lower <= 0 and visited == 1
    assert solve(network, region, case, InputSplit(limit=3))[0] is None


def test_a_point_at_zero_ends_the_search() -> None:
    """A box without width that nobody refutes cannot be cut."""
    network, region, specification = tiny("dense", 0)
    point = Region(region.lower, region.lower)
    value = specification.values(network(region.lower)).min()
    search = InputSplit()
    case = shifted(specification, -value)
    verdict, _, visited = search(
        network, point, case, deadline=time.monotonic() + HORIZON, refuted=lambda images: False
    )
    assert (verdict, visited) == (None, 1)


def test_a_forgotten_part_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves that do not meet make it show what is false."""
    halves = input_split._Boxes.halves

    def wrong(self: input_split._Boxes) -> input_split._Boxes:
        found, k = halves(self), len(self.lower)
        gap = 0.5 * (found.upper - found.lower)
        gap[:k] = 0
        return replace(found, lower=found.lower + gap)

    monkeypatch.setattr(input_split._Boxes, "halves", wrong)
    false = 0
    for seed in range(4):
        network, region, specification = tiny("dense", seed)
        exact = torch.tensor([exact_minima(network, region, specification, 0)], dtype=torch.float64)
        case = shifted(specification, -0.1 - exact)
        search = InputSplit(limit=200)
        found = search(network, region, case, deadline=time.monotonic() + HORIZON, refuted=lambda images: False)
        false += found[0] is True
    assert false > 0


def test_the_verifier_splits_few_inputs() -> None:
    network, region, specification = tiny("dense", 0)
    exact = torch.tensor([exact_minima(network, region, specification, 0)], dtype=torch.float64)
    for least, outcome in ((0.005, "certified"), (-0.005, "falsified")):
        asked = Asked(network, region, shifted(specification, least - exact))
        for method in ("cascade", "input-split"):
            (found,) = Verifier(method)(network, asked)
            assert (found.outcome, found.by) == (outcome, "input-split")
            if found.counterexample is not None:
                inside = (found.counterexample >= region.lower) & (found.counterexample <= region.upper)
                assert inside.all() and asked.refutes(found.counterexample[None], torch.tensor([0])).all()


def test_many_inputs_are_not_split() -> None:
    network = dense(0, hidden=(4,), inputs=verifier.MOST_INPUTS + 1)
    region, specification = problem(network, Linf(0.3), 0, images=1)
    asked = Asked(network, region, shifted(specification, torch.tensor(-1e-3)))
    with pytest.raises(UserError, match=f"at most {verifier.MOST_INPUTS} inputs"):
        Verifier("input-split")(network, asked)
    (found,) = Verifier()(network, asked)
    assert found.by != "input-split"
