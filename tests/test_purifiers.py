"""Purifiers: the published sizes and formulas, exact gradients, and nothing read off where pixels are missing."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from redan.errors import UserError
from redan.models.purifiers.base import Plain, Purifier
from redan.models.purifiers.discriminator import PatchDiscriminator
from redan.models.purifiers.inpainting import ContextualAttention, GatedConv, Inpainting
from redan.models.purifiers.masked_autoencoder import MaskedAutoencoder
from redan.models.purifiers.registry import PURIFIERS, build_purifier, purifier_options

# Small enough to run at 256 pixels and to differentiate numerically at 8.
THIN: dict[str, dict[str, Any]] = {
    "inpainting": {"width": 4},
    "masked-autoencoder": {"width": 8, "depth": 2, "heads": 2, "decoder_width": 8, "decoder_depth": 1},
}
TINY = [
    ("inpainting", {"width": 4, "halvings": 1, "dilations": 2, "attention": False}),
    ("inpainting", {"width": 4, "halvings": 1, "dilations": 1}),
    ("masked-autoencoder", THIN["masked-autoencoder"] | {"patch": 2, "decoder_heads": 2}),
]


def scene(n: int, channels: int, size: int, cells: int = 8, missing: int = 16) -> tuple[Tensor, Tensor]:
    """Noise, and holes in so many cells of the image, in other ones for each image."""
    chosen = torch.rand(n, cells**2).argsort(1) < missing
    holes = F.interpolate(chosen.float().view(n, 1, cells, cells), size=size)
    return torch.rand(n, channels, size, size) * (1 - holes) + 0.5 * holes, holes


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 32), (3, 32), (3, 256)])
@pytest.mark.parametrize("name", PURIFIERS)
def test_purifiers_give_whole_images_of_any_size(name: str, channels: int, size: int) -> None:
    torch.manual_seed(0)
    purifier = build_purifier(name, channels=channels, size=size, **THIN[name], **_patch(name, size))
    images, holes = scene(2, channels, size)
    with torch.no_grad():
        attempts, purified = purifier.attempts(images, holes), purifier(images, holes)
    assert all(attempt.shape == images.shape for attempt in attempts)
    assert len(attempts) == (2 if name == "inpainting" else 1)
    assert torch.equal(purified, attempts[-1].clamp(0, 1))
    assert purified.std() > 0 and not (purified == images).any()


def _patch(name: str, size: int) -> dict[str, int]:
    return {"patch": size // 8} if name == "masked-autoencoder" else {}


@pytest.mark.parametrize("size", [32, 256])
@pytest.mark.parametrize("name", PURIFIERS)
def test_purified_images_keep_shape_and_range(name: str, size: int) -> None:
    torch.manual_seed(0)
    purifier = build_purifier(name, channels=3, size=size, **THIN[name], **_patch(name, size))
    images, holes = scene(2, 3, size)
    with torch.no_grad():
        *_, weight, _ = purifier.parameters()
        weight.mul_(1000)  # of the last layer: wild answers
        attempt, purified = purifier.attempts(images, holes)[-1], purifier(images, holes)
    # The inpainting network ends in a tanh, the autoencoder in numbers of any size.
    assert (attempt.amin() < -1 and attempt.amax() > 2) == (name == "masked-autoencoder")
    assert purified.shape == (2, 3, size, size)
    assert 0 <= purified.amin() < 0.01 and 0.99 < purified.amax() <= 1


SHIPPED: dict[int, dict[str, Any]] = {32: {"halvings": 1, "dilations": 4, "attention": False}, 256: {}}


@pytest.mark.parametrize("size", SHIPPED)
def test_the_inpainting_networks_of_recipes_and_paper_run(size: int) -> None:
    torch.manual_seed(0)
    purifier = build_purifier("inpainting", channels=3, size=size, **SHIPPED[size])
    images, holes = scene(1, 3, size)
    with torch.no_grad():
        purified = purifier(images, holes)
    assert purified.shape == (1, 3, size, size)
    assert purified.amin() >= 0 and purified.amax() <= 1 and purified.std() > 0.01


def test_outputs_are_cut_to_the_range_of_images() -> None:
    class Loud(nn.Module):
        def forward(self, images: Tensor, holes: Tensor) -> Tensor:
            return 4 * images - 2 + holes

    images, holes = scene(2, 3, 8)
    plain = Plain(Loud())
    assert plain.criterion == "l1"
    (attempt,) = plain.attempts(images, holes)
    assert torch.equal(attempt, 4 * images - 2 + holes)
    assert torch.equal(plain(images, holes), attempt.clamp(0, 1))


@pytest.mark.parametrize(("name", "options"), TINY)
def test_gradients_are_those_of_finite_differences(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    purifier = build_purifier(name, channels=1, size=8, **options).double()
    images, holes = scene(2, 1, 8, cells=4, missing=4)
    images = images.double().requires_grad_()

    def last(images: Tensor) -> Tensor:
        return purifier.attempts(images, holes.double())[-1]

    assert torch.autograd.gradcheck(last, images, fast_mode=True)
    last(images).sum().backward()
    assert images.grad is not None and images.grad[holes == 0].abs().min() > 0


@pytest.mark.parametrize(("name", "options"), TINY)
def test_each_image_is_purified_by_itself(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    purifier = build_purifier(name, channels=1, size=8, **options)
    images, holes = scene(4, 1, 8)
    alone = torch.cat([purifier(image[None], hole[None]) for image, hole in zip(images, holes, strict=True)])
    torch.testing.assert_close(purifier(images, holes), alone)


@pytest.mark.parametrize(("name", "options"), TINY)
@pytest.mark.parametrize("hole", [0.0, 1.0])
def test_nothing_or_everything_may_be_missing(name: str, options: dict[str, Any], hole: float) -> None:
    torch.manual_seed(0)
    purifier = build_purifier(name, channels=1, size=8, **options)
    images = torch.rand(2, 1, 8, 8) * (1 - hole) + 0.5 * hole
    images.requires_grad_()
    purified = purifier(images, torch.full((2, 1, 8, 8), hole))
    purified.sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and purified.isfinite().all()


@pytest.mark.parametrize(("name", "options"), TINY)
def test_a_trace_computes_the_same_for_any_batch(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    purifier = build_purifier(name, channels=1, size=8, **options)
    traced = fx.symbolic_trace(purifier)
    for n in (1, 3):
        images, holes = scene(n, 1, 8)
        assert torch.equal(traced(images, holes), purifier(images, holes))


@pytest.mark.parametrize("name", PURIFIERS)
def test_every_parameter_has_a_part_in_the_attempts(name: str) -> None:
    torch.manual_seed(0)
    purifier = build_purifier(name, channels=3, size=32, **THIN[name])
    attempts = purifier.attempts(*scene(4, 3, 32, missing=4))
    torch.stack(attempts).square().sum().backward()
    for label, parameter in purifier.named_parameters():
        assert parameter.grad is not None, label
        assert parameter.grad.abs().max() > 0, label


def test_published_networks_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        generator = Inpainting(channels=3, size=256)
        critic = PatchDiscriminator(channels=3, size=256)
        base = MaskedAutoencoder(
            channels=3, size=224, patch=16, width=768, depth=12, heads=12, decoder_width=512, decoder_depth=8,
            decoder_heads=16,
        )  # fmt: skip
    assert parameters(generator.coarse) == 1_631_151
    assert parameters(generator) == 1_631_151 + 2_421_327
    assert parameters(critic) == 5_946_816
    # A ViT-B/16 without head has 85 798 656, of which 197 * 768 positions are not learnt here.
    encoder = [base.embed, base.encoder, base.norm]
    assert sum(parameters(part) for part in encoder) + base.summary.numel() == 85_798_656 - 197 * 768


def test_defaults_are_the_published_ones_or_say_so() -> None:
    assert purifier_options("inpainting") == {"width": 48, "halvings": 2, "dilations": 5, "attention": True}
    assert purifier_options("masked-autoencoder") == {
        "patch": 4, "width": 192, "depth": 6, "heads": 3, "decoder_width": 128, "decoder_depth": 2, "decoder_heads": 4,
    }  # fmt: skip
    assert (Inpainting.criterion, MaskedAutoencoder.criterion) == ("l1", "mse")


def test_a_gated_convolution_is_the_formula() -> None:
    torch.manual_seed(0)
    layer, x = GatedConv(2, 3, dilation=2), torch.randn(1, 2, 6, 6)
    feature, gate = (F.conv2d(x, conv.weight, padding=2, dilation=2) for conv in (layer.feature, layer.gate))
    expected = torch.where(feature > 0, feature, feature.exp() - 1) / (1 + (-gate).exp())
    torch.testing.assert_close(layer(x), expected)
    assert GatedConv(2, 3, 5, stride=2)(x).shape == (1, 3, 3, 3)


def test_signals_survive_the_depth_of_the_published_network() -> None:
    torch.manual_seed(0)
    signal = torch.randn(2, 24, 16, 16)
    for _ in range(15):
        signal = GatedConv(24, 24)(signal)
    assert 0.01 < signal.std() < 2


@pytest.mark.parametrize(
    ("size", "halvings", "dilations", "steps"),
    [
        (256, 2, 5, [1, 2, 4, 8, 16]),
        (32, 1, 5, [1, 2, 4, 8]),
        (32, 1, 3, [1, 2, 4]),
        (8, 1, 5, [1, 2]),
    ],
)
def test_dilations_double_while_they_fit(size: int, halvings: int, dilations: int, steps: list[int]) -> None:
    network = Inpainting(channels=1, size=size, width=4, halvings=halvings, dilations=dilations, attention=False)
    encoder = 1 + 2 * halvings

    def taken(stage: nn.Module, count: int) -> list[int]:
        layers = list(stage.children())[encoder : encoder + count]
        return [layer.feature.dilation[0] for layer in layers if isinstance(layer, GatedConv)]

    assert taken(network.coarse, len(steps) + 2) == [*steps, 1, 1]
    assert taken(network.dilated, len(steps)) == steps
    assert len(list(network.dilated.children())) == encoder + len(steps)


def test_the_first_stage_sees_where_holes_are_and_the_second_fills_them() -> None:
    # Where all is missing the second sees the first one's output alone, and where nothing is, the image alone.
    torch.manual_seed(0)
    network = Inpainting(channels=3, size=8, width=4, halvings=1, attention=False)
    images = torch.rand(2, 3, 8, 8)
    seen: list[Tensor] = []
    for stage in (network.coarse, network.dilated):
        stage.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for hole in (0.0, 1.0):
        holes = torch.full((2, 1, 8, 8), hole)
        coarse, _ = network.attempts(images, holes)
        first, second = seen[-2:]
        torch.testing.assert_close(first, torch.cat([2 * images - 1, torch.ones(2, 1, 8, 8), holes], 1))
        torch.testing.assert_close((second + 1) / 2, coarse if hole else images)


def attention_by_loops(x: Tensor, holes: Tensor, scale: int) -> Tensor:
    """Contextual attention of one image, patch by patch: features ``(c, s, s)`` and holes ``(scale s, scale s)``."""
    c, side, _ = x.shape
    grid, hidden = side // 2, F.pad(holes, [2 * scale] * 4)
    small, large = F.pad(x[:, ::2, ::2], [1] * 4), F.pad(x, [1] * 4)
    by_row = [(i, j) for i in range(grid) for j in range(grid)]
    by_column = [(i, j) for j in range(grid) for i in range(grid)]
    patch = {(i, j): small[:, i : i + 3, j : j + 3] for i, j in by_row}
    score = {(a, b): (patch[a] / max(patch[a].norm(), 1e-4) * patch[b]).sum() for a in by_row for b in by_row}
    for order in (by_row, by_column):
        pairs = [(k, m) for k in range(grid**2) for m in range(grid**2)]
        score = {
            (order[k], order[m]): torch.stack(
                [score[order[k + s], order[m + s]] for s in (-1, 0, 1) if {k + s, m + s} <= set(range(grid**2))]
            ).sum()
            for k, m in pairs
        }
    whole = {(i, j): not hidden[2 * scale * i :, 2 * scale * j :][: 6 * scale, : 6 * scale].any() for i, j in by_row}
    out = torch.zeros(c, side + 2, side + 2)
    for b in by_row:
        weights = torch.stack([10 * score[a, b] * whole[a] for a in by_row]).softmax(0)
        for weight, a in zip(weights, by_row, strict=True):
            pasted = large[:, 2 * a[0] : 2 * a[0] + 4, 2 * a[1] : 2 * a[1] + 4]
            out[:, 2 * b[0] : 2 * b[0] + 4, 2 * b[1] : 2 * b[1] + 4] += weight * whole[a] * pasted / 4
    return out[:, 1:-1, 1:-1]


@pytest.mark.parametrize(("side", "scale"), [(8, 2), (6, 4)])
def test_contextual_attention_is_the_published_one_image_by_image(side: int, scale: int) -> None:
    torch.manual_seed(0)
    x, holes = 0.3 * torch.rand(4, 2, side, side), torch.zeros(4, 1, scale * side, scale * side)
    x[0] *= 0.03  # faint, but patches are compared by their direction
    holes[1, 0, 0, 0] = 1  # one pixel bars the patches around it
    holes[2, 0, :, : scale * side // 3] = 1
    x[2, :, :2] = 0
    holes[3] = 1
    attended = ContextualAttention(side, scale)(x, holes)
    expected = torch.stack([attention_by_loops(x[i], holes[i, 0], scale) for i in range(4)])
    torch.testing.assert_close(attended, expected)
    assert (attended[3] == 0).all() and attended[:3].abs().amin(0).max() > 0


def test_contextual_attention_takes_nothing_from_holes() -> None:
    torch.manual_seed(0)
    attention, x, holes = ContextualAttention(8, 2), torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 16, 16)
    x[..., 3:] += 10
    assert attention(x, holes).max() > 10
    holes[..., 8:] = 1  # only patches with holes reach as far as the bright features
    assert 0 < attention(x, holes).max() <= 1


@pytest.mark.parametrize(
    ("size", "width", "widths", "scores"),
    [
        (256, 2, [2, 4, 8, 8, 8, 8], 8 * 16),
        (32, 3, [3, 6, 12], 12 * 16),
        (28, 3, [3, 6, 12], 12 * 16),
        (9, 2, [2, 4], 4 * 9),  # 9, 5, 3
        (8, 2, [2], 2 * 16),
        (4, 2, [2], 2 * 4),
    ],
)
def test_the_discriminator_brings_the_side_to_four(size: int, width: int, widths: list[int], scores: int) -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(channels=3, size=size, width=width)
    layers = [layer for layer in critic.layers if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in layers] == widths
    assert all((layer.kernel_size, layer.stride) == ((5, 5), (2, 2)) for layer in layers)
    assert critic(torch.rand(2, 3, size, size), torch.zeros(2, 1, size, size)).shape == (2, scores)


def test_the_discriminator_sees_images_and_holes_through_layers_of_norm_one() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(channels=3, size=32, width=8)
    images, holes = (tensor.requires_grad_() for tensor in scene(4, 3, 32))
    for _ in range(50):  # a power iteration each
        scores = critic(images, holes)
    critic.eval()
    for layer in critic.layers:
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)
    expected = torch.cat([2 * images - 1, holes], 1)
    for layer in critic.layers:
        if isinstance(layer, nn.Conv2d):
            out = F.conv2d(expected, layer.weight, layer.bias, stride=2, padding=2)
            expected = torch.where(out > 0, out, 0.2 * out)
    torch.testing.assert_close(critic(images, holes), expected.flatten(1))
    for gradient in torch.autograd.grad(scores.square().sum(), (images, holes)):
        assert gradient.abs().amin(0).max() > 0


def small_autoencoder(size: int = 8) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(
        channels=3, size=size, patch=2, width=16, depth=2, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2
    )


def test_the_encoder_sees_nothing_of_missing_patches() -> None:
    network, images = small_autoencoder(), torch.rand(2, 3, 8, 8)
    holes = torch.zeros(2, 1, 8, 8)
    holes[0, 0, 3, 4] = holes[1, 0, 5:, 5:] = 1  # a patch with one missing pixel is missing
    patches = F.max_pool2d(holes, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    other = torch.where(patches == 1, torch.rand_like(images), images)
    assert torch.equal(network(images, holes), network(other, holes))
    pixel = torch.zeros_like(images)
    pixel[1, 1, 0, 7] = 0.5  # of a patch that is seen, and has a part in every pixel
    changed = network.attempts(images + pixel, holes)[0] - network.attempts(images, holes)[0]
    assert (changed[0] == 0).all() and (changed[1] != 0).float().mean() > 0.99


def test_missing_patches_are_as_if_they_were_not_there() -> None:
    # MAE's own way: only the patches that are seen go through the encoder, a learnt token stands for all others.
    network, images, holes = small_autoencoder(), *scene(1, 3, 8, cells=4, missing=6)
    seen = (F.max_pool2d(holes, 2).flatten() == 0).nonzero().flatten()
    assert len(seen) == 10
    tokens = network.embed(2 * images - 1).flatten(2).transpose(1, 2) + network.positions[:, 1:]
    encoded = torch.cat([network.summary + network.positions[:, :1], tokens[:, seen]], 1)
    for block in network.encoder:
        encoded = block(encoded)
    encoded = network.narrow(network.norm(encoded))
    decoded = network.unknown.repeat(1, 17, 1)
    decoded[:, [0, *(1 + seen).tolist()]] = encoded
    patches = network.decoder(decoded + network.decoder_positions)[0, 1:]
    expected = torch.zeros(3, 8, 8)
    for k, patch in enumerate(patches.view(16, 3, 2, 2)):
        i, j = 2 * (k // 4), 2 * (k % 4)
        expected[:, i : i + 2, j : j + 2] = (patch + 1) / 2
    torch.testing.assert_close(network.attempts(images, holes)[0][0], expected)


def test_attention_has_heads_that_see_what_they_may() -> None:
    network, x = small_autoencoder(), torch.randn(1, 5, 16)
    block = network.encoder[0]
    weights = dict(block.named_parameters())  # the biases are 0 at first
    seen = torch.tensor([True, True, False, True, False])
    query, key, value = (weights["qkv.weight"] @ F.layer_norm(x[0], (16,), eps=1e-6).T).view(3, 2, 8, 5)
    heads = []
    for head in range(2):
        scores = (query[head].T @ key[head] / math.sqrt(8)).masked_fill(~seen, -math.inf)
        heads.append(scores.softmax(1) @ value[head].T)
    middle = x[0] + torch.cat(heads, 1) @ weights["project.weight"].T
    hidden = F.gelu(F.layer_norm(middle, (16,), eps=1e-6) @ weights["mlp.0.weight"].T)
    torch.testing.assert_close(block(x, seen.view(1, 1, 1, 5))[0], middle + hidden @ weights["mlp.2.weight"].T)


def test_positions_are_sines_and_cosines_of_row_and_column() -> None:
    network = small_autoencoder(size=12)
    assert network.positions.shape == (1, 37, 16) and network.decoder_positions.shape == (1, 37, 8)
    assert (network.positions[0, 0] == 0).all()
    for row, column in ((0, 0), (2, 5), (4, 1)):
        waves = [f(at * 10_000 ** (-k / 4)) for at in (row, column) for f in (math.sin, math.cos) for k in range(4)]
        torch.testing.assert_close(network.positions[0, 1 + 6 * row + column], torch.tensor(waves))
    assert not {"positions", "decoder_positions"} & set(network.state_dict())


class Grey(nn.Module):
    """A user's own purifier."""

    def __init__(self, channels: int, size: int, level: float = 0.5) -> None:
        super().__init__()
        self.level = level

    def forward(self, images: Tensor, holes: Tensor) -> Tensor:
        return torch.full_like(images, self.level) + 0 * holes


