"""DPLS, reconstructed: labels as soft as their examples are hard (Lee, Lee, Bae & Yoon, JMLR 26, 2025).

Certain of the paper are the idea (label smoothing in proportion to an example's difficulty under adversarial training,
on all examples, in place of pruning the hard ones), its two algorithms by name and its training recipe. The formula of
its Algorithm 2 is not public: what difficulty is, from when on it counts and how it becomes an amount are reconstructed
here as a family, with the authors' habits elsewhere as default. No match with the paper's numbers is claimed.
"""

from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from redan.data.types import Batch
from redan.methods.base import Config
from redan.methods.targets import Targets, smoothed
from redan.seeds import generator

Measure = Literal["confidence", "loss-rank", "clean-confidence"]
Control = Literal["none", "uniform", "permuted", "inverse"]


class DPLSConfig(Config):
    """DPLS in a recipe.

    ``difficulty``: ``confidence`` is 1 - mean p_y of the training attack's images, ``loss-rank`` the rank of their mean
    cross-entropy as a share (Liu et al., JMLR 25, 2024), ``clean-confidence`` like the first on clean images. The mean
    is over the epochs from ``first`` up to ``warmup``; until ``warmup`` nothing is smoothed. ``sources`` are runs with
    DPLS settings of their own (``scale: 0`` trains as if without); their difficulties, averaged, are used from the
    first epoch on. The amount is ``scale`` times the difficulty, spread over [0, 1] by ``min_max`` or strictly
    proportional, at most ``cap``.

    ``control`` replaces the amounts: ``uniform`` by their mean, ``permuted`` by each other's within the class,
    ``inverse`` by those of 1 - difficulty. Only a gain over the first two shows that difficulty matters.
    """

    difficulty: Measure = "confidence"
    first: int = Field(4, ge=0)
    warmup: int = Field(70, ge=1)
    scale: float = Field(0.4, ge=0)
    cap: float = Field(0.9, ge=0, lt=1)
    min_max: bool = True
    control: Control = "none"
    sources: tuple[str, ...] = ()

    @field_validator("sources", mode="before")
    @classmethod
    def _one_is_a_list(cls, sources: object) -> object:
        return (sources,) if isinstance(sources, str) else sources

    @model_validator(mode="after")
    def _something_is_counted(self) -> "DPLSConfig":
        if self.first >= self.warmup:
            raise ValueError(f"dpls.first {self.first} is not below dpls.warmup {self.warmup}: no epoch would count")
        return self


class DPLS(Targets):
    """Targets ``(1 - S_i) one-hot + S_i / classes`` with S_i = min(scale * d_i, cap), d_i the difficulty of example i.

    The attack keeps the label. The difficulty costs no forward pass: it comes from the logits that training computes.
    It takes 8 bytes an example in a checkpoint, 12 with ``known``; in memory 4 more once amounts are known, and 8 for
    ``control: permuted``; an average of the weights holds a second copy. Under several processes all see the same.

    Args:
        config: the family's member.
        labels: int64 ``(examples,)``, of the training set.
        known: difficulties ``(examples,)`` in [0, 1] from earlier runs, NaN for examples that these did not have; None
            finds them in this run.
        seed: of ``control: permuted``.
    """

    total: Tensor
    seen: Tensor
    known: Tensor
    permutation: Tensor

    def __init__(self, config: DPLSConfig, labels: Tensor, *, known: Tensor | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self._amounts: Tensor | None = None  # once they are known for good
        if known is not None:
            self.register_buffer("known", known)
        if config.control == "permuted":
            self.register_buffer("permutation", _within_classes(labels, seed), persistent=False)
        self.register_buffer("total", torch.zeros(len(labels)))
        self.register_buffer("seen", torch.zeros(len(labels), dtype=torch.int32))
        self.register_load_state_dict_post_hook(lambda module, _: module._forget())  # type: ignore[no-untyped-call]

    def _forget(self) -> None:
        self._amounts = None

    @torch.no_grad()
    def observe(self, batch: Batch, clean: Tensor | None, adversarial: Tensor | None) -> None:
        """See ``Targets``."""
        if hasattr(self, "known") or not self.config.first <= self.epoch < self.config.warmup:
            return
        logits = clean if self.config.difficulty == "clean-confidence" else adversarial
        if logits is None:
            return  # a phase of training without an attack
        log_p = logits.float().log_softmax(1).gather(1, batch.labels[:, None]).squeeze(1)
        value = -log_p if self.config.difficulty == "loss-rank" else 1 - log_p.exp()
        indices, value = _of_all_processes(batch.indices), _of_all_processes(value)
        self.total[indices] += value
        self.seen[indices] += 1
        self._forget()

    def difficulty(self, unknown: float | None = None) -> Tensor:
        """d_i ``(examples,)`` in [0, 1]; ``unknown``, or the mean of the others, for examples that were never seen."""
        if hasattr(self, "known"):
            values, seen = self.known, ~self.known.isnan()
        else:
            seen = self.seen > 0
            values = self.total / self.seen.clamp(min=1)
            if self.config.difficulty == "loss-rank":
                values = _ranks(values, seen)
        if not seen.any():
            return torch.full_like(self.total, 0.0 if unknown is None else unknown)
        return torch.where(seen, values, values[seen].mean() if unknown is None else unknown)

    def amounts(self) -> Tensor:
        """S_i ``(examples,)``, as they are now; all 0 until the warm-up is over."""
        if self._amounts is not None:
            return self._amounts
        if not hasattr(self, "known") and self.epoch < self.config.warmup:
            return torch.zeros_like(self.total)
        self._amounts = self._computed()
        return self._amounts

    @torch.no_grad()
    def _computed(self) -> Tensor:
        config, d = self.config, self.difficulty()
        if config.control == "inverse":
            d = 1 - d
        if config.min_max:
            d = (d - d.amin()) / (d.amax() - d.amin()).clamp(min=torch.finfo(d.dtype).tiny)
        amounts = (config.scale * d).clamp(max=config.cap)
        if config.control == "uniform":
            return amounts.mean().expand_as(amounts)
        if config.control == "permuted":
            return amounts[self.permutation]
        return amounts

    def forward(self, labels: Tensor, indices: Tensor, classes: int) -> Tensor:
        """See ``Targets``."""
        return smoothed(labels, self.amounts()[indices][:, None], classes)


def _within_classes(labels: Tensor, seed: int) -> Tensor:
    """A random permutation of all examples ``(examples,)`` that keeps each in its class."""
    order = torch.arange(len(labels))
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        draws = generator(seed, "permuted difficulty", int(label))
        order[members] = members[torch.randperm(len(members), generator=draws)]
    return order


def _ranks(values: Tensor, seen: Tensor) -> Tensor:
    """Each value's rank among those seen as a share: 0 for the least, 1 for the greatest; ties share their mean."""
    chosen = values[seen]
    _, inverse, counts = chosen.unique(return_inverse=True, return_counts=True)
    above = counts.cumsum(0)
    mean_rank = (above - (counts + 1) / 2)[inverse]  # 0 to n - 1
    ranks = torch.zeros_like(values)
    ranks[seen] = mean_rank.float() / max(len(chosen) - 1, 1)
    return ranks


def _of_all_processes(values: Tensor) -> Tensor:
    """Every process's values, in order of rank; all processes have as many."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values.contiguous())
    return torch.cat(gathered)
