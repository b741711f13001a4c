"""Cauchy projections: their spread is that of theory, and they estimate what the exact zonotope has."""

import math

import pytest
import torch
from torch import nn

from redan.certification.cauchy import _scale, estimate_bounds
from redan.certification.reading import read_network
from redan.certification.regions import Region, Specification
from redan.certification.zonotope import Zonotope
from redan.models.convnet import small_cnn
from redan.models.norms import Normalise
from redan.models.resnet import ResNet
from redan.threats import Linf


def test_spread_of_the_median_is_pi_over_two_sqrt_k() -> None:
    draws = torch.empty(4000, 50, 3).cauchy_(generator=torch.Generator().manual_seed(0))
    scales = _scale(draws * torch.tensor([1.0, 5.0, 0.1]))
    relative = scales / torch.tensor([1.0, 5.0, 0.1])
    assert relative.mean(0).tolist() == pytest.approx([1, 1, 1], abs=0.04)  # the lower median lies a little below
    # The asymptotic value is 0.222; at k = 50 the tails still add some.
    assert relative.std(0).tolist() == pytest.approx([math.pi / (2 * math.sqrt(50))] * 3, rel=0.15)


@pytest.mark.parametrize("kind", ["chain", "residual"])
def test_estimates_are_those_of_the_exact_zonotope(kind: str) -> None:
    torch.manual_seed(0)
    normalise = Normalise([0.3], [0.4])
    model: nn.Module = small_cnn(normalise, in_channels=1, size=8, classes=4, width=4)
    if kind == "residual":
        model = ResNet(normalise, depths=(1, 1, 1, 1), classes=4, in_channels=1, width=2)
    network = read_network(model, (1, 8, 8))
    images = torch.rand(2, 1, 8, 8)
    region = Region.around(images, Linf(0.01))
    estimates = estimate_bounds(network, region, projections=2000, generator=torch.Generator().manual_seed(0))
    exact = Zonotope(sound="off")(network, region, Specification.robust(torch.tensor([0, 1]), 4)).layers
    assert estimates.keys() == exact.keys()
    first, *rest = sorted(exact)
    for mine, right in zip(estimates[first], exact[first], strict=True):
        assert torch.allclose(mine, right)
    # The exact ones are cut with intervals, which only the layers close to the image notice.
    for position in rest[:2]:
        (low, high), (lower, upper) = estimates[position], exact[position]
        ratio = (high - low).sum() / (upper - lower).sum()
        assert 0.95 < float(ratio) < 1.1


def test_gradients_reach_the_weights() -> None:
    network = read_network(small_cnn(Normalise([0.3], [0.4]), in_channels=1, size=8, classes=3, width=2), (1, 8, 8))
    tensors = [it.requires_grad_() for it in network.tensors()]
    region = Region.around(torch.rand(2, 1, 8, 8), Linf(0.05))
    found = estimate_bounds(network, region, projections=5, generator=torch.Generator().manual_seed(0))
    sum(((upper - lower).sum() for lower, upper in found.values()), torch.zeros(())).backward()
    assert all(it.grad is not None for it in tensors if it.dim() == 4)
