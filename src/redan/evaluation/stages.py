"""The stages of an evaluation: the attacks, other radii, one known draw, convergence, the diagnosis."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from redan.attacks.autoattack import AutoAttack
from redan.attacks.base import Attack
from redan.attacks.objectives import cw_margin
from redan.attacks.pgd import PGD
from redan.attacks.search import Precision, SearchModel
from redan.attacks.square import Square
from redan.data.types import ImageSet
from redan.evaluation import diagnose as diagnosis
from redan.evaluation.journal import Journal
from redan.evaluation.progress import EvaluationProgress
from redan.evaluation.purification import Oblivious, exact_pgd, shortened
from redan.evaluation.results import Accuracy, Check, ConvergencePoint
from redan.evaluation.survey import Survey
from redan.models.purified import Purified
from redan.seeds import derive_seed, generator
from redan.threats import LpBall, Threat

CURVE_RADII = (0.25, 0.5, 0.75, 1.5, 2.0)  # in units of the threat's radius, at which the attacks themselves stand
CURVE = "curve"  # what an image fell to that only the search at another radius could break

# Of the study of convergence: images, and what is varied; averages over more than twice the draws are left out.
CONVERGENCE_IMAGES = 64
CONVERGENCE_STEPS = (10, 20, 50, 100, 200)
CONVERGENCE_DRAWS = (1, 5, 10, 20, 40)
AT_STEPS = 50


@dataclass(frozen=True)
class Stages:
    """A network and its images, under way.

    Args:
        network: that is evaluated, on its device.
        threat: what it is to withstand.
        test: the images.
        count: how many of them.
        size: side to which they are cropped; None leaves them as they are.
        classes: of the data set.
        draws: passes behind each gradient and verdict, should the network draw at random.
        seed: of the attacks.
        precision: of the search.
        journal: keeps finished work.
        bar: is shown the work.
    """

    network: nn.Module
    threat: Threat
    test: ImageSet
    count: int
    size: int | None
    classes: int
    draws: int
    seed: int
    precision: Precision
    journal: Journal
    bar: EvaluationProgress

    def survey(self) -> Survey:
        """All images before any attack."""
        survey = Survey(
            self.network,
            self.test,
            self.count,
            self.size,
            classes=self.classes,
            draws=self.draws,
            journal=self.journal,
        )
        survey.judge.heartbeat = self.bar.beat
        return survey

    def search(self, draws: int) -> SearchModel:
        """What attacks search with."""
        search = SearchModel(self.network, precision=self.precision, draws=draws)
        search.heartbeat = self.bar.beat
        return search

    def meet(
        self, survey: Survey, attacks: Mapping[str, Attack], views: Mapping[str, nn.Module], prefix: str = ""
    ) -> dict[str, float]:
        """Let those that stand meet one attack after another.

        The last one that is not Square searches in float32 unless a precision is asked for: bfloat16 misses a few in a
        thousand images, and few are left to pay it. Square takes thousands of steps and needs no exact slope.

        Args:
            survey: the images.
            attacks: by name.
            views: what some of them search on in the place of the network, by name.
            prefix: of the names of this work.

        Returns:
            Mean accuracy over the draws after each attack, see ``Randomised.after``.
        """
        whole = self.search(survey.judge.draws)
        searches = {title: whole for title in attacks} | self._of_views(views, survey.judge.draws)
        radius = self.threat.radius if isinstance(self.threat, LpBall) else math.inf
        last = next((title for title in reversed(list(attacks)) if not isinstance(attacks[title], Square)), None)
        ahead = [attack.cost(self.classes) * searches[title].draws for title, attack in attacks.items()]
        after = {}
        for i, (title, attack) in enumerate(attacks.items()):
            search = searches[title]
            self.bar.begin(prefix + title, survey.stands, sum(ahead[i:]))
            if title == last and search.precision == "auto":
                search = search.precise
            seed = (self.seed, "evaluate", i)
            survey.meet(f"{prefix}{i}-{title}", title, attack, search, survey.stands, seed, radius)
            self.bar.end(prefix + title, survey.stands)
            after[title] = 1 - float(survey.told.double().mean())
        return after

    def _of_views(self, views: Mapping[str, nn.Module], draws: int) -> dict[str, SearchModel]:
        """What the attacks search with that search on a view, see ``redan.evaluation.purification.views``."""
        searches: dict[str, SearchModel] = {}
        for title, view in views.items():
            if title == "transfer":
                searches[title] = Oblivious(view, precision=self.precision)
            else:
                searches[title] = SearchModel(view, precision=self.precision, draws=draws)
            searches[title].heartbeat = self.bar.beat
        return searches

    def meet_radii(self, survey: Survey, threat: LpBall) -> None:
        """Let all meet PGD at other radii of the threat, for the curve."""
        search = self.search(1)
        for scale in CURVE_RADII:
            ball = replace(threat, radius=scale * threat.radius)
            probe, unbroken = PGD(ball, steps=20, objective=cw_margin), survey.least > ball.radius
            self.bar.begin(f"radius x{scale:g}", unbroken, probe.cost(self.classes))
            survey.meet(f"x{scale:g}", CURVE, probe, search, unbroken, (self.seed, "curve", repr(scale)), threat.radius)

    def known_draw(self, survey: Survey, network: Purified, threat: LpBall, steps: int) -> Survey:
        """What becomes of the images where the attacker knows the one draw, the same for all of them.

        They meet AutoAttack on exactly that network, which draws nothing and so can be searched without any average;
        fewer steps of the protocol than its own shorten it.
        """
        fixed = network.fixed(survey.images(torch.tensor([0])), generator(self.seed, "fixed"))
        alone = replace(self, network=fixed)
        known = alone.survey()
        alone.meet(known, shortened(AutoAttack(threat).parts(self.classes), steps), {}, "fixed-")
        return known

    def converge(self, survey: Survey, threat: LpBall, steps: int) -> tuple[ConvergencePoint, ...]:
        """Accuracy after PGD on the margin, without dropping, against its steps and the draws behind each gradient.

        A curve that still falls at its end says that the attack was too weak, and the robust accuracy too high.
        """
        usual, at = survey.judge.draws, min(AT_STEPS, steps)
        plan = [(k, usual) for k in CONVERGENCE_STEPS if k <= steps]
        plan += [(at, k) for k in CONVERGENCE_DRAWS if k <= 2 * usual]
        counts = [int(piece["correct"]) for piece in self.journal.pieces("convergence")]
        everyone = torch.arange(min(CONVERGENCE_IMAGES, self.count))
        plan = list(dict.fromkeys(plan))
        for i, (k, draws) in enumerate(plan[len(counts) :], len(counts)):
            attack = replace(exact_pgd(threat, k), objective=cw_margin, restarts=1, drop_broken=False)
            self.bar.begin(f"{k} steps, EOT {draws}", everyone >= 0, attack.cost(self.classes) * draws)
            counts.append(self._left(survey, attack, self.search(draws), everyone))
            self.journal.write("convergence", i, {"correct": torch.tensor(counts[-1])})
        return tuple(
            ConvergencePoint(steps=k, draws=draws, accuracy=Accuracy.of(correct, len(everyone)))
            for (k, draws), correct in zip(plan, counts, strict=True)
        )

    def _left(self, survey: Survey, attack: PGD, search: SearchModel, who: Tensor) -> int:
        """How many of these images the attack leaves right, by the mean of new draws."""
        seed = (self.seed, "convergence", attack.steps, search.draws)

        def right(part: Tensor) -> float:
            torch.manual_seed(derive_seed(*seed, int(part[0])))
            images, labels = survey.images(part), survey.labels[part].to(search.device)
            found = attack.run(search, images, labels, generator(*seed, "start", int(part[0]))).images
            return float((1 - survey.judge.score(found, labels)).double().sum())

        return round(sum(survey.each_batch(who, right)))

    def check(self, survey: Survey, other: nn.Module | None) -> tuple[Check, ...]:
        """The diagnosis on the first images that are classified correctly; none where none is."""
        if not survey.right.any():
            return ()

        def look(who: Tensor) -> tuple[Check, ...]:
            images, labels = survey.images(who), survey.labels[who]
            labels, bar = labels.to(images.device), self.bar
            return diagnosis.diagnose(
                self.network, images, labels, self.threat, seed=self.seed, transfer=other, progress=bar
            )

        return next(survey.each_batch(survey.right.nonzero().squeeze(1)[: diagnosis.IMAGES], look))
