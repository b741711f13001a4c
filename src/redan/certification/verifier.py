"""Verdicts: certified, falsified or unknown, by a cascade from the cheap to the dear.

A few steps of an attack come first: what they break need not be proved. Bounds follow, each on those that the ones
before left open; the strong attack comes after the first bounds, as on what these settle it would be wasted. Last are
searches, image by image, until the time is up: input splitting where there are few inputs, branch and bound on ReLUs, a
mixed-integer solver; in COLT's certificate, slopes learned for the margins, then its programs.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from redan.attacks.apgd import TargetedAPGD
from redan.attacks.objectives import best_targeted
from redan.attacks.pgd import PGD
from redan.attacks.search import SearchModel
from redan.certification.alpha_crown import AlphaCrown
from redan.certification.branch_and_bound import BranchAndBound
from redan.certification.colt import ITERATIONS, TRIES, LateMilp
from redan.certification.crown import Crown
from redan.certification.input_split import InputSplit
from redan.certification.interval import Interval
from redan.certification.memory import keep_freed_memory
from redan.certification.milp import minimise
from redan.certification.network import Network
from redan.certification.reduced import reduce, stack
from redan.certification.regions import Bounds, Region, Specification
from redan.certification.rounding import SoundFloat, check_sound_float
from redan.certification.solvers import Solver, choose
from redan.certification.zonotope import Zonotope
from redan.errors import UserError, unknown
from redan.seeds import generator
from redan.threats import LpBall

# Stages of each method, in order.
METHODS: dict[str, tuple[str, ...]] = {
    "cascade": ("pgd", "interval", "crown", "apgd-t", "alpha-crown", "input-split", "branch-and-bound", "milp"),
    "interval": ("pgd", "interval"),
    "zonotope": ("pgd", "zonotope"),
    "learned-zonotope": ("pgd", "zonotope", "learned-zonotope"),
    "crown-ibp": ("pgd", "crown-ibp"),
    "crown": ("pgd", "crown"),
    "alpha-crown": ("pgd", "crown", "alpha-crown"),
    "input-split": ("pgd", "crown", "apgd-t", "input-split"),
    "branch-and-bound": ("pgd", "crown", "apgd-t", "alpha-crown", "branch-and-bound"),
    "milp": ("pgd", "crown", "apgd-t", "alpha-crown", "milp"),
    "colt": ("pgd", "zonotope", "apgd-t", "learned-zonotope", "colt"),
    "colt-8": ("pgd", "zonotope", "apgd-t", "learned-zonotope", "colt"),
}

# The stages that go image by image, last of all.
SEARCHES = ("learned-zonotope", "input-split", "branch-and-bound", "milp", "colt")

# Those that need a network whose only bends are ReLUs'.
OF_RELUS = ("branch-and-bound", "milp", "colt", "colt-8")

# Share of an image's time that a search may take where another is still to come.
SHARES = {"learned-zonotope": 0.4, "input-split": 0.4, "branch-and-bound": 0.2}

# Inputs up to which they are split: of trained networks with 120 ReLUs, splitting inputs took less than a tenth of what
# splitting ReLUs took with 3 to 8 inputs; with 10 neither was done in time, and with 12 ReLUs were better.
FEW_INPUTS = 10

# Inputs beyond which splitting them is refused even where it is asked for by name.
MOST_INPUTS = 64

# Open ReLUs times problems that branch and bound holds at once.
AT_ONCE = 2**15

# Open ReLUs of one image beyond which splitting them, or deciding them by a solver, is hopeless and fills the memory.
MOST_OPEN = {"branch-and-bound": 5000, "milp": 1000}

# Beyond as many, alpha-CROWN optimises the specification alone, not also the bounds of every open ReLU.
MANY_OPEN = 1000

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
        self._classes = classes
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
            strong = TargetedAPGD(self._threat, STRONG_STEPS, best_targeted(self._classes))
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
        solver: of the mixed-integer programs, see ``solvers.solve``.

    Raises:
        UserError: for a method or mode that does not exist, a solver that is not installed, or a timeout of 0 or less.
    """

    method: str = "cascade"
    timeout: float = 60.0
    sound: SoundFloat = "exact"
    threads: int = 1
    solver: Solver = "auto"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method of certification", self.method, METHODS)
        check_sound_float(self.sound)
        choose(self.solver)
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

        Raises:
            UserError: where a search is asked for by name that the network is not made for: input splitting with too
                many inputs, those on ReLUs with sigmoids.
        """
        keep_freed_memory()
        inputs = torch.Size(network.input_shape).numel()
        if self.method == "input-split" and inputs > MOST_INPUTS:
            raise UserError(f"input-split is for networks of at most {MOST_INPUTS} inputs; this one has {inputs}")
        if self.method in OF_RELUS and network.curved:
            raise UserError(
                f"{self.method} is for networks of ReLUs, and this one has a sigmoid or tanh: cascade, alpha-crown, "
                "crown, zonotope and interval bound it"
            )
        return _Course(self, network, question, told).run()


def side_by_side(device: torch.device) -> bool:
    """Whether several images are branched on together: on a CPU that took 1.3 times as long as one by one."""
    return device.type != "cpu"


@dataclass(frozen=True)
class _Job:
    """Problems of one image for branch and bound, with as many functions and open ReLUs each."""

    image: int
    functions: int
    open: int
    rows: list[Tensor]


class _Course:
    """One batch on its way through the stages."""

    def __init__(
        self, verifier: Verifier, network: Network, question: Question, told: Callable[[str, list[Verdict]], None]
    ) -> None:
        self._verifier, self._question, self._told = verifier, question, told
        self._network, self._fast = network, network.to(torch.float32)
        self._verdicts = [Verdict() for _ in range(len(question.region))]
        self._bounds: dict[int, Bounds] = {}  # of each image still open, on its own
        few = verifier.method == "input-split" or torch.Size(network.input_shape).numel() <= FEW_INPUTS
        stages = METHODS[verifier.method]
        self._searches = [it for it in stages if it in SEARCHES and (few or it != "input-split")]
        if network.curved:
            self._searches = [it for it in self._searches if it not in OF_RELUS]
        self._left = [verifier.timeout] * len(self._verdicts)  # seconds for searches

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
        for stage in self._searches:
            if stage == "branch-and-bound":
                self._branch()
                continue
            for i in self._open().tolist():
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
        bounders: dict[str, Interval | Zonotope | Crown] = {
            "interval": Interval(sound),
            "zonotope": Zonotope(sound=sound),
            "crown-ibp": Crown("interval", sound),
            "crown": Crown("crown", sound),
        }
        with self._timed(who.tolist()):
            region, specification = self._question.region.part(who), self._question.specification.part(who)
            if stage == "alpha-crown":  # after "crown" in every method
                found = self._optimise(region, specification, [self._bounds[i] for i in who.tolist()])
            else:
                found = bounders[stage](self._fast, region, specification)
            shown = specification.shown(found.margins)
        worst = specification.worst(found.margins)
        for k, i in enumerate(who.tolist()):
            outcome: Outcome = "certified" if shown[k] else "unknown"
            self._verdicts[i] = replace(self._verdicts[i], outcome=outcome, by=stage)
            self._know(i, found.part(k), float(worst[k]))

    def _know(self, i: int, bounds: Bounds, worst: float) -> None:
        """Keep an image's bounds, and its least margin if it is the best so far."""
        known = self._verdicts[i].margin
        self._verdicts[i] = replace(self._verdicts[i], margin=worst if known is None else max(worst, known))
        self._bounds[i] = bounds

    def _optimise(self, region: Region, specification: Specification, crown: list[Bounds]) -> Bounds:
        """alpha-CROWN from CROWN's bounds of each image, by the kind that its open ReLUs allow."""
        many = torch.tensor([it.open > MANY_OPEN for it in crown])
        found: dict[int, Bounds] = {}
        kinds: dict[Literal["alpha-crown", "crown"], Tensor] = {"alpha-crown": ~many, "crown": many}
        for kind, which in kinds.items():
            places = which.nonzero().squeeze(1)
            if len(places):
                method = AlphaCrown(until_shown=True, intermediate=kind, sound=self._verifier.sound)
                start = Bounds.join([crown[k] for k in places.tolist()])
                part = method(self._fast, region.part(places), specification.part(places), start)
                found |= {k: part.part(j) for j, k in enumerate(places.tolist())}
        return Bounds.join([found[k] for k in range(len(crown))])

    def _seconds(self, stage: str, i: int) -> float:
        """That a search may take for an image: all that is left where it is the last that comes into question."""
        count = self._bounds[i].open
        last = [it for it in self._searches if count <= MOST_OPEN.get(it, count)][-1:]
        return self._left[i] if [stage] == last else SHARES[stage] * self._verifier.timeout

    def _took(self, i: int, seconds: float) -> None:
        self._left[i] -= seconds
        self._verdicts[i] = replace(self._verdicts[i], seconds=self._verdicts[i].seconds + seconds)

    def _search(self, stage: str, i: int) -> None:
        """A search on one image."""
        self._verdicts[i] = replace(self._verdicts[i], by=stage)
        if self._bounds[i].open > MOST_OPEN.get(stage, torch.inf):
            return
        started = time.monotonic()
        searches = {"learned-zonotope": self._learn, "input-split": self._split, "milp": self._solve}
        if (searches | {"colt": self._solve_late})[stage](i, started + self._seconds(stage, i)):
            self._certify(i)
        self._took(i, time.monotonic() - started)

    def _certify(self, i: int) -> None:
        if self._verdicts[i].outcome == "unknown":
            margin = max(self._verdicts[i].margin or 0.0, 0.0)
            self._verdicts[i] = replace(self._verdicts[i], outcome="certified", margin=margin)

    def _part(self, i: int) -> tuple[Region, Specification]:
        alone = slice(i, i + 1)
        return self._question.region.part(alone), self._question.specification.part(alone)

    def _groups(self, i: int) -> list[Tensor]:
        """The functions of each group of which none is known to be above 0 everywhere."""
        return self._part(i)[1].left(self._bounds[i].margins[0])

    def _on_cpu(self, i: int) -> tuple[Network, Region, Specification]:
        """What solvers are asked about: the network and one image's problem, in float64 on the CPU."""
        cpu = torch.device("cpu")
        region, specification = self._part(i)
        return self._network.to(device=cpu), region.to(torch.float64, cpu), specification.to(cpu)

    def _found(self, stage: str, i: int, images: Tensor) -> bool:
        """Whether one of some images ``(k, d)`` float64, brought into the i-th region, is a counterexample."""
        region, _ = self._part(i)
        images = images.to(self._network.device).view(-1, *self._network.input_shape)
        candidates = images.float().clamp(*region.inner())
        who = torch.full((len(candidates),), i, device=candidates.device)
        return bool(self._refute(stage, candidates, who).any())

    def _split(self, i: int, deadline: float) -> bool:
        def refuted(images: Tensor) -> bool:
            return self._found("input-split", i, images)

        search = InputSplit(sound=self._verifier.sound)
        return search(self._network, *self._part(i), deadline=deadline, refuted=refuted)[0] is True

    def _learn(self, i: int, deadline: float) -> bool:
        """A zonotope whose slopes are learned."""
        region, specification = self._part(i)
        bounder = Zonotope(ITERATIONS, sound=self._verifier.sound, deadline=deadline)
        found = bounder(self._network, region, specification)
        self._know(i, found, float(specification.worst(found.margins)))
        return bool(specification.shown(found.margins))

    def _solve_late(self, i: int, deadline: float) -> bool:
        """The programs of COLT's certificate."""
        network, region, specification = self._on_cpu(i)
        if region.ball is not None:
            return False
        verifier = self._verifier
        return LateMilp(TRIES[verifier.method], verifier.sound, verifier.solver, verifier.threads)(
            network,
            region,
            specification,
            self._bounds[i],
            deadline=deadline,
            tried=lambda image: self._found("colt", i, image[None]),
        )

    def _branch(self) -> None:
        """Branch and bound on all images that are left."""
        for i in self._open().tolist():
            self._verdicts[i] = replace(self._verdicts[i], by="branch-and-bound")
        jobs = sorted(self._jobs(), key=lambda it: (it.functions, it.open, it.image))
        left, lost = Counter(it.image for it in jobs), set[int]()
        while jobs:
            pack: list[_Job] = []
            while jobs and (not pack or self._fits(pack, jobs[0])):
                pack.append(jobs.pop(0))
            pack = [it for it in pack if it.image not in lost]
            if not pack:
                continue
            verdicts = self._bound_together(pack)
            for job in pack:
                left[job.image] -= 1
                if not verdicts[job.image]:
                    lost.add(job.image)
                elif not left[job.image]:
                    self._certify(job.image)
            self._told("search", self._verdicts)

    def _jobs(self) -> Iterator["_Job"]:
        for i in self._open().tolist():
            count, groups = self._bounds[i].open, self._groups(i)
            if count > MOST_OPEN["branch-and-bound"]:
                continue
            most = max(1, AT_ONCE // max(1, count))
            for functions in sorted({len(rows) for rows in groups}):
                some = [rows for rows in groups if len(rows) == functions]
                for k in range(0, len(some), most):
                    yield _Job(i, functions, count, some[k : k + most])

    def _fits(self, pack: list["_Job"], job: "_Job") -> bool:
        """Whether one more image's problems come with the others."""
        problems = sum(len(it.rows) for it in [*pack, job])
        alike = job.functions == pack[0].functions and job.image not in {it.image for it in pack}
        return side_by_side(self._network.device) and alike and problems * max(1, job.open) <= AT_ONCE

    def _bound_together(self, pack: list["_Job"]) -> dict[int, bool]:
        """Which images' problems were all shown."""
        started = time.monotonic()
        seconds = {it.image: self._seconds("branch-and-bound", it.image) for it in pack}
        sound, layers = self._verifier.sound, {it.image: self._bounds[it.image].layers for it in pack}
        problems = [reduce(self._network, *self._part(it.image), layers[it.image], it.rows, sound) for it in pack]
        owners = [it.image for it in pack for _ in it.rows]
        preparing = (time.monotonic() - started) / len(pack)
        verdicts, _, _, spent = BranchAndBound()(
            stack(problems),
            owners=owners,
            seconds={i: it - preparing for i, it in seconds.items()},
            refuted=lambda k, images: self._found("branch-and-bound", owners[k], images),
        )
        for i in spent:
            self._took(i, preparing + spent[i])
        return {i: all(it is True for k, it in zip(owners, verdicts, strict=True) if k == i) for i in spent}

    def _solve(self, i: int, deadline: float) -> bool:
        """A mixed-integer solver on each function by itself."""
        network, region, specification = self._on_cpu(i)
        if region.ball is not None:
            return False
        layers = {j: (low.cpu().double(), high.cpu().double()) for j, (low, high) in self._bounds[i].layers.items()}
        for rows in self._groups(i):
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
        found = minimise(
            network,
            region,
            specification,
            layers,
            image=0,
            rows=[row],
            sound=self._verifier.sound,
            solver=self._verifier.solver,
            timeout=seconds,
            threads=self._verifier.threads,
        )
        for candidate in found.candidates:
            if candidate is not None:
                self._found("milp", i, candidate[None])
        return bool(found.lower[0] > 0)
