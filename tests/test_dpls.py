"""DPLS, as reconstructed, against its formulas; and that training with it loses and repeats nothing."""

import multiprocessing
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import redan
from redan.attacks.base import Outcome
from redan.attacks.pgd import PGD
from redan.attacks.search import SearchModel
from redan.data.registry import load_dataset
from redan.data.types import Batch
from redan.errors import Stopped, UserError
from redan.methods.base import Adversary, NetworkMethod
from redan.methods.dpls import DPLS, Control, DPLSConfig
from redan.methods.ibp import IBP
from redan.methods.registry import METHODS, build_method
from redan.methods.targets import LabelSmoothing, Targets
from redan.methods.weight_averaging import WeightAveraging, WeightAveragingConfig
from redan.methods.weight_perturbation import WeightPerturbation, WeightPerturbationConfig
from redan.recipes.build import positions
from redan.recipes.schema import load_recipe
from redan.run import build_targets, read_difficulty, read_method
from redan.tensors import load_tensors, save_tensors
from redan.threats import Linf
from redan.training import trainer

N, CLASSES = 12, 3
LABELS = torch.arange(N) % CLASSES


def logits(seed: int, n: int = N) -> Tensor:
    return 3 * torch.randn(n, CLASSES, generator=torch.Generator().manual_seed(seed))


def shown(config: DPLSConfig, epochs: int, rank: int = 0, world: int = 1) -> DPLS:
    """Targets that saw ``epochs`` epochs of all examples, in batches of 4; epoch e has the logits of seed e.

    Of several processes, each sees its own part of every batch.
    """
    targets = DPLS(config, LABELS, seed=3)
    for epoch in range(epochs):
        for part in torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).split(4):
            part = part[rank::world]
            targets.epoch = epoch + 0.5
            batch = Batch(torch.zeros(len(part), 1, 1, 1), LABELS[part], part)
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
    targets = DPLS(DPLSConfig(sources="elsewhere", scale=0.5), LABELS, known=known)
    expected = torch.where(known.isnan(), known[~known.isnan()].mean(), known)
    torch.testing.assert_close(targets.amounts(), 0.5 * (expected - 0.2) / 0.6)


KNOWN = torch.linspace(0.1, 0.8, N)


def knowing() -> DPLS:
    """Targets whose amounts are ``KNOWN``, another one for each example."""
    return DPLS(DPLSConfig(sources=("elsewhere",), scale=1, min_max=False), LABELS, known=KNOWN)


def test_with_known_difficulties_nothing_is_measured() -> None:
    targets = knowing()
    targets.epoch = 10.0  # between first and warmup
    amounts = targets.amounts()
    targets.observe(Batch(torch.zeros(N, 1, 1, 1), LABELS, torch.arange(N)), logits(0), logits(1))
    assert not targets.seen.any() and not targets.total.any() and targets.amounts() is amounts


