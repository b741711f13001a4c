"""Input splitting: branch on the inputs themselves, bound each part by CROWN. For networks of few inputs.

A box that CROWN leaves open is cut in half along one input, until every part is shown, one holds a counterexample, or
the time is up (Wang et al., USENIX Security 2018, arXiv:1804.10829). In a small box hardly any ReLU is open, so that
bounds close faster than by splitting ReLUs, but the number of boxes grows with the power of the inputs that matter.

The input to cut: the one whose width alone moves the functions that are not yet shown the most, were nothing to cancel,
``|C| |W_n| D ... D |W_1| e_j (u_j - l_j)`` with ``D`` the slopes of the ReLUs' upper lines. On 11 networks of 5 and 8
inputs (random and trained ones, 120 to 300 ReLUs) that took three quarters of the boxes that CROWN's coefficients at
the input take, and a tenth to a fifth of those of cutting the widest input where inputs matter unequally. Trying out
each input takes a third fewer boxes than the coefficients and four times the time; alpha-CROWN of 3 steps, half to
three quarters of the boxes and three to five times the time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from redan.certification.crown import Crown
from redan.certification.network import Affine, Network, Relu, Sigmoid
from redan.certification.regions import Bounds, Region, Specification
from redan.certification.rounding import SoundFloat
from redan.certification.sigmoid import derivative

# Numbers of one layer that are held at once while the effects of the inputs are found.
NUMBERS = 2**22

# Of a ball's radius, so that rounding does not take a box for outside that touches it.
HAIR = 1e-9


@dataclass(frozen=True, eq=False)
class _Boxes:
    """Open boxes: ends ``(k, d)``, lower bounds of the functions ``(k, m)``, and what each input's width does there."""

    lower: Tensor
    upper: Tensor
    margins: Tensor
    reach: Tensor

    def part(self, which: Tensor) -> "_Boxes":
        return _Boxes(*(it[which] for it in vars(self).values()))

    def halves(self) -> "_Boxes":
        """Both parts of each box, ``(2 k, ...)``; what is known of their functions is what was known of the whole."""
        chosen = self.reach.argmax(1, keepdim=True)
        middle = self.middle.gather(1, chosen)
        upper, lower = self.upper.scatter(1, chosen, middle), self.lower.scatter(1, chosen, middle)
        ends = torch.cat([self.lower, lower]), torch.cat([upper, self.upper])
        return _Boxes(*ends, self.margins.repeat(2, 1), self.reach.repeat(2, 1))

    @property
    def middle(self) -> Tensor:
        return self.lower + (self.upper - self.lower) / 2

    @staticmethod
    def join(a: "_Boxes", b: "_Boxes") -> "_Boxes":
        return _Boxes(*(torch.cat(pair) for pair in zip(vars(a).values(), vars(b).values(), strict=True)))


