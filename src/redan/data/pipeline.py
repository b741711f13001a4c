"""From uint8 images in memory to augmented batches, whole batches at a time, without worker processes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from redan.data.types import Batch, ImageSet
from redan.errors import UserError
from redan.seeds import generator


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]."""
    return images.float() / 255


def center_crop(images: Tensor, size: int) -> Tensor:
    """The middle ``size`` x ``size`` of images ``(n, c, h, w)``."""
    top, left = (images.shape[2] - size) // 2, (images.shape[3] - size) // 2
    return images[:, :, top : top + size, left : left + size]


@dataclass(frozen=True)
class Augmentation:
    """Random crop after zero padding, and horizontal flip.

    Args:
        crop: side of the crop, in pixels.
        padding: black pixels added on each side before the crop.
        flip: mirror each image with probability 1/2.
    """

    crop: int
    padding: int = 0
    flip: bool = False

    def __call__(self, images: Tensor, draws: Generator) -> Tensor:
        """Augment a batch ``(n, c, h, w)`` to ``(n, c, crop, crop)``; each image has draws of its own."""
        n, channels, height, width = images.shape
        device = images.device
        if self.padding or self.crop != height or self.crop != width:
            pad = self.padding
            images = torch.nn.functional.pad(images, (pad, pad, pad, pad))
            tops = torch.randint(height + 2 * pad - self.crop + 1, (n,), generator=draws).to(device)
            lefts = torch.randint(width + 2 * pad - self.crop + 1, (n,), generator=draws).to(device)
            side = torch.arange(self.crop, device=device)
            rows, columns = tops[:, None] + side, lefts[:, None] + side
            image, channel = torch.arange(n, device=device), torch.arange(channels, device=device)
            images = images[
                image[:, None, None, None], channel[None, :, None, None], rows[:, None, :, None], columns[:, None, None]
            ]
        if self.flip:
            mirrored = (torch.rand(n, generator=draws) < 0.5).to(device)
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images


class TrainingBatches:
    """Shuffled, augmented batches of a training set; every epoch and step can be had again by its number.

    The last incomplete batch of an epoch is left out; as each epoch has an order of its own, no image is.

    Args:
        images: the training images.
        batch_size: of one process.
        augmentation: applied to each batch.
        seed: of the run.
        device: where the batches go; the whole set is kept there if it takes less than half of the free memory.
        rank: this process of ``world`` many, which share every epoch's order.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        augmentation: Augmentation,
        *,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(images) < batch_size * world:
            raise UserError(f"{len(images)} training images are fewer than a batch of {batch_size * world}")
        self._set = ImageSet(_resident(images.images, device), images.labels.to(device))
        self._batch_size, self._augmentation, self._seed = batch_size, augmentation, seed
        self._device, self._rank, self._world = device, rank, world

    def __len__(self) -> int:
        """Steps an epoch."""
        return len(self._set) // (self._batch_size * self._world)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from step ``first_step`` on."""
        order = torch.randperm(len(self._set), generator=generator(self._seed, "order", epoch))
        for step in range(first_step, len(self)):
            start = (step * self._world + self._rank) * self._batch_size
            indices = order[start : start + self._batch_size].to(self._set.images.device)
            draws = generator(self._seed, "augment", epoch, step, self._rank)
            images = self._augmentation(self._set.images[indices].to(self._device), draws)
            indices = indices.to(self._device)
            yield Batch(to_float(images), self._set.labels[indices], indices)


def _resident(images: Tensor, device: torch.device) -> Tensor:
    """The images on the device where they take less than half of its free memory, else where they are."""
    if device.type != "cuda":
        return images
    free, _ = torch.cuda.mem_get_info(device)
    return images.to(device) if images.nbytes < free / 2 else images


def balanced_subset(labels: Tensor, samples: int, seed: int, allowed: Tensor | None = None) -> Tensor:
    """Positions, in ascending order, of a class-balanced random choice.

    Args:
        labels: int64 ``(n,)``.
        samples: how many; the classes' shares differ by at most one.
        seed: of the choice.
        allowed: bool ``(n,)``, which examples may be chosen; all if None.

    Raises:
        UserError: where a class, or the whole, has too few.
    """
    if samples > len(labels):
        raise UserError(f"there are {len(labels)} images to choose from, {samples} were asked for")
    draws = generator(seed, "subset")
    classes = labels.unique()
    chosen = []
    for i, label in enumerate(classes):
        candidates = labels == label if allowed is None else (labels == label) & allowed
        positions = candidates.nonzero().squeeze(1)
        share = samples // len(classes) + (i < samples % len(classes))
        if share > len(positions):
            raise UserError(f"class {int(label)} has {len(positions)} images to choose from, {share} were asked for")
        chosen.append(positions[torch.randperm(len(positions), generator=draws)[:share]])
    return torch.cat(chosen).sort().values


def split_validation(labels: Tensor, samples: int, seed: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Positions for training and a class-balanced held-out validation set, by seed."""
    held_out = balanced_subset(labels, samples, seed, allowed)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[held_out] = False
    return rest.nonzero().squeeze(1), held_out