def size(tensors: Iterable[Tensor]) -> float:
    """Bytes an example."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors) / N


@pytest.mark.parametrize(
    ("control", "known", "kept", "held"), [("none", None, 8, 12), ("permuted", None, 8, 20), ("none", KNOWN, 12, 16)]
)
def test_it_takes_a_few_bytes_an_example(control: Control, known: Tensor | None, kept: int, held: int) -> None:
    targets = DPLS(DPLSConfig(control=control), LABELS, known=known)
    targets.epoch = 70.0
    assert targets.amounts() is targets.amounts()  # one tensor, computed once
    assert size(targets.state_dict().values()) == kept
    assert size([*targets.buffers(), targets.amounts()]) == held
    averaged = WeightAveraging(method("pgd-at", targets), WeightAveragingConfig())
    assert size(tensor for name, tensor in averaged.state_dict().items() if "targets." in name) == 2 * kept


def watch(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    save_tensors(folder / str(rank), shown(DPLSConfig(first=1, warmup=4), 5, rank, 2).state_dict())
    dist.destroy_process_group()


def test_two_processes_with_a_half_of_each_batch_learn_what_one_does(tmp_path: Path) -> None:
    # Forked: to import everything anew would take most of the time.
    processes = [multiprocessing.get_context("fork").Process(target=watch, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    alone = shown(DPLSConfig(first=1, warmup=4), 5).state_dict()
    assert alone["seen"].tolist() == [3] * N
    for rank in (0, 1):
        found, _ = load_tensors(tmp_path / str(rank))
        assert found.keys() == alone.keys() and all(torch.equal(found[key], alone[key]) for key in alone)


# In methods.

ATTACKING = [name for name, family in METHODS.items() if family.attacks and not family.purifies]
# Forward passes of the network in a step's loss, apart from bounds: COLT's are at the attacked layer and one before.
PASSES = {name: 2 if name in ("trades", "mart", "arat", "lbgat", "colt") else 1 for name in ATTACKING}


def network(name: str) -> nn.Sequential:
    """Tiny, with the same weights at each call; COLT takes no BatchNorm."""
    torch.manual_seed(0)
    norm = [] if name == "colt" else [nn.BatchNorm2d(3)]
    return nn.Sequential(nn.Conv2d(1, 3, 3), *norm, nn.ReLU(), nn.Flatten(), nn.Linear(12, CLASSES))


def method(name: str, targets: Targets) -> NetworkMethod:
    net, family = network(name), METHODS[name]
    attack = PGD(Linf(0.1), steps=1, objective=family.attack_objective, start=family.attack_start, drop_broken=False)
    own: dict[str, dict[str, Any]] = {
        "arat": {"layers": ("1",), "predictor": False},
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
    made.before_step(0.0, torch.Generator().manual_seed(0))
    return made


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def batch() -> Batch:
    return Batch(images(N), LABELS, torch.arange(N))


def by_hand(name: str, net: nn.Sequential, examples: Batch, adversarial: Tensor, rows: Tensor) -> Tensor:
    """The papers' losses, their cross-entropies with targets ``rows`` where a method takes soft ones."""
    attacked = net(adversarial)
    if name == "pgd-at":
        return F.cross_entropy(attacked, rows)
    clean, y = net(examples.images), examples.labels[:, None]
    if name == "arat":
        z, z_adversarial = (net[:2](x).relu().mean((2, 3)) for x in (examples.images, adversarial))
        distance = 1 - F.cosine_similarity(z_adversarial, z.detach()).mean()
        return 0.3 * F.cross_entropy(attacked, rows) + 0.7 * F.cross_entropy(clean, rows) + 30 * distance
    p, q = clean.softmax(1), attacked.softmax(1)
    kl = (p * (p / q).log()).sum(1)
    if name == "trades":
        return F.cross_entropy(clean, rows) + 6 * kl.mean()
    margin = -(1 - q.scatter(1, y, 0).amax(1)).log()
    return F.cross_entropy(attacked, rows) + (margin + 5 * kl * (1 - p.gather(1, y).squeeze(1))).mean()


