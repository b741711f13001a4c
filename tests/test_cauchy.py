"""Cauchy projections: their spread is that of theory, and they estimate what the exact zonotope has."""

import math

import pytest
import torch
from torch import nn

from redan.certification import cauchy
from redan.certification.cauchy import _scale, estimate_bounds, lines
from redan.certification.chain import read_chain
from redan.certification.reading import read_network
from redan.certification.regions import Region, Specification
from redan.certification.zonotope import Zonotope
from redan.models.convnet import small_cnn
from redan.models.norms import Normalise
from redan.models.resnet import ResNet
from redan.threats import Linf


def test_spread_of_the_median_is_pi_over_two_sqrt_k() -> None:
    draws = torch.empty(50, 4000, 3).cauchy_(generator=torch.Generator().manual_seed(0))
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


def wide(inputs: int = 30, hidden: int = 12) -> nn.Sequential:
    """Linear layers whose ReLUs are all on: behind the first one, estimates are of one group of error terms."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 3), nn.ReLU())
    network.append(nn.Linear(3, 2))
    with torch.no_grad():
        network[1].bias.fill_(100.0)  # type: ignore[operator]
    return network


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shared", "k"), [(False, 50), (True, 50), (False, 200)])
def test_estimates_of_one_group_have_the_spread_of_theory(
    dtype: torch.dtype, shared: bool, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cauchy, "DRAWS", 3000 * k * (3 if shared else 30))
    network = read_chain(wide(), (30, 1, 1))
    region = Region.around(torch.rand(3000, 30, 1, 1), Linf(0.1))
    with torch.no_grad():
        draws = torch.Generator().manual_seed(0)
        found = estimate_bounds(network, region, projections=k, generator=draws, dtype=dtype)
        weight = network.layers[4].linear(network.layers[2].weight.t()).t()  # type: ignore[attr-defined]
        exact = ((region.upper - region.lower) / 2).float().flatten(1) @ weight.abs().t()
        lower, upper = found[4]
        ratio = (upper - lower) / 2 / exact
    assert ratio.mean(0).tolist() == pytest.approx([1] * 3, abs=0.04)
    assert ratio.std(0).tolist() == pytest.approx([math.pi / (2 * math.sqrt(k))] * 3, rel=0.15)
    if not shared:  # one image's estimate says nothing of the next one's
        pairs = torch.stack([ratio[:-1, 0], ratio[1:, 0]])
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 4 / math.sqrt(3000)


def test_a_group_that_is_a_box_is_not_estimated() -> None:
    plain = wide()
    with torch.no_grad():
        plain[1].bias.zero_()  # type: ignore[operator]
    network = read_chain(plain, (30, 1, 1))
    region = Region.around(torch.rand(1, 30, 1, 1).expand(3000, -1, -1, -1), Linf(0.1))
    with torch.no_grad():
        found = estimate_bounds(network, region, generator=torch.Generator().manual_seed(0))
        slope, mu = lines(*found[2])
        assert float((mu[0] > 0).float().mean()) > 0.5
        first, second = (network.layers[i].linear(torch.eye(n)).t() for i, n in ((2, 30), (4, 12)))  # type: ignore[attr-defined]
        radius = ((region.upper - region.lower) / 2).float().flatten(1)[0]
        image, newest = (second * slope[0] @ first).abs() @ radius, second.abs() @ mu[0]
        lower, upper = found[4]
        ratio = ((upper - lower) / 2 - newest) / image  # what is left is the estimate of the image's group alone
    assert ratio.mean(0).tolist() == pytest.approx([1] * 3, abs=0.04)
    assert ratio.std(0).tolist() == pytest.approx([math.pi / (2 * math.sqrt(50))] * 3, rel=0.15)


def test_groups_have_medians_of_their_own() -> None:
    """Of two sums of error terms a and b the spread is that of sqrt(a^2 + b^2), not, as of one median, of a + b."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(30, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    plain.extend([nn.ReLU(), nn.Linear(3, 2)])
    with torch.no_grad():
        plain[1].bias.zero_()  # type: ignore[operator]
        plain[3].bias.fill_(100.0)  # type: ignore[operator]
    network = read_chain(plain, (30, 1, 1))
    region = Region.around(torch.rand(1, 30, 1, 1).expand(3000, -1, -1, -1), Linf(0.1))
    with torch.no_grad():
        found = estimate_bounds(network, region, generator=torch.Generator().manual_seed(0))
        slope, mu = lines(*found[2])
        first, second, third = (network.layers[i].linear(torch.eye(n)).t() for i, n in ((2, 30), (4, 12), (6, 8)))  # type: ignore[attr-defined]
        radius = ((region.upper - region.lower) / 2).float().flatten(1)[0]
        image, relu = (third @ second * slope[0] @ first).abs() @ radius, (third @ second).abs() @ mu[0]
        lower, upper = found[6]
        ratio = (upper - lower) / 2 / (image + relu)
    share = (image**2 + relu**2).sqrt() / (image + relu)
    assert (share < 0.8).all()
    assert ratio.mean(0).tolist() == pytest.approx([1] * 3, abs=0.04)
    expected = math.pi / (2 * math.sqrt(50)) * share
    assert ratio.std(0).tolist() == pytest.approx(expected.tolist(), rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(50, 7, 3, 4, 5), (4, 3, 9), (1, 2, 2), (51, 2, 1100)])
