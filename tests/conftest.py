"""Shared by all tests: one thread, so that results do not depend on the machine's load, and small trained runs."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import Any

import pytest
import torch

from redan.training.trainer import train

torch.set_num_threads(1)

# A few seconds of adversarial training: enough to learn something, not enough to be robust everywhere.
SHORT: dict[str, Any] = {"epochs": 12, "validation.every": 4, "optimizer.lr": 0.1}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on digits; tests must not write into it."""
    return train("pgd-at-digits", tmp_path_factory.mktemp("runs") / "digits", overrides=SHORT, progress=False)
