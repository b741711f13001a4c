"""Thousands of random small networks: no point lies outside of any bound, and none refutes a search or a verdict.

2700 networks, 15000 bounds: seven minutes on one core.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from redan.certification.branch_and_bound import BranchAndBound
from redan.certification.crown import Crown
from redan.certification.milp import minimise
from redan.certification.network import Network
from redan.certification.reduced import reduce
from redan.certification.regions import Region, Specification
from redan.certification.rounding import SoundFloat
from redan.certification.solvers import Solver
from redan.certification.verifier import METHODS, OF_RELUS, Verifier
from redan.threats import L1, L2, Linf, LpBall
from tests.certification_cases import (
    BOUNDERS,
    NETWORKS,
    RELU_NETWORKS,
    TYPES,
    Asked,
    exactly,
    images_of,
    outputs_in_order,
    points,
    problem,
    specification_values,
    violations,
)

pytestmark = pytest.mark.slow

SEEDS = st.integers(0, 2**20)
MODES = st.sampled_from(["exact", "network"])
RADII = st.integers(-40, 0).map(lambda it: 10.0 ** (it / 10))  # 0.0001 to 1, each power of ten as often
BOXES = RADII.map(Linf)
# Of balls that are as large as the boxes, norm by norm: pixels move as far, all or one.
THREATS = st.one_of(BOXES, BOXES, RADII.map(L2), RADII.map(lambda it: L1(2 * it)))


@pytest.mark.parametrize("kind", NETWORKS)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(seed=SEEDS, threat=THREATS, sound=MODES, dtype=st.sampled_from(TYPES))
def test_nothing_lies_outside(kind: str, seed: int, threat: LpBall, sound: SoundFloat, dtype: torch.dtype) -> None:
    network = NETWORKS[kind](seed).to(dtype)
    region, specification = problem(network, threat, seed)
    x = points(network, region, specification, seed)
    found = [exactly(network, x)]
    if sound == "network":
        single = x.float().clamp(*region.inner())
        centre = images_of(network, len(region), seed)
        single = single[torch.stack([threat.contains(it, centre) for it in single]).all(1)][:20]
        found += [outputs_in_order(network, single, order) for order in range(2)] if len(single) else []
    for name, make in BOUNDERS.items():
        bounds = make(sound)(network, region, specification)
        assert [violations(bounds, it, specification) for it in found] == [0] * len(found), name


# Searches, on problems as hard as can be: the least value that is found of each function, or of the larger, is the gap.

GAPS = st.sampled_from([-1e-6, -1e-3, 1e-6, 1e-3, 0.1])


def level(
    network: Network, region: Region, specification: Specification, seed: int, gap: float
) -> tuple[Specification, Tensor]:
    """The specification moved to the gap, and what its functions are at points ``(k, n, m)``."""
    found = specification_values(specification, network.to(torch.float64), points(network, region, specification, seed))
    shift = -found.amin(0)
    if not specification.groups.any():
        shift = shift - (found + shift).amax(2).amin(0)[:, None]
    return replace(specification, offsets=specification.offsets + shift + gap), found + shift + gap


@pytest.mark.parametrize("kind", RELU_NETWORKS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=SEEDS, threat=BOXES, sound=MODES, gap=GAPS, together=st.booleans())
def test_branch_and_bound(kind: str, seed: int, threat: LpBall, sound: SoundFloat, gap: float, together: bool) -> None:
    network = RELU_NETWORKS[kind](seed)
    region, specification = problem(network, threat, seed, images=1)
    if together:
        specification = replace(specification, groups=torch.zeros(2, dtype=torch.int64))
    specification, values = level(network, region, specification, seed, gap)
    groups = specification.left(torch.zeros(2))
    layers = Crown(sound=sound)(network, region, specification).layers
    # Nothing is refuted, so that it goes on and shows what is false, if it can.
    verdicts, lower, _, _ = BranchAndBound(limit=20)(
        reduce(network, region, specification, layers, groups, sound),
        owners=range(len(groups)),
        seconds=dict.fromkeys(range(len(groups)), 60.0),
        refuted=lambda k, images: False,
    )
    for rows, verdict, bound in zip(groups, verdicts, lower.tolist(), strict=True):
        least = float(values[:, 0, rows].amax(1).amin())
        assert bound <= least
        assert verdict is None or (verdict is True and least > 0)


@pytest.mark.parametrize("kind", RELU_NETWORKS)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    seed=SEEDS,
    threat=st.integers(-40, -15).map(lambda it: Linf(10.0 ** (it / 10))),
    sound=MODES,
    gap=GAPS,
    solver=st.sampled_from(["highs", "scip"]),
    whole=st.booleans(),
)
def test_mixed_integer_programs(
    kind: str, seed: int, threat: LpBall, sound: SoundFloat, gap: float, solver: Solver, whole: bool
) -> None:
    """To the minimum, or until the sign is known."""
    network = RELU_NETWORKS[kind](seed)
    region, specification = problem(network, threat, seed, images=1)
    specification, values = level(network, region, specification, seed, gap)
    layers = Crown(sound=sound)(network, region, specification).layers
    stop = None if whole else 0.0
    found = minimise(
        *(network, region, specification, layers),
        image=0,
        sound=sound,
        solver=solver,
        timeout=1.0,
        stop_below=stop,
        stop_above=stop,
        all_rows=True,
    )
    assert found.rows == (0, 1)
    assert (found.lower <= values[:, 0].amin(0)).all()
    for row, candidate in enumerate(found.candidates):
        if candidate is not None:
            assert ((candidate >= region.lower[0]) & (candidate <= region.upper[0])).all()
            assert found.lower[row] <= specification.values(network(candidate[None]))[0, row]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data(), seed=SEEDS, threat=THREATS, sound=MODES, gap=GAPS)
def test_verdicts(method: str, data: st.DataObject, seed: int, threat: LpBall, sound: SoundFloat, gap: float) -> None:
    kind = data.draw(st.sampled_from(sorted(RELU_NETWORKS if method in OF_RELUS else NETWORKS)))
    network = NETWORKS[kind](seed)
    region, specification = problem(network, threat, seed)
    specification, values = level(network, region, specification, seed, gap)
    question = Asked(network, region, specification)
    for i, verdict in enumerate(Verifier(method, timeout=0.3, sound=sound)(network, question)):
        least = values[:, i].amin()
        assert verdict.outcome != "certified" or least > 0
        assert verdict.margin is None or verdict.margin <= least
