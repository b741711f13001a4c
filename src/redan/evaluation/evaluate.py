"""Accuracy, clean and under attack: the upper side of the bracket.

Each image is classified clean; who is right meets the attacks one after another while it stands; who falls is checked
again in float32, in evaluation mode and inside the exact threat; one row an image.
"""

import dataclasses
import hashlib
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redan.attacks.base import Attack
from redan.attacks.objectives import cw_margin
from redan.attacks.pgd import PGD
from redan.attacks.search import Precision, SearchModel
from redan.attacks.square import Square
from redan.data.registry import load_dataset
from redan.errors import UserError
from redan.evaluation import diagnose as diagnosis
from redan.evaluation import randomness
from redan.evaluation.journal import Journal
from redan.evaluation.pictures import adversarial_images
from redan.evaluation.progress import EvaluationProgress
from redan.evaluation.protocol import default_protocol, parse_protocol
from redan.evaluation.results import Accuracy, Check, CurvePoint, Evaluation, GalleryEntry, Randomised, Row
from redan.evaluation.subject import Subject, find_subject, normalised
from redan.evaluation.survey import Survey
from redan.run import Checkpoint
from redan.seeds import derive_seed
from redan.tensors import save_tensors
from redan.threats import LpBall, Threat, parse_threat
from redan.version import __version__

CURVE_RADII = (0.25, 0.5, 0.75, 1.5, 2.0)  # in units of the threat's radius, at which the attacks themselves stand
CURVE = "curve"  # what an image fell to that only the search at another radius could break
GALLERY = 12
DRAWS = 20  # passes that average a gradient and judge a candidate of a model that draws at random


