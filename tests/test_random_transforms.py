"""The random transforms of AToP, cell by cell; and a classifier behind a purifier as one network that draws."""

import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from redan.attacks.objectives import cross_entropy
from redan.attacks.search import SearchModel
from redan.errors import UserError
from redan.models.purified import Purified
from redan.models.purifiers.base import Purifier
from redan.models.purifiers.registry import build_purifier
from redan.models.random_transforms import Draw, Masks, RandomTransform, build_transform, transform_options

NAMES = ("rt1", "rt2", "rt3")
TINY: list[tuple[str, dict[str, Any]]] = [
    ("inpainting", {"width": 4, "halvings": 1, "dilations": 2, "attention": False}),
    ("masked-autoencoder", {"patch": 2, "width": 8, "depth": 1, "heads": 2, "decoder_width": 8, "decoder_depth": 1}),
]


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 3, channels: int = 2, size: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, size, size, generator=generator(seed))


def sample(transform: RandomTransform, of: Tensor, seed: int = 1) -> Draw:
    return transform.sample(of, generator(seed))


class Wavy(Purifier):
    """Any function of what is seen, here and elsewhere, and of the holes, with values in [0.2, 0.8]."""

    criterion = "l1"

    def attempts(self, images: Tensor, holes: Tensor) -> tuple[Tensor, ...]:
        return (0.5 + 0.3 * torch.sin(7 * images + 3 * images.roll((1, 3), (2, 3)) + 2 * holes),)


def tiny(name: str, **options: Any) -> Purifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_purifier(name, channels=2, size=8, **options)


def classifier(seed: int = 0, channels: int = 2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)).eval()


def purified(votes: int = 1, **options: Any) -> Purified:
    return Purified(RandomTransform(size=8, **options), Wavy(), classifier(), votes=votes).eval()


# Holes.


@pytest.mark.parametrize(("cells", "missing"), [(8, 0.25), (8, 0.29), (4, 0.25), (8, 0.0), (2, 0.75), (1, 0.5)])
@pytest.mark.parametrize("size", [8, 16])
def test_so_many_whole_cells_are_missing(size: int, cells: int, missing: float) -> None:
    transform = RandomTransform(size=size, cells=cells, missing=missing)
    holes = sample(transform, images(20, size=size)).holes
    assert holes.shape == (1, 20, 1, size, size) and set(holes.unique().tolist()) <= {0.0, 1.0}
    side = size // cells
    corners = holes[..., ::side, ::side]
    assert torch.equal(corners.repeat_interleave(side, 3).repeat_interleave(side, 4), holes)
    assert corners.flatten(1).view(20, -1).sum(1).eq(int(missing * cells**2)).all()


def test_every_cell_is_as_often_missing_and_independently_of_the_next() -> None:
    holes = sample(RandomTransform(size=8), images(4000, 1)).holes[0].flatten(1)
    # 16 of 64 without replacement: two given cells are both missing with probability 16/64 * 15/63.
    together = holes.T @ holes / 4000
    assert (together.diagonal() - 1 / 4).abs().max() < 5 * (3 / 16 / 4000) ** 0.5
    apart = together[~torch.eye(64, dtype=torch.bool)]
    assert (apart - 15 / 252).abs().max() < 5.5 * (15 / 252 / 4000) ** 0.5
    assert apart.mean() == pytest.approx(15 / 252, rel=1e-4)


@pytest.mark.parametrize(("missing", "views"), [(0.25, 4), (0.5, 2), (1 / 64, 64)])
@pytest.mark.parametrize("masks", ["image", "batch", "fixed"])
def test_the_holes_of_rt3_partition_the_image(missing: float, views: int, masks: Masks) -> None:
    transform = build_transform("rt3", size=16, missing=missing, masks=masks)
    holes = sample(transform, images(5, size=16)).holes
    assert holes.shape == (views, 5 if masks == "image" else 1, 1, 16, 16) and transform.views == views
    assert torch.equal(holes.sum(0), torch.ones_like(holes[0]))
    assert (holes.flatten(1).view(views, -1, 256).sum(2) == 256 / views).all()


