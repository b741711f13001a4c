"""Evaluations that are interrupted, short of memory, or asked for their images."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import redan
from redan.attacks import PGD, Outcome, SearchModel
from redan.data.pipeline import to_float
from redan.data.registry import load_dataset
from redan.errors import Stopped, UserError
from redan.evaluation import protocol
from redan.evaluation.journal import Journal
from redan.evaluation.kept import fingerprint
from redan.evaluation.results import Evaluation
from redan.models.norms import Normalise
from redan.tensors import load_tensors
from redan.threats import Linf, parse_threat

PROTOCOL = "fgsm+pgd-5+apgd-5"


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redan.evaluation.survey.BATCH", {"cpu": 20})


def evaluate(run: Path, **options: object) -> Evaluation:
    return redan.evaluate(run, **{"attack": PROTOCOL, "samples": 90, "progress": False} | options)  # type: ignore[arg-type]


def timeless(result: Evaluation) -> Evaluation:
    return result.model_copy(update={"seconds": 0})


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("finished", [0, 1, 7, 20])
def test_a_stopped_evaluation_goes_on_and_repeats_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    whole = evaluate(trained, out=tmp_path / "whole")
    met: list[int] = []
    honest_write, honest_run = Journal.write, PGD.run

    def write(self: Journal, work: str, position: int, piece: dict[str, Tensor]) -> None:
        if len(met) == finished:
            raise KeyboardInterrupt
        met.append(position)
        honest_write(self, work, position, piece)

    monkeypatch.setattr(Journal, "write", write)
    with pytest.raises(Stopped, match="--resume"):
        evaluate(trained, out=tmp_path / "cut")
    (folder,) = (tmp_path / "cut").glob("*.partial")
    assert not list((tmp_path / "cut").glob("*.json"))
    with pytest.raises(UserError, match="--resume"):
        evaluate(trained, out=tmp_path / "cut")
    for other in ({"curve": False}, {"input_mean": [0.5], "input_std": [0.5]}, {"draws": 7}):
        with pytest.raises(UserError, match="no unfinished evaluation"):
            evaluate(trained, out=tmp_path / "cut", resume=True, **other)

    runs = 0

    def counted(self: PGD, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        nonlocal runs
        runs += 1
        return honest_run(self, search, images, labels, generator)

    monkeypatch.setattr(Journal, "write", honest_write)
    monkeypatch.setattr(PGD, "run", counted)
    resumed = evaluate(trained, out=tmp_path / "cut", resume=True)
    assert timeless(resumed) == timeless(whole)
    assert not folder.exists()
    after_resume, runs = runs, 0
    evaluate(trained, out=tmp_path / "again")
    assert (after_resume < runs) == (finished > 0)


def test_nothing_to_resume_is_said(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no unfinished evaluation"):
        evaluate(trained, out=tmp_path, resume=True)
    with pytest.raises(UserError, match="--out"):
        redan.evaluate(torch.nn.Identity(), data="digits", threat="linf:0.1", resume=True)


def test_a_journal_of_other_weights_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, {"seed": 0, "weights": "a"}, resume=False)
    Journal(tmp_path, {"seed": 0, "weights": "a"}, resume=True)
    for other in ({"seed": 0, "weights": "b"}, {"seed": 0}):
        with pytest.raises(UserError, match="another weights"):
            Journal(tmp_path, other, resume=True)


def test_constants_are_part_of_the_fingerprint() -> None:
    # Those of the normalisation stay out of the weights file.
    one, other, same = (
        fingerprint(dict(nn.Sequential(Normalise([mean], [1.0])).named_buffers())) for mean in (0.1, 0.2, 0.1)
    )
    assert one == same != other


def test_a_finished_result_is_not_taken_where_the_attack_of_that_name_has_changed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(trained, out=tmp_path, resume=None)
    assert evaluate(trained, out=tmp_path, resume=None) == first
    monkeypatch.setitem(protocol.WITH_OBJECTIVE, "fgsm", (lambda threat, *_: PGD(threat, steps=2), 0))
    assert evaluate(trained, out=tmp_path, resume=None).fingerprint != first.fingerprint


@pytest.mark.parametrize("threat", ["linf:0.1", "l1:2", "stadv:0.05", "rotation:30+3"])
def test_what_a_protocol_stands_for_is_told_alike_in_every_process(threat: str) -> None:
    told = []
    for name in (*protocol.ATTACKS, *protocol.WITH_OBJECTIVE, *protocol.ENSEMBLES, "purification"):
        with contextlib.suppress(UserError):  # not for this threat
            told.append(repr(protocol.parse_protocol(name, parse_threat(threat), classes=10)))
    assert told
    assert not any(" at 0x" in it for it in told)


def test_pictures_of_an_earlier_evaluation_do_not_stay(trained: Path, tmp_path: Path) -> None:
    evaluate(trained, out=tmp_path, save_images=True)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert [name.partition("seed0")[2] for name in files] == [".images.safetensors", ".json", ".safetensors"]
    evaluate(trained, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [files[1], files[2]]


def test_a_mistake_leaves_no_journal(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="precision"):
        evaluate(trained, out=tmp_path, precision="float17")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_short_memory_halves_the_batch(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    honest, sizes = PGD.run, []

    def greedy(self: PGD, search: SearchModel, images: Tensor, labels: Tensor, generator: Generator | None) -> Outcome:
        sizes.append(len(images))
        if len(images) > 16:
            raise error
        return honest(self, search, images, labels, generator)

    monkeypatch.setattr(PGD, "run", greedy)
    found = evaluate(trained, attack="pgd-5", out=tmp_path, curve=False)
    assert sizes[0] > 16 and max(sizes[3:]) <= 16
    assert sum(sizes[-(sum(sizes) - 1) :]) >= found.clean.correct
    assert found.robust.correct < found.clean.correct

    monkeypatch.setattr(PGD, "run", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match="memory"):
        evaluate(trained, attack="pgd-5", curve=False, out=tmp_path / "none")


class Narrow(nn.Module):
    """Memory for 16 images, and randomness if it is wanted."""

    def __init__(self, network: nn.Module, noise: float = 0.0) -> None:
        super().__init__()
        self.network, self.noise = network, noise

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        logits: Tensor = self.network(images)
        return logits + self.noise * torch.randn(len(images), 1) * torch.arange(10)


@pytest.mark.filterwarnings("ignore:.*draws at random")
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_short_memory_is_met_wherever_the_network_is_asked(trained: Path, tmp_path: Path, noise: float) -> None:
    options: Any = {"threat": "linf:0.15", "data": "digits", "samples": 50, "attack": "pgd-3", "progress": False}
    network = Narrow(redan.load(trained), noise)
    narrow = redan.evaluate(network, draws=2, diagnose=True, save_images=True, out=tmp_path, **options)
    assert narrow.samples == 50 and narrow.diagnostics
    if not noise:
        wide = redan.evaluate(redan.load(trained), **options)
        assert narrow.clean == wide.clean


@pytest.mark.usefixtures("small_batches")
@pytest.mark.filterwarnings("ignore:.*draws at random")
def test_a_random_model_resumes_to_the_same_numbers(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = redan.load(trained)

    class Noisy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = network(images + 0.1 * torch.randn_like(images))
            return logits

    def ask(**options: object) -> Evaluation:
        common = {"threat": "linf:0.1", "data": "digits", "samples": 60, "attack": "pgd-3:cw", "draws": 3}
        return redan.evaluate(Noisy(), progress=False, **common, **options)  # type: ignore[arg-type]

    whole = ask(out=tmp_path / "whole")
    honest, written = Journal.write, 0

    def write(self: Journal, work: str, position: int, piece: dict[str, Tensor]) -> None:
        nonlocal written
        if written == 2:
            raise KeyboardInterrupt
        written += 1
        honest(self, work, position, piece)

    monkeypatch.setattr(Journal, "write", write)
    with pytest.raises(Stopped):
        ask(out=tmp_path / "cut")
    monkeypatch.setattr(Journal, "write", honest)
    assert timeless(ask(out=tmp_path / "cut", resume=True)) == timeless(whole)


def test_other_errors_are_not_taken_for_short_memory(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PGD, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        evaluate(trained, attack="pgd-5", out=tmp_path)


@pytest.mark.parametrize("threat", ["linf:0.15", "l2:1", "l1:4"])
def test_saved_images_are_adversarial_and_so_are_the_rounded_ones_that_claim_it(
    trained: Path, tmp_path: Path, threat: str
) -> None:
    found = evaluate(trained, threat=threat, save_images=True, out=tmp_path)
    (path,) = tmp_path.glob("*.images.safetensors")
    kept, _ = load_tensors(path)
    indices = kept["indices"]
    assert indices.tolist() == [row.index for row in found.per_image if row.verdict == "falsified"]
    test = load_dataset("digits", None).test
    clean, labels = to_float(test.images[indices]), test.labels[indices]
    network, ball = redan.load(trained), parse_threat(threat)
    assert (network(kept["adversarial"]).argmax(1) != labels).all()
    assert ball.contains(kept["adversarial"], clean).all()
    rounded, claims = kept["rounded"].float() / 255, kept["rounded_breaks"]
    assert kept["rounded"].dtype == torch.uint8
    assert claims.any()
    assert (network(rounded).argmax(1) != labels)[claims].all()
    assert ball.contains(rounded, clean)[claims].all()
    # Rounded to the nearest level or towards the image: never a level away from the exact one.
    assert ((rounded - kept["adversarial"]).abs() <= 1 / 255 + 1e-6).all()


def test_no_image_fell_and_the_file_is_empty(trained: Path, tmp_path: Path) -> None:
    evaluate(trained, threat="linf:0", save_images=True, out=tmp_path)
    (path,) = tmp_path.glob("*.images.safetensors")
    kept, _ = load_tensors(path)
    assert {key: len(tensor) for key, tensor in kept.items()} == dict.fromkeys(kept, 0)


def test_the_threat_of_the_file_name_is_the_threat(trained: Path, tmp_path: Path) -> None:
    found = evaluate(trained, out=tmp_path, precision="float32")
    (path,) = tmp_path.glob("*.json")
    assert path.stem == "digits-fgsm+pgd-5+apgd-5-linf_0.15-90-best-precision_float32-seed0"
    assert Evaluation.load(path) == found
    assert found.threat == str(Linf(0.15))
