"""Spatial threats and their attacks: a warp is what the formula says, and the attacks never leave what is allowed."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from redan.attacks import APGD, FGSM, PGD, SearchModel
from redan.attacks.autoattack import AutoAttack
from redan.attacks.base import Attack
from redan.attacks.fmn import FMN
from redan.attacks.objectives import cw_margin
from redan.attacks.rotation import RandomRotation, RotationGrid
from redan.attacks.stadv import StAdv, roughness
from redan.errors import UserError
from redan.evaluation.evaluate import evaluate
from redan.recipes.schema import load_recipe
from redan.spatial import Flow, RotationTranslation
from redan.threats import Linf, Threat, parse_threat

Array = NDArray[np.float64]

ATTACKS: dict[str, Attack] = {
    "stadv": StAdv(Flow(0.3), steps=20),
    "grid": RotationGrid(RotationTranslation(30, 1), rotations=5, shifts=3),
    "random": RandomRotation(RotationTranslation(30, 1)),
}
EVERY = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def draws(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=draws(seed))


def bilinear(image: Array, y: float, x: float, *, black_outside: bool) -> float:
    """The value at a place in pixels, the first pixel's centre being (0, 0)."""
    h, w = image.shape
    total = 0.0
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            weight = (1 - abs(y - i)) * (1 - abs(x - j))
            inside = 0 <= i < h and 0 <= j < w
            total += weight * (image[np.clip(i, 0, h - 1), np.clip(j, 0, w - 1)] if inside or not black_outside else 0)
    return total


# Warps


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (32, 32)])
def test_no_flow_is_the_identity(size: tuple[int, int]) -> None:
    images = uniform(0, 3, 2, *size)
    warped = Flow(0.1).warp(images, torch.zeros(3, *size, 2))
    torch.testing.assert_close(warped, images, rtol=0, atol=1e-5)
    threat = RotationTranslation(30, 3)
    torch.testing.assert_close(threat.warp(images, torch.zeros(3), torch.zeros(3, 2)), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("right", "down"), [(1, 0), (0, 1), (-2, 1), (3, -3)])
def test_whole_pixels_shift_the_image(right: int, down: int) -> None:
    images = uniform(1, 2, 3, 6, 8)
    moved = RotationTranslation(0, 3).warp(images, torch.zeros(2), torch.tensor([[right, down]] * 2).float())
    expected = torch.zeros_like(images)
    for i in range(6):
        for j in range(8):
            if 0 <= i - down < 6 and 0 <= j - right < 8:
                expected[:, :, i, j] = images[:, :, i - down, j - right]
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


def test_a_flow_of_whole_pixels_fetches_the_neighbour() -> None:
    images = uniform(2, 1, 1, 4, 8)
    flow = torch.zeros(1, 4, 8, 2)
    flow[..., 0] = 2 / 8  # one pixel of eight, rightwards
    expected = torch.cat([images[..., 1:], images[..., -1:]], 3)  # beyond the edge, more of the edge
    torch.testing.assert_close(Flow(0.25).warp(images, flow), expected, rtol=0, atol=1e-5)
    flow = torch.zeros(1, 4, 8, 2)
    flow[..., 1] = -2 / 4  # one pixel of four, upwards
    expected = torch.cat([images[:, :, :1], images[:, :, :-1]], 2)
    torch.testing.assert_close(Flow(0.5).warp(images, flow), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 6), (5, 8)])
@pytest.mark.parametrize("radius", [0.05, 0.7])
def test_a_flow_is_bilinear_interpolation(size: tuple[int, int], radius: float) -> None:
    h, w = size
    images, flow = uniform(3, 1, 1, h, w), radius * (2 * uniform(4, 1, h, w, 2) - 1)
    got, image, offset = Flow(radius).warp(images, flow)[0, 0], images[0, 0].double().numpy(), flow[0].double().numpy()
    for i in range(h):
        for j in range(w):
            y, x = i + offset[i, j, 1] * h / 2, j + offset[i, j, 0] * w / 2
            assert got[i, j] == pytest.approx(bilinear(image, y, x, black_outside=False), abs=1e-5)


