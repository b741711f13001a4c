"""beta-CROWN (Wang et al., NeurIPS 2021, arXiv:2103.06624): branch on the signs of ReLUs, bound each branch.

A sub-problem says of some open ReLUs that their input is at least, or at most, 0. Its bound is CROWN's with those
ReLUs linear, the lower slopes ``alpha`` of the rest optimised, and what it says as a multiplier ``beta >= 0`` in the
coefficients: ``f >= f - beta y`` where ``y >= 0``. Splitting ends with every bound above 0, a counterexample, or the
time. It works on reduced problems (``reduced``), many at a time and of several images, each with a queue of its own:
what happens to one does not depend on its company.

The ReLU to split: those whose relaxation costs most (Bunel et al., JMLR 2020) are tried out with one bound for each
side (filtered smart branching: De Palma et al., 2021), and the one is taken whose sides gain most, by the product that
mixed-integer solvers rate branches with (Achterberg, 2007): it beat the worse side alone two to one in sub-problems.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redan.certification.adam import Moments
from redan.certification.reduced import Reduced

# The least gain of a side, so that one that gains nothing does not make all branches equal.
LEAST_GAIN = 1e-4

# Of Adam, for a sub-problem in which every ReLU is settled: nothing but its multipliers can still raise its bound.
LEAF_STEPS = 200


@dataclass(frozen=True, eq=False)
class State:
    """Sub-problems: ``s`` of each of ``p`` problems; the ReLUs of all blocks in a row, ``n`` of them.

    Attributes:
        signs: 1 where the ReLU's input is said to be at least 0, -1 at most 0, 0 where nothing is said; ``(p, s, n)``.
        alpha: lower slopes in [0, 1].
        beta: multipliers, at least 0.
        low: bounds of the ReLUs' inputs; above ``high`` where a sub-problem contradicts itself.
        high: likewise.
    """

    signs: Tensor
    alpha: Tensor
    beta: Tensor
    low: Tensor
    high: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "State":
        """The same change of every tensor."""
        return State(*(change(it) for it in vars(self).values()))

    def take(self, which: Tensor) -> "State":
        """Sub-problems by index along the second axis, ``(p, k)``."""
        index = which[..., None].expand(-1, -1, self.signs.shape[2])
        return self.map(lambda it: it.gather(1, index))

    def part(self, k: int, which: Tensor | slice) -> "State":
        """Sub-problems of the k-th problem, without the axis of problems."""
        return self.map(lambda it: it[k, which])

    def widened(self, width: int) -> "State":
        """Of one problem: as many sub-problems as ``width``, the last one repeated."""
        return self.map(lambda it: torch.cat([it, it[-1:].expand(width - len(it), -1)]))

    @staticmethod
    def join(states: Sequence["State"], combine: Callable[[list[Tensor]], Tensor]) -> "State":
        """States as one, tensor by tensor."""
        return State(*(combine(list(parts)) for parts in zip(*(vars(it).values() for it in states), strict=True)))


@dataclass(frozen=True)
class BranchAndBound:
    """Splits until everything is shown, refuted or the time is up.

    Args:
        batch: sub-problems of one problem that are bounded together, at least 2 and even.
        iterations: steps of Adam for each.
        rate: of the slopes.
        beta_rate: of the multipliers.
        candidates: ReLUs that are tried out for each split.
        limit: sub-problems of one problem, after which it is given up.
    """

    batch: int = 64
    iterations: int = 10
    rate: float = 0.2
    beta_rate: float = 0.2
    candidates: int = 32
    limit: int = 100_000

    def __call__(
        self,
        problems: Reduced,
        *,
        owners: Sequence[int],
        seconds: Mapping[int, float],
        refuted: Callable[[int, Tensor], bool],
    ) -> tuple[list[bool | None], Tensor, list[int], dict[int, float]]:
        """Solve problems side by side.

        Args:
            problems: that are to be shown.
            owners: of each problem, which image it is about. All problems of an image must be shown: one that is
                refuted or given up ends the work on the others.
            seconds: that each image has. What passes is shared by the images that are worked on.
            refuted: is asked whether an image, ``(k, d)`` float64, of a problem is a counterexample.

        Returns:
            Of each problem whether it was shown (True), refuted (False) or neither (None), its lower bound ``(p,)``,
            and how many sub-problems were bounded; and the seconds that each image took.
        """
        count, n = len(problems), problems.open
        spent, clock = dict.fromkeys(owners, 0.0), time.monotonic()
        verdicts: list[bool | None] = [None] * count
        lower = torch.full((count,), -torch.inf, dtype=torch.float64)
        visited = [0] * count
        low, high = (_joined([getattr(it, f) for it in problems.blocks], problems)[:, None] for f in ("lower", "upper"))
        root = State(torch.zeros_like(low), (high > -low).to(low), torch.zeros_like(low), low, high)
        bound, root, images = self._bound(problems, root, 2 * self.iterations)
        queues: dict[int, _Queue] = {}
        for k in range(count):
            visited[k] = 1
            lower[k] = bound[k, 0]
            if bound[k, 0] > 0:
                verdicts[k] = True
            elif refuted(k, images[k]):
                verdicts[k] = False
            elif n:
                queues[k] = _Queue(root.part(k, slice(None)), bound[k])
        lost = {owners[k] for k in range(count) if verdicts[k] is not True and k not in queues}
        working = set(owners)
        while True:
            passed, clock = time.monotonic() - clock, time.monotonic()
            for owner in working:
                spent[owner] += passed / len(working)
                if spent[owner] >= seconds[owner]:
                    lost.add(owner)
            active = sorted(k for k in queues if owners[k] not in lost)
            working = {owners[k] for k in active}
            if not active:
                return verdicts, lower, visited, spent
            picked = [queues[k].worst(self.batch // 2) for k in active]
            width = max(len(bounds) for _, bounds in picked)
            parents = State.join([it.widened(width) for it, _ in picked], torch.stack)
            some = problems.part(torch.tensor(active, device=problems.lower.device))
            children = self._split(some, parents)
            bound, children, images = self._bound(some, children, self.iterations)
            for j, k in enumerate(active):
                fresh = len(picked[j][1])
                mine = torch.cat([torch.arange(fresh), width + torch.arange(fresh)])  # both children of each parent
                visited[k] += len(mine)
                if refuted(k, images[j, mine]):
                    verdicts[k] = False
                    lower[k] = min(float(bound[j, mine].min()), queues[k].lowest)
                    del queues[k]
                    lost.add(owners[k])
                    continue
                left = mine[(bound[j, mine] <= 0).cpu()]
                rest, bounds, stuck = self._settle(some, j, children.part(j, left), bound[j, left])
                queues[k].put(rest, bounds)
                lower[k] = queues[k].lowest
                if not len(queues[k]):
                    verdicts[k], lower[k] = True, 0.0
                if len(queues[k]) and (stuck or visited[k] >= self.limit):
                    lost.add(owners[k])
                if not len(queues[k]) or stuck or visited[k] >= self.limit:
                    del queues[k]

    def _settle(self, problems: Reduced, j: int, state: State, bounds: Tensor) -> tuple[State, Tensor, bool]:
        """Sub-problems of the j-th problem that are left: those with nothing to split get many more steps, once.

        Returns:
            Them, their bounds, and whether one is left that nothing can be done about.
        """
        leaf = ~((state.low < 0) & (state.high > 0)).any(1)
        if not leaf.any():
            return state, bounds, False
        alone = problems.part(torch.tensor([j], device=problems.lower.device))
        again, _, _ = self._bound(alone, state.map(lambda it: it[leaf][None]), LEAF_STEPS)
        bounds = bounds.masked_scatter(leaf, again[0])
        left = bounds <= 0
        return state.map(lambda it: it[left]), bounds[left], bool((leaf & left).any())

    def _bound(self, problems: Reduced, state: State, iterations: int) -> tuple[Tensor, State, Tensor]:
        """Lower bounds ``(p, s)``, the state that gave them, and the images that attain them ``(p, s, d)``."""
        alpha, beta = state.alpha.clone().requires_grad_(), state.beta.clone().requires_grad_()
        mix = _best_function(problems, state).requires_grad_()
        parameters = [(alpha, self.rate), (beta, self.beta_rate), (mix, 0.1)]
        moments = [Moments(it) for it, _ in parameters]
        best = alpha.new_full(alpha.shape[:2], -torch.inf)
        kept_alpha, kept_beta = state.alpha.clone(), state.beta.clone()
        images = torch.zeros(*alpha.shape[:2], problems.lower.shape[1], dtype=alpha.dtype, device=alpha.device)
        for i in range(iterations + 1):
            with torch.enable_grad():
                found, pixels, _ = least(problems, replace(state, alpha=alpha, beta=beta), mix)
            better = found.detach() > best
            best = torch.where(better, found.detach(), best)
            kept_alpha = torch.where(better[..., None], alpha.detach(), kept_alpha)
            kept_beta = torch.where(better[..., None], beta.detach(), kept_beta)
            at = torch.where(pixels.detach() > 0, problems.lower[:, None], problems.upper[:, None])
            images = torch.where(better[..., None], at, images)
            if i == iterations or bool((best > 0).all()):
                break
            gradients = torch.autograd.grad(found.sum(), [it for it, _ in parameters], allow_unused=True)
            with torch.no_grad():
                for (value, rate), moment, gradient in zip(parameters, moments, gradients, strict=True):
                    if gradient is not None:
                        value.add_(moment.direction(gradient, i), alpha=rate * 0.97**i)
                alpha.clamp_(0, 1)
                beta.clamp_(min=0).mul_(state.signs != 0)
                mix.clamp_(min=0).div_(mix.sum(2, keepdim=True).clamp(min=1e-12))
        best = torch.where((state.low > state.high).any(2), torch.inf, best)  # there is no such image
        return best.nan_to_num(-torch.inf, torch.inf), replace(state, alpha=kept_alpha, beta=kept_beta), images

    @torch.no_grad()
    def _split(self, problems: Reduced, parents: State) -> State:
        """Both children of each parent: ``(p, 2 s, n)``, first all with 1, then all with -1."""
        bound, _, costs = least(problems, parents)
        count = min(self.candidates, costs.shape[2])
        tried = costs.topk(count, dim=2).indices  # (p, s, c)
        p, s, n = parents.signs.shape

        def said(sign: int) -> State:
            wide = parents.map(lambda it: it[:, :, None].expand(p, s, count, n))
            signs = wide.signs.scatter(3, tried[..., None], float(sign))
            low = torch.where(signs > 0, wide.low.clamp(min=0), wide.low)
            high = torch.where(signs < 0, wide.high.clamp(max=0), wide.high)
            return replace(wide, signs=signs, low=low, high=high).map(lambda it: it.reshape(p, s * count, n))

        sides = [said(1), said(-1)]
        found = [least(problems, it)[0].view(p, s, count) for it in sides]
        # What a side gains beyond 0 is of no use: it is shown.
        gains = [(it.clamp(max=0) - bound[..., None]).clamp(min=LEAST_GAIN) for it in found]
        score = torch.where(costs.gather(2, tried) > 0, gains[0] * gains[1], -1.0)
        chosen = score.argmax(2) + count * torch.arange(s, device=score.device)
        return State.join([it.take(chosen) for it in sides], lambda parts: torch.cat(parts, 1))


def least(problems: Reduced, state: State, mix: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Lower bounds of sub-problems.

    Args:
        problems: ``p`` of them.
        state: of ``s`` sub-problems each.
        mix: weights with which the margins are joined, at least 0 with the sum 1, ``(p, s, m)``; None for equal ones.

    Returns:
        The bounds ``(p, s)``, the coefficients of the pixels ``(p, s, d)``, and what the relaxation of each ReLU
        costs the bound at most, ``(p, s, n)``, 0 for those that are settled.
    """
    margins, lines = problems.margins, _Lines.of(state)
    count = margins.constant.shape[1]
    weights = state.signs.new_full((*state.signs.shape[:2], count), 1 / count) if mix is None else mix
    bound = (weights @ (margins.constant - margins.slack)[..., None]).squeeze(2)
    outputs, costs = [weights @ it for it in margins.before], []
    pixels = weights @ margins.pixels
    said = state.beta * state.signs
    for k, at in reversed(list(enumerate(_places(problems)))):
        block, a, below, steep = problems.blocks[k], outputs[k], lines.below[:, :, at], lines.steep[:, :, at]
        costs.append(_cost(a, lines, at).detach())
        a = a * torch.where(a > 0, below, steep)
        bound = bound - (a.clamp(max=0) * lines.zero[:, :, at]).sum(2)
        a = a - said[:, :, at]
        bound = bound + (a @ block.constant[..., None] - a.abs() @ block.slack[..., None]).squeeze(2)
        pixels = pixels + a @ block.pixels
        for j, matrix in enumerate(block.before):
            outputs[j] = outputs[j] + a @ matrix
    bound = bound + _least_image(problems, pixels)
    return bound, pixels, torch.cat(costs[::-1], 2) if costs else state.signs


