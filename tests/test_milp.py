"""Mixed-integer programs of margins: against all activation patterns of tiny networks, one linear program each."""

import importlib.machinery
import itertools
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds as ScipyBounds
from scipy.optimize import LinearConstraint, linprog, milp
from scipy.sparse import csr_array
from torch import Tensor

from redan.certification.alpha_crown import AlphaCrown
from redan.certification.building import Builder
from redan.certification.milp import Binaries, Encoding, affine_matrices, lp_refine, margin_program, minimise
from redan.certification.network import Affine, Network, NetworkModule, Relu
from redan.certification.regions import Region, Specification
from redan.certification.rounding import SoundFloat
from redan.certification.solvers import DUAL_TOLERANCE, Program, Solver, safe_bound, solve
from redan.certification.verifier import Robustness, Verifier
from redan.errors import UserError
from redan.threats import L2, Linf

LayerBounds = dict[int, tuple[Tensor, Tensor]]
SOLVERS: tuple[Solver, ...] = ("scip", "highs")


def draws(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def dense(seed: int = 0) -> Network:
    """3 pixels, two hidden layers of 5 and 4, 3 classes."""
    normal = draws(seed)
    b = Builder((3, 1, 1))
    x = b.reshape(b.scale(0, 2.0, -0.5), (3,))
    for size in (5, 4):
        x = b.relu(b.linear(x, normal(size, b.shape(x)[0]), 0.3 * normal(size)))
    return b.network(b.linear(x, normal(3, 4), normal(3)))


def convolutional(seed: int = 0) -> Network:
    """2 x 4 x 3 images, a grouped convolution with stride, dilation and padding, one without."""
    normal = draws(seed)
    b = Builder((2, 4, 3))
    x = b.scale(0, 2.0, -1.0)
    x = b.relu(b.convolution(x, normal(2, 1, 2, 2), 0.3 * normal(2), (2, 1), (1, 0), (1, 2), groups=2))
    x = b.convolution(x, normal(2, 2, 2, 1), 0.3 * normal(2))
    x = b.relu(b.reshape(b.permute(x, (1, 2, 0)), (b.shape(x)[0] * b.shape(x)[1] * b.shape(x)[2],)))
    return b.network(b.linear(x, normal(2, b.shape(x)[0]), normal(2)))


def residual(seed: int = 0) -> Network:
    """A block ``x + W relu(x)`` on 4 numbers, after a ReLU, before another; pieces cut and joined on the way."""
    normal = draws(seed)
    b = Builder((3, 1, 1))
    x = b.linear(b.reshape(0, (3,)), normal(4, 3), normal(4))
    r = b.relu(x)
    y = b.add(x, b.linear(r, normal(4, 4), normal(4)), r)
    y = b.concatenate([b.slice(y, 0, 0, 4, 2), b.slice(y, 0, 1, 4)], 0)
    return b.network(b.linear(b.relu(y), normal(3, 5), normal(3)))


NETWORKS = {"dense": dense, "convolutional": convolutional, "residual": residual}


def problem(name: str, seed: int = 0, images: int = 2, radius: float = 0.25) -> tuple[Network, Region, Specification]:
    network = NETWORKS[name](seed)
    x = torch.rand(images, *network.input_shape, generator=torch.Generator().manual_seed(seed))
    labels = network(x.double()).argmax(1)
    return network, Region.around(x, Linf(radius)), Specification.robust(labels, network.classes)


def intervals(network: Network, region: Region) -> list[tuple[Tensor, Tensor]]:
    """Interval bounds of all layers: centre and radius through each."""
    boxes = [(region.lower, region.upper)]
    for layer in network.layers[1:]:
        ends = [boxes[i] for i in layer.inputs]
        if isinstance(layer, Affine):
            centre = layer(*((lower + upper) / 2 for lower, upper in ends))
            radius = layer.absolute(*((upper - lower) / 2 for lower, upper in ends)) + 1e-12
            boxes.append((centre - radius, centre + radius))
        else:
            boxes.append((layer(ends[0][0]), layer(ends[0][1])))
    return boxes


def bounds_of(network: Network, region: Region) -> LayerBounds:
    boxes = intervals(network, region)
    return {i: boxes[i] for relu in network.relus for i in network.layers[relu].inputs}


def by_patterns(network: Network, region: Region, specification: Specification, image: int, row: int) -> float:
    """The least margin: of each pattern of ReLUs that are on, the network is one linear function on a polytope."""
    lower, upper = region.lower[image].flatten(), region.upper[image].flatten()
    bounds = bounds_of(network, region)
    choices = []
    for relu in network.relus:
        low, high = (it[image].flatten() for it in bounds[network.layers[relu].inputs[0]])
        choices += [(False, True) if a < 0 < b else (bool(a >= 0),) for a, b in zip(low, high, strict=True)]
    # The identity and zero: every layer as a matrix and a shift.
    basis = torch.cat([torch.zeros(1, len(lower)), torch.eye(len(lower))]).double()
    best = np.inf
    for pattern in itertools.product(*choices):
        on = iter(pattern)
        found: list[Tensor] = [basis.view(-1, *network.input_shape)]
        signs: list[tuple[Tensor, Tensor, Tensor]] = []
        for layer in network.layers[1:]:
            inputs = [found[i] for i in layer.inputs]
            if isinstance(layer, Relu):
                mask = torch.tensor([next(on) for _ in range(inputs[0][0].numel())]).view(layer.shape)
                flat = inputs[0].flatten(1)
                signs.append((mask.flatten(), flat[1:] - flat[0], flat[0]))
                found.append(inputs[0] * mask)
            else:
                found.append(layer(*inputs))
        a = torch.cat([torch.where(mask, -slope, slope).T for mask, slope, _ in signs])
        c = torch.cat([torch.where(mask, shift, -shift) for mask, _, shift in signs])
        margins = found[-1] @ specification.weights[image, row] + specification.offsets[image, row]
        slopes = (margins[1:] - margins[0]).numpy()
        answer = linprog(slopes, a.numpy(), c.numpy(), bounds=list(zip(lower.tolist(), upper.tolist(), strict=True)))
        if answer.fun is not None:
            best = min(best, answer.fun + float(margins[0]))
    return best


@pytest.mark.parametrize("name", NETWORKS)
def test_matrices_do_what_layers_do(name: str) -> None:
    network = NETWORKS[name](0)
    x = draws(1)(1, *network.input_shape)
    outputs = network.outputs(x)
    for position, layer in enumerate(network.layers):
        if isinstance(layer, Affine):
            matrices, bias = affine_matrices(network, position)
            inputs = [outputs[i].flatten().numpy() for i in layer.inputs]
            by_matrix = sum((m @ v for m, v in zip(matrices, inputs, strict=True)), bias)
            np.testing.assert_allclose(by_matrix, outputs[position].flatten(), atol=1e-12)


def test_matrix_of_padding() -> None:
    b = Builder((2, 2, 3))
    x = b.pad(0, (1, 0, 2, 1))
    b.network(b.linear(b.reshape(x, (40,)), torch.ones(2, 40), None))
    network = Network(b.layers)
    (matrix,), _ = affine_matrices(network, x)
    image = torch.arange(12.0, dtype=torch.float64).view(1, 2, 2, 3)
    np.testing.assert_array_equal(matrix @ image.flatten().numpy(), network.layers[x](image).flatten())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_minimum_is_that_of_all_patterns(name: str, solver: Solver) -> None:
    network, region, specification = problem(name, seed=1)
    layers = bounds_of(network, region)
    for image in range(len(region)):
        found = minimise(
            network,
            region,
            specification,
            layers,
            image=image,
            solver=solver,
            timeout=60,
            stop_below=None,
            stop_above=None,
            all_rows=True,
        )
        exact = [by_patterns(network, region, specification, image, row) for row in found.rows]
        assert found.rows == tuple(range(network.classes - 1))
        np.testing.assert_allclose(found.upper, exact, atol=1e-6)
        assert (found.lower.numpy() <= np.array(exact) + 1e-9).all()
        np.testing.assert_allclose(found.lower, exact, atol=1e-4)
        for row, candidate in enumerate(found.candidates):
            assert candidate is not None
            assert ((candidate >= region.lower[image]) & (candidate <= region.upper[image])).all()
            reached = specification.part(slice(image, image + 1)).values(network(candidate[None]))[0, row]
            assert abs(reached - exact[row]) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_relaxations_lie_between_intervals_and_the_minimum(name: str) -> None:
    network, region, specification = problem(name, seed=3)
    layers = bounds_of(network, region)
    lower, upper = intervals(network, region)[-1]
    row, image = 0, 1
    weights = specification.weights[image, row]
    interval = float(torch.where(weights > 0, weights * lower[image], weights * upper[image]).sum())

    def least(binaries: Binaries) -> tuple[float, int]:
        program = margin_program(network, region, specification, layers, image=image, row=row, binaries=binaries)
        return solve(program, solver="highs", timeout=60).bound, int(program.integral.sum())

    (triangle, none), (some, few), (exact, all_) = map(least, (Binaries(0), Binaries(per_layer=1), Binaries()))
    assert (none, few) == (0, 2)
    assert all_ == sum(int(((low < 0) & (high > 0))[image].sum()) for low, high in layers.values())
    assert interval < triangle < exact - 1e-3
    assert triangle - 1e-4 <= some <= exact + 1e-4
    assert exact <= by_patterns(network, region, specification, image, row) + 1e-9


def test_relaxation_is_the_triangle() -> None:
    b = Builder((1, 1, 1))
    x = b.scale(b.reshape(0, (1,)), 2.0, -1.0)
    network = b.network(b.add(b.relu(x), b.relu(b.scale(x, -1.0))))  # |2 p - 1|
    region = Region(torch.full((1, 1, 1, 1), 0.25).double(), torch.ones(1, 1, 1, 1).double())
    layers = bounds_of(network, region)
    encoding = Encoding(network, region, layers, 0)
    # Of z in [-1/2, 1]: above, (2 z + 1) / 3 + (1 - z) / 3 = (z + 2) / 3; below, 0.
    for weight, least in ((1.0, 0.0), (-1.0, -1.0)):
        program, _ = encoding.program(np.array([weight]), 0.0, Binaries(0))
        assert solve(program, solver="highs", timeout=10).bound == pytest.approx(least, abs=1e-9)
    half = Region(region.lower, torch.full_like(region.upper, 0.5))
    program, _ = Encoding(network, half, layers, 0).program(np.array([-1.0]), 0.0, Binaries(0))
    assert solve(program, solver="highs", timeout=10).bound == pytest.approx(-2 / 3, abs=1e-9)  # at z = 0


def test_binaries_are_those_of_the_highest_priority() -> None:
    network, region, specification = problem("dense", radius=0.4)
    layers = bounds_of(network, region)
    first, second = layers
    priorities = {i: torch.arange(layers[i][0].numel()).view_as(layers[i][0]) for i in layers}
    priorities[first] = priorities[first] + 100

    crossing = [high[0][(low[0] < 0) & (high[0] > 0)].tolist() for low, high in (layers[first], layers[second])]
    assert min(map(len, crossing)) >= 3

    def exact(priorities: dict[int, Tensor] = priorities, **options: int) -> list[float]:
        """Upper bounds of the exact neurons, which tell who they are: each has the row y - u a <= 0."""
        binaries = Binaries(priorities=priorities, **options)
        program = margin_program(network, region, specification, layers, image=0, row=0, binaries=binaries)
        assert program.priorities is not None
        ranks.append(program.priorities[program.integral].tolist())
        return (-program.matrix[:, np.flatnonzero(program.integral)].toarray().min(0)).tolist()

    ranks: list[list[int]] = []
    assert exact(per_layer=1) == [crossing[0][-1], crossing[1][-1]]
    assert exact(per_layer=2) == crossing[0][-2:] + crossing[1][-2:]
    assert exact() == crossing[0] + crossing[1]
    # The first layer's come before the second's, the last of each first.
    assert ranks[:2] == [[1, 0], [2, 3, 0, 1]]
    assert sorted(ranks[2]) == list(range(len(crossing[0] + crossing[1])))
    assert exact(in_all=2) == crossing[0][-2:]
    assert exact(in_all=len(crossing[0]) + 1) == [*crossing[0], crossing[1][-1]]
    assert exact(last_layers=1, in_all=2) == crossing[1][-2:]
    assert exact(per_layer=1, in_all=99) == exact(per_layer=1)
    # Side by side the layers' ReLUs count by rank alone: the last of each come first.
    level = {i: -high for i, (_, high) in layers.items()}
    assert sorted(exact(level, in_all=3)) == sorted(crossing[0] + crossing[1])[:3]


@pytest.mark.parametrize("solver", SOLVERS)
def test_stops_once_the_sign_is_known(solver: Solver) -> None:
    network, region, specification = problem("dense", seed=3)
    layers = bounds_of(network, region)
    program = margin_program(network, region, specification, layers, image=0, row=0, binaries=Binaries())
    least = by_patterns(network, region, specification, 0, 0)
    shown = solve(program, solver=solver, timeout=60, stop_above=least - 1)
    assert shown.status == "above"
    assert least - 1 < shown.bound < least
    broken = solve(program, solver=solver, timeout=60, stop_below=least + 1, stop_above=least + 1)
    assert broken.status == "below"
    assert broken.value is not None and least - 1e-6 <= broken.value < least + 1
    assert broken.bound <= least + 1e-9
    for gap in (-1e-2, 1e-2):
        close = solve(program, solver=solver, timeout=60, stop_below=least + gap, stop_above=least + gap)
        assert close.status == ("above" if gap < 0 else "below")
        assert close.bound <= least + 1e-9
    neither = solve(program, solver=solver, timeout=60, stop_below=least - 1, stop_above=least + 1)
    assert neither.status == "optimal"
    assert neither.value == pytest.approx(least, abs=1e-6)


def test_rows_after_the_first_that_fails_are_left_out() -> None:
    network, region, specification = problem("dense", radius=0.5)
    layers = bounds_of(network, region)
    x = region.lower[0] + torch.rand(1000, 3, 1, 1, generator=torch.Generator().manual_seed(0)).double() * (
        region.upper[0] - region.lower[0]
    )
    sampled = (network(x) @ specification.weights[0].T).amin(0)
    fails = int(sampled.argmin())
    assert sampled[fails] < 0
    order = [fails, 1 - fails]
    found = minimise(network, region, specification, layers, image=0, rows=order, timeout=60)
    assert found.rows == (fails,)
    assert found.candidates[0] is not None
    assert specification.part(slice(0, 1)).values(network(found.candidates[0][None]))[0, fails] < 0
    both = minimise(network, region, specification, layers, image=0, rows=order, timeout=60, all_rows=True)
    assert both.rows == tuple(order)
    network, region, specification = problem("dense", radius=1e-3)
    proved = minimise(network, region, specification, bounds_of(network, region), image=0, timeout=60)
    assert proved.rows == (0, 1)
    assert (proved.lower > 0).all()


@pytest.mark.parametrize("radius", [0.25, 1e-5])  # with ReLUs that may be on or off, and without
def test_rounding_of_the_network_is_left_room(radius: float) -> None:
    network, region, specification = problem("dense", seed=3, radius=radius)
    layers = bounds_of(network, region)
    bounds, middles, widths = [], [], []
    modes: tuple[SoundFloat, ...] = ("off", "exact", "network")
    for sound in modes:
        encoding = Encoding(network, region, layers, 0, sound=sound)
        program, _ = encoding.program(specification.weights[0, 0].numpy(), 0.0, Binaries(0))
        bounds.append(solve(program, solver="highs", timeout=60).bound)
        rows = np.isfinite(program.row_lower)  # those of y - n
        middles.append((program.row_lower + program.row_upper)[rows] / 2)
        widths.append((program.row_upper - program.row_lower)[rows])
    assert 0 <= bounds[0] - bounds[1] < 1e-10
    assert 1e-7 < bounds[1] - bounds[2] < 1e-3
    np.testing.assert_allclose(middles[1:], [middles[0]] * 2, atol=1e-12)
    assert (widths[0] == 0).all() and (widths[1] < 1e-12).all()
    assert ((widths[2] > 1e-7) & (widths[2] < 1e-3)).all()


def linear(cost: list[float], rows: list[tuple[list[float], float, float]], integral: bool = False) -> Program:
    """A program on [0, 1] a column."""
    n = len(cost)
    matrix = csr_array(np.array([row for row, _, _ in rows]))
    low, high = (np.array([it[i] for it in rows]) for i in (1, 2))
    return Program(np.array(cost), 2.5, matrix, low, high, np.zeros(n), np.ones(n), np.full(n, integral))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("integral", [False, True])
def test_infeasible(solver: Solver, integral: bool) -> None:
    found = solve(linear([1.0, 1.0], [([1.0, 1.0], 3.0, 4.0)], integral), solver=solver, timeout=10)
    assert (found.bound, found.value, found.x, found.status) == (np.inf, None, None, "infeasible")


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_depends_on_nothing_is_known(solver: Solver) -> None:
    found = solve(linear([], [([], -1.0, 0.0)]), solver=solver, timeout=10, stop_above=2.0)
    assert (found.bound, found.value, found.status) == (2.0 + 1e-9, 2.5, "above")
    assert solve(linear([], [([], 1.0, 2.0)]), solver=solver, timeout=10).status == "infeasible"


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_of_all_kinds(solver: Solver) -> None:
    rows = [([1.0, 1.0, 0.0], 0.5, 1.5), ([1.0, 0.0, 2.0], 1.0, 1.0), ([0.0, 1.0, 1.0], -np.inf, 1.25)]
    found = solve(linear([-1.0, -1.0, -1.0], rows), solver=solver, timeout=10)
    assert found.value == pytest.approx(2.5 - 1.75)  # at (0.5, 1, 0.25)
    assert found.bound == pytest.approx(2.5 - 1.75, abs=1e-5)
    whole = solve(linear([-1.0, -1.0, -1.0], rows[:1] + rows[2:], integral=True), solver=solver, timeout=10)
    assert whole.status == "optimal"
    assert whole.value == pytest.approx(2.5 - 2)
    assert whole.value is not None and 2.5 - 2 - 1e-5 < whole.bound <= 2.5 - 2 + 1e-9
    assert whole.bound < whole.value - 2 * DUAL_TOLERANCE  # the tolerance is taken off


def test_any_duals_give_a_bound() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((6, 8))
    x = rng.random(8)
    side = matrix @ x
    free = np.where(np.arange(6) % 3 == 0, np.inf, side + 0.1)
    program = Program(
        rng.standard_normal(8),
        0.0,
        csr_array(matrix),
        side - 0.1,
        free,
        np.zeros(8),
        np.ones(8),
        np.zeros(8, dtype=bool),
    )
    least = solve(program, solver="highs", timeout=10)
    assert least.value == pytest.approx(least.bound, abs=1e-9)
    assert least.value is not None and least.bound <= least.value
    for _ in range(50):
        assert safe_bound(program, rng.standard_normal(6)) <= least.bound + 1e-9


def knapsack() -> Program:
    """Of many rows, which takes minutes."""
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 50, (40, 200)).astype(float)
    worth = rng.integers(5, 50, 200).astype(float)
    free = np.full(40, -np.inf)
    whole = np.ones(200, dtype=bool)
    return Program(-worth, 0.0, csr_array(weights), free, weights.sum(1) / 3, np.zeros(200), np.ones(200), whole)


