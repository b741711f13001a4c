"""The stages of an evaluation: the attacks, other radii, one known draw, convergence, the diagnosis."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from redan.attacks.base import Attack
from redan.attacks.objectives import cw_margin
from redan.attacks.pgd import PGD
from redan.attacks.search import Precision, SearchModel
from redan.attacks.square import Square
from redan.data.types import ImageSet
from redan.evaluation import diagnose as diagnosis
from redan.evaluation.journal import Journal
from redan.evaluation.progress import EvaluationProgress
from redan.evaluation.purification import STEPS, TRANSFER, Oblivious, exact_pgd
from redan.evaluation.results import Accuracy, Check, ConvergencePoint
from redan.evaluation.survey import Survey
from redan.models.purified import Purified
from redan.seeds import derive_seed, generator
from redan.threats import LpBall, Threat

CURVE_RADII = (0.25, 0.5, 0.75, 1.5, 2.0)  # in units of the threat's radius, at which the attacks themselves stand
CURVE = "curve"  # what an image fell to that only the search at another radius could break

# Of the study of convergence: images, and what is varied. A curve that ends with the protocol's own steps could not
# show that these were enough, so that of a shortened one goes on to multiples of them. Averages over more than twice
# the draws are left out.
CONVERGENCE_IMAGES = 64
CONVERGENCE_STEPS = (10, 20, 50, 100, 200)
CONVERGENCE_MULTIPLES = (1, 2, 4)
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

    @property
    def _radius(self) -> float:
        """Who falls within it falls for good."""
        return self.threat.radius if isinstance(self.threat, LpBall) else math.inf

    def meet(
        self, survey: Survey, attacks: Mapping[str, Attack], views: Mapping[str, nn.Module], prefix: str = ""
    ) -> tuple[dict[str, float], Accuracy | None]:
        """Let those that stand meet one attack after another.

        The last one that is not Square searches in float32 unless a precision is asked for: bfloat16 misses a few in a
        thousand images, and few are left to pay it. Square takes thousands of steps and needs no exact slope.

        All meet ``transfer``, who is wrong without it, too: an image that it puts right shows how blind it is.

        Args:
            survey: the images.
            attacks: by name.
            views: what some of them search on in the place of the network, by name.
            prefix: of the names of this work.

        Returns:
            Mean accuracy over the draws after each attack, see ``Randomised.after``, and on the images of ``transfer``
            alone, where it is among them.
        """
        whole = self.search(survey.judge.draws)
        searches = {title: whole for title in attacks} | self._of_views(views, survey.judge.draws)
        last = next((title for title in reversed(list(attacks)) if not isinstance(attacks[title], Square)), None)
        ahead = [attack.cost(self.classes) * searches[title].draws for title, attack in attacks.items()]
        after, transferred = {}, None
        for i, (title, attack) in enumerate(attacks.items()):
            search = searches[title]
            self.bar.begin(prefix + title, survey.stands, sum(ahead[i:]))
            if title == last and search.precision == "auto":
                search = search.precise
            seed = (self.seed, "evaluate", i)
            who = torch.ones_like(survey.stands) if title == TRANSFER else survey.stands
            alone = survey.meet(f"{prefix}{i}-{title}", title, attack, search, who, seed, self._radius)
            self.bar.end(prefix + title, survey.stands)
            after[title] = 1 - float(survey.told.double().mean())
            if title == TRANSFER:
                transferred = Accuracy.of(round(float((1 - alone.double()).sum())), self.count)
        return after, transferred

    def _of_views(self, views: Mapping[str, nn.Module], draws: int) -> dict[str, SearchModel]:
        """What the attacks search with that search on a view, see ``redan.evaluation.purification.views``."""
        searches: dict[str, SearchModel] = {}
        for title, view in views.items():
            if title == TRANSFER:
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

    def known_draw(self, survey: Survey, network: Purified, attacks: Mapping[str, Attack]) -> Survey:
        """What becomes of the images where the attacker knows the one draw, the same for all of them.

        They meet what broke other draws, and who stands the attacks on exactly that network, which draws nothing and
        so can be searched without any average.

        Args:
            survey: the images, after the attacks on the network that draws.
            network: that draws.
            attacks: by name.
        """
        fixed = network.fixed(survey.images(torch.tensor([0])), generator(self.seed, "fixed"))
        alone = replace(self, network=fixed)
        known = alone.survey()
        known.offer("other draws", survey, self.threat, self._radius)
        alone.meet(known, attacks, {}, "fixed-")
        return known

    def converge(self, survey: Survey, threat: LpBall, steps: int) -> tuple[ConvergencePoint, ...]:
        """Accuracy after PGD on the margin, without dropping, against its steps and the draws behind each gradient.

        A curve that still falls at its end says that the attack was too weak, and the robust accuracy too high.

        Args:
            survey: the images.
            threat: what they are attacked within.
            steps: of the protocol.
        """
        usual, at = survey.judge.draws, min(AT_STEPS, steps)
        spent = {k for k in CONVERGENCE_STEPS if k <= steps}
        spent |= {k * steps for k in CONVERGENCE_MULTIPLES if k * steps <= STEPS}
        plan = [(k, usual) for k in sorted(spent)]
        plan += [(at, k) for k in CONVERGENCE_DRAWS if k <= 2 * usual]
        everyone = torch.arange(min(CONVERGENCE_IMAGES, self.count))
        points = []
        for k, draws in dict.fromkeys(plan):
            work = f"convergence-{k}-{draws}"
            finished = self.journal.pieces(work)
            if finished:
                correct = int(finished[0]["correct"])
            else:
                attack = replace(exact_pgd(threat, k), objective=cw_margin, restarts=1, drop_broken=False)
                self.bar.begin(f"{k} steps, EOT {draws}", everyone >= 0, attack.cost(self.classes) * draws)
                correct = self._left(survey, attack, self.search(draws), everyone)
                self.journal.write(work, 0, {"correct": torch.tensor(correct)})
            points.append(ConvergencePoint(steps=k, draws=draws, accuracy=Accuracy.of(correct, len(everyone))))
        return tuple(points)

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
