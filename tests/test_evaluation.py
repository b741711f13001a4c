"""The bracket's upper side: rows, accuracies made from rows, and what is refused."""

import itertools
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import redan
from redan.attacks import APGD, FAB, FGSM, PGD, Outcome, Square, TargetedAPGD
from redan.data.pipeline import to_float
from redan.data.registry import load_dataset
from redan.errors import UserError
from redan.evaluation import evaluate as module
from redan.evaluation.protocol import ATTACKS, WITH_OBJECTIVE, parse_protocol
from redan.evaluation.results import Accuracy, Evaluation
from redan.tensors import load_tensors
from redan.threats import L1, L2, Linf, parse_threat


@pytest.fixture(scope="module")
def copied(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained run, in a folder that evaluations may write into."""
    folder = tmp_path_factory.mktemp("evaluated")
    for name in ("recipe.yaml", "model.safetensors", "model-last.safetensors"):
        (folder / name).write_bytes((trained / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def result(copied: Path) -> Evaluation:
    return redan.evaluate(copied, samples=120, progress=False)


def test_accuracies_are_made_from_rows(result: Evaluation) -> None:
    rows = result.per_image
    assert [row.index for row in rows] == list(range(120))
    assert result.samples == 120
    assert result.clean_accuracy == sum(row.verdict != "misclassified" for row in rows) / 120
    assert result.robust_accuracy == sum(row.verdict == "unknown" for row in rows) / 120
    assert result.certified_accuracy is None
    assert result.model_calls == sum(row.model_calls for row in rows)
    standing = result.clean_accuracy
    for name, after in result.attacks.items():
        standing -= sum(row.by == name for row in rows) / 120
        assert after == pytest.approx(standing)
    assert list(result.attacks.values())[-1] == pytest.approx(result.robust_accuracy)
    assert 0 < result.robust_accuracy < result.clean_accuracy


def test_rows_agree_with_the_network(result: Evaluation, copied: Path) -> None:
    network, test = redan.load(copied), load_dataset("digits").test
    predictions = network(to_float(test.images[:120])).argmax(1).tolist()
    for row in result.per_image:
        assert (row.label, row.prediction) == (int(test.labels[row.index]), predictions[row.index])
        assert (row.verdict == "misclassified") == (row.label != row.prediction)
        assert (row.verdict == "falsified") == (row.by is not None) == (row.distance is not None)
        if row.distance is not None:
            assert 0 < row.distance <= 0.15 and row.adversarial_prediction != row.label
        assert row.model_calls >= 1


def test_the_gallery_holds_confirmed_adversarial_images(result: Evaluation, copied: Path) -> None:
    (file,) = (copied / "results").glob("pgd-20_cw+apgd-linf_0.15-120-best-seed0.safetensors")
    tensors, _ = load_tensors(file)
    images, adversarials = tensors["images"], tensors["adversarials"]
    assert len(images) == len(result.gallery) == 12
    assert Linf(0.15).contains(adversarials, images).all()
    predictions = redan.load(copied)(adversarials).argmax(1).tolist()
    assert predictions == [entry.adversarial_prediction for entry in result.gallery]
    assert all(entry.adversarial_prediction != entry.label for entry in result.gallery)


def test_the_file_holds_the_result(result: Evaluation, copied: Path) -> None:
    loaded = [Evaluation.load(path) for path in (copied / "results").glob("*.json")]
    assert result in loaded


def test_the_curve_falls_and_meets_both_accuracies(result: Evaluation) -> None:
    radii = [point.radius for point in result.curve]
    values = [point.accuracy.value for point in result.curve]
    assert radii == sorted(radii)
    assert radii[0] == 0
    assert values[0] == result.clean_accuracy
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert values[radii.index(0.15)] == result.robust_accuracy
    assert len(radii) == 7


def test_a_counterexample_that_only_the_curve_finds_counts(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(text: str, threat: Linf, *, classes: int, random: bool = False) -> dict[str, object]:
        return {
            "idle": types.SimpleNamespace(
                threat=threat, run=lambda _, x, y, draws: Outcome(x, torch.zeros_like(y)), cost=lambda _: 0
            )
        }

    monkeypatch.setattr(module, "parse_protocol", idle)
    found = redan.evaluate(copied, samples=60, progress=False)
    assert list(found.attacks) == ["idle", "curve"]
    assert found.attacks["idle"] == found.clean_accuracy
    assert found.robust_accuracy == found.attacks["curve"] < found.clean_accuracy
    assert all(0 < (row.distance or 1) <= 0.15 for row in found.per_image if row.by == "curve")
    alone = redan.evaluate(copied, samples=60, curve=False, progress=False)
    assert alone.robust_accuracy == alone.clean_accuracy


def test_same_seed_same_result_and_no_trace_of_time(copied: Path) -> None:
    first, second = (redan.evaluate(copied, samples=30, seed=3, progress=False) for _ in range(2))
    assert first.model_copy(update={"seconds": 0}) == second.model_copy(update={"seconds": 0})


def test_a_larger_radius_never_helps(copied: Path) -> None:
    robust = [
        redan.evaluate(copied, threat=f"linf:{r}", samples=60, curve=False, progress=False).robust.correct
        for r in (0.0, 0.05, 0.15, 0.4, 1.0)
    ]
    assert robust == sorted(robust, reverse=True)
    assert robust[-1] == 0  # in the whole box nothing is robust


class Quadrants(nn.Module):
    """Two classes by the sign of the mean pixel minus a half: its robust accuracy is known."""

    def forward(self, images: Tensor) -> Tensor:
        margin = images.flatten(1).mean(1) - 0.5
        return torch.stack([-margin, margin], 1)


@pytest.fixture
def stripes(tmp_path: Path) -> str:
    """Grey images of known brightness as a folder data set: 0.5 +- (10, 20, 30, 40)/255 around the middle."""
    from PIL import Image

    for split, (name, sign) in itertools.product(("train", "test"), (("dark", -1), ("light", 1))):
        for i, gap in enumerate((10, 20, 30, 40)):
            path = tmp_path / "set" / split / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (127 + sign * gap,) * 3).save(path)
    return f"folder:{tmp_path / 'set'}"


def test_a_network_whose_robust_accuracy_is_known(stripes: str) -> None:
    # An image of grey level 127 +- gap falls to Linf(25/255) exactly if its distance to 127.5 is less: gaps 10 and 20.
    found = redan.evaluate(Quadrants(), data=stripes, threat=Linf(25 / 255), curve=False, progress=False)
    assert found.clean_accuracy == 1
    assert found.robust_accuracy == 0.5
    assert {row.index % 4 for row in found.per_image if row.verdict == "falsified"} == {0, 1}


def test_functions_and_normalisation_are_taken(stripes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shifted = types.ModuleType("their_networks")
    # A network on normalised images (x - 0.5) / 0.25, exported without that layer.
    shifted.quadrants = lambda: nn.Sequential(Affine(0.25, 0.5), Quadrants())  # type: ignore[attr-defined]
    shifted.number = lambda: 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_networks", shifted)
    options = {"data": stripes, "threat": "linf:25/255", "curve": False, "progress": False}
    normalised = {"input_mean": [0.5], "input_std": [0.25]}
    found = redan.evaluate("their_networks:quadrants", **options, **normalised)  # type: ignore[arg-type]
    assert (found.clean_accuracy, found.robust_accuracy) == (1, 0.5)
    assert found.run == "their_networks:quadrants"
    for bad, message in (
        ("their_networks:missing", "cannot get a network"),
        ("no_such_module:f", "cannot get a network"),
        ("their_networks:number", "not a torch module"),
    ):
        with pytest.raises(UserError, match=message):
            redan.evaluate(bad, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="go together"):
        redan.evaluate("their_networks:quadrants", **options, input_mean=[0.5])  # type: ignore[arg-type]


class Affine(nn.Module):
    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def test_what_is_missing_is_asked_for(stripes: str) -> None:
    with pytest.raises(UserError, match="--data"):
        redan.evaluate(Quadrants(), threat="linf:0.1", progress=False)
    with pytest.raises(UserError, match="--threat"):
        redan.evaluate(Quadrants(), data=stripes, progress=False)
    with pytest.raises(UserError, match="10 classes"):
        redan.evaluate(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), data="digits", threat="linf:0.1", progress=False)
    with pytest.raises(UserError, match=r"cannot take images of shape \(1, 8, 8\)"):
        redan.evaluate(nn.Sequential(nn.Flatten(), nn.Linear(9, 10)), data="digits", threat="linf:0.1", progress=False)
    with pytest.raises(UserError, match="not finite"):
        redan.evaluate(
            nn.Sequential(nn.Flatten(), Affine(float("nan"), 0), nn.Linear(64, 10)),
            data="digits",
            threat="linf:0.1",
            progress=False,
        )


def test_an_attack_that_lies_is_not_believed(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images outside the threat, or that the network classifies correctly, never count as adversarial."""

    def lying(text: str, threat: Linf, *, classes: int, random: bool = False) -> dict[str, object]:
        outside = parse_protocol("pgd-20", Linf(0.9), classes=classes)["pgd-20"]
        return {"liar": types.SimpleNamespace(threat=threat, run=outside.run, cost=outside.cost)}

    monkeypatch.setattr(module, "parse_protocol", lying)
    found = redan.evaluate(copied, threat="linf:0.001", samples=40, curve=False, progress=False)
    assert found.robust_accuracy == found.clean_accuracy


def test_protocols_are_read() -> None:
    threat = L2(0.5)
    attacks = parse_protocol("fgsm+pgd-7:cw+apgd-20:dlr+pgd+apgd", threat, classes=10)
    assert list(attacks) == ["fgsm", "pgd-7:cw", "apgd-20:dlr", "pgd", "apgd"]
    fgsm, pgd, apgd, default_pgd, default_apgd = attacks.values()
    assert isinstance(fgsm, FGSM)
    assert isinstance(pgd, PGD) and (pgd.steps, pgd.objective.name, pgd.threat) == (7, "cw", threat)
    assert isinstance(apgd, APGD) and (apgd.steps, apgd.objective.name) == (20, "dlr")
    assert isinstance(default_pgd, PGD) and default_pgd.steps == 20
    assert isinstance(default_apgd, APGD) and default_apgd.steps == 100
    for bad in (
        "pdg",
        "pgd-",
        "pgd-0",
        "pgd:cx",
        "fgsm-3",
        "",
        "pgd++apgd",
        "pgd+pgd",
        "square:ce",
        "autoattack+pgd",
        "rotation-grid-3",
        "stadv",
        "rotation-grid",
    ):
        with pytest.raises(UserError) as error:
            parse_protocol(bad, threat, classes=10)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*ATTACKS, *WITH_OBJECTIVE])