@pytest.mark.parametrize("solver", SOLVERS)
def test_time_limit(solver: Solver) -> None:
    start = time.monotonic()
    found = solve(knapsack(), solver=solver, timeout=1.0)
    assert time.monotonic() - start < 4
    assert found.status == "timeout"
    assert found.value is not None and -np.inf < found.bound < found.value


@pytest.mark.parametrize("solver", SOLVERS)
def test_interrupt(solver: Solver) -> None:
    start = time.monotonic()
    # A shell's background jobs ignore the signal, and Python with them.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            solve(knapsack(), solver=solver, timeout=30)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("solver", SOLVERS)
def test_stops_at_once(solver: Solver) -> None:
    program = knapsack()
    relaxed = solve(replace(program, integral=np.zeros(200, dtype=bool)), solver="highs", timeout=10)
    start = time.monotonic()
    below = solve(program, solver=solver, timeout=20, stop_below=relaxed.bound / 2)
    above = solve(program, solver=solver, timeout=20, stop_above=relaxed.bound - 1)
    assert (below.status, above.status) == ("below", "above")
    assert above.bound <= relaxed.bound
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("name", ["dense", "residual"])
def test_refined_bounds_are_tighter_and_hold(name: str) -> None:
    network, region, _ = problem(name, seed=3)
    layers = bounds_of(network, region)
    position = list(layers)[1]
    for image in range(len(region)):
        old_lower, old_upper = (it[image] for it in layers[position])
        lower, upper = lp_refine(network, region, layers, position, image=image)
        crossing = (old_lower < 0) & (old_upper > 0)
        assert ((lower >= old_lower) & (upper <= old_upper)).all()
        assert torch.equal(lower[~crossing], old_lower[~crossing])
        assert (upper - lower)[crossing].sum() < 0.99 * (old_upper - old_lower)[crossing].sum()
        share = torch.rand(20000, *network.input_shape, generator=torch.Generator().manual_seed(image)).double()
        share[:10000] = share[:10000].round()  # corners
        x = region.lower[image] + share * (region.upper[image] - region.lower[image])
        outputs = network.outputs(x)[position]
        assert ((outputs >= lower) & (outputs <= upper)).all()


