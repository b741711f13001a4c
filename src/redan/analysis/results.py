"""What an analysis finds, kept in a run folder as ``analysis.json``, and of hard examples as ``difficulty.json``."""

from typing import Literal

from redan.evaluation.results import Accuracy, Frozen, ResultFile

ANALYSIS = "analysis.json"
DIFFICULTY = "difficulty.json"
AS_TRAINED = "as trained"  # the key of the conflict between the two parts of the loss


class Spread(Frozen):
    """A mean over ``n`` batches or images and their standard deviation."""

    mean: float
    deviation: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.deviation:.4f}"


class ConflictFound(Frozen):
    """Between classification and an invariance term, over training batches: see ``redan.methods.conflict``."""

    share: Spread
    cosine: Spread


class BranchFound(Frozen):
    """The network with one branch of BatchNorm, on test images as they are and attacked by PGD on that branch.

    ``cosine`` and ``distance`` (Euclidean) compare the last linear layer's input of each image before and after.
    """

    clean: Accuracy
    robust: Accuracy
    cosine: Spread
    distance: Spread


class NormGap(Frozen):
    """How the running statistics of the two branches differ at one layer, the mean over its channels.

    ``mean`` is |mu_adv - mu_clean| / sigma_clean, ``scale`` is |log(sigma_adv / sigma_clean)|.
    """

    layer: str
    mean: float
    scale: float


class Analysis(ResultFile):
    """The result of ``redan analyse``.

    ``conflicts`` is empty where the loss has one part; its keys are ``as trained`` and, for AR-AT, the two halves of
    the distance without a predictor, ``towards clean`` and ``towards adversarial``. ``branches`` and ``norm_gaps`` are
    of a split network; one that is not has the one branch ``shared`` and no gaps. ``shipped`` names the branch that is
    deployed, where the file says so. All is of the last weights; branches and gaps of their average, if it is shipped.
    """

    kind = "an analysis"

    redan_version: str
    run: str
    checkpoint: str = "last"
    method: str
    threat: str
    attack: str
    seed: int
    batches: int
    batch_size: int
    samples: int
    conflicts: dict[str, ConflictFound]
    branches: dict[str, BranchFound]
    shipped: str = ""
    norm_gaps: tuple[NormGap, ...]
    seconds: float


class Correlations(Frozen):
    """Spearman's rank correlation of each measure of difficulty with each, on the examples that both know.

    ``spearman[i][j]`` is of ``names[i]`` with ``names[j]``, None where fewer than two examples are known to both or one
    of the two has the same value for all. ``examples[i][j]`` is how many both know: runs whose seeds draw subsets of
    their own share few. It is empty in files from before it was counted.
    """

    names: tuple[str, ...]
    spearman: tuple[tuple[float | None, ...], ...]
    examples: tuple[tuple[int, ...], ...] = ()


class GrowthPoint(Frozen):
    """Mean difficulty of the easiest and the hardest decile and of all examples, in ``run`` at ``radius``.

    ``easiest_loss`` and ``hardest_loss`` are the means of -log p_y, which does not end at 1 as difficulty does; None
    where difficulty is a mean over epochs.
    """

    run: str
    radius: float
    easiest: float
    hardest: float
    mean: float
    easiest_loss: float | None = None
    hardest_loss: float | None = None


class Growth(Frozen):
    """How difficulty rises with the radius.

    Deciles are by the mean over all points, so that no point chose them; an example keeps its decile at every point.
    ``measure`` says which difficulty it is.
    """

    measure: str
    examples: int
    points: tuple[GrowthPoint, ...]


class Fitted(Frozen):
    """A group of training examples: what share of them training got right, in an epoch ``before`` and at the end."""

    group: str
    examples: int
    before: float | None
    after: float | None

    @property
    def jump(self) -> float | None:
        """The rise, or None where one of the two epochs saw nobody of the group."""
        return None if self.before is None or self.after is None else self.after - self.before


class Memorisation(Frozen):
    """Training accuracy by difficulty before the first drop of the learning rate and in the last epoch.

    Epochs count from 1. The deciles are of the examples with right labels, the easiest first, by mean confidence over
    the epochs before epoch ``before``; the epochs compared chose nothing. The last group are the wrong labels, if any.
    """

    before: int
    after: int
    groups: tuple[Fitted, ...]


class DifficultEntry(Frozen):
    """One picture of the gallery: an example at ``position`` in the data set's training images.

    ``label`` is the one trained with, ``wrong_label`` whether it is not the data set's; ``difficulty`` is the mean over
    the radii.
    """

    position: int
    label: int
    wrong_label: bool
    end: Literal["hardest", "easiest"]
    difficulty: float


class Difficulty(ResultFile):
    """The result of ``redan analyse --difficulty``, beside ``difficulty.safetensors`` with its numbers an example.

    ``growth`` is over the radius of the attack on the last weights, ``training_growth`` over the radius that runs were
    trained with; it, like ``memorisation``, is None where the runs do not have what it needs, which ``missing`` says.
    """

    kind = "a study of difficulty"

    redan_version: str
    run: str
    against: tuple[str, ...]
    method: str
    threat: str
    attack: str
    seed: int
    samples: int
    class_names: tuple[str, ...]
    correlations: Correlations
    growth: Growth
    training_growth: Growth | None
    memorisation: Memorisation | None
    gallery: tuple[DifficultEntry, ...]
    missing: tuple[str, ...]
    seconds: float
