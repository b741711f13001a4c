"""Models that draw at random: what is counted of them.

A figure of such a model means little without the rule it was counted by, so all four are given, clean and attacked.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from redan.attacks.base import Attack
from redan.attacks.objectives import cw_margin
from redan.attacks.pgd import PGD
from redan.attacks.search import SearchModel
from redan.attacks.stadv import StAdv
from redan.evaluation.purification import Oblivious
from redan.evaluation.results import Accuracy, Counts
from redan.evaluation.survey import Survey
from redan.spatial import Flow
from redan.threats import LpBall, Threat

FIXED_STEPS = 50


class Fixed(nn.Module):
    """The model with the same torch randomness at each pass, the attacker's as well as the judge's.

    Each place in the batch has draws of its own, so they stay an image's own where the batch stays whole.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.model, self.seed = model, seed
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            logits: Tensor = self.model(images)
        return logits


def count(
    survey: Survey, network: nn.Module, threat: Threat, draws: int, seed: int, known: Survey | None = None
) -> tuple[Counts, Counts]:
    """Clean and attacked accuracy under each rule, the attacked one on the survey's adversarial images.

    New draws judge, not those that chose the adversarial images: these would count luck as weakness.

    Args:
        survey: the images, after the attacks.
        network: that draws at random.
        threat: what it was to withstand.
        draws: passes that are counted.
        seed: of the draws.
        known: the images after attacks on one draw of the network that the attacker knows. Without it, all torch
            randomness is fixed, and ``at_fixed_draw`` attacks that.
    """
    judge = SearchModel(network, draws=1)

    def vote(images: Tensor) -> Tensor:
        return torch.stack([judge.exact_logits(images).argmax(1) for _ in range(draws)]).cpu()

    def votes(part: Tensor) -> tuple[Tensor, Tensor]:
        """Clean and attacked predictions, int64 ``(draws, n)`` each."""
        return vote(survey.images(part)), vote(survey.attacked(part))

    torch.manual_seed(seed)
    everyone = torch.arange(len(survey.labels))
    clean, attacked = zip(*survey.each_batch(everyone, votes), strict=True)
    if known is None:
        fixed = zip(*survey.each_batch(everyone, _fixed(survey, network, threat, seed)), strict=True)
        stood = tuple(torch.cat(parts) for parts in fixed)
    else:
        stood = known.right, known.stands
    labels = survey.labels
    return _count(torch.cat(clean, 1), labels, stood[0]), _count(torch.cat(attacked, 1), labels, stood[1])


def at_fixed_draw(threat: Threat) -> dict[str, Attack]:
    """The attack, by name, on a network whose torch randomness is fixed; none for a threat that is no ball or flow."""
    if isinstance(threat, LpBall):
        return {"pgd:cw": PGD(threat, steps=FIXED_STEPS, objective=cw_margin, drop_broken=False)}
    return {"stadv": StAdv(threat, steps=FIXED_STEPS)} if isinstance(threat, Flow) else {}


def _fixed(survey: Survey, network: nn.Module, threat: Threat, seed: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Which of a batch are right, clean and attacked, where one draw is fixed and known: bool ``(n,)`` each."""
    fixed = Oblivious(Fixed(network, seed), precision="float32")  # an image that left would move the draws of others

    def stand(part: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = survey.images(part), survey.labels[part].to(fixed.device)
        found = [survey.attacked(part)]
        for attack in at_fixed_draw(threat).values():
            found.append(attack.run(fixed, images, labels, torch.Generator().manual_seed(seed)).images)
        clean, *attacked = (fixed.exact_logits(x).argmax(1) == labels for x in (images, *found))
        return clean.cpu(), torch.stack(attacked).all(0).cpu()

    return stand


def _count(predictions: Tensor, labels: Tensor, fixed: Tensor) -> Counts:
    """Of predictions, int64 ``(draws, n)``, and who is right where one draw is fixed, bool ``(n,)``."""
    right = predictions == labels
    n = len(labels)
    return Counts(
        mean=Accuracy.of(round(float(right.float().mean(0).sum())), n),
        worst=Accuracy.of(int(right.all(0).sum()), n),
        majority=Accuracy.of(int((predictions.mode(0).values == labels).sum()), n),
        fixed=Accuracy.of(int(fixed.sum()), n),
    )