def test_refined_bounds_are_rounded_outwards() -> None:
    network, region, _ = problem("dense", seed=3)
    layers = bounds_of(network, region)
    position = list(layers)[1]
    wide = {i: (lower.float() - 1e-5, upper.float() + 1e-5) for i, (lower, upper) in layers.items()}
    same = {i: (lower.double(), upper.double()) for i, (lower, upper) in wide.items()}
    lower, upper = lp_refine(network, region, wide, position, image=0)
    exact_lower, exact_upper = lp_refine(network, region, same, position, image=0)
    assert lower.dtype == upper.dtype == torch.float32
    assert ((lower.double() <= exact_lower) & (upper.double() >= exact_upper)).all()
    torch.testing.assert_close(lower.double(), exact_lower, atol=1e-6, rtol=1e-6)


def test_first_convolution_is_exact_already() -> None:
    network, region, _ = problem("convolutional")
    layers = bounds_of(network, region)
    position = next(iter(layers))
    lower, upper = lp_refine(network, region, layers, position, image=0)
    torch.testing.assert_close(lower, layers[position][0][0], atol=1e-9, rtol=0)
    torch.testing.assert_close(upper, layers[position][1][0], atol=1e-9, rtol=0)


def test_only_boxes_are_decided() -> None:
    network, region, specification = problem("dense")
    ball = Region.around((region.lower + region.upper) / 2, L2(0.1))
    with pytest.raises(UserError, match="Linf threats, not L2"):
        minimise(network, ball, specification, bounds_of(network, ball), image=0, timeout=1)


