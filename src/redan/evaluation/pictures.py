"""The pictures of an evaluation: a gallery, and all adversarial images, exact and rounded to 8-bit pixels."""

import copy

import torch
from torch import Generator, Tensor, nn

from redan.evaluation.results import GalleryEntry, Row
from redan.evaluation.survey import Survey
from redan.models.purified import FixedDraw, Purified
from redan.models.random_transforms import Draw
from redan.threats import Threat

GALLERY = 12


def gallery(rows: list[Row], survey: Survey) -> tuple[tuple[GalleryEntry, ...], dict[str, Tensor]]:
    """The first images that were right and fell, with their pictures, float32 ``(k, c, h, w)``.

    Of a network that draws at random, an image counts as fallen here where half of the draws are fooled.
    """
    fooled = [row for row in rows if row.verdict != "misclassified" and survey.score[row.index] >= 0.5][:GALLERY]
    entries = []
    for row in fooled:
        assert row.adversarial_prediction is not None and row.adversarial_confidence is not None
        entries.append(
            GalleryEntry(
                index=row.index,
                label=row.label,
                prediction=row.prediction,
                confidence=row.confidence,
                adversarial_prediction=row.adversarial_prediction,
                adversarial_confidence=row.adversarial_confidence,
            )
        )
    if not fooled:
        return (), {}
    indices = [row.index for row in fooled]
    images = survey.images(torch.tensor(indices)).cpu()
    return tuple(entries), {"images": images, "adversarials": torch.stack([survey.adversarial[k] for k in indices])}


@torch.no_grad()
def on_the_way(network: nn.Module, images: Tensor, generator: Generator) -> dict[str, Tensor]:
    """What becomes of images ``(k, c, h, w)`` inside a network that purifies, by one draw; nothing of any other.

    Returns:
        ``transformed``, the first view where the transform has several, and ``purified``: ``(k, c, h, w)`` each.
    """
    if not isinstance(network, Purified):
        return {}
    network = copy.deepcopy(network).cpu().eval()  # a look must not move anything of the original
    draw = network.transform.sample(images, generator)
    if isinstance(network, FixedDraw):
        draw = Draw(network.noise[0], network.holes[0])
    seen, _ = network.transform(images, draw)
    return {"transformed": seen[: len(images)], "purified": network.purify(images, draw)}


def adversarial_images(survey: Survey, threat: Threat) -> dict[str, Tensor]:
    """The adversarial images that the survey knows.

    Returns:
        ``indices``, int64 ``(k,)``, of test images; ``adversarial``, float32 ``(k, c, h, w)`` in [0, 1];
        ``rounded``, uint8 likewise, each pixel the nearest of 256 levels, or the next towards the clean image where
        that would leave the threat; ``rounded_breaks``, bool ``(k,)``, whether the network still misclassifies these.
    """
    shape = survey.images(torch.tensor([0])).shape[1:]
    kept = {
        "indices": [torch.empty(0, dtype=torch.int64)],
        "adversarial": [torch.empty(0, *shape)],
        "rounded": [torch.empty(0, *shape, dtype=torch.uint8)],
        "rounded_breaks": [torch.empty(0, dtype=torch.bool)],
    }

    def add(indices: Tensor) -> None:
        exact, clean = survey.attacked(indices), survey.images(indices)
        labels = survey.labels[indices].to(exact.device)
        nearest = (255 * exact).round()
        # A pixel that is a level already must not move on for the rounding of the product.
        towards = torch.where(exact > clean, (255 * exact + 1e-3).floor(), (255 * exact - 1e-3).ceil())
        inside = threat.contains(nearest / 255, clean)
        levels = torch.where(inside[:, None, None, None], nearest, towards)
        breaks = survey.judge.broken(levels / 255, labels) & threat.contains(levels / 255, clean)
        found = {"indices": indices, "adversarial": exact, "rounded": levels.to(torch.uint8), "rounded_breaks": breaks}
        for key, tensor in found.items():
            kept[key].append(tensor.cpu())

    list(survey.each_batch(survey.found(), add))
    return {key: torch.cat(tensors) for key, tensors in kept.items()}
