"""Diagnostics: what masks its gradient is called out by the check that is meant for it, and nothing else is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import redan
from redan.cli import app
from redan.data.pipeline import to_float
from redan.data.registry import load_dataset
from redan.errors import UserError
from redan.evaluation import diagnose as module
from redan.evaluation.diagnose import diagnose, tolerated
from redan.evaluation.results import Check, Evaluation
from redan.spatial import Flow
from redan.threats import L1, L2, Linf, Threat
from redan.training.trainer import train

ALL = (
    "repeat",
    "radius",
    "steps",
    "cross-entropy",
    "zero gradient",
    "direction",
    "one step",
    "black box",
    "transfer",
    "training mode",
)


@pytest.fixture(scope="module")
def robust(trained: Path) -> nn.Module:
    return redan.load(trained)


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    overrides = {"epochs": 12, "validation.every": 4, "optimizer.lr": 0.1}
    out = tmp_path_factory.mktemp("runs") / "plain"
    return redan.load(train("standard-digits", out, overrides=overrides, progress=False))


def examined(
    network: nn.Module, threat: Threat, count: int = 40, transfer: nn.Module | None = None
) -> dict[str, Check]:
    test = load_dataset("digits").test
    checks = diagnose(network.eval(), to_float(test.images[:count]), test.labels[:count], threat, transfer=transfer)
    return {check.name: check for check in checks}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.passed is False}


@pytest.mark.parametrize("threat", [Linf(0.15), L2(0.5)], ids=str)
@pytest.mark.parametrize("kind", ["standard", "robust"])
def test_plain_networks_pass(kind: str, threat: Threat, standard: nn.Module, robust: nn.Module) -> None:
    network, other = (standard, robust) if kind == "standard" else (robust, standard)
    checks = examined(network, threat, transfer=other)
    assert tuple(checks) == ALL
    assert failed(checks) == set()
    assert checks["transfer"].passed
    assert checks["training mode"].passed is None  # without BatchNorm and dropout there is one mode
    radius = checks["radius"].values
    assert next(iter(radius.values())) == 1  # at 0 nothing happens
    assert list(radius.values())[-1] == 0  # in the whole box nothing stands


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Linf(0.15), L2(0.5), L1(3.0)], ids=str)
@pytest.mark.parametrize("kind", ["standard", "robust"])
def test_plain_networks_pass_at_full_length(kind: str, threat: Threat, standard: nn.Module, robust: nn.Module) -> None:
    assert failed(examined(standard if kind == "standard" else robust, threat, 360)) == set()


class Before(nn.Module):
    """A network behind a change of its images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def change(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.change(images))
        return logits


class Quantised(Before):
    """Nine grey levels; rounding has a gradient of zero."""

    def change(self, images: Tensor) -> Tensor:
        return (images * 8).round() / 8


class Threshold(Before):
    """Black or white; a comparison has no gradient at all."""

    def change(self, images: Tensor) -> Tensor:
        return (images > 0.5).float()


class Shattered(Before):
    """A ripple that hardly moves a pixel and turns its gradient about."""

    def change(self, images: Tensor) -> Tensor:
        return images + 0.02 * torch.sin(300 * images)


class DropoutLeftOn(Before):
    def change(self, images: Tensor) -> Tensor:
        return F.dropout(images, 0.1, training=True)


class QuantisedWhenEvaluated(Before):
    def change(self, images: Tensor) -> Tensor:
        return images if self.training else (images * 8).round() / 8


class Scaled(nn.Module):
    """Logits times ten thousand: the same predictions, saturated."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return 1e4 * logits


class Centred(nn.Module):
    """Logits minus their mean over the batch, so that an image's verdict depends on its neighbours."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits - logits.mean(0)


@pytest.mark.parametrize(
    ("masked", "threat"),
    [(Quantised, Linf(0.15)), (Quantised, L2(0.5)), (Threshold, Linf(0.15))],
    ids=["rounding-linf", "rounding-l2", "threshold-linf"],
)
def test_steps_are_called_out_by_zero_gradient_radius_direction_black_box_and_transfer(
    masked: type[Before], threat: Threat, robust: nn.Module
) -> None:
    checks = examined(masked(robust), threat, transfer=robust)
    assert failed(checks) >= {"zero gradient", "radius", "direction", "black box"}
    assert masked is Threshold or checks["transfer"].passed is False  # its own gradient, by way of the open network
    assert checks["repeat"].passed  # it is deterministic all the same
    assert checks["zero gradient"].values["images"] == int(checks["zero gradient"].figure.split()[-2])  # all of them
    assert list(checks["radius"].values.values())[-1] > 0.1  # in the whole box something stands


@pytest.mark.parametrize("threat", [Linf(0.15), L2(0.5)], ids=str)
def test_huge_logits_are_called_out_by_cross_entropy_and_zero_gradient(threat: Threat, robust: nn.Module) -> None:
    checks = examined(Scaled(robust), threat)
    assert failed(checks) == {"cross-entropy", "zero gradient"}  # the margin leads the attack as before
    assert checks["cross-entropy"].values["cross-entropy"] > 0.9 > checks["cross-entropy"].values["margin"]


@pytest.mark.parametrize("masked", [DropoutLeftOn, Centred])
def test_dropout_left_on_and_mixed_batches_are_called_out_by_repeat(
    masked: type[DropoutLeftOn | Centred], robust: nn.Module
) -> None:
    checks = examined(masked(robust), Linf(0.15))
    assert tuple(checks) == ("repeat",)  # nothing else would mean anything
    assert checks["repeat"].passed is False
    assert "dropout" in checks["repeat"].figure


