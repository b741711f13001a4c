"""A classifier behind a purifier behind a random transform, as one network: images in, logits out."""

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from redan.models.purifiers.base import Purifier
from redan.models.random_transforms import Draw, RandomTransform


class Purified(nn.Module):
    """f(g(t(x))) with a random transform t, a purifier g and a classifier f; each forward pass draws t anew.

    Args:
        transform: t.
        purifier: g.
        classifier: f, images ``(n, c, h, w)`` in [0, 1] to logits ``(n, classes)``.
        votes: draws that answer together, at least 1: the logits are then the logarithm of their mean probabilities.

    Attributes:
        deterministic_parts: the children that draw nothing, each of which an attack may replace by a faster copy.

    Raises:
        ValueError: for less than one vote.

    Shape: images ``(n, c, h, w)`` in [0, 1] to logits ``(n, classes)``.
    """

    deterministic_parts: ClassVar[tuple[str, ...]] = ("purifier", "classifier")

    def __init__(
        self, transform: RandomTransform, purifier: Purifier, classifier: nn.Module, *, votes: int = 1
    ) -> None:
        super().__init__()
        if votes < 1:
            raise ValueError(f"at least 1 draw votes, got {votes}")
        self.transform, self.purifier, self.classifier, self.votes = transform, purifier, classifier, votes

    def forward(self, images: Tensor) -> Tensor:
        return self.at(images, (self.transform.sample(images) for _ in range(self.votes)))

    def at(self, images: Tensor, draws: Iterable[Draw]) -> Tensor:
        """Logits ``(n, classes)`` of images ``(n, c, h, w)`` with these draws of the transform, one a vote."""
        votes: list[Tensor] = [self.classifier(self.purify(images, draw)) for draw in draws]
        if len(votes) == 1:
            return votes[0]
        return torch.stack([vote.log_softmax(1) for vote in votes]).logsumexp(0) - math.log(len(votes))

    def purify(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        """Purified images: ``(n, c, h, w)`` in [0, 1] to the same; a new draw of the transform if None is given."""
        seen, holes = self.transform(images, self.transform.sample(images) if draw is None else draw)
        return self.transform.join(self.purifier(seen, holes), holes)

    def fixed(self, images: Tensor, generator: Generator) -> "FixedDraw":
        """The same network with one draw of the transform for ever, the same for all images.

        Args:
            images: ``(n, c, h, w)``, whose shape and device count.
            generator: of the draw.
        """
        return FixedDraw(self, [self.transform.sample(images[:1], generator) for _ in range(self.votes)])


class FixedDraw(Purified):
    """A purified classifier that knows its draws beforehand: a network without randomness.

    Several draws are of votes; ``purify`` gives the images that the first one sees.

    Args:
        network: the purified classifier, whose parts this one shares.
        draws: for one image each, one a vote.
    """

    noise: Tensor
    holes: Tensor

    def __init__(self, network: Purified, draws: Sequence[Draw]) -> None:
        super().__init__(network.transform, network.purifier, network.classifier, votes=len(draws))
        self.register_buffer("noise", torch.stack([draw.noise for draw in draws]))
        self.register_buffer("holes", torch.stack([draw.holes for draw in draws]))
        self.training = network.training

    def forward(self, images: Tensor) -> Tensor:
        return self.at(images, map(Draw, self.noise, self.holes))

    def purify(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        """See ``Purified.purify``; the first known draw if None is given."""
        return super().purify(images, Draw(self.noise[0], self.holes[0]) if draw is None else draw)
