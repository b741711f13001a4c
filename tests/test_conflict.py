"""Gradient conflict against closed forms, and what a run logs of it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from redan.methods.base import StepOutput
from redan.methods.conflict import conflict
from redan.methods.registry import build_method
from redan.methods.targets import LabelSmoothing
from redan.reporting.figures import training_figures
from redan.training.monitor import Monitor
from redan.training.trainer import train

VECTORS = st.lists(st.sampled_from([-2.0, -1e-30, 0.0, 1e-30, 1.0]), min_size=4, max_size=4)


@given(first=VECTORS, second=VECTORS)
def test_of_linear_functions_it_is_that_of_their_coefficients(first: list[float], second: list[float]) -> None:
    net = nn.Linear(2, 2)
    a, b = np.array(first), np.array(second)
    scalars = [(net.weight.flatten() * torch.tensor(values)).sum() + net.bias.sum() for values in (first, second)]
    found = conflict(scalars[0], scalars[1], net)
    assert found.share == np.mean(np.sign(a) * np.sign(b) < 0)
    product = np.linalg.norm(a) * np.linalg.norm(b)
    expected = a @ b / product if min(np.linalg.norm(a), np.linalg.norm(b)) > 1e-6 else None
    if expected is not None:
        assert found.cosine == pytest.approx(expected, abs=1e-6)
    assert net.weight.grad is None


def test_only_weights_of_convolutions_and_linear_layers_count() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 1))
    others = [p for name, p in net.named_parameters() if name not in ("0.weight", "3.weight")]
    first = net.get_parameter("0.weight").sum() + sum(p.sum() for p in others)
    second = -net.get_parameter("0.weight").sum() + net.get_parameter("3.weight").sum() + sum(p.sum() for p in others)
    found = conflict(first, second, net)
    assert found.share == 0.5  # one of two weights opposes; the last layer's counts in the whole
    assert found.cosine == pytest.approx(-1 / np.sqrt(2))
    assert conflict(first, torch.tensor(1.0), net) == (0.0, 0.0)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_monitor_gives_the_variance_of_running_means() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(1))
    method = build_method("standard", net, adversary=None, targets=LabelSmoothing())
    monitor = Monitor(method)
    draws = np.random.default_rng(0).normal(size=(5, 3))
    for row in draws:
        net.get_buffer("1.running_mean").copy_(torch.tensor(row[:2]))
        net.get_buffer("2.running_mean").copy_(torch.tensor(row[2:]))
        assert monitor.look(StepOutput(torch.tensor(0.0))) == {}
    seen = [[*net.get_buffer("1.running_mean").tolist(), *net.get_buffer("2.running_mean").tolist()]]
    assert seen[0] == pytest.approx(draws[-1], abs=1e-6)
    assert monitor.end_epoch() == {"bn_variance_shared": pytest.approx(draws.var(0).mean(), rel=1e-5)}
    assert monitor.end_epoch() == {}


ARAT: dict[str, Any] = {
    "model": {"name": "small-cnn-bn", "width": 4},
    "method": {"name": "arat"},
    "data.train_samples": 400,
    "epochs": 2,
    "attack.steps": 2,
    "monitor": {"every": 2},
}


def test_a_run_logs_it_on_request_and_trains_the_same_weights(tmp_path: Path) -> None:
    watched = train("pgd-at-digits", tmp_path / "watched", overrides=ARAT, progress=False)
    plain = train("pgd-at-digits", tmp_path / "plain", overrides=ARAT | {"monitor": None}, progress=False)
    for record in records(watched):
        assert 0 < record["conflict_share"] < 1 and -1 < record["conflict_cosine"] < 1
        assert record["bn_variance_adversarial"] > 0 and record["bn_variance_clean"] > 0
    assert all(-1 < record["invariance"] < 1 and 0 < record["alpha"] < 1 for record in records(plain))
    drawn = " ".join(training_figures("run", records(watched)))
    for title, label, key, scale in (
        ("Clean accuracy, %", "training, clean branch", "clean_branch_accuracy", 100),
        ("Cosine of clean and adversarial features", "training", "invariance", 1),
        ("Weight of the adversarial cross-entropy, alpha", "training", "alpha", 1),
        ("Weights in gradient conflict, %", "classification against invariance", "conflict_share", 100),
    ):
        (found,) = re.findall(rf"{title}, at the end: [^\"]*\b{label} ([\d.]+)", drawn)
        assert float(found) == pytest.approx(scale * records(watched)[-1][key], rel=1e-3)
    extra = set(records(watched)[0]) - set(records(plain)[0])
    assert extra == {"conflict_share", "conflict_cosine", "bn_variance_adversarial", "bn_variance_clean"}
    assert (watched / "model-last.safetensors").read_bytes() == (plain / "model-last.safetensors").read_bytes()


def test_a_method_of_one_term_has_no_conflict(tmp_path: Path) -> None:
    overrides = ARAT | {"method": {"name": "pgd-at"}, "epochs": 1}
    (record,) = records(train("pgd-at-digits", tmp_path / "run", overrides=overrides, progress=False))
    assert "conflict_share" not in record and record["bn_variance_shared"] > 0
