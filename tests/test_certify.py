"""``redan certify``: verdicts on real images, whatever the batch, the shard or a stop in between; and the bracket."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import redan
from redan.certification.onnx_files import write_onnx
from redan.certification.reading import read_network
from redan.certification.regions import Region, Specification
from redan.certification.verifier import METHODS, Robustness, Verifier
from redan.certification.vnnlib import read_counterexample, write_vnnlib
from redan.cli import app
from redan.data.pipeline import to_float
from redan.data.registry import load_dataset
from redan.errors import Stopped, UserError
from redan.evaluation import certify as module
from redan.evaluation.bracket import VERIFIER, Contradiction, bracket
from redan.evaluation.results import Certificates, Evaluation
from redan.models.convnet import conv_med
from redan.models.norms import Normalise
from redan.tensors import load_tensors
from redan.threats import Linf

SMALL = "linf:0.03"


def certified(run: Path, out: Path, **options: Any) -> Certificates:
    # No stage that a clock ends: the machine's load must not change a verdict.
    chosen: dict[str, Any] = {"threat": SMALL, "method": "alpha-crown", "samples": 30}
    chosen |= {"curve": False, "progress": False}
    return redan.certify(run, out=out, **chosen | options)


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certified(trained, tmp_path_factory.mktemp("certificates"), curve=True)


def verdicts(result: Certificates) -> list[tuple[int, str, str | None]]:
    return [(row.index, row.verdict, row.by) for row in result.per_image]


def test_some_images_are_certified_and_counts_add_up(whole: Certificates) -> None:
    assert whole.certified >= 10
    assert (
        whole.certified + whole.falsified + whole.unknown + whole.misclassified == whole.images == whole.samples == 30
    )
    assert whole.certified_accuracy == whole.proved.value == whole.certified / 30
    assert whole.standing.correct == 30 - whole.falsified - whole.misclassified
    assert all(row.margin is not None and row.margin >= 0 for row in whole.per_image if row.verdict == "certified")


def test_curve_falls_from_the_clean_accuracy_to_the_certified(whole: Certificates) -> None:
    counts = [point.accuracy.correct for point in whole.curve]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (whole.clean.correct, whole.certified)
    assert [point.radius for point in whole.curve] == pytest.approx([0, 0.0075, 0.015, 0.0225, 0.03])


def test_certified_images_stand_at_every_corner_that_is_tried(trained: Path, whole: Certificates) -> None:
    network, test = redan.load(trained), load_dataset("digits").test
    draws = torch.Generator().manual_seed(0)
    for row in [row for row in whole.per_image if row.verdict == "certified"][:5]:
        corners = torch.rand(500, 1, 8, 8, generator=draws).round() * 2 - 1
        images = (to_float(test.images[row.index]) + 0.03 * corners).clamp(0, 1)
        with torch.no_grad():
            assert (network(images).argmax(1) == row.label).all()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_verdicts_do_not_depend_on_the_batch(
    trained: Path, whole: Certificates, tmp_path: Path, batch_size: int
) -> None:
    assert verdicts(certified(trained, tmp_path, batch_size=batch_size)) == verdicts(whole)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """18 ReLUs behind the digits' pixels, trained in noise: few enough for every search to end."""
    train = load_dataset("digits").train
    images, draws = to_float(train.images), torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = ((64, 10), (10, 8), (8, 10))
        first, *rest = (nn.Linear(*it) for it in sizes)
    network = nn.Sequential(nn.Flatten(), first, *(it for layer in rest for it in (nn.ReLU(), layer)))
    optimiser = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(100):
        noise = 0.1 * torch.randn(images.shape, generator=draws).sign()
        optimiser.zero_grad()
        F.cross_entropy(network(images + noise), train.labels).backward()
        optimiser.step()
    return network.eval()


def of_small(small: nn.Module, method: str, batch_size: int) -> tuple[list[Any], list[float | None]]:
    """Verdicts and margins; images 15 and 16 are decided by branch and bound, if at all."""
    result = redan.certify(
        small,
        threat="linf:0.1",
        data="digits",
        method=method,
        samples=17,
        timeout=1000,
        curve=False,
        batch_size=batch_size,
        progress=False,
    )
    return verdicts(result), [row.margin for row in result.per_image]


