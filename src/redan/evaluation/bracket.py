"""The bracket: what was certified and what was falsified, on the same images."""

from redan.evaluation.results import Accuracy, Certificates, Evaluation, Row

# What images fell to that no attack had broken.
VERIFIER = "verifier"


class Contradiction(Exception):
    """An image is both certified and falsified: redan is wrong, and no number of it may be believed."""


def bracket(evaluation: Evaluation, certificates: Certificates) -> Evaluation:
    """The evaluation with its lower side: certified, and robust less what the verifier refuted, too.

    Args:
        evaluation: of a network that draws nothing, within an Lp threat.
        certificates: of the same images.

    Raises:
        Contradiction: where an image is certified and has an adversarial example.
    """
    found = {row.index: row for row in certificates.per_image}
    rows = []
    for row in evaluation.per_image:
        proof = found[row.index]
        if proof.verdict == "certified" and row.verdict != "unknown":
            raise Contradiction(
                f"image {row.index} of {evaluation.dataset} is certified by {proof.by} and {row.verdict}"
                f"{f' by {row.by}' if row.by else ''} within {evaluation.threat}; please report this"
            )
        if row.verdict == "unknown" and proof.verdict in ("certified", "falsified"):
            by = row.by if proof.verdict == "certified" else VERIFIER
            row = Row.model_validate({**row.model_dump(), "verdict": proof.verdict, "by": by})
        rows.append(row)
    fallen = sum(row.verdict == "falsified" and row.by == VERIFIER for row in rows)
    robust = Accuracy.of(evaluation.robust.correct - fallen, evaluation.samples)
    return evaluation.model_copy(
        update={
            "robust": robust,
            "robust_accuracy": robust.value,
            "certified": certificates.proved,
            "certified_accuracy": certificates.certified_accuracy,
            "certified_curve": certificates.curve,
            "certified_timeout": certificates.timeout,
            "certified_sound_float": certificates.sound_float,
            "attacks": {**evaluation.attacks, VERIFIER: robust.value} if fallen else evaluation.attacks,
            "seconds": round(evaluation.seconds + certificates.seconds, 3),
            "per_image": tuple(rows),
        }
    )
