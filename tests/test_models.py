"""Networks: their sizes are the published ones, they take images in [0, 1] and normalise them first."""

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from redan.errors import UserError
from redan.models.norms import Normalise
from redan.models.preact_resnet import PreActBlock
from redan.models.registry import MODELS, build_model, model_options
from redan.models.resnet import BasicBlock
from redan.models.split_norm import Branch, SplitBatchNorm2d, merge_batch_norm, split_batch_norm
from redan.models.stages import Projection

# Small enough to run at 64 pixels.
THIN: dict[str, dict[str, int]] = {
    "resnet18": {"width": 4},
    "resnet34": {"width": 4},
    "preact-resnet18": {"width": 4},
    "wide-resnet": {"depth": 10, "width": 1},
    "convmed": {"hidden": 20},
    "convmedbig": {"hidden": 20},
    "cnn7": {"width": 2, "hidden": 20},
    "small-cnn": {"width": 4},
    "small-cnn-bn": {"width": 4},
}


def build(name: str, channels: int = 3, size: int = 32, classes: int = 10, **options: int) -> nn.Module:
    normalise = Normalise([0.5] * channels, [0.25] * channels)
    return build_model(name, normalise, in_channels=channels, size=size, classes=classes, **options)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "channels", "size", "options", "count"),
    [
        ("resnet18", 3, 32, {}, 11_173_962),
        ("resnet34", 3, 32, {}, 21_282_122),
        ("preact-resnet18", 3, 32, {}, 11_172_170),
        ("wide-resnet", 3, 32, {"depth": 28, "width": 10}, 36_479_194),
        ("wide-resnet", 3, 32, {"depth": 34, "width": 10}, 46_160_474),
        ("convmedbig", 3, 32, {}, 2_133_736),
        ("cnn7", 3, 32, {}, 17_192_650 - 1024),  # less the biases that BatchNorm takes out again
        ("convmed", 3, 32, {"w1": 2, "w2": 4, "hidden": 250}, 2_118_856),
        ("convmed", 1, 28, {"w1": 2, "w2": 4, "hidden": 250}, 1_637_256),
        ("convmed", 1, 28, {"w1": 2, "w2": 2, "hidden": 100}, 348_374),
        ("convmed", 3, 32, {"w1": 2, "w2": 2, "hidden": 100}, 445_974),
    ],
)
def test_networks_have_the_published_number_of_parameters(
    name: str, channels: int, size: int, options: dict[str, int], count: int
) -> None:
    with torch.device("meta"):  # shapes without memory
        model = build(name, channels, size, **options)
    assert parameters(model) == count


def test_defaults_are_the_published_networks() -> None:
    assert model_options("wide-resnet") == {"depth": 34, "width": 10}
    assert model_options("resnet18") == {"width": 64, "second_stride": 2}
    assert model_options("convmed") == {"w1": 2, "w2": 4, "hidden": 250}
    assert model_options("convmedbig") == {"w1": 2, "w2": 2, "w3": 4, "hidden": 250}


@pytest.mark.parametrize("size", [8, 28, 32, 64])
@pytest.mark.parametrize("name", MODELS)
def test_images_of_any_size_give_one_logit_a_class(name: str, size: int) -> None:
    model = build(name, channels=1, size=size, classes=7, **THIN[name]).eval()
    logits = model(torch.rand(2, 1, size, size))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", MODELS)
