"""VNN-LIB: properties as VNN-COMP writes them, by hand and at random, and what they mean at single points."""

import gzip
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from redan.certification.regions import Region, Specification
from redan.certification.vnnlib import read_counterexample, read_vnnlib, write_counterexample, write_vnnlib
from redan.errors import UserError
from redan.threats import L2, Linf


def declare(inputs: int, outputs: int) -> str:
    names = [f"X_{i}" for i in range(inputs)] + [f"Y_{j}" for j in range(outputs)]
    return "".join(f"(declare-const {name} Real)\n" for name in names)


BOX = "(assert (>= X_0 0)) (assert (<= X_0 1)) (assert (>= X_1 -1)) (assert (<= X_1 1))\n"


def written(folder: Path, text: str, inputs: int = 2, outputs: int = 3) -> Path:
    path = folder / "p.vnnlib"
    path.write_text(declare(inputs, outputs) + text)
    return path


def rows(specification: Specification) -> list[list[float]]:
    """Each row as group, coefficients, offset."""
    parts = (specification.groups.tolist(), specification.weights[0].tolist(), specification.offsets[0].tolist())
    return [[group, *weights, offset] for group, weights, offset in zip(*parts, strict=True)]


# The independent reference: evaluates the text itself, as the SMT formula that it is, in Python.


def holds(text: str, inputs: Tensor, outputs: Tensor) -> bool:
    """Whether all assertions of a file are true at one point."""
    spaced = re.sub(r";.*", "", text).replace("(", " ( ").replace(")", " ) ").split()
    python = " ".join({"(": "[", ")": "],"}.get(it, f"{it!r},") for it in spaced)
    values = {f"X_{i}": v for i, v in enumerate(inputs.tolist())} | {
        f"Y_{j}": v for j, v in enumerate(outputs.tolist())
    }
    return all(evaluate(form[1], values) for form in eval(f"[{python}]") if form[0] == "assert")


def evaluate(term: Any, values: dict[str, float]) -> Any:
    if isinstance(term, str):
        return values[term] if term in values else float(term)
    parts = [evaluate(it, values) for it in term[1:]]
    match term[0]:
        case "and":
            return all(parts)
        case "or":
            return any(parts)
        case "<=" | ">=":
            return parts[0] <= parts[1] if term[0] == "<=" else parts[0] >= parts[1]
        case "+":
            return sum(parts)
        case "-":
            return parts[0] - sum(parts[1:]) if parts[1:] else -parts[0]
        case "*":
            return torch.tensor(parts, dtype=torch.float64).prod().item()


def violated(pairs: list[tuple[Region, Specification]], inputs: Tensor, outputs: Tensor) -> bool:
    """The same, of what was read."""
    return any(
        bool(((region.lower <= inputs) & (inputs <= region.upper)).all())
        and not specification.shown(specification.values(outputs[None]))[0]
        for region, specification in pairs
    )


ACAS = """
; unsafe if 0 is not minimal, in one of two boxes
(assert (or
    (and (<= X_0 0.7) (>= X_0 -0.129289109) (<= X_1 0.5) (>= X_1 0.11140846))
    (and (<= X_0 0.7) (>= X_0 -0.129289109) (<= X_1 -0.11140846) (>= X_1 -4.99999896e-1))
))
(assert (or
     (<= Y_1 Y_0)
     (<= Y_2 Y_0)
))
"""
CIFAR = """
(assert (<= X_0 0.75))
(assert (>= X_0 0.25))

(assert (<= X_1 5e-1))
(assert (>= X_1 -.5E+0))
(assert (or
    (and (>= Y_1 Y_0))
    (and (>= Y_2 Y_0))
))
"""
ONE_LINE = BOX + "(assert (<= Y_0 Y_1))(assert (<= Y_0 Y_2))"
PAIRED = """
(assert (or (and (>= X_0 0) (<= X_0 1) (>= X_1 0) (<= X_1 1) (<= Y_0 0.5))
            (and (>= X_0 -1) (<= X_0 0) (>= X_1 0) (<= X_1 1) (>= Y_0 Y_1) (>= Y_0 Y_2))
            (and (>= X_0 0) (<= X_0 1) (>= X_1 0) (<= X_1 1) (>= Y_2 0.25))))
"""
ARITHMETIC = (
    BOX
    + """
(assert (or (>= (- Y_0 Y_1 0.5) (* 2 (+ Y_2 -1) 0.5)) (and (<= (- Y_0) (- 1.0)) (<= (+ Y_0 Y_1 Y_2) 0))))
(assert (<= (* -2 X_0) -0.5)) ; tightens
"""
)
NESTED = """(assert (and (>= X_0 0) (<= X_0 1) (and (>= X_1 0) (or (<= X_1 1) (and (<= X_1 2) (<= Y_0 Y_2))))
    (or (<= Y_0 Y_1) (or (<= Y_0 0) (and (<= Y_1 0) (<= Y_2 0))))))"""
