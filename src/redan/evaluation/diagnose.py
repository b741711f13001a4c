"""Diagnostics: does the network withstand, or does the attack fail for want of a gradient?

A network whose gradient is zero, noisy or misleading looks robust to attacks that follow it: gradient masking. Each
check holds for networks whose gradient leads somewhere, and is known to fail for masked ones:

* Athalye, Carlini and Wagner (ICML 2018), section 3.1: many steps beat one, the white box beats the black box, any
  image falls to a large enough radius, the gradient beats random directions.
* Carlini et al. (arXiv:1902.06705, 2019): accuracy by radius and by steps, which levels off; images made on another
  network; a loss whose gradient large logits have used up.
* Croce et al. (ICML 2022): defences that draw at random, or that differ between modes.
* Pintor et al. (NeurIPS 2022): gradients that are zero, steps that do not raise the loss.

No count is exactly as theory has it: attacks end in local optima. A check tolerates a share of the images and, beyond
it, what chance explains: it fails where, were the share true, so many images came up in fewer than 1 of 100 samples
(exact binomial). Of 200 images, a share of 2 % tolerates 9.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from scipy.stats import binom
from torch import Tensor, nn

from redan.attacks.apgd import APGD
from redan.attacks.base import Attack
from redan.attacks.objectives import cross_entropy, cw_margin
from redan.attacks.pgd import FGSM, PGD
from redan.attacks.search import Mode, SearchModel
from redan.attacks.square import Square
from redan.errors import UserError
from redan.evaluation.progress import EvaluationProgress
from redan.evaluation.results import Check
from redan.seeds import generator
from redan.threats import LpBall, Threat, standard_normal

IMAGES = 200
RADII = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # in units of the threat's; the whole box comes behind them
STEPS = (1, 2, 5, 10, 20, 50, 100, 200)
MANY = 10  # steps from which on PGD counts as an attack of many steps
QUERIES = 1000
DIRECTIONS = 10
NUDGE = 0.1  # length of a step in a random or the gradient's direction, in units of the radius

# Tolerated shares of images.
FEW = 0.01  # that have no gradient, stand in the whole box, or differ between passes
SOME = 0.02  # that another attack breaks and PGD does not; by which a curve rises, or is not level at its end
QUARTER = 0.25  # of those that fall to the margin, by which fewer fall to cross-entropy: a tenth is usual
DOWNHILL = 0.1  # at which a random direction raises the margin as much as the gradient does


def diagnose(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    seed: int = 0,
    transfer: nn.Module | None = None,
    progress: EvaluationProgress | None = None,
) -> tuple[Check, ...]:
    """Look for gradient masking on the first ``IMAGES`` images that the network classifies correctly.

    Args:
        network: images to logits, on its device; searched in float32.
        images: float32 ``(n, c, h, w)`` in [0, 1], on the same device; one batch.
        labels: int64 ``(n,)``, likewise.
        threat: an Lp ball of a radius above 0.
        seed: of the attacks.
        transfer: another network for such images; adversarial images made on it are tried on this one.
        progress: is shown the work.

    Returns:
        The checks; those that do not apply have ``passed`` None. A network that fails ``repeat`` has no others, and
        one that classifies fewer than 2 images correctly none at all.

    Raises:
        UserError: for another threat, and for a transfer network that does not fit.
    """
    ball, judge = require_ball(threat), SearchModel(network)
    if transfer is not None:
        require_fitting(transfer, images, judge.classes(images))
    chosen = (judge.exact_logits(images).argmax(1) == labels).nonzero().squeeze(1)[:IMAGES]
    if len(chosen) < 2:
        return ()
    progress = progress or EvaluationProgress(show=False)
    case = _Case(_Connected(network), images[chosen], labels[chosen], ball, seed, progress)
    repeat = _repeat(case)
    if not repeat.passed:
        return (repeat,)
    search = case.search(case.network)
    by_steps = {k: case.falls("steps", PGD(ball, steps=k, objective=cw_margin), search) for k in STEPS}
    by_entropy = case.falls("cross-entropy", PGD(ball, steps=100, objective=cross_entropy), search)
    fallen = torch.stack([by_entropy, *(fell for k, fell in by_steps.items() if k >= MANY)]).any(0)
    stands = ~(fallen | case.falls("APGD", APGD(ball), search, ~fallen))
    one_step = case.falls("one step", FGSM(ball, objective=cw_margin), search, stands)
    black_box = case.falls("black box", Square(ball, queries=QUERIES), search, stands)
    return (
        repeat,
        _radius(case),
        _steps(case, by_steps),
        _cross_entropy(case, by_steps[100], by_entropy),
        _zero_gradient(case),
        _direction(case),
        _another(case, "one step", "FGSM", one_step, stands),
        _another(case, "black box", f"Square, {QUERIES} queries without a gradient", black_box, stands),
        _transfer(case, transfer, stands),
        _training_mode(case, stands),
    )


def require_ball(threat: Threat) -> LpBall:
    """The threat, where it can be diagnosed. Raises: UserError where it cannot."""
    ball = LpBall.require(threat, "--diagnose")
    if ball.radius == 0:
        raise UserError(f"--diagnose needs a threat of a radius above 0, got {ball}")
    return ball


def require_fitting(transfer: nn.Module, images: Tensor, classes: int) -> None:
    """Raise UserError unless the network takes such images ``(n, c, h, w)`` and gives so many logits."""
    try:
        given = SearchModel(transfer).classes(images)
    except RuntimeError as error:
        raise UserError(f"the --transfer network cannot take images of shape {tuple(images.shape[1:])}") from error
    if given != classes:
        raise UserError(f"the --transfer network gives {given} logits, the evaluated one {classes}")


def tolerated(images: int, share: float) -> int:
    """The most of so many images that a tolerated share explains: more come up in fewer than 1 of 100 samples."""
    return int(binom.ppf(0.99, images, share))


class _Connected(nn.Module):
    """The network, with a gradient of zero where it has no path for one.

    A threshold cuts the logits off from the images; what has no gradient is to be called out here, not refused.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits + 0 * images.flatten(1).sum(1, keepdim=True)


