"""ARREST (Suzuki et al., ICCV 2023): adversarial finetuning that keeps the representation of clean training.

A reconstruction: the authors published no code. Certain are the three parts, as their abstract has them: adversarial
finetuning begins from a network trained standardly on clean images; representation-guided knowledge distillation
penalises the distance between the representations of that network and of the finetuned one; noisy replay "switches
input adversarial examples to nonadversarial ones when the representation changes significantly". What the distance is,
where replay begins and what it gives, and all numbers are ours.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from redan.data.types import Batch
from redan.errors import UserError
from redan.methods.base import NetworkMethod, Phase, StepOutput
from redan.methods.targets import soft_cross_entropy
from redan.models.taps import HeadTap, without_taps
from redan.threats import LpBall

FINETUNING = "finetuning"
NEAR_ONE = 1e-6  # the slope of the arc cosine is infinite at cosines of -1 and 1, so they stay this far away


class ARREST(NetworkMethod):
    """First min E[ CE(f(x), y) ]; then, f0 being f as it is now, min E[ CE(f(x'), y) + weight d(x') ].

    d(x') = arccos(cos(z(x'), z0(x))) / pi is the angular distance, in [0, 1], of the representation that f has of x'
    from that which f0 has of x: z is what goes into the last linear layer. f0 is frozen, in evaluation mode. x'
    maximises the cross-entropy of f; where d(x') is above ``threshold`` (f in evaluation mode), x' becomes x with noise
    drawn from the threat. Both phases have the recipe's optimiser and schedule; its ``epochs`` are the second's.

    Args:
        clean_epochs: length of the clean phase; 0 is for a network that comes trained. Ours.
        weight: of the distance. Ours.
        threshold: where noisy replay begins, in [0, 1]; 1 is never. Ours.
    """

    finetuning: Tensor

    def __init__(
        self, *args: Any, clean_epochs: int = 20, weight: float = 10.0, threshold: float = 0.15, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if clean_epochs < 0:
            raise UserError(f"ARREST takes at least 0 clean_epochs, got {clean_epochs}")
        if not 0 <= weight < float("inf"):
            raise UserError(f"ARREST takes a weight of at least 0, got {weight}")
        if not 0 <= threshold <= 1:
            raise UserError(f"ARREST takes a threshold from 0 to 1, got {threshold}")
        self.clean_epochs, self.weight, self.threshold = clean_epochs, weight, threshold
        self.threat = None if self.adversary is None else LpBall.require(self.adversary.attack.threat, "ARREST")
        self.frozen = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.tap, self.frozen_tap = HeadTap(self.network), HeadTap(self.frozen)
        self.replayed = torch.zeros(())
        # Whether the frozen network has been made, and the second phase begun: a resume must not make it again.
        self.register_buffer("finetuning", torch.tensor(False))

    def phases(self, planned: Phase) -> list[Phase]:
        """Clean training, unless it is left out, and finetuning as planned."""
        finetuning = Phase(FINETUNING, planned.epochs, planned.optimizer, planned.schedule)
        if not self.clean_epochs:
            return [finetuning]
        return [Phase("clean", self.clean_epochs, planned.optimizer, planned.schedule), finetuning]

    def enter(self, phase: Phase) -> None:
        """Freeze the network as it is when finetuning begins."""
        if phase.name == FINETUNING and not self.finetuning:
            self.frozen.load_state_dict(self.network.state_dict())
            self.finetuning.fill_(True)

    def train(self, mode: bool = True) -> "ARREST":
        """Set the mode of everything but the frozen network."""
        super().train(mode)
        self.frozen.eval()
        return self

    def perturb(self, batch: Batch) -> Tensor:
        """See ``Method.perturb``; the images themselves in the clean phase, after that with noisy replay."""
        if not self.finetuning:
            return batch.images
        adversarial = super().perturb(batch)
        if self.threat is None or self.threshold == 1:
            return adversarial
        far = self.distances(batch.images, adversarial) > self.threshold
        self.replayed = far.float().mean()
        return torch.where(far[:, None, None, None], self.threat.random_start(batch.images, self.draws), adversarial)

    @torch.no_grad()
    def distances(self, images: Tensor, adversarial: Tensor) -> Tensor:
        """How far the network, in evaluation mode, has moved from the frozen one: ``(n,)``, in [0, 1].

        Args:
            images: that the frozen network sees, ``(n, c, h, w)``.
            adversarial: that the network sees, likewise.
        """
        with self.frozen_tap.listening() as z:
            self.frozen(images)
            # The frozen network with the other's weights is that one in evaluation mode, which itself stays as it is.
            functional_call(self.frozen, self.network.state_dict(), (adversarial,))
        return angular_distance(z[1], z[0])

    def loss(self, batch: Batch, adversarial: Tensor) -> StepOutput:
        """See ``Method.loss``; in the clean phase the cross-entropy of the images themselves."""
        with self.tap.listening() as z:
            logits = self.network(adversarial if self.finetuning else batch.images)
        targets = self.targets(batch.labels, batch.indices, logits.shape[1])
        classification = soft_cross_entropy(logits, targets).mean()
        if not self.finetuning:
            return StepOutput(classification, clean_logits=logits)
        with torch.no_grad(), self.frozen_tap.listening() as z0:
            self.frozen(batch.images)
        distance = angular_distance(z[0], z0[0]).mean()
        return StepOutput(
            classification + self.weight * distance,
            adversarial_logits=logits,
            scalars={
                "distance": distance.detach(),
                "invariance": F.cosine_similarity(z[0], z0[0], dim=1).mean().detach(),
                "replayed": self.replayed,
            },
            terms={"classification": classification, "invariance": self.weight * distance},
        )

    def deployed(self) -> nn.Module:
        """The network, a copy without the tap."""
        return without_taps(copy.deepcopy(self.network))


def angular_distance(z: Tensor, other: Tensor) -> Tensor:
    """The angle between rows as a share of pi, with a finite gradient: two ``(n, features)`` to ``(n,)``, in [0, 1].

    A row of zeros has no direction; it counts as at right angles to all others, 0.5.
    """
    cosine = F.cosine_similarity(z, other, dim=1)
    return cosine.clamp(-1 + NEAR_ONE, 1 - NEAR_ONE).acos() / math.pi
