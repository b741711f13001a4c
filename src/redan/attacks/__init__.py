"""Attacks: each a frozen set of hyper-parameters that turns images into adversarial images."""

from redan.attacks.apgd import APGD, TargetedAPGD
from redan.attacks.autoattack import AutoAttack
from redan.attacks.base import Attack, Outcome
from redan.attacks.fab import FAB
from redan.attacks.objectives import Objective, cross_entropy, cw_margin, dlr, kl_divergence
from redan.attacks.pgd import FGSM, PGD
from redan.attacks.search import SearchModel
from redan.attacks.square import Square

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "PGD",
    "Attack",
    "AutoAttack",
    "Objective",
    "Outcome",
    "SearchModel",
    "Square",
    "TargetedAPGD",
    "cross_entropy",
    "cw_margin",
    "dlr",
    "kl_divergence",
]
