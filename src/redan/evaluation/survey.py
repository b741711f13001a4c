"""All images on their way through the attacks: who stands, what felled the others, and at which price.

Work is done attack by attack, each on those that still stand, in full batches: small ones would waste the machine.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from redan.attacks.base import Attack
from redan.attacks.search import SearchModel
from redan.data.pipeline import center_crop, to_float
from redan.data.types import ImageSet
from redan.errors import UserError
from redan.evaluation.journal import Journal
from redan.evaluation.results import Row
from redan.seeds import derive_seed, generator
from redan.threats import LpBall, Threat

T = TypeVar("T")

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
        clean_score: float32 ``(count,)``, share of draws in which each is wrong as it is.
        score: float32 ``(count,)``, share of draws that the known adversarial image fools; 0 without one.
        told: float32 ``(count,)``, share of new draws that get each wrong as the worst known image has it: draws that
            chose it would count luck as weakness. Without an adversarial image the ``clean_score``.
        earlier_seconds: what the work took that the journal held already.
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
        everyone = torch.arange(count)
        first, second = (
            next(self.each_batch(everyone, lambda part: self._clean_logits(part, classes)))[0] for _ in range(2)
        )
        n = min(len(first), len(second))
        self.random = bool((first[:n] - second[:n]).abs().max() > 1e-4 * first.abs().max())
        if self.random:
            self.judge = SearchModel(network, draws=draws)
        # The draws of each batch, (draws, n, classes).
        logits = torch.cat(list(self.each_batch(everyone, lambda part: self._clean_logits(part, classes))), 1)
        self.confidence, self.prediction = logits.mean(0).softmax(1).max(1)
        self.right = self.prediction == self.labels
        self.clean_score = (logits.argmax(2) != self.labels).float().mean(0)
        self.score = torch.zeros(count)
        self.told = self.clean_score.clone()
        self.earlier_seconds = 0.0
        self.least = torch.where(self.right, math.inf, 0.0).double()
        self.by: list[str | None] = [None] * count
        self.calls = torch.full((count,), self.judge.draws)
        self.adversarial: dict[int, Tensor] = {}

    @property
    def stands(self) -> Tensor:
        """Who is right, if only in some draws, and has not been broken for certain: bool ``(count,)``."""
        return (self.clean_score < 1) & (self.score < 1)

    def images(self, indices: Tensor) -> Tensor:
        """Clean images, float32 ``(n, c, h, w)`` in [0, 1], on the network's device."""
        images = to_float(self._test.images[indices.to(self._test.images.device)].to(self._device))
        return images if self._size is None else center_crop(images, self._size)

    def each_batch(self, indices: Tensor, work: Callable[[Tensor], T]) -> Iterator[T]:
        """Do some work on full batches of the indices, int64 ``(n,)``; on halves of them where memory runs short.

        Raises:
            UserError: where memory does not do for one image.
        """
        while len(indices):
            part = indices[: self._batch]
            try:
                result = work(part)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise UserError("there is not enough memory to work on one image") from error
                self._batch = (len(part) + 1) // 2
                continue
            yield result
            indices = indices[len(part) :]

    def _clean_logits(self, indices: Tensor, classes: int) -> Tensor:
        """Each draw's logits, ``(draws, n, classes)``."""
        images = self.images(indices)
        try:
            draws = torch.stack([self.judge.exact_logits(images) for _ in range(self.judge.draws)])
        except RuntimeError as error:
            if _out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
            raise UserError(f"the network cannot take images of shape {tuple(images.shape[1:])}: {reason}") from error
        if draws.shape[1:] != (len(images), classes):
            raise UserError(
                f"the network gives {tuple(draws.shape[2:])} outputs an image; the data have {classes} classes"
            )
        if not torch.isfinite(draws).all():
            raise UserError("the network gives logits that are not finite on clean images")
        return draws.cpu()

    def meet(
        self,
        work: str,
        title: str,
        attack: Attack,
        search: SearchModel,
        who: Tensor,
        seed: tuple[int | str, ...],
        radius: float,
    ) -> Tensor:
        """Let images meet an attack.

        Args:
            work: name of this in the journal.
            title: what those that fall have fallen to.
            attack: the attack.
            search: what it searches with.
            who: who meets it, bool ``(count,)``.
            seed: of its randomness; each batch has a seed of its own.
            radius: who falls within it falls for good; farther finds only tell how near a broken image is.

        Returns:
            Share of draws that get each image wrong as this attack alone has it, whatever else is known of it: float32
            ``(count,)``, 0 for those that did not meet it.
        """
        left, alone = who.clone(), torch.zeros(len(who))
        for piece in self._journal.pieces(work):
            self._enter(title, piece, radius)
            self.earlier_seconds += float(piece["seconds"])
            left[piece["met"]], alone[piece["hurt"]] = False, piece["score"]
        for piece in self.each_batch(left.nonzero().squeeze(1), lambda met: self._attack(attack, search, met, seed)):
            self._journal.write(work, int(piece["met"][0]), piece)
            self._enter(title, piece, radius)
            alone[piece["hurt"]] = piece["score"]
        return alone

    def offer(self, title: str, other: "Survey", threat: Threat, radius: float) -> None:
        """Let images meet the worst that another survey of the same images knows of each.

        Args:
            title: as for ``meet``.
            other: the survey that knows it.
            threat: that it lies in.
            radius: as for ``meet``.
        """
        for piece in self.each_batch(other.found(), lambda met: self._judged(met, other.attacked(met), threat)):
            self._enter(title, piece, radius)

    def _attack(
        self, attack: Attack, search: SearchModel, met: Tensor, seed: tuple[int | str, ...]
    ) -> dict[str, Tensor]:
        """Who met it, at what price, whom it hurt how much, with which image, how far away."""
        started, draws = time.perf_counter(), generator(*seed, int(met[0]))
        if self.random:
            torch.manual_seed(derive_seed(*seed, int(met[0]), "model"))
        images, labels = self.images(met), self.labels[met].to(self._device)
        outcome = attack.run(search, images, labels, draws)
        piece = self._judged(met, outcome.images, attack.threat)
        piece["calls"] += outcome.calls.cpu()
        return piece | {"seconds": torch.tensor(time.perf_counter() - started)}

    def _judged(self, met: Tensor, found: Tensor, threat: Threat) -> dict[str, Tensor]:
        """The same of images ``(n, c, h, w)`` that somebody found.

        Whatever they say: the original judges, in float32 and inside the exact threat.
        """
        images, labels = self.images(met), self.labels[met].to(self._device)
        score = self.judge.score(found, labels) * threat.contains(found, images)
        hurt = score > 0
        told = score[hurt]
        if self.random and hurt.any():
            told = self.judge.score(found[hurt], labels[hurt])
        return {
            "met": met,
            "calls": torch.full((len(met),), self.judge.draws),
            "hurt": met[hurt.cpu()],
            "score": score[hurt].cpu(),
            "told": told.cpu(),
            "images": found[hurt].cpu(),
            "distance": _distance(threat, found, images)[hurt].cpu(),
        }

    def _enter(self, title: str, piece: dict[str, Tensor], radius: float) -> None:
        self.calls[piece["met"]] += piece["calls"]
        hurt, score, distance = piece["hurt"], piece["score"], piece["distance"]
        broken = score == 1
        self.least[hurt[broken]] = torch.minimum(self.least[hurt[broken]], distance[broken])
        # The clean image lies in every threat: a candidate that fools fewer draws than it is none.
        worse = score > torch.maximum(self.score, self.clean_score)[hurt]
        for k in (worse & (distance <= radius)).nonzero().squeeze(1).tolist():
            index = int(hurt[k])
            self.score[index], self.told[index] = score[k], piece["told"][k]
            self.by[index] = title
            self.adversarial[index] = piece["images"][k]

    def found(self) -> Tensor:
        """Indices of all images that have an adversarial one, int64, in order."""
        return torch.tensor(sorted(self.adversarial), dtype=torch.int64)

    def attacked(self, indices: Tensor) -> Tensor:
        """The adversarial images, or where there is none the clean ones, ``(n, c, h, w)`` on the network's device."""
        images = self.images(indices)
        for k, index in enumerate(indices.tolist()):
            if index in self.adversarial:
                images[k] = self.adversarial[index].to(self._device)
        return images

    def rows(self, *, measured: bool) -> list[Row]:
        """One row an image; ``measured`` says whether the threat has a norm that distances are told in."""
        says: dict[int, tuple[int, float]] = {}

        def ask(part: Tensor) -> None:
            images = self.attacked(part)
            logits = torch.stack([self.judge.exact_logits(images) for _ in range(self.judge.draws)])
            best = logits.mean(0).softmax(1).max(1)
            says.update(zip(part.tolist(), zip(best.indices.tolist(), best.values.tolist(), strict=True), strict=True))

        list(self.each_batch(self.found(), ask))
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