def evaluate(
    run: str | Path | nn.Module,
    *,
    threat: str | Threat | None = None,
    attack: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    checkpoint: Checkpoint = "best",
    curve: bool = True,
    precision: Precision = "auto",
    draws: int = DRAWS,
    diagnose: bool = False,
    transfer: str | Path | nn.Module | None = None,
    data: str | None = None,
    data_dir: str | Path | None = None,
    input_mean: Sequence[float] | None = None,
    input_std: Sequence[float] | None = None,
    out: str | Path | None = None,
    save_images: bool = False,
    resume: bool | None = False,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a network on test images, clean and under attack.

    Args:
        run: a run folder, ``package.module:function`` that returns a module, or a module.
        threat: such as ``linf:8/255``; the run's own if None.
        attack: a protocol, see ``redan.evaluation.protocol``; by default one that fits the threat.
        samples: the first so many test images, in order; all if None.
        seed: of the attacks.
        checkpoint: of a run: ``best`` or ``last``.
        curve: also find the accuracy at smaller and larger radii, by PGD-20 on the margin; not of a model that draws
            at random, and not for a threat that moves pixels.
        precision: of the search; float32 confirms in any case.
        draws: of a model that draws at random, at least 2: passes that average each gradient and judge each candidate.
        diagnose: also look for gradient masking, see ``redan.evaluation.diagnose``; for Lp threats.
        transfer: with ``diagnose``: another run, or as ``run`` has it, whose adversarial images are tried on this one.
        data: the data set; the run's own if None.
        data_dir: the folder of data sets.
        input_mean: for a network without its normalisation, subtracted from the images.
        input_std: likewise, divided by.
        out: folder of the results; a run's own ``results/`` if None. Without either nothing is written.
        save_images: keep the adversarial images, exact and rounded to 8 bits, beside the result.
        resume: go on with the unfinished evaluation of the same settings; None does so if there is one.
        progress: show it on standard error.

    Returns:
        The evaluation.

    Raises:
        UserError: for a mistake in any of these.
    """
    subject = find_subject(run, checkpoint)
    network = normalised(subject.network, input_mean, input_std)
    parsed = _threat(threat, subject)
    attack = attack or default_protocol(parsed)
    name = data or subject.data
    if name is None:
        raise UserError(f"{subject.name} does not say which images it is for; name them with --data")
    if draws < 2:
        raise UserError(f"--draws is at least 2, got {draws}")
    if diagnose:
        diagnosis.require_ball(parsed)
    elif transfer is not None:
        raise UserError("--transfer is for --diagnose, which is not asked for")
    folder = Path(out) if out is not None else subject.folder / "results" if subject.folder is not None else None
    if folder is None and (save_images or resume):
        raise UserError("nothing says where to keep the results; name a folder with --out")
    parse_protocol(attack, parsed, classes=10)  # a misspelt one is told before the data are loaded
    dataset = load_dataset(name, Path(data_dir) if data_dir is not None else None)
    count, classes = len(dataset.test) if samples is None else samples, len(dataset.class_names)
    if not 1 <= count <= len(dataset.test):
        raise UserError(f"--samples is between 1 and {len(dataset.test)} for {name}, got {samples}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    other = None if transfer is None else find_subject(transfer, "best").network.to(device)
    started = time.perf_counter()
    kept = subject.folder is not None
    settings = {
        "threat": str(parsed),
        "attack": attack,
        "samples": count,
        "seed": seed,
        "checkpoint": checkpoint if kept else "-",
        "precision": precision,
        "data": name,
        "run": subject.name,
        "run_data": subject.data,
        "out": out is not None,
        "draws": draws,
        "curve": curve,
        "input_mean": input_mean and list(input_mean),
        "input_std": input_std and list(input_std),
        "weights": _fingerprint(dict([*network.named_parameters(), *network.named_buffers()])),
        "images": _fingerprint({"labels": dataset.test.labels[:count], "first": dataset.test.images[:8]}),
    }
    stem = _stem(settings, diagnose=diagnose)
    journal = Journal(folder and folder / f"{stem}.partial", settings, resume=resume)
    with (
        journal.kept_when_stopped(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        EvaluationProgress(show=progress) as bar,
    ):
        torch.manual_seed(derive_seed(seed, "evaluate"))
        survey = Survey(network, dataset.test, count, subject.size, classes=classes, draws=draws, journal=journal)
        if other is not None:
            diagnosis.require_fitting(other, survey.images(torch.tensor([0])), classes)
        attacks = parse_protocol(attack, parsed, classes=classes, random=survey.random)
        if survey.random:
            warnings.warn(
                f"{subject.name} draws at random: every gradient and verdict is over {draws} draws, by "
                f"{' and '.join(attacks)}, and accuracy is counted by four rules",
                stacklevel=2,
            )
        survey.judge.heartbeat = bar.beat
        search = SearchModel(network, precision=precision, draws=survey.judge.draws)
        search.heartbeat = bar.beat
        radius = parsed.radius if isinstance(parsed, LpBall) else math.inf
        _meet_attacks(survey, attacks, search, radius, classes, seed, bar)
        measured = parsed if curve and isinstance(parsed, LpBall) and not survey.random else None
        if measured is not None:
            _meet_radii(survey, measured, search, classes, seed, bar)
        randomised = None
        if survey.random:
            clean_counts, robust_counts = randomness.count(survey, network, parsed, draws, derive_seed(seed, "fixed"))
            randomised = Randomised(draws=draws, clean=clean_counts, robust=robust_counts)
        checks = _checks(survey, network, parsed, other, seed, bar) if diagnose else ()
        rows = survey.rows(measured=isinstance(parsed, LpBall))
    clean = Accuracy.of(int(survey.right.sum()), count)
    robust = Accuracy.of(int(survey.stands.sum()), count)
    if randomised is not None:
        clean, robust = randomised.clean.mean, randomised.robust.mean
    standing, after = int(survey.right.sum()), {}
    for title in [*attacks, *([CURVE] if measured is not None else [])]:
        standing -= sum(row.verdict == "falsified" and row.by == title for row in rows)
        after[title] = standing / count
    entries, pictures = _gallery(rows, survey)
    result = Evaluation(
        redan_version=__version__,
        run=subject.name,
        checkpoint=checkpoint if subject.folder is not None else "-",
        dataset=name,
        class_names=dataset.class_names,
        threat=str(parsed),
        attack=attack,
        seed=seed,
        precision=precision,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        samples=count,
        clean=clean,
        robust=robust,
        clean_accuracy=clean.value,
        robust_accuracy=robust.value,
        attacks=after,
        seconds=round(time.perf_counter() - started + survey.earlier_seconds, 3),
        model_calls=sum(row.model_calls for row in rows),
        randomised=randomised,
        diagnostics=checks,
        curve=() if measured is None else _curve(measured, clean, survey.least),
        gallery=entries,
        per_image=tuple(rows),
    )
    if folder is not None:
        # The JSON file goes first and comes last: it never stands beside pictures of another evaluation.
        for suffix in (".json", ".safetensors", ".images.safetensors"):
            (folder / f"{stem}{suffix}").unlink(missing_ok=True)
        if pictures:
            save_tensors(folder / f"{stem}.safetensors", pictures)
        if save_images:
            save_tensors(folder / f"{stem}.images.safetensors", adversarial_images(survey, parsed))
        result.save(folder / f"{stem}.json")
        journal.close()
    return result


def _meet_attacks(
    survey: Survey,
    attacks: dict[str, Attack],
    search: SearchModel,
    radius: float,
    classes: int,
    seed: int,
    bar: EvaluationProgress,
) -> None:
    """Let those that stand meet one attack after another.

    The last one searches in float32 unless a precision is asked for: bfloat16 misses a few in a thousand images, and
    few are left to pay it. Not so Square, which takes thousands of steps and needs no exact slope.
    """
    for i, (title, attack) in enumerate(attacks.items()):
        ahead = sum(later.cost(classes) for later in list(attacks.values())[i:])
        bar.begin(title, survey.stands, ahead * survey.judge.draws)
        exact = i == len(attacks) - 1 and search.precision == "auto" and not isinstance(attack, Square)
        chosen = search.precise if exact else search
        survey.meet(f"{i}-{title}", title, attack, chosen, survey.stands, (seed, "evaluate", i), radius)
        bar.end(title, survey.stands)


def _meet_radii(
    survey: Survey, threat: LpBall, search: SearchModel, classes: int, seed: int, bar: EvaluationProgress
) -> None:
    """Let all meet PGD at other radii of the threat, for the curve."""
    for scale in CURVE_RADII:
        ball = dataclasses.replace(threat, radius=scale * threat.radius)
        probe, unbroken = PGD(ball, steps=20, objective=cw_margin), survey.least > ball.radius
        bar.begin(f"radius x{scale:g}", unbroken, probe.cost(classes))
        survey.meet(f"x{scale:g}", CURVE, probe, search, unbroken, (seed, "curve", repr(scale)), threat.radius)


def _checks(
    survey: Survey,
    network: nn.Module,
    threat: Threat,
    other: nn.Module | None,
    seed: int,
    bar: EvaluationProgress,
) -> tuple[Check, ...]:
    """The diagnosis on the first images that are classified correctly; none where none is."""
    if not survey.right.any():
        return ()

    def look(who: Tensor) -> tuple[Check, ...]:
        images, labels = survey.images(who), survey.labels[who]
        labels = labels.to(images.device)
        return diagnosis.diagnose(network, images, labels, threat, seed=seed, transfer=other, progress=bar)

    return next(survey.each_batch(survey.right.nonzero().squeeze(1)[: diagnosis.IMAGES], look))


def _gallery(rows: list[Row], survey: Survey) -> tuple[tuple[GalleryEntry, ...], dict[str, Tensor]]:
    """The first images that fell, with their pictures."""
    fallen = [row for row in rows if row.verdict == "falsified"][:GALLERY]
    entries = []
    for row in fallen:
        assert row.adversarial_prediction is not None and row.adversarial_confidence is not None
        entries.append(
            GalleryEntry(
                index=row.index,
                label=row.label,
                prediction=row.prediction,
                confidence=row.confidence,
                adversarial_prediction=row.adversarial_prediction,
                adversarial_confidence=row.adversarial_confidence,
            )
        )
    if not fallen:
        return (), {}
    indices = [row.index for row in fallen]
    images = survey.images(torch.tensor(indices)).cpu()
    return tuple(entries), {"images": images, "adversarials": torch.stack([survey.adversarial[k] for k in indices])}


def _curve(threat: LpBall, clean: Accuracy, least: Tensor) -> tuple[CurvePoint, ...]:
    """Accuracy at each radius: an image stands where no adversarial image as near as that is known."""
    radii = [0.0, *sorted(scale * threat.radius for scale in (*CURVE_RADII, 1.0))]
    standing = [clean.correct if radius == 0 else int((least > radius).sum()) for radius in radii]
    return tuple(
        CurvePoint(radius=radius, accuracy=Accuracy.of(correct, clean.samples))
        for radius, correct in zip(radii, standing, strict=True)
    )


def _stem(settings: dict[str, Any], *, diagnose: bool) -> str:
    """The name of the files; evaluations that differ in any setting that a user gives have files of their own."""
    parts = [settings["run"]] if settings["out"] else []
    parts += [settings[key] for key in ("attack", "threat", "samples", "checkpoint")]
    usual = {"data": settings["run_data"], "precision": "auto", "draws": DRAWS, "curve": True}
    usual |= {"input_mean": None, "input_std": None}
    parts += [f"{key}_{settings[key]}" for key, value in usual.items() if settings[key] != value]
    stem = "-".join(map(str, parts)) + f"-seed{settings['seed']}" + ("-diagnosed" if diagnose else "")
    return "".join(c if c.isalnum() or c in "-+." else "_" for c in stem)


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    """A digest of names and contents."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _threat(threat: str | Threat | None, subject: Subject) -> Threat:
    if isinstance(threat, Threat):
        return threat
    text = threat or subject.threat
    if text is None:
        raise UserError(f"{subject.name} does not say what it withstands; name the threat with --threat linf:8/255")
    return parse_threat(text)