STYLES = {
    "acas": ACAS,
    "cifar": CIFAR,
    "one line": ONE_LINE,
    "paired": PAIRED,
    "arithmetic": ARITHMETIC,
    "nested": NESTED,
}


@pytest.mark.parametrize("text", STYLES.values(), ids=STYLES)
def test_meaning_at_random_points(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    pairs = read_vnnlib(path, (2,), 3)
    draws = torch.Generator().manual_seed(0)
    points = [
        (
            2 * torch.rand(2, dtype=torch.float64, generator=draws) - 0.8,
            torch.randn(3, dtype=torch.float64, generator=draws),
        )
        for _ in range(1500)
    ]
    expected = [holds(path.read_text(), *point) for point in points]
    assert [violated(pairs, *point) for point in points] == expected
    assert 20 < sum(expected) < 1480


def test_two_boxes_make_two_properties(tmp_path: Path) -> None:
    pairs = read_vnnlib(written(tmp_path, ACAS), (2,), 3)
    assert [region.lower.tolist() for region, _ in pairs] == [
        [[-0.129289109, 0.11140846]],
        [[-0.129289109, -0.499999896]],
    ]
    assert [region.upper.tolist() for region, _ in pairs] == [[[0.7, 0.5]], [[0.7, -0.11140846]]]
    for _, specification in pairs:
        assert rows(specification) == [[0, -1, 1, 0, 0], [1, -1, 0, 1, 0]]


def test_a_conjunction_is_one_group(tmp_path: Path) -> None:
    ((region, specification),) = read_vnnlib(written(tmp_path, ONE_LINE), (2,), 3)
    assert rows(specification) == [[0, 1, -1, 0, 0], [0, 1, 0, -1, 0]]
    assert region.lower.dtype == specification.weights.dtype == specification.offsets.dtype == torch.float64


def test_cases_of_one_box_are_groups_of_one_specification(tmp_path: Path) -> None:
    (_, first), (_, second) = read_vnnlib(written(tmp_path, PAIRED), (2,), 3)
    assert rows(first) == [[0, 1, 0, 0, -0.5], [1, 0, 0, -1, 0.25]]
    assert rows(second) == [[0, -1, 1, 0, 0], [0, -1, 0, 1, 0]]


def test_numbers_are_in_the_order_of_the_image(tmp_path: Path) -> None:
    bounds = "".join(f"(assert (>= X_{i} {i}))(assert (<= X_{i} {i}.5))\n" for i in reversed(range(12)))
    ((region, _),) = read_vnnlib(written(tmp_path, bounds + "(assert (<= Y_0 0))", inputs=12), (3, 2, 2), 3)
    assert torch.equal(region.lower, torch.arange(12.0, dtype=torch.float64).view(1, 3, 2, 2))
    assert torch.equal(region.upper, region.lower + 0.5)


def test_robustness_is_the_specification_of_the_label(tmp_path: Path) -> None:
    """The file of VNN-COMP's style says what ``Specification.robust`` says."""
    images = torch.rand(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    specification = Specification.robust(torch.tensor([1]), 4)
    write_vnnlib(tmp_path / "p.vnnlib", Region.around(images, Linf(0.1)), specification)
    text = (tmp_path / "p.vnnlib").read_text()
    expected = "(assert (or\n    (and (<= Y_1 Y_0))\n    (and (<= Y_1 Y_2))\n    (and (<= Y_1 Y_3))\n))\n"
    assert text.startswith("(declare-const X_0 Real)\n") and text.endswith(expected)


# Round trips

floats = st.floats(allow_nan=False, allow_infinity=False)
small = st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-1e6, 1e6)


@st.composite
def properties(draw: st.DrawFn) -> tuple[Region, Specification]:
    n, shape, outputs = draw(st.integers(1, 3)), draw(st.sampled_from([(3,), (1, 2, 2)])), draw(st.integers(1, 4))
    size = int(torch.Size(shape).numel())
    bounds = [sorted(draw(st.tuples(floats, floats))) for _ in range(n * size)]
    lower, upper = (torch.tensor(it, dtype=torch.float64).view(n, *shape) for it in zip(*bounds, strict=True))
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    many = len(groups)
    weights = torch.tensor([draw(small) for _ in range(n * many * outputs)], dtype=torch.float64).view(n, many, outputs)
    offsets = torch.tensor([draw(small) for _ in range(n * many)], dtype=torch.float64).view(n, many)
    return Region(lower, upper), Specification(weights, offsets, groups)


@settings(max_examples=100, deadline=None)
@given(stated=properties(), packed=st.booleans(), data=st.data())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    stated: tuple[Region, Specification],
    packed: bool,
    data: st.DataObject,
) -> None:
    region, specification = stated
    index = data.draw(st.integers(0, len(region) - 1))
    path = tmp_path_factory.mktemp("p") / ("p.vnnlib.gz" if packed else "p.vnnlib")
    write_vnnlib(path, region, specification, index)
    ((box, found),) = read_vnnlib(path, region.lower.shape[1:], specification.weights.shape[2])
    part = slice(index, index + 1)
    assert torch.equal(box.lower, region.lower[part]) and torch.equal(box.upper, region.upper[part])
    assert torch.equal(found.weights, specification.weights[part])
    assert torch.equal(found.offsets, specification.offsets[part])
    assert torch.equal(found.groups, specification.groups)


