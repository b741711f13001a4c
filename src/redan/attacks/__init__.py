"""Attacks: each a frozen set of hyper-parameters that turns images into adversarial images."""

from redan.attacks.apgd import APGD, TargetedAPGD
from redan.attacks.autoattack import AutoAttack
from redan.attacks.base import Attack, Outcome
from redan.attacks.carlini_wagner import CarliniWagner
from redan.attacks.ddn import DDN
from redan.attacks.fab import FAB
from redan.attacks.fmn import FMN
from redan.attacks.objectives import Objective, cross_entropy, cw_margin, dlr, kl_divergence
from redan.attacks.pgd import FGSM, PGD
from redan.attacks.rotation import RandomRotation, RotationGrid
from redan.attacks.search import SearchModel
from redan.attacks.square import Square
from redan.attacks.stadv import StAdv

__all__ = [
    "APGD",
    "DDN",
    "FAB",
    "FGSM",
    "FMN",
    "PGD",
    "Attack",
    "AutoAttack",
    "CarliniWagner",
    "Objective",
    "Outcome",
    "RandomRotation",
    "RotationGrid",
    "SearchModel",
    "Square",
    "StAdv",
    "TargetedAPGD",
    "cross_entropy",
    "cw_margin",
    "dlr",
    "kl_divergence",
]
