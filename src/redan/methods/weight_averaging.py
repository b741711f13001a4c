"""Averages of the weights along training: SWA (Izmailov et al., UAI 2018) and the exponential moving average."""

import copy
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from redan.data.types import Batch
from redan.methods.base import Config, Method, Wrapper
from redan.seeds import generator


class WeightAveragingConfig(Config):
    """Weight averaging in a recipe.

    ``ema``: after each step ``average <- decay * average + (1 - decay) * weights``, BatchNorm's statistics likewise.
    ``swa``: the plain mean of a snapshot every ``every`` steps, its BatchNorm re-estimated after each epoch on
    ``batches`` batches of training examples. Both begin at epoch ``start``; until the first snapshot the average is the
    weights.
    """

    kind: Literal["ema", "swa"] = "ema"
    decay: float = Field(0.995, gt=0, lt=1)
    start: float = Field(0.0, ge=0)
    every: int = Field(1, ge=1)
    batches: int = Field(50, ge=1)


class WeightAveraging(Wrapper):
    """Trains as the inner method does; ships the average. Wraps any method.

    Args:
        inner: the method that trains.
        config: which average.
    """

    steps: Tensor
    snapshots: Tensor

    def __init__(self, inner: Method, config: WeightAveragingConfig) -> None:
        super().__init__(inner)
        self.config = config
        self.average = copy.deepcopy(inner).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("snapshots", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the average."""
        super().after_step()
        self.steps += 1
        due = self.config.kind == "ema" or self.steps % self.config.every == 0
        if self.epoch >= self.config.start and due:
            self.snapshots += 1
        elif self.snapshots:
            return  # between two snapshots the average stands still
        if self.snapshots <= 1:
            share = 1.0
        elif self.config.kind == "ema":
            share = 1 - self.config.decay
        else:
            share = 1 / float(self.snapshots)
        mine, theirs = self.average.state_dict(), self.inner.state_dict()
        for name, value in theirs.items():
            if value.is_floating_point():
                mine[name].lerp_(value, share)
            else:
                mine[name].copy_(value)

    @torch.no_grad()
    def after_epoch(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """Re-estimate BatchNorm for the mean of snapshots: the mean of statistics is not the mean's statistics."""
        super().after_epoch(batches)
        if self.config.kind != "swa" or not self.snapshots:
            return
        self.average.train()
        # A frozen part of a method stays in evaluation mode, and keeps its statistics.
        modules = {name: module for name, module in self.average.named_modules() if module.training}
        norms = {k: m for k, m in modules.items() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        if not norms:
            return
        fresh = {
            f"{name}.{key}": torch.zeros_like(buffer)
            for name, norm in norms.items()
            for key, buffer in norm.named_buffers(recurse=False)
        }
        momenta = {name: norm.momentum for name, norm in norms.items()}
        for norm in norms.values():
            norm.momentum = None  # the cumulative mean
        for i, batch in enumerate(islice(batches(), self.config.batches)):
            self.average.before_step(self.epoch, generator("statistics", i))
            # The attack meets the old statistics: on hardly begun ones it would attack another network.
            functional_call(self.average, fresh, (batch, self.average.perturb(batch)))
        self.average.load_state_dict(fresh, strict=False)
        for name, norm in norms.items():
            norm.momentum = momenta[name]

    def deployed(self) -> nn.Module:
        """The averaged network."""
        return self.average.deployed()

    def validated(self) -> nn.Module:
        """The averaged network."""
        return self.deployed()
