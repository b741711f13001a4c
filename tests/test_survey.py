"""Evaluations that are interrupted, short of memory, or asked for their images."""

from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

import redan
from redan.attacks import PGD, Outcome, SearchModel
from redan.data.pipeline import to_float
from redan.data.registry import load_dataset
from redan.errors import Stopped, UserError
from redan.evaluation.journal import Journal
from redan.evaluation.results import Evaluation
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
    with pytest.raises(UserError, match="another curve"):
        evaluate(trained, out=tmp_path / "cut", curve=False, resume=True)

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
    assert path.stem == "fgsm+pgd-5+apgd-5-linf_0.15-90-best-precision_float32-seed0"
    assert Evaluation.load(path) == found
    assert found.threat == str(Linf(0.15))