@pytest.mark.parametrize("turns", [-1, 0, 1, 2])
def test_quarter_turns_are_those_of_torch(turns: int) -> None:
    images = uniform(5, 2, 3, 7, 7)
    turned = RotationTranslation(180, 0).warp(images, torch.full((2,), 90.0 * turns), torch.zeros(2, 2))
    torch.testing.assert_close(turned, torch.rot90(images, turns, (2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 6), (5, 8)])
@pytest.mark.parametrize(("degrees", "right", "down"), [(30.0, 0.0, 0.0), (-17.0, 1.5, -0.5), (100.0, -2.25, 3.0)])
def test_a_rotation_goes_first_and_a_translation_second(
    size: tuple[int, int], degrees: float, right: float, down: float
) -> None:
    # Where the formulas of a rotation send a pixel, there its value is found again.
    h, w = size
    images = uniform(6, 1, 1, h, w)
    got = RotationTranslation(180, 3).warp(images, torch.tensor([degrees]), torch.tensor([[right, down]]))[0, 0]
    angle = math.radians(degrees)
    for i in range(h):
        for j in range(w):
            x, y = j - (w - 1) / 2 - right, i - (h - 1) / 2 - down  # undo the translation; y points down
            back_x = math.cos(angle) * x - math.sin(angle) * y
            back_y = math.sin(angle) * x + math.cos(angle) * y
            place = back_y + (h - 1) / 2, back_x + (w - 1) / 2
            expected = bilinear(images[0, 0].double().numpy(), *place, black_outside=True)
            assert got[i, j] == pytest.approx(expected, abs=1e-5)


def test_a_rotation_is_counter_clockwise_and_a_translation_goes_right_and_down() -> None:
    images = torch.zeros(1, 1, 9, 9)
    images[0, 0, 4, 7] = 1  # right of the centre
    threat = RotationTranslation(90, 3)
    up = threat.warp(images, torch.tensor([90.0]), torch.zeros(1, 2))
    assert up[0, 0].argmax() == 1 * 9 + 4
    moved = threat.warp(images, torch.tensor([90.0]), torch.tensor([[2.0, 3.0]]))
    assert moved[0, 0].argmax() == 4 * 9 + 6


@given(seed=st.integers(0, 2**32), h=st.integers(1, 9), w=st.integers(1, 9), radius=st.sampled_from([0.0, 0.05, 3.0]))
@settings(deadline=None, max_examples=80)
def test_warps_stay_in_the_box_and_within_the_image_s_own_range(seed: int, h: int, w: int, radius: float) -> None:
    images = (3 * uniform(seed, 2, 1, h, w) - 1).clamp(0, 1)
    flow = Flow(radius)
    warped = flow.warp(images, flow.project(torch.randn(2, h, w, 2, generator=draws(seed + 1))))
    assert flow.contains(warped, images).all()
    assert warped.amax() <= images.amax() + 1e-6
    assert warped.amin() >= images.amin() - 1e-6
    turn = RotationTranslation(180, 5)
    turned = turn.warp(images, *turn.draw(images, draws(seed)))
    assert turn.contains(turned, images).all()
    assert turned.amax() <= images.amax() + 1e-6


def test_white_pixels_keep_their_gradient() -> None:
    # The four weights may sum to a little over 1: clamping that must not hide which way is darker.
    images = torch.zeros(1, 1, 1, 64)
    images[..., ::2] = 1.0
    leaf = torch.full((1, 1, 64, 2), 1e-7, requires_grad=True)
    Flow(0.1).warp(images, leaf).sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad[0, 0, 2:-2, 0] != 0).all()


