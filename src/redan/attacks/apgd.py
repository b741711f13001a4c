"""Auto-PGD (Croce & Hein, ICML 2020): PGD with momentum whose step size adapts by itself.

In L1 the steps are sparse and the radius shrinks to the threat's in three stages (Croce & Hein, ICML 2021).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from redan.attacks.base import Attack, Outcome, Standing, keep
from redan.attacks.objectives import Objective, cross_entropy, targeted_dlr
from redan.attacks.search import SearchModel
from redan.errors import UserError
from redan.threats import L1, LpBall, standard_normal

MOMENTUM = 0.75  # alpha of eq. 2
RHO = 0.75  # least share of steps that must raise the objective, condition 1

# L1 (ICML 2021, section 3.3): radii in units of the threat's, each with its share of the steps.
STAGES = ((3, 0.3), (2, 0.3), (1, 0.4))
DENSITY = 1.5  # the best image has moved so many times as many pixels as the next steps will
SPARSER = 0.95  # the best image has become sparser where it has fewer moved pixels than this share of before
SHORTER, SHORTEST = 1.5, 0.1  # how a step is shortened, and its least length in units of the radius


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
    """Auto-PGD.

    Args:
        threat: what the attacker may do.
        steps: gradient steps, at least 1; 100 as published.
        objective: what is maximised; cross-entropy gives APGD-CE. Not one towards a target.
        restarts: runs from new random starts on the images that still stand, at least 1.
    """

    steps: int = 100
    objective: Objective = cross_entropy
    restarts: int = 1

    def __post_init__(self) -> None:
        LpBall.require(self.threat, "APGD")
        if self.steps < 1 or self.restarts < 1:
            raise UserError(f"APGD takes at least 1 step and 1 restart, got {self.steps} and {self.restarts}")
        if self.objective.reference == "targets":
            raise UserError(f"the objective {self.objective.name!r} has a target; use TargetedAPGD")

    def cost(self, classes: int) -> int:
        """See ``Attack.cost``."""
        return 3 * (self.steps + 1) * self.restarts

    def run(self, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        """See ``Attack.run``."""
        standing = Standing(self.threat, search, images, labels)
        for _ in range(self.restarts):
            if len(standing):
                _climb(standing, self.steps, self.objective, standing.reference(self.objective), generator)
        return standing.outcome()


@dataclass(frozen=True)
class TargetedAPGD(Attack):
    """Auto-PGD towards one class after another, the likeliest wrong one on the clean image first (APGD-T).

    Args:
        threat: what the attacker may do.
        steps: gradient steps towards each target, at least 1; 100 as published.
        objective: what is maximised, one towards a target.
        targets: how many classes are tried, at least 1; 9 as published, all the wrong ones where there are fewer.
    """

    steps: int = 100
    objective: Objective = targeted_dlr
    targets: int = 9

    def __post_init__(self) -> None:
        LpBall.require(self.threat, "TargetedAPGD")
        if self.steps < 1 or self.targets < 1:
            raise UserError(f"targeted APGD takes at least 1 step and 1 target, got {self.steps} and {self.targets}")
        if self.objective.reference != "targets":
            raise UserError(f"the objective {self.objective.name!r} has no target; use APGD")

    def cost(self, classes: int) -> int:
        """See ``Attack.cost``."""
        return 3 * (self.steps + 1) * min(self.targets, classes - 1)

    def run(self, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        """See ``Attack.run``."""
        standing = Standing(self.threat, search, images, labels)
        ranking = wrong_classes(standing.logits(images), labels) if len(standing) else labels[:, None]
        for target in ranking[:, : self.targets].unbind(1):
            if not len(standing):
                break
            _climb(standing, self.steps, self.objective, torch.stack([labels, target], 1)[standing.rows], generator)
        return standing.outcome()


def wrong_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """The classes other than the label, the likeliest first: int64 ``(n, classes - 1)``."""
    return logits.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]


def _climb(
    standing: Standing, steps: int, objective: Objective, reference: Tensor, generator: Generator | None
) -> None:
    """One run on those that stand; ``reference`` is what the objective compares each with."""
    if isinstance(standing.threat, L1):
        _climb_in_stages(standing, standing.threat, steps, objective, reference, generator)
        return
    threat, reviews = LpBall.require(standing.threat, "APGD"), checkpoints(steps)
    x = threat.random_start(standing.center, generator)
    logits, value, gradient = standing.gradient(x, objective, reference)
    stands = standing.settle(x, logits)
    if stands is not None:
        x, value, gradient, reference = keep(stands, x, value, gradient, reference)
    k = len(standing)
    step_size = torch.full((k, 1, 1, 1), 2 * threat.radius, device=x.device)
    previous, best, best_gradient, best_value = x, x, gradient, value
    increases = torch.zeros(k, device=x.device)  # since the last review
    reviewed_value, just_halved = best_value, torch.zeros(k, dtype=torch.bool, device=x.device)
    last_review = 0
    for step in range(1, steps + 1):
        if not len(standing):
            return
        # Eq. 2: a step from x, mixed with the move that led to x; the first step has no such move.
        alpha = MOMENTUM if step > 1 else 1.0
        z = threat.project(threat.ascend(x, gradient, step_size), standing.center)
        x, previous = threat.project(x + alpha * (z - x) + (1 - alpha) * (x - previous), standing.center), x
        logits, new_value, gradient = standing.gradient(x, objective, reference)
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


def _climb_in_stages(
    standing: Standing, threat: L1, steps: int, objective: Objective, reference: Tensor, generator: Generator | None
) -> None:
    """One run in L1: three stages, each in a smaller ball, each from the best image of the one before."""
    lengths = [math.ceil(share * steps) for _, share in STAGES[:-1]]
    lengths.append(steps - sum(lengths))
    best = standing.center + standard_normal(standing.center, generator)
    for (factor, _), length in zip(STAGES, lengths, strict=True):
        ball = replace(threat, radius=factor * threat.radius)
        x = ball.project(best, standing.center)
        best, reference = _climb_sparsely(standing, ball, length, objective, reference, x)
        if not len(standing):
            return
    standing.conclude(best)


def _climb_sparsely(
    standing: Standing, ball: L1, steps: int, objective: Objective, reference: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """One stage in L1; the best images of those that stand, and what the objective compares them with."""
    interval = max(int(0.04 * steps), 1)  # between reviews of sparsity and step size
    logits, best_value, gradient = standing.gradient(x, objective, reference)
    stands = standing.settle(x, logits)
    if stands is not None:
        x, best_value, gradient, reference = keep(stands, x, best_value, gradient, reference)
    best, best_gradient = x, gradient
    moved = (best != standing.center).flatten(1).sum(1)
    density = moved / DENSITY
    step_size = torch.full_like(best_value, ball.radius)
    for step in range(1, steps + 1):
        if not len(standing):
            break
        x = ball.project(x + step_size[:, None, None, None] * _sparse_step(x, gradient, density), standing.center)
        logits, value, gradient = standing.gradient(x, objective, reference)
        better = value > best_value
        best_value = torch.where(better, value, best_value)
        best = torch.where(better[:, None, None, None], x, best)
        best_gradient = torch.where(better[:, None, None, None], gradient, best_gradient)
        stands = standing.settle(x, logits)
        if stands is not None:
            x, gradient, reference, moved, density = keep(stands, x, gradient, reference, moved, density)
            best, best_gradient, best_value, step_size = keep(stands, best, best_gradient, best_value, step_size)
        if step % interval == 0:
            before, moved = moved, (best != standing.center).flatten(1).sum(1)
            sparser = moved < SPARSER * before
            density = moved / DENSITY
            step_size = torch.where(sparser, ball.radius, (step_size / SHORTER).clamp(min=SHORTEST * ball.radius))
            x = torch.where(sparser[:, None, None, None], best, x)
            gradient = torch.where(sparser[:, None, None, None], best_gradient, gradient)
    return best, reference


def _sparse_step(images: Tensor, gradient: Tensor, density: Tensor) -> Tensor:
    """The step of L1 length 1 along the signs of each image's ``density`` largest slopes that [0, 1] lets it follow."""
    movable = torch.where(gradient > 0, images < 1, images > 0)
    slopes = torch.where(movable, gradient, 0).flatten(1)
    last = (density.long().clamp(1, slopes.shape[1]) - 1)[:, None]
    least = slopes.abs().sort(1, descending=True).values.gather(1, last)
    signs = torch.where(slopes.abs() >= least, slopes, 0).sign()
    return (signs / signs.abs().sum(1, keepdim=True).clamp(min=1)).view_as(gradient)