def test_every_attack_has_a_name_that_takes_its_steps(name: str) -> None:
    threat = {"stadv": "stadv:0.05", "rotation-grid": "rotation:30+3", "rotation-random": "rotation:30+3"}.get(
        name, "l2:0.5"
    )
    (usual,) = parse_protocol(name, parse_threat(threat), classes=10).values()
    if name in ("fgsm", "rotation-grid"):
        return
    (other,) = parse_protocol(f"{name}-7", parse_threat(threat), classes=10).values()
    counts = {getattr(other, field, None) for field in ("steps", "queries", "tries")}
    assert 7 in counts and usual != other and type(usual) is type(other)


@pytest.mark.parametrize("threat", ["stadv:0.05", "rotation:30+1"])
def test_threats_without_a_norm_are_evaluated_by_attacks_of_their_own(copied: Path, threat: str) -> None:
    found = redan.evaluate(copied, threat=threat, samples=60, progress=False)
    assert found.threat == threat and found.attack == {"s": "stadv", "r": "rotation-grid"}[threat[0]]
    assert found.robust_accuracy < found.clean_accuracy
    assert found.curve == ()
    assert {row.distance for row in found.per_image} == {None}
    assert found.robust.correct == sum(row.verdict == "unknown" for row in found.per_image)


def test_autoattack_is_the_published_one() -> None:
    """Figures of Croce & Hein (ICML 2020; L1: ICML 2021)."""
    standard = parse_protocol("autoattack", Linf(0.03), classes=10)
    assert list(standard) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    ce, towards, fab, square = standard.values()
    assert isinstance(ce, APGD) and (ce.steps, ce.objective.name, ce.restarts) == (100, "ce", 1)
    assert isinstance(towards, TargetedAPGD)
    assert (towards.steps, towards.objective.name, towards.targets) == (100, "dlr-t", 9)
    assert isinstance(fab, FAB) and (fab.steps, fab.targets, fab.restarts) == (100, 9, 1)
    assert isinstance(square, Square) and square.queries == 5000
    ce, towards, *_ = parse_protocol("autoattack", L1(12), classes=10).values()
    assert isinstance(ce, APGD) and ce.restarts == 5
    assert isinstance(towards, TargetedAPGD) and towards.targets == 5
    plus = parse_protocol("autoattack-plus", L2(0.5), classes=10)
    assert list(plus) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert isinstance(plus["fab"], FAB) and (plus["fab"].targets, plus["fab"].restarts) == (None, 5)
    assert list(parse_protocol("autoattack", Linf(0.03), classes=10, random=True)) == ["apgd-ce", "apgd-dlr"]


