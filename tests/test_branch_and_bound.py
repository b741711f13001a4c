"""Branch and bound on reduced problems: against exact minima over all patterns of ReLUs of tiny networks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from redan.certification import verifier
from redan.certification.branch_and_bound import BranchAndBound
from redan.certification.building import Builder
from redan.certification.crown import Crown
from redan.certification.network import Network
from redan.certification.reduced import Block, Reduced, reduce, stack
from redan.certification.regions import Region, Specification
from redan.certification.rounding import SoundFloat
from redan.certification.verifier import Verifier
from redan.threats import Linf
from tests.certification_cases import (
    RELU_NETWORKS,
    Asked,
    dense,
    draws,
    exact_minima,
    outputs,
    points,
    problem,
    shifted,
)

HORIZON = 60.0  # seconds, far more than any problem here takes

# Many steps, for all slopes and multipliers to arrive: the problems are as close to 0 as they can be.
SEARCH = BranchAndBound(iterations=100, limit=40)


def convolutional(seed: int) -> Network:
    """5 pixels, two convolutions."""
    normal = draws(seed)
    b = Builder((1, 5, 1))
    x = b.relu(b.convolution(0, normal(2, 1, 2, 1), normal(2), (1, 1)))
    x = b.relu(b.convolution(x, normal(2, 2, 3, 1), normal(2), (2, 1), (1, 0)))
    return b.network(b.linear(b.reshape(x, (4,)), normal(3, 4), normal(3)))


def residual(seed: int) -> Network:
    """A block around which a shortcut leads, and one more behind the second ReLU."""
    normal = draws(seed)
    b = Builder((3, 1, 1))
    x = b.linear(b.reshape(0, (3,)), normal(4, 3), normal(4))
    y = b.add(x, b.linear(b.relu(x), normal(4, 4), normal(4)))
    y = b.add(b.relu(y), x)
    return b.network(b.linear(y, normal(3, 4), normal(3)))


def twice(seed: int) -> Network:
    """Two ReLUs of one layer, as ``f(relu(x)) + g(relu(x))`` writes them."""
    normal = draws(seed)
    b = Builder((3, 1, 1))
    x = b.linear(b.reshape(0, (3,)), normal(4, 3), normal(4))
    x = b.add(*(b.linear(b.relu(x), normal(4, 4), normal(4)) for _ in range(2)))
    return b.network(b.linear(b.relu(x), normal(3, 4), normal(3)))


TINY = {
    "dense": lambda seed: dense(seed, hidden=(6, 5), inputs=3),
    "convolutional": convolutional,
    "residual": residual,
    "twice": twice,
}


def tiny(kind: str, seed: int, radius: float = 0.3) -> tuple[Network, Region, Specification]:
    network = TINY[kind](seed)
    return network, *problem(network, Linf(radius), seed, images=1)


def minima(network: Network, region: Region, specification: Specification) -> Tensor:
    return torch.tensor([exact_minima(network, region, specification, 0)], dtype=torch.float64)


def reduced(
    network: Network,
    region: Region,
    specification: Specification,
    rows: list[Tensor] | None = None,
    sound: SoundFloat = "exact",
) -> Reduced:
    layers = Crown(sound=sound)(network, region, specification).layers
    rows = rows or list(torch.arange(specification.offsets.shape[1])[:, None])
    return reduce(network, region, specification, layers, rows, sound)


def each(problems: Reduced, seconds: float = HORIZON) -> dict[str, Any]:
    """Every problem an image of its own, with as many seconds."""
    return {"owners": range(len(problems)), "seconds": dict.fromkeys(range(len(problems)), seconds)}


class Judge:
    """Says whether an image violates all functions of a problem, and keeps those that do."""

    def __init__(self, network: Network, specification: Specification, rows: list[Tensor]) -> None:
        self.network, self.specification, self.rows = network, specification, rows
        self.images: dict[int, Tensor] = {}

    def __call__(self, which: int, images: Tensor) -> bool:
        assert images.dtype == torch.float64 and images.dim() == 2
        logits = self.network(images.view(-1, *self.network.input_shape))
        values = torch.cat([self.specification.values(it[None]) for it in logits])[:, self.rows[which]]
        found = images[(values <= 0).all(1)]
        if len(found):
            self.images[which] = found[0]
        return len(found) > 0


def solve(
    network: Network,
    region: Region,
    specification: Specification,
    rows: list[Tensor] | None = None,
    search: BranchAndBound = SEARCH,
) -> tuple[list[bool | None], Tensor, list[int], Judge]:
    rows = rows or list(torch.arange(specification.offsets.shape[1])[:, None])
    judge = Judge(network, specification, rows)
    problems = reduced(network, region, specification, rows)
    verdicts, lower, visited, _ = search(problems, **each(problems), refuted=judge)
    for image in judge.images.values():
        assert ((image >= region.lower[0].flatten()) & (image <= region.upper[0].flatten())).all()
    return verdicts, lower, visited, judge


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", TINY)
def test_verdict_is_the_sign_of_the_minimum(kind: str, seed: int) -> None:
    network, region, specification = tiny(kind, seed)
    exact = minima(network, region, specification)
    for above in (torch.tensor([[1.0, -1.0]]), torch.tensor([[-1.0, 1.0]])):
        least = 0.02 * above
        verdicts, lower, visited, judge = solve(network, region, shifted(specification, least - exact))
        # What is false is refuted, or at the least not shown: the counterexample may be no corner of the box.
        for verdict, holds in zip(verdicts, (above[0] > 0).tolist(), strict=True):
            assert verdict is True if holds else verdict is not True
        assert set(judge.images) == {k for k, verdict in enumerate(verdicts) if verdict is False}
        assert (lower <= least[0] + 1e-9).all()
        assert all((it >= 0) == (verdict is True) for it, verdict in zip(lower.tolist(), verdicts, strict=True))
        assert min(visited) >= 1


def test_all_patterns_decide() -> None:
    """With few steps a bound, too: four ReLUs have 31 sub-problems at most."""
    network, region, specification = tiny("dense", 0)
    case = shifted(specification, 0.02 - minima(network, region, specification))
    assert reduced(network, region, case).open == 4
    verdicts, _, visited, _ = solve(network, region, case, search=BranchAndBound(limit=200))
    assert verdicts == [True, True] and 1 < max(visited) <= 31


def vee(gap: float) -> tuple[Network, Region, Specification]:
    """Of a number in [0, 1], ``x - 1/2 + gap`` and ``1/2 - x + gap``, each through a pair of ReLUs: one is above 0."""
    b = Builder((1, 1, 1))
    x = b.linear(b.reshape(0, (1,)), torch.tensor([[1.0], [-1.0]]), torch.tensor([-0.5, 0.5]))
    x = b.relu(b.linear(b.relu(x), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([1.0, 1.0])))
    network = b.network(b.linear(x, torch.eye(2), torch.tensor([gap - 1, gap - 1])))
    region = Region(torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double())
    specification = Specification(torch.eye(2).double()[None], torch.zeros(1, 2).double(), torch.zeros(2).long())
    return network, region, specification


@pytest.mark.parametrize(("gap", "holds"), [(0.02, True), (-0.02, False)])
def test_one_of_two_holds_everywhere(gap: float, holds: bool) -> None:
    network, region, specification = vee(gap)
    assert exact_minima(network, region, specification, 0) == pytest.approx([gap])
    rows = [torch.tensor([0, 1])]
    # The counterexamples are around the middle of the box, not at its corners.
    assert (solve(network, region, specification, rows)[0] == [True]) == holds
    apart = solve(network, region, specification)
    assert apart[0] == [False, False]


@pytest.mark.parametrize("seed", range(3))
def test_groups_of_functions(seed: int) -> None:
    network, region, specification = tiny("dense", seed)
    both = replace(specification, groups=torch.zeros(2, dtype=torch.int64))
    apart = exact_minima(network, region, specification, 0)
    # As low as each other, so that neither holds alone.
    level = shifted(both, -torch.tensor([apart]) - 0.1)
    (least,) = exact_minima(network, region, level, 0)
    assert least >= -0.1 - 1e-9
    for shift in (0.03, -0.03):
        case = shifted(level, torch.full((1, 2), shift - least))
        verdicts, _, _, judge = solve(network, region, case, [torch.tensor([0, 1])])
        assert verdicts == [True] if shift > 0 else verdicts[0] is not True
        assert bool(judge.images) == (verdicts == [False])


def test_a_hopeless_function_does_not_hide_one_that_holds() -> None:
    network, region, specification = tiny("dense", 1)
    exact = exact_minima(network, region, specification, 0)
    specification = shifted(specification, torch.tensor([[0.02 - exact[0], -1000.0]]))
    assert solve(network, region, specification, [torch.tensor([0, 1])])[0] == [True]


def forward(problems: Reduced, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """The blocks' functions and the margins of images ``(k, d)``, in every problem: ``(p, k, n)``."""
    found: list[Tensor] = []

    def value(block: Block) -> Tensor:
        y = images @ block.pixels.transpose(1, 2) + block.constant[:, None]
        for before, matrix in zip(found, block.before, strict=True):
            y = y + before.relu() @ matrix.transpose(1, 2)
        return y

    for block in problems.blocks:
        found.append(value(block))
    return found, value(problems.margins)