@dataclass(frozen=True)
class _Case:
    """A network, the images that it classifies correctly, and what it is to withstand."""

    network: nn.Module
    images: Tensor
    labels: Tensor
    threat: LpBall
    seed: int
    progress: EvaluationProgress

    def search(self, network: nn.Module, mode: Mode = "eval") -> SearchModel:
        """What attacks search with, in float32; the bar counts its passes."""
        search = SearchModel(network, precision="float32", mode=mode)
        search.heartbeat = self.progress.beat
        return search

    def attacked(self, name: str, attack: Attack, search: SearchModel, who: Tensor) -> Tensor:
        """What the attack makes of those images, bool ``(n,)``. Attacks of one name draw the same."""
        self.progress.begin(f"check {name}", who, attack.cost(search.classes(self.images)))
        return attack.run(search, self.images[who], self.labels[who], generator(self.seed, "diagnose", name)).images

    def falls(self, name: str, attack: Attack, search: SearchModel, who: Tensor | None = None) -> Tensor:
        """Which of those images, all if None, the attack breaks: bool ``(n,)``.

        The network judges, in float32, evaluation mode and the exact threat, whatever the attack has searched with.
        """
        fallen = torch.zeros_like(self.labels, dtype=torch.bool)
        who = ~fallen if who is None else who
        if who.any():
            found = self.attacked(name, attack, search, who)
            inside = attack.threat.contains(found, self.images[who])
            fallen[who] = SearchModel(self.network).broken(found, self.labels[who]) & inside
        return fallen

    def left(self, fallen: Iterable[Tensor]) -> list[int]:
        """How many images each attack leaves standing."""
        return [len(self.labels) - int(fell.sum()) for fell in fallen]

    def right(self, logits: Tensor) -> int:
        """How many images are classified correctly."""
        return int((logits.argmax(1) == self.labels).sum())

    def percent(self, *counts: int) -> str:
        """Counts of images as percentages."""
        return ", ".join(f"{100 * count / len(self.labels):.1f}" for count in counts)

    def tolerates(self, count: int, share: float) -> bool:
        """Whether that share explains so many images."""
        return count <= tolerated(len(self.labels), share)

    def counted(self, name: str, count: int, share: float, figure: str) -> Check:
        """The check that the share explains so many images."""
        return Check(name=name, passed=self.tolerates(count, share), figure=figure, values={"images": count})

    def curve(self, name: str, passed: bool, figure: str, points: Iterable[float | str], left: list[int]) -> Check:
        """A check of how many images are left at each point."""
        values = {str(point): count / len(self.labels) for point, count in zip(points, left, strict=True)}
        return Check(name=name, passed=passed, figure=figure, values=values)


def _repeat(case: _Case) -> Check:
    """A verdict on a network that draws at random, or that mixes the images of a batch, is luck."""
    judge = SearchModel(case.network)
    first = judge.exact_logits(case.images)
    second = torch.cat([judge.exact_logits(half) for half in case.images.chunk(2)])
    differ = int(((first - second).abs().amax(1) > 1e-4 * first.abs().amax()).sum())
    figure = f"two passes, the second one in halves, differ at {differ} of {len(case.labels)} images"
    if not case.tolerates(differ, FEW):
        figure += "; dropout or other randomness is left on, and no other check would mean anything"
    return case.counted("repeat", differ, FEW, figure)


def _radius(case: _Case) -> Check:
    """In the whole box each image can become any other, so whoever stands there was not attacked well."""
    box = float(case.threat.distance(torch.ones_like(case.images[:1]), torch.zeros_like(case.images[:1])))
    radii = [radius for radius in (scale * case.threat.radius for scale in RADII) if radius < box] + [box]
    search = case.search(case.network)
    attacks = [PGD(replace(case.threat, radius=radius), steps=20, objective=cw_margin) for radius in radii]
    left = case.left(case.falls("radius", attack, search) for attack in attacks)
    passed = left[0] == len(case.labels) and case.tolerates(_rise(left), SOME) and case.tolerates(left[-1], FEW)
    names = [f"{radius:.4g}" for radius in radii]
    figure = f"at radius {', '.join(names)} stand {case.percent(*left)} %; must fall from 100 to 0"
    return case.curve("radius", passed, figure, names, left)


