"""Attacks: each a frozen set of hyper-parameters that turns images into adversarial images."""

from redan.attacks.apgd import APGD
from redan.attacks.base import Attack, Outcome
from redan.attacks.objectives import Objective, cross_entropy, cw_margin, dlr, kl_divergence
from redan.attacks.pgd import FGSM, PGD
from redan.attacks.search import SearchModel

__all__ = [
    "APGD",
    "FGSM",
    "PGD",
    "Attack",
    "Objective",
    "Outcome",
    "SearchModel",
    "cross_entropy",
    "cw_margin",
    "dlr",
    "kl_divergence",
]