def test_the_scale_is_torchs_lower_median_with_its_gradient(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.empty(shape).cauchy_(generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    other = values.detach().clone().requires_grad_()
    mine, theirs = _scale(values), other.abs().median(0).values
    assert torch.equal(mine, theirs)
    for it in (mine, theirs):
        (it.double() * torch.linspace(1, 2, it.numel()).view(it.shape)).sum().backward()
    assert values.grad is not None and other.grad is not None
    # Where two are alike in bfloat16, either may be taken.
    assert torch.allclose(values.grad.abs().sum(0).double(), other.grad.abs().sum(0).double())
    if dtype != torch.bfloat16:
        assert torch.equal(values.grad, other.grad)


def test_bfloat16_changes_an_estimate_by_less_than_its_noise() -> None:
    torch.manual_seed(0)
    network = read_network(small_cnn(Normalise([0.3], [0.4]), in_channels=1, size=8, classes=4, width=8), (1, 8, 8))
    region = Region.around(torch.rand(20, 1, 8, 8), Linf(0.05))
    widths = [
        (upper - lower)
        for seed, dtype in ((0, torch.float32), (0, torch.bfloat16), (1, torch.float32))
        for lower, upper in [
            estimate_bounds(
                network.to(torch.float32), region, generator=torch.Generator().manual_seed(seed), dtype=dtype
            )[network.bent[2]]
        ]
    ]
    rounded, redrawn = (((it - widths[0]) / widths[0].clamp(min=1e-6)).std() for it in widths[1:])
    assert 0 < rounded < 0.3 * redrawn
    assert widths[1].mean() == pytest.approx(float(widths[0].mean()), rel=0.02)


def test_nothing_is_drawn_for_exact_bounds_and_nothing_computed_beyond_what_is_asked() -> None:
    network = read_network(small_cnn(Normalise([0.3], [0.4]), in_channels=1, size=8, classes=4, width=2), (1, 8, 8))
    region = Region.around(torch.rand(2, 1, 8, 8), Linf(0.05))
    first, second, *_ = network.bent
    draws = torch.Generator().manual_seed(0)
    before = draws.get_state()
    assert set(estimate_bounds(network, region, generator=draws, until=first)) == {first}
    assert torch.equal(draws.get_state(), before)
    assert set(estimate_bounds(network, region, generator=draws, until=second)) == {first, second}
    assert not torch.equal(draws.get_state(), before)
    assert estimate_bounds(network, region, until=0) == {}
