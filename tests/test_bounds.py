"""Bounds of networks on regions: nothing lies outside of them, they are exact where a formula says what is exact."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from redan.certification import interval
from redan.certification.alpha_crown import AlphaCrown
from redan.certification.building import Builder
from redan.certification.crown import Crown
from redan.certification.interval import Box, Interval
from redan.certification.milp import minimise
from redan.certification.network import Convolution, Input, Layer, Linear, Network, Relu, Sigmoid
from redan.certification.reading import read_network
from redan.certification.regions import Region, Specification
from redan.certification.relaxation import Relaxation
from redan.certification.rounding import SoundFloat, check_sound_float, gamma
from redan.certification.zonotope import Element, Zonotope, _Propagation
from redan.errors import UserError
from redan.threats import L1, L2, Linf, LpBall
from tests.certification_cases import (
    BOUNDERS,
    NETWORKS,
    RELU_NETWORKS,
    TYPES,
    dense,
    draws,
    exact_minima,
    exactly,
    images_of,
    outputs_in_order,
    points,
    problem,
    specification_values,
    violations,
)

every_bounder = pytest.mark.parametrize("name", BOUNDERS)


def scaled(network: Network, powers: list[int], apart: bool) -> Network:
    """Weights and biases of each layer, or of each of its rows, times a power of ten, as float32 has them."""
    left = iter(powers)

    def change(layer: Layer) -> Layer:
        if not isinstance(layer, Linear | Convolution):
            return layer
        rows = len(layer.weight)
        scales = torch.tensor([10.0 ** next(left) for _ in range(rows if apart else 1)]).double().expand(rows)
        parts = {key: getattr(layer, key) for key in ("weight", "bias", "bias_size")}
        scaled = {k: (v * scales.view(-1, *(1,) * (v.dim() - 1))).float().double() for k, v in parts.items()}
        return replace(layer, **scaled)

    return Network([change(layer) for layer in network.layers])


@pytest.mark.parametrize("sound", ["exact", "network"])
@every_bounder
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(NETWORKS)),
    seed=st.integers(0, 2**20),
    radius=st.sampled_from([0.001, 0.03, 0.2, 1.0]),
    dtype=st.sampled_from(TYPES),
)
def test_nothing_lies_outside(
    name: str, sound: SoundFloat, kind: str, seed: int, radius: float, dtype: torch.dtype
) -> None:
    network = NETWORKS[kind](seed).to(dtype)
    region, specification = problem(network, Linf(radius), seed)
    bounds = BOUNDERS[name](sound)(network, region, specification)
    x = points(network, region, specification, seed)
    assert violations(bounds, exactly(network, x), specification) == 0
    assert set(bounds.layers) == {i for it in network.layers if isinstance(it, Relu | Sigmoid) for i in it.inputs}
    assert bounds.margins.dtype == torch.float64 and bounds.margins.isfinite().all()
    if sound == "network":
        single = ((x.float().double() >= region.lower) & (x.float().double() <= region.upper)).flatten(2).all(2).all(1)
        for order in range(2):
            assert violations(bounds, outputs_in_order(network, x[single][:20], order), specification) == 0


@pytest.mark.parametrize("sound", ["exact", "network"])
@every_bounder
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(NETWORKS)),
    seed=st.integers(0, 2**20),
    powers=st.lists(st.integers(-8, 8), min_size=20, max_size=20),
    apart=st.booleans(),
    dtype=st.sampled_from(TYPES),
)
def test_weights_of_all_sizes(
    name: str, sound: SoundFloat, kind: str, seed: int, powers: list[int], apart: bool, dtype: torch.dtype
) -> None:
    network = scaled(NETWORKS[kind](seed), powers, apart).to(dtype)
    region, specification = problem(network, Linf(0.1), seed)
    bounds = BOUNDERS[name](sound)(network, region, specification)
    x = points(network, region, specification, seed)
    assert violations(bounds, exactly(network, x), specification) == 0
    if sound == "network":
        found = outputs_in_order(network, x.float().clamp(*region.inner())[:20], seed)
        assert violations(bounds, found, specification) == 0 or not all(it.isfinite().all() for it in found)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", NETWORKS)
@every_bounder
def test_boxes_without_width(name: str, kind: str, dtype: torch.dtype) -> None:
    network = NETWORKS[kind](5).to(dtype)
    for x in (images_of(network, 1, 0), torch.zeros(1, *network.input_shape), torch.ones(1, *network.input_shape)):
        region = Region(x.double(), x.double())
        specification = Specification.robust(torch.tensor([1]), network.classes)
        bounds = BOUNDERS[name]("exact")(network, region, specification)
        found = exactly(network, x[None].double())
        assert violations(bounds, found, specification) == 0
        tolerance = 1e5 * torch.finfo(dtype).eps
        for position, (lower, upper) in bounds.layers.items():
            size = found[position].abs().max()
            assert (upper - lower).max() <= tolerance * (1 + size)
        assert (specification.values(found[-1][0]) - bounds.margins).max() <= tolerance * (1 + found[-1].abs().max())


@pytest.mark.parametrize("value", [0.0, 1.0])
@every_bounder
def test_boxes_at_the_edge_of_the_valid_pixels(name: str, value: float) -> None:
    network = NETWORKS["residual"](2).to(torch.float32)
    region = Region.around(torch.full((1, *network.input_shape), value), Linf(0.1))
    assert region.lower.min() >= 0 and region.upper.max() <= 1
    specification = Specification.robust(torch.tensor([2]), 3)
    bounds = BOUNDERS[name]("exact")(network, region, specification)
    assert violations(bounds, exactly(network, points(network, region, specification, 0)), specification) == 0


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sound", ["exact", "network"])
@every_bounder
def test_ties_are_never_shown(name: str, sound: SoundFloat, dtype: torch.dtype) -> None:
    network = dense(4)
    last = network.layers[-1]
    assert isinstance(last, Linear)
    last.weight[1:], last.bias[1:] = last.weight[:1], 1 + last.bias[:1]
    last.bias_size.copy_(last.bias.abs())
    network = network.to(dtype)
    for radius in (0.0, 0.05):
        region = Region.around(images_of(network, 2, 1), Linf(radius))
        specification = Specification.robust(torch.tensor([1, 2]), 3)
        margins = BOUNDERS[name](sound)(network, region, specification).margins
        tie, larger = margins[[0, 1], [1, 1]], margins[:, 0]
        assert (tie <= 0).all()
        assert not specification.shown(margins).any()
        assert (larger <= 1).all()
        assert (larger > 0.99).all()  # what they share cancels


@every_bounder
def test_dead_layers(name: str) -> None:
    network = dense(0)
    first = network.layers[network.relus[-1] - 1]
    last = network.layers[-1]
    assert isinstance(first, Linear) and isinstance(last, Linear)
    first.bias.fill_(-1000.0)
    first.bias_size.fill_(1000.0)
    region, specification = problem(network, Linf(1.0))
    margins = BOUNDERS[name]("exact")(network, region, specification).margins
    expected = specification.values(last.bias.expand(2, 3))
    torch.testing.assert_close(margins, expected, atol=1e-9, rtol=0)
    assert (margins <= expected).all()


def linear_network(kind: str) -> Network:
    normal = draws(7)
    b = Builder((1, 4, 4))
    x = b.scale(0, 2.0, -1.0)
    if kind == "strided":
        x = b.convolution(x, normal(2, 1, 3, 3), normal(2), (2, 2), (1, 1))
    elif kind == "convolutions":
        x = b.convolution(x, normal(2, 1, 3, 3), normal(2), padding=(1, 1))
        x = b.convolution(x, normal(2, 2, 2, 2), normal(2), (2, 2))
    x = b.reshape(x, (torch.Size(b.shape(x)).numel(),))
    x = b.linear(x, normal(5, b.shape(x)[0]), normal(5))
    return b.network(b.linear(x, normal(3, 5), normal(3)))


LINEAR = [
    "dense",
    "convolutions",
    "strided",
]


def affine_form(network: Network) -> tuple[Tensor, Tensor]:
    """Of a network that is linear: weights ``(classes, *input_shape)`` and bias."""
    size = torch.Size(network.input_shape).numel()
    basis = torch.cat([torch.zeros(1, size), torch.eye(size)]).double().view(-1, *network.input_shape)
    values = network(basis)
    return (values[1:] - values[0]).T.reshape(-1, *network.input_shape), values[0]


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("name", ["interval", "zonotope", "crown-ibp", "crown", "alpha-crown"])
def test_linear_networks_on_boxes_are_exact(name: str, kind: str) -> None:
    network = linear_network(kind)
    region, specification = problem(network, Linf(0.2))
    weights, bias = affine_form(network)
    c = torch.einsum("nmk,kchw->nmchw", specification.weights, weights)
    least = torch.minimum(c * region.lower[:, None], c * region.upper[:, None]).flatten(2).sum(2)
    expected = least + specification.values(bias.expand(2, -1))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-2)):
        if name == "interval" and kind != "dense":
            break  # joins the last linear layers only
        margins = BOUNDERS[name]("exact")(network.to(dtype), region, specification).margins
        torch.testing.assert_close(margins, expected, atol=tolerance, rtol=0)
        assert (margins <= expected + 1e-13).all()


def test_learned_zonotope_of_a_linear_network() -> None:
    network = linear_network("dense")
    region, specification = problem(network, Linf(1.0))
    learned, plain = (Zonotope(iterations=n)(network, region, specification) for n in (2, 0))
    assert torch.equal(learned.margins, plain.margins)


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize(("threat", "dual"), [(L2(0.05), 2.0), (L1(0.05), float("inf"))])
@pytest.mark.parametrize("name", ["crown-ibp", "crown", "alpha-crown"])
def test_linear_networks_on_balls_cost_the_dual_norm(name: str, threat: LpBall, dual: float, kind: str) -> None:
    network = linear_network(kind)
    x = 0.25 + images_of(network, 2, 0) / 2  # the box of valid pixels is far
    region = Region.around(x, threat)
    specification = Specification.robust(torch.tensor([0, 2]), 3)
    weights, _ = affine_form(network)
    c = torch.einsum("nmk,kchw->nmchw", specification.weights, weights).flatten(2)
    expected = specification.values(network(x.double())) - threat.radius * c.norm(p=dual, dim=2)
    margins = BOUNDERS[name]("exact")(network, region, specification).margins
    torch.testing.assert_close(margins, expected, atol=1e-9, rtol=0)
    assert (margins <= expected).all()


def test_neurons_on_balls_cost_the_dual_norm_at_the_edge_of_the_image_too() -> None:
    normal = draws(1)
    b = Builder((1, 4, 4))
    x = b.relu(b.convolution(0, normal(2, 1, 3, 3), None, padding=(1, 1)))
    network = b.network(b.linear(b.reshape(x, (32,)), normal(3, 32), None))
    centre = torch.full((1, 1, 4, 4), 0.5)
    region = Region.around(centre, L2(0.5))
    lower, upper = Crown()(network, region, Specification.robust(torch.tensor([0]), 3)).layers[1]
    layer = network.layers[1]
    assert isinstance(layer, Convolution)
    norms = layer.linear(torch.eye(16).double().view(16, 1, 4, 4)).norm(dim=0)
    is_open = (lower < 0) & (upper > 0)
    assert is_open.sum() > 10
    expected = layer(centre.double()) - 0.5 * norms
    torch.testing.assert_close(lower[is_open], expected[is_open], atol=1e-9, rtol=0)


@pytest.mark.parametrize("threat", [L2(0.3), L1(0.6)])
@every_bounder
@settings(max_examples=6, deadline=None, derandomize=True)
@given(kind=st.sampled_from(sorted(NETWORKS)), seed=st.integers(0, 2**20), dtype=st.sampled_from(TYPES))
def test_nothing_of_a_ball_lies_outside(name: str, threat: LpBall, kind: str, seed: int, dtype: torch.dtype) -> None:
    network = NETWORKS[kind](seed).to(dtype)
    region, specification = problem(network, threat, seed)
    x = points(network, region, specification, seed)
    centre = images_of(network, 2, seed)
    assert all(threat.contains(it, centre.double()).all() for it in x[2:])
    bounds = BOUNDERS[name]("exact")(network, region, specification)
    assert violations(bounds, exactly(network, x[2:]), specification) == 0


def one_relu(slope: float, low: float, high: float, share: float) -> tuple[Network, Region, Specification]:
    """The function ``slope ReLU(y) + share y`` of one number ``y`` in [low, high]."""
    b = Builder((1,))
    y = b.linear(0, torch.ones(1, 1), None)
    logits = b.linear(b.concatenate([b.relu(y), y], 0), torch.tensor([[slope, share]]), None)
    box = Region(torch.tensor([[low]]).double(), torch.tensor([[high]]).double())
    specification = Specification(torch.ones(1, 1, 1).double(), torch.zeros(1, 1).double(), torch.tensor([0]))
    return b.network(logits), box, specification


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    low=st.floats(-4, -0.125, width=16),
    high=st.floats(0.125, 4, width=16),
    slope=st.sampled_from([-2.0, -1.0, 1.0, 3.0]),
    share=st.floats(-2, 2, width=16),
)
def test_one_relu(low: float, high: float, slope: float, share: float) -> None:
    case = one_relu(slope, low, high, share)
    chord = high / (high - low)

    def line(k: float) -> float:
        return min(k * low, k * high)

    if slope < 0:
        triangle = best = line(slope * chord + share) - slope * chord * low
    else:
        triangle = line((slope if high > -low else 0.0) + share)
        best = max(line(share), line(slope + share), line(0.0) if -slope <= share <= 0 else -1e9)
    # Between two parallels, -chord * low apart.
    parallels = line(slope * chord + share) + min(0.0, -slope * chord * low)
    for name, expected in {"crown-ibp": triangle, "crown": triangle, "zonotope": parallels}.items():
        margin = BOUNDERS[name]("exact")(*case).margins.item()
        assert margin <= expected + 1e-13
        assert margin == pytest.approx(expected, abs=1e-10)
    least = AlphaCrown(iterations=30, rate=0.2)(*case).margins.item()
    assert triangle - 1e-10 <= least <= best + 1e-13
    assert least == pytest.approx(best, abs=0.06)
    learned = Zonotope(iterations=10)(*case).margins.item()
    assert learned >= parallels - 1e-10
    exact = min(slope * max(y, 0) + share * y for y in (low, 0.0, high))
    assert max(learned, least) <= exact + 1e-13


def nowhere_below(bounds: Tensor, least: Tensor) -> bool:
    """But for rounding."""
    return bool((bounds >= least - 1e-12 * (1 + least.abs())).all())


@pytest.mark.parametrize("kind", NETWORKS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), radius=st.sampled_from([0.001, 0.03, 0.2, 1.0]))
def test_nesting(kind: str, seed: int, radius: float) -> None:
    """What must be. CROWN's margins may lie below CROWN-IBP's: tighter bounds choose other lower slopes."""
    network = NETWORKS[kind](seed)
    region, specification = problem(network, Linf(radius), seed)
    found = {name: make("exact")(network, region, specification) for name, make in BOUNDERS.items()}
    case = (network, region, specification, found["crown"])
    found["alpha-crown, from crown"] = AlphaCrown(iterations=4)(*case)
    found["of the margins, from crown"] = AlphaCrown(iterations=4, intermediate="crown")(*case)

    def within(inner: str, outer: str) -> None:
        for position, (lower, upper) in found[outer].layers.items():
            low, high = found[inner].layers[position]
            assert nowhere_below(low, lower) and nowhere_below(-high, -upper)

    within("crown-ibp", "interval")
    within("interval", "crown-ibp")
    for inner in ("crown", "alpha-crown", "zonotope"):
        within(inner, "interval")
    for outer in ("crown", "alpha-crown of the margins", "of the margins, from crown"):
        within("alpha-crown, from crown", outer)
        within(outer, "crown")
    within("learned zonotope", "zonotope")
    assert (found["learned zonotope"].margins >= found["zonotope"].margins).all()
    for name in ("alpha-crown of the margins", "of the margins, from crown", "alpha-crown, from crown"):
        assert nowhere_below(found[name].margins, found["crown"].margins)


@pytest.mark.parametrize("seed", range(4))
def test_behind_one_layer_crown_is_crown_ibp(seed: int) -> None:
    network = dense(seed, hidden=(9,))
    region, specification = problem(network, Linf(0.3), seed)
    crown, simple = (Crown(it)(network, region, specification).margins for it in ("crown", "interval"))
    torch.testing.assert_close(crown, simple, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_alpha_crown_is_at_least_crown(seed: int) -> None:
    # Behind one layer both start at the same boxes, and so from the same slopes.
    network = dense(seed, hidden=(9,))
    region, specification = problem(network, Linf(0.3), seed)
    plain, optimised = (it(network, region, specification).margins for it in (Crown(), AlphaCrown(iterations=10)))
    assert (optimised >= plain).all()
    assert (optimised > plain + 1e-3).any()
    network = NETWORKS["residual"](seed)
    region, specification = problem(network, Linf(0.1), seed)
    first, second = (Crown()(network, region, specification), AlphaCrown(4)(network, region, specification))
    position = list(first.layers)[1]
    assert (second.layers[position][0] >= first.layers[position][0]).all()
    assert (second.layers[position][1] <= first.layers[position][1]).all()


@pytest.mark.parametrize("seed", range(3))
def test_alpha_crown_from_the_bounds_of_crown(seed: int) -> None:
    network = NETWORKS["residual"](seed)
    region, specification = problem(network, Linf(0.1), seed)
    crown, optimise = Crown()(network, region, specification), AlphaCrown(4)
    alone, begun = (optimise(network, region, specification, it) for it in (None, crown))
    torch.testing.assert_close(begun.margins, alone.margins)
    of_margins = replace(optimise, intermediate="crown")(network, region, specification, crown)
    for position, (lower, upper) in crown.layers.items():
        is_open = [(it.layers[position][0] < 0) & (it.layers[position][1] > 0) for it in (begun, alone)]
        assert (is_open[0] == is_open[1]).all()  # of a ReLU that is settled, one end is as good as another
        for one, other in zip(begun.layers[position], alone.layers[position], strict=True):
            torch.testing.assert_close(one[is_open[0]], other[is_open[0]])
        assert (of_margins.layers[position][0] == lower).all() and (of_margins.layers[position][1] == upper).all()
    assert (of_margins.margins >= crown.margins - 1e-9).all() and (of_margins.margins > crown.margins + 1e-3).any()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_no_bound_exceeds_the_minimum(seed: int, dtype: torch.dtype) -> None:
    network = dense(seed, hidden=(5, 4), inputs=3)
    region, specification = problem(network, Linf(0.15), seed, images=1)
    exact = torch.tensor([exact_minima(network, region, specification, 0)], dtype=torch.float64)
    sampled = specification_values(specification, network, points(network, region, specification, 0)).amin(0)
    assert (exact <= sampled + 1e-9).all()
    for make in BOUNDERS.values():
        assert (make("exact")(network.to(dtype), region, specification).margins <= exact + 1e-9).all()
    tight, loose = (it(network, region, specification).margins for it in (AlphaCrown(), Interval()))
    assert (exact - tight).sum() < 0.6 * (exact - loose).sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", RELU_NETWORKS)
def test_no_bound_exceeds_the_minimum_of_any_kind(kind: str, seed: int) -> None:
    network = RELU_NETWORKS[kind](seed).to(torch.float32).to(torch.float64)  # the same in both types
    region, specification = problem(network, Linf(0.01), seed, images=1)
    exact = torch.tensor([exact_minima(network, region, specification, 0)], dtype=torch.float64)
    above = exact + 1e-5 * (1 + exact.abs())  # the linear programs' own tolerance
    layers = Crown()(network, region, specification).layers
    solved = minimise(
        *(network, region, specification, layers),
        image=0,
        timeout=60,
        stop_below=None,
        stop_above=None,
        all_rows=True,
    )
    assert (solved.lower <= above[0]).all()
    torch.testing.assert_close(solved.upper, exact[0], atol=1e-5, rtol=1e-5)
    for dtype in TYPES:
        for make in BOUNDERS.values():
            assert (make("exact")(network.to(dtype), region, specification).margins <= above).all()


@every_bounder
def test_images_do_not_meet(name: str) -> None:
    network = NETWORKS["residual"](3)
    region, specification = problem(network, Linf(0.1), images=3)
    together = BOUNDERS[name]("exact")(network, region, specification)
    for i in range(3):
        alone = BOUNDERS[name]("exact")(network, region.part(slice(i, i + 1)), specification.part(slice(i, i + 1)))
        torch.testing.assert_close(alone.margins[0], together.margins[i], atol=1e-9, rtol=0)
        for position, (lower, upper) in alone.layers.items():
            torch.testing.assert_close(lower[0], together.layers[position][0][i], atol=1e-9, rtol=0)
            torch.testing.assert_close(upper[0], together.layers[position][1][i], atol=1e-9, rtol=0)


def test_parts_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS["pooled"](3)
    region, specification = problem(network, Linf(0.1), images=3)
    makers = [BOUNDERS[it] for it in ("crown", "alpha-crown", "zonotope")]
    whole = [make("exact")(network, region, specification) for make in makers]
    for module in ("relaxation", "crown", "interval"):
        monkeypatch.setattr(f"redan.certification.{module}.CACHED", 100)
    monkeypatch.setattr("redan.certification.zonotope.CHUNK", 1)
    for make, expected in zip(makers, whole, strict=True):
        torch.testing.assert_close(
            make("exact")(network, region, specification).margins, expected.margins, atol=1e-9, rtol=0
        )


@pytest.mark.parametrize("iterations", [0, 1])
def test_parts_of_zonotopes_keep_to_their_size(iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few inputs, and many ReLUs that may be on or off."""
    network = dense(0, hidden=(40, 60), inputs=3)
    region, specification = problem(network, Linf(0.3), images=6)
    sizes: list[tuple[int, int]] = []  # of each pass: images, and the numbers of the generators that count

    class Watched(_Propagation):
        def _enclose(self, position: int, element: Element) -> tuple[Tensor, Tensor]:
            numbers = sum(it.numel() for it in element.groups.values())
            before = sizes.pop()[1] if position else 0
            sizes.append((len(element.centre), before + numbers if iterations else max(before, numbers)))
            return super()._enclose(position, element)

    monkeypatch.setattr("redan.certification.zonotope._Propagation", Watched)
    bounder = Zonotope(iterations)
    whole = bounder(network, region, specification)
    images, numbers = max(sizes)
    assert images == 6
    del sizes[:]
    monkeypatch.setattr("redan.certification.zonotope.CHUNK", numbers // 2)
    found = bounder(network, region, specification)
    assert all(it <= numbers // 2 for _, it in sizes) and 1 < max(sizes)[0] < 6
    torch.testing.assert_close(found.margins, whole.margins, atol=1e-5, rtol=0)


# Rounding


@every_bounder
def test_rounding_costs_little(name: str) -> None:
    modes: tuple[SoundFloat, ...] = get_args(SoundFloat)
    assert modes == ("exact", "network", "off")
    for kind in ("dense", "convolutional", "residual"):
        network = NETWORKS[kind](1)
        region, specification = problem(network, Linf(0.02), 1)
        margins = {
            (dtype, mode): BOUNDERS[name](mode)(network.to(dtype), region, specification).margins
            for dtype in TYPES
            for mode in modes
        }
        double = margins[torch.float64, "off"]
        size = network(region.upper).abs().max() + double.abs().max()
        assert (margins[torch.float64, "exact"] <= double).all()
        assert (double - margins[torch.float64, "exact"]).max() < 1e-10 * size
        for dtype, mode in ((torch.float64, "network"), (torch.float32, "exact"), (torch.float32, "network")):
            loss = double - margins[dtype, mode]
            assert (loss > 0).all() if name == "interval" else (loss > -1e-6 * size).all()
            assert loss.max() < 2e-3 * size
        assert (margins[torch.float32, "network"] <= margins[torch.float32, "exact"] + 1e-6 * size).all()


def cancelling(seed: int) -> tuple[Network, Region, Specification]:
    """Whole numbers, of which float64 gives exact logits and float32 does not; the margin is one below zero or so."""
    generator = torch.Generator().manual_seed(seed)
    b = Builder((6,))

    def whole(*shape: int) -> Tensor:
        large = torch.randint(-3, 4, shape, generator=generator) * 2**23
        return (large + torch.randint(-3, 4, shape, generator=generator)).double()

    x = b.linear(0, whole(8, 6), None)
    x = b.relu(b.scale(x, 1.0, 2.0**30))
    x = b.relu(b.linear(x, torch.randint(-3, 4, (8, 8), generator=generator), torch.full((8,), 2.0**36)))
    network = b.network(b.linear(x, torch.randint(-3, 4, (2, 8), generator=generator), None))
    ones = torch.ones(1, 6).double()
    specification = Specification(torch.tensor([[[1.0, -1.0]]]).double(), torch.zeros(1, 1).double(), torch.tensor([0]))
    offset = -specification.values(network(ones)) - 1.0  # the margin is -1
    return network, Region(ones, ones), replace(specification, offsets=offset)


@pytest.mark.parametrize("sound", ["exact", "network"])
@every_bounder
def test_without_slack_float32_proves_what_is_false(name: str, sound: SoundFloat) -> None:
    wrong = 0
    for seed in range(12):
        network, region, specification = cancelling(seed)
        assert specification.values(network(region.lower)).item() == -1.0
        single = network.to(torch.float32)
        found = exactly(single, region.lower[None])
        without = BOUNDERS[name]("off")(single, region, specification)
        wrong += bool(specification.shown(without.margins)) + violations(without, found, specification)
        kept = BOUNDERS[name](sound)(single, region, specification)
        assert violations(kept, found, specification) == 0
        # In float64, where learning slopes ends, what does hold of the rounded weights may be shown.
        assert not specification.shown(kept.margins) or specification.values(found[-1][0]).item() > 0
    assert wrong > 5


def test_relative_error_is_that_of_a_sum() -> None:
    unit = 2.0**-24
    assert gamma(0, torch.float32) == 0
    assert gamma(10, torch.float32) == 10 * unit / (1 - 10 * unit)
    assert gamma(2**24, torch.float32) == float("inf")
    with pytest.raises(UserError, match="no mode of --sound-float 'exactly'; did you mean 'exact'"):
        check_sound_float("exactly")


def test_regions_are_rounded_outwards() -> None:
    x = images_of(dense(0), 50, 0)
    region = Region.around(x, Linf(8 / 255))
    assert (region.lower <= (x.double() - 8 / 255).clamp(0, 1)).all()
    assert (region.upper >= (x.double() + 8 / 255).clamp(0, 1)).all()
    single = region.to(torch.float32)
    assert single.lower.dtype == torch.float32
    assert (single.lower.double() <= region.lower).all() and (single.upper.double() >= region.upper).all()
    assert (single.upper.double() - region.upper).max() < 2e-7


def overflowing(*steps: list[list[float]], low: float = 1.0) -> tuple[Network, Region, Specification]:
    """Linear layers with ReLUs between; the first of two logits gets 1."""
    b = Builder((1,))
    x = 0
    for i, weight in enumerate(steps):
        x = b.linear(b.relu(x) if i else x, torch.tensor(weight).double(), None)
    x = b.linear(b.relu(x), torch.tensor([[-1e-38], [0.0]]).double(), torch.tensor([1.0, 0.0]))
    specification = Specification(torch.tensor([[[1.0, -1.0]]]).double(), torch.zeros(1, 1).double(), torch.tensor([0]))
    region = Region(torch.full((1, 1), low).double(), torch.ones(1, 1).double())
    return b.network(x).to(torch.float32), region, specification


@every_bounder
def test_overflow_tells_nothing(name: str) -> None:
    network, region, specification = overflowing([[1e30]], [[1e30]])
    bounds = BOUNDERS[name]("exact")(network, region, specification)
    assert bounds.margins.item() == -torch.inf or name == "learned zonotope"  # whose last pass is in float64
    assert violations(bounds, exactly(network, region.lower[None]), specification) == 0


@every_bounder
def test_widths_that_overflow(name: str) -> None:
    network, region, specification = overflowing([[2e38]], low=-1.0)  # 1 - ReLU(2 x) is -1 at the end
    bounds = BOUNDERS[name]("exact")(network, region, specification)
    assert violations(bounds, exactly(network, torch.ones(1, 1, 1).double()), specification) == 0


# What a window or a position of a layer must not be taken for


def unusual(kind: str) -> Network:
    """Networks that real ones seldom look like."""
    normal = draws(0)
    b = Builder((1, 7, 7))
    x = b.relu(b.convolution(0, normal(2, 1, 3, 3), normal(2)))  # 2 x 5 x 5
    if kind == "branches of different strides":
        x = b.add(b.convolution(x, normal(2, 2, 1, 1), normal(2), (2, 2)), b.convolution(x, normal(2, 2, 3, 3), None))
    elif kind == "a shift of each pixel":
        x = b.scale(b.convolution(x, normal(2, 2, 3, 3), normal(2)), 1.0, 3 * normal(2, 3, 3))
    elif kind == "two ReLUs of one layer":
        x = b.convolution(x, normal(2, 2, 2, 2), normal(2))
        parts = [b.convolution(b.relu(x), normal(2, 2, 2, 2), normal(2)) for _ in range(2)]
        x = b.add(parts[0], b.slice(b.slice(parts[1], 1, 0, 3), 2, 0, 3))
    elif kind == "two ReLUs, windows of two sizes":
        first = b.convolution(b.relu(b.layers[x].inputs[0]), normal(2, 2, 3, 3), normal(2), padding=(1, 1))
        x = b.add(first, b.convolution(x, normal(2, 2, 1, 1), None))
    elif kind == "a sum of two axes":
        x = b.reshape(b.convolution(x, normal(2, 2, 3, 3), normal(2)), (2, 9))
        x = b.add(x, b.scale(x, normal(9), normal(2, 1)))
    elif kind == "a pixel cut out":
        x = b.slice(b.permute(x, (0, 2, 1)), 1, 4, 5)
    x = b.relu(x)
    x = b.reshape(x, (torch.Size(b.shape(x)).numel(),))
    return b.network(b.linear(x, normal(3, b.shape(x)[0]), normal(3)))


UNUSUAL = [
    "branches of different strides",
    "a shift of each pixel",
    "a sum of two axes",
    "two ReLUs of one layer",
    "two ReLUs, windows of two sizes",
    "a pixel cut out",
]


@pytest.mark.parametrize("kind", UNUSUAL)
@every_bounder
def test_unusual_networks(name: str, kind: str) -> None:
    network = unusual(kind)
    region, specification = problem(network, Linf(0.1))
    bounds = BOUNDERS[name]("exact")(network, region, specification)
    assert violations(bounds, exactly(network, points(network, region, specification, 0)), specification) == 0


def test_radius_of_the_one_wide_box_in_a_batch() -> None:
    # 2048 numbers added up in pairs; all but the first so small that float32 loses each of them in the sum.
    b = Builder((1, 1, 2048))
    x = 0
    while b.shape(x)[2] > 1:
        x = b.convolution(x, torch.ones(1, 1, 1, 2), None, (1, 2))
    x = b.relu(b.reshape(x, (1,)))
    network = b.network(b.linear(x, torch.ones(2, 1), None)).to(torch.float32)
    upper = torch.full((1, 1, 1, 2048), 0.98 * 2.0**-25).double()
    upper[..., 0] = 1.0
    upper = torch.cat([upper, torch.zeros(99, 1, 1, 2048)])
    region = Region(torch.zeros_like(upper), upper)
    bounds = Zonotope()(network, region, Specification.robust(torch.zeros(100, dtype=torch.int64), 2))
    ((_, high),) = bounds.layers.values()
    assert high[0] >= upper[0].sum()


# Whether these tests would see an unsound bound


def steeper(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Relaxation.lines

    def wrong(self: Relaxation, position: int) -> tuple[Tensor, Tensor, Tensor]:
        slope, zero, default = lines(self, position)
        return torch.where(zero < 0, 0.99 * slope, slope), zero, default

    monkeypatch.setattr(Relaxation, "lines", wrong)


def narrower_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    relu = _Propagation._relu

    def wrong(self: _Propagation, position: int, element: Element, bounds: Box) -> Element:
        found = relu(self, position, element, bounds)
        return replace(found, groups={**found.groups, position: 0.99 * found.groups[position]})

    monkeypatch.setattr(_Propagation, "_relu", wrong)


def narrower_box(monkeypatch: pytest.MonkeyPatch) -> None:
    step = interval.step

    def wrong(layer: Layer, boxes: list[Box], sound: SoundFloat) -> Box:
        lower, upper = step(layer, boxes, sound)
        middle, radius = (lower + upper) / 2, (upper - lower) / 2
        return (middle - 0.99 * radius, middle + 0.99 * radius) if isinstance(layer, Linear) else (lower, upper)

    monkeypatch.setattr(interval, "step", wrong)


def lost_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Relaxation, "_affine", lambda self, position, layer, rows: (rows.values.new_zeros(()),) * 2)


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("crown", steeper),
        ("alpha-crown", steeper),
        ("zonotope", narrower_relu),
        ("interval", narrower_box),
        ("crown", lost_bias),
    ],
)
def test_an_unsound_bound_is_seen(name: str, plant: Callable[[pytest.MonkeyPatch], None]) -> None:
    def count() -> int:
        total = 0
        for seed in range(6):
            network = dense(seed, hidden=(4, 4), inputs=2)
            region, specification = problem(network, Linf(0.4), seed)
            bounds = BOUNDERS[name]("exact")(network, region, specification)
            total += violations(bounds, exactly(network, points(network, region, specification, seed)), specification)
        return total

    assert count() == 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        plant(monkeypatch)
        assert count() > 0


