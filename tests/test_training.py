"""The loop: what a run leaves behind, and that nothing stops it from coming to the same weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import redan
from redan.errors import UserError
from redan.tensors import load_tensors
from redan.training import trainer

FAST: dict[str, Any] = {"epochs": 4, "validation.every": 2}


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_weights(first: Path, second: Path) -> bool:
    return all(
        (first / name).read_bytes() == (second / name).read_bytes()
        for name in ("model.safetensors", "model-last.safetensors")
    )


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Have the run stop as by Ctrl-C after so many steps."""
    real, taken = trainer._Training._train_step, []

    def counted(self: Any, *args: Any) -> None:
        real(self, *args)
        taken.append(1)
        self.stop.requested = len(taken) == steps

    monkeypatch.setattr(trainer._Training, "_train_step", counted)


def test_a_run_leaves_what_the_design_names(trained: Path) -> None:
    left = {path.name for path in trained.iterdir()}
    assert left == {
        "recipe.yaml",
        "model.safetensors",
        "model-last.safetensors",
        "metrics.jsonl",
        "checkpoint",
        "environment.json",
        "tensorboard",
    }
    assert list((trained / "tensorboard").glob("events.*"))
    rows = records(trained)
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert [row["validation_robust_accuracy"] is not None for row in rows] == [(i % 4 == 0) for i in range(1, 13)]
    assert rows[-1]["loss"] < rows[0]["loss"]
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["threads"] == 1


def test_the_best_checkpoint_is_the_most_robust_on_held_out_images(trained: Path) -> None:
    validated = [row for row in records(trained) if row["validation_robust_accuracy"] is not None]
    best = max(validated, key=lambda row: row["validation_robust_accuracy"])
    _, metadata = load_tensors(trained / "model.safetensors")
    assert metadata["epoch"] == best["epoch"]
    assert load_tensors(trained / "model-last.safetensors")[1]["epoch"] == 12


def test_same_recipe_and_seed_give_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    runs = [
        redan.train("trades-digits", tmp_path / str(i), overrides={**FAST, "epochs": 2, "seed": seed}, progress=False)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    redan.train("standard-digits", tmp_path / "run", overrides={**FAST, "epochs": 1}, progress=False)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("steps", [5, 13, 20, 26], ids=["in epoch 1", "end of epoch 1", "in epoch 2", "end of epoch 2"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"weight_averaging": {"kind": "swa", "start": 1, "every": 3, "batches": 4}, "weight_perturbation": {}},
        {"optimizer": {"name": "adamw", "lr": 0.01}, "weight_averaging": {"kind": "ema", "decay": 0.9}},
    ],
    ids=["plain", "swa+awp", "adamw+ema"],
)
def test_a_resumed_run_comes_to_bitwise_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, extra: dict[str, Any]
) -> None:
    overrides = {**FAST, **extra, "model": {"name": "resnet18", "width": 2}, "attack.steps": 2, "epochs": 3}
    whole = redan.train("pgd-at-digits", tmp_path / "whole", overrides=overrides, progress=False)
    with monkeypatch.context() as context:
        stop_after(context, steps)
        with pytest.raises(redan.Stopped, match="--resume"):
            redan.train("pgd-at-digits", tmp_path / "parts", overrides=overrides, progress=False)
    parts = redan.train("pgd-at-digits", tmp_path / "parts", overrides=overrides, resume=True, progress=False)
    assert same_weights(whole, parts)
    for mine, theirs in zip(records(whole), records(parts), strict=True):
        assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_killed_processes_resume(tmp_path: Path, number: signal.Signals, code: int) -> None:
    options = ["-o", "epochs=6", "-o", "validation.every=3"]
    command = [sys.executable, "-m", "redan", "train", "pgd-at-digits", *options, "--out"]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "killed" / "metrics.jsonl", process)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == code
    if code == 130:
        assert errors.count("\n") == errors.count("epoch 3/6") + 1 and "nothing is lost" in errors
    overrides = {"epochs": 6, "validation.every": 3}
    killed = redan.train("pgd-at-digits", tmp_path / "killed", overrides=overrides, resume=True, progress=False)
    whole = redan.train("pgd-at-digits", tmp_path / "whole", overrides=overrides, progress=False)
    assert same_weights(whole, killed)


