"""DPLS, as reconstructed, against its formulas; and that training with it loses and repeats nothing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from torch import Tensor, nn

import redan
from redan.attacks.pgd import PGD
from redan.data.registry import load_dataset
from redan.data.types import Batch
from redan.errors import Stopped, UserError
from redan.methods.base import Adversary, Method
from redan.methods.dpls import DPLS, DPLSConfig
from redan.methods.ibp import IBP
from redan.methods.registry import METHODS, build_method
from redan.methods.weight_perturbation import WeightPerturbation, WeightPerturbationConfig
from redan.recipes.build import positions
from redan.recipes.schema import Recipe, load_recipe
from redan.run import build_targets, read_difficulty, read_method
from redan.tensors import load_tensors, save_tensors
from redan.threats import Linf
from redan.training import trainer

N, CLASSES = 12, 3
LABELS = torch.arange(N) % CLASSES


def logits(seed: int, n: int = N) -> Tensor:
    return 3 * torch.randn(n, CLASSES, generator=torch.Generator().manual_seed(seed))


def shown(config: DPLSConfig, epochs: int, known: Tensor | None = None) -> DPLS:
    """Targets that saw ``epochs`` epochs of all examples, in batches of 4; epoch e has the logits of seed e."""
    targets = DPLS(config, LABELS, known=known, seed=3)
    for epoch in range(epochs):
        for part in torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).split(4):
            targets.epoch = epoch + 0.5
            batch = Batch(torch.zeros(4, 1, 1, 1), LABELS[part], part)
            targets.observe(batch, -logits(epoch)[part], logits(epoch)[part])
    targets.epoch = float(epochs)
    return targets


def confidences(epochs: range, sign: int = 1) -> np.ndarray:
    rows = [torch.softmax(sign * logits(e).double(), 1)[torch.arange(N), LABELS].numpy() for e in epochs]
    return np.stack(rows)


def test_difficulty_is_one_minus_the_mean_confidence_of_the_epochs_that_count() -> None:
    targets = shown(DPLSConfig(first=2, warmup=5), 7)
    np.testing.assert_allclose(targets.difficulty(), 1 - confidences(range(2, 5)).mean(0), atol=1e-6)
    assert targets.seen.tolist() == [3] * N


def test_difficulty_by_clean_confidence_and_by_the_rank_of_the_loss() -> None:
    clean = shown(DPLSConfig(first=0, warmup=2, difficulty="clean-confidence"), 2)
    np.testing.assert_allclose(clean.difficulty(), 1 - confidences(range(2), sign=-1).mean(0), atol=1e-6)
    ranked = shown(DPLSConfig(first=0, warmup=2, difficulty="loss-rank"), 2)
    losses = -np.log(confidences(range(2))).mean(0)
    np.testing.assert_allclose(ranked.difficulty(), (rankdata(losses) - 1) / (N - 1), atol=1e-6)


def test_ties_share_a_rank_and_who_was_never_seen_gets_the_mean() -> None:
    targets = DPLS(DPLSConfig(first=0, warmup=1, difficulty="loss-rank"), LABELS)
    same = torch.zeros(4, CLASSES)
    targets.observe(Batch(torch.zeros(4, 1, 1, 1), LABELS[:4], torch.arange(4)), None, same)
    assert targets.difficulty().tolist() == [0.5] * N
    assert targets.difficulty(unknown=torch.nan)[4:].isnan().all()
    targets = DPLS(DPLSConfig(first=0, warmup=1), LABELS)
    targets.observe(Batch(torch.zeros(4, 1, 1, 1), LABELS[:4], torch.arange(4)), None, logits(0)[:4])
    difficulty = targets.difficulty()
    torch.testing.assert_close(difficulty[4:], difficulty[:4].mean().expand(N - 4))


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(0, 3), cap=st.floats(0, 0.95), min_max=st.booleans())
def test_amounts_are_proportional_and_capped(scale: float, cap: float, min_max: bool) -> None:
    targets = shown(DPLSConfig(first=0, warmup=2, scale=scale, cap=cap, min_max=min_max), 2)
    d = 1 - confidences(range(2)).mean(0)
    if min_max:
        d = (d - d.min()) / (d.max() - d.min())
    np.testing.assert_allclose(targets.amounts(), np.minimum(scale * d, cap), atol=1e-5)
    rows = targets(LABELS, torch.arange(N), CLASSES)
    torch.testing.assert_close(rows.sum(1), torch.ones(N))
    assert (rows >= 0).all()


def test_at_scale_1_without_min_max_the_class_gets_its_mean_confidence_and_a_share_of_the_rest() -> None:
    targets = shown(DPLSConfig(first=0, warmup=2, scale=1, cap=0.9999, min_max=False), 2)
    mean = confidences(range(2)).mean(0)
    own = targets(LABELS, torch.arange(N), CLASSES)[torch.arange(N), LABELS]
    np.testing.assert_allclose(own, mean + (1 - mean) / CLASSES, atol=1e-5)


def test_nothing_is_smoothed_before_the_warm_up_is_over() -> None:
    targets = shown(DPLSConfig(first=0, warmup=4), 3)
    targets.epoch = 3.99
    assert torch.equal(targets(LABELS, torch.arange(N), CLASSES), torch.eye(CLASSES)[LABELS])
    targets.epoch = 4.0
    assert targets.amounts().amax() > 0.3


def amounts(control: str) -> Tensor:
    return shown(DPLSConfig.model_validate({"first": 0, "warmup": 2, "control": control}), 2).amounts()


def test_controls_keep_the_mean_or_turn_it_round() -> None:
    own = amounts("none")
    torch.testing.assert_close(amounts("uniform"), own.mean().expand(N))
    permuted = amounts("permuted")
    assert not torch.equal(permuted, own) and torch.equal(permuted, amounts("permuted"))
    for label in range(CLASSES):
        assert torch.equal(permuted[label == LABELS].sort().values, own[label == LABELS].sort().values)
    torch.testing.assert_close(amounts("inverse"), 0.4 - own)


def test_known_difficulties_are_used_from_the_first_step() -> None:
    known = torch.linspace(0, 1, N)
    known[5] = torch.nan
    known = 0.2 + 0.6 * known
    targets = DPLS(DPLSConfig(sources=("elsewhere",), scale=0.5), LABELS, known=known)
    expected = torch.where(known.isnan(), known[~known.isnan()].mean(), known)
    torch.testing.assert_close(targets.amounts(), 0.5 * (expected - 0.2) / 0.6)


# In methods.


class Counting(nn.Sequential):
    """Counts its forward passes."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        for layer in self:
            images = layer(images)
        return images


