"""COLT's certificate: against exact minima of small networks, and its parts against what they are made of."""

import itertools
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from redan.certification.building import Builder
from redan.certification.colt import LateMilp
from redan.certification.interval import Interval
from redan.certification.milp import Binaries, lp_refine, minimise
from redan.certification.network import Linear, Network
from redan.certification.regions import Bounds, Region, Specification
from redan.certification.verifier import Verifier
from redan.certification.zonotope import Zonotope, learn
from redan.threats import Linf
from tests.certification_cases import NETWORKS, problem


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

    if certifies(LateMilp(iterations=2, binaries=1)):
        assert (exact > 0).all()
    assert certifies(LateMilp(iterations=2, last_layers=9, binaries=99)) == bool((exact > 1e-6).all())
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

    certificate = LateMilp(iterations=2, last_layers=9, binaries=99)
    assert not certificate(network, region, specification, bounds, deadline=time.monotonic() + 20, tried=tried)
    assert len(found) == 1 and found[0] < 1e-6


def test_nothing_is_begun_after_the_deadline() -> None:
    network = NETWORKS["dense"](4)
    region, specification = problem(network, Linf(0.5), 4, images=1)
    bounds = Zonotope()(network.to(torch.float32), region, specification)
    asked: list[Tensor] = []

    def tried(image: Tensor) -> bool:
        asked.append(image)
        return False

    assert not LateMilp()(network, region, specification, bounds, deadline=time.monotonic(), tried=tried)
    position = network.bent[1]
    layers = {i: (low.double(), high.double()) for i, (low, high) in bounds.layers.items()}
    low, high = lp_refine(network, region, layers, position, image=0, deadline=time.monotonic())
    assert not asked and (low == layers[position][0][0]).all() and (high == layers[position][1][0]).all()


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
    assert all(not values.any() for values in plain.urgency.values())
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