@pytest.mark.parametrize("awp", [False, True])
@pytest.mark.parametrize("name", ["pgd-at", "trades", "mart", "arat"])
def test_the_loss_takes_each_examples_own_amount(name: str, awp: bool) -> None:
    chosen = torch.randperm(N, generator=torch.Generator().manual_seed(1))[:8]
    examples, adversarial = Batch(images(8), LABELS[chosen], chosen), images(8, seed=1)
    rows = (1 - KNOWN[chosen, None]) * torch.eye(CLASSES)[LABELS[chosen]] + KNOWN[chosen, None] / CLASSES
    net = network(name)
    if awp:  # one step up from each weight, of a fifth of its norm
        weights = [p for p in net.parameters() if p.dim() > 1]
        gradients = torch.autograd.grad(by_hand(name, net, examples, adversarial, rows), weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(0.2 * weight.norm() * gradient / gradient.norm())
    trained = method(name, knowing())
    if name == "arat":
        trained.get_buffer("balance").fill_(0.3)
    wrapped = WeightPerturbation(trained, WeightPerturbationConfig(gamma=0.2)) if awp else trained
    expected = by_hand(name, net, examples, adversarial, rows)
    torch.testing.assert_close(wrapped(examples, adversarial).loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ATTACKING)
def test_the_attack_keeps_the_label(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []
    real = PGD.run

    def noting(attack: PGD, search: SearchModel, images: Tensor, labels: Tensor, draws: Generator | None) -> Outcome:
        given.append(labels)
        return real(attack, search, images, labels, draws)

    monkeypatch.setattr(PGD, "run", noting)
    soft, hard = (method(name, targets).perturb(batch()) for targets in (knowing(), LabelSmoothing()))
    assert torch.equal(soft, hard)
    assert all(labels.dtype == torch.int64 and torch.equal(labels, LABELS) for labels in given)
    # COLT attacks behind a layer, by itself; these bounds need no attack.
    assert len(given) == (0 if name in ("colt", "ibp", "crown-ibp") else 2)


def passes_of(net: nn.Sequential) -> list[None]:
    """Grows by one with each forward pass of the network, not with those of the copies that are attacked."""
    passes: list[None] = []
    head = net[-1]
    head.register_forward_hook(lambda module, *_: passes.append(None) if module is head else None)
    return passes


@pytest.mark.parametrize("awp", [False, True])
@pytest.mark.parametrize("name", ATTACKING)
def test_every_method_shows_each_example_once_and_needs_no_pass_more(name: str, awp: bool) -> None:
    measuring = DPLS(DPLSConfig(first=0, warmup=1), LABELS)
    for targets in (LabelSmoothing(), LabelSmoothing(0.3), knowing(), measuring):
        trained = method(name, targets)
        wrapped = WeightPerturbation(trained, WeightPerturbationConfig()) if awp else trained
        passes = passes_of(trained.network)  # type: ignore[arg-type]
        wrapped.before_step(0.0, torch.Generator().manual_seed(0))
        output = wrapped(batch())
        assert len(passes) == PASSES[name] * (2 if awp else 1)
    p = torch.softmax(output.adversarial_logits, 1)[torch.arange(N), LABELS]
    torch.testing.assert_close(measuring.difficulty(), 1 - p.detach())
    # When the warm-up is over they are not shown any more, and their labels are soft.
    passes.clear()
    wrapped.before_step(1.0, torch.Generator().manual_seed(0))
    wrapped(batch())
    assert len(passes) == PASSES[name] * (2 if awp else 1)
    assert measuring.seen.tolist() == [1] * N and measuring.amounts().amax() > 0


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


@pytest.fixture(scope="module")
def pre_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two that measure difficulty, each on 1200 of the 1660 images, as its seed chose them."""
    folder = tmp_path_factory.mktemp("pre-runs")
    changes = {"data.train_samples": 1200, "epochs": 2, "dpls.scale": 0.0}
    return [trained(folder / str(seed), seed=seed, **changes) for seed in (0, 1)]


@pytest.mark.parametrize("stop", [(1, 2), (3, 1)])
@pytest.mark.parametrize("changes", [{}, {"dpls.control": "permuted"}, {"weight_perturbation": {"gamma": 0.01}}])
def test_a_resumed_run_comes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: tuple[int, int], changes: dict[str, Any]
) -> None:
    trained(tmp_path / "whole", **changes)
    real = trainer._Training._train_step

    def stopping(self: Any, *args: Any) -> None:
        real(self, *args)
        self.stop.requested = (self.epoch, self.step) == stop

    with monkeypatch.context() as context:
        context.setattr(trainer._Training, "_train_step", stopping)
        with pytest.raises(Stopped):
            trained(tmp_path / "parts", **changes)
    redan.train(tmp_path / "parts", tmp_path / "parts", resume=True, progress=False)
    for name in ("model-last.safetensors", "checkpoint/state.safetensors"):
        first, second = (load_file(folder / name) for folder in (tmp_path / "whole", tmp_path / "parts"))
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


UNKNOWN = "training images are known to none of dpls.sources"


def test_a_pre_run_with_other_images_gives_what_it_knows(pre_runs: list[Path], tmp_path: Path) -> None:
    dataset, pre = load_dataset("digits", None), pre_runs[0]
    base = load_recipe("pgd-at-digits", TINY | {"seed": 5, "dpls": {"sources": [str(pre)], "scale": 1.0}})
    with pytest.warns(UserWarning, match=UNKNOWN):
        targets = build_targets(base, dataset)
    assert isinstance(targets, DPLS)
    chosen, _ = positions(base, dataset)
    known = read_difficulty(pre, dataset)[chosen]
    assert 0 < known.isnan().sum() < len(chosen)  # another seed chooses others
    expected = torch.where(known.isnan(), known[~known.isnan()].mean(), known)
    torch.testing.assert_close(targets.difficulty(), expected)
    with pytest.warns(UserWarning, match=UNKNOWN):
        finished = trained(tmp_path / "second", **{"seed": 5, "dpls": {"sources": [str(pre)]}})
    plain = trained(tmp_path / "plain", seed=5, dpls=None)
    assert (finished / "model-last.safetensors").read_bytes() != (plain / "model-last.safetensors").read_bytes()
    # What was read at the beginning is kept: neither a resume nor an analysis needs the pre-run again.
    (kept,) = (v for k, v in load_file(finished / "checkpoint" / "state.safetensors").items() if "targets.known" in k)
    begun = build_targets(load_recipe(finished, {"dpls.sources": ["gone"]}), dataset, begun=True)
    assert isinstance(begun, DPLS)
    begun.load_state_dict({"known": kept, "total": torch.zeros(300), "seen": torch.zeros(300, dtype=torch.int32)})
    anew = DPLS(begun.config, torch.zeros(300, dtype=torch.int64), known=known)
    torch.testing.assert_close(begun.amounts(), anew.amounts())


def test_the_difficulties_of_several_pre_runs_are_averaged(pre_runs: list[Path]) -> None:
    dataset = load_dataset("digits", None)
    base = load_recipe("pgd-at-digits", TINY | {"seed": 5, "dpls": {"sources": [str(pre) for pre in pre_runs]}})
    with pytest.warns(UserWarning, match=UNKNOWN):
        targets = build_targets(base, dataset)
    assert isinstance(targets, DPLS)
    found = torch.stack([read_difficulty(pre, dataset) for pre in pre_runs])
    chosen, _ = positions(base, dataset)
    each = [[float(d) for d in column if not d.isnan()] for column in found.T[chosen]]
    assert {len(values) for values in each} == {0, 1, 2}  # each seed chose images of its own
    mean = [sum(values) / len(values) if values else np.nan for values in each]
    np.testing.assert_allclose(targets.difficulty(unknown=torch.nan), mean, rtol=1e-6)


def test_a_pre_run_may_have_measured_clean_images_for_a_method_that_sees_none(tmp_path: Path) -> None:
    clean = {"first": 0, "warmup": 2, "scale": 0.0, "difficulty": "clean-confidence"}
    pre = trained(tmp_path / "pre", **{"method": "trades", "epochs": 2, "dpls": clean})
    asked = {"epochs": 1, "dpls": {"difficulty": "clean-confidence", "sources": [str(pre)]}}
    state = load_file(pre / "checkpoint" / "state.safetensors")
    measured = state["method/targets.total"] / state["method/targets.seen"]
    finished = load_file(trained(tmp_path / "second", **asked) / "checkpoint" / "state.safetensors")
    assert torch.equal(finished["method/targets.known"], measured)


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
    few = load_recipe("pgd-at-digits", TINY | {"seed": 5, "dpls": {"sources": [str(run)]}})
    with pytest.raises(UserError, match=r"dpls.sources know \d+ of the 300 images"):
        build_targets(few, dataset)
    plain = trained(tmp_path / "plain", dpls=None, epochs=1)
    with pytest.raises(UserError, match="did not measure difficulty; train it with -o dpls.scale=0"):
        read_difficulty(plain, dataset)
