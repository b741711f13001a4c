"""Auto-PGD (Croce & Hein, ICML 2020): PGD with momentum whose step size adapts by itself."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from redan.attacks.base import Attack, Outcome, Standing, keep
from redan.attacks.objectives import Objective, cross_entropy
from redan.attacks.search import SearchModel
from redan.errors import UserError

MOMENTUM = 0.75  # alpha of eq. 2
RHO = 0.75  # least share of steps that must raise the objective, condition 1


def checkpoints(steps: int) -> list[int]:
    """The steps at which the step size is reviewed (section 3.1).

    The first after 0.22 n steps, then after intervals each 0.03 n shorter than the last, down to 0.06 n.

    >>> checkpoints(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    interval, least, shorter = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    reviews, step = [], interval
    while step <= steps:
        reviews.append(step)
        interval = max(interval - shorter, least)
        step += interval
    return reviews


@dataclass(frozen=True)
class APGD(Attack):
    """Auto-PGD. For L1 it steps along the sparse steepest direction of the threat.

    Args:
        threat: what the attacker may do.
        steps: gradient steps, at least 1; 100 as published.
        objective: what is maximised; cross-entropy gives APGD-CE.
        restarts: runs from new random starts on the images that still stand, at least 1.
    """

    steps: int = 100
    objective: Objective = cross_entropy
    restarts: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise UserError(f"APGD takes at least 1 step and 1 restart, got {self.steps} and {self.restarts}")

    def run(self, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        """See ``Attack.run``."""
        standing = Standing(self.threat, search, images, labels)
        for _ in range(self.restarts):
            if len(standing):
                self._one_run(standing, generator)
        return standing.outcome()

    def _one_run(self, standing: Standing, generator: Generator | None) -> None:
        threat, reviews = self.threat, checkpoints(self.steps)
        reference = standing.reference(self.objective)
        x = threat.random_start(standing.center, generator)
        logits, value, gradient = standing.gradient(x, self.objective, reference)
        stands = standing.settle(x, logits)
        if stands is not None:
            x, value, gradient, reference = keep(stands, x, value, gradient, reference)
        k = len(standing)
        step_size = torch.full((k, 1, 1, 1), 2 * threat.radius, device=x.device)
        previous, best, best_gradient, best_value = x, x, gradient, value
        increases = torch.zeros(k, device=x.device)  # since the last review
        reviewed_value, just_halved = best_value, torch.zeros(k, dtype=torch.bool, device=x.device)
        last_review = 0
        for step in range(1, self.steps + 1):
            if not len(standing):
                return
            # Eq. 2: a step from x, mixed with the move that led to x; the first step has no such move.
            alpha = MOMENTUM if step > 1 else 1.0
            z = threat.project(threat.ascend(x, gradient, step_size), standing.center)
            x, previous = threat.project(x + alpha * (z - x) + (1 - alpha) * (x - previous), standing.center), x
            logits, new_value, gradient = standing.gradient(x, self.objective, reference)
            increases += new_value > value
            value = new_value
            better = value > best_value
            best_value = torch.where(better, value, best_value)
            best = torch.where(better[:, None, None, None], x, best)
            best_gradient = torch.where(better[:, None, None, None], gradient, best_gradient)
            stands = standing.settle(x, logits)
            if stands is not None:
                x, previous, gradient, value, reference = keep(stands, x, previous, gradient, value, reference)
                best, best_gradient, best_value = keep(stands, best, best_gradient, best_value)
                step_size, increases, reviewed_value, just_halved = keep(
                    stands, step_size, increases, reviewed_value, just_halved
                )
            if step in reviews:
                # Condition 1: too few increases. Condition 2: neither step size nor best value changed since last time.
                halve = increases < RHO * (step - last_review)
                halve |= ~just_halved & (reviewed_value >= best_value)
                mask = halve[:, None, None, None]
                step_size = torch.where(mask, step_size / 2, step_size)
                x, gradient = torch.where(mask, best, x), torch.where(mask, best_gradient, gradient)
                value = torch.where(halve, best_value, value)
                just_halved, reviewed_value = halve, best_value
                increases = torch.zeros_like(increases)
                last_review = step
        standing.conclude(best)
