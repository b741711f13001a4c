"""Projected gradient descent (Madry et al., ICLR 2018) and its ancestor FGSM (Goodfellow et al., ICLR 2015)."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Generator, Tensor

from redan.attacks.base import Attack, Outcome, Standing, keep
from redan.attacks.objectives import Objective, cross_entropy
from redan.attacks.search import SearchModel
from redan.errors import UserError, unknown
from redan.threats import LpBall, standard_normal

Start = Literal["random", "near", "image"]

NEAR = 0.001  # standard deviation of the "near" start, as TRADES and MART have it


@dataclass(frozen=True)
class PGD(Attack):
    """Steepest ascent of the objective, projected onto the threat after each step.

    Args:
        threat: what the attacker may do.
        steps: gradient steps, at least 1.
        step_size: length of a step in the threat's norm, above 0; None is 2.5 * radius / steps (Madry et al.).
        objective: what is maximised.
        start: ``random``, uniform in the threat; ``near``, Gaussian noise of 0.001 around the image; ``image``, which
            is no start for an objective that compares with the clean logits: its gradient is zero there.
        restarts: runs from new starts on the images that still stand, at least 1.
        drop_broken: stop working on an image once it is broken. Training turns this off, and has no restarts.

    Raises:
        UserError: where these contradict themselves or each other.
    """

    threat: LpBall
    steps: int = 10
    step_size: float | None = None
    objective: Objective = cross_entropy
    start: Start = "random"
    restarts: int = 1
    drop_broken: bool = True

    def __post_init__(self) -> None:
        LpBall.require(self.threat, "PGD")
        if self.steps < 1 or self.restarts < 1:
            raise UserError(f"PGD takes at least 1 step and 1 restart, got {self.steps} and {self.restarts}")
        if self.step_size is not None and not self.step_size > 0:
            raise UserError(f"PGD takes a step size above 0, got {self.step_size}")
        if self.start not in get_args(Start):
            raise unknown("start of PGD", self.start, get_args(Start))
        if self.start == "image" and self.objective.reference == "clean_logits":
            raise UserError(
                f"the objective {self.objective.name!r} has no gradient at the image itself; start 'random' or 'near'"
            )
        if self.restarts > 1 and not self.drop_broken:
            raise UserError("restarts are for images that still stand; PGD with drop_broken=False takes 1")

    def cost(self, classes: int) -> int:
        """See ``Attack.cost``."""
        return 3 * self.steps * self.restarts

    def run(self, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        """See ``Attack.run``."""
        step_size = 2.5 * self.threat.radius / self.steps if self.step_size is None else self.step_size
        standing = Standing(self.threat, search, images, labels, drop=self.drop_broken)
        for _ in range(self.restarts):
            if not len(standing):
                break
            reference = standing.reference(self.objective)
            x = self._begin(standing.center, generator)
            for _ in range(self.steps):
                logits, _, gradient = standing.gradient(x, self.objective, reference)
                stands = standing.settle(x, logits)
                if stands is not None:
                    x, gradient, reference = keep(stands, x, gradient, reference)
                    if not len(standing):
                        break
                x = self.threat.project(self.threat.ascend(x, gradient, step_size), standing.center)
            standing.conclude(x)
        return standing.outcome()

    def _begin(self, center: Tensor, generator: Generator | None) -> Tensor:
        if self.start == "random":
            return self.threat.random_start(center, generator)
        if self.start == "near":
            return self.threat.project(center + NEAR * standard_normal(center, generator), center)
        return center


@dataclass(frozen=True)
class FGSM(Attack):
    """The fast gradient (sign) method: one step of the full radius from the image itself.

    Args:
        threat: what the attacker may do.
        objective: what is maximised; measured against labels, see ``PGD.start``.

    Raises:
        UserError: for another objective.
    """

    threat: LpBall
    objective: Objective = cross_entropy

    def __post_init__(self) -> None:
        LpBall.require(self.threat, "FGSM")
        self._as_pgd()

    def cost(self, classes: int) -> int:
        """See ``Attack.cost``."""
        return 3

    def run(self, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        """See ``Attack.run``."""
        return self._as_pgd().run(search, images, labels, generator)

    def _as_pgd(self) -> PGD:
        # Any step size does at radius 0, where the threat is the image alone.
        step_size = self.threat.radius or None
        return PGD(self.threat, steps=1, step_size=step_size, objective=self.objective, start="image")
