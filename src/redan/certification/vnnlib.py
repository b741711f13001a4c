"""Properties in VNN-LIB 1.0 and counterexamples in VNN-COMP's format, as files.

A property says when a network is at fault: for some input ``X`` within bounds, with outputs ``Y``, all assertions hold.
Brought into a disjunction of conjunctions, each conjunction is a box and inequalities ``C Y + d <= 0``; it is refuted
on the box where at least one of its ``C Y + d`` is above 0, which is a group of a ``Specification``.

Sources: Demarchi, Guidotti, Pulina and Tacchella, "Supporting Standardization of Neural Networks Verification with
VNN-LIB and CoCoNet", FoMLAS 2023; the rules of VNN-COMP.
"""

import gzip
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from redan.certification.regions import Region, Specification
from redan.errors import UserError
from redan.files import write_atomically

MOST = 100_000  # conjunctions of one property; nested disjunctions multiply
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_VARIABLE = re.compile(r"[XY]_(0|[1-9]\d*)")


@dataclass(frozen=True)
class _Form:
    """A parenthesised expression and the line on which it begins."""

    line: int
    parts: "list[_Form | str]" = field(default_factory=list)


@dataclass(frozen=True)
class _Linear:
    """``sum of coefficients times variables, plus constant``; as an atom of the formula, that this is at most 0."""

    coefficients: dict[str, float]
    constant: float
    line: int = 0

    def plus(self, other: "_Linear", factor: float = 1.0) -> "_Linear":
        found = dict(self.coefficients)
        for name, value in other.coefficients.items():
            found[name] = found.get(name, 0.0) + factor * value
        return _Linear(found, self.constant + factor * other.constant)

    def times(self, factor: float) -> "_Linear":
        return _Linear({name: factor * it for name, it in self.coefficients.items()}, factor * self.constant)


_Clauses = list[list[_Linear]]  # a disjunction of conjunctions


def read_vnnlib(path: Path, input_shape: Sequence[int], outputs: int) -> list[tuple[Region, Specification]]:
    """What is to be shown so that the property of a file is never violated, a pair for each box of inputs.

    Args:
        path: a ``.vnnlib`` file, or one compressed as ``.vnnlib.gz``.
        input_shape: of an image, whose numbers in order are ``X_0``, ``X_1``, ...
        outputs: number of logits ``Y_0``, ``Y_1``, ...

    Returns:
        Regions and specifications of one image each, float64. Numbers are read to the nearest float64; sums, products
        and bounds ``a X_i <= b`` of the file are computed in float64.

    Raises:
        UserError: where the file is missing or damaged, names other variables than the network has, or says more than
            boxes of inputs with linear constraints on outputs; with the line, where there is one.
    """
    reader = _Reader(path)
    try:
        clauses = reader.clauses()
    except RecursionError as error:
        raise UserError(f"{path}: its expressions are nested too deeply") from error
    size = math.prod(input_shape)
    if reader.declared != {f"X_{i}" for i in range(size)} | {f"Y_{j}" for j in range(outputs)}:
        counts = [sum(name.startswith(letter) for name in reader.declared) for letter in "XY"]
        raise UserError(
            f"{path} declares {counts[0]} inputs X and {counts[1]} outputs Y; "
            f"the network has X_0 to X_{size - 1} and Y_0 to Y_{outputs - 1}"
        )
    boxes: dict[tuple[tuple[float, ...], tuple[float, ...]], _Clauses] = {}
    for clause in clauses:
        rows = [atom for atom in clause if not any(name.startswith("X") for name in atom.coefficients)]
        if not rows:
            raise UserError(f"{path} has a case without a constraint on outputs: every input would violate it")
        boxes.setdefault(_box(path, clause, size), []).append(rows)
    found = []
    for bounds, groups in boxes.items():
        lower, upper = (torch.tensor(it, dtype=torch.float64).view(1, *input_shape) for it in bounds)
        found.append((Region(lower, upper), _specify(groups, outputs)))
    return found