@given(seed=st.integers(0, 2**32), radius=st.floats(0, 2))
@settings(deadline=None, max_examples=50)
def test_a_projected_flow_is_inside_and_nearest(seed: int, radius: float) -> None:
    flow = torch.randn(1, 3, 4, 2, generator=draws(seed))
    projected = Flow(radius).project(flow)
    assert projected.abs().amax() <= np.float32(radius)
    inside = flow.abs() <= radius
    assert torch.equal(projected[inside], flow[inside])
    torch.testing.assert_close(projected[~inside].abs(), torch.full_like(projected[~inside], radius))


def test_draws_are_uniform_in_what_is_allowed() -> None:
    threat, images = RotationTranslation(30, 3), torch.zeros(20_000, 1, 1, 1)
    degrees, shift = threat.draw(images, draws())
    for sample, bound in ((degrees, 30), (shift[:, 0], 3), (shift[:, 1], 3)):
        assert sample.abs().max() <= bound
        assert sample.mean().item() == pytest.approx(0, abs=0.02 * bound)
        assert sample.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([degrees, shift[:, 0]]))[0, 1])) < 0.03


def test_contains_looks_at_the_box_alone() -> None:
    center = torch.zeros(4, 1, 1, 2)
    images = torch.tensor([[0.0, 1.0], [-1e-6, 0.5], [1 + 1e-6, 0.5], [math.nan, 0.5]]).view(4, 1, 1, 2)
    for threat in (Flow(0.0), RotationTranslation(0, 0)):
        assert threat.contains(images, center).tolist() == [True, False, False, False]


def test_roughness_is_the_sum_over_the_four_neighbours() -> None:
    flow = torch.randn(2, 4, 5, 2, generator=draws(7))
    expected = [0.0, 0.0]
    for k in range(2):
        for i in range(4):
            for j in range(5):
                for p, q in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                    if 0 <= p < 4 and 0 <= q < 5:
                        expected[k] += float((flow[k, i, j] - flow[k, p, q]).norm())
    torch.testing.assert_close(roughness(flow), torch.tensor(expected), rtol=1e-5, atol=0)
    assert (roughness(torch.ones(1, 4, 5, 2)) < 1e-3).all()  # a translation is smooth


# Texts


@pytest.mark.parametrize(
    ("text", "threat"),
    [
        ("stadv:0.05", Flow(0.05)),
        ("stadv:1/20", Flow(0.05)),
        ("rotation:30+3", RotationTranslation(30, 3)),
        ("rotation:0+1.5", RotationTranslation(0, 1.5)),
    ],
)
def test_texts_name_threats(text: str, threat: Threat) -> None:
    assert parse_threat(text) == threat
    assert parse_threat(str(threat)) == threat


def test_a_spatial_threat_s_text_says_what_it_is() -> None:
    assert str(Flow(0.05)) == "stadv:0.05"
    assert str(RotationTranslation(30.0, 3.0)) == "rotation:30+3"


@given(degrees=st.floats(0, 180), shift=st.floats(0, 1e6))
@settings(deadline=None)
def test_text_and_threat_are_one_to_one(degrees: float, shift: float) -> None:
    assert parse_threat(str(RotationTranslation(degrees, shift))) == RotationTranslation(degrees, shift)
    assert parse_threat(str(Flow(shift))) == Flow(shift)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stadv:-1", "a threat's radius is a number of at least 0, got -1.0"),
        ("stadv:far", "'far' is not a number"),
        ("stad:0.05", "no threat 'stad'; did you mean 'stadv'"),
        ("rotation:30", "a rotation is written rotation:DEGREES\\+PIXELS, such as rotation:30\\+3, got 'rotation:30'"),
        ("rotation:30+", "'' is not a number"),
        ("rotation:181+0", "at most 180 degrees to either side, got 181"),
        ("rotation:30+-3", "a threat's translation is a number of at least 0, got -3"),
    ],
)
def test_what_is_no_threat_is_said_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        parse_threat(text)
    assert "\n" not in str(raised.value)


# Attacks