def small_inpainting(channels: int, size: int) -> Purifier:
    return Inpainting(channels=channels, size=size, width=4, halvings=1)


def no_module(channels: int, size: int) -> int:
    return 3


def test_users_bring_purifiers_of_their_own() -> None:
    grey = build_purifier(f"{__name__}:Grey", channels=3, size=8, level=0.25)
    assert isinstance(grey, Plain) and isinstance(grey.network, Grey)
    assert torch.equal(grey(*scene(2, 3, 8)), torch.full((2, 3, 8, 8), 0.25))
    assert isinstance(build_purifier(f"{__name__}:small_inpainting", channels=1, size=8), Inpainting)
    assert purifier_options("anything.at.all:purifier") == {}


@pytest.mark.parametrize(
    ("name", "size", "options", "message"),
    [
        ("inpaint", 32, {}, "no purifier 'inpaint'; did you mean 'inpainting'"),
        ("gan", 32, {}, "no purifier 'gan'; there are: inpainting, masked-autoencoder, package.module:function"),
        ("inpainting", 32, {"widht": 8}, "no option of purifier inpainting 'widht'; did you mean 'width'"),
        ("inpainting", 32, {"width": 8.0}, "purifier inpainting: width: Input should be a valid integer, got 8.0"),
        ("inpainting", 32, {"width": True}, "purifier inpainting: width: Input should be a valid integer, got True"),
        ("inpainting", 32, {"attention": 1}, "purifier inpainting: attention: Input should be a valid boolean, got 1"),
        ("inpainting", 32, {"width": 0}, "purifier inpainting: width is at least 1, got 0"),
        ("inpainting", 32, {"dilations": 0}, "purifier inpainting: dilations is at least 1, got 0"),
        ("inpainting", 32, {"width": 6}, "purifier inpainting: width is a multiple of 4, got 6"),
        ("inpainting", 32, {"halvings": 0}, "purifier inpainting: halvings is at least 1, got 0"),
        ("inpainting", 28, {}, "with 2 halvings and attention the images' side is a multiple of 8, got 28"),
        ("inpainting", 30, {"attention": False}, "with 2 halvings the images' side is a multiple of 4, got 30"),
        ("masked-autoencoder", 30, {}, "purifier masked-autoencoder: patch divides the images' side, 30, got 4"),
        ("masked-autoencoder", 32, {"width": 27}, "width is a multiple of 4 and of heads, 3, got 27"),
        ("masked-autoencoder", 32, {"width": 16}, "width is a multiple of 4 and of heads, 3, got 16"),
        ("masked-autoencoder", 32, {"decoder_heads": 5}, "decoder_width is a multiple .* of decoder_heads, 5, got 128"),
        ("no_such.package:f", 32, {}, "cannot get a purifier from no_such.package:f: No module named 'no_such'"),
        (f"{__name__}:nowhere", 32, {}, "cannot get a purifier from .*:nowhere: .* no attribute 'nowhere'"),
        (f"{__name__}:Grey", 32, {"colour": 3}, "cannot get a purifier from .*:Grey: .*unexpected keyword.*'colour'"),
        (f"{__name__}:small_inpainting", 30, {}, "cannot get a purifier from .*: with 1 halvings and attention"),
        (f"{__name__}:no_module", 32, {}, "test_purifiers:no_module returns int, not a torch module"),
        (":f", 32, {}, "cannot get a purifier from :f: Empty module name"),
    ],
)
def test_wrong_names_and_options_are_said_in_one_line(
    name: str, size: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        build_purifier(name, channels=3, size=size, **options)
    assert "\n" not in str(raised.value)


def test_options_are_asked_of_known_names_only() -> None:
    with pytest.raises(UserError, match="no purifier 'masked_autoencoder'; did you mean 'masked-autoencoder'"):
        purifier_options("masked_autoencoder")
