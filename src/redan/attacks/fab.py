"""Fast adaptive boundary attack (Croce & Hein, ICML 2020): the shortest way to the other side of the decision boundary.

It linearises the boundary at the present point, projects the point and the original image onto that hyperplane inside
[0, 1], and steps a little beyond, towards a mixture of both. From a misclassified point it goes part of the way back
to the image and tries again. The radius plays no part in the search, only in what counts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from redan.attacks.apgd import wrong_classes
from redan.attacks.base import Attack, Nearest, Outcome, Standing, keep
from redan.attacks.objectives import misclassified, targeted_margin
from redan.attacks.search import NO_GRADIENT, SearchModel
from redan.errors import UserError
from redan.threats import LpBall

ALPHA_MAX = 0.1  # largest weight of the original image's projection
ETA = 1.05  # how far beyond the hyperplane a step goes, as a multiple of the way to it
BETA = 0.9  # what is left of the way from the image after a step back from a misclassified point
FINAL_STEPS = 3  # of the search between the image and the nearest adversarial image
SHORT = 0.99  # how much of the way to the estimated boundary it goes, to land on the right side of it


@dataclass(frozen=True)
class FAB(Attack):
    """The fast adaptive boundary attack, targeted (FAB-T) or in full.

    Args:
        threat: what the attacker may do: Linf, L2 or L1.
        steps: of each run, at least 1; 100 as published.
        targets: one run towards each of so many classes, those of the highest logits (or all, where there are fewer); 9
            as published. None is the untargeted attack: it steps towards the nearest class, for which it needs the
            gradient of every logit.
        restarts: rounds of runs, at least 1: the first starts at the images, all others at random points around them.
        nearest: look for the nearest adversarial image, however far; otherwise an image is done once an adversarial
            one inside the threat is known, and what is returned is always inside the threat.

    Raises:
        UserError: for another threat, and where the others are out of range.
    """

    threat: LpBall
    steps: int = 100
    targets: int | None = 9
    restarts: int = 1
    nearest: bool = False

    def __post_init__(self) -> None:
        LpBall.require(self.threat, "FAB")
        if self.steps < 1 or self.restarts < 1:
            raise UserError(f"FAB takes at least 1 step and 1 restart, got {self.steps} and {self.restarts}")
        if self.targets is not None and self.targets < 1:
            raise UserError(f"FAB takes at least 1 target, or None for the untargeted attack, got {self.targets}")

    def cost(self, classes: int) -> int:
        """See ``Attack.cost``."""
        others = classes - 1
        runs, gradient = (1, 1 + 2 * others) if self.targets is None else (min(self.targets, others), 3)
        return self.restarts * runs * self.steps * (gradient + 1) + FINAL_STEPS + 4

    def run(self, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        """See ``Attack.run``."""
        adversarial, calls = images.clone(), torch.zeros_like(labels)
        if len(images):
            calls += search.draws
            right = ~search.broken(images, labels)  # what is misclassified as it is needs no attack
            if right.any():
                outcome = self._attack(search, images[right], labels[right], generator)
                adversarial[right] = outcome.images
                calls[right] += outcome.calls
        return Outcome(adversarial, calls)

    def _attack(self, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        search = search.precise if self.nearest else search
        book = (_Distances if self.nearest else _Verdicts)(self.threat, search, images, labels)
        clean = book.logits(images)
        for restart in range(self.restarts):
            for target in self._choose_targets(clean, labels):
                if len(book.rows):
                    start = book.center if restart == 0 else self._random_start(book, generator)
                    self._one_run(search, book, start, target)
        if len(book.rows):
            _search_between(book, clean)
        return book.finish()

    def _choose_targets(self, clean: Tensor, labels: Tensor) -> list[Tensor] | list[None]:
        """The target of each image, int64 ``(n,)``, in each run of a round."""
        if self.targets is None:
            return [None]
        return list(wrong_classes(clean, labels)[:, : self.targets].unbind(1))

    def _random_start(self, book: "_Book", generator: Generator | None) -> Tensor:
        """Within half the radius of the image, or half the least distance known where that is less."""
        start = replace(self.threat, radius=self.threat.radius / 2).random_start(book.center, generator)
        share = (book.distance[book.rows] / max(self.threat.radius, 1e-30)).clamp(max=1).float()
        return book.center + share[:, None, None, None] * (start - book.center)

    def _one_run(self, search: SearchModel, book: "_Book", x: Tensor, target: Tensor | None) -> None:
        norm = _NORMS[self.threat.norm]
        for _ in range(self.steps):
            if target is None:
                book.count()
                value, normal = _nearest_hyperplane(search, x, book.labels, norm)
            else:
                reference = torch.stack([book.labels, target[book.rows]], 1)
                _, value, normal = book.gradient(x, targeted_margin, reference)
            x = _step(x, book.center, value.nan_to_num(), normal, norm)
            # This pass could give the next gradient too, but most points turn out misclassified here, and for these it
            # is of no use: two passes without and one with a gradient cost less.
            logits = book.logits(x)
            back = misclassified(logits, book.labels)[:, None, None, None]
            onward = torch.where(back, book.center + BETA * (x - book.center), x)
            stands = book.note(x, logits)
            x = onward if stands is None else onward[stands]
            if not len(x):
                return


class _Verdicts(Standing):
    """Who still stands, with the nearest point of each that the search copy misclassifies, inside the threat or not.

    Attributes:
        best: ``(n, c, h, w)``; where nothing is known, the last attempt.
        distance: float64 ``(n,)``; infinite where nothing is known.
    """

    def __init__(self, ball: LpBall, search: SearchModel, images: Tensor, labels: Tensor) -> None:
        super().__init__(ball, search, images, labels)
        self._ball = ball
        self.best = images.clone()
        self.distance = torch.full(labels.shape, torch.inf, dtype=torch.float64, device=labels.device)

    def count(self) -> None:
        """One forward pass that was made elsewhere."""
        self._calls[self.rows] += self._search.draws

    def note(self, images: Tensor, logits: Tensor) -> Tensor | None:
        """One attempt for each that stands; see ``settle``."""
        known, distance = self.distance[self.rows], self._ball.distance(images, self.center)
        nearer = misclassified(logits, self.labels) & (distance < known)
        self.distance[self.rows] = torch.where(nearer, distance, known)
        kept = nearer | (known == torch.inf)
        self.best[self.rows[kept]] = images[kept]
        return self.settle(images, logits)

    def finish(self) -> Outcome:
        """What to return; who still stands gets a last attempt, the best point projected onto the threat."""
        self.conclude(self._ball.project(self.best[self.rows], self.center))
        return self.outcome()


class _Distances(Nearest):
    """The nearest adversarial images, with the face of ``_Verdicts``; all stand to the end."""

    def __init__(self, ball: LpBall, search: SearchModel, images: Tensor, labels: Tensor) -> None:
        super().__init__(ball, search, images, labels)
        self.center, self.labels = images, labels
        self.rows = torch.arange(len(labels), device=labels.device)

    def count(self) -> None:
        """One forward pass that was made elsewhere."""
        self._calls += self._search.draws

    def note(self, images: Tensor, logits: Tensor) -> None:
        """One attempt for each."""
        self.offer(images, logits)

    def finish(self) -> Outcome:
        """What to return."""
        return self.outcome()


_Book = _Verdicts | _Distances


def _search_between(book: _Book, clean: Tensor) -> None:
    """The final search: false position on the line from the image to the nearest adversarial image (algorithm 1)."""
    inside, inside_logits = book.center, clean[book.rows]
    outside_logits = book.logits(book.best[book.rows])
    for _ in range(FINAL_STEPS):
        outside, known = book.best[book.rows], book.distance[book.rows]
        reference = torch.stack([book.labels, outside_logits.argmax(1)], 1)
        beyond, before = targeted_margin(outside_logits, reference), targeted_margin(inside_logits, reference)
        share = SHORT * (beyond / (beyond - before)).nan_to_num(0.5).clamp(0, 1)[:, None, None, None]
        x = (outside + share * (inside - outside)).clamp(0, 1)
        logits, rows = book.logits(x), book.rows
        stands = book.note(x, logits)
        found = (book.distance[rows] < known)[:, None]
        inside = torch.where(found[:, :, None, None], inside, x)
        inside_logits = torch.where(found, inside_logits, logits)
        outside_logits = torch.where(found, logits, outside_logits)
        if stands is not None:
            inside, inside_logits, outside_logits = keep(stands, inside, inside_logits, outside_logits)
            if not len(inside):
                return


def _step(x: Tensor, center: Tensor, value: Tensor, normal: Tensor, norm: "_Norm") -> Tensor:
    """One step across the hyperplane ``value + <normal, z - x> = 0`` (algorithm 1): ``(n, c, h, w)`` in [0, 1]."""
    points, w = torch.stack([x, center]).flatten(2), normal.flatten(1)
    # The same hyperplane with slopes up to 1: the squares of tiny ones would vanish, sums of huge ones be infinite.
    scale = w.abs().amax(1).clamp(min=torch.finfo(w.dtype).tiny)
    w = w / scale[:, None]
    gap = -value / scale - (w * (points - points[0])).sum(-1)
    moves = move_to_hyperplane(points, w, gap, norm.fill)
    length = torch.linalg.vector_norm(moves, norm.order, dim=-1).clamp(min=1e-8)
    alpha = (length[0] / (length[0] + length[1])).clamp(max=ALPHA_MAX)[:, None]
    ends = points + ETA * moves
    return (ends[0] + alpha * (ends[1] - ends[0])).clamp(0, 1).view_as(x)


def _nearest_hyperplane(search: SearchModel, x: Tensor, labels: Tensor, norm: "_Norm") -> tuple[Tensor, Tensor]:
    """Margin of another class over the true one and its gradient, of the class whose linearised boundary is nearest.

    One forward pass, and a backward pass for each other class. Shapes ``(n,)`` and ``(n, c, h, w)``.
    """
    value, normal = torch.zeros(len(x), device=x.device), torch.zeros_like(x)
    least = torch.full_like(value, torch.inf, dtype=torch.float64)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        leaf = x.detach().clone().requires_grad_()
        logits = search.logits(leaf)
        if not logits.requires_grad:
            raise UserError(NO_GRADIENT)
        classes = logits.shape[1]
        search.heartbeat(2 * (classes - 1) * search.draws * len(x))
        for k in range(1, classes):
            reference = torch.stack([labels, (labels + k) % classes], 1)
            margin = targeted_margin(logits, reference)
            (gradient,) = torch.autograd.grad(margin.sum(), leaf, retain_graph=k < classes - 1, allow_unused=True)
            if gradient is None:
                raise UserError(NO_GRADIENT)
            margin, gradient = margin.detach(), gradient.nan_to_num()
            slope = torch.linalg.vector_norm(gradient.flatten(1), norm.dual_order, dim=1, dtype=torch.float64)
            distance = margin.abs() / slope
            nearer = distance < least  # not where it is NaN
            least, value = torch.where(nearer, distance, least), torch.where(nearer, margin, value)
            normal = torch.where(nearer[:, None, None, None], gradient, normal)
    return value, normal


def move_to_hyperplane(
    points: Tensor, normal: Tensor, gap: Tensor, fill: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """The shortest move from each point to a hyperplane, inside the box [0, 1].

    Args:
        points: ``(..., n, d)`` in [0, 1].
        normal: ``(n, d)``, the largest slope about 1.
        gap: ``(..., n)``, what ``<normal, move>`` has to be.
        fill: ``fill_linf``, ``fill_l2`` or ``fill_l1``: in which norm.

    Returns:
        The moves, ``(..., n, d)``; towards the corner that is nearest where the hyperplane misses the box.
    """
    direction = normal.sign() * gap.sign()[..., None]  # the way that closes the gap
    room = torch.where(direction > 0, 1 - points, points)
    return direction * fill(normal.abs(), room, gap.abs()[..., None].clamp(max=1e30))


def fill_linf(slope: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Amounts in [0, room] with ``<slope, amounts> = need`` and the least maximum: ``min(t, room)``.

    Shapes: slope ``(n, d)``, at least 0; room ``(..., n, d)``; need ``(..., n, 1)``. All of the room where that is too
    little.
    """
    return _fill_evenly(slope, torch.ones_like(slope), room, need)