class Template(nn.Module):
    """Class 1 where the images resemble a pattern by more than a threshold."""

    def __init__(self, pattern: Tensor, threshold: float) -> None:
        super().__init__()
        self.pattern, self.threshold = nn.Parameter(pattern.flatten()), threshold

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ self.pattern - self.threshold
        return torch.stack([torch.zeros_like(z), z], 1)


def blob(y: float, x: float, size: int = 12) -> Tensor:
    """A smooth bright spot, ``(1, 1, size, size)``."""
    axis = torch.arange(size, dtype=torch.float32)
    return torch.exp(-((axis[:, None] - y) ** 2 + (axis[None] - x) ** 2) / 6)[None, None]


@pytest.mark.parametrize(("radius", "breaks"), [(0.4, True), (0.1, False)])
def test_stadv_moves_a_spot_as_far_as_it_may(radius: float, breaks: bool) -> None:
    # The model wants the spot 1.5 pixels further right; the flow may move things by 6 * radius pixels.
    image, target = blob(5.5, 5.0), blob(5.5, 6.5)
    pattern = target - image
    moved = float((blob(5.5, 6.0) * pattern).sum())  # a pixel on the way
    model = Template(pattern, moved)
    outcome = StAdv(Flow(radius)).run(SearchModel(model), image, torch.tensor([0]), draws())
    assert (model(outcome.images).argmax(1) == 1).all() == breaks


def test_a_larger_radius_moves_a_spot_further() -> None:
    image, labels = blob(5.5, 5.0), torch.tensor([0])
    model = SearchModel(Template(blob(5.5, 6.5) - image, 10.0), precision="float32")

    def margin(radius: float) -> float:
        attacked = StAdv(Flow(radius), tau=0.0)(model, image, labels, generator=draws())
        return cw_margin(model.exact_logits(attacked), labels).item()

    margins = [margin(radius) for radius in (0.0, 0.05, 0.1, 0.2)]
    assert margins == sorted(margins)
    assert margins[-1] > margins[0] + 1


def test_stadv_reaches_the_optimum_of_a_single_row() -> None:
    # A ramp: each pixel's value is its place, so the best flow is the whole radius, up or down as the weight's sign has
    # it, and each of the five pixels with a weight gains radius * side / 2 * slope.
    w = torch.tensor([0.0, 0.0, 1.0, -1.0, 1.0, 1.0, -1.0, 0.0, 0.0, 0.0])
    image = torch.linspace(0.05, 0.95, 10).view(1, 1, 1, 10)
    model = SearchModel(Template(w, 100.0), precision="float32")
    attacked = StAdv(Flow(0.1), tau=0.0)(model, image, torch.tensor([0]), generator=draws())
    gain = float((attacked - image).flatten() @ w)
    assert gain == pytest.approx(5 * 0.1 * 5 * 0.1, rel=1e-3)


def test_smoothness_has_its_price_and_its_effect() -> None:
    w = torch.tensor([0.0, 0.0, 1.0, -1.0, 1.0, 1.0, -1.0, 0.0, 0.0, 0.0])
    image = torch.linspace(0.05, 0.95, 10).view(1, 1, 1, 10)
    model = SearchModel(Template(w, 100.0), precision="float32")

    def gain(tau: float) -> float:
        attacked = StAdv(Flow(0.1), tau=tau)(model, image, torch.tensor([0]), generator=draws())
        return float((attacked - image).flatten() @ w)

    assert gain(0.0) > gain(0.15) + 0.02 > gain(10.0) + 0.04