def test_shattered_gradients_are_called_out_by_steps_and_direction(robust: nn.Module) -> None:
    assert failed(examined(Shattered(robust), Linf(0.15), 100)) >= {"steps", "direction", "black box"}


def test_what_masks_in_evaluation_mode_alone_is_called_out_by_training_mode(robust: nn.Module) -> None:
    checks = examined(QuantisedWhenEvaluated(robust), Linf(0.15))
    assert checks["training mode"].passed is False
    assert "% are right in training mode" in checks["training mode"].figure


def test_batch_norm_has_two_modes_and_passes() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(512, 10)
    )
    images, labels = to_float(load_dataset("digits").train.images), load_dataset("digits").train.labels
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for part in [*torch.arange(len(labels)).split(100)] * 4:
        optimizer.zero_grad()
        F.cross_entropy(network(images[part]), labels[part]).backward()
        optimizer.step()
    before = {name: tensor.clone() for name, tensor in network.eval().state_dict().items()}
    checks = examined(network, Linf(0.05))
    assert failed(checks) == set()
    assert checks["training mode"].passed
    assert not network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_one_step_that_beats_many_is_called_out(robust: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """PGD that cannot move, as a bug would have it: FGSM and Square find what it leaves."""
    monkeypatch.setattr(module, "PGD", lambda threat, **options: FrozenAttack(threat))
    monkeypatch.setattr(module, "APGD", lambda threat: FrozenAttack(threat))
    assert failed(examined(robust, Linf(0.15))) >= {"radius", "one step", "black box"}


class FrozenAttack:
    def __init__(self, threat: Threat) -> None:
        self.threat = threat

    def cost(self, classes: int) -> int:
        return 1

    def run(self, search: object, images: Tensor, labels: Tensor, generator: object) -> object:
        from redan.attacks import Outcome

        return Outcome(images, torch.zeros_like(labels))


def test_what_is_tolerated_is_binomial() -> None:
    draws = np.random.default_rng(0).binomial(200, 0.02, 200_000)
    most = tolerated(200, 0.02)
    assert most == 9
    assert (draws > most).mean() < 0.01 <= (draws > most - 1).mean()
    for n in (1, 10, 1000):
        for share in (0.01, 0.1):
            most = tolerated(n, share)
            assert binom.sf(most, n, share) <= 0.01 < binom.sf(most - 1, n, share)


def test_little_to_diagnose_and_what_is_refused(robust: nn.Module) -> None:
    images, labels = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    wrong = (robust(images).argmax(1) + 1) % 10
    assert diagnose(robust, images, wrong, Linf(0.1)) == ()
    with pytest.raises(UserError, match="--diagnose needs a threat of a radius above 0, got linf:0"):
        diagnose(robust, images, labels, Linf(0.0))
    with pytest.raises(UserError, match="--diagnose needs an Lp threat"):
        diagnose(robust, images, labels, Flow(0.05))
    with pytest.raises(UserError, match="gives 3 logits, the evaluated one 10"):
        diagnose(robust, images, labels, Linf(0.1), transfer=nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    with pytest.raises(UserError, match=r"--transfer network cannot take images of shape \(1, 8, 8\)"):
        diagnose(robust, images, labels, Linf(0.1), transfer=nn.Sequential(nn.Flatten(), nn.Linear(63, 10)))


def test_evaluate_keeps_the_checks(trained: Path, robust: nn.Module, tmp_path: Path) -> None:
    result = redan.evaluate(
        trained, samples=20, attack="fgsm", curve=False, diagnose=True, transfer=robust, out=tmp_path, progress=False
    )
    assert tuple(check.name for check in result.diagnostics) == ALL
    right = [row.index for row in result.per_image if row.prediction == row.label]
    test = load_dataset("digits").test
    images, labels = to_float(test.images[right]), test.labels[right]
    assert diagnose(robust, images, labels, Linf(0.15), transfer=robust) == result.diagnostics  # same seed, same checks
    (file,) = tmp_path.glob("*.json")
    assert Evaluation.load(file) == result
    assert redan.evaluate(trained, samples=20, attack="fgsm", out=tmp_path, progress=False).diagnostics == ()
    with pytest.raises(UserError, match="--transfer is for --diagnose"):
        redan.evaluate(trained, samples=20, transfer=trained, out=tmp_path, progress=False)


def test_the_command_line_prints_checks_and_a_word_on_those_that_fail(
    trained: Path, robust: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["--data", "digits", "--samples", "20", "--attack", "fgsm", "--no-curve", "--diagnose"]
    settings += ["--threat", "linf:0.15", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["evaluate", str(trained), *settings, "--transfer", str(trained)])
    assert done.exit_code == 0, done.stderr
    assert all(f"pass {name}" in done.stdout for name in ALL[:-1])
    assert "not to be trusted" not in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80

    monkeypatch.setattr("redan.demonstration.masked", lambda: Scaled(robust), raising=False)
    done = CliRunner().invoke(app, ["evaluate", "redan.demonstration:masked", *settings, "--json"])
    assert done.exit_code == 0
    checks = {check["name"]: check["passed"] for check in json.loads(done.stdout)["diagnostics"]}
    assert checks["zero gradient"] is False
    count = list(checks.values()).count(False)
    assert f"redan: {count} check{'s' * (count > 1)} failed: this robust accuracy is not to be trusted\n" in done.stderr
