"""All images on their way through the attacks: who stands, what felled the others, and at which price.

Work is done attack by attack, each on those that still stand, in full batches: small ones would waste the machine.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from redan.attacks.base import Attack
from redan.attacks.search import SearchModel
from redan.data.pipeline import center_crop, to_float
from redan.data.types import ImageSet
from redan.errors import UserError
from redan.evaluation.journal import Journal
from redan.evaluation.results import Row
from redan.seeds import generator
from redan.threats import LpBall, Threat

BATCH = {"cpu": 250, "cuda": 1000}


class Survey:
    """The first ``count`` images of a test set, under attack.

    Args:
        network: on its device.
        test: the images.
        count: how many of them.
        size: side to which images are cropped; None leaves them as they are.
        classes: of the data set.
        draws: passes that judge each image, should the network draw at random.
        journal: keeps finished work.

    Attributes:
        judge: the network as given, in float32.
        random: whether it draws at random: two passes of the same batch differ by more than rounding does.
        right: bool ``(count,)``, who is classified correctly as it is; a model that draws, by its mean logits.
        score: float32 ``(count,)``, share of draws that the known adversarial image fools; 1 without one for those
            that are not right.
        least: float64 ``(count,)``, distance of the nearest confirmed adversarial image in the threat's norm; 0
            for those not right, and for broken images where the threat has no norm.
        by: what each image fell to, a title or None.
        calls: int64 ``(count,)``, forward passes spent on each.
        adversarial: the adversarial images known, float32 ``(c, h, w)`` by index.

    Raises:
        UserError: where the network does not fit the images.
    """

    def __init__(
        self,
        network: nn.Module,
        test: ImageSet,
        count: int,
        size: int | None,
        *,
        classes: int,
        draws: int,
        journal: Journal,
    ) -> None:
        self._test, self._size, self._journal = test, size, journal
        self.judge = SearchModel(network)
        self._device = self.judge.device
        self._batch = BATCH[self._device.type]
        self.labels = test.labels[:count].cpu()
        parts = torch.arange(count).split(self._batch)
        first, second = (self._clean_logits(parts[0], classes) for _ in range(2))
        self.random = bool((first - second).abs().max() > 1e-4 * first.abs().max())
        if self.random:
            self.judge = SearchModel(network, draws=draws)
        logits = torch.cat([self._clean_logits(part, classes) for part in parts])
        self.confidence, self.prediction = logits.softmax(1).max(1)
        self.right = self.prediction == self.labels
        self.score = (~self.right).float()
        self.least = torch.where(self.right, math.inf, 0.0).double()
        self.by: list[str | None] = [None] * count
        self.calls = torch.full((count,), self.judge.draws)
        self.adversarial: dict[int, Tensor] = {}

    @property
    def stands(self) -> Tensor:
        """Who is right and has not been broken for certain: bool ``(count,)``."""
        return self.score < 1

    def images(self, indices: Tensor) -> Tensor:
        """Clean images, float32 ``(n, c, h, w)`` in [0, 1], on the network's device."""
        images = to_float(self._test.images[indices.to(self._test.images.device)].to(self._device))
        return images if self._size is None else center_crop(images, self._size)

    def _clean_logits(self, indices: Tensor, classes: int) -> Tensor:
        images = self.images(indices)
        try:
            draws = torch.stack([self.judge.exact_logits(images) for _ in range(self.judge.draws)])
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the network cannot take images of shape {tuple(images.shape[1:])}: {reason}") from error
        if draws.shape[1:] != (len(images), classes):
            raise UserError(
                f"the network gives {tuple(draws.shape[2:])} outputs an image; the data have {classes} classes"
            )
        if not torch.isfinite(draws).all():
            raise UserError("the network gives logits that are not finite on clean images")
        return draws.mean(0).cpu()

    def meet(
        self,
        work: str,
        title: str,
        attack: Attack,
        search: SearchModel,
        who: Tensor,
        seed: tuple[int | str, ...],
        radius: float,
    ) -> None:
        """Let images meet an attack.

        Args:
            work: name of this in the journal.
            title: what those that fall have fallen to.
            attack: the attack.
            search: what it searches with.
            who: who meets it, bool ``(count,)``.
            seed: of its randomness; each batch has a seed of its own.
            radius: who falls within it falls for good; farther finds only tell how near a broken image is.
        """
        left = who.clone()
        for piece in self._journal.pieces(work):
            self._enter(title, piece, radius)
            left[piece["met"]] = False
        while left.any():
            met = left.nonzero().squeeze(1)[: self._batch]
            try:
                piece = self._attack(attack, search, met, generator(*seed, int(met[0])))
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                if self._batch == 1:
                    raise UserError("there is not enough memory to attack one image") from error
                self._batch = (min(self._batch, len(met)) + 1) // 2
                continue
            self._journal.write(work, int(met[0]), piece)
            self._enter(title, piece, radius)
            left[met] = False

    def _attack(self, attack: Attack, search: SearchModel, met: Tensor, draws: torch.Generator) -> dict[str, Tensor]:
        """Who met it, at what price, whom it hurt how much, with which image, how far away."""
        images, labels = self.images(met), self.labels[met].to(self._device)
        outcome = attack.run(search, images, labels, draws)
        # Whatever the attack says: the original judges, in float32 and inside the exact threat.
        score = self.judge.score(outcome.images, labels) * attack.threat.contains(outcome.images, images)
        hurt = score > 0
        return {
            "met": met,
            "calls": outcome.calls.cpu() + self.judge.draws,
            "hurt": met[hurt.cpu()],
            "score": score[hurt].cpu(),
            "images": outcome.images[hurt].cpu(),
            "distance": _distance(attack.threat, outcome.images, images)[hurt].cpu(),
        }

    def _enter(self, title: str, piece: dict[str, Tensor], radius: float) -> None:
        self.calls[piece["met"]] += piece["calls"]
        hurt, score, distance = piece["hurt"], piece["score"], piece["distance"]
        broken = score == 1
        self.least[hurt[broken]] = torch.minimum(self.least[hurt[broken]], distance[broken])
        for k in ((score > self.score[hurt]) & (distance <= radius)).nonzero().squeeze(1).tolist():
            index = int(hurt[k])
            self.score[index] = score[k]
            self.by[index] = title
            self.adversarial[index] = piece["images"][k]

    def found(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices and adversarial images of all that have one, in batches, on the network's device."""
        indices = torch.tensor(sorted(self.adversarial), dtype=torch.int64)
        for part in indices.split(self._batch) if len(indices) else ():
            yield part, torch.stack([self.adversarial[k] for k in part.tolist()]).to(self._device)

    def rows(self, *, measured: bool) -> list[Row]:
        """One row an image; ``measured`` says whether the threat has a norm that distances are told in."""
        says: dict[int, tuple[int, float]] = {}
        for part, images in self.found():
            best = self.judge.exact_logits(images).softmax(1).max(1)
            says |= dict(zip(part.tolist(), zip(best.indices.tolist(), best.values.tolist(), strict=True), strict=True))
        rows = []
        for k, by in enumerate(self.by):
            prediction, confidence = says.get(k, (None, None))
            rows.append(
                Row(
                    index=k,
                    label=int(self.labels[k]),
                    prediction=int(self.prediction[k]),
                    confidence=float(self.confidence[k]),
                    verdict="misclassified" if not self.right[k] else "unknown" if self.stands[k] else "falsified",
                    by=by,
                    adversarial_prediction=prediction,
                    adversarial_confidence=confidence,
                    distance=float(self.least[k]) if measured and by is not None and self.least[k] < math.inf else None,
                    model_calls=int(self.calls[k]),
                )
            )
        return rows


def _distance(threat: Threat, images: Tensor, clean: Tensor) -> Tensor:
    """In the threat's norm; 0 for a threat that has none, so that all of it counts as near."""
    if isinstance(threat, LpBall):
        return threat.distance(images, clean)
    return torch.zeros(len(images), dtype=torch.float64, device=images.device)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