def test_packed_files_are_packed(tmp_path: Path) -> None:
    region, specification = Region(torch.zeros(1, 2), torch.ones(1, 2)), Specification.robust(torch.tensor([0]), 2)
    write_vnnlib(tmp_path / "p.vnnlib", region, specification)
    write_vnnlib(tmp_path / "p.vnnlib.gz", region, specification)
    assert gzip.decompress((tmp_path / "p.vnnlib.gz").read_bytes()) == (tmp_path / "p.vnnlib").read_bytes()


def test_groups_in_any_order(tmp_path: Path) -> None:
    weights, groups = torch.eye(3, dtype=torch.float64)[None], torch.tensor([1, 0, 1])
    region = Region(torch.zeros(1, 2), torch.ones(1, 2))
    write_vnnlib(tmp_path / "p.vnnlib", region, Specification(weights, torch.zeros(1, 3), groups))
    ((_, found),) = read_vnnlib(tmp_path / "p.vnnlib", (2,), 3)
    assert rows(found) == [[0, 0, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 1, 0]]


def test_balls_cannot_be_written(tmp_path: Path) -> None:
    region = Region.around(torch.rand(1, 1, 2, 2), L2(0.5))
    with pytest.raises(UserError, match="boxes only, and no L2 ball"):
        write_vnnlib(tmp_path / "p.vnnlib", region, Specification.robust(torch.tensor([0]), 2))
    assert not list(tmp_path.iterdir())


# Mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOX + "(assert (<= Y_0 Z_0))", ", line 7: 'Z_0' is neither a number nor declared"),
        (BOX + "(assert (<= Y_0 Y_3))", ", line 7: 'Y_3' is neither a number nor declared"),
        (BOX + "(assert (<= Y_0 1e))", ", line 7: '1e' is neither a number nor declared"),
        (BOX + "(assert (<= Y_0 nan))", ", line 7: 'nan' is neither a number nor declared"),
        (BOX + "(assert (<= Y_0 1e999))", ", line 7: a number is too large for float64"),
        (BOX + "(assert (<= (* Y_0 Y_1) 0))", ", line 7: a product of variables is not linear"),
        (BOX + "(assert (<= (/ Y_0 2) 0))", ", line 7: expected a sum, a difference or a product (+, -, *), not (/ Y"),
        (BOX + "(assert (< Y_0 0))", ", line 7: expected and, or, or a comparison <= or >= of two terms, not (< Y"),
        (BOX + "(assert (not (<= Y_0 0)))", ", line 7: expected and, or, or a comparison <= or >="),
        (BOX + "(assert (and))", ", line 7: expected and, or, or a comparison"),
        (BOX + "(assert (or (<= Y_0 0) Y_1))", ", line 7: (or ...) takes formulas in parentheses"),
        (BOX + "(assert (<= Y_0 0 1))", ", line 7: expected and, or, or a comparison <= or >= of two terms"),
        (BOX + "(assert (or\n\n(<= Y_0\n(+))))", ", line 10: expected a sum"),
        (BOX + "(assert (<= X_0 Y_0))", ", line 7: a constraint on inputs must bound one X, without other variables"),
        (BOX + "(assert (<= (+ X_0 X_1) 1))", ", line 7: a constraint on inputs must bound one X"),
        (BOX + "(assert (<= Y_0 0)", ", line 7: the parenthesis is never closed"),
        (BOX + "(assert (<= Y_0 0)))", ", line 7: ')' stands outside of parentheses"),
        (BOX + "assert", ", line 7: 'assert' stands outside of parentheses"),
        (BOX + "(assert (<= Y_0 0)) (check-sat)", ", line 7: expected (declare-const X_0 Real), of X or Y"),
        ("(vnnlib-version <2.0>)", ", line 6: expected (declare-const X_0 Real), of X or Y, or (assert ...)"),
        ("(declare-const X_2 Bool)", ", line 6: expected (declare-const X_0 Real)"),
        ("(declare-const X_2 Real)", " declares 3 inputs X and 3 outputs Y; the network has X_0 to X_1 and Y_0 to Y_2"),
        (BOX, " has a case without a constraint on outputs: every input would violate it"),
        (BOX + "(assert (or (<= Y_0 0) (<= X_0 0.5)))", " has a case without a constraint on outputs"),
        ("(assert (<= Y_0 0))", ": X_0 has no lower bound"),
        (BOX.replace("(assert (<= X_1 1))", "(assert (<= Y_0 0))"), ": X_1 has no upper bound"),
        (BOX + "\n(assert (>= X_0 2))(assert (<= Y_0 0))", ", line 8: X_0 is at least 2.0 and at most 1.0"),
        (BOX + "(assert " + "(and " * 5000 + "(<= Y_0 0)" + ")" * 5001, ": its expressions are nested too deeply"),
        (BOX + "(assert (or (<= Y_0 0) (<= Y_1 0)))\n" * 20, ", line 23: the disjunctions up to here make more than"),
    ],
)  # fmt: skip
def test_mistakes_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_vnnlib(path, (2,), 3)
    assert str(caught.value).startswith(f"{path}{message}") and "\n" not in str(caught.value)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no .*none.vnnlib$"):
        read_vnnlib(tmp_path / "none.vnnlib", (2,), 3)
    whole = gzip.compress((declare(2, 3) + CIFAR).encode())
    for name, content in (("p.vnnlib.gz", whole[:-9]), ("q.vnnlib.gz", b"no gzip"), ("r.vnnlib", whole)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is damaged or no text"):
            read_vnnlib(tmp_path / name, (2,), 3)


# Counterexamples


def test_counterexample_in_the_words_of_vnn_comp(tmp_path: Path) -> None:
    write_counterexample(
        tmp_path / "c.txt", torch.tensor([[0.5, 1e-7]], dtype=torch.float64), torch.tensor([-2.0, 0.25])
    )
    assert (tmp_path / "c.txt").read_text() == "sat\n((X_0 0.5)\n(X_1 1e-07)\n(Y_0 -2.0)\n(Y_1 0.25))\n"


@settings(max_examples=50, deadline=None)
@given(inputs=st.lists(floats, min_size=1, max_size=9), outputs=st.lists(floats, min_size=1, max_size=4))
def test_counterexamples_come_back(
    tmp_path_factory: pytest.TempPathFactory, inputs: list[float], outputs: list[float]
) -> None:
    path = tmp_path_factory.mktemp("c") / "c.counterexample.gz"
    write_counterexample(path, torch.tensor(inputs, dtype=torch.float64), torch.tensor(outputs, dtype=torch.float64))
    found = read_counterexample(path)
    assert [it.tolist() for it in found] == [inputs, outputs]


def test_counterexample_of_a_file_is_one(tmp_path: Path) -> None:
    path, inputs, outputs = written(tmp_path, CIFAR), torch.tensor([0.5, 0.0]), torch.tensor([0.0, 0.0, -1.0])
    write_counterexample(tmp_path / "c.txt", inputs, outputs)
    found = read_counterexample(tmp_path / "c.txt")
    assert holds(path.read_text(), *found) and violated(read_vnnlib(path, (2,), 3), *found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unsat\n", ", line 1: a counterexample begins with the line 'sat'"),
        ("sat\n", " must give the values of X and of Y"),
        ("sat\n((X_0 1))", " must give the values of X and of Y"),
        ("sat\n((X_0 1)\n(X_2 1)\n(Y_0 1))", ", line 3: expected X_1, not X_2"),
        ("sat\n((X_0 one))", ", line 2: expected (X_0 number) or (Y_0 number)"),
        ("sat\n(X_0 1)", ", line 2: expected (X_0 number) or (Y_0 number)"),
        ("sat\n((X_0 1)", ", line 2: the parenthesis is never closed"),
    ],
)
def test_damaged_counterexamples(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        read_counterexample(tmp_path / "c.txt")
    assert str(caught.value).startswith(f"{tmp_path / 'c.txt'}{message}")
