"""The study of hard examples against figures computed another way, and the record of examples that feeds it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

import redan
from redan.analysis import hard_examples
from redan.analysis.hard_examples import study_difficulty
from redan.analysis.results import DIFFICULTY, Difficulty
from redan.cli import app
from redan.data.registry import load_dataset
from redan.data.types import Batch
from redan.errors import Stopped, UserError
from redan.methods.base import NetworkMethod
from redan.recipes.build import positions, split
from redan.run import STATE, load, read_difficulty
from redan.seeds import generator
from redan.tensors import load_tensors, save_tensors
from redan.threats import Linf
from redan.training import trainer
from redan.training.monitor import EXAMPLES

RECORD: dict[str, Any] = {
    "model": {"name": "small-cnn", "width": 4},
    "data.train_samples": 230,  # two batches of 100 an epoch, which leave 30 examples out
    "epochs": 4,
    "attack.steps": 2,
    "validation.every": 2,
    "monitor.examples": True,
}


def trained(folder: Path, recipe: str = "pgd-at-digits", /, **changes: Any) -> Path:
    return redan.train(recipe, folder, overrides=RECORD | changes, progress=False)


DROP: dict[str, Any] = {"schedule": {"name": "multistep", "milestones": [3]}, "epochs": 5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a record and a drop of the learning rate after its third epoch."""
    return trained(tmp_path_factory.mktemp("hard") / "run", **DROP)


# The record of examples.


@pytest.mark.parametrize("recipe", ["pgd-at-digits", "standard-digits"])
def test_the_record_is_of_the_logits_that_training_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    seen: list[tuple[Batch, Tensor]] = []
    real = NetworkMethod.forward

    def spying(self: NetworkMethod, batch: Batch, adversarial: Tensor | None = None) -> Any:
        output = real(self, batch, adversarial)
        logits = output.clean_logits if recipe == "standard-digits" else output.adversarial_logits
        assert logits is not None
        seen.append((batch, logits.detach().double()))
        return output

    monkeypatch.setattr(NetworkMethod, "forward", spying)
    tensors, _ = load_tensors(trained(tmp_path / "run", recipe, epochs=1) / EXAMPLES)
    assert {name: (value.shape, value.dtype) for name, value in tensors.items()} == {
        "adversarial": ((1, 230), torch.float16),
        "correct": ((1, 230), torch.bool),
        "positions": ((230,), torch.int64),
    }
    assert len(seen) == 2
    for batch, logits in seen:
        own = logits.exp()[torch.arange(100), batch.labels] / logits.exp().sum(1)
        torch.testing.assert_close(tensors["adversarial"][0, batch.indices].double(), own, atol=6e-4, rtol=0)
        assert torch.equal(tensors["correct"][0, batch.indices], logits.argmax(1) == batch.labels)
    left_out = torch.ones(230, dtype=torch.bool)
    left_out[torch.cat([batch.indices for batch, _ in seen])] = False
    assert left_out.sum() == 30 and torch.equal(tensors["adversarial"][0].isnan(), left_out)
    assert not tensors["correct"][0, left_out].any()


def test_the_record_knows_where_its_examples_lie(run: Path) -> None:
    recipe, dataset = redan.load_recipe(run), load_dataset("digits")
    tensors, _ = load_tensors(run / EXAMPLES)
    assert torch.equal(tensors["positions"], positions(recipe, dataset)[0])
    assert torch.equal(dataset.train.labels[tensors["positions"]], split(recipe, dataset)[0].labels)
    unseen = tensors["adversarial"].isnan()
    assert unseen.sum(1).tolist() == [30] * 5 and not torch.equal(unseen[0], unseen[1])
    assert not tensors["correct"][unseen].any()