def test_the_checker_sees_one_number() -> None:
    network = dense(0)
    region, specification = problem(network, Linf(0.1))
    bounds = Interval()(network, region, specification)
    x = points(network, region, specification, 0)
    found = exactly(network, x)
    position = next(iter(bounds.layers))
    lower, upper = bounds.layers[position]
    for change in (found[position][:, 1, 2].max() + 1e-6, torch.tensor(torch.nan)):
        low = lower.clone()
        low[1, 2] = change
        assert violations(replace(bounds, layers={position: (low, upper)}), found, specification) == len(x)
    for value in (torch.nan, torch.inf):
        margins = bounds.margins.clone()
        margins[0, 1] = value
        assert violations(replace(bounds, margins=margins), found, specification) == len(x)


@pytest.mark.parametrize(
    "bounder", [Interval(), Crown(), AlphaCrown(iterations=2), Zonotope()], ids=lambda it: type(it).__name__
)
def test_reduced_precision_that_the_caller_allows_elsewhere_is_not_used(
    bounder: Interval | Crown | AlphaCrown | Zonotope,
) -> None:
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws))
    network = read_network(model, (1, 16, 16))
    images = torch.rand(64, 1, 16, 16, generator=draws)
    region, specification = Region.around(images, Linf(0)), Specification.robust(torch.zeros(64, dtype=torch.int64), 3)
    expected = bounder(network.to(torch.float32), region, specification)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = bounder(network.to(torch.float32), region, specification)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.margins, expected.margins)