@pytest.mark.parametrize("attack", [StAdv(Flow(0.0)), RotationGrid(RotationTranslation(0, 0))], ids=["stadv", "grid"])
def test_a_radius_of_zero_leaves_the_image(attack: Attack) -> None:
    images = uniform(0, 3, 1, 6, 6)
    attacked = attack(Template(torch.randn(36, generator=draws()), 100.0), images, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(attacked, images, rtol=0, atol=1e-5)


def test_the_grid_has_its_corners_its_centre_and_the_published_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float, float]] = []
    original = RotationTranslation.warp

    def spy(self: RotationTranslation, images: Tensor, degrees: Tensor, shift: Tensor) -> Tensor:
        seen.append((float(degrees[0]), float(shift[0, 0]), float(shift[0, 1])))
        return original(self, images, degrees, shift)

    monkeypatch.setattr(RotationTranslation, "warp", spy)
    attack = RotationGrid(RotationTranslation(30, 3))
    images = uniform(0, 2, 1, 4, 4)
    outcome = attack.run(SearchModel(Template(torch.ones(16), 100.0)), images, torch.tensor([0, 0]), None)
    assert len(set(seen)) == len(seen) == 31 * 5 * 5
    assert {(30.0, 3.0, 3.0), (-30.0, -3.0, 3.0), (0.0, 0.0, 0.0), (-2.0, 1.5, -1.5)} <= set(seen)
    assert (outcome.calls == 775 + 1).all()  # and the last look of the original


def test_the_grid_finds_the_one_rotation_that_breaks() -> None:
    pattern = (blob(3.0, 8.0) + blob(8.0, 4.0)) / 2
    threat = RotationTranslation(30, 2)
    turned = threat.warp(pattern, torch.tensor([20.0]), torch.tensor([[1.0, 0.0]]))
    model = Template(turned, 0.999 * float(turned.square().sum()))
    labels = torch.tensor([0])
    assert model(pattern).argmax(1) == 0
    assert model(RotationGrid(threat)(model, pattern, labels)).argmax(1) == 1
    assert model(RotationGrid(threat, rotations=1)(model, pattern, labels)).argmax(1) == 0
    assert model(RotationGrid(threat, shifts=1)(model, pattern, labels)).argmax(1) == 0


def test_who_withstands_is_left_with_the_worst_try() -> None:
    model = SearchModel(Template(blob(5.5, 8.5), 100.0), precision="float32")
    image = blob(5.5, 5.5)
    attacked = RotationGrid(RotationTranslation(0, 3), rotations=1, shifts=7)(model, image, torch.tensor([0]))
    torch.testing.assert_close(attacked[..., 3:], image[..., :-3], rtol=0, atol=1e-5)


def test_more_random_tries_break_more() -> None:
    threat, images = RotationTranslation(5, 0.3), uniform(1, 200, 1, 6, 6)
    pattern = torch.randn(36, generator=draws(2))
    model = Template(pattern, 0.5 * float(pattern.sum()))
    labels = model(images).argmax(1)

    def broken(tries: int) -> int:
        attacked = RandomRotation(threat, tries)(model, images, labels, generator=draws())
        return int((model(attacked).argmax(1) != labels).sum())

    assert 0 < broken(1) < broken(4) < broken(30) < 200


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


