"""What a method is: the thing that owns what is trained, and says how."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Generator, Tensor, nn

from redan.attacks.base import Attack
from redan.attacks.objectives import Objective, cross_entropy
from redan.attacks.pgd import Start
from redan.attacks.search import Mode, Precision, SearchModel
from redan.data.types import Batch
from redan.errors import UserError
from redan.methods.targets import Targets
from redan.threats import parse_number


class Config(BaseModel):
    """A frozen piece of a recipe; a key that it does not know is an error, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def number(value: Any) -> float:
    """A number of a recipe, which may be a fraction such as 8/255; ValueError where it is none, as pydantic has it."""
    try:
        return parse_number(value)
    except UserError as error:
        raise ValueError(str(error)) from error


Number = Annotated[float, BeforeValidator(number)]


class OptimizerConfig(Config):
    """The optimiser of a phase; ``momentum`` is also Adam's first beta."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(5e-4, ge=0)

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "OptimizerConfig":
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError(f"nesterov needs sgd with momentum, got {self.name} with momentum {self.momentum}")
        return self


class ScheduleConfig(Config):
    """The learning rate over a phase, as a factor of the optimiser's ``lr``.

    ``multistep``: times ``factor`` at each of ``milestones``. ``cosine``: falls to 0 at the end. ``cyclic``: rises
    linearly for the share ``peak`` of the phase, then falls linearly to 0 at its end. All may start with ``warmup``
    epochs of linear rise, or at the constant ``warmup_factor``. Epochs count from 0: milestone 75 is after 75 epochs.
    """

    name: Literal["constant", "multistep", "cosine", "cyclic"] = "constant"
    milestones: tuple[float, ...] = ()
    factor: float = Field(0.1, gt=0, le=1)
    peak: float = Field(0.4, ge=0, lt=1)
    warmup: float = Field(0.0, ge=0)
    warmup_factor: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _factor_has_warmup(self) -> "ScheduleConfig":
        if self.warmup_factor is not None and not self.warmup:
            raise ValueError("warmup_factor is the factor of the first warmup epochs; set schedule.warmup, too")
        return self


@dataclass(frozen=True)
class Phase:
    """A stretch of training with an optimiser and a schedule of its own.

    Args:
        name: for logs.
        epochs: its length.
        optimizer: built anew when the phase begins.
        schedule: of the learning rate.
    """

    name: str
    epochs: int
    optimizer: OptimizerConfig
    schedule: ScheduleConfig


@dataclass
class StepOutput:
    """What one training step gives.

    Attributes:
        loss: scalar, to be minimised.
        clean_logits: ``(n, classes)`` of the clean images, where the method computed them.
        adversarial_logits: likewise of the adversarial ones.
        scalars: further numbers worth logging.
        terms: the scalar parts that ``loss`` is the sum of, where the method sets accuracy against invariance:
            ``classification`` and ``invariance``, with their gradients.
    """

    loss: Tensor
    clean_logits: Tensor | None = None
    adversarial_logits: Tensor | None = None
    scalars: dict[str, Tensor] | None = None
    terms: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Adversary:
    """The attacker that a method trains against.

    Args:
        attack: called with the present network on every batch.
        mode: of BatchNorm during the attack; evaluation mode is better (Pang et al., ICLR 2021) and faster.
        bn_momentum_in_attack: in mode ``train``, whether the attack's passes move BatchNorm's running statistics.
        precision: of the search.
        compile: whether the search copy is compiled.
    """

    attack: Attack
    mode: Mode = "eval"
    bn_momentum_in_attack: bool = False
    precision: Precision = "auto"
    compile: bool = False

    def search_settings(self) -> dict[str, Any]:
        """The arguments of the ``SearchModel``."""
        return {
            "mode": self.mode,
            "moves_statistics": self.bn_momentum_in_attack,
            "precision": self.precision,
            "compile": self.compile,
        }


class Method(nn.Module, ABC):
    """One way to train.

    ``forward(batch)`` gives the loss; it is ``loss(batch, perturb(batch))``, in two parts so that a wrapper can come
    between them. Distributed training wraps the method as one module.

    Attributes:
        epoch: how many epochs are done, with their fraction; set before each step.
        draws: the randomness of the step, likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0.0
        self.draws: Generator | None = None

    @abstractmethod
    def perturb(self, batch: Batch) -> Tensor:
        """The training examples ``(n, c, h, w)`` that the adversary makes of a batch."""

    @abstractmethod
    def loss(self, batch: Batch, adversarial: Tensor) -> StepOutput:
        """The loss on a batch and its adversarial images ``(n, c, h, w)``."""

    @abstractmethod
    def clean_logits(self, images: Tensor) -> Tensor:
        """Logits ``(n, classes)`` of clean images in evaluation mode, without a gradient, for the log."""

    @abstractmethod
    def trained(self) -> nn.Module:
        """The network in training, as the loss sees it: whose gradients and statistics an analysis looks at."""

    @abstractmethod
    def deployed(self) -> nn.Module:
        """The plain network to ship: images to logits."""

    def validated(self) -> nn.Module:
        """The network that validation looks at: the one to ship, unless a phase trains only a part of it."""
        return self.deployed()

    @property
    @abstractmethod
    def selects_by(self) -> Literal["clean", "robust", "last"]:
        """Which accuracy on the held-out images makes a checkpoint the best, or that the last one is."""

    def forward(self, batch: Batch, adversarial: Tensor | None = None) -> StepOutput:
        """The loss on a batch, attacked here unless its adversarial images are given."""
        return self.loss(batch, self.perturb(batch) if adversarial is None else adversarial)

    def phases(self, planned: Phase) -> list[Phase]:
        """The phases of training, made from the recipe's plan; most methods have the plan itself as their only one."""
        return [planned]

    def enter(self, phase: Phase) -> None:
        """Called when a phase begins or is resumed, before its optimiser is built: the place to freeze weights."""

    def before_step(self, epoch: float, draws: Generator) -> None:
        """Told before each step: where training is, and the randomness to use."""
        self.epoch, self.draws = epoch, draws

    def after_step(self) -> None:
        """Called after each step of the optimiser."""

    def after_epoch(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """Called after each epoch, before validation, with a way to see training data again."""


class NetworkMethod(Method):
    """A method that trains one network, against one adversary or none.

    Args:
        network: images to logits.
        adversary: the attacker; None makes the adversarial images the clean ones.
        targets: what the labels become in the loss.

    Attributes:
        attacks: whether this method trains against an adversary.
        sees_clean: whether its loss computes the network's logits of the clean images.
        attack_objective: what this method's training attack maximises.
        attack_start: where it starts, see ``PGD``.
        takes_teacher: whether it is built with a second network, as ``teacher``.
        purifies: whether its network is a ``Purified``, and it is built with a discriminator and a config for it.
    """

    attacks: ClassVar[bool] = True
    sees_clean: ClassVar[bool] = False
    attack_objective: ClassVar[Objective] = cross_entropy
    attack_start: ClassVar[Start] = "random"
    takes_teacher: ClassVar[bool] = False
    purifies: ClassVar[bool] = False

    def __init__(self, network: nn.Module, *, adversary: Adversary | None, targets: Targets) -> None:
        super().__init__()
        self.network = network
        self.adversary = adversary
        self.targets = targets
        settings = {} if adversary is None else adversary.search_settings()
        # In a tuple, so that the attacker's view does not become a submodule of what it attacks.
        self._search = (SearchModel(network, **settings),)

    @property
    def search(self) -> SearchModel:
        """The attacker's view of the network."""
        return self._search[0]

    def perturb(self, batch: Batch) -> Tensor:
        """See ``Method.perturb``; without an adversary the images themselves."""
        if self.adversary is None:
            return batch.images
        self.search.refresh()
        return self.adversary.attack.run(self.search, batch.images, batch.labels, self.draws).images

    def forward(self, batch: Batch, adversarial: Tensor | None = None) -> StepOutput:
        """See ``Method.forward``; what training sees of the examples is shown to the targets."""
        output = super().forward(batch, adversarial)
        if torch.is_grad_enabled():  # without, statistics are re-estimated, and nothing is trained
            self.targets.observe(batch, output.clean_logits, output.adversarial_logits)
        return output

    def before_step(self, epoch: float, draws: Generator) -> None:
        """See ``Method.before_step``."""
        super().before_step(epoch, draws)
        self.targets.epoch = epoch

    def clean_logits(self, images: Tensor) -> Tensor:
        """See ``Method.clean_logits``."""
        return self.search.exact_logits(images)

    def trained(self) -> nn.Module:
        """The network itself."""
        return self.network

    def deployed(self) -> nn.Module:
        """The network itself."""
        return self.network

    @property
    def selects_by(self) -> Literal["clean", "robust", "last"]:
        """See ``Method.selects_by``; without an adversary, no weights are robust and the noise would choose."""
        return "clean" if self.adversary is None else "robust"


class Wrapper(Method):
    """A method around a method: everything is the inner one's that a subclass does not change."""

    def __init__(self, inner: Method) -> None:
        super().__init__()
        self.inner = inner

    def perturb(self, batch: Batch) -> Tensor:
        """The inner method's."""
        return self.inner.perturb(batch)

    def loss(self, batch: Batch, adversarial: Tensor) -> StepOutput:
        """The inner method's, with all that it does in a step."""
        output: StepOutput = self.inner(batch, adversarial)
        return output

    def clean_logits(self, images: Tensor) -> Tensor:
        """The inner method's."""
        return self.inner.clean_logits(images)

    def trained(self) -> nn.Module:
        """The inner method's."""
        return self.inner.trained()

    def deployed(self) -> nn.Module:
        """The inner method's."""
        return self.inner.deployed()

    def validated(self) -> nn.Module:
        """The inner method's."""
        return self.inner.validated()

    @property
    def selects_by(self) -> Literal["clean", "robust", "last"]:
        """The inner method's."""
        return self.inner.selects_by

    def phases(self, planned: Phase) -> list[Phase]:
        """The inner method's."""
        return self.inner.phases(planned)

    def enter(self, phase: Phase) -> None:
        """Tell the inner method."""
        self.inner.enter(phase)

    def before_step(self, epoch: float, draws: Generator) -> None:
        """Tell the inner method."""
        super().before_step(epoch, draws)
        self.inner.before_step(epoch, draws)

    def after_step(self) -> None:
        """Tell the inner method."""
        self.inner.after_step()

    def after_epoch(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """Tell the inner method."""
        self.inner.after_epoch(batches)