def fill_l2(slope: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Likewise with the least Euclidean length: ``min(t * slope, room)``."""
    return _fill_evenly(slope, slope, room, need)


def _fill_evenly(slope: Tensor, speed: Tensor, room: Tensor, need: Tensor) -> Tensor:
    # <slope, min(t * speed, room)> is concave and piecewise linear in t, so that Newton's method from t = 0 never goes
    # too far; a pixel that is full stays full, so this ends.
    t = torch.zeros_like(need)
    while True:
        full = t * speed >= room
        filled = torch.where(full, slope * room, 0).sum(-1, keepdim=True)
        rate = torch.where(full, 0, slope * speed).sum(-1, keepdim=True)
        larger = torch.maximum(t, ((need - filled) / rate.clamp(min=1e-30)).clamp(max=1e30))
        if not (larger > t).any():
            return torch.minimum(t * speed, room)
        t = larger


def fill_l1(slope: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Likewise with the least sum: all of the room of the steepest pixels, one after the other."""
    slope, order = slope.sort(-1, descending=True)
    order = order.expand_as(room)
    room = room.gather(-1, order)
    filled = (slope * room).cumsum(-1)
    amounts = ((need - (filled - slope * room)) / slope.clamp(min=1e-30)).clamp(min=0).minimum(room)
    return torch.zeros_like(room).scatter(-1, order, amounts)


class _Norm(NamedTuple):
    order: float
    dual_order: float
    fill: Callable[[Tensor, Tensor, Tensor], Tensor]


_NORMS = {
    "linf": _Norm(math.inf, 1, fill_linf),
    "l2": _Norm(2, 2, fill_l2),
    "l1": _Norm(1, math.inf, fill_l1),
}