def method(name: str, targets: DPLS) -> Method:
    torch.manual_seed(0)
    family = METHODS[name]
    net = Counting(
        nn.Conv2d(1, 3, 3),
        *([] if name == "colt" else [nn.BatchNorm2d(3)]),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )
    attack = PGD(Linf(0.1), steps=1, objective=family.attack_objective, start=family.attack_start, drop_broken=False)
    own: dict[str, dict[str, Any]] = {
        "arat": {"layers": ("1",)},
        "arrest": {"clean_epochs": 0},
        "colt": {"layers": ("input",)},
    }
    options = own.get(name, {})
    if issubclass(family, IBP):
        options = {"warmup": 0, "ramp": 0}  # the full radius from the first step
    parts = {"teacher": nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))} if family.takes_teacher else {}
    made = build_method(
        name, net, adversary=Adversary(attack, precision="float32"), targets=targets, parts=parts, **options
    )
    if name == "arrest":
        made.get_buffer("finetuning").fill_(True)
    return made


def batch() -> Batch:
    draws = torch.Generator().manual_seed(0)
    return Batch(torch.rand(N, 1, 4, 4, generator=draws), LABELS, torch.arange(N))


@pytest.mark.parametrize("awp", [False, True])
@pytest.mark.parametrize("name", [name for name, family in METHODS.items() if family.attacks and not family.purifies])
def test_every_method_shows_each_example_once_a_step_without_a_pass_more(name: str, awp: bool) -> None:
    passes = []
    for config in (DPLSConfig(first=0, warmup=1), DPLSConfig(first=90, warmup=91)):
        targets = DPLS(config, LABELS)
        trained = method(name, targets)
        wrapped = WeightPerturbation(trained, WeightPerturbationConfig()) if awp else trained
        wrapped.before_step(0.0, torch.Generator().manual_seed(0))
        output = wrapped(batch())
        passes.append(trained.network.calls)  # type: ignore[union-attr]
        assert targets.seen.tolist() == [1 if config.first == 0 else 0] * N
        if config.first == 0:
            p = torch.softmax(output.adversarial_logits, 1)[torch.arange(N), LABELS]
            torch.testing.assert_close(targets.difficulty(), 1 - p.detach())
    assert passes[0] == passes[1]


