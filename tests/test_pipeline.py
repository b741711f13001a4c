"""From uint8 images to batches: augmentation against loops, epochs against permutations, choices against counts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from redan.data.pipeline import (
    Augmentation,
    TrainingBatches,
    balanced_subset,
    center_crop,
    split_validation,
    to_float,
)
from redan.data.types import Batch, ImageSet
from redan.errors import UserError
from redan.seeds import derive_seed, generator

CPU = torch.device("cpu")
PLAIN = Augmentation(crop=2)


def draws(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def numbered(n: int) -> ImageSet:
    """Images 2 x 2 that carry their own number in their pixels, with labels of 3 classes."""
    numbers = torch.arange(n)
    images = torch.stack([numbers // 256, numbers % 256, numbers % 7, numbers % 11], 1).to(torch.uint8)
    return ImageSet(images.view(n, 1, 2, 2), numbers % 3)


def batches(n: int = 20, size: int = 3, *, seed: int = 0, rank: int = 0, world: int = 1) -> TrainingBatches:
    return TrainingBatches(numbered(n), size, PLAIN, seed=seed, device=CPU, rank=rank, world=world)


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_grey_level_becomes_its_255th() -> None:
    levels = to_float(torch.arange(256, dtype=torch.uint8))
    assert levels.dtype == torch.float32
    np.testing.assert_array_equal(levels.numpy(), np.arange(256, dtype=np.float32) / np.float32(255))


@pytest.mark.parametrize(("size", "rows"), [(4, [0, 1, 2, 3]), (2, [1, 2]), (3, [0, 1, 2])])
def test_center_crop_takes_the_middle(size: int, rows: list[int]) -> None:
    images = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    expected = images.numpy()[:, :, rows][:, :, :, rows]
    np.testing.assert_array_equal(center_crop(images, size).numpy(), expected)


def test_center_crop_of_an_oblong() -> None:
    assert center_crop(torch.arange(10).view(1, 1, 2, 5), 2).tolist() == [[[[1, 2], [6, 7]]]]


# Augmentation.


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_crop_and_flip_are_those_of_a_loop(data: st.DataObject) -> None:
    n, channels, height, width, padding = (
        data.draw(st.integers(low, high)) for low, high in ((0, 5), (1, 3), (1, 5), (1, 5), (0, 3))
    )
    crop = data.draw(st.integers(1, min(height, width) + 2 * padding))
    flip, seed = data.draw(st.booleans()), data.draw(st.integers(0, 2**31))
    images = torch.randint(1, 256, (n, channels, height, width), dtype=torch.uint8, generator=draws(seed))
    before = images.clone()
    found = Augmentation(crop, padding, flip)(images, draws(seed))
    assert torch.equal(images, before)

    again = draws(seed)
    tops = lefts = np.zeros(n, dtype=int)
    if padding or (crop, crop) != (height, width):
        tops = torch.randint(height + 2 * padding - crop + 1, (n,), generator=again).numpy()
        lefts = torch.randint(width + 2 * padding - crop + 1, (n,), generator=again).numpy()
    mirrored = torch.rand(n, generator=again).numpy() < 0.5 if flip else np.zeros(n, dtype=bool)
    assert found.shape == (n, channels, crop, crop) and found.dtype == torch.uint8
    for i in range(n):
        black = np.zeros((channels, height + 2 * padding, width + 2 * padding), dtype=np.uint8)
        black[:, padding : padding + height, padding : padding + width] = images[i].numpy()
        expected = black[:, tops[i] : tops[i] + crop, lefts[i] : lefts[i] + crop]
        np.testing.assert_array_equal(found[i].numpy(), expected[:, :, ::-1] if mirrored[i] else expected)


def test_every_offset_and_both_directions_occur_about_as_often() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3)
    n = 18_000
    found = Augmentation(crop=3, padding=1, flip=True)(image.expand(n, 1, 3, 3), draws())
    kinds, counts = np.unique(found.view(n, 9).numpy(), axis=0, return_counts=True)
    assert len(kinds) == 9 * 2
    # Binomial with p = 1/18: five standard deviations.
    assert np.abs(counts - n / 18).max() < 5 * np.sqrt(n / 18)


def test_padding_is_black() -> None:
    found = Augmentation(crop=6, padding=2)(torch.full((1, 1, 2, 2), 9, dtype=torch.uint8), draws())
    assert found.sum() == 4 * 9 and torch.equal(found[0, 0, 2:4, 2:4], torch.full((2, 2), 9, dtype=torch.uint8))


def test_nothing_asked_for_is_nothing_done() -> None:
    images, randomness = numbered(4).images, draws()
    assert torch.equal(PLAIN(images, randomness), images)
    assert torch.equal(randomness.get_state(), draws().get_state())


# Batches.


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 40), size=st.integers(1, 10), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_an_epoch_is_a_permutation_without_repeats(n: int, size: int, seed: int, epoch: int) -> None:
    if n < size:
        return
    source, images = batches(n, size, seed=seed), numbered(n)
    found = list(source.epoch(epoch))
    assert len(found) == len(source) == n // size
    indices = torch.cat([b.indices for b in found])
    assert len(indices) == len(indices.unique()) == n // size * size
    for b in found:
        assert torch.equal(b.images, to_float(images.images[b.indices]))
        assert torch.equal(b.labels, images.labels[b.indices])
        assert (b.images.dtype, b.labels.dtype, b.indices.dtype) == (torch.float32, torch.int64, torch.int64)


def test_each_epoch_and_seed_has_an_order_of_its_own() -> None:
    def order(source: TrainingBatches, epoch: int) -> tuple[int, ...]:
        return tuple(torch.cat([b.indices for b in source.epoch(epoch)]).tolist())

    orders = [order(batches(seed=seed), epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert orders == [order(batches(seed=seed), epoch) for seed in range(3) for epoch in range(3)]
    # No image is left out of every epoch, though 20 images make 6 batches of 3.
    assert {i for epoch in range(10) for i in order(batches(), epoch)} == set(range(20))


@pytest.mark.parametrize("first", range(7))
def test_an_epoch_can_be_entered_at_any_step(first: int) -> None:
    images = ImageSet(torch.randint(256, (20, 1, 4, 4), dtype=torch.uint8, generator=draws()), torch.arange(20))
    source = TrainingBatches(images, 3, Augmentation(4, 1, True), seed=5, device=CPU)
    whole, tail = list(source.epoch(2)), list(source.epoch(2, first_step=first))
    assert len(tail) == 6 - first
    assert all(same(a, b) for a, b in zip(whole[first:], tail, strict=True))


def test_each_step_and_rank_has_augmentation_of_its_own() -> None:
    """On equal images every batch would look the same if two places shared their draws."""
    images = ImageSet(torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(64, 1, 8, 8), torch.zeros(64).long())
    seen = [
        b.images
        for rank in range(2)
        for epoch in range(2)
        for b in TrainingBatches(images, 8, Augmentation(8, 4, True), seed=0, device=CPU, rank=rank, world=2).epoch(
            epoch
        )
    ]
    assert len(seen) == 16
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_of_one(world: int) -> None:
    single = [b.indices for b in batches(50, 4 * world).epoch(3)]
    parts = [list(batches(50, 4, rank=rank, world=world).epoch(3)) for rank in range(world)]
    assert {len(part) for part in parts} == {len(single)} == {50 // (4 * world)}
    for step, whole in enumerate(single):
        assert torch.equal(torch.cat([part[step].indices for part in parts]), whole)


def test_fewer_images_than_a_batch_are_refused() -> None:
    with pytest.raises(UserError, match="5 training images are fewer than a batch of 6"):
        batches(5, 3, world=2)
    assert len(batches(6, 3, world=2)) == 1


# Choices.

LABELS = torch.arange(60) % 4
ALLOWED = torch.arange(60) >= 20


def counts(positions: Tensor) -> list[int]:
    return LABELS[positions].bincount(minlength=4).tolist()


@given(samples=st.integers(0, 40), seed=st.integers(0, 99), restricted=st.booleans())
def test_a_subset_is_balanced_and_allowed(samples: int, seed: int, restricted: bool) -> None:
    chosen = balanced_subset(LABELS, samples, seed, ALLOWED if restricted else None)
    assert len(chosen) == samples and bool((chosen.diff() > 0).all())
    assert max(counts(chosen)) - min(counts(chosen)) <= 1
    assert not restricted or bool(ALLOWED[chosen].all())
    assert torch.equal(chosen, balanced_subset(LABELS, samples, seed, ALLOWED if restricted else None))


def test_another_seed_chooses_others_and_all_can_be_chosen() -> None:
    choices = [balanced_subset(LABELS, 12, seed) for seed in range(40)]
    assert len({tuple(choice.tolist()) for choice in choices}) == 40
    assert set(torch.cat(choices).tolist()) == set(range(60))


def test_too_few_to_choose_from_is_refused() -> None:
    with pytest.raises(UserError, match="class 0 has 15 images to choose from, 16 were asked for"):
        balanced_subset(torch.cat([LABELS, torch.ones(9).long()]), 64, 0)
    with pytest.raises(UserError, match="class 0 has 10 images to choose from, 11 were asked for"):
        balanced_subset(LABELS, 41, 0, ALLOWED)
    with pytest.raises(UserError, match="there are 60 images to choose from, 61 were asked for"):
        balanced_subset(LABELS, 61, 0)
    with pytest.raises(UserError, match="there are 0 images"):
        balanced_subset(LABELS[:0], 1, 0)


@given(samples=st.integers(0, 40), seed=st.integers(0, 99))
def test_validation_is_split_off(samples: int, seed: int) -> None:
    training, held_out = split_validation(LABELS, samples, seed, ALLOWED)
    assert sorted(training.tolist() + held_out.tolist()) == list(range(60))
    assert bool((training.diff() > 0).all())
    assert len(held_out) == samples and bool(ALLOWED[held_out].all())
    assert max(counts(held_out)) - min(counts(held_out)) <= 1


# Seeds.


def test_seeds_belong_to_their_place() -> None:
    places: list[tuple[int | str, ...]] = [
        (),
        (0,),
        (1,),
        ("1",),
        (0, 0),
        (0, 1),
        (1, 0),
        ("a", "b"),
        ("ab",),
        ("a,b",),
    ]
    seeds = [derive_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [derive_seed(*place) for place in places]
    assert torch.equal(torch.rand(3, generator=generator(1, "x")), torch.rand(3, generator=generator(1, "x")))
    assert not torch.equal(torch.rand(3, generator=generator(1, "x")), torch.rand(3, generator=generator(2, "x")))


def test_seeds_stay_the_same_from_release_to_release() -> None:
    # The first 8 bytes of BLAKE2b of "(0, 'weights')", little-endian, without the last bit.
    assert derive_seed(0, "weights") == 2934036865011653446


def test_seeds_use_all_63_bits() -> None:
    seeds = np.array([derive_seed("bit", i) for i in range(500)])
    bits = (seeds[:, None] >> np.arange(63)) & 1
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(500)
