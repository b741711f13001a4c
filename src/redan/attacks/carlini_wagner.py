"""The attack of Carlini & Wagner (S&P 2017) in L2: patient, and long the measure of minimum-norm attacks."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from redan.attacks.base import Attack, Nearest, Outcome
from redan.attacks.objectives import cw_margin
from redan.attacks.search import SearchModel
from redan.errors import UserError
from redan.threats import L2

INSIDE = 1 - 1e-6  # black and white lie at infinity in the new variable; this pulls them in a little
CHECKS = 10  # how often a descent asks whether it still gets anywhere
BETA_1, BETA_2 = 0.9, 0.999  # of Adam


@dataclass(frozen=True)
class CarliniWagner(Attack):
    """Descends |x' - x|^2 + c max(margin of the true class, 0) in w, where x' = (tanh(w) + 1) / 2 is never invalid.

    One descent of Adam for each of several c, searched for each image: up tenfold until a descent finds an adversarial
    image, then by bisection. Nothing is drawn at random.

    Args:
        threat: an L2 threat; its radius is what counts as success afterwards, and is not looked at here.
        steps: Adam steps of a descent, at least 1. The paper has 10,000, its successors mostly 1,000.
        searches: values of c tried, at least 1.
        init_c: the first of them, above 0.
        step_size: Adam's learning rate, above 0.
        abort_early: end a descent once no image's loss has fallen by a ten-thousandth in a tenth of the steps.

    Raises:
        UserError: for another threat, and for a value out of range.
    """

    threat: L2
    steps: int = 1000
    searches: int = 9
    init_c: float = 1e-3
    step_size: float = 0.01
    abort_early: bool = True

    def __post_init__(self) -> None:
        L2.require(self.threat, "CarliniWagner")
        if self.steps < 1 or self.searches < 1:
            raise UserError(f"CarliniWagner takes at least 1 step and 1 search, got {self.steps} and {self.searches}")
        if not 0 < self.init_c < math.inf:
            raise UserError(f"CarliniWagner takes an init_c above 0, got {self.init_c}")
        if not 0 < self.step_size < math.inf:
            raise UserError(f"CarliniWagner takes a step size above 0, got {self.step_size}")

    def cost(self, classes: int) -> int:
        """See ``Attack.cost``."""
        return 3 * self.steps * self.searches + 1

    def run(self, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        """See ``Attack.run``."""
        if not len(images):
            return Outcome(images.clone(), labels.clone())
        book = Nearest(self.threat, search.precise, images, labels)
        book.offer(images, book.logits(images))  # itself: there is no w for black and white
        c = torch.full(labels.shape, self.init_c, device=images.device)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for _ in range(self.searches):
            fell = self._descend(book, images, labels, c)
            low, high = torch.where(fell, low, c), torch.where(fell, c, high)
            c = torch.where(high < torch.inf, (low + high) / 2, 10 * c)
        return book.outcome()

    def _descend(self, book: Nearest, images: Tensor, labels: Tensor, c: Tensor) -> Tensor:
        """One descent from the image itself; which images were adversarial on the way, bool ``(n,)``."""
        w = ((2 * images - 1) * INSIDE).atanh()
        first, second = torch.zeros_like(w), torch.zeros_like(w)
        fell, previous = torch.zeros_like(labels, dtype=torch.bool), torch.full_like(c, torch.inf)
        for step in range(self.steps):
            tanh = w.tanh()
            x = (tanh + 1) / 2
            logits, margin, gradient = book.gradient(x, cw_margin, labels)
            fell |= book.offer(x, logits)
            if self.abort_early and step % math.ceil(self.steps / CHECKS) == 0:
                loss = (x - images).square().flatten(1).sum(1) + c * (-margin).clamp(min=0)
                if (loss > 0.9999 * previous).all():
                    break
                previous = loss
            pull = torch.where(margin < 0, c, 0)[:, None, None, None]
            slope = (2 * (x - images) - pull * gradient) * (1 - tanh.square()) / 2  # dx'/dw by the chain rule
            slope = slope.clamp(-1e15, 1e15)  # Adam does not care how long it is, and its square must not overflow
            first, second = first.lerp(slope, 1 - BETA_1), second.lerp(slope.square(), 1 - BETA_2)
            unbiased = first / (1 - BETA_1 ** (step + 1))
            spread = (second / (1 - BETA_2 ** (step + 1))).sqrt()
            w = w - self.step_size * unbiased / (spread + 1e-8)
        return fell
