"""Precision and compiling follow the hardware and the recipe alone."""

import shutil

import pytest
import torch

from redan.attacks import PGD, SearchModel
from redan.models.norms import Normalise
from redan.models.registry import build_model
from redan.recipes.schema import load_recipe
from redan.threats import Linf
from redan.training import hardware

CPU = torch.device("cpu")


def test_precision_follows_the_hardware_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(hardware, "has_fast_bfloat16", lambda device, native=native: native)
        assert hardware.resolved("auto", CPU) == expected
        assert hardware.resolved("float32", CPU) == "float32"
        assert hardware.resolved("bfloat16", CPU) == "bfloat16"


def test_compiling_is_for_long_runs_on_hardware_that_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = load_recipe("pgd-at-cifar10-resnet18"), load_recipe("pgd-at-digits")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert hardware.worth_compiling(long, 390, CPU)
    assert not hardware.worth_compiling(short, 13, CPU)
    assert not hardware.worth_compiling(load_recipe("standard-cifar10-mini"), 10**6, CPU)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not hardware.worth_compiling(long, 390, CPU)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not hardware.worth_compiling(long, 390, CPU)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it, and ignores what it sees
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_search_finds_what_the_plain_one_finds() -> None:
    torch.manual_seed(0)
    model = build_model("resnet18", Normalise([0.5], [0.25]), in_channels=3, size=16, classes=10, width=4)
    images = torch.rand(16, 3, 16, 16)
    model(images)
    labels = model.eval()(images).argmax(1)
    attack = PGD(Linf(4 / 255), steps=3, drop_broken=False)
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    plain = attack(SearchModel(model, precision="float32"), images, labels, generator=draws[0])
    compiled = attack(SearchModel(model, precision="float32", compile=True), images, labels, generator=draws[1])
    # Rounding may turn the sign of a gradient that is almost zero, and of few others.
    assert ((plain - compiled).abs() > 1e-6).float().mean() < 0.01
