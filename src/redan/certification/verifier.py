"""Verdicts: certified, falsified or unknown, by a cascade from the cheap to the dear.

A few steps of an attack come first: what they break need not be proved. Bounds follow, each on those that the ones
before left open; the strong attack comes after the first bounds, as on what these settle it would be wasted. Last are
branch and bound and a mixed-integer solver, image by image, until the time is up.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from redan.attacks.apgd import TargetedAPGD
from redan.attacks.pgd import PGD
from redan.attacks.search import SearchModel
from redan.certification.alpha_crown import AlphaCrown
from redan.certification.branch_and_bound import BranchAndBound
from redan.certification.crown import Crown
from redan.certification.interval import Interval
from redan.certification.milp import minimise
from redan.certification.network import Network
from redan.certification.reduced import reduce
from redan.certification.regions import Bounds, Region, Specification
from redan.certification.rounding import SoundFloat, check_sound_float
from redan.certification.zonotope import Zonotope
from redan.errors import UserError, unknown
from redan.seeds import generator
from redan.threats import LpBall

# Stages of each method, in order.
METHODS: dict[str, tuple[str, ...]] = {
    "cascade": ("pgd", "interval", "crown", "apgd-t", "alpha-crown", "branch-and-bound", "milp"),
    "interval": ("pgd", "interval"),
    "zonotope": ("pgd", "zonotope"),
    "crown-ibp": ("pgd", "crown-ibp"),
    "crown": ("pgd", "crown"),
    "alpha-crown": ("pgd", "crown", "alpha-crown"),
    "branch-and-bound": ("pgd", "crown", "apgd-t", "alpha-crown", "branch-and-bound"),
    "milp": ("pgd", "crown", "apgd-t", "alpha-crown", "milp"),
}

# The stages that go image by image, last of all.
SEARCHES = ("branch-and-bound", "milp")

# Share of an image's time that branch and bound may take where a mixed-integer solver is still to come.
BRANCHING_SHARE = 0.2

# Open ReLUs times problems that branch and bound holds at once.
AT_ONCE = 2**15

# Open ReLUs of one image beyond which splitting them, or deciding them by a solver, is hopeless and fills the memory.
MOST_OPEN = 5000

LONGEST = 1e9  # seconds; beyond, solvers refuse

# Of APGD towards each class. Branch and bound tries the worst images of its bounds besides.
STRONG_STEPS = 30

Outcome = Literal["certified", "falsified", "unknown"]


@dataclass(frozen=True, eq=False)
class Verdict:
    """What became of one image.

    Attributes:
        outcome: what is known of it.
        by: the stage that settled it; of an unknown one the last that tried.
        margin: the best lower bound of its least margin; None where no bound was computed.
        seconds: that it took, its share of what was computed for many at once.
        counterexample: ``(*shape)`` float32, confirmed on the network itself; None unless falsified.
    """

    outcome: Outcome = "unknown"
    by: str | None = None
    margin: float | None = None
    seconds: float = 0.0
    counterexample: Tensor | None = None


class Question(Protocol):
    """What is asked of some images: regions, what is to be shown, how to refute it."""

    region: Region
    specification: Specification

    def attack(self, name: str, who: Tensor) -> Tensor:
        """Candidates ``(len(who), *shape)`` of an attack on the images at those places."""

    def refutes(self, candidates: Tensor, who: Tensor) -> Tensor:
        """Which float32 candidates are counterexamples to the images at those places, for certain: bool ``(k,)``."""


class Robustness:
    """The question whether a network keeps its label on all that a threat lets become of each image.

    Args:
        model: the network itself; float32, in evaluation mode.
        images: ``(n, c, h, w)`` in [0, 1], on its device.
        labels: ``(n,)`` int64, which it gives them.
        places: of the images in the test set, ``(n,)``.
        threat: the threat.
        classes: number of logits.
        seed: of the attacks.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        places: Tensor,
        threat: LpBall,
        *,
        classes: int,
        seed: int,
    ) -> None:
        self._search = SearchModel(model)
        self._images, self._labels, self._places, self._threat, self._seed = images, labels, places, threat, seed
        self.region = Region.around(images, threat)
        self.specification = Specification.robust(labels, classes)

    def attack(self, name: str, who: Tensor) -> Tensor:
        # What befalls an image must not depend on its company: the first attack draws nothing, the second for each.
        if name == "pgd":
            attack = PGD(self._threat, steps=10, start="image")
            return attack.run(self._search, self._images[who], self._labels[who], None).images
        found = []
        for i in who.tolist():
            draws = generator(self._seed, "certify", int(self._places[i]))
            alone = slice(i, i + 1)
            strong = TargetedAPGD(self._threat, steps=STRONG_STEPS)
            found.append(strong.run(self._search, self._images[alone], self._labels[alone], draws).images)
        return torch.cat(found)

    def refutes(self, candidates: Tensor, who: Tensor) -> Tensor:
        inside = self._threat.contains(candidates, self._images[who])
        return inside & self._search.broken(candidates, self._labels[who])