@pytest.mark.parametrize(
    ("classes", "untargeted", "targeted"), [(2, "cw", "cw-t"), (3, "dlr", "cw-t"), (8, "dlr", "dlr-t")]
)
def test_few_classes_take_the_margin(classes: int, untargeted: str, targeted: str) -> None:
    parts = parse_protocol("autoattack-plus", Linf(0.03), classes=classes)
    apgd, towards = parts["apgd-dlr"], parts["apgd-t"]
    assert isinstance(apgd, APGD) and apgd.objective.name == untargeted
    assert isinstance(towards, TargetedAPGD) and towards.objective.name == targeted


@given(st.integers(1, 300), st.data())
def test_intervals_are_clopper_and_pearsons(samples: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, samples))
    accuracy = Accuracy.of(correct, samples)
    assert accuracy.low <= accuracy.value <= accuracy.high
    from scipy.stats import beta

    low = 0.0 if correct == 0 else beta.ppf(0.025, correct, samples - correct + 1)
    high = 1.0 if correct == samples else beta.ppf(0.975, correct + 1, samples - correct)
    assert accuracy.low == pytest.approx(low, abs=1e-9)
    assert accuracy.high == pytest.approx(high, abs=1e-9)


def test_files_that_are_not_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"samples": 3}))
    with pytest.raises(UserError, match="is not an evaluation"):
        Evaluation.load(tmp_path / "x.json")
    with pytest.raises(UserError, match="is not an evaluation"):
        Evaluation.load(tmp_path / "missing.json")