@pytest.mark.parametrize(("neurons", "every"), [(1024, 256), (384, 384), (256, 256)])
def test_sums_over_outputs_are_rounded_too(neurons: int, every: int) -> None:
    """Backwards a coefficient is a sum over the layer's outputs: here one of many numbers just too small to count."""
    weight = torch.full((neurons, 8), 0.0, dtype=torch.float64)
    weight[:, 0] = 0.99 * 2**-24
    weight[::every, 0] = 1
    total = float(weight.float().double()[:, 0].sum())
    lower, upper = torch.zeros(1, 8, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.float64)
    lower[0, 0], upper[0, 0] = 0.5 + 2**-12, 0.5 + 2**-11  # every ReLU of x - 1/2 is on
    worst = total * (float(upper[0, 0]) - 0.5)
    lost = (total - float((torch.ones(9, neurons) @ weight.float())[0, 0])) * 0.5
    assert lost > 0
    last, bias = torch.ones(10, neurons, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    last[0], bias[0] = 0, worst - 0.1 * lost
    bias = bias.float().double()
    first = weight.float().double()
    network = Network(
        [
            Input("input", (), (8,)),
            Linear("first", (0,), (neurons,), first, -first[:, 0] / 2, first[:, 0] / 2),
            Relu("relu", (1,), (neurons,)),
            Linear("last", (2,), (10,), last, bias, bias.abs()),
        ]
    ).to(torch.float32)
    region, specification = Region(lower, upper), Specification.robust(torch.tensor([0]), 10)
    exact = float(bias[0]) - worst
    assert float(Crown(sound="off")(network, region, specification).margins.min()) > exact
    for sound in ("exact", "network"):
        assert float(Crown(sound=sound)(network, region, specification).margins.min()) <= exact