@torch.no_grad()
def _best_function(problems: Reduced, state: State) -> Tensor:
    """All weight on the function with the best bound: ``(p, s, m)``."""
    count = problems.margins.constant.shape[1]
    single = torch.eye(count, dtype=state.signs.dtype, device=state.signs.device)
    if count == 1:
        return single.expand(*state.signs.shape[:2], 1).clone()
    found = [least(problems, state, it.expand(*state.signs.shape[:2], -1))[0] for it in single]
    return single[torch.stack(found, 2).argmax(2)]


def _least_image(problems: Reduced, pixels: Tensor) -> Tensor:
    """The least of ``pixels @ x`` on each problem's region: ``(p, s, d)`` to ``(p, s)``."""
    lower, upper = problems.lower, problems.upper
    error = 4 * torch.finfo(pixels.dtype).eps * pixels.shape[-1]
    centre = (lower + upper) / 2
    radius = (upper - lower) / 2 + error * torch.maximum(lower.abs(), upper.abs())
    return (pixels @ centre[..., None] - pixels.abs() @ radius[..., None]).squeeze(2)


def _places(problems: Reduced) -> list[slice]:
    """Where each block's ReLUs are in a state."""
    ends = [0]
    for block in problems.blocks:
        ends.append(ends[-1] + block.lower.shape[1])
    return [slice(*pair) for pair in itertools.pairwise(ends)]