@EVERY
def test_what_is_found_is_valid_confirmed_and_reproducible(attack: Attack, net: nn.Module) -> None:
    images = uniform(3, 12, 1, 8, 8)
    labels, before = net(images).argmax(1), images.clone()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    outcome = attack.run(SearchModel(net), images, labels, draws(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert outcome.images.dtype == torch.float32
    assert attack.threat.contains(outcome.images, images).all()
    dropped = outcome.calls < outcome.calls.max()
    assert (net(outcome.images).argmax(1) != labels)[dropped].all()
    assert torch.equal(outcome.images, attack.run(SearchModel(net), images, labels, draws(1)).images)
    with torch.inference_mode():
        assert torch.equal(outcome.images, attack(net, images.clone(), labels, generator=draws(1)))
    assert torch.equal(images, before)
    assert all(parameter.grad is None for parameter in net.parameters())


@EVERY
def test_the_generator_decides_where_anything_is_random(attack: Attack) -> None:
    model, images = Template(torch.randn(64, generator=draws(1)), 1e3), uniform(3, 4, 1, 8, 8)
    first, second = (attack(model, images, torch.zeros(4, dtype=torch.int64), generator=draws(s)) for s in (0, 1))
    assert torch.equal(first, second) == isinstance(attack, RotationGrid)


@EVERY
def test_an_image_that_is_broken_already_costs_two_calls(attack: Attack) -> None:
    images = uniform(3, 4, 1, 8, 8)
    wrong = torch.ones(4, dtype=torch.int64)
    constant = Template(torch.zeros(64), 1.0)  # class 0, whatever it sees
    outcome = attack.run(SearchModel(constant), images, wrong, draws())
    assert (outcome.calls == 2).all()


@EVERY
def test_without_a_gradient_and_without_images_nothing_breaks_down(attack: Attack) -> None:
    images, labels = uniform(3, 2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    attacked = attack(Template(torch.zeros(64), 1.0), images, labels, generator=draws())
    assert torch.isfinite(attacked).all()
    empty = attack(Template(torch.zeros(64), 1.0), images[:0], labels[:0], generator=draws())
    assert empty.shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("kind", "threat", "message"),
    [
        (StAdv, Linf(8 / 255), "StAdv needs a flow threat such as stadv:0.05, got linf:8/255"),
        (StAdv, RotationTranslation(30, 3), r"StAdv needs a flow threat such as stadv:0.05, got rotation:30\+3"),
        (RotationGrid, Flow(0.05), r"RotationGrid needs a rotation threat such as rotation:30\+3, got stadv:0.05"),
        (RandomRotation, Linf(0.1), r"RandomRotation needs a rotation threat such as rotation:30\+3, got linf:0.1"),
        (StAdv, "stadv:0.05", "StAdv needs a flow threat such as stadv:0.05, got 'stadv:0.05'"),
    ],
)
def test_another_threat_is_refused_in_one_line(kind: Any, threat: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        kind(threat)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [FGSM, PGD, APGD, AutoAttack, FMN])
@pytest.mark.parametrize("threat", [Flow(0.05), RotationTranslation(30, 3)], ids=str)
def test_attacks_on_balls_refuse_spatial_threats_in_one_line(kind: Any, threat: Threat) -> None:
    with pytest.raises(UserError) as raised:
        kind(threat)
    assert str(raised.value) == f"{kind.__name__} needs an Lp threat such as linf:8/255, got {threat}"


def test_recipes_and_evaluation_refuse_spatial_threats_in_one_line(net: nn.Module) -> None:
    with pytest.raises(UserError, match="^a recipe needs an Lp threat such as linf:8/255, got stadv:0.05$"):
        load_recipe("pgd-at-digits", {"threat": "stadv:0.05"})
    for threat in ("rotation:30+3", RotationTranslation(30, 3)):
        with pytest.raises(UserError, match=r"^PGD needs an Lp threat such as linf:8/255, got rotation:30\+3$"):
            evaluate(net, threat=threat, attack="pgd-5", data="digits", progress=False)


@pytest.mark.parametrize(
    ("kind", "threat", "options", "message"),
    [
        (StAdv, Flow(0.1), {"steps": 0}, "at least 1 step, got 0"),
        (StAdv, Flow(0.1), {"tau": -1.0}, "tau of at least 0, got -1.0"),
        (StAdv, Flow(0.1), {"tau": math.nan}, "tau of at least 0, got nan"),
        (RotationGrid, RotationTranslation(30, 3), {"rotations": 0}, "at least 1 rotation and 1 shift, got 0 and 5"),
        (RotationGrid, RotationTranslation(30, 3), {"shifts": 0}, "at least 1 rotation and 1 shift, got 31 and 0"),
        (RandomRotation, RotationTranslation(30, 3), {"tries": 0}, "at least 1 try, got 0"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(kind: Any, threat: Threat, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        kind(threat, **options)
    assert "\n" not in str(raised.value)