def test_a_solver_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    program = linear([1.0], [([1.0], 0.5, 1.0)], integral=True)
    monkeypatch.setattr("redan.certification.solvers.find_spec", lambda name: None)
    with pytest.raises(UserError, match="'gurobi' is not installed; 'pip install gurobipy' brings it"):
        solve(program, solver="gurobi", timeout=1)
    with pytest.raises(UserError, match="no solver is installed"):
        solve(program, timeout=1)
    with pytest.raises(UserError, match="no solver 'cplex'"):
        solve(program, solver="cplex", timeout=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite bounds"):
        Program(
            *(np.zeros(1), 0.0, csr_array((0, 1)), np.zeros(0), np.zeros(0)),
            np.zeros(1),
            np.full(1, np.inf),
            np.zeros(1, dtype=bool),
        )


def gurobi_made_of_scipy(asked: dict[str, float]) -> types.ModuleType:
    """A stand-in with the part of gurobipy's interface that redan asks for; parameters go into ``asked``."""

    class Constants:
        INTEGER, CONTINUOUS, OPTIMAL, INFEASIBLE, INTERRUPTED = "I", "C", 2, 3, 11

    class Variables:
        def __init__(self, count: int) -> None:
            self.BranchPriority: Any = None
            self.X = np.zeros(count)

    class Env:
        def __init__(self, params: dict[str, int]) -> None:
            assert params == {"OutputFlag": 0}

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    class Model(Env):
        def __init__(self, env: Env) -> None:
            self.rows: list[Any] = []

        def setParam(self, key: str, value: float) -> None:
            asked[key] = value

        def addMVar(self, count: int, lb: Any, ub: Any, obj: Any, vtype: Any) -> Variables:
            self.cost, self.bounds, self.kinds = obj, ScipyBounds(lb, ub), np.asarray(vtype) == "I"
            self.x = Variables(count)
            return self.x

        def addMConstr(self, matrix: Any, x: Variables, sense: str, side: Any) -> None:
            if len(side):
                self.rows.append(LinearConstraint(matrix, *((side, np.inf) if sense == ">" else (-np.inf, side))))

        def optimize(self) -> None:
            found: Any = milp(self.cost, integrality=self.kinds, bounds=self.bounds, constraints=self.rows)
            self.Status = {0: Constants.OPTIMAL, 2: Constants.INFEASIBLE}[found.status]
            self.SolCount = int(found.x is not None)
            if self.SolCount:
                self.x.X, self.ObjBound = found.x, found.fun

    module = types.ModuleType("gurobipy")
    module.__spec__ = importlib.machinery.ModuleSpec("gurobipy", None)
    vars(module).update(GRB=Constants, Env=Env, Model=Model)
    return module


def test_gurobi_through_the_same_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, float] = {}
    monkeypatch.setitem(sys.modules, "gurobipy", gurobi_made_of_scipy(asked))
    network, region, specification = problem("dense", seed=3)
    layers = bounds_of(network, region)
    options: dict[str, Any] = {"image": 0, "timeout": 7.0, "all_rows": True, "threads": 3}
    options |= {"stop_below": None, "stop_above": None}
    mine = minimise(network, region, specification, layers, solver="gurobi", **options)
    reference = minimise(network, region, specification, layers, solver="highs", **options)
    torch.testing.assert_close(mine.lower, reference.lower, atol=1e-5, rtol=0)
    assert asked["TimeLimit"] == 7.0 and asked["Threads"] == 3
    infeasible = solve(linear([1.0, 1.0], [([1.0, 1.0], 3.0, 4.0)], integral=True), solver="gurobi", timeout=1)
    assert infeasible.status == "infeasible" and infeasible.x is None


@pytest.mark.parametrize("method", ["milp", "colt"])
def test_the_verifier_asks_the_solver_it_is_told(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, float] = {}
    monkeypatch.setitem(sys.modules, "gurobipy", gurobi_made_of_scipy(asked))
    network = dense(3)
    images = torch.rand(1, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    model = NetworkModule(network)
    labels = model(images).argmax(1)
    radius = next(r for r in (0.02 * k for k in range(1, 50)) if not proved_by_crown(network, images, labels, r))
    question = Robustness(model, images, labels, torch.arange(1), Linf(radius), classes=3, seed=0)
    found = Verifier(method, solver="gurobi")(network, question)
    assert asked, found
    with pytest.raises(UserError, match="no solver 'cplex'"):
        Verifier(method, solver="cplex")  # type: ignore[arg-type]


def proved_by_crown(network: Network, images: Tensor, labels: Tensor, radius: float) -> bool:
    region, specification = Region.around(images, Linf(radius)), Specification.robust(labels, 3)
    return bool(specification.shown(AlphaCrown()(network, region, specification).margins))
