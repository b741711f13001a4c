"""Learning rates at their corners, optimisers as named, and their state through a checkpoint, bit for bit."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from redan.methods.base import OptimizerConfig, ScheduleConfig
from redan.tensors import load_tensors, save_tensors
from redan.training.checkpoint import optimizer_tensors, restore_optimizer
from redan.training.optim import build_optimizer, learning_rate_factor


def factors(at: list[float], epochs: int, **schedule: Any) -> list[float]:
    return [learning_rate_factor(ScheduleConfig(**schedule), epoch, epochs) for epoch in at]


def test_constant_is_one() -> None:
    assert factors([0, 0.5, 10], 10, name="constant") == [1, 1, 1]


def test_multistep_falls_after_each_milestone() -> None:
    found = factors([0, 74.99, 75, 89.99, 90, 100], 100, name="multistep", milestones=(75, 90))
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert factors([1, 2], 4, name="multistep", milestones=(2,), factor=0.5) == [1, 0.5]


def test_cosine_falls_to_zero_by_half_way_to_half() -> None:
    found = factors([0, 2.5, 5, 7.5, 10], 10, name="cosine")
    assert found == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0])


def test_cyclic_rises_to_its_peak_and_falls_to_zero() -> None:
    found = factors([0, 2, 4, 8, 14, 20], 20, name="cyclic", peak=0.4)
    assert found == pytest.approx([0, 0.25, 0.5, 1, 0.5, 0])
    assert factors([0, 5, 10], 10, name="cyclic", peak=0) == [1, 0.5, 0]


def test_warm_up_rises_linearly_and_then_the_schedule_begins() -> None:
    assert factors([0, 1, 2, 3, 4], 10, name="constant", warmup=4) == [0, 0.25, 0.5, 0.75, 1]
    # The cosine spans what is left: half way from 2 to 10 is 6.
    assert factors([0, 1, 2, 6, 10], 10, name="cosine", warmup=2) == pytest.approx([0, 0.5, 1, 0.5, 0])
    found = factors([1, 2, 5], 10, name="multistep", milestones=(5,), warmup=2)
    assert found == pytest.approx([0.5, 1, 0.1])


@given(
    name=st.sampled_from(["constant", "multistep", "cosine", "cyclic"]),
    epochs=st.integers(1, 200),
    share=st.floats(0, 1),
    peak=st.floats(0, 1, exclude_max=True),
    warmup=st.floats(0, 300),
)
def test_a_factor_is_between_0_and_1(name: str, epochs: int, share: float, peak: float, warmup: float) -> None:
    (factor,) = factors([share * epochs], epochs, name=name, peak=peak, warmup=warmup, milestones=(50, 60))
    assert 0 <= factor <= 1


# Optimisers.


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(8, 3)
        )


@pytest.mark.parametrize(
    ("name", "family", "settings"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ("adam", torch.optim.Adam, {"betas": (0.8, 0.999)}),
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.999)}),
    ],
)
def test_an_optimiser_is_what_it_is_called(
    name: str, family: type[torch.optim.Optimizer], settings: dict[str, Any]
) -> None:
    values = {"name": name, "lr": 0.3, "momentum": 0.8, "nesterov": name == "sgd", "weight_decay": 0.01}
    optimizer = build_optimizer(OptimizerConfig.model_validate(values), network().parameters())
    assert type(optimizer) is family
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in settings} == settings
    assert group["lr"] == 0.3 and group["weight_decay"] == 0.01


def test_frozen_parameters_are_left_out() -> None:
    module = network()
    module[0].requires_grad_(False)
    optimizer = build_optimizer(OptimizerConfig(lr=0.1), module.parameters())
    trained = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert trained == {id(p) for name, p in module.named_parameters() if not name.startswith("0.")}


# A checkpoint.

STATEFUL = [
    {"name": "sgd"},
    {"name": "sgd", "nesterov": True},
    {"name": "sgd", "momentum": 0.0},
    {"name": "adam"},
    {"name": "adamw"},
]


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, seeds: range, layout: torch.memory_format) -> None:
    for seed in seeds:
        images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).to(memory_format=layout)
        optimizer.zero_grad()
        module(images).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("settings", STATEFUL, ids=str)
def test_training_goes_on_bitwise(tmp_path: Path, settings: dict[str, Any], layout: torch.memory_format) -> None:
    config = OptimizerConfig.model_validate({"lr": 0.1} | settings)
    whole = network().to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = build_optimizer(config, whole.parameters())
    steps(whole, optimizer, range(3), layout)

    taken = optimizer_tensors(optimizer)
    save_tensors(tmp_path / "state", taken | {"method/0.weight": torch.full((4, 3, 3, 3), 99.0)})
    read, _ = load_tensors(tmp_path / "state")
    resumed = copy.deepcopy(whole)
    restored = build_optimizer(config, resumed.parameters())
    restore_optimizer(restored, read)

    assert len(restored.state) == (0 if settings.get("momentum") == 0 else len(list(resumed.parameters())))
    for mine, theirs in zip(restored.state, optimizer.state, strict=True):
        assert restored.state[mine].keys() == optimizer.state[theirs].keys()
        for key, value in restored.state[mine].items():
            original: Tensor = optimizer.state[theirs][key]
            assert torch.equal(value, original) and value.dtype == original.dtype and not value.requires_grad
            assert value.dim() < 4 or value.is_contiguous(memory_format=layout)
    steps(whole, optimizer, range(3, 7), layout)
    steps(resumed, restored, range(3, 7), layout)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])


def test_restoring_matters() -> None:
    """The test above could not fail were the state without effect."""
    config = OptimizerConfig(lr=0.1)
    whole = network()
    optimizer = build_optimizer(config, whole.parameters())
    steps(whole, optimizer, range(3), torch.contiguous_format)
    forgetful = copy.deepcopy(whole)
    steps(whole, optimizer, range(3, 4), torch.contiguous_format)
    steps(forgetful, build_optimizer(config, forgetful.parameters()), range(3, 4), torch.contiguous_format)
    assert not torch.equal(whole.get_parameter("0.weight"), forgetful.get_parameter("0.weight"))


def test_what_is_restored_is_not_shared() -> None:
    module = network()
    optimizer = build_optimizer(OptimizerConfig(lr=0.1), module.parameters())
    steps(module, optimizer, range(2), torch.contiguous_format)
    taken = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    resumed = copy.deepcopy(module)
    restored = build_optimizer(OptimizerConfig(lr=0.1), resumed.parameters())
    restore_optimizer(restored, taken)
    steps(resumed, restored, range(2), torch.contiguous_format)
    now = optimizer_tensors(optimizer)
    assert all(torch.equal(taken[name], now[name]) for name in now)
