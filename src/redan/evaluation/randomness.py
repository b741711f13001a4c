"""Models that draw at random: what is counted of them.

A figure of such a model means little without the rule it was counted by, so all four are given, clean and attacked.
"""

import torch
from torch import Tensor, nn

from redan.attacks.objectives import cw_margin
from redan.attacks.pgd import PGD
from redan.attacks.search import SearchModel
from redan.evaluation.results import Accuracy, Counts
from redan.evaluation.survey import Survey
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


def count(survey: Survey, network: nn.Module, threat: Threat, draws: int, seed: int) -> tuple[Counts, Counts]:
    """Clean and attacked accuracy under each rule, the attacked one on the survey's adversarial images.

    New draws judge, not those that chose the adversarial images: these would count luck as weakness. Only for
    ``fixed`` there is one more attack, PGD on the margin, that knows the one draw; a threat without a norm has none.
    """
    search, fixed = SearchModel(network, draws=1), SearchModel(Fixed(network, seed), precision="float32")
    attack = (
        PGD(threat, steps=FIXED_STEPS, objective=cw_margin, drop_broken=False) if isinstance(threat, LpBall) else None
    )

    def vote(part: Tensor) -> list[Tensor]:
        """Clean and attacked predictions, int64 ``(draws + 1, n)`` each, the last row with the fixed draw."""
        images, labels, adversarial = survey.images(part), survey.labels[part].to(search.device), survey.attacked(part)
        draw = torch.Generator().manual_seed(seed)
        found = attack.run(fixed, images, labels, draw).images if attack is not None else adversarial
        votes = []
        for candidates, more in ((images, images), (adversarial, found)):
            drawn = torch.stack([search.exact_logits(candidates).argmax(1) for _ in range(draws)])
            one, other = (fixed.exact_logits(tried).argmax(1) for tried in (candidates, more))
            votes.append(torch.cat([drawn, torch.where(one == labels, other, one)[None]]).cpu())
        return votes

    torch.manual_seed(seed)
    clean, attacked = zip(*survey.each_batch(torch.arange(len(survey.labels)), vote), strict=True)
    return _count(torch.cat(clean, 1), survey.labels), _count(torch.cat(attacked, 1), survey.labels)


def _count(predictions: Tensor, labels: Tensor) -> Counts:
    """``predictions`` as ``vote`` has them."""
    drawn, fixed = predictions[:-1], predictions[-1]
    right = drawn == labels
    n = len(labels)
    return Counts(
        mean=Accuracy.of(round(float(right.float().mean(0).sum())), n),
        worst=Accuracy.of(int(right.all(0).sum()), n),
        majority=Accuracy.of(int((drawn.mode(0).values == labels).sum()), n),
        fixed=Accuracy.of(int((fixed == labels).sum()), n),
    )