@pytest.mark.parametrize("kind", [*RELU_NETWORKS, "twice", "tiny residual"])
def test_reduced_problem_is_the_network(kind: str) -> None:
    makers = {**RELU_NETWORKS, "twice": twice, "tiny residual": residual}
    for seed in range(3):
        network = makers[kind](seed)
        region, specification = problem(network, Linf(0.1), seed, images=1)
        layers = Crown()(network, region, specification).layers
        problems = reduce(network, region, specification, layers, [torch.tensor([0]), torch.tensor([1])], "exact")
        x = points(network, region, specification, seed)
        found = outputs(network, x)
        pixels = x.flatten(0, 1).flatten(1)
        hidden, margins = forward(problems, pixels)
        expected = torch.stack([specification.values(it) for it in found[-1]])[:, 0].T
        slack = problems.margins.slack[:, 0, None]
        assert ((margins[:, :, 0] - expected).abs() <= slack).all()
        assert (slack < 1e-9).all()
        is_open = {k: ((low < 0) & (high > 0))[0].flatten() for k, (low, high) in layers.items()}
        blocks = [k for k in sorted(layers) if is_open[k].any()]
        assert len(blocks) == len(problems.blocks) and problems.open == sum(int(is_open[k].sum()) for k in blocks)
        for k, y, block in zip(blocks, hidden, problems.blocks, strict=True):
            values = found[k][:, 0].flatten(1)[:, is_open[k]]
            assert ((y[0] - values).abs() <= block.slack[0]).all()
            assert ((values >= block.lower[0]) & (values <= block.upper[0])).all()
            assert (block.slack < 1e-9).all()


