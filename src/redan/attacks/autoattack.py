"""AutoAttack (Croce & Hein, ICML 2020; for L1: ICML 2021): four attacks without a hyper-parameter to choose."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from redan.attacks.apgd import APGD, TargetedAPGD
from redan.attacks.base import Attack, Outcome
from redan.attacks.fab import FAB
from redan.attacks.objectives import best_targeted, best_untargeted
from redan.attacks.search import SearchModel
from redan.attacks.square import Square
from redan.errors import unknown
from redan.threats import L1, LpBall

Version = Literal["standard", "plus", "rand"]


@dataclass(frozen=True)
class AutoAttack(Attack):
    """The ensemble: each attack meets the images that stood against those before it.

    With fewer classes than the DLR objectives need, 3 and towards a target 4, the margin takes their place.

    Args:
        threat: what the attacker may do.
        version: ``standard`` is APGD-CE, APGD-T, FAB-T and Square; ``plus`` adds APGD-DLR and untargeted FAB, with 5
            restarts; ``rand`` is APGD-CE and APGD-DLR, for models that draw at random.
    """

    threat: LpBall
    version: Version = "standard"

    def __post_init__(self) -> None:
        LpBall.require(self.threat, "AutoAttack")
        if self.version not in get_args(Version):
            raise unknown("version of AutoAttack", self.version, get_args(Version))

    def parts(self, classes: int) -> dict[str, Attack]:
        """The attacks in order, as published, for a model with so many classes."""
        threat = self.threat
        sparse = isinstance(threat, L1)
        restarts = 5 if self.version == "plus" or (self.version == "standard" and sparse) else 1
        apgd_ce = APGD(threat, restarts=restarts)
        apgd_dlr = APGD(threat, objective=best_untargeted(classes), restarts=restarts)
        targets = 5 if self.version == "standard" and sparse else 9
        apgd_t = TargetedAPGD(threat, objective=best_targeted(classes), targets=targets)
        if self.version == "rand":
            return {"apgd-ce": apgd_ce, "apgd-dlr": apgd_dlr}
        if self.version == "standard":
            return {"apgd-ce": apgd_ce, "apgd-t": apgd_t, "fab-t": FAB(threat), "square": Square(threat)}
        return {
            "apgd-ce": apgd_ce,
            "apgd-dlr": apgd_dlr,
            "fab": FAB(threat, targets=None, restarts=restarts),
            "square": Square(threat),
            "apgd-t": apgd_t,
            "fab-t": FAB(threat),
        }

    def cost(self, classes: int) -> int:
        """See ``Attack.cost``."""
        return sum(attack.cost(classes) for attack in self.parts(classes).values())

    def run(self, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        """See ``Attack.run``."""
        if not len(labels):
            return Outcome(images.clone(), labels.clone())
        adversarial, calls, score = images.clone(), torch.full_like(labels, search.draws), search.score(images, labels)
        for attack in self.parts(search.classes(images)).values():
            rows = (score < 1).nonzero().squeeze(1)
            if not len(rows):
                break
            found, spent = attack.run(search, images[rows], labels[rows], generator)
            calls[rows] += spent + search.draws
            new = search.score(found, labels[rows]) * self.threat.contains(found, images[rows])
            better = new >= score[rows]  # the last attempt, where none is better than another
            adversarial[rows[better]], score[rows[better]] = found[better], new[better]
        return Outcome(adversarial, calls)