@dataclass(frozen=True)
class InputSplit:
    """Cuts until everything is shown, refuted or the time is up.

    Args:
        batch: boxes that are bounded together, at least 2; fewer where the network is wide.
        limit: open boxes, beyond which it is given up.
        sound: which rounding errors the bounds cover.
    """

    batch: int = 256
    limit: int = 200_000
    sound: SoundFloat = "exact"

    def __call__(
        self,
        network: Network,
        region: Region,
        specification: Specification,
        *,
        deadline: float,
        refuted: Callable[[Tensor], bool],
    ) -> tuple[bool | None, float, int]:
        """Decide whether a specification holds.

        Args:
            network: the network, in float64: boxes become small.
            region: of one image.
            specification: likewise.
            deadline: in terms of ``time.monotonic``.
            refuted: is asked whether one of some images, ``(k, d)`` float64, is a counterexample.

        Returns:
            Whether it was shown (True), refuted (False) or neither (None); the lower bound of its least group, 0 where
            it was shown by parts; how many boxes were bounded.
        """
        lower, upper = region.lower.double().flatten(1), region.upper.double().flatten(1)
        nothing = torch.full_like(specification.offsets, -torch.inf)
        fresh = _Boxes(lower, upper, nothing, torch.zeros_like(lower))
        queue, visited = fresh.part(torch.arange(0)), 0
        widest = max(torch.Size(layer.shape).numel() for layer in network.layers)
        parents = max(1, min(self.batch, NUMBERS // (lower.shape[1] * widest)) // 2)
        while True:
            fresh, candidates = self._bound(network, region, specification, fresh)
            visited += len(fresh.lower)
            worst = specification.worst(fresh.margins)
            if visited == 1 and worst[0] > 0:
                return True, float(worst[0]), visited
            left = worst <= 0
            queue = _Boxes.join(queue, fresh.part(left))
            worst = specification.worst(queue.margins)
            if not len(worst):
                return True, 0.0, visited
            if refuted(candidates):
                return False, float(worst.min()), visited
            if time.monotonic() >= deadline or len(worst) > self.limit:
                return None, float(worst.min()), visited
            order = worst.topk(min(parents, len(worst)), largest=False).indices
            picked = queue.part(order)
            if bool((picked.reach.amax(1) < 0).any()):  # too small to be cut
                return None, float(worst.min()), visited
            rest = torch.ones_like(worst, dtype=torch.bool)
            rest[order] = False
            queue, fresh = queue.part(rest), picked.halves()

    def _bound(
        self, network: Network, region: Region, specification: Specification, boxes: _Boxes
    ) -> tuple[_Boxes, Tensor]:
        """The boxes that the region reaches into, with their bounds; and images ``(k, d)`` that may refute it."""
        if region.ball is not None and region.centre is not None:
            centre = region.centre.double().flatten(1)
            nearest = torch.maximum(torch.minimum(centre, boxes.upper), boxes.lower)
            boxes = boxes.part(region.ball.distance(nearest, centre) <= region.ball.radius * (1 + HAIR))
        count, shape = len(boxes.lower), network.input_shape
        same = torch.zeros(count, dtype=torch.int64, device=boxes.lower.device)
        asked = specification.part(same)
        parts = Region(
            boxes.lower.view(-1, *shape),
            boxes.upper.view(-1, *shape),
            None if region.centre is None else region.centre[same],
            region.ball,
        )
        found = Crown(sound=self.sound)(network, parts, asked)
        margins = torch.maximum(found.margins, boxes.margins)
        effect = _reach(network, parts, asked, found, margins <= 0)
        middle = boxes.middle
        # The middles, and from each the corner that its worst function falls towards.
        with torch.enable_grad():
            images = middle.clone().requires_grad_()
            values = asked.values(network(images.view(-1, *shape)))
            (gradient,) = torch.autograd.grad(asked.worst(values).sum(), images)
        corners = torch.where(gradient > 0, boxes.lower, boxes.upper)
        can = (middle > boxes.lower) & (middle < boxes.upper)
        reach = torch.where(can, effect.nan_to_num(0.0), -1.0)
        return _Boxes(boxes.lower, boxes.upper, margins, reach), torch.cat([middle, corners])


@torch.no_grad()
def _reach(network: Network, region: Region, specification: Specification, found: Bounds, asked: Tensor) -> Tensor:
    """By how much the width of each input alone may move the functions that are ``asked`` for, together: ``(k, d)``."""
    width = (region.upper - region.lower).flatten(1)
    k, d = width.shape
    sizes = [torch.diag_embed(width).view(k * d, *network.input_shape)]
    for layer in network.layers[1:]:
        inputs = [sizes[i] for i in layer.inputs]
        if isinstance(layer, Relu | Sigmoid):
            lower, upper = found.layers[layer.inputs[0]]
            if isinstance(layer, Relu):
                slope = (upper.relu() / (upper.relu() + (-lower).relu())).nan_to_num(1.0)
            else:
                slope = derivative(torch.zeros_like(lower).clamp(lower, upper))  # the steepest
            sizes.append(inputs[0] * slope.repeat_interleave(d, 0))
        else:
            assert isinstance(layer, Affine)
            sizes.append(layer.absolute(*inputs))
    moved = sizes[-1].view(k, d, -1) @ specification.weights.abs().transpose(1, 2)
    return (moved * asked[:, None]).sum(2)