def test_normalisation_is_the_first_layer(name: str) -> None:
    # A network that normalises by (mean, std) sees in an image what its twin without sees in the normalised image.
    torch.manual_seed(0)
    model = build(name, **THIN[name]).eval()
    first = next(module for module in model.modules() if not list(module.children()))
    assert isinstance(first, Normalise)
    images = torch.rand(2, 3, 32, 32)
    expected = model(images)
    first.mean.zero_()
    first.std.fill_(1)
    torch.testing.assert_close(model((images - 0.5) / 0.25), expected)
    assert not torch.allclose(model(images), expected, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_part_in_the_logits(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, **THIN[name])
    model(torch.rand(8, 3, 32, 32)).square().sum().backward()
    for label, parameter in model.named_parameters():
        assert parameter.grad is not None, label
        assert parameter.grad.abs().max() > 0, label


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_decides_the_weights(name: str) -> None:
    def weights(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return list(build(name, **THIN[name]).state_dict().values())

    first, same, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_options_do_something(name: str) -> None:
    for option, default in model_options(name).items():
        if option == "second_stride":  # moves no weight; see the test below
            continue
        with torch.device("meta"):
            usual, larger = build(name), build(name, **{option: default + 6})
        assert parameters(usual) < parameters(larger), option


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
@pytest.mark.parametrize(("stride", "sides"), [(1, [32, 32, 16, 8]), (2, [32, 16, 8, 4])])
def test_the_second_stage_halves_the_image_or_keeps_it(name: str, stride: int, sides: list[int]) -> None:
    model = build(name, width=2, second_stride=stride)
    seen: list[int] = []
    for i in range(1, 5):
        model.get_submodule(f"layer{i}").register_forward_hook(lambda m, inputs, output: seen.append(output.shape[-1]))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert seen == sides
    assert parameters(model) == parameters(build(name, width=2))


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("channels", [2, 5, 8])
def test_a_projection_is_a_matrix_at_every_second_pixel(channels: int, side: int) -> None:
    # In the memory format of training, where oneDNN's own gradient of a narrow one is wrong on some processors.
    torch.manual_seed(0)
    layer = Projection(channels, 4, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(16, channels, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    direction = torch.randn(16, 4, 4, 4)
    matrix = layer.weight.detach().double()[:, :, 0, 0].requires_grad_()
    pixels = images.detach().double().requires_grad_()
    expected = torch.einsum("oc,nchw->nohw", matrix, pixels[:, :, ::2, ::2])
    output = layer(images)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    by_weight, by_image = torch.autograd.grad((output * direction).sum(), (layer.weight, images))
    expected_grads = torch.autograd.grad((expected * direction).sum(), (matrix, pixels))
    torch.testing.assert_close(by_weight.double()[:, :, 0, 0], expected_grads[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(by_image.double(), expected_grads[1], atol=1e-5, rtol=1e-5)


def batch_norm(x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
    return nn.functional.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)


def convolution(x: Tensor, layer: nn.Conv2d, stride: int) -> Tensor:
    return nn.functional.conv2d(x, layer.weight, stride=stride, padding=layer.weight.shape[-1] // 2)


def with_statistics(block: nn.Module) -> None:
    for layer in block.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, -1, 1)


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (6, 1), (6, 2)])
def test_residual_blocks_are_the_published_ones(channels: int, stride: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    basic, pre = BasicBlock(4, channels, stride).eval(), PreActBlock(4, channels, stride).eval()
    with_statistics(basic)
    with_statistics(pre)

    out = batch_norm(convolution(x, basic.conv1, stride), basic.bn1).relu()
    out = batch_norm(convolution(out, basic.conv2, 1), basic.bn2)
    projection = list(basic.shortcut)
    shortcut = x
    if (channels, stride) != (4, 1):
        assert isinstance(projection[0], nn.Conv2d) and isinstance(projection[1], nn.BatchNorm2d)
        shortcut = batch_norm(convolution(x, projection[0], stride), projection[1])
    torch.testing.assert_close(basic(x), (out + shortcut).relu())

    activated = batch_norm(x, pre.bn1).relu()
    out = convolution(batch_norm(convolution(activated, pre.conv1, stride), pre.bn2).relu(), pre.conv2, 1)
    shortcut = x if (channels, stride) == (4, 1) else convolution(activated, pre.shortcut, stride)
    torch.testing.assert_close(pre(x), out + shortcut)


class Shared(nn.Module):
    """A BatchNorm by three names, in a block by two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.again, self.norm, self.same = self.first, self.first[1], self.first[1]

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.same(self.norm(self.again(self.first(images))))
        return out


def test_a_shared_batch_norm_is_split_and_merged_once() -> None:
    plain = Shared()
    assert isinstance(plain.norm, nn.BatchNorm2d)
    with_statistics(plain)
    split = split_batch_norm(plain)
    assert isinstance(split, Shared) and split.again is split.first
    assert split.first[1] is split.norm is split.same
    assert isinstance(split.norm, SplitBatchNorm2d) and type(split.norm.adversarial) is nn.BatchNorm2d
    assert split.norm.clean is not split.norm.adversarial
    nn.init.uniform_(split.norm.clean.weight, 1, 2)
    images = torch.rand(2, 3, 4, 4)
    for branch in get_args(Branch):
        merged = merge_batch_norm(split, branch).eval()
        assert isinstance(merged, Shared) and merged.again is merged.first
        assert merged.first[1] is merged.norm is merged.same and type(merged.norm) is nn.BatchNorm2d
        assert torch.equal(merged(images), plain.eval()(images)) == (branch == "adversarial")


def test_normalise_is_the_formula() -> None:
    images = torch.rand(2, 3, 4, 4)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    expected = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(Normalise(mean, std)(images), expected)
    torch.testing.assert_close(Normalise([0.5], [0.25])(images), (images - 0.5) / 0.25)


def test_normalise_is_no_part_of_the_weights() -> None:
    assert not list(Normalise([0.5], [0.25]).parameters())
    assert Normalise([0.5], [0.25]).state_dict() == {}


@pytest.mark.parametrize("std", [[0.0], [0.2, -0.1, 0.2]])
def test_normalise_divides_by_positive_numbers_only(std: list[float]) -> None:
    with pytest.raises(ValueError, match="std must be above 0"):
        Normalise([0.5], std)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet-18", {}, "no model 'resnet-18'; did you mean 'resnet18'"),
        ("resnet18", {"widht": 8}, "no option of model resnet18 'widht'; did you mean 'width'"),
        ("resnet18", {"depths": 3}, "no option of model resnet18 'depths'"),
        ("resnet18", {"width": 0}, "model resnet18: width is a whole number of at least 1, got 0"),
        ("resnet18", {"second_stride": 3}, "model resnet18: second_stride is 1 or 2, got 3"),
        ("convmed", {"hidden": 2.5}, "model convmed: hidden is a whole number of at least 1, got 2.5"),
        ("small-cnn", {"width": True}, "model small-cnn: width is a whole number of at least 1, got True"),
        ("wide-resnet", {"depth": 30}, r"model wide-resnet: the depth of a WRN is 6 k \+ 4 .*, got 30"),
        ("wide-resnet", {"depth": 4}, r"model wide-resnet: the depth of a WRN is 6 k \+ 4 .*, got 4"),
    ],
)
def test_wrong_names_and_options_are_said_in_one_line(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        build(name, **options)
    assert "\n" not in str(raised.value)
