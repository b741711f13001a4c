"""AToP (Lin et al., ICLR 2024): adversarial training on purification.

A purifier g completes what a random transform t leaves of an image, and learns to do so in a way that a classifier f,
which stays as it is, gets right even of adversarial images.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from redan.attacks.search import SearchModel
from redan.data.types import Batch
from redan.errors import UserError
from redan.methods.base import Config, NetworkMethod, Number, OptimizerConfig, Phase, ScheduleConfig, StepOutput
from redan.methods.targets import soft_cross_entropy
from redan.models.purified import Purified
from redan.models.random_transforms import Draw

CLASSIFIER, PURIFIER, FINETUNING = "classifier", "purifier", "finetuning"
DISTANCES = {"l1": F.l1_loss, "mse": F.mse_loss}


class StageConfig(Config):
    """A phase before finetuning; with 0 epochs there is none."""

    epochs: int = Field(ge=0)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()


class AToPConfig(Config):
    """How the purifier is trained.

    Attributes:
        classifier_training: the phase that trains f on clean images.
        pretraining: the phase that trains g, by L_org on clean images.
        adversary: where the attack of finetuning takes its gradients from: the whole pipeline (``end_to_end``, as the
            paper writes it), the bare classifier (``classifier``, as its public code has it), or there is none.
        weight: lambda, of the cross-entropy in finetuning; 0.1 as published.
        cross_entropy_from: how many epochs of finetuning pass before that term counts; 0 in the paper, 2 in the code,
            whose epochs are of 5,000 images.
        l_org_target: what L_org is of in finetuning: the adversarial images, which are then input and target, or clean
            ones, which take a pass of their own, as in the run whose log is published.
        gan_gradient: whether the hinge term reaches g (``live``), or, as in the public code, does not (``detached``).
    """

    classifier_training: StageConfig
    pretraining: StageConfig
    adversary: Literal["end_to_end", "classifier", "none"] = "end_to_end"
    weight: Number = Field(0.1, ge=0)
    cross_entropy_from: Number = Field(0.0, ge=0)
    l_org_target: Literal["adversarial", "clean"] = "adversarial"
    gan_gradient: Literal["live", "detached"] = "live"


class AToP(NetworkMethod):
    """min over g of E[ L_org(x', g) + lambda CE(f(g(t(x'))), y) ], x' = argmax over B(x) of CE(f(g(t(x))), y); eq. 9.

    With a discriminator D, L_org is the hinge loss of a GAN whose real images are x', plus the L1 distance of every
    stage of g from x'; without one, that distance alone, or for a masked autoencoder the squared one. Each step draws
    one t, for the attack's first step and for the loss. D and g learn at the same time from one optimiser, where the
    public code lets D go first. f is frozen and in evaluation mode from the second phase on.

    Args:
        discriminator: D, ``(images, holes)`` to scores; None trains g without.
        config: the rest, see there; where its adversary is ``none``, the one that is given counts for nothing.
    """

    attack_start = "image"
    purifies = True

    def __init__(self, *args: Any, discriminator: nn.Module | None, config: AToPConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if config.adversary == "none":
            self.adversary = None
        if not isinstance(self.network, Purified):
            raise UserError("AToP trains a purifier before a classifier, not a plain network")
        if self.adversary is not None and self.adversary.mode != "eval":
            raise UserError("AToP attacks in evaluation mode, in which its classifier stays; set attack.mode to eval")
        self.discriminator = discriminator
        self.config = config
        settings = {} if self.adversary is None else self.adversary.search_settings()
        self._bare = (SearchModel(self.network.classifier, **settings),)
        self._phase, self._finetuning_begins = CLASSIFIER, 0
        self._seed = 0

    @property
    def pipeline(self) -> Purified:
        """Transform, purifier and classifier."""
        assert isinstance(self.network, Purified)
        return self.network

    def phases(self, planned: Phase) -> list[Phase]:
        """Training of the classifier and of the purifier, each unless it has no epochs; finetuning as planned."""
        stages = ((CLASSIFIER, self.config.classifier_training), (PURIFIER, self.config.pretraining))
        before = [Phase(name, it.epochs, it.optimizer, it.schedule) for name, it in stages if it.epochs]
        self._finetuning_begins = sum(phase.epochs for phase in before)
        return [*before, Phase(FINETUNING, planned.epochs, planned.optimizer, planned.schedule)]

    def enter(self, phase: Phase) -> None:
        """Freeze what the phase does not train."""
        self._phase = phase.name
        learns = self._phase == CLASSIFIER
        self.pipeline.classifier.requires_grad_(learns)
        self.pipeline.purifier.requires_grad_(not learns)
        if self.discriminator is not None:
            self.discriminator.requires_grad_(not learns)
        self.train(self.training)

    def train(self, mode: bool = True) -> "AToP":
        """Set the mode of everything but a frozen classifier."""
        super().train(mode)
        if self._phase != CLASSIFIER:
            self.pipeline.classifier.eval()
        return self

    def perturb(self, batch: Batch) -> Tensor:
        """See ``Method.perturb``; before finetuning the images themselves."""
        if self.draws is not None:
            self._seed = int(torch.randint(2**62, (), generator=self.draws))
        if self._phase != FINETUNING or self.adversary is None:
            return batch.images
        search = self.search if self.config.adversary == "end_to_end" else self._bare[0]
        search.refresh()
        with self._one_draw(batch.images.device):
            return self.adversary.attack.run(search, batch.images, batch.labels, self.draws).images

    def loss(self, batch: Batch, adversarial: Tensor) -> StepOutput:
        """See ``Method.loss``; of each phase its own."""
        if self._phase == CLASSIFIER:
            logits = self.pipeline.classifier(batch.images)
            return StepOutput(self._classification(batch, logits), clean_logits=logits)
        with self._one_draw(batch.images.device):
            draw = self.pipeline.transform.sample(batch.images)
            finetunes = self._phase == FINETUNING
            clean = not finetunes or self.config.l_org_target == "clean"
            target = batch.images if clean else adversarial
            loss, scalars, purified = self._original_loss(target, draw)
            if not finetunes or self.epoch < self._finetuning_begins + self.config.cross_entropy_from:
                return StepOutput(loss, scalars=scalars)
            if clean and adversarial is not batch.images:
                purified = self.pipeline.purify(adversarial, draw)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.weight > 0):
                logits = self.pipeline.classifier(purified)
                classification = self._classification(batch, logits)
        scalars["loss_classification"] = classification.detach()
        return StepOutput(loss + self.config.weight * classification, adversarial_logits=logits, scalars=scalars)

    def validated(self) -> nn.Module:
        """The classifier while it is trained; the pipeline after that."""
        return self.pipeline.classifier if self._phase == CLASSIFIER else self.pipeline

    def clean_logits(self, images: Tensor) -> Tensor:
        """See ``Method.clean_logits``."""
        return (self._bare[0] if self._phase == CLASSIFIER else self.search).exact_logits(images)

    @property
    def selects_by(self) -> Literal["clean", "robust", "last"]:
        """See ``NetworkMethod.selects_by``; finetuning is for robustness, what comes before it is not."""
        return super().selects_by if self._phase == FINETUNING else "clean"

    def _classification(self, batch: Batch, logits: Tensor) -> Tensor:
        targets = self.targets(batch.labels, batch.indices, logits.shape[1])
        return soft_cross_entropy(logits, targets).mean()

    def _original_loss(self, target: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """L_org with D's own loss, the numbers worth logging, and the purified images ``(n, c, h, w)``."""
        transform, purifier = self.pipeline.transform, self.pipeline.purifier
        seen, holes = transform(target, draw)
        attempts = [attempt.float() for attempt in purifier.attempts(seen, holes)]
        completed = attempts[-1].clamp(0, 1)
        views = target.repeat(transform.views, 1, 1, 1)
        distance = DISTANCES[purifier.criterion]
        # In units of [-1, 1], as published: half of these would leave twice the weight to all other terms.
        loss = torch.stack([distance(2 * attempt - 1, 2 * views - 1) for attempt in attempts]).sum()
        scalars = {"loss_distance": loss.detach()}
        if self.discriminator is not None:
            with torch.autocast(target.device.type, enabled=False):
                real, fake = self.discriminator(views, holes), self.discriminator(completed.detach(), holes)
                hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
                loss = loss + hinge
                if self.config.gan_gradient == "live":
                    with _frozen(self.discriminator):
                        loss = loss - self.discriminator(completed, holes).mean()
            scalars["loss_discriminator"] = hinge.detach()
        return loss, scalars, transform.join(completed, holes)

    @contextmanager
    def _one_draw(self, device: torch.device) -> Iterator[None]:
        """The same torch randomness for the attack's first pass and for the loss; the caller's stays as it is."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed)
            yield


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """What is computed inside has gradients in its inputs and none in the module's weights."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