@dataclass(frozen=True)
class Verifier:
    """The cascade.

    Args:
        method: which stages, a key of ``METHODS``.
        timeout: seconds for one image in the stages that work image by image, above 0.
        sound: which rounding errors a certificate covers.
        threads: of the mixed-integer solver.

    Raises:
        UserError: for a method or mode that does not exist, or a timeout of 0 or less.
    """

    method: str = "cascade"
    timeout: float = 60.0
    sound: SoundFloat = "exact"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method of certification", self.method, METHODS)
        check_sound_float(self.sound)
        if not 0 < self.timeout <= LONGEST:
            raise UserError(f"--timeout is a number of seconds above 0 and at most {LONGEST:g}, got {self.timeout}")

    def __call__(
        self, network: Network, question: Question, *, told: Callable[[str, list[Verdict]], None] = lambda *_: None
    ) -> list[Verdict]:
        """Settle what can be settled.

        Args:
            network: the network as a graph, in float64, on the question's device.
            question: about ``n`` images.
            told: is called after each step of a stage with the stage's name and the verdicts so far.

        Returns:
            One verdict an image.
        """
        return _Course(self, network, question, told).run()


class _Course:
    """One batch on its way through the stages."""

    def __init__(
        self, verifier: Verifier, network: Network, question: Question, told: Callable[[str, list[Verdict]], None]
    ) -> None:
        self._verifier, self._question, self._told = verifier, question, told
        self._network, self._fast = network, network.to(torch.float32)
        self._verdicts = [Verdict() for _ in range(len(question.region))]
        self._bounds: dict[int, Bounds] = {}  # of each image still open, on its own

    def run(self) -> list[Verdict]:
        for stage in METHODS[self._verifier.method]:
            left = self._open()
            if not len(left):
                break
            if stage in ("pgd", "apgd-t"):
                self._attack(stage, left)
            elif stage in SEARCHES:
                break
            else:
                self._bound(stage, left)
            self._told(stage, self._verdicts)
        for i in self._open().tolist():
            for stage in [it for it in METHODS[self._verifier.method] if it in SEARCHES]:
                if self._verdicts[i].outcome == "unknown":
                    self._search(stage, i)
            self._told("search", self._verdicts)
        return self._verdicts

    def _open(self) -> Tensor:
        found = [i for i, it in enumerate(self._verdicts) if it.outcome == "unknown"]
        return torch.tensor(found, dtype=torch.int64, device=self._network.device)

    @contextmanager
    def _timed(self, who: list[int]) -> Iterator[None]:
        started = time.perf_counter()
        yield
        share = (time.perf_counter() - started) / len(who)
        for i in who:
            self._verdicts[i] = replace(self._verdicts[i], seconds=self._verdicts[i].seconds + share)

    def _attack(self, stage: str, who: Tensor) -> None:
        with self._timed(who.tolist()):
            candidates = self._question.attack(stage, who)
            self._refute(stage, candidates, who)

    def _refute(self, stage: str, candidates: Tensor, who: Tensor) -> Tensor:
        broken = self._question.refutes(candidates, who)
        for k in broken.nonzero().squeeze(1).tolist():
            i = int(who[k])
            if self._verdicts[i].outcome == "unknown":
                self._verdicts[i] = replace(
                    self._verdicts[i], outcome="falsified", by=stage, counterexample=candidates[k].cpu()
                )
        return broken

    def _bound(self, stage: str, who: Tensor) -> None:
        sound = self._verifier.sound
        bounders: dict[str, Interval | Zonotope | Crown | AlphaCrown] = {
            "interval": Interval(sound),
            "zonotope": Zonotope(iterations=30, sound=sound),
            "crown-ibp": Crown("interval", sound),
            "crown": Crown("crown", sound),
            "alpha-crown": AlphaCrown(until_shown=True, sound=sound),
        }
        with self._timed(who.tolist()):
            region, specification = self._question.region.part(who), self._question.specification.part(who)
            found = bounders[stage](self._fast, region, specification)
            shown = specification.shown(found.margins)
        worst = specification.worst(found.margins)
        for k, i in enumerate(who.tolist()):
            margin = max(float(worst[k]), self._verdicts[i].margin or -torch.inf)
            outcome: Outcome = "certified" if shown[k] else "unknown"
            self._verdicts[i] = replace(self._verdicts[i], outcome=outcome, by=stage, margin=margin)
            self._bounds[i] = Bounds(
                {j: (low[k : k + 1], high[k : k + 1]) for j, (low, high) in found.layers.items()},
                found.margins[k : k + 1],
            )

    def _search(self, stage: str, i: int) -> None:
        """Branch and bound, or a mixed-integer solver, on one image."""
        with self._timed([i]):
            alone = torch.tensor([i], device=self._network.device)
            question, bounds = self._question, self._bounds[i]
            region, specification = question.region.part(alone), question.specification.part(alone)
            # The groups of which no function is known to be above 0 everywhere.
            groups = [specification.groups == g for g in specification.groups.unique().tolist()]
            left = [it.nonzero().squeeze(1) for it in groups if not (bounds.margins[0][it] > 0).any()]
            method = self._branch if stage == "branch-and-bound" else self._solve
            shown = bounds.open <= MOST_OPEN and method(i, region, specification, bounds, left)
        verdict = replace(
            self._verdicts[i], by=stage if self._verdicts[i].outcome == "unknown" else self._verdicts[i].by
        )
        if shown and verdict.outcome == "unknown":
            verdict = replace(verdict, outcome="certified", margin=0.0)
        self._verdicts[i] = verdict

    def _branch(self, i: int, region: Region, specification: Specification, bounds: Bounds, left: list[Tensor]) -> bool:
        stages = METHODS[self._verifier.method]
        share = BRANCHING_SHARE if "milp" in stages else 1.0
        deadline = time.monotonic() + share * self._verifier.timeout

        def refuted(_: int, images: Tensor) -> bool:
            shape = self._network.input_shape
            candidates = images.view(-1, *shape).float().clamp(*region.inner())
            who = torch.full((len(candidates),), i, device=candidates.device)
            return bool(self._refute("branch-and-bound", candidates, who).any())

        # Problems side by side: as many as memory bears, with as many functions each.
        most = max(1, AT_ONCE // max(1, bounds.open))
        for count in sorted({len(rows) for rows in left}):
            some = [rows for rows in left if len(rows) == count]
            for k in range(0, len(some), most):
                part = some[k : k + most]
                problems = reduce(self._network, region, specification, bounds.layers, part, self._verifier.sound)
                verdicts, _, _ = BranchAndBound()(problems, deadline=deadline, refuted=refuted, together=True)
                if not all(it is True for it in verdicts):
                    return False
        return True

    def _solve(self, i: int, region: Region, specification: Specification, bounds: Bounds, left: list[Tensor]) -> bool:
        if region.ball is not None:
            return False
        deadline = time.monotonic() + self._verifier.timeout
        if "branch-and-bound" in METHODS[self._verifier.method]:
            deadline -= BRANCHING_SHARE * self._verifier.timeout
        network, region = self._network.to(device="cpu"), region.to(torch.float64, torch.device("cpu"))
        layers = {j: (low.cpu().double(), high.cpu().double()) for j, (low, high) in bounds.layers.items()}
        for rows in left:
            if not any(self._row(i, network, region, specification, layers, int(row), deadline) for row in rows):
                return False
        return True

    def _row(
        self,
        i: int,
        network: Network,
        region: Region,
        specification: Specification,
        layers: dict[int, tuple[Tensor, Tensor]],
        row: int,
        deadline: float,
    ) -> bool:
        seconds = deadline - time.monotonic()
        if seconds <= 0 or self._verdicts[i].outcome != "unknown":
            return False
        cpu = Specification(specification.weights.cpu(), specification.offsets.cpu(), specification.groups.cpu())
        found = minimise(
            network,
            region,
            cpu,
            layers,
            image=0,
            rows=[row],
            sound=self._verifier.sound,
            timeout=seconds,
            threads=self._verifier.threads,
        )
        for candidate in found.candidates:
            if candidate is not None:
                device = self._network.device
                image = candidate[None].float().clamp(*region.inner()).to(device)
                self._refute("milp", image, torch.tensor([i], device=device))
        return bool(found.lower[0] > 0)