class _Reader:
    """One pass over a file, which gathers the variables that it declares."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.declared: set[str] = set()

    def clauses(self) -> _Clauses:
        """The file's assertions as one disjunction of conjunctions."""
        asserted = []
        for form in _forms(self._path, _read(self._path)):
            match form.parts:
                case ["declare-const", str(name), "Real"] if _VARIABLE.fullmatch(name):
                    self.declared.add(name)
                case ["assert", _Form() as formula]:
                    asserted.append((formula, self._formula(formula)))
                case _:
                    raise self._error(form, "expected (declare-const X_0 Real), of X or Y, or (assert ...)")
        return self._conjunction(asserted)

    def _error(self, form: _Form, why: str) -> UserError:
        return _error(self._path, form, why)

    def _formula(self, form: _Form) -> _Clauses:
        match form.parts:
            case [("and" | "or") as word, *rest] if rest:
                parts = [(it, self._formula(it)) for it in rest if isinstance(it, _Form)]
                if len(parts) != len(rest):
                    raise self._error(form, f"({word} ...) takes formulas in parentheses")
                return self._conjunction(parts) if word == "and" else [clause for _, part in parts for clause in part]
            case ["<=", left, right]:
                return [[self._atom(form, left, right)]]
            case [">=", left, right]:
                return [[self._atom(form, right, left)]]
        raise self._error(form, f"expected and, or, or a comparison <= or >= of two terms, not {_words(form)}")

    def _conjunction(self, parts: Iterable[tuple[_Form, _Clauses]]) -> _Clauses:
        common: list[_Linear] = []  # of the parts that are single conjunctions; there may be thousands
        found: _Clauses = [[]]
        for form, part in parts:
            if len(part) == 1:
                common += part[0]
            elif len(found) * len(part) > MOST:
                raise self._error(form, f"the disjunctions up to here make more than {MOST:,} cases")
            else:
                found = [a + b for a in found for b in part]
        return [common + clause for clause in found]

    def _atom(self, form: _Form, small: "_Form | str", large: "_Form | str") -> _Linear:
        """``small - large``, which the file says is at most 0."""
        difference = self._term(form, small).plus(self._term(form, large), -1.0)
        kept = {name: value for name, value in difference.coefficients.items() if value}
        if any(name.startswith("X") for name in kept) and len(kept) > 1:
            raise self._error(form, "a constraint on inputs must bound one X, without other variables")
        if not all(math.isfinite(it) for it in (*kept.values(), difference.constant)):
            raise self._error(form, "a number is too large for float64")
        return _Linear(kept, difference.constant, form.line)

    def _term(self, parent: _Form, term: "_Form | str") -> _Linear:
        if isinstance(term, str):
            if _NUMBER.fullmatch(term):
                return _Linear({}, float(term))
            if term in self.declared:
                return _Linear({term: 1.0}, 0.0)
            raise self._error(parent, f"{term!r} is neither a number nor declared")
        match term.parts:
            case ["-", negated]:
                return self._term(term, negated).times(-1.0)
            case [("+" | "-" | "*") as word, first, *others]:
                found = self._term(term, first)
                for other in (self._term(term, it) for it in others):
                    if word != "*":
                        found = found.plus(other, 1.0 if word == "+" else -1.0)
                    elif found.coefficients and other.coefficients:
                        raise self._error(term, "a product of variables is not linear")
                    else:
                        found = found.times(other.constant) if found.coefficients else other.times(found.constant)
                return found
        raise self._error(term, f"expected a sum, a difference or a product (+, -, *), not {_words(term)}")


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged or no text: {error}") from error


def _forms(path: Path, text: str, first: int = 1) -> Iterator[_Form]:
    """The expressions of a text whose first line has that number."""
    opened: list[_Form] = []
    for line, content in enumerate(text.split("\n"), first):
        for token in re.findall(r"[()]|[^\s()]+", content.partition(";")[0]):
            if token == "(":
                opened.append(_Form(line))
            elif not opened:
                raise UserError(f"{path}, line {line}: {token!r} stands outside of parentheses")
            elif token == ")":
                form = opened.pop()
                if opened:
                    opened[-1].parts.append(form)
                else:
                    yield form
            else:
                opened[-1].parts.append(token)
    if opened:
        raise _error(path, opened[0], "the parenthesis is never closed")


def _error(path: Path, form: _Form, why: str) -> UserError:
    return UserError(f"{path}, line {form.line}: {why}")


def _words(form: _Form) -> str:
    return "(" + " ".join(it if isinstance(it, str) else "(...)" for it in form.parts[:4]) + ")"


