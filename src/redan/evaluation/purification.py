"""The honest evaluation of purification: attacks that know less and less, then more and more, of the whole network.

Defences that purify looked robust where the attack left out the purifier, took a wrong gradient for it, or stopped at
one lucky draw (Lee & Kim, ICCV 2023; Liu et al., ICLR 2025). So images first meet the attack that is often the only
one, on the bare classifier, and then those that differentiate through everything, over many draws; of each image the
worst candidate is kept.
"""

import copy
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from redan.attacks.apgd import APGD, TargetedAPGD
from redan.attacks.autoattack import AutoAttack
from redan.attacks.base import Attack
from redan.attacks.fab import FAB
from redan.attacks.objectives import cw_margin
from redan.attacks.pgd import PGD
from redan.attacks.search import SearchModel
from redan.attacks.square import Square
from redan.attacks.stadv import StAdv
from redan.errors import UserError
from redan.models.purified import Purified
from redan.models.random_transforms import Draw
from redan.spatial import Flow
from redan.threats import LpBall, Threat

THREATS = ("linf:8/255", "l2:0.5", "l2:1.0", "stadv:0.05")  # a network is evaluated in these where none is asked for
STEPS = 200
BPDA_STEPS = 50
RESTARTS = 2
STEP_SIZE = 0.007 / (8 / 255)  # of PGD by exact gradients, in units of the radius (Lee & Kim)
QUERIES_A_STEP, QUERIES = 5, 1000  # of Square: so many a step of PGD, at most that many
TRANSFER = "transfer"
OBLIVIOUS = (TRANSFER, "bpda")  # attacks that search on a view of their own, see ``views``


def purification(threat: Threat, steps: int, classes: int, *, random: bool) -> dict[str, Attack]:
    """The attacks of the protocol by name, in order.

    Args:
        threat: an Lp ball or a flow.
        steps: of PGD and StAdv; fewer than ``STEPS`` shorten the other attacks, too.
        classes: of the model.
        random: whether the model draws at random; AutoAttack is the standard one where it does not.

    Raises:
        UserError: for less than one step, or another threat.
    """
    if steps < 1:
        raise UserError(f"purification takes at least 1 step, got {steps}")
    if isinstance(threat, Flow):
        through_all = StAdv(threat, steps=steps)
        return {
            TRANSFER: through_all,
            "bpda": replace(through_all, steps=min(steps, BPDA_STEPS)),
            "stadv": through_all,
        }
    if not isinstance(threat, LpBall):
        raise UserError(f"purification needs {LpBall.kind}, or {Flow.kind}, got {threat}")
    exact = exact_pgd(threat, steps)
    parts: dict[str, Attack] = {
        TRANSFER: PGD(threat, steps=steps, drop_broken=False),
        "bpda": PGD(threat, steps=min(steps, BPDA_STEPS), objective=cw_margin),
        "pgd:ce": exact,
        "pgd:cw": replace(exact, objective=cw_margin),
    }
    if not random:
        return parts | at_known_draw(threat, steps, classes)
    queries = min(QUERIES_A_STEP * steps, QUERIES)
    square = {f"square-{queries}": Square(threat, queries=queries)}
    return parts | shortened(AutoAttack(threat, "rand").parts(classes), steps) | square


def at_known_draw(threat: LpBall | Flow, steps: int, classes: int) -> dict[str, Attack]:
    """The attacks on a network that draws nothing, or whose one draw is known, by name and in order."""
    if isinstance(threat, Flow):
        return {"stadv": StAdv(threat, steps=steps)}
    return shortened(AutoAttack(threat).parts(classes), steps)


