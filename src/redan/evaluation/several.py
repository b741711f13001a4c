"""One network within several threats."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from redan.evaluation import diagnose as diagnosis
from redan.evaluation.evaluate import evaluate
from redan.evaluation.protocol import default_protocol, parse_protocol, purification_steps
from redan.evaluation.purification import THREATS
from redan.evaluation.results import Evaluation
from redan.evaluation.subject import asked_threat, find_subject
from redan.run import Checkpoint
from redan.threats import parse_threat


def evaluate_within(
    run: str | Path | nn.Module,
    threats: Sequence[str],
    *,
    attack: str | None = None,
    checkpoint: Checkpoint = "best",
    diagnose: bool = False,
    resume: bool = False,
    **options: Any,
) -> list[Evaluation]:
    """Evaluate a network within each of the threats, one result each.

    Convergence is studied within the threat that the run was trained with, or the only one.

    Args:
        run: see ``evaluate``, as of all that is not said here.
        threats: such as ``linf:8/255``; if there is none the run's own, and for the protocol ``purification`` those of
            ``THREATS`` behind it.
        attack: likewise.
        checkpoint: likewise.
        diagnose: likewise.
        resume: of one threat, go on where an earlier evaluation was stopped. Several go on in any case, and take
            finished results of the same settings as they are: the natural second try must not repeat hours of work.
        options: of ``evaluate``.

    Raises:
        UserError: for a mistake in any of these; one in the threats or the attack before the first evaluation starts.
    """
    subject = find_subject(run, checkpoint)
    own = None if subject.threat is None else parse_threat(subject.threat)
    asked = [parse_threat(text) for text in threats]
    if not asked and attack is not None and purification_steps(attack) is not None:
        asked = ([] if own is None else [own]) + [parse_threat(text) for text in THREATS]
    asked = list(dict.fromkeys(asked)) or [asked_threat(None, subject)]
    for threat in asked:
        parse_protocol(attack or default_protocol(threat), threat, classes=10)
        if diagnose:
            diagnosis.require_ball(threat)
    alone = len(asked) == 1
    return [
        evaluate(
            run,
            threat=threat,
            attack=attack,
            checkpoint=checkpoint,
            diagnose=diagnose,
            convergence=alone or threat == own,
            resume=resume if alone else None,
            **options,
        )
        for threat in asked
    ]