@pytest.mark.parametrize("masks", ["image", "batch", "fixed"])
@pytest.mark.parametrize("name", NAMES)
def test_who_shares_a_mask_and_that_nobody_shares_noise(name: str, masks: Masks) -> None:
    transform, of = build_transform(name, size=8, masks=masks, sigma=0.2), images(4)
    first, second = sample(transform, of, 1), sample(transform, of, 2)
    rows = first.holes.expand(transform.views, 4, 1, 8, 8)
    shared = all(torch.equal(rows[:, 0], rows[:, i]) for i in range(1, 4))
    assert shared == (masks != "image")
    assert torch.equal(first.holes, second.holes) == (masks == "fixed")
    assert torch.equal(first.holes, build_transform(name, size=8, masks=masks).sample(of).holes) == (masks == "fixed")
    every = torch.cat([first.noise, second.noise])
    assert every.shape == (8, 2, 8, 8) and len(every.flatten(1).unique(dim=0)) == 8


# Where the randomness comes from.


@pytest.mark.parametrize("masks", ["image", "batch", "fixed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_generator_gives_the_same_draw_and_leaves_torchs_own_alone(name: str, masks: Masks) -> None:
    transform, of = build_transform(name, size=8, masks=masks), images()
    before = torch.get_rng_state()
    first, again = sample(transform, of), sample(transform, of)
    assert torch.equal(first.noise, again.noise) and torch.equal(first.holes, again.holes)
    seen, holes = transform(of, first)
    assert torch.equal(seen, transform(of, again)[0]) and torch.equal(holes, transform(of, again)[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_torchs_own_one_draws() -> None:
    transform, of = RandomTransform(size=8), images()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = transform.sample(of), transform.sample(of)
        torch.manual_seed(3)
        again = transform.sample(of)
        mine = sample(transform, of, 3)
    assert torch.equal(first.noise, again.noise) and torch.equal(first.holes, again.holes)
    assert torch.equal(first.noise, mine.noise) and torch.equal(first.holes, mine.holes)
    assert not torch.equal(first.noise, second.noise) and not torch.equal(first.holes, second.holes)


def test_without_sigma_no_noise_is_drawn() -> None:
    draws, of = generator(), images()
    draw = build_transform("rt1", size=8).sample(of, draws)
    assert torch.equal(draw.noise, torch.zeros_like(of))
    spent = generator()
    torch.rand(3, 64, generator=spent)  # what the masks take
    assert torch.equal(draws.get_state(), spent.get_state())
    before = torch.get_rng_state()
    build_transform("rt1", size=8, masks="fixed").sample(of)
    assert torch.equal(torch.get_rng_state(), before)


# What is left to be seen.


def test_noise_has_its_deviation_and_is_cut_to_the_range_of_images() -> None:
    transform = RandomTransform(size=8, sigma=0.05, missing=0)
    middle = torch.full((500, 1, 8, 8), 0.5)
    seen, holes = transform(middle, sample(transform, middle))
    assert not holes.any()
    assert (seen - middle).std() == pytest.approx(0.05, rel=0.02) and (seen - middle).mean().abs() < 0.002
    loud = RandomTransform(size=8, sigma=0.5, missing=0)
    draw = sample(loud, middle)
    seen, _ = loud(middle, draw)
    assert torch.equal(seen, (middle + draw.noise).clamp(0, 1))
    assert seen.amin() == 0 and seen.amax() == 1
    assert (seen == 1).float().mean() == pytest.approx(1 - 0.8413, abs=0.01)  # beyond one deviation


@pytest.mark.parametrize("name", NAMES)
def test_missing_pixels_are_grey_and_the_others_noisy_images(name: str) -> None:
    transform, of = build_transform(name, size=8, sigma=0.1), images()
    draw = sample(transform, of)
    seen, holes = transform(of, draw)
    views = transform.views
    assert seen.shape == (views * 3, 2, 8, 8) and holes.shape == (views * 3, 1, 8, 8)
    for i in range(views):
        part = slice(3 * i, 3 * i + 3)
        assert torch.equal(holes[part], draw.holes[i])
        expected = torch.where(draw.holes[i] == 1, torch.tensor(0.5), (of + draw.noise).clamp(0, 1))
        assert torch.equal(seen[part], expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masks", ["image", "batch", "fixed"])
def test_a_draw_for_one_image_is_that_of_all(name: str, masks: Masks) -> None:
    transform, of = build_transform(name, size=8, masks=masks), images(4)
    draw = sample(transform, of[:1])
    seen, holes = transform(of, draw)
    for i in range(4):
        alone, theirs = transform(of[i : i + 1], draw)
        assert torch.equal(seen.unflatten(0, (-1, 4))[:, i], alone)
        assert torch.equal(holes.unflatten(0, (-1, 4))[:, i], theirs)


def test_without_missing_pixels_and_noise_images_are_left() -> None:
    transform, of = RandomTransform(size=8, sigma=0, missing=0), images()
    assert torch.equal(transform(of, transform.sample(of))[0], of)


# RT3: every pixel of the whole was missing once.


@pytest.mark.parametrize("masks", ["image", "batch", "fixed"])
@pytest.mark.parametrize("missing", [0.25, 0.5])
def test_rt3_joins_what_was_missing_of_each_view(masks: Masks, missing: float) -> None:
    whole = Purified(build_transform("rt3", size=8, masks=masks, missing=missing), Wavy(), classifier())
    of, draw = images(), sample(whole.transform, images())
    x = (of + draw.noise).clamp(0, 1)
    expected = torch.zeros_like(of)
    for m in draw.holes:
        m = m.expand(3, 1, 8, 8)
        expected += m * whole.purifier((1 - m) * x + m * 0.5, m)
    assert torch.equal(whole.purify(of, draw), expected)


@pytest.mark.parametrize(("name", "options"), TINY)
def test_rt3_joins_any_purifiers_views(name: str, options: dict[str, Any]) -> None:
    whole = Purified(build_transform("rt3", size=8), tiny(name, **options), classifier()).double()
    of = images().double()
    draw = sample(whole.transform, of)
    x = (of + draw.noise).clamp(0, 1)
    expected = torch.stack([m * whole.purifier((1 - m) * x + m * 0.5, m) for m in draw.holes]).sum(0)
    torch.testing.assert_close(whole.purify(of, draw), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["rt1", "rt2"])
def test_without_cover_all_that_the_purifier_makes_is_taken(name: str) -> None:
    whole = Purified(build_transform(name, size=8), Wavy(), classifier())
    draw = sample(whole.transform, images())
    assert torch.equal(whole.purify(images(), draw), whole.purifier(*whole.transform(images(), draw)))


# Options.


def test_the_names_are_the_papers_transforms() -> None:
    first, second, third = (build_transform(name, size=32) for name in NAMES)
    assert (first.sigma, first.views, first.hidden) == (0, 1, 16)
    assert (second.sigma, second.views, second.hidden) == (0.25, 1, 16)
    assert (third.sigma, third.views, third.hidden) == (0.25, 4, 16)
    assert all(transform.cells == 8 and transform.masks == "image" for transform in (first, second, third))
    assert transform_options("rt1") == {"sigma": 0.0, "missing": 0.25, "cells": 8, "masks": "image"}
    assert transform_options("rt2") == transform_options("rt3") == transform_options("rt1") | {"sigma": 0.25}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rt4", {}, "no transform 'rt4'; did you mean 'rt"),
        ("rt2", {"sigm": 1}, "no option of transform rt2 'sigm'; did you mean 'sigma'"),
        ("rt2", {"cover": True}, "no option of transform rt2 'cover'"),
        ("rt2", {"sigma": -0.1}, "transform rt2: sigma is at least 0, got -0.1"),
        ("rt2", {"sigma": math.inf}, "transform rt2: sigma is at least 0, got inf"),
        ("rt2", {"sigma": math.nan}, "transform rt2: sigma is at least 0, got nan"),
        ("rt2", {"sigma": "loud"}, "transform rt2: sigma: Input should be a valid number.*got 'loud'"),
        ("rt2", {"sigma": "0.1"}, "transform rt2: sigma: Input should be a valid number.*got '0.1'"),
        ("rt1", {"missing": 1}, "missing is a share of at least 0 and below 1, got 1"),
        ("rt1", {"missing": -0.1}, "missing is a share of at least 0 and below 1, got -0.1"),
        ("rt1", {"missing": math.nan}, "missing is a share of at least 0 and below 1, got nan"),
        ("rt1", {"missing": True}, "transform rt1: missing: Input should be a valid number.*got True"),
        ("rt1", {"missing": None}, "transform rt1: missing: Input should be a valid number.*got None"),
        ("rt2", {"cells": 3}, "transform rt2: cells must divide the 8 pixels of an image's side, got 3"),
        ("rt2", {"cells": 0}, "cells must divide the 8 pixels of an image's side, got 0"),
        ("rt2", {"cells": -8}, "cells must divide the 8 pixels of an image's side, got -8"),
        ("rt2", {"cells": 16}, "cells must divide the 8 pixels of an image's side, got 16"),
        ("rt2", {"cells": "8"}, "transform rt2: cells: Input should be a valid integer.*got '8'"),
        ("rt2", {"cells": 8.0}, "transform rt2: cells: Input should be a valid integer.*got 8.0"),
        ("rt2", {"masks": "none"}, "transform rt2: masks: Input should be 'image', 'batch' or 'fixed', got 'none'"),
        ("rt3", {"missing": 0}, "transform rt3: missing must cut the 64 cells into equal parts, got 0"),
        ("rt3", {"missing": 0.3}, "transform rt3: missing must cut the 64 cells into equal parts, got 0.3"),
    ],
)
def test_a_wrong_option_is_said_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_transform(name, size=8, **options)
    assert "\n" not in str(error.value)


def test_who_builds_a_transform_by_hand_is_told_too() -> None:
    with pytest.raises(ValueError, match="masks are one of image, batch, fixed, got none"):
        RandomTransform(size=8, masks="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 draw votes, got 0"):
        purified(votes=0)


# The whole network.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("votes", [1, 2])
def test_gradients_are_those_of_finite_differences(name: str, votes: int) -> None:
    whole = Purified(build_transform(name, size=8, sigma=0.02), Wavy(), classifier(), votes=votes).eval().double()
    of = (0.2 + 0.6 * images(2)).double()  # ten deviations away from where noisy pixels are cut
    draws = [sample(whole.transform, of, seed) for seed in range(votes)]
    leaf = of.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: whole.at(x, draws), leaf)
    (gradient,) = torch.autograd.grad(whole.at(leaf, draws)[:, 0].sum(), leaf)
    if name != "rt3":
        seen = torch.stack([1 - draw.holes for draw in draws]).amax((0, 1)).expand_as(of)
        assert torch.equal(gradient != 0, seen == 1)  # what nobody sees does not count, all else does


@pytest.mark.parametrize("transform", ["rt2", "rt3"])
@pytest.mark.parametrize(("name", "options"), TINY)
def test_gradients_through_real_purifiers_are_those_of_finite_differences(
    transform: str, name: str, options: dict[str, Any]
) -> None:
    cells = build_transform(transform, size=8, sigma=0.02, cells=4)  # the autoencoder's patches
    whole = Purified(cells, tiny(name, **options), classifier()).double()
    of = (0.2 + 0.6 * images(2)).double()
    draw = sample(whole.transform, of)
    *_, last, _ = whole.purifier.parameters()
    last.data.mul_(0.1)  # answers near grey, away from where they are cut
    answers = whole.purifier.attempts(*whole.transform(of, draw))[-1]
    assert answers.amin() > 0.1 and answers.amax() < 0.9
    leaf = of.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: whole.at(x, [draw]), leaf, fast_mode=True, atol=1e-8, rtol=1e-4)
    (gradient,) = torch.autograd.grad(whole.at(leaf, [draw])[:, 0].sum(), leaf)
    assert gradient[(draw.holes.amin(0) == 0).expand_as(of)].abs().min() > 0


@pytest.mark.parametrize("votes", [1, 2, 5])
def test_votes_are_the_mean_of_probabilities(votes: int) -> None:
    whole, of = purified(votes), images()
    draws = [sample(whole.transform, of, seed) for seed in range(votes)]
    singles = [whole.classifier(whole.purify(of, draw)) for draw in draws]
    logits = whole.at(of, draws)
    mean = torch.stack([single.softmax(1) for single in singles]).mean(0)
    torch.testing.assert_close(logits.softmax(1), mean)
    if votes > 1:
        torch.testing.assert_close(logits, mean.log())
    else:
        assert torch.equal(logits, singles[0])
    with torch.random.fork_rng():
        torch.manual_seed(4)
        found = whole(of)
        torch.manual_seed(4)
        assert torch.equal(found, whole.at(of, [whole.transform.sample(of) for _ in range(votes)]))


@pytest.mark.parametrize("votes", [1, 3])
def test_each_forward_pass_draws_anew(votes: int) -> None:
    whole, of = purified(votes), images()
    found = torch.stack([whole(of) for _ in range(6)])
    assert len(found.flatten(1).unique(dim=0)) == 6
    assert not torch.equal(whole.purify(of), whole.purify(of))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("votes", [1, 3])
@pytest.mark.parametrize("masks", ["image", "fixed"])
def test_a_fixed_draw_is_fixed(name: str, votes: int, masks: Masks) -> None:
    whole = Purified(build_transform(name, size=8, masks=masks), Wavy(), classifier(), votes=votes).eval()
    of = images(5)
    before = torch.get_rng_state()
    known = whole.fixed(of, generator(7))
    logits = known(of)
    assert torch.equal(known(of), logits) and torch.equal(torch.get_rng_state(), before)
    assert not known.training and known.classifier is whole.classifier and known.purifier is whole.purifier
    source = generator(7)
    draws = [whole.transform.sample(of[:1], source) for _ in range(votes)]
    assert torch.equal(logits, whole.at(of, draws))
    torch.testing.assert_close(torch.cat([known(one[None]) for one in of]), logits)  # the same for all images
    assert torch.equal(known(of[2:3]), whole.at(of[2:3], draws))
    assert torch.equal(known.purify(of), whole.purify(of, draws[0]))
    assert torch.equal(known.purify(of, draws[-1]), whole.purify(of, draws[-1]))
    assert torch.equal(torch.get_rng_state(), before)
    draws_at_all = name != "rt1" or masks != "fixed"
    assert torch.equal(whole.fixed(of, generator(8))(of), logits) != draws_at_all
    assert {"noise", "holes"} <= set(dict(known.named_buffers()))  # they go where the network goes


@pytest.mark.parametrize("votes", [1, 2])
def test_a_gradient_over_draws_is_the_mean_of_single_ones(votes: int) -> None:
    whole, of, labels = purified(votes), images(), torch.tensor([0, 1, 2])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        several = SearchModel(whole, draws=4, precision="float32").gradient(of, cross_entropy, labels)
        torch.manual_seed(5)
        singles = []
        for _ in range(4):
            leaf = of.clone().requires_grad_()
            logits = whole(leaf)
            values = F.cross_entropy(logits, labels, reduction="none")
            singles.append((logits, values, torch.autograd.grad(values.sum(), leaf)[0]))
    assert not torch.equal(singles[0][2], singles[1][2])
    for found, parts in zip(several, zip(*singles, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-5)