def near(margins: list[float | None], tolerance: float) -> list[Any]:
    return [it if it is None else pytest.approx(it, abs=tolerance) for it in margins]


# Of margins, by rounding in another order. The slopes of zonotopes are learned in hundreds of steps, which enlarge it.
TOLERANCES = {"crown": 1e-5, "learned-zonotope": 0.02, "alpha-crown": 1e-5, "cascade": 1e-5}


@pytest.mark.parametrize(("method", "tolerance"), TOLERANCES.items())
def test_no_method_depends_on_the_batch(small: nn.Module, method: str, tolerance: float) -> None:
    expected, margins = of_small(small, method, 17)
    assert {"cascade": "branch-and-bound"}.get(method, method) in {by for _, _, by in expected}
    for batch_size in (1, 7):
        found, close = of_small(small, method, batch_size)
        assert found == expected
        assert close == near(margins, tolerance)


@pytest.fixture
def use_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "method", [it if it == "crown" else pytest.param(it, marks=pytest.mark.slow) for it in TOLERANCES]
)
def test_verdicts_do_not_depend_on_threads(small: nn.Module, use_threads: Callable[[int], None], method: str) -> None:
    use_threads(1)
    expected, margins = of_small(small, method, 17)
    use_threads(2)
    found, close = of_small(small, method, 17)
    assert found == expected
    assert close == near(margins, TOLERANCES[method])