def _box(path: Path, clause: Iterable[_Linear], size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The bounds that a conjunction sets for ``X``."""
    lower, upper = [-math.inf] * size, [math.inf] * size
    for atom in clause:
        for name, value in atom.coefficients.items():
            if name.startswith("X"):
                i, bound = int(name[2:]), -atom.constant / value
                if value > 0:
                    upper[i] = min(upper[i], bound)
                else:
                    lower[i] = max(lower[i], bound)
                if lower[i] > upper[i]:
                    raise UserError(f"{path}, line {atom.line}: {name} is at least {lower[i]} and at most {upper[i]}")
    for i, bounds in enumerate(zip(lower, upper, strict=True)):
        for bound, word in zip(bounds, ("lower", "upper"), strict=True):
            if math.isinf(bound):
                raise UserError(f"{path}: X_{i} has no {word} bound")
    return tuple(lower), tuple(upper)


def _specify(groups: _Clauses, outputs: int) -> Specification:
    rows = [atom for group in groups for atom in group]
    weights = torch.tensor(
        [[atom.coefficients.get(f"Y_{j}", 0.0) for j in range(outputs)] for atom in rows], dtype=torch.float64
    )
    offsets = torch.tensor([atom.constant for atom in rows], dtype=torch.float64)
    sizes = torch.tensor([len(group) for group in groups])
    return Specification(weights[None], offsets[None], torch.arange(len(groups)).repeat_interleave(sizes))


def write_vnnlib(path: Path, region: Region, specification: Specification, index: int = 0) -> None:
    """Write the property of one image, which ``read_vnnlib`` reads back with the same float64 numbers.

    Args:
        path: of the file; compressed where it ends in ``.gz``.
        region: boxes of images.
        specification: what is to be shown on them; the file says when it fails.
        index: which image of the batch.

    Raises:
        UserError: for a ball that is no box, or where the file cannot be written.
    """
    if region.ball is not None:
        raise UserError(f"VNN-LIB can say boxes only, and no {type(region.ball).__name__} ball; {path} is not written")
    lower, upper = (it[index].double().flatten().tolist() for it in (region.lower, region.upper))
    weights, offsets = (it[index].double().tolist() for it in (specification.weights, specification.offsets))
    names = [f"X_{i}" for i in range(len(lower))] + [f"Y_{j}" for j in range(specification.weights.shape[2])]
    lines = [f"(declare-const {name} Real)" for name in names]
    for i, (low, high) in enumerate(zip(lower, upper, strict=True)):
        lines += [f"(assert (>= X_{i} {low!r}))", f"(assert (<= X_{i} {high!r}))"]
    lines.append("(assert (or")
    for group in range(int(specification.groups.max()) + 1):
        members = (specification.groups == group).nonzero().flatten().tolist()
        lines.append(f"    (and {' '.join(_inequality(weights[k], offsets[k]) for k in members)})")
    lines.append("))")
    _write(path, lines)


def _inequality(weights: Sequence[float], offset: float) -> str:
    """``C Y + d <= 0`` with what is negative on the right."""
    left = [_product(it, j) for j, it in enumerate(weights) if it > 0]
    right = [_product(-it, j) for j, it in enumerate(weights) if it < 0]
    if offset:
        right.append(repr(-offset))
    return f"(<= {_sum(left)} {_sum(right)})"


def _product(factor: float, j: int) -> str:
    return f"Y_{j}" if factor == 1 else f"(* {factor!r} Y_{j})"


def _sum(terms: Sequence[str]) -> str:
    return terms[0] if len(terms) == 1 else f"(+ {' '.join(terms)})" if terms else "0.0"


def write_counterexample(path: Path, image: Tensor, outputs: Tensor) -> None:
    """Write an input that violates a property, as VNN-COMP wants it: ``sat`` and the value of each variable.

    Args:
        path: of the file; compressed where it ends in ``.gz``.
        image: ``(*input_shape)``.
        outputs: ``(classes,)`` logits of it.

    Raises:
        UserError: where the file cannot be written.
    """
    values = [(f"X_{i}", it) for i, it in enumerate(image.double().flatten().tolist())]
    values += [(f"Y_{j}", it) for j, it in enumerate(outputs.double().flatten().tolist())]
    lines = [f"({name} {value!r})" for name, value in values]
    _write(path, ["sat", f"({lines[0]}", *lines[1:-1], f"{lines[-1]})"])


def read_counterexample(path: Path) -> tuple[Tensor, Tensor]:
    """Inputs ``(size,)`` and outputs ``(classes,)`` of what ``write_counterexample`` wrote, float64.

    Raises:
        UserError: where the file is missing or damaged or holds something else.
    """
    first, _, rest = _read(path).partition("\n")
    if first.strip() != "sat":
        raise UserError(f"{path}, line 1: a counterexample begins with the line 'sat'")
    found: dict[str, list[float]] = {"X": [], "Y": []}
    for form in _forms(path, rest, first=2):
        for it in form.parts:
            match it:
                case _Form(parts=[str(name), str(value)]) if _VARIABLE.fullmatch(name) and _NUMBER.fullmatch(value):
                    if int(name[2:]) != len(found[name[0]]):
                        raise _error(path, it, f"expected {name[0]}_{len(found[name[0]])}, not {name}")
                    found[name[0]].append(float(value))
                case _:
                    raise _error(path, it if isinstance(it, _Form) else form, "expected (X_0 number) or (Y_0 number)")
    if not (found["X"] and found["Y"]):
        raise UserError(f"{path} must give the values of X and of Y")
    inputs, outputs = (torch.tensor(found[name], dtype=torch.float64) for name in "XY")
    return inputs, outputs


def _write(path: Path, lines: Iterable[str]) -> None:
    content = ("\n".join(lines) + "\n").encode()
    write_atomically(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