def test_slack_of_the_modes() -> None:
    network, region, specification = tiny("dense", 0)
    off, exact, runtime = (
        reduced(network, region, specification, sound=it).margins.slack for it in ("off", "exact", "network")
    )
    assert (off == 0).all() and (exact > 0).all() and (exact < 1e-10).all()
    assert (runtime > 1e-7).all() and (runtime < 1e-3).all()


def images_side_by_side() -> tuple[Network, list[tuple[Region, Specification]]]:
    """One network, images of different difficulty: no ReLU open, one layer's, both layers'; shown and refuted ones."""
    network = dense(3, hidden=(6, 5), inputs=3)
    cases = []
    for seed, radius, shift in ((0, 0.001, 0.001), (1, 0.05, 0.02), (2, 0.3, 0.02), (3, 0.3, -0.02), (4, 0.4, 0.02)):
        region, specification = problem(network, Linf(radius), seed, images=1)
        exact = minima(network, region, specification)
        cases.append((region, shifted(specification, shift - exact)))
    return network, cases


def test_company_changes_nothing() -> None:
    network, cases = images_side_by_side()
    rows = [torch.tensor([0]), torch.tensor([1])]
    problems = [reduced(network, *case) for case in cases]
    assert len({it.open for it in problems}) > 2 and min(it.open for it in problems) < 3
    alone = [solve(network, *case) for case in cases]
    judges = [Judge(network, specification, rows) for _, specification in cases]
    together = stack(problems)
    assert len(together) == 2 * len(cases)
    verdicts, _, visited, _ = SEARCH(
        together, **each(together), refuted=lambda k, images: judges[k // 2](k % 2, images)
    )
    assert verdicts == [it for found in alone for it in found[0]]
    assert visited == [it for found in alone for it in found[2]]
    assert {True, False} <= set(verdicts) and max(visited) > 5


def test_stacked_problems_are_the_same_functions() -> None:
    network, cases = images_side_by_side()
    problems = [reduced(network, *case) for case in cases]
    together = stack(problems)
    for i, (it, (region, _)) in enumerate(zip(problems, cases, strict=True)):
        x = region.lower.lerp(region.upper, draws(i)(20, *network.input_shape).abs().clamp(max=1)).flatten(1)
        part = together.part(torch.tensor([2 * i, 2 * i + 1]))
        torch.testing.assert_close(forward(part, x)[1], forward(it, x)[1], atol=1e-12, rtol=0)
        assert part.blocks[-1].lower.shape == part.blocks[-1].slack.shape
    assert stack(problems[:1]) is problems[0]


def test_no_time_left() -> None:
    network, region, specification = tiny("dense", 0)
    exact = minima(network, region, specification)
    case = shifted(specification, 0.001 - exact)
    problems = reduced(network, region, case)
    search = BranchAndBound(iterations=1)
    verdicts, lower, visited, spent = search(problems, **each(problems, 0.0), refuted=lambda k, images: False)
    assert None in verdicts and set(verdicts) <= {None, True}
    assert visited == [1, 1] and set(spent) == {0, 1} and min(spent.values()) > 0
    assert (lower <= 0.001).all() and lower.isfinite().all()
    limited = replace(search, batch=2, limit=3)
    verdicts, lower, visited, _ = limited(problems, **each(problems), refuted=lambda k, images: False)
    assert max(visited) <= 4
    assert (lower <= 0.001).all()


def test_an_image_ends_with_its_first_problem_that_is_lost() -> None:
    """And only that image, however many are worked on; nor does the time of one end another."""
    network, region, specification = tiny("dense", 0)
    exact = minima(network, region, specification)
    hard = reduced(network, region, shifted(specification, 0.02 - exact))
    false = reduced(network, region, shifted(specification, torch.tensor([[0.02, -1000.0]]) - exact))
    together = stack([hard, false, hard])

    def refuted(k: int, images: Tensor) -> bool:
        return k == 3

    owners, long = [0, 0, 1, 1, 2, 2], dict.fromkeys(range(3), HORIZON)
    verdicts, _, visited, spent = SEARCH(together, owners=owners, seconds=long, refuted=refuted)
    assert verdicts == [True, True, None, False, True, True] and visited[2] == 1 < visited[0]
    assert spent[1] < spent[0]
    verdicts, _, visited, _ = SEARCH(together, owners=owners, seconds=long | {0: 0.0}, refuted=refuted)
    assert None in verdicts[:2] and verdicts[2:] == [None, False, True, True]


def test_the_verifier_comes_to_the_same_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it matter whether an image's problems are all looked at together."""
    network, cases = images_side_by_side()
    region, specification = problem(network, Linf(0.3), 8, images=1)
    # The first half holds, the second does not.
    half = torch.tensor([[0.02, -0.02]]) - minima(network, region, specification)
    cases.append((region, shifted(specification, half)))
    region = Region(torch.cat([it.lower for it, _ in cases]), torch.cat([it.upper for it, _ in cases]))
    parts = [it for _, it in cases]
    specification = Specification(
        torch.cat([it.weights for it in parts]), torch.cat([it.offsets for it in parts]), parts[0].groups
    )
    asked = Asked(network, region, specification)
    sizes: list[int] = []

    def listens(problems: list[Reduced]) -> Reduced:
        sizes.append(len(problems))
        return stack(problems)

    monkeypatch.setattr(verifier, "stack", listens)
    found = []
    for many, numbers in ((False, 2**15), (False, 1), (True, 2**15)):
        monkeypatch.setattr(verifier, "side_by_side", lambda device, many=many: many)
        monkeypatch.setattr(verifier, "AT_ONCE", numbers)
        found.append([(it.outcome, it.by) for it in Verifier("branch-and-bound")(network, asked)])
        assert (max(sizes) > 1) is many
    assert found[0] == found[1] == found[2] and ("certified", "branch-and-bound") in found[0]
    assert found[0][-1][0] != "certified"


def test_a_root_that_is_shown_is_not_split() -> None:
    network, region, specification = tiny("dense", 0)
    exact = minima(network, region, specification)
    case = shifted(specification, 100 - exact)
    verdicts, lower, visited, _ = solve(network, region, case)
    assert (verdicts, visited) == ([True, True], [1, 1])
    assert (lower > 0).all()


def test_an_unsound_block_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upper lines that are too flat by a hundredth make branch and bound show what is false by a hair."""
    from redan.certification import branch_and_bound

    of = branch_and_bound._Lines.of

    def wrong(state: branch_and_bound.State) -> branch_and_bound._Lines:
        lines = of(state)
        return replace(lines, steep=torch.where(lines.is_open, 0.99 * lines.steep, lines.steep))

    def shown() -> int:
        count = 0
        for kind, seed in (("residual", 1), ("twice", 2)):  # whose bounds come that close
            network, region, specification = tiny(kind, seed)
            exact = minima(network, region, specification)
            problems = reduced(network, region, shifted(specification, -1e-4 - exact))
            verdicts, *_ = BranchAndBound(limit=40)(problems, **each(problems), refuted=lambda k, i: False)
            count += verdicts.count(True)
        return count

    assert shown() == 0
    monkeypatch.setattr(branch_and_bound._Lines, "of", wrong)
    assert shown() > 0
