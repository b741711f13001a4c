"""IBP training (Gowal et al. 2018, arXiv:1810.12715): the loss at logits that no image in the ball can make worse.

With the initialisation, the regularisers and the BatchNorm of Shi et al. (NeurIPS 2021), without which it takes many
times as many epochs.
"""

from dataclasses import replace
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor, nn

from redan.attacks.pgd import PGD
from redan.certification.chain import NORMS, Moments, check_chain, observe_chain, read_chain
from redan.certification.interval import Box, propagate
from redan.certification.network import Linear, Network
from redan.certification.regions import Region
from redan.data.types import Batch
from redan.errors import UserError
from redan.methods.base import NetworkMethod, Phase, StepOutput
from redan.methods.certified import check, draw_weights, growth, imbalance, looseness
from redan.methods.targets import soft_cross_entropy
from redan.models.norms import Normalise
from redan.threats import Linf

# Share of the radius in the boxes of the regularisers while the loss itself has none yet. Shi et al. take a radius of
# 1e-6, where float32's rounding shows; the ratios do not depend on it.
LEAST = 1e-3


class IBP(NetworkMethod):
    """min E[ kappa CE(f(x), y) + (1 - kappa) CE(-m, y) + lambda (1 - r / R) (looseness + imbalance) + l1 |w|_1 ].

    ``m_j`` is the interval bound of ``z_y - z_j`` on the ball of radius r around x, through the last layer at once. r
    is 0, and the loss CE(f(x), y), for ``warmup`` epochs; in ``ramp`` more it grows to R, see ``growth``.

    BatchNorm normalises bounds and whatever else the loss looks at with the moments of the clean images. All of the
    loss is in float32, for a box rounded to bfloat16 bounds nothing.

    Args:
        radius_factor: R over the threat's radius; trained a little further, a network is proved more often.
        warmup: epochs at r = 0.
        ramp: epochs from there to R.
        kappa: at r = 0 and at R, moving with r / R; (1, 0.5) as first published, (0, 0) in Shi et al.
        regularisation: lambda.
        l1: weight of the L1 norm of convolutions and linear layers.
        initialise: whether weights begin as Shi et al. have them.

    Raises:
        UserError: where one is out of range, the network no chain that ends in a linear layer, or the threat not Linf.
    """

    def __init__(
        self,
        *args: Any,
        radius_factor: float = 1.0,
        warmup: float = 1.0,
        ramp: float = 20.0,
        kappa: tuple[float, float] = (0.0, 0.0),
        regularisation: float = 0.5,
        l1: float = 0.0,
        initialise: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        chain = check_chain(self.network, batch_norm=True)
        last = chain[-1]
        if not isinstance(last, nn.Linear):
            raise UserError(f"certified training takes a network whose last layer is linear, this one's is {last}")
        if self.adversary is None or not isinstance(self.adversary.attack, PGD):
            raise UserError("certified training takes the radius, and any attack, from a PGD as its adversary")
        self.attack = self.adversary.attack
        threat = Linf.require(self.attack.threat, "certified training")
        check(threat.radius > 0, "a threat whose radius is above 0", threat.radius)
        check(0 < radius_factor < inf, "a radius_factor above 0", radius_factor)
        numbers = {"warmup": warmup, "ramp": ramp, "regularisation": regularisation, "l1": l1}
        for name, number in numbers.items():
            check(0 <= number < inf, f"{name} of at least 0", number)
        check(all(0 <= it <= 1 for it in kappa), "two numbers from 0 to 1 as kappa", kappa)
        self._classes = last.out_features
        self._chain = (chain,)  # in a tuple, so that it is no second submodule
        self._normalised = int(isinstance(chain[0], Normalise))  # position of what enters the network itself
        self._has_norms = any(isinstance(it, NORMS) for it in chain)
        self.radius_factor, self.final = radius_factor, threat.radius * radius_factor
        self.warmup, self.ramp, self.kappa = warmup, ramp, kappa
        self.regularisation, self.l1 = regularisation, l1
        if initialise:
            draw_weights(chain)

    @property
    def chain(self) -> nn.Sequential:
        """The network as its layers."""
        return self._chain[0]

    @property
    def share(self) -> float:
        """The radius now over R, in [0, 1]."""
        done = self.epoch - self.warmup
        return growth(done / self.ramp) if 0 <= done < self.ramp else float(done >= 0)

    def phases(self, planned: Phase) -> list[Phase]:
        """The plan itself."""
        if self.warmup + self.ramp > planned.epochs:
            raise UserError(
                f"the radius grows for {self.warmup:g} + {self.ramp:g} epochs, but there are {planned.epochs}; set "
                "method.warmup and method.ramp, too"
            )
        return super().phases(planned)

    def perturb(self, batch: Batch) -> Tensor:
        """The images themselves."""
        return batch.images

    def region(self, batch: Batch, adversarial: Tensor, radius: float) -> Region:
        """The boxes that are bounded, at a radius r."""
        return Region.around(batch.images, Linf(radius))

    def margins(self, graph: Network, boxes: list[Box], labels: Tensor) -> Tensor:
        """Lower bounds of ``z_y - z_j``, ``(n, classes)``; 0 for the label's own."""
        return interval_margins(graph, boxes, labels)

    def robust(
        self, graph: Network, boxes: list[Box], batch: Batch, adversarial: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss in the ball, a scalar, and the logits ``(n, classes)`` that count as the adversarial ones."""
        worst = -self.margins(graph, boxes, batch.labels)
        return soft_cross_entropy(worst, targets).mean(), worst

    def loss(self, batch: Batch, adversarial: Tensor) -> StepOutput:
        """See ``Method.loss``; the adversarial logits are the worst that the bounds allow."""
        share = self.share
        kappa = self.kappa[0] + (self.kappa[1] - self.kappa[0]) * share if share else 1.0
        weight = self.regularisation * (1 - share)
        targets = self.targets(batch.labels, batch.indices, self._classes)
        scalars = {"radius": torch.tensor(share * self.final)}
        loss, clean, worst = torch.zeros((), device=batch.images.device), None, None
        with torch.autocast(batch.images.device.type, enabled=False):
            moments: dict[int, Moments] = {}
            if kappa or self._has_norms:
                clean, moments = observe_chain(self.chain, batch.images)
                loss = loss + kappa * soft_cross_entropy(clean, targets).mean()
            if kappa < 1 or weight:
                graph = read_chain(self.chain, tuple(batch.images.shape[1:]), moments)
                boxes = propagate(graph, self.region(batch, adversarial, max(share, LEAST) * self.final), "off")
            if kappa < 1:
                robust, worst = self.robust(graph, boxes, batch, adversarial, targets)
                loss = loss + (1 - kappa) * robust
            if weight:
                bent = [boxes[i] for i in graph.bent]
                terms = {"looseness": looseness(boxes[self._normalised], bent), "imbalance": imbalance(bent)}
                loss = loss + weight * (terms["looseness"] + terms["imbalance"])
                scalars |= {name: it.detach() for name, it in terms.items()}
            if self.l1:
                sizes = [it.weight.abs().sum() for it in self.chain if isinstance(it, nn.Conv2d | nn.Linear)]
                loss = loss + self.l1 * torch.stack(sizes).sum()
        return StepOutput(loss, clean_logits=clean, adversarial_logits=worst, scalars=scalars)

    @property
    def selects_by(self) -> Literal["clean", "robust", "last"]:
        """See ``Method.selects_by``."""
        return "last"

    def attacked(self, batch: Batch, radius: float) -> Tensor:
        """What the recipe's PGD finds in balls of another radius, which its steps grow or shrink with."""
        if not radius:
            return batch.images
        size = self.attack.step_size
        if size is not None:
            size *= radius / self.attack.threat.radius
        self.search.refresh()
        attack = replace(self.attack, threat=Linf(radius), step_size=size)
        return attack.run(self.search, batch.images, batch.labels, self.draws).images


def interval_margins(graph: Network, boxes: list[Box], labels: Tensor) -> Tensor:
    """Bounds of ``z_y - z_j`` by the box of what the last layer takes, ``(n, classes)``."""
    last = graph.layers[-1]
    assert isinstance(last, Linear)
    lower, upper = boxes[-2]
    weight = last.weight[labels][:, None] - last.weight
    bias = last.bias[labels][:, None] - last.bias
    centre, radius = (lower + upper)[:, :, None] / 2, (upper - lower)[:, :, None] / 2
    return (weight @ centre - weight.abs() @ radius).squeeze(2) + bias