def _steps(case: _Case, fallen: dict[int, Tensor]) -> Check:
    """More steps must not lose, and the last hundred must hardly win."""
    left = case.left(fallen.values())
    passed = case.tolerates(_rise(left), SOME) and case.tolerates(left[-2] - left[-1], SOME)
    figure = f"after {', '.join(map(str, fallen))} steps stand {case.percent(*left)} %; must fall, then level off"
    return case.curve("steps", passed, figure, fallen, left)


def _cross_entropy(case: _Case, by_margin: Tensor, by_entropy: Tensor) -> Check:
    """Where the logits are huge, cross-entropy has no gradient left; the margin always has."""
    left = case.left((by_margin, by_entropy))
    figure = (
        f"against PGD on the margin stand {case.percent(left[0])} %, on cross-entropy {case.percent(left[1])} %; "
        "many more would mean that huge logits blind it"
    )
    passed = left[1] - left[0] <= tolerated(int(by_margin.sum()), QUARTER)
    return case.curve("cross-entropy", passed, figure, ("margin", "cross-entropy"), left)


def _zero_gradient(case: _Case) -> Check:
    """No attack by the gradient leaves a place that has none."""
    gradient = case.search(case.network).gradient(case.images, cross_entropy, case.labels)[2]
    count = int((gradient == 0).flatten(1).all(1).sum())
    figure = f"the gradient of cross-entropy is exactly zero at {count} of {len(case.labels)} images"
    return case.counted("zero gradient", count, FEW, figure)


def _direction(case: _Case) -> Check:
    """A small step along the gradient must raise the margin, and more than random ones of the same length."""
    search, x = case.search(case.network), case.images
    draws = generator(case.seed, "diagnose", "direction")

    @torch.no_grad()
    def after(direction: Tensor) -> Tensor:
        step = case.threat.ascend(x, direction, NUDGE * case.threat.radius)
        return cw_margin(search.logits(case.threat.project(step, x)), case.labels)

    best = torch.stack([after(standard_normal(x, draws)) for _ in range(DIRECTIONS)]).amax(0)
    count = int((after(search.gradient(x, cw_margin, case.labels)[2]) <= best).sum())
    figure = f"at {count} of {len(case.labels)} images one of {DIRECTIONS} random steps leads as far as the gradient's"
    return case.counted("direction", count, DOWNHILL, figure)


def _another(case: _Case, name: str, attacker: str, found: Tensor, stands: Tensor) -> Check:
    """What another attack has broken of the images that stand against PGD and APGD: both bool ``(n,)``."""
    count, most = int((found & stands).sum()), tolerated(len(case.labels), SOME)
    left = f"of {int(stands.sum())} images that PGD and APGD leave standing"
    return case.counted(name, count, SOME, f"{left}, {count} fall to {attacker}; up to {most} may")


def _transfer(case: _Case, other: nn.Module | None, stands: Tensor) -> Check:
    """Images made on another network, and driven far beyond its boundary."""
    if other is None:
        return Check(name="transfer", passed=None, figure="needs another network: --transfer RUN")
    attack = PGD(case.threat, steps=20, objective=cw_margin, drop_broken=False)
    found = case.falls("transfer", attack, case.search(_Connected(other)), stands)
    return _another(case, "transfer", "images made on the other network", found, stands)


@torch.no_grad()
def _training_mode(case: _Case, stands: Tensor) -> Check:
    """What masks in evaluation mode alone falls to the gradients of training mode."""
    search, judge = case.search(case.network, "train"), SearchModel(case.network)
    try:
        clean, evaluated = search.logits(case.images), judge.exact_logits(case.images)
    except UserError as error:  # training mode needs a copy, and not every network can be copied
        return Check(name="training mode", passed=None, figure=str(error))
    if bool(((clean - evaluated).abs() <= 1e-4 * evaluated.abs().amax()).all()):
        return Check(name="training mode", passed=None, figure="the network computes the same in both modes")
    attack = PGD(case.threat, steps=20, objective=cw_margin, drop_broken=False)  # a batch has statistics of its own
    images = case.attacked("training mode", attack, search, torch.ones_like(stands))
    check = _another(case, "training mode", "gradients of training mode", judge.broken(images, case.labels), stands)
    right = [case.right(logits) for logits in (clean, search.logits(images), judge.exact_logits(images))]
    figure = (
        f"{check.figure}; clean and so attacked, {case.percent(*right[:2])} % are right in training mode, "
        f"{case.percent(len(case.labels), right[2])} % in evaluation mode"
    )
    return check.model_copy(update={"figure": figure})


def _rise(counts: list[int]) -> int:
    """The most by which a count exceeds an earlier one."""
    return max(later - least for later, least in zip(counts, accumulate(counts, min), strict=True))
