"""Decoupled direction and norm (Rony et al., CVPR 2019): the nearest adversarial image in L2, in few steps."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from redan.attacks.base import Attack, Nearest, Outcome
from redan.attacks.objectives import cross_entropy
from redan.attacks.search import SearchModel
from redan.errors import UserError
from redan.threats import L2, standard_normal

FIRST_STEP, LAST_STEP = 1.0, 0.01  # of the cosine schedule


@dataclass(frozen=True)
class DDN(Attack):
    """Goes up the cross-entropy on a sphere that shrinks while the image is adversarial and grows while it is not.

    What is published also rounds each attempt to 256 grey levels; this one does not.

    Args:
        threat: an L2 threat; its radius is what counts as success afterwards, and is not looked at here.
        steps: gradient steps, at least 1.
        gamma: share by which the sphere grows or shrinks a step, in (0, 1).
        init_norm: the sphere's first radius, above 0.

    Raises:
        UserError: for another threat, and for a value out of range.
    """

    threat: L2
    steps: int = 100
    gamma: float = 0.05
    init_norm: float = 1.0

    def __post_init__(self) -> None:
        L2.require(self.threat, "DDN")
        if self.steps < 1:
            raise UserError(f"DDN takes at least 1 step, got {self.steps}")
        if not 0 < self.gamma < 1:
            raise UserError(f"DDN takes a gamma between 0 and 1, got {self.gamma}")
        if not 0 < self.init_norm < math.inf:
            raise UserError(f"DDN takes an init_norm above 0, got {self.init_norm}")

    def cost(self, classes: int) -> int:
        """See ``Attack.cost``."""
        return 3 * self.steps + 1

    def run(self, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        """See ``Attack.run``."""
        if not len(images):
            return Outcome(images.clone(), labels.clone())
        book = Nearest(self.threat, search.precise, images, labels)
        x, norm = images, torch.full_like(book.distance, self.init_norm)
        farthest = self.threat.distance((images < 0.5).float(), images)  # to the corner of the box across
        for step in range(self.steps):
            size = LAST_STEP + (FIRST_STEP - LAST_STEP) * (1 + math.cos(math.pi * step / self.steps)) / 2
            logits, _, gradient = book.gradient(x, cross_entropy, labels)
            wrong = book.offer(x, logits)
            flat = (gradient == 0).flatten(1).all(1)
            if flat.any():  # the sphere needs a direction all the same
                noise = standard_normal(gradient, generator)
                gradient = torch.where(flat[:, None, None, None], noise, gradient)
            direction = self.threat.ascend(x, gradient, size) - images
            norm = torch.minimum(torch.where(wrong, norm * (1 - self.gamma), norm * (1 + self.gamma)), farthest)
            x = self.threat.ascend(images, direction, norm.float()[:, None, None, None]).clamp(0, 1)
        book.offer(x, book.logits(x))
        return book.outcome()