@pytest.mark.parametrize("stop", [(0, 0), (1, 0), (1, 1)], ids=["in epoch 1", "in epoch 2", "end of epoch 2"])
def test_a_resumed_run_keeps_the_same_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: tuple[int, int]
) -> None:
    whole = trained(tmp_path / "whole")
    real = trainer._Training._train_step

    def stopping(self: Any, *args: Any) -> None:
        real(self, *args)
        self.stop.requested = (self.epoch, self.step) == stop

    with monkeypatch.context() as context:
        context.setattr(trainer._Training, "_train_step", stopping)
        with pytest.raises(Stopped):
            trained(tmp_path / "parts")
    if stop[0]:  # a kill between the record and the checkpoint leaves a record that is ahead
        tensors, _ = load_tensors(tmp_path / "parts" / EXAMPLES)
        ahead = {name: torch.cat([tensors[name], tensors[name]]) for name in ("adversarial", "correct")}
        save_tensors(tmp_path / "parts" / EXAMPLES, tensors | ahead)
    redan.train(tmp_path / "parts", tmp_path / "parts", resume=True, progress=False)
    assert (tmp_path / "parts" / EXAMPLES).read_bytes() == (whole / EXAMPLES).read_bytes()


def test_a_record_that_lost_epochs_is_no_ground_to_resume_on(tmp_path: Path, run: Path) -> None:
    copied = tmp_path / "run"
    (copied / "checkpoint").mkdir(parents=True)
    for name in ("recipe.yaml", "checkpoint/state.safetensors", EXAMPLES):
        (copied / name).write_bytes((run / name).read_bytes())
    tensors, _ = load_tensors(run / EXAMPLES)
    save_tensors(copied / EXAMPLES, tensors | {"correct": tensors["correct"][:2]})
    with pytest.raises(UserError, match="does not hold the 5 epochs of 230 examples of this run"):
        redan.train(copied, copied, resume=True, progress=False)


def test_the_record_changes_nothing_of_the_training(tmp_path: Path) -> None:
    with_record, without = trained(tmp_path / "with"), trained(tmp_path / "without", **{"monitor.examples": False})
    name = "model-last.safetensors"
    assert (with_record / name).read_bytes() == (without / name).read_bytes()
    assert not (without / EXAMPLES).exists()


