"""The search copy computes what the original computes, and the original stays the judge, untouched."""

import copy
import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from redan.attacks.objectives import cross_entropy
from redan.attacks.search import SearchModel, _FoldedParts
from redan.errors import UserError
from redan.models.norms import Normalise
from redan.models.purified import Purified
from redan.models.purifiers.registry import build_purifier
from redan.models.random_transforms import RandomTransform
from redan.models.registry import build_model

NORMALISE = Normalise([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])


def images(n: int = 12, size: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def lived_in(model: nn.Module) -> nn.Module:
    """The model with BatchNorms as training leaves them, in evaluation mode."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    return model.eval()


class SharedConvolution(nn.Module):
    """A convolution used twice, by a BatchNorm and bare; and one whose output goes to a BatchNorm and elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.other, self.other_bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)) + self.conv(x).tanh()
        y = self.other(x)
        out: Tensor = self.linear((self.other_bn(y) + y).mean((2, 3)))
        return out


class SharedBatchNorm(nn.Module):
    """One BatchNorm after two convolutions, and once after neither."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.b(torch.relu(self.bn(self.a(x)))))
        out: Tensor = self.linear(self.bn(x.tanh()).mean((2, 3)))
        return out


class OwnTensors(nn.Module):
    """Parameters and buffers that are used directly, at the top and below."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 192))
        self.register_buffer("scale", torch.tensor(2.0))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x.flatten(1), self.weight) * self.scale
        return nn.functional.linear(x, self.inner.weight) + self.inner.bias


def tail(channels: int) -> list[nn.Module]:
    return [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)]


def network(name: str, **options: int) -> Callable[[], nn.Module]:
    return lambda: build_model(name, NORMALISE, in_channels=3, size=8, classes=4, **options)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": network("resnet18", width=4),
    "preact": network("preact-resnet18", width=4),
    "wide": network("wide-resnet", depth=10, width=1),
    "plain": network("small-cnn", width=4),
    "conv with bias": lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=0.1), *tail(5)),
    "conv in groups": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6), *tail(6)),
    "without affine": lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False), *tail(5)),
    "without statistics": lambda: nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False), *tail(5)
    ),
    "not after conv": lambda: nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3), nn.Tanh(), nn.BatchNorm2d(5), *tail(5)
    ),
    "transposed conv": lambda: nn.Sequential(nn.ConvTranspose2d(3, 5, 3), nn.BatchNorm2d(5), *tail(5)),
    "flat": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4)),
    "dropout": lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.Dropout(0.5), nn.BatchNorm2d(5), *tail(5)),
    "shared conv": SharedConvolution,
    "shared batchnorm": SharedBatchNorm,
    "own tensors": OwnTensors,
}
# How many BatchNorms are left in the folded copy.
UNFOLDED = {
    "without statistics": 1,
    "not after conv": 2,
    "transposed conv": 1,
    "flat": 1,
    "dropout": 1,
    "shared conv": 2,
    "shared batchnorm": 1,
    "preact": 9,
    "wide": 4,
}
EVERY = pytest.mark.parametrize("name", NETWORKS)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lived_in(NETWORKS[name]())


def gradient_of(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels, reduction="sum"), leaf)
    return gradient


def batch_norms(search: SearchModel) -> int:
    assert search._copy is not None
    return sum("BatchNorm" in type(module).__name__ for module in search._copy.module.modules())


@EVERY
def test_the_search_copy_is_folded_and_equals_the_original(name: str) -> None:
    model, x, labels = made(name), images(), torch.arange(12) % 4
    search = SearchModel(model, precision="float32")
    torch.testing.assert_close(search.logits(x), model(x), rtol=1e-4, atol=1e-4)
    logits, values, gradient = search.gradient(x, cross_entropy, labels)
    torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-4)
    expected = nn.functional.cross_entropy(model(x), labels, reduction="none")
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, gradient_of(model, x, labels), rtol=1e-3, atol=1e-5)
    assert batch_norms(search) == UNFOLDED.get(name, 0)