def test_a_loss_that_is_not_finite_stops_with_what_to_try(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"epoch 1, step 2, at learning rate 1e\+30; try a lower optimizer.lr") as error:
        redan.train("pgd-at-digits", tmp_path / "run", overrides={"optimizer.lr": 1e30}, progress=False)
    assert "\n" not in str(error.value)
    # The folder holds nothing worth keeping, so the next try may use it.
    redan.train("standard-digits", tmp_path / "run", overrides={"epochs": 1}, progress=False)


def test_gradient_clipping_bounds_the_first_step(tmp_path: Path) -> None:
    overrides = {"epochs": 1, "gradient_clip": 1e-6, "optimizer.weight_decay": 0.0, "schedule.name": "constant"}
    clipped = redan.train("standard-digits", tmp_path / "clipped", overrides=overrides, progress=False)
    recipe = redan.load_recipe("standard-digits")
    from redan.data.registry import load_dataset
    from redan.recipes.build import build

    fresh = build(recipe, load_dataset("digits").facts).deployed().state_dict()
    moved = redan.load(clipped).state_dict()
    distance = sum(float((moved[name] - fresh[name]).square().sum()) for name in fresh) ** 0.5
    # 13 steps of at most lr * clip, each amplified by momentum 0.9 to at most ten times that.
    assert 0 < distance <= 13 * 10 * 0.05 * 1e-6


def test_a_full_disk_gives_one_line_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = redan.train("pgd-at-digits", tmp_path / "whole", overrides=FAST, progress=False)
    real = os.fsync
    writes: list[int] = []

    def full(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) > 9:  # two epochs' files and a bit
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            redan.train("pgd-at-digits", tmp_path / "full", overrides=FAST, progress=False)
    resumed = redan.train("pgd-at-digits", tmp_path / "full", overrides=FAST, resume=True, progress=False)
    assert same_weights(whole, resumed)
    assert not list(tmp_path.rglob(".*.safetensors.*"))


def test_runs_are_not_written_over_nor_mixed(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a run already"):
        redan.train("pgd-at-digits", trained, progress=False)
    with pytest.raises(UserError, match="another recipe .*epochs"):
        redan.train("pgd-at-digits", trained, resume=True, progress=False)
    shutil.copytree(trained, tmp_path / "copy")
    said_otherwise = {"description": "In other words."}
    again = redan.train(trained, tmp_path / "copy", overrides=said_otherwise, resume=True, progress=False)
    assert same_weights(trained, again)
    with pytest.raises(UserError, match="no run to resume"):
        redan.train("pgd-at-digits", tmp_path / "none", resume=True, progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        redan.train("pgd-at-digits", tmp_path / "full", progress=False)


def test_a_damaged_checkpoint_is_named(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_bytes((trained / "recipe.yaml").read_bytes())
    state = tmp_path / "run" / "checkpoint" / "state.safetensors"
    state.write_bytes((trained / "checkpoint" / "state.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged") as error:
        redan.train(tmp_path / "run", tmp_path / "run", resume=True, progress=False)
    assert str(state) in str(error.value)


def test_load_gives_the_deployed_network(trained: Path) -> None:
    network = redan.load(trained)
    assert not network.training
    assert network(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    best, last = (redan.load(trained, which).state_dict() for which in ("best", "last"))
    expected, _ = load_tensors(trained / "model-last.safetensors")
    assert all(torch.equal(last[name], expected[name]) for name in expected)
    assert best.keys() == last.keys()


@pytest.mark.slow
def test_two_processes_train_one_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "redan",
        "train",
        "pgd-at-digits",
        "--devices",
        "2",
        "--out",
        str(tmp_path / "two"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Trained:") == 1
    assert records(tmp_path / "two")[-1]["validation_clean_accuracy"] > 0.9
