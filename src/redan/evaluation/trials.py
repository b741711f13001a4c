"""What a search for hyper-parameters tried, as its ``sweep.json`` keeps it."""

from typing import Any, ClassVar, Literal

from redan.evaluation.results import Accuracy, Frozen, ResultFile

TRIALS = "sweep.json"

State = Literal["complete", "pruned", "failed", "running", "waiting"]


class Trial(Frozen):
    """One choice of values, and what became of its run.

    Attributes:
        number: from 1, in the order in which the values were drawn.
        state: ``pruned`` trials were stopped early, ``waiting`` ones were interrupted and go on with the search.
        parameters: the values by dotted key of the recipe; empty where none are drawn yet.
        value: the accuracy of the run's shipped weights on held-out training images, clean of ``standard``, else
            robust (so far, where the state is not ``complete``), or their share that was certified.
        run: the run folder; empty where none is begun yet.
        epochs: done in training.
        seconds: that they took.
        error: why the trial failed.
    """

    number: int
    state: State
    parameters: dict[str, Any]
    value: Accuracy | None = None
    run: str
    epochs: int | None = None
    seconds: float | None = None
    error: str | None = None


class Trials(ResultFile):
    """A search: ``wanted`` trials to be finished, those that there are, and the command line that goes on.

    ``certify`` is the method that judged them, None where accuracy did.
    """

    kind: ClassVar[str] = "a search"

    redan_version: str
    command: str
    wanted: int
    certify: str | None = None
    trials: tuple[Trial, ...]

    @property
    def judge(self) -> str:
        """What the value of a trial is, in words."""
        return "validation accuracy" if self.certify is None else f"held-out images certified by {self.certify}"

    @property
    def finished(self) -> int:
        """How many are complete or pruned."""
        return sum(trial.state in ("complete", "pruned") for trial in self.trials)

    @property
    def best(self) -> Trial | None:
        """The complete trial of the greatest value, the earliest of several; None where none is complete yet."""
        complete = [trial for trial in self.trials if trial.state == "complete"]
        return max(complete, key=lambda trial: trial.value.value if trial.value else -1.0, default=None)