@EVERY
def test_refresh_takes_over_weights_and_statistics(name: str) -> None:
    model, x = made(name), images()
    search = SearchModel(model, precision="float32")
    before = search.logits(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    lived_in(model)
    assert torch.equal(search.logits(x), before)  # until it is told
    search.refresh()
    torch.testing.assert_close(search.logits(x), model(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(search.logits(x), before, rtol=1e-2, atol=1e-2)


def test_a_model_in_training_mode_is_searched_in_evaluation_mode() -> None:
    model, x = made("resnet"), images()
    expected = model(x)
    model.train()
    search = SearchModel(model, precision="float32")
    torch.testing.assert_close(search.logits(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(search.exact_logits(x), expected)
    assert model.training


def test_refresh_follows_statistics_that_training_moves() -> None:
    model, x = made("resnet").train(), images()
    search = SearchModel(model, precision="float32")
    before = search.logits(x)
    for _ in range(20):
        model(x)
    search.refresh()
    torch.testing.assert_close(search.logits(x), search.exact_logits(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(search.exact_logits(x), model.eval()(x))
    assert not torch.allclose(search.logits(x), before, atol=1e-2)


@pytest.mark.parametrize("folds", [True, False])
def test_the_judge_stays_in_evaluation_mode_whatever_becomes_of_the_model(folds: bool) -> None:
    model, x = made("resnet"), images()
    if not folds:
        model = nn.Sequential(model, Halting()).eval()
    expected = model(x)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    search = SearchModel(model, precision="float32")
    assert torch.equal(search.exact_logits(x), expected)
    search.logits(x)
    model.train()
    assert torch.equal(search.exact_logits(x), expected)
    torch.testing.assert_close(search.logits(x), expected, rtol=1e-4, atol=1e-4)
    model.eval()
    assert torch.equal(search.exact_logits(x), expected)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())


def test_train_mode_uses_the_statistics_of_the_batch_and_leaves_the_buffers() -> None:
    model, x = made("resnet"), images()
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits = SearchModel(model, mode="train", precision="float32").logits(x)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    assert not model.training
    assert not torch.allclose(logits, model(x), atol=1e-2)
    torch.testing.assert_close(logits, model.train()(x))


def test_train_mode_follows_the_weights_and_is_judged_in_evaluation_mode() -> None:
    model, x = made("resnet"), images()
    search = SearchModel(model, mode="train", precision="float32")
    search.logits(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    search.refresh()
    assert torch.equal(search.exact_logits(x), model(x))
    torch.testing.assert_close(search.logits(x), model.train()(x))


def test_train_mode_moves_the_statistics_where_it_is_told_to() -> None:
    model, x = made("resnet"), images()
    twin = copy.deepcopy(model).train()
    search = SearchModel(model, mode="train", moves_statistics=True, precision="float32")
    for _ in range(3):
        search.gradient(x, cross_entropy, torch.zeros(len(x), dtype=torch.int64))
        twin(x)
    assert not model.training
    for (name, buffer), expected in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)
    assert torch.equal(search.exact_logits(x), model(x))


def test_train_mode_in_bfloat16_is_close() -> None:
    model, x = made("resnet"), images()
    expected = SearchModel(model, mode="train", precision="float32").logits(x)
    logits = SearchModel(model, mode="train", precision="bfloat16").logits(x)
    assert logits.dtype == torch.float32
    assert 1e-4 < (logits - expected).abs().max() / expected.std() < 0.1


@pytest.mark.parametrize("name", ["resnet", "preact", "plain", "own tensors"])
def test_bfloat16_is_close_and_used_where_asked(name: str) -> None:
    model, x = made(name), images()
    exact = model(x)
    search = SearchModel(model, precision="bfloat16")
    logits = search.logits(x)
    assert logits.dtype == torch.float32
    error = (logits - exact).abs().max() / exact.std()
    assert 1e-4 < error < 0.1  # not equal, or it is not bfloat16
    assert torch.equal(search.exact_logits(x), exact)
    cosine = nn.functional.cosine_similarity(
        search.gradient(x, cross_entropy, torch.zeros(12, dtype=torch.int64))[2].flatten(1),
        gradient_of(model, x, torch.zeros(12, dtype=torch.int64)).flatten(1),
    )
    assert cosine.mean() > 0.97
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    search.refresh()
    assert (search.logits(x) - model(x)).abs().max() / model(x).std() < 0.1


@pytest.mark.parametrize("name", ["resnet", "wide", "plain"])
def test_bfloat16_does_not_round_logits(name: str) -> None:
    # Or an attack that compares objectives would not see small gains.
    logits = SearchModel(made(name), precision="bfloat16").logits(images())
    assert (logits.bfloat16().float() != logits).float().mean() > 0.9


def test_bfloat16_does_not_round_pixels() -> None:
    # Near 1 bfloat16 is coarser than a grey level; the normalisation comes first, and what it leaves is small.
    linear = nn.Linear(192, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0], [-1.0]]).expand(2, 192).clone()
    model = nn.Sequential(Normalise([0.9] * 3, [0.1] * 3), nn.Flatten(), linear).eval()
    search = SearchModel(model, precision="bfloat16")
    x = torch.full((1, 3, 8, 8), 0.9)
    moved = search.logits(x + 1 / 1024)[0, 0] - search.logits(x)[0, 0]
    assert moved.item() == pytest.approx(192 / 102.4, rel=0.02)


@pytest.mark.parametrize("native", [False, True])
def test_precision_is_float32_unless_the_device_is_good_at_less(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redan.attacks.search.has_fast_bfloat16", lambda device: native)
    model, x = made("resnet"), images()
    close = torch.allclose(SearchModel(model).logits(x), model(x), rtol=1e-4, atol=1e-4)
    assert close is not native
    assert torch.allclose(SearchModel(model, precision="float32").logits(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_model_too_steep_for_bfloat16_is_searched_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redan.attacks.search.has_fast_bfloat16", lambda device: True)
    model, x = Steep().eval(), images()
    torch.testing.assert_close(SearchModel(model).logits(x), model(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(SearchModel(model, precision="bfloat16").logits(x), model(x), atol=0.1)


class Steep(nn.Module):
    """The difference of two large numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x.flatten(1))
        return (z + 1000) - 1000


class Halting(nn.Module):
    """Python control flow that depends on values, which cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.abs().sum() < 1e9 else x * 0


class Noisy(nn.Module):
    """Noise that a trace keeps as noise."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 3)

    def noise(self, x: Tensor) -> Tensor:
        return torch.randn_like(x)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear((x + 0.1 * self.noise(x)).flatten(1))
        return out


class NoisyConstant(Noisy):
    """Noise that a trace would freeze."""

    def noise(self, x: Tensor) -> Tensor:
        return torch.randn(1, 3, 8, 8)


class FaintlyNoisy(Noisy):
    """The same, too little to show in the logits."""

    def noise(self, x: Tensor) -> Tensor:
        return 1e-6 * torch.randn(1, 3, 8, 8)


class CoinTossing(Noisy):
    """A choice between few ways, so that a frozen one often agrees by chance."""

    def noise(self, x: Tensor) -> Tensor:
        return x.flip(3) if random.random() < 0.5 else x


class CoinTossingInNumPy(Noisy):
    def noise(self, x: Tensor) -> Tensor:
        return x.flip(3) if np.random.random() < 0.5 else x


@pytest.mark.parametrize("kind", [Noisy, NoisyConstant, FaintlyNoisy, CoinTossing, CoinTossingInNumPy])
def test_a_random_model_stays_random(kind: type[Noisy]) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        search, x = SearchModel(kind().eval()), images(2)
        seen = torch.stack([search.logits(x) for _ in range(20)])
        assert (seen.amax(0) > seen.amin(0)).any()


class Rounding(torch.autograd.Function):
    """Eight grey levels, with the gradient of none: a straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(Rounding.apply(x).flatten(1))  # type: ignore[no-untyped-call]
        return out


@pytest.mark.parametrize("kind", [StraightThrough, lambda: nn.Sequential(made("plain"), Halting())])
def test_models_that_cannot_be_traced_are_searched_as_they_are(kind: Callable[[], nn.Module]) -> None:
    # In the memory format that a search has them in: on some processors a convolution's last bits depend on it.
    x = images().contiguous(memory_format=torch.channels_last)
    model, labels = kind().eval(), torch.arange(12) % 4
    search = SearchModel(model)
    logits, _, gradient = search.gradient(x, cross_entropy, labels)
    assert torch.equal(logits, model(x))
    torch.testing.assert_close(gradient, gradient_of(model, x, labels))
    assert gradient.abs().flatten(1).amax(1).min() > 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    search.refresh()
    assert torch.equal(search.logits(x), model(x))


def test_a_model_without_a_gradient_is_said() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).requires_grad_(False).eval()
    model[0].register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(UserError, match="do not depend on the images by any gradient"):
        SearchModel(model).gradient(images(2), cross_entropy, torch.tensor([0, 1]))


def test_an_infinite_slope_spoils_one_pixel_and_not_the_gradient() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([(x - x).sqrt().flatten(1).sum(1) + x.flatten(1).sum(1), x.flatten(1).mean(1)], 1)

    _, _, gradient = SearchModel(Root()).gradient(images(2), cross_entropy, torch.tensor([0, 1]))
    assert torch.isfinite(gradient).all()


@EVERY
def test_the_model_is_left_as_it_was(name: str) -> None:
    model, x = made(name), images()
    model.train()
    next(iter(model.children())).eval()
    next(iter(model.parameters())).requires_grad_(False)
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for search in (SearchModel(model), SearchModel(model, precision="bfloat16"), SearchModel(model, mode="train")):
        search.gradient(x, cross_entropy, torch.zeros(12, dtype=torch.int64))
        search.refresh()
        search.exact_logits(x)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_autocast_around_changes_nothing() -> None:
    model, x, labels = made("resnet"), images(), torch.zeros(12, dtype=torch.int64)
    search = SearchModel(model, precision="float32")
    exact, logits, gradient = search.exact_logits(x), search.logits(x), search.gradient(x, cross_entropy, labels)[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fresh = SearchModel(model, precision="float32")
        assert torch.equal(search.exact_logits(x), exact)
        assert torch.equal(fresh.logits(x), logits)
        assert torch.equal(fresh.gradient(x, cross_entropy, labels)[2], gradient)


@pytest.mark.parametrize("name", ["resnet", "shared conv"])
def test_inference_mode_around_changes_nothing(name: str) -> None:
    model, labels = made(name), torch.arange(12) % 4
    expected = SearchModel(model).gradient(images(), cross_entropy, labels)[2]
    with torch.inference_mode():
        search = SearchModel(model)
        search.logits(images())
        assert torch.equal(search.gradient(images(), cross_entropy, torch.arange(12) % 4)[2], expected)
    assert torch.equal(search.gradient(images(), cross_entropy, labels)[2], expected)


def test_a_model_that_cannot_be_copied_works_in_evaluation_mode() -> None:
    model = made("plain")
    model.open_file = open(__file__)  # type: ignore[assignment]  # noqa: SIM115
    try:
        torch.testing.assert_close(SearchModel(model).logits(images()), model(images()))
        with pytest.raises(UserError, match=r"Sequential cannot be copied for the attack .* with \.eval\(\)"):
            SearchModel(model.train()).logits(images())
    finally:
        model.open_file.close()  # type: ignore[operator, union-attr]


def test_the_device_is_the_model_s() -> None:
    assert SearchModel(made("plain")).device == torch.device("cpu")
    assert SearchModel(nn.Flatten()).device == torch.device("cpu")
    assert SearchModel(nn.Linear(2, 2, device="meta")).device == torch.device("meta")


@pytest.mark.parametrize(
    ("setting", "kind"), [({"precision": "bfloat"}, "precision"), ({"mode": "trian"}, "attack mode")]
)
def test_unknown_settings_are_said(setting: dict[str, Any], kind: str) -> None:
    with pytest.raises(UserError, match=f"no {kind} .* did you mean"):
        SearchModel(made("plain"), **setting)


# A model that draws, in parts that do not.


def purified(votes: int = 1, purifier: str = "inpainting") -> Purified:
    torch.manual_seed(0)
    options: dict[str, Any] = {"width": 8, "halvings": 1, "dilations": 2, "attention": False}
    if purifier == "masked-autoencoder":
        options = {"patch": 2, "width": 8, "depth": 1, "heads": 2, "decoder_width": 8, "decoder_depth": 1}
    parts = build_purifier(purifier, channels=3, size=8, **options), NETWORKS["resnet"]()
    model = Purified(RandomTransform(size=8, sigma=0.1), *parts, votes=votes)
    lived_in(model)
    return model


def drawn(model: nn.Module, x: Tensor, labels: Tensor, draws: int = 1) -> tuple[Tensor, Tensor]:
    """The mean logits and gradient of so many passes, by torch's own randomness."""
    logits, gradients = [], []
    for _ in range(draws):
        leaf = x.contiguous(memory_format=torch.channels_last).requires_grad_()  # in whose order randn_like draws
        logits.append(model(leaf))
        loss = nn.functional.cross_entropy(logits[-1], labels, reduction="sum")
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    return torch.stack(logits).mean(0).detach(), torch.stack(gradients).mean(0)


def off(found: Tensor, expected: Tensor) -> float:
    """The error as a share of what there is."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("purifier", ["inpainting", "masked-autoencoder"])
@pytest.mark.parametrize("votes", [1, 2])
@pytest.mark.parametrize("draws", [1, 3])
def test_the_parts_of_a_model_that_draws_are_folded(purifier: str, votes: int, draws: int) -> None:
    model, x, labels = purified(votes, purifier), images(), torch.arange(12) % 4
    search = SearchModel(model, precision="float32", draws=draws)
    torch.manual_seed(3)
    logits, _, gradient = search.gradient(x, cross_entropy, labels)
    assert batch_norms(search) == 0 and sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 20
    assert isinstance(search._copy, _FoldedParts) and len(search._copy._copies) == 2
    torch.manual_seed(3)
    exact, exact_gradient = drawn(model, x, labels, draws)
    torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-4)
    assert off(gradient, exact_gradient) < 1e-3
    assert not torch.equal(search.logits(x), search.logits(x))


@pytest.mark.parametrize("draws", [1, 3])
def test_parts_are_in_bfloat16_where_asked(draws: int) -> None:
    model, x, labels = purified(), images(), torch.arange(12) % 4
    search = SearchModel(model, precision="bfloat16", draws=draws)
    torch.manual_seed(3)
    logits, _, gradient = search.gradient(x, cross_entropy, labels)
    assert search._copy is not None
    assert {p.dtype for p in search._copy.module.purifier.parameters()} == {torch.bfloat16}  # type: ignore[union-attr]
    torch.manual_seed(3)
    exact, exact_gradient = drawn(model, x, labels, draws)
    assert logits.dtype == torch.float32 and 1e-4 < (logits - exact).abs().max() / exact.std() < 0.1
    assert off(gradient, exact_gradient) < 0.2


def test_refresh_takes_over_the_weights_and_statistics_of_every_part() -> None:
    for part in ("purifier", "classifier"):
        model, x, labels = purified(), images(), torch.arange(12) % 4
        search = SearchModel(model, precision="float32")
        torch.manual_seed(3)
        before = search.logits(x)
        with torch.no_grad():
            for parameter in model.get_submodule(part).parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        lived_in(model.get_submodule(part))
        torch.manual_seed(3)
        assert torch.equal(search.logits(x), before)  # until it is told
        search.refresh()
        torch.manual_seed(3)
        logits, _, gradient = search.gradient(x, cross_entropy, labels)
        torch.manual_seed(3)
        exact, exact_gradient = drawn(model, x, labels)
        torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-4)
        assert off(gradient, exact_gradient) < 1e-3 and not torch.allclose(logits, before, atol=1e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_preparing_a_model_that_draws_leaves_the_random_state_and_the_model(precision: Any) -> None:
    model, x = purified(), images()
    model.train()
    model.classifier.eval().requires_grad_(False)
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    children = list(model.modules())
    search = SearchModel(model, precision=precision)
    torch.manual_seed(3)
    search.logits(x)
    first = torch.get_rng_state()
    torch.manual_seed(3)
    search.logits(x)
    assert torch.equal(torch.get_rng_state(), first)  # the first time it was prepared
    search.gradient(x, cross_entropy, torch.arange(12) % 4)
    search.refresh()
    assert list(model.modules()) == children and [module.training for module in children] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_known_draw_is_searched_folded_and_known() -> None:
    model, x, labels = purified(votes=2).fixed(images(), torch.Generator().manual_seed(1)), images(), torch.arange(12)
    search = SearchModel(model, precision="float32")
    logits, _, gradient = search.gradient(x, cross_entropy, labels % 4)
    assert batch_norms(search) == 0
    exact, exact_gradient = drawn(model, x, labels % 4)
    torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-4)
    assert off(gradient, exact_gradient) < 1e-3 and torch.equal(search.logits(x), search.logits(x))


class Declared(nn.Module):
    """Noise at the front, as declared, and a part that claims to draw nothing."""

    deterministic_parts: ClassVar[tuple[str, ...]] = ("part",)

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.part(x + 0.1 * torch.randn_like(x))
        return out


class TorchCoinTossing(Noisy):
    """Frozen by a trace, and then right by chance every other time."""

    def noise(self, x: Tensor) -> Tensor:
        return x.flip(3) if torch.rand(()) < 0.5 else x


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize(
    "kind", [Noisy, NoisyConstant, FaintlyNoisy, TorchCoinTossing, CoinTossing, CoinTossingInNumPy]
)
def test_a_part_that_draws_all_the_same_goes_on_drawing(kind: type[Noisy], draws: int) -> None:
    def seeded(seed: int) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def passes(forward: Callable[[Tensor], Tensor], seed: int) -> Tensor:
        seeded(seed)
        return torch.stack([forward(images(2)).detach() for _ in range(10)])

    for seed in range(6):
        seeded(seed)
        model = Declared(kind()).eval()
        search = SearchModel(model, precision="float32", draws=draws)
        search.logits(images(2))
        exact = passes(lambda x, model=model: drawn(model, x, torch.tensor([0, 1]), draws)[0], seed + 1)  # type: ignore[misc]
        torch.testing.assert_close(passes(search.logits, seed + 1), exact, rtol=0, atol=1e-6)
        assert (exact.amax(0) > exact.amin(0)).any()


def test_parts_whose_copy_differs_are_searched_as_they_are() -> None:
    # The trace of the part loses the gradient that it defines by itself.
    model, x, labels = Declared(StraightThrough()).eval(), images(), torch.arange(12) % 4
    search = SearchModel(model, precision="float32")
    torch.manual_seed(3)
    logits, _, gradient = search.gradient(x, cross_entropy, labels)
    torch.manual_seed(3)
    exact, exact_gradient = drawn(model, x, labels)
    assert torch.equal(logits, exact) and off(gradient, exact_gradient) < 1e-6
    assert gradient.abs().flatten(1).amax(1).min() > 0


@pytest.mark.parametrize("prepared_in", ["train", "eval"])
def test_a_part_that_cannot_be_traced_stays_in_evaluation_mode(prepared_in: str) -> None:
    class Two(Declared):
        deterministic_parts = ("part", "other")

        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.BatchNorm2d(3), Halting()))
            self.other = made("resnet")

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.other(super().forward(x))
            return out

    model, x = Two(), images()
    lived_in(model).train(prepared_in == "train")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    search = SearchModel(model, precision="float32")
    search.logits(x)
    assert isinstance(search._copy, _FoldedParts) and len(search._copy._copies) == 1
    model.train()
    torch.manual_seed(3)
    logits = search.logits(x)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.manual_seed(3)
    exact, _ = drawn(model.eval(), x, torch.arange(12) % 4)
    torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [purified, Noisy])
def test_without_a_declaration_a_model_that_draws_is_searched_as_it_is(
    monkeypatch: pytest.MonkeyPatch, kind: Callable[[], nn.Module]
) -> None:
    monkeypatch.delattr(Purified, "deterministic_parts")
    model, x, labels = kind().eval(), images(), torch.arange(12) % 3
    for draws in (1, 2):
        search = SearchModel(model, precision="float32", draws=draws)
        torch.manual_seed(3)
        logits, _, gradient = search.gradient(x, cross_entropy, labels)
        torch.manual_seed(3)
        exact, exact_gradient = drawn(model, x, labels, draws)
        assert search._copy is None and torch.equal(logits, exact) and off(gradient, exact_gradient) < 1e-6
