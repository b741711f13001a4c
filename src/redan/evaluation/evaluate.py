"""Accuracy, clean and under attack: the upper side of the bracket.

Each image is classified clean; who is right meets the attacks one after another while it stands; who falls is checked
again in float32, in evaluation mode and inside the exact threat; one row an image.
"""

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from redan.attacks.base import Attack
from redan.attacks.search import Precision
from redan.certification.verifier import Verifier
from redan.data.pipeline import center_crop, to_float
from redan.data.registry import load_dataset
from redan.errors import UserError
from redan.evaluation import diagnose as diagnosis
from redan.evaluation import randomness
from redan.evaluation.bracket import bracket
from redan.evaluation.certify import certify as run_certification
from redan.evaluation.certify import graph_of
from redan.evaluation.journal import Journal
from redan.evaluation.kept import DRAWS, Kept, fingerprint
from redan.evaluation.pictures import adversarial_images, gallery, on_the_way
from redan.evaluation.progress import EvaluationProgress
from redan.evaluation.protocol import default_protocol, parse_protocol, purification_steps
from redan.evaluation.purification import OBLIVIOUS, at_known_draw, describe, transform_facts, views
from redan.evaluation.results import CERTIFICATES, Accuracy, ConvergencePoint, CurvePoint, Evaluation, Randomised, Row
from redan.evaluation.stages import CURVE, CURVE_RADII, Stages
from redan.evaluation.subject import asked_threat, find_subject, normalised
from redan.evaluation.survey import Survey
from redan.models.purified import Purified
from redan.run import Checkpoint
from redan.seeds import derive_seed, generator
from redan.spatial import Flow
from redan.threats import LpBall, Threat
from redan.version import __version__


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
    convergence: bool = True,
    diagnose: bool = False,
    transfer: str | Path | nn.Module | None = None,
    data: str | None = None,
    data_dir: str | Path | None = None,
    input_mean: Sequence[float] | None = None,
    input_std: Sequence[float] | None = None,
    out: str | Path | None = None,
    save_images: bool = False,
    certify: bool = False,
    timeout: float = 60.0,
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
        convergence: of the protocol ``purification`` on a network that draws at random, within an Lp threat: also find
            the accuracy against PGD's steps and draws.
        diagnose: also look for gradient masking, see ``redan.evaluation.diagnose``; for Lp threats.
        transfer: with ``diagnose``: another run, or as ``run`` has it, whose adversarial images are tried on this one.
        data: the data set; the run's own if None.
        data_dir: the folder of data sets.
        input_mean: for a network without its normalisation, subtracted from the images.
        input_std: likewise, divided by.
        out: folder of the results; a run's own ``results/`` if None. Without either nothing is written.
        save_images: keep the adversarial images, exact and rounded to 8 bits, beside the result.
        certify: also prove what can be proved, by ``redan.certify``'s cascade; for Lp threats, and networks that draw
            nothing. ``resume`` then goes on where either of the two was stopped.
        timeout: seconds for each image that bounds leave open, of ``certify``.
        resume: go on with the unfinished evaluation of the same settings; None does so if there is one, gives the
            finished one if there is that, and starts otherwise.
        progress: show it on standard error.

    Returns:
        The evaluation.

    Raises:
        UserError: for a mistake in any of these.
    """
    subject = find_subject(run, checkpoint)
    network = normalised(subject.network, input_mean, input_std)
    parsed = asked_threat(threat, subject)
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
    if certify:
        LpBall.require(parsed, "--certify")
        Verifier(timeout=timeout)
        resume = None if resume else resume
    folder = Path(out) if out is not None else subject.folder / "results" if subject.folder is not None else None
    if folder is None and (save_images or resume):
        raise UserError("nothing says where to keep the results; name a folder with --out")
    parse_protocol(attack, parsed, classes=10)  # a misspelt one is told before the data are loaded
    dataset = load_dataset(name, Path(data_dir) if data_dir is not None else None)
    count, classes = len(dataset.test) if samples is None else samples, len(dataset.class_names)
    if not 1 <= count <= len(dataset.test):
        raise UserError(f"--samples is between 1 and {len(dataset.test)} for {name}, got {samples}")

    if certify:  # what cannot be certified is told before hours of attacks
        first = to_float(dataset.test.images[:1])
        shape = (first if subject.size is None else center_crop(first, subject.size)).shape[1:]
        graph_of(network, tuple(shape), classes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    other = None if transfer is None else find_subject(transfer, "best").network.to(device)
    started = time.perf_counter()
    settings = {
        "threat": str(parsed),
        "attack": attack,
        # What the name stands for: another version of redan may attack otherwise under the same one.
        "protocol": [repr(parse_protocol(attack, parsed, classes=classes, random=it)) for it in (False, True)],
        "samples": count,
        "seed": seed,
        "checkpoint": checkpoint if subject.folder is not None else "-",
        "precision": precision,
        "data": name,
        "run": subject.name,
        "run_data": subject.data,
        "out": out is not None,
        "draws": draws,
        "transform": transform_facts(network),
        "curve": curve,
        "convergence": convergence or purification_steps(attack) is None or not isinstance(parsed, LpBall),
        "input_mean": input_mean and list(input_mean),
        "input_std": input_std and list(input_std),
        "weights": fingerprint(dict([*network.named_parameters(), *network.named_buffers()])),
        "images": fingerprint({"labels": dataset.test.labels[:count], "first": dataset.test.images[:8]}),
    }
    kept = Kept(folder, settings, diagnose=diagnose)

    def bracketed(result: Evaluation) -> Evaluation:
        if not certify or result.certified_timeout == timeout:
            return result
        certificates = run_certification(
            run,
            threat=parsed,
            samples=count,
            timeout=timeout,
            seed=seed,
            checkpoint=checkpoint,
            curve=curve,
            data=name,
            data_dir=data_dir,
            input_mean=input_mean,
            input_std=input_std,
            out=None if out is None else Path(out) / CERTIFICATES,
            resume=resume,
            progress=progress,
        )
        whole = bracket(result, certificates)
        kept.update(whole)
        return whole

    if resume is None and (finished := kept.finished(with_images=save_images)) is not None:
        return bracketed(finished)
    journal = Journal(kept.partial, settings, resume=resume)
    with (
        journal.kept_when_stopped(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        EvaluationProgress(show=progress) as bar,
    ):
        torch.manual_seed(derive_seed(seed, "evaluate"))
        stages = Stages(
            network, parsed, dataset.test, count, subject.size, classes, draws, seed, precision, journal, bar
        )
        survey = stages.survey()
        if other is not None:
            diagnosis.require_fitting(other, survey.images(torch.tensor([0])), classes)
        found = _attacked(stages, survey, attack, subject.name, curve=curve, convergence=convergence)
        checks = stages.check(survey, other) if diagnose else ()
        rows = survey.rows(measured=isinstance(parsed, LpBall))
        entries, pictures = gallery(rows, survey)
        if pictures:
            pictures |= on_the_way(network, pictures["adversarials"], generator(seed, "gallery"))
        images = adversarial_images(survey, parsed) if save_images else None
    result = Evaluation(
        redan_version=__version__,
        run=subject.name,
        checkpoint=settings["checkpoint"],
        dataset=name,
        class_names=dataset.class_names,
        threat=str(parsed),
        attack=attack,
        seed=seed,
        precision=precision,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        samples=count,
        clean=found.clean,
        robust=found.robust,
        clean_accuracy=found.clean.value,
        robust_accuracy=found.robust.value,
        attacks=_standing_after(found.titles, rows) if found.randomised is None else found.randomised.after,
        transferred=found.transferred,
        seconds=round(time.perf_counter() - started + survey.earlier_seconds, 3),
        model_calls=sum(row.model_calls for row in rows),
        randomised=found.randomised,
        diagnostics=checks,
        curve=found.curve,
        convergence=found.convergence,
        account=found.account,
        fingerprint=kept.fingerprint,
        gallery=entries,
        per_image=tuple(rows),
    )
    kept.keep(result, pictures, images)
    journal.close()
    return bracketed(result)


class _Found(NamedTuple):
    """What the attacks left: fields of ``Evaluation``, and the names of what images may have fallen to."""

    clean: Accuracy
    robust: Accuracy
    titles: tuple[str, ...]
    transferred: Accuracy | None
    randomised: Randomised | None
    curve: tuple[CurvePoint, ...]
    convergence: tuple[ConvergencePoint, ...]
    account: str


def _attacked(stages: Stages, survey: Survey, protocol: str, name: str, *, curve: bool, convergence: bool) -> _Found:
    """Let the images meet what the protocol says; ``name`` is the network's, for messages."""
    network, threat, draws = stages.network, stages.threat, survey.judge.draws
    attacks = parse_protocol(protocol, threat, classes=stages.classes, random=survey.random)
    steps, seen = purification_steps(protocol), {}
    if steps is not None:
        seen = views(network)
        attacks = {title: attack for title, attack in attacks.items() if title in seen or title not in OBLIVIOUS}
    if survey.random:
        warnings.warn(
            f"{name} draws at random: every gradient and verdict is over {draws} draws, by "
            f"{' and '.join(attacks)}, and accuracy is counted by four rules",
            stacklevel=3,
        )
    after, transferred = stages.meet(survey, attacks, seen)
    ball = threat if isinstance(threat, LpBall) else None
    titles = tuple(attacks)

    def account(known: Mapping[str, Attack], studied: int) -> str:
        if steps is None:
            return ""
        return describe(attacks, known, threat, seen=seen, steps=steps, draws=draws, studied=studied)

    if not survey.random:
        if curve and ball is not None:
            stages.meet_radii(survey, ball)
            titles = (*titles, CURVE)
        clean, robust = (Accuracy.of(int(who.sum()), stages.count) for who in (survey.right, survey.stands))
        points = _curve(ball, clean, survey.least) if curve and ball is not None else ()
        return _Found(clean, robust, titles, transferred, None, points, (), account({}, 0))
    study: tuple[ConvergencePoint, ...] = ()
    if steps is not None and ball is not None and convergence:
        study = stages.converge(survey, ball, steps)
    known, aware = None, randomness.at_fixed_draw(threat)
    if steps is not None and isinstance(network, Purified):
        assert isinstance(threat, LpBall | Flow)  # the protocol takes no other
        aware = at_known_draw(threat, steps, stages.classes)
        known = stages.known_draw(survey, network, aware)
    counts = randomness.count(survey, network, threat, draws, derive_seed(stages.seed, "fixed"), known)
    randomised = Randomised(draws=draws, clean=counts[0], robust=counts[1], after=after)
    said = account(aware, study[0].accuracy.samples if study else 0)
    return _Found(randomised.clean.mean, randomised.robust.mean, titles, transferred, randomised, (), study, said)


def _standing_after(attacks: Iterable[str], rows: list[Row]) -> dict[str, float]:
    """Share of the images that are right and have not fallen after each attack."""
    standing, after = sum(row.verdict != "misclassified" for row in rows), {}
    for title in attacks:
        standing -= sum(row.verdict == "falsified" and row.by == title for row in rows)
        after[title] = standing / len(rows)
    return after


def _curve(threat: LpBall, clean: Accuracy, least: Tensor) -> tuple[CurvePoint, ...]:
    """Accuracy at each radius: an image stands where no adversarial image as near as that is known."""
    radii = [0.0, *sorted(scale * threat.radius for scale in (*CURVE_RADII, 1.0))]
    standing = [clean.correct if radius == 0 else int((least > radius).sum()) for radius in radii]
    return tuple(
        CurvePoint(radius=radius, accuracy=Accuracy.of(correct, clean.samples))
        for radius, correct in zip(radii, standing, strict=True)
    )
