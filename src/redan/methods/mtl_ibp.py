"""MTL-IBP (De Palma et al., ICLR 2024, arXiv:2305.13991): a mean of a lower and an upper bound of the worst loss."""

from math import inf
from typing import Any

from torch import Tensor

from redan.certification.interval import Box
from redan.certification.network import Network
from redan.data.types import Batch
from redan.methods.certified import check
from redan.methods.ibp import IBP
from redan.methods.targets import soft_cross_entropy


class MTLIBP(IBP):
    """In the place of IBP's loss: ``alpha CE(-m, y) + (1 - alpha) CE(f(x'), y)``, x' found by PGD, see ``IBP``.

    Args:
        alpha: 1 is IBP, 0 PGD adversarial training with a growing radius.
        attack_factor: radius of the attack over that of the bounds; 2.1 as published for small balls.
    """

    def __init__(self, *args: Any, alpha: float = 0.5, attack_factor: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check(0 <= alpha <= 1, "an alpha from 0 to 1", alpha)
        check(0 < attack_factor < inf, "an attack_factor above 0", attack_factor)
        self.alpha, self.attack_factor = alpha, attack_factor

    def perturb(self, batch: Batch) -> Tensor:
        """The adversarial images."""
        return self.attacked(batch, self.attack_factor * self.share * self.final)

    def robust(
        self, graph: Network, boxes: list[Box], batch: Batch, adversarial: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``IBP.robust``; the logits are those of the adversarial images."""
        bounded, _ = super().robust(graph, boxes, batch, adversarial, targets)
        logits = graph(adversarial)
        attacked = soft_cross_entropy(logits, targets).mean()
        return self.alpha * bounded + (1 - self.alpha) * attacked, logits
