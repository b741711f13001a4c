"""Attack protocols by name, as the command line spells them.

A protocol is one attack or several joined by ``+``, each ``NAME[-STEPS][:OBJECTIVE]``: ``pgd-20``, ``apgd:dlr``,
``fgsm+pgd-50:cw+apgd-t``; or ``autoattack``, ``autoattack-plus``, ``autoattack-rand``; or ``purification[-STEPS]``, see
``redan.evaluation.purification``. Images meet the attacks in that order, each only those that still stand.
"""

import re
from collections.abc import Callable

from redan.attacks.apgd import APGD, TargetedAPGD
from redan.attacks.autoattack import AutoAttack, Version
from redan.attacks.base import Attack
from redan.attacks.carlini_wagner import CarliniWagner
from redan.attacks.ddn import DDN
from redan.attacks.fab import FAB
from redan.attacks.fmn import FMN
from redan.attacks.objectives import best_targeted, cross_entropy, find_objective
from redan.attacks.pgd import FGSM, PGD
from redan.attacks.rotation import RandomRotation, RotationGrid
from redan.attacks.square import Square
from redan.attacks.stadv import StAdv
from redan.errors import UserError, unknown
from redan.evaluation.purification import STEPS, purification
from redan.spatial import Flow, RotationTranslation
from redan.threats import LpBall, Threat

# By name: what makes the attack from the threat (any, the attack refuses what it cannot use), the steps and the number
# of classes, and how many steps are usual; 0 where there is nothing to count.
ATTACKS: dict[str, tuple[Callable[..., Attack], int]] = {
    "apgd-t": (lambda threat, n, k: TargetedAPGD(threat, steps=n, objective=best_targeted(k)), 100),
    "fab": (lambda threat, n, _: FAB(threat, steps=n, targets=None), 100),
    "fab-t": (lambda threat, n, _: FAB(threat, steps=n), 100),
    "square": (lambda threat, n, _: Square(threat, queries=n), 5000),
    "ddn": (lambda threat, n, _: DDN(threat, steps=n), 100),
    "fmn": (lambda threat, n, _: FMN(threat, steps=n), 100),
    "carlini-wagner": (lambda threat, n, _: CarliniWagner(threat, steps=n), 1000),
    "stadv": (lambda threat, n, _: StAdv(threat, steps=n), 100),
    "rotation-grid": (lambda threat, *_: RotationGrid(threat), 0),
    "rotation-random": (lambda threat, n, _: RandomRotation(threat, tries=n), 10),
}
WITH_OBJECTIVE: dict[str, tuple[Callable[..., Attack], int]] = {
    "fgsm": (lambda threat, _, objective: FGSM(threat, objective=objective), 0),
    "pgd": (lambda threat, n, objective: PGD(threat, steps=n, objective=objective), 20),
    "apgd": (lambda threat, n, objective: APGD(threat, steps=n, objective=objective), 100),
}
ENSEMBLES: dict[str, Version] = {"autoattack": "standard", "autoattack-plus": "plus", "autoattack-rand": "rand"}
_PURIFICATION = re.compile(r"purification(-(?P<steps>\d+))?")
_PART = re.compile(r"(?P<name>[a-z]+(-[a-z]+)?)(-(?P<steps>\d+))?(:(?P<objective>\w+))?")


def default_protocol(threat: Threat) -> str:
    """What is run where nobody says otherwise."""
    if isinstance(threat, Flow):
        return "stadv"
    if isinstance(threat, RotationTranslation):
        return "rotation-grid"
    # The margin first: where a network's logits are large, cross-entropy runs out of gradient and the margin does not.
    return "pgd-20:cw+apgd"


def purification_steps(text: str) -> int | None:
    """The steps of the protocol ``purification``; None for any other protocol."""
    match = _PURIFICATION.fullmatch(text)
    return match and int(match["steps"] or STEPS)


def parse_protocol(text: str, threat: Threat, *, classes: int, random: bool = False) -> dict[str, Attack]:
    """The attacks of a protocol by name, in order.

    Args:
        text: the protocol.
        threat: what the attacker may do.
        classes: of the model.
        random: the model draws at random, so AutoAttack's version for such models takes the place of its others.

    Raises:
        UserError: where the text is not a protocol, or one that is not for this threat.
    """
    if text in ENSEMBLES:
        ball = LpBall.require(threat, "AutoAttack")
        return AutoAttack(ball, "rand" if random else ENSEMBLES[text]).parts(classes)
    steps = purification_steps(text)
    if steps is not None:
        return purification(threat, steps, classes, random=random)
    parts = text.split("+")
    attacks = {part: _parse(part, threat, classes) for part in parts}
    if len(attacks) < len(parts):
        raise UserError(f"the protocol {text!r} names an attack twice")
    return attacks


def _parse(text: str, threat: Threat, classes: int) -> Attack:
    match = _PART.fullmatch(text)
    if match is None:
        raise UserError(f"an attack is written NAME[-STEPS][:OBJECTIVE], such as pgd-20 or apgd:dlr, got {text!r}")
    name, steps, objective = match["name"], match["steps"], match["objective"]
    if name == "purification" or name in ENSEMBLES:
        raise UserError(f"{name} is a whole protocol: it stands alone and has no objective to choose")
    if name not in ATTACKS | WITH_OBJECTIVE:
        raise unknown("attack", name, [*ATTACKS, *WITH_OBJECTIVE, *ENSEMBLES, "purification"])
    make, usual = (ATTACKS | WITH_OBJECTIVE)[name]
    if steps and not usual:
        raise UserError(f"{name} has no number of steps to choose, got {text!r}")
    count = int(steps) if steps else usual
    if name in WITH_OBJECTIVE:
        return make(threat, count, find_objective(objective) if objective else cross_entropy)
    if objective:
        raise UserError(f"{name} has an objective of its own, got {text!r}")
    return make(threat, count, classes)