@dataclass(frozen=True, eq=False)
class _Lines:
    """Of each ReLU in each sub-problem: the slopes of its lines, and where the upper one is zero, ``(p, s, n)``."""

    is_open: Tensor
    below: Tensor
    steep: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, state: State) -> "_Lines":
        low, high = state.low, state.high
        is_open = (low < 0) & (high > 0)
        active = (low >= 0).to(low)
        steep = (high / (high - low)) * (1 + 4 * torch.finfo(high.dtype).eps)
        steep = torch.where(is_open, steep.nan_to_num(1.0), active)
        return cls(is_open, torch.where(is_open, state.alpha, active), steep, torch.where(is_open, low, 0.0), low, high)


def _cost(a: Tensor, lines: _Lines, at: slice) -> Tensor:
    """The most by which a ReLU's line is off, times its coefficient."""
    below, steep, low, high = (it[:, :, at] for it in (lines.below, lines.steep, lines.low, lines.high))
    above = a.clamp(max=0) * steep * low
    under = a.clamp(min=0) * torch.maximum((1 - below) * high, below * -low)
    return torch.where(lines.is_open[:, :, at], above + under, 0.0)


def _joined(parts: list[Tensor], problems: Reduced) -> Tensor:
    return torch.cat(parts, 1) if parts else problems.lower[:, :0]


@dataclass
class _Queue:
    """Open sub-problems of one problem."""

    state: State
    bounds: Tensor

    def __len__(self) -> int:
        return len(self.bounds)

    @property
    def lowest(self) -> float:
        """Of the bounds; infinite where none is left."""
        return float(self.bounds.min()) if len(self.bounds) else float("inf")

    def worst(self, count: int) -> tuple[State, Tensor]:
        """Take out those with the lowest bounds."""
        order = self.bounds.argsort(stable=True)
        first, rest = order[:count], order[count:]
        taken, bounds = self._part(first), self.bounds[first]
        self.state, self.bounds = self._part(rest), self.bounds[rest]
        return taken, bounds

    def put(self, state: State, bounds: Tensor) -> None:
        """Add sub-problems."""
        self.state = State.join([self.state, state], torch.cat)
        self.bounds = torch.cat([self.bounds, bounds])

    def _part(self, which: Tensor) -> State:
        return self.state.map(lambda it: it[which])
