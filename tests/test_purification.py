"""The evaluation of purification: what each attack sees, what is counted after it, and that a stop loses nothing."""

import json
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import redan
from redan.attacks import (
    APGD,
    FAB,
    PGD,
    AutoAttack,
    SearchModel,
    Square,
    StAdv,
    TargetedAPGD,
    cross_entropy,
    cw_margin,
    dlr,
)
from redan.attacks.base import Attack
from redan.cli import app
from redan.data.pipeline import to_float
from redan.data.registry import load_dataset
from redan.errors import Stopped, UserError
from redan.evaluation import purification as protocol
from redan.evaluation import randomness, several
from redan.evaluation.journal import Journal
from redan.evaluation.pictures import on_the_way
from redan.evaluation.progress import EvaluationProgress
from redan.evaluation.protocol import parse_protocol
from redan.evaluation.purification import THREATS, Oblivious, at_known_draw, bypassing
from redan.evaluation.results import Evaluation
from redan.evaluation.several import evaluate_within
from redan.evaluation.stages import Stages
from redan.evaluation.survey import Survey
from redan.models.purified import Purified
from redan.models.purifiers.base import Purifier
from redan.models.random_transforms import Draw, RandomTransform
from redan.reporting import write_report
from redan.seeds import derive_seed, generator
from redan.spatial import Flow
from redan.tensors import load_tensors
from redan.threats import Linf, Threat, parse_threat

SAMPLES, DRAWS, STEPS = 24, 4, 10
THREAT = "linf:0.15"
PUBLISHED_PARTS, PUBLISHED_QUERIES = AutoAttack.parts, protocol.QUERIES

pytestmark = pytest.mark.filterwarnings("ignore:.*draws at random")


class Neighbours(Purifier):
    """Gives a missing pixel the mean of what is seen around it."""

    criterion = "l1"

    def attempts(self, images: Tensor, holes: Tensor) -> tuple[Tensor, ...]:
        seen = 1 - holes
        near = F.avg_pool2d(images * seen, 5, 1, 2) / (F.avg_pool2d(seen, 5, 1, 2) + 1e-3)
        return (seen * images + holes * near,)


def purified(trained: Path, **transform: Any) -> Purified:
    whole = Purified(
        RandomTransform(size=8, cells=4, **({"sigma": 0.1} | transform)), Neighbours(), redan.load(trained)
    )
    return whole.eval()


def batch(count: int = SAMPLES) -> tuple[Tensor, Tensor]:
    test = load_dataset("digits").test
    return to_float(test.images[:count]), test.labels[:count]


def evaluate(network: nn.Module, **options: Any) -> Evaluation:
    usual: dict[str, Any] = {"threat": THREAT, "attack": f"purification-{STEPS}", "samples": SAMPLES, "draws": DRAWS}
    usual |= {"data": "digits", "precision": "float32", "progress": False}
    return redan.evaluate(network, **usual | options)


def stages_of(network: nn.Module, threat: Threat) -> Stages:
    test, quiet = load_dataset("digits").test, EvaluationProgress(show=False)
    journal = Journal(None, {}, resume=False)
    return Stages(network, threat, test, SAMPLES, None, 10, DRAWS, 0, "float32", journal, quiet)


