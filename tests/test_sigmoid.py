"""Bounds of sigmoid and tanh: lines that nothing crosses and that touch, least areas, exact minima by a grid."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from redan.certification import sigmoid
from redan.certification.alpha_crown import AlphaCrown
from redan.certification.building import Builder
from redan.certification.crown import Crown
from redan.certification.input_split import InputSplit
from redan.certification.interval import Interval
from redan.certification.network import Network
from redan.certification.regions import Region, Specification
from redan.certification.rounding import SoundFloat
from redan.certification.sigmoid import band, box, derivative, lines
from redan.certification.verifier import Verifier
from redan.certification.zonotope import Zonotope
from redan.errors import UserError
from redan.threats import Linf
from tests.certification_cases import curved, points, problem, specification_values, violations

ENDS = st.one_of(st.floats(-8, 8), st.floats(-1e-6, 1e-6), st.floats(-60, 60), st.floats(-1e30, 1e30))


def interval(a: float, b: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Ends in that type, and float64 points between them, more of them near the ends and near 0."""
    low, high = torch.tensor([sorted((a, b))], dtype=dtype).T
    share = torch.linspace(0, 1, 2001, dtype=torch.float64)
    x = torch.cat([low.double() + share**power * (high.double() - low.double()) for power in (1, 8)])
    x = torch.cat([x, high.double() - share**8 * (high.double() - low.double()), torch.linspace(-9, 9, 3001).double()])
    return low, high, x.clamp(low.double(), high.double())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(a=ENDS, b=ENDS, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_curve_lies_between_its_lines(a: float, b: float, dtype: torch.dtype) -> None:
    low, high, x = interval(a, b, dtype)
    above, below = lines(low, high, "exact")
    assert above.slope.dtype == below.slope.dtype == dtype and above.offset.dtype == torch.float64
    f = x.sigmoid()
    assert (above.slope.double() * x + above.offset >= f).all()
    assert (below.slope.double() * x + below.offset <= f).all()
    slope, middle, height = band(low, high, "exact")
    assert ((f - slope * x - middle).abs() <= height).all()
    least, most = box(low, high, "exact")
    assert (f >= least).all() and (f <= most).all() and (least >= 0).all() and (most <= 1).all()


@pytest.mark.parametrize(
    ("low", "high"), [(-3.0, 5.0), (-6.0, 0.5), (-0.5, 6.0), (-4.0, -1.0), (1.0, 4.0), (-1.0, 1.0)]
)
def test_lines_touch_and_leave_the_least_area(low: float, high: float) -> None:
    ends = torch.tensor([[low, high]]).double().T
    x = torch.linspace(low, high, 4001).double()
    f = x.sigmoid()
    above, below = lines(ends[0], ends[1], "off")
    gap_above, gap_below = above.slope * x + above.offset - f, f - below.slope * x - below.offset
    assert gap_above.min() < 1e-6 and gap_below.min() < 1e-6
    slopes = torch.linspace(0, 0.25, 2001).double()[:, None]
    least_above = (f - slopes * x).amax(1, keepdim=True) + slopes * x - f
    least_below = f - slopes * x - (f - slopes * x).amin(1, keepdim=True)
    for gap, least in ((gap_above, least_above), (gap_below, least_below)):
        assert gap.mean() <= least.mean(1).min() + 1e-6


def test_width_of_a_point_is_nothing() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0]).double()
    for line in lines(x, x, "exact"):
        torch.testing.assert_close(line.slope * x + line.offset, x.sigmoid(), atol=1e-13, rtol=0)
    torch.testing.assert_close(derivative(torch.zeros(1)), torch.tensor([0.25]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_runtime_that_errs_by_some_units_is_covered(dtype: torch.dtype) -> None:
    low, high, x = interval(-2.0, 3.0, dtype)
    off = x.sigmoid() * (1 + 7 * 2.0**-24 * torch.tensor([-1.0, 1.0]).double()[:, None])
    above, below = lines(low, high, "network")
    assert (above.slope.double() * x + above.offset >= off).all()
    assert (below.slope.double() * x + below.offset <= off).all()
    slope, middle, height = band(low, high, "network")
    assert ((off - slope * x - middle).abs() <= height).all()
    least, most = box(low, high, "network")
    assert (off >= least).all() and (off <= most).all()
    exact = lines(low, high, "exact")
    assert not (exact[0].slope.double() * x + exact[0].offset >= off).all()


def one_curve(kind: str, weight: float) -> Network:
    """``tanh(w x)`` or ``sigmoid(w x)`` less a share of x itself, beside 0."""
    b = Builder((1,))
    y = getattr(b, kind)(b.linear(0, torch.tensor([[weight]]), None))
    return b.network(b.linear(b.concatenate([y, 0], 0), torch.tensor([[1.0, -0.5], [0.0, 0.0]]), None))


@pytest.mark.parametrize("kind", ["sigmoid", "tanh"])
@pytest.mark.parametrize("weight", [3.0, -5.0])
def test_minimum_of_one_curve(kind: str, weight: float) -> None:
    network = one_curve(kind, weight)
    region = Region(torch.tensor([[-1.0]]).double(), torch.tensor([[1.0]]).double())
    specification = Specification.robust(torch.tensor([0]), 2)
    x = torch.linspace(-1, 1, 100_001).double()[:, None]
    exact = float(getattr(torch, kind)(weight * x).sub(0.5 * x).min())
    found = {
        "interval": Interval()(network, region, specification),
        "zonotope": Zonotope()(network, region, specification),
        "crown": Crown()(network, region, specification),
    }
    least = {name: float(it.margins) for name, it in found.items()}
    assert max(least.values()) <= exact + 1e-9
    if weight > 0:  # the curve's rise against the line's fall: CROWN knows that they are of one x
        assert least["crown"] > least["interval"]
    alone = Specification(specification.weights, specification.offsets - exact + 0.01, specification.groups)
    solved = InputSplit()(network, region, alone, deadline=time.monotonic() + 60, refuted=lambda images: False)
    assert solved[0] is True
    above = Specification(specification.weights, specification.offsets - exact - 0.01, specification.groups)
    solved = InputSplit()(network, region, above, deadline=time.monotonic() + 60, refuted=lambda images: True)
    assert solved[0] is False


@pytest.mark.parametrize("sound", ["exact", "network"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), scale=st.sampled_from([1e-6, 0.1, 30.0, 1e5]))
def test_extreme_boxes_of_a_network(sound: SoundFloat, dtype: torch.dtype, seed: int, scale: float) -> None:
    network = curved(seed).to(dtype)
    region, specification = problem(network, Linf(0.2), seed)
    wide = Region(region.lower * scale, region.upper * scale)
    x = points(network, wide, specification, seed)
    for bounder in (Interval(sound), Zonotope(sound=sound), Crown(sound=sound), AlphaCrown(iterations=2, sound=sound)):
        bounds = bounder(network, wide, specification)
        exact = network.to(torch.float64)
        outputs = [it.view(*x.shape[:2], *it.shape[1:]) for it in exact.outputs(x.flatten(0, 1))]
        assert violations(bounds, outputs, specification) == 0


def test_a_line_that_is_a_hair_too_high_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-1, 1, 10_001).double()[:, None]
    region = Region(x[:1], x[-1:])
    specification = Specification.robust(torch.tensor([0]), 2)

    def count() -> int:
        found = 0
        for weight in (-4.0, -1.0, 0.5, 1.0, 3.0):
            network = one_curve("sigmoid", weight)
            bounds = Crown()(network, region, specification)
            found += int((specification_values(specification, network, x[:, None]) < bounds.margins).any())
        return found

    assert count() == 0
    true = sigmoid.lines

    def wrong(lower: Tensor, upper: Tensor, sound: SoundFloat) -> tuple[sigmoid.Line, sigmoid.Line]:
        above, below = true(lower, upper, sound)
        return above, sigmoid.Line(below.slope, below.offset + 0.01 * (upper.sigmoid() - lower.sigmoid()))

    monkeypatch.setattr(sigmoid, "lines", wrong)
    assert count() > 0


@pytest.mark.parametrize("method", ["branch-and-bound", "milp", "colt"])
def test_searches_on_relus_are_refused(method: str) -> None:
    network = curved(0)

    class Nothing:
        region, specification = problem(network, Linf(0.1))

        def attack(self, name: str, who: Tensor) -> Tensor:
            return self.region.lower[who].float()

        def refutes(self, candidates: Tensor, who: Tensor) -> Tensor:
            return torch.zeros(len(candidates), dtype=torch.bool)

    with pytest.raises(UserError, match="sigmoid or tanh: cascade, alpha-crown"):
        Verifier(method)(network, Nothing())
    verdicts = Verifier("cascade", timeout=5)(network, Nothing())
    assert {it.outcome for it in verdicts} <= {"certified", "unknown"} and len(verdicts) == 2