def test_shards_join_to_the_whole(trained: Path, whole: Certificates, tmp_path: Path) -> None:
    parts = [certified(trained, tmp_path, shard=f"{i}/3", curve=True) for i in (1, 2, 3)]
    assert [part.images for part in parts] == [10, 10, 10]
    joined = Certificates.join(parts)
    assert verdicts(joined) == verdicts(whole)
    assert joined.curve == whole.curve
    assert joined.proved == whole.proved
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_stopped_certification_goes_on_where_it_was(
    trained: Path, whole: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    original = module._Work._batch

    def stops(self: Any, places: Tensor) -> None:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(places.tolist())
        original(self, places)

    monkeypatch.setattr(module._Work, "_batch", stops)
    with pytest.raises(Stopped, match="--resume"):
        certified(trained, tmp_path, batch_size=8)
    monkeypatch.undo()
    with pytest.raises(UserError, match="unfinished"):
        certified(trained, tmp_path, batch_size=8)
    seen: list[list[int]] = []

    def listens(self: Any, places: Tensor) -> None:
        seen.append(places.tolist())
        original(self, places)

    monkeypatch.setattr(module._Work, "_batch", listens)
    assert verdicts(certified(trained, tmp_path, resume=True)) == verdicts(whole)
    assert sorted(i for places in seen for i in places) == list(range(16, 30))


# A run's network by a name that a command line can give; where told to, its process dies once a piece is on disk.
MORTAL = """
import os
import signal

import redan
from redan.evaluation.journal import Journal


def network():
    write = Journal.write

    def last(*piece):
        write(*piece)
        os.kill(os.getpid(), signal.SIGKILL)

    if "DIES" in os.environ:
        Journal.write = last
    return redan.load(os.environ["RUN"])
"""


def test_killed_certification_goes_on_where_it_was(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mortal.py").write_text(MORTAL)
    arguments = ["certify", "mortal:network", "--data", "digits", "--threat", SMALL, "--method", "crown"]
    arguments += ["--samples", "20", "--batch-size", "8", "--no-curve", "--out", str(tmp_path / "out"), "--json"]
    environment = os.environ | {"RUN": str(trained), "DIES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "redan", *arguments]
    killed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (path,) = (tmp_path / "out").rglob("rows@*.safetensors")
    piece, _ = load_tensors(path)
    assert not list((tmp_path / "out").glob("*.json"))

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("RUN", str(trained))
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2 and "unfinished" in refused.stderr
    resumed = CliRunner().invoke(app, [*arguments, "--resume"])
    assert resumed.exit_code == 0, resumed.stderr
    (kept,) = (tmp_path / "out").glob("*.json")
    assert not path.parent.exists()
    document = Certificates.load(kept)
    assert document == Certificates.model_validate_json(resumed.stdout)
    whole = certified(trained, tmp_path / "whole", method="crown", samples=20, batch_size=8)
    assert [row.model_copy(update={"seconds": 0.0}) for row in document.per_image] == [
        row.model_copy(update={"seconds": 0.0}) for row in whole.per_image
    ]
    # What was on disk is what stands in the result: it was not computed again.
    places = piece["places"].tolist()
    assert 0 < len(places) < 20
    assert [document.per_image[i].seconds for i in places] == [round(it, 4) for it in piece["seconds"].tolist()]


def test_falsified_images_come_with_what_refutes_them(trained: Path, tmp_path: Path) -> None:
    result = certified(trained, tmp_path, threat="linf:0.3", method="crown")
    assert result.falsified > 5
    tensors, _ = load_tensors(next(tmp_path.glob("*.safetensors")))
    fallen = [row.index for row in result.per_image if row.verdict == "falsified"]
    assert tensors["indices"].tolist() == fallen
    clean, found = to_float(load_dataset("digits").test.images[fallen]), tensors["counterexamples"]
    assert Linf(0.3).contains(found, clean).all()
    with torch.no_grad():
        predictions = redan.load(trained)(found).argmax(1)
    assert (predictions != load_dataset("digits").test.labels[fallen]).all()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_each_method_settles_some_and_contradicts_none(
    trained: Path, whole: Certificates, tmp_path: Path, method: str
) -> None:
    weak = method in ("interval", "crown-ibp")
    threat = "linf:0.002" if weak else SMALL
    result = certified(trained, tmp_path, method=method, threat=threat, samples=8, timeout=5)
    assert result.certified
    if weak:
        return
    for mine, other in zip(result.per_image, whole.per_image, strict=False):
        assert {mine.verdict, other.verdict} != {"certified", "falsified"}


def test_rounding_of_the_network_costs_margin_and_never_gives_any(trained: Path, tmp_path: Path) -> None:
    margins = {}
    for mode in ("off", "exact", "network"):
        result = certified(trained, tmp_path, sound_float=mode, method="crown", samples=8)
        margins[mode] = [row.margin or 0.0 for row in result.per_image]
    for off, exact, network in zip(margins["off"], margins["exact"], margins["network"], strict=True):
        assert network <= exact <= off
    assert margins["network"] != margins["off"]


def test_bracket_on_the_same_images(trained: Path, tmp_path: Path) -> None:
    result = redan.evaluate(
        trained,
        threat=SMALL,
        attack="pgd-10",
        samples=10,
        certify=True,
        timeout=2,
        out=tmp_path,
        progress=False,
    )
    assert result.certified is not None and result.certified_accuracy is not None
    assert 0 < result.certified_accuracy <= result.robust_accuracy <= result.clean_accuracy
    assert Counter(row.verdict for row in result.per_image)["certified"] == result.certified.correct
    assert [point.accuracy.correct for point in result.certified_curve][-1] == result.certified.correct
    assert Evaluation.load(next(tmp_path.glob("*.json"))) == result


def test_bracket_from_the_command_line(trained: Path, whole: Certificates, tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        base = (trained, "--threat", SMALL, "--attack", "fgsm", "--samples", 10, "--no-curve", "--timeout", 2)
        return CliRunner().invoke(app, ["evaluate", *map(str, (*base, *arguments))])

    done = run("--certify", "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert 0 < document["certified_accuracy"] <= document["robust_accuracy"] <= document["clean_accuracy"]
    proved = [row["index"] for row in document["per_image"] if row["verdict"] == "certified"]
    assert len(proved) == document["certified"]["correct"]
    assert {row.index for row in whole.per_image[:10] if row.verdict == "certified"} <= set(proved)
    shown = run("--certify", "--out", tmp_path / "shown")
    assert shown.exit_code == 0 and "certified [95 %]" in shown.stdout
    assert shown.stdout.count("certificates hold for the network with its float32 weights") == 1
    plain = run("--out", tmp_path / "plain")
    assert plain.exit_code == 0 and "certified" not in plain.stdout


def test_bracket_refuses_a_contradiction_and_counts_what_only_the_verifier_broke(
    trained: Path, whole: Certificates, tmp_path: Path
) -> None:
    attacked = redan.evaluate(
        trained, threat=SMALL, attack="fgsm", samples=30, curve=False, out=tmp_path, progress=False
    )
    k = next(row.index for row in whole.per_image if row.verdict == "certified")
    rows = [
        row.model_copy(update={"verdict": "falsified", "by": "fgsm"}) if row.index == k else row
        for row in attacked.per_image
    ]
    with pytest.raises(Contradiction, match=f"image {k} "):
        bracket(attacked.model_copy(update={"per_image": tuple(rows)}), whole)
    proofs = [
        row.model_copy(update={"verdict": "falsified", "by": "milp"}) if row.index == k else row
        for row in whole.per_image
    ]
    result = bracket(attacked, whole.model_copy(update={"per_image": tuple(proofs)}))
    assert result.robust.correct == attacked.robust.correct - 1
    assert result.attacks[VERIFIER] == result.robust_accuracy
    assert result.per_image[k].by == VERIFIER


def counting() -> nn.Module:
    """Two classes by the sum of the pixels, above 16 or not: everything about it can be said exactly."""
    last = nn.Linear(64, 2)
    with torch.no_grad():
        last.weight.copy_(torch.stack([torch.ones(64), -torch.ones(64)]))
        last.bias.copy_(torch.tensor([0.0, 32.0]))
    return nn.Sequential(nn.Flatten(), last)


def test_closed_form_margin_decides() -> None:
    # Label 0 as long as the sum is above 16: 64 pixels by 0.1 each take 6.4 off.
    images = torch.stack([torch.full((1, 8, 8), 0.36), torch.full((1, 8, 8), 0.34)])
    labels = torch.zeros(2, dtype=torch.int64)
    network = read_network(counting(), (1, 8, 8))
    for radius, expected in ((0.1, ["certified", "falsified"]), (0.05, ["certified", "certified"])):
        question = Robustness(counting(), images, labels, torch.arange(2), Linf(radius), classes=2, seed=0)
        found = Verifier("crown")(network, question)
        assert [it.outcome for it in found] == expected
        assert found[0].margin == pytest.approx(2 * (64 * (0.36 - radius) - 16), abs=1e-3)


def test_command_line_and_mistakes(trained: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["certify", *map(str, arguments)])

    base = (trained, "--threat", SMALL, "--samples", 5, "--method", "crown", "--out", tmp_path)
    done = run(*base, "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    needed = {"samples", "threat", "certified", "falsified", "unknown", "misclassified", "seconds", "per_image"}
    assert needed <= document.keys()
    assert {"index", "label", "verdict", "by", "seconds"} <= document["per_image"][0].keys()
    shown = run(*base)
    assert "certified" in shown.stdout and "crown" in shown.stdout
    assert "certificates hold for the network with its float32 weights in exact arithmetic" in shown.stdout
    assert "rounding is not covered" in run(*base, "--sound-float", "off").stdout
    assert run(*base, "--fail-under", "1.1").exit_code == 1
    for arguments, message in (
        (("--method", "crowm"), "did you mean 'crown'"),
        (("--shard", "3/2"), "--shard is i/n"),
        (("--timeout", "0"), "--timeout"),
        (("--sound-float", "exakt"), "did you mean 'exact'"),
        (("--threat", "stadv:0.05"), "Lp threat"),
        (("--samples", "0"), "--samples is between"),
        (("--batch-size", "0"), "--batch-size"),
        (("--counterexample", "x"), "--vnnlib"),
        (("--resume",), "no unfinished"),
    ):
        failed = run(*base, *arguments)
        assert failed.exit_code == 2, arguments
        assert message in failed.stderr and failed.stderr.count("\n") == 1, failed.stderr


@pytest.mark.parametrize(("grey", "word"), [(0.36, "holds"), (0.34, "violated")])
def test_a_property_from_the_command_line(tmp_path: Path, grey: float, word: str) -> None:
    images, labels = torch.full((1, 1, 8, 8), grey), torch.zeros(1, dtype=torch.int64)
    network, said, sat = (tmp_path / name for name in ("network.onnx", "image.vnnlib", "counterexample.txt"))
    write_onnx(read_network(counting(), (1, 8, 8)), network)
    write_vnnlib(said, Region.around(images, Linf(0.1)), Specification.robust(labels, 2), 0)

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["certify", *map(str, (network, "--vnnlib", said, *arguments))])

    done = run("--method", "crown", "--counterexample", sat, "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    by = {"holds": "crown", "violated": "pgd"}[word]
    assert document | {"seconds": 0} == {
        "network": str(network),
        "property": str(said),
        "verdict": word,
        "by": by,
        "seconds": 0,
    }
    assert sat.exists() == (word == "violated")
    if word == "violated":
        inputs, outputs = read_counterexample(sat)
        assert ((inputs - grey).abs() <= 0.1 + 1e-6).all() and inputs.sum() <= 16
        assert outputs.tolist() == pytest.approx([inputs.sum().item(), 32 - inputs.sum().item()], abs=1e-4)
    assert run().stdout.startswith(f"{word} by ")
    for arguments in (("--samples", 5), ("--threat", SMALL)):
        failed = run(*arguments)
        assert failed.exit_code == 2 and failed.stderr.count("\n") == 1
        assert "leave out what is about test images" in failed.stderr


@pytest.mark.parametrize(("threat", "word"), [("linf:0.03", "holds"), ("linf:0.3", "violated")])
def test_properties_go_out_and_come_back_decided_alike(trained: Path, tmp_path: Path, threat: str, word: str) -> None:
    own = certified(trained, tmp_path / "own", threat=threat, method="crown", samples=6)
    network = redan.export(trained, tmp_path / "vnn", threat=threat, samples=6)
    listed = [line.split(",") for line in (tmp_path / "vnn" / "instances.csv").read_text().splitlines()]
    rows = [row for row in own.per_image if row.verdict != "misclassified"]
    assert [it[1] for it in listed] == [f"image-{row.index}.vnnlib" for row in rows]
    settled = {"holds": "certified", "violated": "falsified"}[word]
    assert sum(row.verdict == settled for row in rows) >= 2
    session = onnxruntime.InferenceSession(str(network))
    for row, (_, name, _) in zip(rows, listed, strict=True):
        if row.verdict != settled:
            continue
        sat = tmp_path / "counterexample.txt"
        decision = redan.decide(network, tmp_path / "vnn" / name, method="crown", counterexample=sat)
        assert decision.verdict == word
        if word == "violated":
            inputs, outputs = read_counterexample(sat)
            image = inputs.float().view(1, 1, 8, 8)
            (said,) = session.run(None, {"images": image.numpy()})
            assert int(said.argmax()) != row.label
            assert outputs.tolist() == pytest.approx(said[0].tolist(), abs=1e-4)
            clean = to_float(load_dataset("digits").test.images[row.index])
            assert float((image[0].double() - clean.double()).abs().max()) <= 0.3 + 1e-12


@pytest.mark.slow
def test_every_one_of_the_first_images_of_colt_is_certified(tmp_path: Path) -> None:
    folder, data = os.environ.get("REDAN_ORACLES"), os.environ.get("REDAN_DATA")
    if folder is None or data is None or not (Path(data) / "MNIST").exists():
        pytest.skip("REDAN_ORACLES and REDAN_DATA name no folders with the network and mnist")
    model = conv_med(Normalise([0.1307], [0.3081]), in_channels=1, size=28, classes=10, w1=2, w2=2, hidden=100)
    state = torch.load(Path(folder) / "colt_mnist_0.1.pt", weights_only=True, map_location="cpu")
    weights = [v for k, v in state.items() if "lambda" not in k]
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    result = redan.certify(
        model, threat="linf:0.1", data="mnist", data_dir=data, samples=100, timeout=300, out=tmp_path, progress=False
    )
    assert (result.certified, result.misclassified) == (100, 0)
