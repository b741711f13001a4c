"""Attack protocols by name, as the command line spells them.

A protocol is one attack or several joined by ``+``, each ``NAME[-STEPS][:OBJECTIVE]``: ``pgd-20``, ``apgd:dlr``,
``fgsm+pgd-50:cw+apgd``. Images meet the attacks in that order, each only those that still stand.
"""

import re

from redan.attacks.apgd import APGD
from redan.attacks.base import Attack
from redan.attacks.objectives import cross_entropy, find_objective
from redan.attacks.pgd import FGSM, PGD
from redan.errors import UserError, unknown
from redan.threats import Threat

# The margin first: where a network's logits are large, cross-entropy runs out of gradient and the margin does not.
DEFAULT = "pgd-20:cw+apgd"
ATTACKS = ("fgsm", "pgd", "apgd")
_PART = re.compile(r"(?P<name>[a-z]+)(-(?P<steps>\d+))?(:(?P<objective>\w+))?")


def parse_protocol(text: str, threat: Threat) -> dict[str, Attack]:
    """The attacks of a protocol by name, in order.

    Raises:
        UserError: where the text is not a protocol.
    """
    parts = text.split("+")
    attacks = {part: _parse(part, threat) for part in parts}
    if len(attacks) < len(parts):
        raise UserError(f"the protocol {text!r} names an attack twice")
    return attacks


def _parse(text: str, threat: Threat) -> Attack:
    match = _PART.fullmatch(text)
    if match is None:
        raise UserError(f"an attack is written NAME[-STEPS][:OBJECTIVE], such as pgd-20 or apgd:dlr, got {text!r}")
    name, steps = match["name"], match["steps"]
    if name not in ATTACKS:
        raise unknown("attack", name, ATTACKS)
    objective = find_objective(match["objective"]) if match["objective"] else cross_entropy
    if name == "fgsm":
        if steps:
            raise UserError("fgsm has a single step; write fgsm, or pgd-STEPS for more")
        return FGSM(threat, objective=objective)
    if name == "pgd":
        return PGD(threat, steps=int(steps or 20), objective=objective)
    return APGD(threat, steps=int(steps or 100), objective=objective)