def timeless(results: list[Evaluation]) -> list[Evaluation]:
    return [result.model_copy(update={"seconds": 0}) for result in results]


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """AutoAttack and Square with a few steps: which attacks are met is tested here, not how good they are."""

    def parts(self: AutoAttack, classes: int) -> dict[str, Attack]:
        attacks: dict[str, Attack] = {"apgd-ce": APGD(self.threat, steps=6)}
        if self.version == "rand":
            return attacks | {"apgd-dlr": APGD(self.threat, steps=6, objective=dlr)}
        attacks["apgd-t"] = TargetedAPGD(self.threat, steps=4, targets=2)
        return attacks | {"fab-t": FAB(self.threat, steps=4, targets=2), "square": Square(self.threat, queries=30)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoAttack, "parts", parts)
        patch.setattr(protocol, "QUERIES", 30)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def result(trained: Path, folder: Path) -> Evaluation:
    """An evaluation whose journal is kept, so that what each attack found can be looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "close", lambda self: None)
        return evaluate(purified(trained), out=folder)


def test_the_gradient_past_the_purifier_is_the_classifiers_at_the_purified_image(trained: Path) -> None:
    whole, (images, labels) = purified(trained), batch(6)
    draw = whole.transform.sample(images, generator(1))
    leaf, place = images.clone().requires_grad_(), whole.purify(images, draw).detach().requires_grad_()
    logits = bypassing(whole).at(leaf, [draw])
    assert torch.allclose(logits, whole.at(images, [draw]), atol=1e-5)
    (seen,) = torch.autograd.grad(cw_margin(logits, labels).sum(), leaf)
    (there,) = torch.autograd.grad(cw_margin(whole.classifier(place), labels).sum(), place)
    assert torch.allclose(seen, there, atol=1e-5)
    (exact,) = torch.autograd.grad(cw_margin(whole.at(leaf, [draw]), labels).sum(), leaf)
    assert not torch.allclose(seen, exact, atol=1e-2)
    # The search copy of the view keeps both, and a view of a known draw keeps the draw.
    known = whole.fixed(images, generator(2))
    view = bypassing(known)
    assert torch.allclose(view(images), known(images), atol=1e-5)
    place = known.purify(images, Draw(known.noise[0], known.holes[0])).detach().requires_grad_()
    (there,) = torch.autograd.grad(cw_margin(known.classifier(place), labels).sum(), place)
    found = SearchModel(view, precision="float32").gradient(images, cw_margin, labels)[2]
    assert torch.allclose(found, there, atol=1e-4)


def test_gradients_are_means_over_draws_of_the_transform(trained: Path) -> None:
    whole, (images, labels) = purified(trained), batch(6)
    search = SearchModel(whole, precision="float32", draws=3)
    search.logits(images)  # prepares
    torch.manual_seed(5)
    mean = search.gradient(images, cross_entropy, labels)[2]
    torch.manual_seed(5)
    singles = []
    for _ in range(3):
        leaf = images.clone().requires_grad_()
        value = cross_entropy(whole.at(leaf, [whole.transform.sample(images)]), labels).sum()
        singles.append(torch.autograd.grad(value, leaf)[0])
    assert torch.allclose(mean, torch.stack(singles).mean(0), atol=1e-4)
    assert not torch.allclose(mean, singles[0], atol=1e-2)


def test_nothing_counts_as_broken_by_a_part(trained: Path) -> None:
    images, labels = batch()
    whole, dropping = (PGD(Linf(0.3), steps=5, drop_broken=drop) for drop in (False, True))
    classifier = redan.load(trained)
    last = whole(SearchModel(classifier), images, labels, generator=generator(0))
    assert torch.equal(dropping(Oblivious(classifier), images, labels, generator=generator(0)), last)
    assert not torch.equal(dropping(classifier, images, labels, generator=generator(0)), last)


@torch.no_grad()
def test_transfer_is_the_attack_on_the_bare_classifier(result: Evaluation, trained: Path, folder: Path) -> None:
    whole, (images, labels) = purified(trained), batch()
    torch.manual_seed(derive_seed(0, "evaluate"))
    passes = [whole(images).argmax(1) != labels for _ in range(2 + DRAWS)]  # two to see that it draws
    clean = torch.stack(passes[2:]).float().mean(0)
    assert (clean == 1).any()  # and attacked all the same
    place = (0, "evaluate", 0, 0)
    attack = PGD(Linf(0.15), steps=STEPS, drop_broken=False)
    search = SearchModel(whole.classifier, precision="float32")
    found = attack(search, images, labels, generator=generator(*place))
    torch.manual_seed(derive_seed(*place, "model"))
    score = torch.stack([whole(found).argmax(1) != labels for _ in range(DRAWS)]).float().mean(0)
    told = torch.stack([whole(found[score > 0]).argmax(1) != labels[score > 0] for _ in range(DRAWS)])
    wrong = clean.clone()
    worse = score > clean  # the clean image lies in every threat, too
    wrong[worse] = told.float().mean(0)[worse[score > 0]]
    assert result.randomised is not None and result.transferred is not None
    assert result.transferred.correct == round(float((1 - score).sum()))
    assert next(iter(result.randomised.after)) == "transfer"
    assert result.randomised.after["transfer"] == pytest.approx(1 - float(wrong.mean()))
    (path,) = folder.glob("*.partial/0-transfer@*.safetensors")
    kept, _ = load_tensors(path)
    assert kept["met"].tolist() == list(range(SAMPLES))
    assert kept["hurt"].tolist() == (score > 0).nonzero().squeeze(1).tolist() and len(kept["hurt"])
    assert torch.equal(kept["images"], found[score > 0])


def test_images_meet_all_attacks_and_only_get_worse(result: Evaluation) -> None:
    drawn = result.randomised
    assert drawn is not None
    parts = ["transfer", "bpda", "pgd:ce", "pgd:cw", "apgd-ce", "apgd-dlr", "square-30"]
    assert list(drawn.after) == parts and result.attacks == drawn.after
    assert drawn.after["transfer"] > drawn.after["square-30"]  # the oblivious figure flatters
    assert result.curve == ()
    assert result.account == (
        "shortened from 200 to 10 steps; in order transfer (10 steps, no EOT), bpda (10 steps x EOT 4), "
        "pgd:ce (10 steps x EOT 4, 2 restarts), pgd:cw (10 steps x EOT 4, 2 restarts), apgd-ce (6 steps x EOT 4), "
        "apgd-dlr (6 steps x EOT 4), square-30 (30 queries x EOT 4); AutoAttack at one known draw: apgd-ce (6 steps), "
        "apgd-t (4 steps, up to 2 targets), fab-t (4 steps, up to 2 targets), square (1 queries); convergence on 24 "
        "images; left out: nothing"
    )


def test_the_steps_are_those_of_the_papers() -> None:
    attacks = parse_protocol("purification", parse_threat("l2:0.5"), classes=10, random=True)
    facts = {name: (it.steps, it.objective.name, it.restarts) for name, it in attacks.items() if isinstance(it, PGD)}
    assert facts == {
        "transfer": (200, "ce", 1),
        "bpda": (50, "cw", 1),
        "pgd:ce": (200, "ce", 2),
        "pgd:cw": (200, "cw", 2),
    }
    exact = parse_protocol("purification-20", Linf(8 / 255), classes=10)["pgd:cw"]
    assert isinstance(exact, PGD) and exact.step_size == pytest.approx(0.007) and exact.steps == 20
    assert list(parse_protocol("purification", parse_threat("stadv:0.05"), classes=10)) == ["transfer", "bpda", "stadv"]


@pytest.mark.parametrize("steps", [50, 100, 200, 400])
def test_few_steps_shorten_every_attack_and_every_network_alike(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    monkeypatch.setattr(AutoAttack, "parts", PUBLISHED_PARTS)
    monkeypatch.setattr(protocol, "QUERIES", PUBLISHED_QUERIES)

    def efforts(random: bool) -> dict[str, int]:
        attacks = parse_protocol(f"purification-{steps}", Linf(8 / 255), classes=10, random=random)
        return {name: getattr(it, "queries" if isinstance(it, Square) else "steps") for name, it in attacks.items()}

    few, share = min(steps, 100), min(steps, 200) / 200
    both = {"transfer": steps, "bpda": 50, "pgd:ce": steps, "pgd:cw": steps, "apgd-ce": few}
    queries = round(1000 * share)
    assert efforts(random=True) == both | {"apgd-dlr": few, f"square-{queries}": queries}
    plain = {"apgd-ce": few, "apgd-t": few, "fab-t": few, "square": round(5000 * share)}
    assert efforts(random=False) == both | plain
    known = at_known_draw(Linf(8 / 255), steps, 10)
    assert known == {name: parse_protocol(f"purification-{steps}", Linf(8 / 255), classes=10)[name] for name in plain}


@pytest.mark.parametrize(("threat", "attack"), [(THREAT, "autoattack"), ("stadv:0.1", f"stadv-{STEPS}")])
def test_one_known_draw_meets_an_attacker_who_knows_it(
    trained: Path, monkeypatch: pytest.MonkeyPatch, threat: str, attack: str
) -> None:
    monkeypatch.setattr(Survey, "offer", lambda *_: None)  # that is the next test's
    monkeypatch.setattr(Stages, "converge", lambda *_: ())
    whole, (images, labels) = purified(trained), batch()
    drawn = evaluate(whole, threat=threat).randomised
    known = whole.fixed(images, generator(0, "fixed"))
    alone = evaluate(known, threat=threat, attack=attack, curve=False)
    assert drawn is not None and alone.randomised is None
    assert (drawn.clean.fixed, drawn.robust.fixed) == (alone.clean, alone.robust)
    assert alone.clean.correct == int((known(images).argmax(1) == labels).sum())
    assert 0 < alone.robust.correct < alone.clean.correct


@torch.no_grad()
def test_what_broke_other_draws_is_tried_on_the_known_one(trained: Path) -> None:
    whole, (images, labels) = purified(trained), batch()
    stages = stages_of(whole, Linf(0.15))
    survey = stages.survey()
    stages.meet(survey, {"pgd:cw": PGD(Linf(0.15), steps=STEPS, objective=cw_margin)}, {})
    fixed = whole.fixed(images, generator(0, "fixed"))
    clean, attacked = (fixed(x).argmax(1) == labels for x in (images, survey.attacked(torch.arange(SAMPLES))))
    known = stages.known_draw(survey, whole, {})
    assert torch.equal(known.right, clean) and torch.equal(known.stands, clean & attacked)
    assert 0 < known.stands.sum() < clean.sum()
    # Who stands is attacked on that draw besides, and nobody who fell rises again.
    again = stages.known_draw(survey, whole, at_known_draw(Linf(0.15), STEPS, 10))
    assert (again.stands <= known.stands).all() and again.stands.sum() < known.stands.sum()


def test_without_randomness_the_four_rules_agree(trained: Path) -> None:
    whole, threat = purified(trained, sigma=0.0, masks="fixed"), Linf(0.15)
    stages, attacks = stages_of(whole, threat), AutoAttack(threat).parts(10)
    survey = stages.survey()
    assert not survey.random
    stages.meet(survey, attacks, {})
    for counts in randomness.count(survey, whole, threat, DRAWS, 0, stages.known_draw(survey, whole, attacks)):
        assert counts.mean == counts.worst == counts.majority == counts.fixed
    assert 0 < counts.mean.correct < SAMPLES


def test_convergence_is_pgd_judged_by_new_draws(result: Evaluation, trained: Path) -> None:
    points = {(it.steps, it.draws): it.accuracy for it in result.convergence}
    assert list(points) == [(10, 4), (20, 4), (40, 4), (10, 1), (10, 5)]  # twice the draws is 8
    assert {accuracy.samples for accuracy in points.values()} == {SAMPLES}
    whole, (images, labels) = purified(trained), batch()
    place = (0, "convergence", 10, 5)
    ball = Linf(0.15)
    attack = PGD(ball, steps=10, step_size=0.15 * 0.007 * 255 / 8, objective=cw_margin, drop_broken=False)
    search = SearchModel(whole, precision="float32", draws=5)
    search.logits(images)
    torch.manual_seed(derive_seed(*place, 0))
    found = attack.run(search, images, labels, generator(*place, "start", 0)).images
    right = torch.stack([whole(found).argmax(1) == labels for _ in range(DRAWS)]).float().mean(0).sum()
    assert points[10, 5].correct == round(float(right))


@pytest.mark.parametrize(
    ("steps", "shown"),
    [
        (2, [2, 4, 8]),
        (20, [10, 20, 40, 80]),
        (50, [10, 20, 50, 100, 200]),
        (200, [10, 20, 50, 100, 200]),
        (400, [10, 20, 50, 100, 200]),
    ],
)
def test_the_curve_goes_on_beyond_a_shortened_protocol(
    trained: Path, monkeypatch: pytest.MonkeyPatch, steps: int, shown: list[int]
) -> None:
    monkeypatch.setattr(Stages, "_left", lambda *_: 0)
    stages = stages_of(purified(trained), Linf(0.15))
    points = stages.converge(stages.survey(), Linf(0.15), steps)
    assert [it.steps for it in points if it.draws == DRAWS] == shown
    assert {it.steps for it in points if it.draws != DRAWS} == {min(50, steps)}
    assert {it.accuracy.samples for it in points} == {SAMPLES}


def test_the_gallery_shows_the_way_through_the_network(result: Evaluation, trained: Path, folder: Path) -> None:
    (path,) = folder.glob("*seed0.safetensors")
    kept, _ = load_tensors(path)
    whole = purified(trained)
    assert len(result.gallery) == len(kept["adversarials"]) > 0
    draw = whole.transform.sample(kept["adversarials"], generator(0, "gallery"))
    seen, holes = whole.transform(kept["adversarials"], draw)
    assert torch.equal(kept["transformed"], seen)
    assert torch.allclose(kept["purified"], whole.purifier(seen, holes))
    # The first images that are right, and whose worst candidate fools half of the draws that judged it.
    score = torch.zeros(SAMPLES)
    for piece in folder.glob("*.partial/[0-9]-*.safetensors"):
        found, _ = load_tensors(piece)
        score[found["hurt"]] = torch.maximum(score[found["hurt"]], found["score"])
    right = [row.index for row in result.per_image if row.verdict != "misclassified" and score[row.index] >= 0.5]
    assert [entry.index for entry in result.gallery] == right[:12]
    assert any(row.verdict == "unknown" for row in result.per_image if row.index in right[:12])


def test_of_several_views_the_first_is_shown_and_of_a_known_draw_that_one(trained: Path) -> None:
    whole, (images, _) = purified(trained, cover=True), batch(5)
    shown = on_the_way(whole, images, generator(3))
    draw = whole.transform.sample(images, generator(3))
    seen, _ = whole.transform(images, draw)
    assert len(seen) == 20 and torch.equal(shown["transformed"], seen[:5])
    assert torch.equal(shown["purified"], whole.purify(images, draw))
    known = whole.fixed(images, generator(4))
    shown = on_the_way(known, images, generator(3))
    assert torch.allclose(known.classifier(shown["purified"]), known(images), atol=1e-5)
    assert on_the_way(whole.classifier, images, generator(3)) == {}


def test_threats_that_move_pixels(trained: Path) -> None:
    found = evaluate(purified(trained), threat="stadv:0.1", samples=12)
    assert list(found.attacks) == ["transfer", "bpda", "stadv"]
    assert found.convergence == ()
    assert found.account == (
        "shortened from 200 to 10 steps; in order transfer (10 steps, no EOT), bpda (10 steps x EOT 4), "
        "stadv (10 steps x EOT 4); one known draw: stadv (10 steps); "
        "left out: PGD, AutoAttack, Square, convergence (for Lp threats)"
    )
    assert found.randomised is not None and found.randomised.after["stadv"] < found.randomised.clean.mean.value
    with pytest.raises(UserError, match="flow threat such as stadv"):
        evaluate(purified(trained), threat="rotation:30+3")


def test_a_network_that_does_not_draw_meets_what_makes_sense_for_it(trained: Path) -> None:
    network, (images, labels) = redan.load(trained), batch()
    found = evaluate(network, curve=False)
    parts = parse_protocol(f"purification-{STEPS}", Linf(0.15), classes=10)
    del parts["transfer"], parts["bpda"]
    assert list(found.attacks) == list(parts) == ["pgd:ce", "pgd:cw", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert found.randomised is None and found.convergence == ()
    assert found.transferred is None
    assert found.account == (
        "shortened from 200 to 10 steps; in order pgd:ce (10 steps, 2 restarts), pgd:cw (10 steps, 2 restarts), "
        "apgd-ce (6 steps), apgd-t (4 steps, up to 2 targets), fab-t (4 steps, up to 2 targets), square (1 queries); "
        "left out: transfer (nothing purifies), bpda (nothing purifies), averages over draws, one known draw, "
        "convergence (there is no randomness)"
    )
    search = SearchModel(network, precision="float32")
    stands = network(images).argmax(1) == labels
    for i, (title, attack) in enumerate(parts.items()):
        met = stands.nonzero().squeeze(1)
        tried = attack(search, images[met], labels[met], generator=generator(0, "evaluate", i, int(met[0])))
        stands[met] = network(tried).argmax(1) == labels[met]
        assert found.attacks[title] == int(stands.sum()) / SAMPLES


class Noisy(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images + 0.1 * torch.randn_like(images))
        return logits


def test_a_network_that_draws_and_purifies_nothing(trained: Path) -> None:
    found = evaluate(Noisy(redan.load(trained)), attack="purification-2", samples=8, draws=2)
    assert list(found.attacks) == ["pgd:ce", "pgd:cw", "apgd-ce", "apgd-dlr", "square-10"]
    assert found.account.endswith(
        "; one known draw: pgd:cw (50 steps); convergence on 8 images; left out: transfer (nothing purifies), "
        "bpda (nothing purifies), AutoAttack at one known draw (nothing purifies)"
    )
    points = [(it.steps, it.draws) for it in found.convergence]
    assert found.randomised is not None and points == [(2, 2), (4, 2), (8, 2), (2, 1)]


def test_the_whole_protocol_is_not_called_shortened_and_what_nobody_asked_for_is_left_out() -> None:
    attacks: dict[str, Attack] = {"transfer": PGD(Linf(0.1), steps=200, drop_broken=False)}
    known: dict[str, Attack] = {"fab": FAB(Linf(0.1), targets=None, restarts=5)}
    told = protocol.describe(attacks, known, Linf(0.1), seen=("transfer", "bpda"), steps=200, draws=20, studied=0)
    assert told == (
        "in order transfer (200 steps, no EOT); AutoAttack at one known draw: fab (100 steps, 5 restarts); "
        "left out: convergence (not asked for)"
    )
    flow = Flow(0.05)
    attacks = {"transfer": StAdv(flow, steps=200)}
    told = protocol.describe(attacks, {}, flow, seen=("transfer", "bpda"), steps=200, draws=1, studied=0)
    assert told == (
        "in order transfer (200 steps); left out: PGD, AutoAttack, Square, convergence (for Lp threats), "
        "averages over draws, one known draw (there is no randomness)"
    )


@pytest.mark.parametrize(
    ("threats", "piece"),
    [
        ((THREAT, "stadv:0.1"), "1-bpda@"),  # in the second threat
        ((THREAT,), "convergence-4-3@"),
        ((THREAT,), "fixed-1-apgd-t@"),
    ],
)
def test_a_stopped_evaluation_goes_on_to_the_same_numbers(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threats: tuple[str, ...], piece: str
) -> None:
    def ask(out: Path, *, resume: bool = False) -> list[Evaluation]:
        return evaluate_within(
            purified(trained),
            threats,
            attack="purification-2",
            samples=8,
            draws=3,
            data="digits",
            out=out,
            resume=resume,
            progress=False,
        )

    whole = ask(tmp_path / "whole")
    honest, seen, stop = Journal.write, [], len(threats)

    def write(self: Journal, work: str, position: int, content: dict[str, Tensor]) -> None:
        name = f"{work}@{position:09d}"
        seen.append(name)
        if name.startswith(piece) and sum(it.startswith(piece) for it in seen) == stop:
            raise KeyboardInterrupt
        honest(self, work, position, content)

    monkeypatch.setattr(Journal, "write", write)
    with pytest.raises(Stopped, match="--resume"):
        ask(tmp_path / "cut")
    before, stop = list(seen), -1
    seen.clear()
    assert len(list((tmp_path / "cut").glob("*.json"))) == len(threats) - 1
    assert timeless(ask(tmp_path / "cut", resume=True)) == timeless(whole)
    assert seen[0] == before[-1]  # nothing that was finished is done again
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("cut", "whole")]
    assert files[0] == files[1]


def test_a_finished_result_is_taken_only_if_it_is_of_the_same_settings(trained: Path, tmp_path: Path) -> None:
    def ask(network: nn.Module, **options: Any) -> Evaluation:
        return evaluate(network, attack="fgsm", samples=8, out=tmp_path, resume=None, **options)

    first = ask(purified(trained))
    assert ask(purified(trained)) == first  # the seconds, too
    other = ask(purified(trained, sigma=0.2))
    assert other.fingerprint != first.fingerprint
    assert ask(purified(trained, sigma=0.2)) == other
    changed = purified(trained, sigma=0.2)
    next(changed.classifier.parameters()).data.mul_(1.1)
    assert ask(changed).fingerprint != other.fingerprint
    pictured = ask(changed, save_images=True)
    assert list(tmp_path.glob("*.images.safetensors"))
    assert ask(changed, save_images=True) == pictured


def test_without_a_threat_there_are_several(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def note(run: Any, *, threat: Any, convergence: bool, **options: Any) -> None:
        asked.append((str(threat), convergence))

    monkeypatch.setattr(several, "evaluate", note)
    evaluate_within(trained, [], attack="purification")
    shown = [str(parse_threat(text)) for text in THREATS]
    assert asked == [(THREAT, True), *((text, False) for text in shown)]
    asked.clear()
    evaluate_within(trained, ["l2:0.5", "l2:1/2"], attack="purification")
    evaluate_within(trained, [])
    assert asked == [("l2:0.5", True), (THREAT, True)]
    asked.clear()
    evaluate_within(trained, ["l2:0.5", THREAT], attack="purification")
    assert asked == [("l2:0.5", False), (THREAT, True)]


runner = CliRunner()


def command(*arguments: str | Path) -> Any:
    return runner.invoke(app, ["evaluate", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("--attack purification-0", "at least 1 step"),
        ("--attack purification-many", "did you mean 'purification'?"),
        ("--attack purification:cw", "stands alone"),
        ("--attack purification+pgd", "stands alone"),
        ("--attack purification --threat linf:0.1 --threat stavd:0.05", "did you mean 'stadv'?"),
        ("--attack purification --threat linf:0.1 --threat rotation:30+3", "stadv:0.05"),
        ("--threat linf:0.1 --threat stadv:0.05 --diagnose", "--diagnose needs"),
        ("--threat linf:0.1 --threat stadv:0.05 --attack autoattack", "AutoAttack needs"),
    ],
)
def test_a_mistake_ends_in_one_line_before_anything_is_done(trained: Path, arguments: str, hint: str) -> None:
    done = command(trained, *arguments.split())
    assert done.exit_code == 2 and done.stdout == ""
    assert hint in done.stderr and done.stderr.count("\n") == 1


def test_several_threats_are_a_list_and_the_least_accuracy_decides(trained: Path, tmp_path: Path) -> None:
    common = (trained, "--samples", "40", "--attack", "fgsm", "--no-curve", "--out", tmp_path)
    both = (*common, "--threat", "linf:0.01", "--threat", "l2:2")
    done = command(*both, "--json")
    assert done.exit_code == 0, done.stderr
    easy, hard = json.loads(done.stdout)
    assert (easy["threat"], hard["threat"]) == ("linf:0.01", "l2:2")
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert hard["robust_accuracy"] < easy["robust_accuracy"]
    between = (hard["robust_accuracy"] + easy["robust_accuracy"]) / 2
    done = command(*both, "--fail-under", between)
    assert done.exit_code == 1 and f"{hard['robust_accuracy']:.4f} is below" in done.stderr
    assert "linf:0.01" in done.stdout and "l2:2" in done.stdout
    assert json.loads(command(*common, "--threat", "l2:2", "--json").stdout)["threat"] == "l2:2"


def test_what_was_done_is_printed(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("their_defence")
    module.make = lambda: purified(trained)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_defence", module)
    options = "--data digits --threat linf:0.1 --attack purification-2 --samples 8 --draws 2"
    done = command("their_defence:make", *options.split())
    assert done.exit_code == 0, done.stderr
    for said in (
        "2 steps x EOT 2",
        "left out: nothing",
        "one draw, known",
        "worst candidates after",
        "transfer alone, as such papers report it: ",
        "EOT draws",
    ):
        assert said in done.stdout


def test_the_report_shows_transfer_alone_beside_the_worst_cases(
    result: Evaluation, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("results"))
    (run / "results").mkdir()
    for changes in ({}, {"randomised": None, "convergence": ()}):
        shown = result.model_copy(update={"gallery": (), **changes})
        shown.save(run / "results" / "purification.json")
        page = write_report([run], tmp_path / "report.html").read_text()
        start = page.index("transfer alone, as such papers report it")
        assert result.transferred is not None
        assert f"{100 * result.transferred.value:.2f}" in page[start : start + 300]
        assert result.account in page