def shortened(attacks: dict[str, Attack], steps: int) -> dict[str, Attack]:
    """The parts of AutoAttack with at most so many steps each, Square's queries in proportion to 200."""
    short: dict[str, Attack] = {}
    for name, attack in attacks.items():
        if isinstance(attack, Square):
            short[name] = replace(attack, queries=max(1, min(attack.queries, attack.queries * steps // STEPS)))
        else:
            assert isinstance(attack, APGD | TargetedAPGD | FAB)
            short[name] = replace(attack, steps=min(attack.steps, steps))
    return short


def exact_pgd(threat: LpBall, steps: int) -> PGD:
    """PGD on the cross-entropy as Lee & Kim run it, with restarts."""
    return PGD(threat, steps=steps, step_size=STEP_SIZE * threat.radius or None, restarts=RESTARTS)


def views(network: nn.Module) -> dict[str, nn.Module]:
    """What the attacks of ``OBLIVIOUS`` search on; of a network that purifies nothing there are none."""
    if not isinstance(network, Purified):
        return {}
    return {TRANSFER: network.classifier, "bpda": bypassing(network)}


def transform_facts(network: nn.Module) -> dict[str, Any] | None:
    """What a purified network draws: it is no part of the weights."""
    if not isinstance(network, Purified):
        return None
    facts = {
        key: value for key, value in vars(network.transform).items() if not key.startswith("_") and key != "training"
    }
    return facts | {"votes": network.votes}


class _Bypassing(Purified):
    """Computes what the network computes; its gradient is the classifier's at the purified image.

    That is BPDA with the identity in the place of the derivative of transform and purifier (Athalye et al., ICML 2018).
    """

    def purify(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        with torch.no_grad():
            purified = super().purify(images, draw)
        return images + (purified - images).detach()


def bypassing(network: Purified) -> Purified:
    """A view of the network that shares all it has, with the identity as derivative of transform and purifier."""
    view = copy.copy(network)
    view.__class__ = type("Bypassing", (_Bypassing, type(network)), {})  # whatever kind of purified network it is
    return view


class Oblivious(SearchModel):
    """A part of a network, attacked in the place of the whole.

    What breaks the part says nothing of the whole, so no image counts as broken, and attacks go on to their last step
    with the batch whole.
    """

    def score(self, images: Tensor, labels: Tensor) -> Tensor:
        """See ``SearchModel.score``; always 0."""
        return torch.zeros(len(labels), device=labels.device)


def describe(
    attacks: Mapping[str, Attack],
    known: Mapping[str, Attack],
    threat: Threat,
    *,
    seen: Container[str],
    steps: int,
    draws: int,
    studied: int,
) -> str:
    """One line that says what was done.

    Args:
        attacks: those that images met, by name and in order.
        known: likewise those on one draw that the attacker knows; none for a network without randomness.
        threat: as asked for.
        seen: names of the views that there were.
        steps: of the protocol.
        draws: passes behind each gradient and each value; 1 for a network without randomness.
        studied: images of the study of convergence, 0 without one.
    """
    flows = isinstance(threat, Flow)
    done = [f"shortened from {STEPS} to {steps} steps"] if steps < STEPS else []
    done.append(f"in order {_efforts(attacks, draws)}")
    left = [f"{title} (nothing purifies)" for title in OBLIVIOUS if title not in seen]
    if flows:
        left.append("PGD, AutoAttack, Square, convergence (for Lp threats)")
    if draws == 1:
        left.append(f"averages over draws, one known draw{'' if flows else ', convergence'} (there is no randomness)")
    else:
        whole = not flows and TRANSFER in seen
        done.append(f"{'AutoAttack at one known draw' if whole else 'one known draw'}: {_efforts(known, 1)}")
        if not flows and not whole:
            left.append("AutoAttack at one known draw (nothing purifies)")
        if studied:
            done.append(f"convergence on {studied} images")
        elif not flows:
            left.append("convergence (not asked for)")
    return "; ".join([*done, f"left out: {', '.join(left) or 'nothing'}"])


def _efforts(attacks: Mapping[str, Attack], draws: int) -> str:
    """Each attack's name, with what it spends on an image that stands to the end."""
    told = []
    for title, attack in attacks.items():
        if isinstance(attack, Square):
            spent, restarts = f"{attack.queries} queries", attack.restarts
        else:
            assert isinstance(attack, PGD | APGD | TargetedAPGD | FAB | StAdv)
            spent = f"{attack.steps} steps"
            restarts = attack.restarts if isinstance(attack, PGD | APGD | FAB) else 1
        if draws > 1:
            spent += ", no EOT" if title == TRANSFER else f" x EOT {draws}"
        if isinstance(attack, TargetedAPGD | FAB) and attack.targets is not None:
            spent += f", up to {attack.targets} targets"
        told.append(f"{title} ({spent}{f', {restarts} restarts' if restarts > 1 else ''})")
    return ", ".join(told)