@pytest.mark.slow
def test_two_processes_record_what_one_records(tmp_path: Path) -> None:
    records = []
    for devices in ("1", "2"):
        changes = ["epochs=2", "monitor.examples=true", "precision=float32", "attack.precision=float32"]
        command = [sys.executable, "-m", "redan", "train", "standard-digits", "--devices", devices]
        command += ["--out", str(tmp_path / devices), *(word for change in changes for word in ("-o", change))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        records.append(load_tensors(tmp_path / devices / EXAMPLES)[0])
    one, two = records
    torch.testing.assert_close(one["adversarial"], two["adversarial"], rtol=0, atol=0.01, equal_nan=True)
    assert (one["correct"] == two["correct"]).float().mean() > 0.99


# The study.


def study(run: Path, **options: Any) -> tuple[Difficulty, dict[str, Tensor]]:
    found = study_difficulty(run, progress=False, **options)
    return found, load_tensors((run / DIFFICULTY).with_suffix(".safetensors"))[0]


@pytest.fixture(scope="module")
def found(run: Path) -> Difficulty:
    return study(run)[0]


def examples(run: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, images in [0, 1] and labels of what a run trains on."""
    recipe, dataset = redan.load_recipe(run), load_dataset("digits")
    training, _ = split(recipe, dataset)
    return positions(recipe, dataset)[0], training.images.float() / 255, training.labels


def test_difficulty_is_what_is_left_of_the_confidence_after_pgd(run: Path) -> None:
    where, images, labels = (it[:20] for it in examples(run))
    network = load(run, "last")
    found, tensors = study(run, samples=20, seed=3)
    assert found.attack == "pgd-10"
    assert torch.equal(tensors["positions"], where) and tensors["difficulty"].shape == (20, 4)
    for column, radius in enumerate((0, 0.0375, 0.075, 0.15)):
        x = images
        if radius:
            x = Linf(radius).random_start(images, generator(3, "difficulty", 0))
            for _ in range(10):
                x = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(F.cross_entropy(network(x), labels, reduction="sum"), x)
                x = x + radius / 4 * gradient.sign()
                x = x.clamp(images - radius, images + radius).clamp(0, 1)
        expected = 1 - network(x).softmax(1)[torch.arange(20), labels].detach()
        torch.testing.assert_close(tensors["difficulty"][:, column], expected, atol=2e-3, rtol=0)
        assert found.growth.points[column].radius == pytest.approx(radius)
        assert found.growth.points[column].mean == pytest.approx(float(expected.mean()), abs=2e-3)


def test_deciles_are_by_the_mean_over_the_radii(run: Path) -> None:
    found, tensors = study(run)
    difficulty = tensors["difficulty"].numpy()
    order = np.argsort(difficulty.mean(1), kind="stable")
    for point, values in zip(found.growth.points, difficulty.T, strict=True):
        assert point.easiest == pytest.approx(values[order[:23]].mean(), rel=1e-5)
        assert point.hardest == pytest.approx(values[order[-23:]].mean(), rel=1e-5)
        assert point.easiest_loss == pytest.approx(-np.log(1 - values[order[:23]]).mean(), rel=1e-4)
        assert point.hardest_loss == pytest.approx(-np.log(1 - values[order[-23:]]).mean(), rel=1e-4)
        assert point.run == "run"
    assert found.samples == found.growth.examples == 230
    # Of 30 examples a tenth are 3: more of the easy ones than of the hard ones would be another share.
    assert [len(tenth) for tenth in hard_examples._deciles(torch.arange(30.0))] == [3] * 10


def test_correlations_are_spearmans(run: Path) -> None:
    found, tensors = study(run)
    record, _ = load_tensors(run / EXAMPLES)
    confidence = np.nanmean(record["adversarial"].double().numpy(), 0)
    loss = np.nanmean(-np.log(record["adversarial"].double().numpy()), 0)
    last = 1 - record["adversarial"][4].double().numpy()
    measures = [1 - confidence, loss, last, tensors["difficulty"][:, 0].numpy(), tensors["difficulty"][:, 3].numpy()]
    assert found.correlations.names == (
        "mean adversarial confidence, epochs 1-5",
        "mean adversarial loss, epochs 1-5",
        "adversarial confidence, epoch 5",
        "clean, last weights",
        "PGD-10 linf:0.15, last weights",
    )
    for row, counts, mine in zip(found.correlations.spearman, found.correlations.examples, measures, strict=True):
        known = [~np.isnan(mine) & ~np.isnan(other) for other in measures]
        assert list(counts) == [both.sum() for both in known]
        expected = [spearmanr(mine[both], other[both]).statistic for both, other in zip(known, measures, strict=True)]
        assert row == pytest.approx(expected, abs=1e-3)
    # The last epoch left 30 out, and it alone.
    assert [counts[2] for counts in found.correlations.examples] == [200] * 5
    assert [counts[0] for counts in found.correlations.examples] == [230, 230, 200, 230, 230]


def test_a_correlation_is_of_what_both_know() -> None:
    # Of n ranks without ties it is 1 - 6 sum d^2 / (n (n^2 - 1)).
    one = torch.tensor([0.1, 0.2, 0.3, torch.nan, 0.4])
    other = torch.tensor([2.0, 1.0, 3.0, 0.0, 4.0])
    unknown = torch.tensor([torch.nan, torch.nan, torch.nan, 0.0, 1.0])
    table = hard_examples._correlations({"a": one, "b": other, "c": torch.ones(5), "d": unknown})
    assert table.names == ("a", "b", "c", "d")
    assert table.spearman[0] == pytest.approx([1, 1 - 6 * 2 / (4 * 15), None, None])
    assert table.spearman[1] == pytest.approx([0.8, 1, None, 1])
    assert table.spearman[2] == (None,) * 4
    assert table.examples == ((4, 4, 4, 1), (4, 5, 5, 2), (4, 5, 5, 2), (1, 2, 2, 2))


def test_epochs_are_those_that_dpls_counts(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", dpls={"difficulty": "loss-rank", "first": 1, "warmup": 3, "scale": 0.0})
    found, tensors = study(run)
    assert found.correlations.names[:4] == (
        "DPLS (loss-rank, epochs 2-3)",
        "mean adversarial confidence, epochs 2-3",
        "mean adversarial loss, epochs 2-3",
        "adversarial confidence, epoch 3",
    )
    record = load_tensors(run / EXAMPLES)[0]["adversarial"].double().numpy()
    known = ~np.isnan(record[1:3]).all(0)
    both = ~np.isnan(record[2])
    assert [row[0] for row in found.correlations.examples[:4]] == [known.sum()] * 3 + [both.sum()]
    own = tensors["training"].numpy()
    assert found.correlations.spearman[0][1:4] == pytest.approx(
        [
            spearmanr(own[known], 1 - np.nanmean(record[1:3][:, known], 0)).statistic,
            1,  # the rank of the mean loss is what DPLS measured
            spearmanr(own[both], 1 - record[2, both]).statistic,
        ],
        abs=1e-3,
    )
    tensors, _ = load_tensors(run / EXAMPLES)
    save_tensors(run / EXAMPLES, {k: v if k == "positions" else v[:1] for k, v in tensors.items()})
    early = study(run, samples=10)[0]
    assert any("needs an epoch after dpls.first" in line for line in early.missing)
    assert not any("mean adversarial" in name for name in early.correlations.names)


def test_a_record_of_clean_images_is_called_so(tmp_path: Path) -> None:
    found, _ = study(trained(tmp_path / "run", "standard-digits"), samples=10)
    assert found.correlations.names[:3] == (
        "mean clean confidence, epochs 1-4",
        "mean clean loss, epochs 1-4",
        "clean confidence, epoch 4",
    )


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("tensorboard", "difficulty*"))
    return folder


def test_the_jump_of_each_tenth_is_of_the_record(run: Path, tmp_path: Path) -> None:
    made_up = copied(run, tmp_path / "run")
    tensors, _ = load_tensors(run / EXAMPLES)
    rows = torch.arange(230)
    easier = 1 - rows / 256
    # The third epoch is the last before the drop: that and what follows have no say in the deciles.
    confidence = torch.stack([easier, easier, easier.flip(0), easier.flip(0), easier.flip(0)]).half()
    correct = torch.zeros(5, 230, dtype=torch.bool)
    correct[2] = rows < 115
    correct[4] = (rows < 115) | (rows % 23 < 5)
    confidence[4, 22::23] = torch.nan  # one of each tenth was not seen; the first five tenths have it right
    correct[4, 22::23] = False
    save_tensors(made_up / EXAMPLES, tensors | {"adversarial": confidence, "correct": correct})
    found = study(made_up, samples=20)[0].memorisation
    assert found is not None and (found.before, found.after) == (3, 5)
    assert [group.group for group in found.groups] == [f"decile {i}" for i in range(1, 11)]
    assert [group.examples for group in found.groups] == [23] * 10
    assert [group.before for group in found.groups] == [1] * 5 + [0] * 5
    assert [group.after for group in found.groups] == [1] * 5 + [pytest.approx(5 / 22)] * 5
    assert [group.jump for group in found.groups] == [0] * 5 + [pytest.approx(5 / 22)] * 5


def test_wrong_labels_are_a_group_of_their_own(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", **DROP, **{"data.wrong_labels": 0.1})
    found, tensors = study(run)
    where, _, labels = examples(run)
    dataset = load_dataset("digits")
    wrong = labels != dataset.train.labels[where]
    assert found.memorisation is not None and wrong.sum() == 23
    *tenths, last = found.memorisation.groups
    assert sum(group.examples for group in tenths) == 207 - int(unseen_at_first(run)[~wrong].sum())
    assert (last.group, last.examples) == ("wrong labels", 23)
    record, _ = load_tensors(run / EXAMPLES)
    for epoch, share in ((2, last.before), (4, last.after)):
        seen = wrong & ~record["adversarial"][epoch].isnan()
        assert share == pytest.approx(float(record["correct"][epoch, seen].float().mean()))
    flagged = {entry.position for entry in found.gallery if entry.wrong_label}
    assert flagged and flagged <= set(where[wrong].tolist())
    # They are what the label's own difficulty finds hard.
    difficulty = tensors["difficulty"].mean(1)
    assert difficulty[wrong].mean() > difficulty[~wrong].mean()
    # An example is an image with its label: a run that has other labels does not share those.
    right = trained(tmp_path / "right", "standard-digits", **{"monitor": None})
    assert torch.equal(examples(right)[0], where)
    shared = study(run, against=[right])[0].training_growth
    assert shared is not None and shared.examples == 207


def unseen_at_first(run: Path) -> Tensor:
    """Who was in neither of the first two epochs."""
    return load_tensors(run / EXAMPLES)[0]["adversarial"][:2].isnan().all(0)


def test_the_gallery_has_the_ends_of_each_class(run: Path) -> None:
    found, tensors = study(run)
    where, _, labels = examples(run)
    difficulty = tensors["difficulty"].mean(1)
    dataset = load_dataset("digits")
    assert len(found.gallery) == 60
    for label in range(10):
        members = sorted(zip(difficulty[labels == label].tolist(), where[labels == label].tolist(), strict=True))
        mine = [entry for entry in found.gallery if entry.label == label]
        assert [entry.end for entry in mine] == ["hardest"] * 3 + ["easiest"] * 3
        expected = [position for _, position in [*members[:-4:-1], *members[:3]]]
        assert [entry.position for entry in mine] == expected
    shown = torch.tensor([entry.position for entry in found.gallery])
    assert torch.equal(tensors["images"], dataset.train.images[shown])
    few = study(run, samples=10)[0].gallery
    assert len(few) == len({entry.position for entry in few})  # nobody is at both ends of a class


def test_runs_are_compared_on_what_they_share(run: Path, tmp_path: Path) -> None:
    other = trained(tmp_path / "half", **DROP, **{"threat": "linf:0.075", "seed": 1})
    found, _ = study(run, against=[other])
    (mine, _, _), (theirs, _, _) = examples(run), examples(other)
    shared = torch.tensor(sorted(set(mine.tolist()) & set(theirs.tolist())))
    growth = found.training_growth
    assert growth is not None and growth.measure == "1 - mean p_y in training"
    rows = []
    for folder, where in ((other, theirs), (run, mine)):
        confidence = load_tensors(folder / EXAMPLES)[0]["adversarial"].float().nanmean(0)
        rows.append(1 - confidence[torch.searchsorted(where, shared)].numpy())
    values = np.stack(rows)[:, ~np.isnan(rows).any(0)]
    assert growth.examples == values.shape[1] and 10 <= growth.examples <= len(shared) < 230
    order = np.argsort(values.mean(0), kind="stable")
    tenth = np.array_split(order, 10)
    for point, name, radius, own in zip(growth.points, ("half", "run"), (0.075, 0.15), values, strict=True):
        assert (point.run, point.radius) == (name, radius)
        assert point.hardest == pytest.approx(own[tenth[-1]].mean(), rel=1e-4)
        assert point.easiest == pytest.approx(own[tenth[0]].mean(), rel=1e-4)
    # Without DPLS a run's own difficulty is that of its last weights under the same attack.
    assert found.against == ("half",)
    assert found.correlations.names[-1] == "run half: PGD-10 linf:0.15, last weights"
    theirs_found, tensors = study(other, radii=[0.15])
    at, there = (torch.searchsorted(where, shared) for where in (mine, theirs))
    hard = load_tensors((run / DIFFICULTY).with_suffix(".safetensors"))[0]["difficulty"][at, 3]
    expected = spearmanr(hard, tensors["difficulty"][there, 0]).statistic
    assert theirs_found.run == "half"
    assert found.correlations.spearman[4][-1] == pytest.approx(expected, abs=0.02)  # of other random starts
    assert found.correlations.examples[4][-1] == len(shared) < found.correlations.examples[4][4] == 230


def test_the_mean_of_runs_is_of_those_that_know_an_example(run: Path, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"monitor": None, "epochs": 1, "data.train_samples": 600}
    others = [trained(tmp_path / f"seed{seed}", seed=seed, **plain) for seed in (1, 2)]
    found, tensors = study(run, against=others, radii=[0])
    where, images, labels = examples(run)
    rows = []
    for other in others:
        confidence = load(other, "last")(images).softmax(1)[torch.arange(230), labels].detach()
        rows.append((1 - confidence).where(torch.isin(where, examples(other)[0]), torch.nan).numpy())
    known = ~np.isnan(rows).all(0)
    both = ~np.isnan(rows).any(0)
    assert 0 < both.sum() < known.sum() < 230
    assert found.correlations.names[-3:] == (
        "run seed1: clean, last weights",
        "run seed2: clean, last weights",
        "mean of 2 runs: clean, last weights",
    )
    assert found.correlations.examples[-1][-1] == known.sum() and found.correlations.examples[-2][-3] == both.sum()
    expected = spearmanr(np.nanmean(np.stack(rows)[:, known], 0), tensors["difficulty"][:, 0].numpy()[known]).statistic
    assert found.correlations.spearman[-1][-4] == pytest.approx(expected, abs=1e-4)

    unlike = trained(tmp_path / "dpls", **plain, dpls={"first": 0, "warmup": 9, "scale": 0.0})
    found = study(run, against=[others[0], unlike], samples=10)[0]
    assert found.correlations.names[-2:] == (
        "run seed1: PGD-10 linf:0.15, last weights",
        "run dpls: DPLS (confidence, epoch 1)",
    )
    assert "the mean of the runs compared with needs them to measure alike" in found.missing


def test_radii_may_be_named(run: Path) -> None:
    default = study(run, samples=40)[1]["difficulty"]
    found, tensors = study(run, samples=40, radii=[0.15, 0.3, 0])
    assert [point.radius for point in found.growth.points] == [0, 0.15, 0.3]
    assert torch.equal(tensors["difficulty"][:, :2], default[:, [0, 3]])
    assert found.growth.points[2].mean > found.growth.points[1].mean
    assert found.correlations.names[-2:] == ("clean, last weights", "PGD-10 linf:0.3, last weights")
    assert study(run, samples=10, radii=[0.1])[0].correlations.names[-1] == "PGD-10 linf:0.1, last weights"


def test_without_records_runs_are_compared_by_their_last_weights(run: Path, tmp_path: Path) -> None:
    clean = trained(tmp_path / "clean", "standard-digits", **{"monitor": None})
    found, tensors = study(run, against=[clean])
    growth = found.training_growth
    assert growth is not None and "on the last weights" in growth.measure
    assert [(point.run, point.radius) for point in growth.points] == [("clean", 0), ("run", 0.15)]
    _, images, labels = examples(run)
    confidence = load(clean, "last")(images).softmax(1)[torch.arange(230), labels].detach()  # both have the same split
    assert growth.points[0].mean == pytest.approx(float(1 - confidence.mean()), abs=1e-5)
    assert growth.points[1].mean == pytest.approx(float(tensors["difficulty"][:, 3].mean()), abs=1e-5)


def test_a_run_with_dpls_has_measured_its_own(tmp_path: Path) -> None:
    options = {"dpls": {"first": 1, "warmup": 3, "scale": 0.0}, "monitor": None}
    run = trained(tmp_path / "run", **options)
    found, tensors = study(run, samples=100)
    assert found.correlations.names == (
        "DPLS (confidence, epochs 2-3)",
        "clean, last weights",
        "PGD-10 linf:0.15, last weights",
    )
    own = read_difficulty(run, load_dataset("digits"))[tensors["positions"]]
    torch.testing.assert_close(tensors["training"], own, equal_nan=True)
    known = ~own.isnan()
    expected = spearmanr(own[known], tensors["difficulty"][known, 0]).statistic
    assert found.correlations.spearman[0][1] == pytest.approx(expected)
    assert found.memorisation is None and any("monitor.examples=true" in line for line in found.missing)
    stopped = copied(run, tmp_path / "stopped")
    state, place = load_tensors(stopped / STATE)
    save_tensors(stopped / STATE, state, place | {"epoch": 1, "step": 1})
    with pytest.warns(UserWarning, match="is in its warm-up"):
        assert study(stopped, samples=10)[0].correlations.names[0] == "DPLS (confidence, epoch 2)"
    with pytest.warns(UserWarning, match="known to none of dpls.sources"):
        borrowed = trained(tmp_path / "borrowed", dpls={"sources": [str(run)]}, epochs=1)
    found, _ = study(borrowed, samples=10)
    assert found.correlations.names[0] == "mean adversarial confidence, epoch 1"  # all it has: it counts none itself
    assert not any("DPLS" in name for name in found.correlations.names)


def test_what_is_missing_is_said(run: Path, found: Difficulty, tmp_path: Path) -> None:
    assert [line.partition(" needs")[0] for line in found.missing] == [
        "difficulty in training",
        "growth over the radius of training",
    ]
    assert found.memorisation is not None
    steady = study(trained(tmp_path / "run", **{"schedule.name": "cosine"}), samples=10)[0]
    assert steady.memorisation is None
    assert any("-o schedule.name=multistep" in line for line in steady.missing)


def test_it_is_kept_repeats_and_leaves_the_run_alone(run: Path) -> None:
    def kept() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != DIFFICULTY}

    first, _ = study(run, samples=50)
    assert Difficulty.load(run / DIFFICULTY) == first
    before = kept()
    again, _ = study(run, samples=50)
    assert again.model_copy(update={"seconds": first.seconds}) == first and kept() == before
    assert study(run, samples=50, seed=1)[0].growth != first.growth


def test_the_command_prints_tables_or_one_document(run: Path) -> None:
    arguments = ["analyse", str(run), "--difficulty", "--samples", "30"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.stderr
    texts = ("hardest decile", "hardest, loss", "4 clean, last weights", "decile 10", "-o dpls.scale=0")
    for text in (*texts, "difficulty.json"):
        assert text in shown.stdout
    # The last epoch did not see all 30, so that there are counts for each two measures.
    seen = int((~load_tensors(run / EXAMPLES)[0]["adversarial"][4, :30].isnan()).sum())
    known = shown.stdout[shown.stdout.index("images that both know") :].splitlines()
    assert seen < 30 and known[3].split() == ["3", *[str(seen)] * 5]
    assert known[1].split() == ["1", "30", "30", str(seen), "30", "30"]
    document = json.loads(CliRunner().invoke(app, [*arguments, "--json", "--against", str(run)]).stdout)
    assert document["samples"] == 30 and len(document["growth"]["points"]) == 4
    # Of the same folder name, they are told apart by the path.
    assert document["correlations"]["names"][-1].startswith(f"run {run}: ")
    radii = json.loads(CliRunner().invoke(app, [*arguments, "--json", "--radii", "0, 8/255"]).stdout)
    assert [point["radius"] for point in radii["growth"]["points"]] == [0, 8 / 255]


def test_one_number_of_images_is_said_once(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "standard-digits", **{"monitor": None, "epochs": 1})
    shown = CliRunner().invoke(app, ["analyse", str(run), "--difficulty", "--samples", "30"])
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert ["1", "clean,", "last", "weights", "30"] in rows and "both know" not in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--against other", "--against goes with --difficulty"),
        ("--radii 0.1", "--radii goes with --difficulty"),
        ("--difficulty --batches 20", "--batches is of gradients, which --difficulty does not look at"),
        ("--difficulty --radii 0,wide", "'wide' is not a number such as 0.5 or 8/255"),
        ("--difficulty --radii=0,-0.1", "a threat's radius is a number of at least 0, got -0.1"),
    ],
)
def test_options_that_do_not_go_together_end_in_one_line(run: Path, arguments: str, message: str) -> None:
    refused = CliRunner().invoke(app, ["analyse", str(run), *arguments.split()])
    assert refused.exit_code == 2 and message in refused.stderr and refused.stderr.count("\n") == 1


def test_python_users_have_the_study_too() -> None:
    assert redan.study_difficulty is study_difficulty and "study_difficulty" in redan.__all__


def test_mistakes_end_in_one_line(run: Path, tmp_path: Path) -> None:
    for samples in (9, 231):
        with pytest.raises(UserError, match=f"--samples is from 10 to 230, .*; got {samples}"):
            study_difficulty(run, samples=samples, progress=False)
    with pytest.raises(UserError, match="radii is a list of at least one radius"):
        study_difficulty(run, radii=[], progress=False)
    with pytest.raises(UserError, match="no run folder"):
        study_difficulty(run, against=[tmp_path / "nothing"], progress=False)
    elsewhere = copied(run, tmp_path / "elsewhere")
    text = (elsewhere / "recipe.yaml").read_text()
    (elsewhere / "recipe.yaml").write_text(text.replace("name: digits", "name: mnist"))
    with pytest.raises(UserError, match="elsewhere is a run on mnist, not on digits"):
        study_difficulty(run, against=[elsewhere], progress=False)
    damaged = copied(run, tmp_path / "damaged")
    tensors, _ = load_tensors(run / EXAMPLES)
    for change in ({"positions": tensors["positions"] + 1}, {"correct": tensors["correct"][1:]}):
        save_tensors(damaged / EXAMPLES, tensors | change)
        with pytest.raises(UserError, match="examples.safetensors is not a record of this run's 230 training examples"):
            study_difficulty(damaged, progress=False)
        assert not (damaged / DIFFICULTY).exists()
    (damaged / DIFFICULTY).write_text("{}")
    with pytest.raises(UserError, match="is not a study of difficulty of redan's"):
        Difficulty.load(damaged / DIFFICULTY)