def test_re_estimated_statistics_show_nothing() -> None:
    targets = DPLS(DPLSConfig(first=0, warmup=1), LABELS)
    trained = method("pgd-at", targets)
    with torch.no_grad():
        trained(batch())
    assert targets.seen.sum() == 0


# In runs.

TINY: dict[str, Any] = {
    "data.train_samples": 300,
    "epochs": 4,
    "attack.steps": 2,
    "validation.every": 4,
    "dpls": {"first": 1, "warmup": 2, "scale": 0.6},
}


def trained(folder: Path, **changes: Any) -> Path:
    return redan.train("pgd-at-digits", folder, overrides=TINY | changes, progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("dpls") / "run")


@pytest.mark.parametrize("stop", [(1, 2), (3, 1)])
def test_a_resumed_run_comes_to_the_same_weights(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: tuple[int, int]
) -> None:
    real = trainer._Training._train_step

    def stopping(self: Any, *args: Any) -> None:
        real(self, *args)
        self.stop.requested = (self.epoch, self.step) == stop

    with monkeypatch.context() as context:
        context.setattr(trainer._Training, "_train_step", stopping)
        with pytest.raises(Stopped):
            trained(tmp_path / "parts")
    redan.train(tmp_path / "parts", tmp_path / "parts", resume=True, progress=False)
    for name in ("model-last.safetensors", "checkpoint/state.safetensors"):
        first, second = (load_file(folder / name) for folder in (run, tmp_path / "parts"))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    states = []
    for devices in ("1", "2"):
        options = ["--devices", devices, "--out", str(tmp_path / devices)]
        changes = ["epochs=3", "dpls.first=0", "dpls.warmup=2", "precision=float32", "attack.precision=float32"]
        command = [sys.executable, "-m", "redan", "train", "dpls-digits", *options]
        command += [word for change in changes for word in ("-o", change)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        states.append(load_file(tmp_path / devices / "checkpoint" / "state.safetensors"))
    one, two = states
    # The network has no BatchNorm, so that halves of a batch are the batch, but for the attacks' random starts.
    assert torch.equal(one["method/targets.seen"], two["method/targets.seen"])
    assert set(one["method/targets.seen"].tolist()) == {2}
    torch.testing.assert_close(one["method/targets.total"], two["method/targets.total"], rtol=0, atol=0.01)


def load_file(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_it_changes_training_and_scale_0_does_not(run: Path, tmp_path: Path) -> None:
    measured = trained(tmp_path / "measured", **{"dpls": {"first": 1, "warmup": 2, "scale": 0.0}})
    plain = trained(tmp_path / "plain", dpls=None)
    weights = [(folder / "model-last.safetensors").read_bytes() for folder in (measured, plain, run)]
    assert weights[0] == weights[1] != weights[2]


def test_an_average_around_it_does_not_count_and_wrong_labels_are_no_difficulty(tmp_path: Path) -> None:
    dataset = load_dataset("digits", None)
    changes: dict[str, Any] = {"data.wrong_labels": 0.2, "epochs": 3}
    plain, averaged = (
        trained(tmp_path / str(i), weight_averaging=averaging, **changes)
        for i, averaging in enumerate((None, {"kind": "ema", "decay": 0.5}))
    )
    found = [read_difficulty(folder, dataset) for folder in (plain, averaged)]
    assert torch.equal(found[0].nan_to_num(-1), found[1].nan_to_num(-1))
    given = read_difficulty(plain, dataset, given_labels=True)
    assert (~given.isnan()).sum() == 300 and (~found[0].isnan()).sum() == 240


def test_difficulty_of_a_run_lies_where_its_images_lie(run: Path) -> None:
    dataset = load_dataset("digits", None)
    found = read_difficulty(run, dataset)
    chosen, _ = positions(load_recipe(run), dataset)
    assert len(found) == len(dataset.train) and len(chosen) == 300
    targets = read_method(run, dataset)[0].targets
    assert isinstance(targets, DPLS)
    # Of 300 images in batches of 100 none is left out of an epoch.
    torch.testing.assert_close(found[chosen], targets.difficulty())
    others = torch.ones(len(found), dtype=torch.bool)
    others[chosen] = False
    assert found[others].isnan().all()


def test_a_pre_run_with_other_images_gives_what_it_knows(run: Path, tmp_path: Path) -> None:
    dataset = load_dataset("digits", None)
    base = load_recipe("pgd-at-digits", TINY | {"seed": 5, "dpls": {"sources": [str(run)], "scale": 1.0}})
    targets = build_targets(base, dataset)
    assert isinstance(targets, DPLS)
    chosen, _ = positions(base, dataset)
    known = read_difficulty(run, dataset)[chosen]
    assert 0 < known.isnan().sum() < len(chosen)  # another seed holds out others
    expected = torch.where(known.isnan(), known[~known.isnan()].mean(), known)
    torch.testing.assert_close(targets.difficulty(), expected)
    finished = trained(tmp_path / "second", **{"seed": 5, "dpls": {"sources": [str(run)]}})
    plain = trained(tmp_path / "plain", seed=5, dpls=None)
    assert (finished / "model-last.safetensors").read_bytes() != (plain / "model-last.safetensors").read_bytes()
    # What was read at the beginning is kept: neither a resume nor an analysis needs the pre-run again.
    (kept,) = (v for k, v in load_file(finished / "checkpoint" / "state.safetensors").items() if "targets.known" in k)
    begun = build_targets(load_recipe(finished, {"dpls.sources": ["gone"]}), dataset, begun=True)
    assert isinstance(begun, DPLS)
    begun.load_state_dict({"known": kept, "total": torch.zeros(300), "seen": torch.zeros(300, dtype=torch.int32)})
    anew = DPLS(begun.config, torch.zeros(300, dtype=torch.int64), known=known)
    torch.testing.assert_close(begun.amounts(), anew.amounts())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dpls.first": 70}, "dpls.first 70 is not below dpls.warmup 70"),
        ({"dpls.scale": 0.4}, "dpls.warmup must come before the end of the 40 epochs, or nothing comes of it"),
        ({"dpls": {"scale": 0, "first": 40}}, "dpls.first must come before the end of the 40 epochs"),
        (
            {"dpls.difficulty": "hard"},
            "dpls.difficulty: Input should be",
        ),
        ({"dpls.difficulty": "clean-confidence"}, "method pgd-at computes no logits of such images .*mart.*trades"),
        ({"dpls": {"warmup": 9}, "method": "standard"}, "difficulty confidence: method standard computes no logits"),
        ({"dpls": {"warmup": 9}, "label_smoothing": 0.1}, "leave label_smoothing at 0"),
        ({"dpls.control": "shuffled"}, "dpls.control: Input should be"),
        ({"dpls.scal": 1}, "no key 'dpls.scal'; did you mean 'scale'"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("pgd-at-digits", changes)


def test_a_source_that_is_none_is_named(tmp_path: Path, run: Path) -> None:
    dataset = load_dataset("digits", None)
    recipe = load_recipe("pgd-at-digits", {"dpls.sources": [str(tmp_path / "nothing")]})
    with pytest.raises(UserError, match="there is no run folder"):
        build_targets(recipe, dataset)
    early = trained(tmp_path / "early", **{"dpls": {"first": 1, "warmup": 2, "scale": 0.0}, "epochs": 2})
    state = early / "checkpoint" / "state.safetensors"
    tensors, place = load_tensors(state)
    save_tensors(state, tensors | {k: torch.zeros_like(v) for k, v in tensors.items() if "targets." in k}, place)
    with pytest.raises(UserError, match="has measured no difficulty yet"):
        read_difficulty(early, dataset)
    ranked = load_recipe("pgd-at-digits", {"dpls": {"sources": [str(run)], "difficulty": "loss-rank"}})
    with pytest.raises(UserError, match="measured confidence, and loss-rank is asked for"):
        build_targets(ranked, dataset)
    plain = trained(tmp_path / "plain", dpls=None, epochs=1)
    with pytest.raises(UserError, match="did not measure difficulty; train it with -o dpls.scale=0"):
        read_difficulty(plain, dataset)
    assert isinstance(build_targets(Recipe.model_validate(load_recipe(run).resolved()), dataset), DPLS)
