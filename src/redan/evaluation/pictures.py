"""The adversarial images of an evaluation, exact and as a file of 8-bit pixels would hold them."""

import torch
from torch import Tensor

from redan.evaluation.survey import Survey
from redan.threats import Threat


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
