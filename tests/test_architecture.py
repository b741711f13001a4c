"""No arrow runs back up: who may import whom, read from the source itself."""

import ast
from pathlib import Path

import pytest

import redan

SOURCE = Path(redan.__file__).parent

# From the ground up. A room may import from its own floor's earlier rooms and everything below.
FLOORS = [
    ["version", "errors", "seeds"],
    ["files", "threats", "spatial"],
    ["tensors", "data", "models"],
    ["attacks"],
    ["certification"],
    ["methods"],
    ["recipes"],
    ["run"],
    ["training", "evaluation"],
    ["analysis"],
    ["reporting"],
    ["demonstration", "pruning", "sweeping"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
FORBIDDEN = {
    ("evaluation", "training"),
    ("training", "evaluation"),
    ("training", "reporting"),
    ("reporting", "training"),
}


def room(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("redan."):
            names.add(node.module.split(".")[1])
    return names


MODULES = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_downwards_only(path: Path) -> None:
    mine = room(path)
    for other in imports(path) - {mine}:
        assert FLOOR[other] <= FLOOR[mine], f"{mine} imports {other}, which is above it"
        assert (mine, other) not in FORBIDDEN


def test_report_reads_results_and_never_models() -> None:
    for path in (SOURCE / "reporting").glob("*.py"):
        assert imports(path) <= {"reporting", "evaluation", "analysis", "errors", "files", "version", "tensors"}


def test_data_threats_and_models_know_nothing_of_the_rest() -> None:
    ground = {"data", "models", "threats", "spatial", "errors", "files", "seeds", "tensors", "version"}
    for path in MODULES:
        if room(path) in {"data", "models", "threats", "spatial"}:
            assert imports(path) <= ground
