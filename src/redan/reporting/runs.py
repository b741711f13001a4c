"""Run folders as a report reads them: recipe, environment, metrics, results and the gallery's pictures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from redan.analysis.results import ANALYSIS, DIFFICULTY, Analysis, Difficulty
from redan.errors import UserError
from redan.evaluation.results import CERTIFICATES, Certificates, Evaluation

Images = npt.NDArray[np.float32]
INSIDE = ("transformed", "purified")  # what a network that purifies makes of an attacked image, in order


@dataclass(frozen=True)
class Result:
    """One evaluation of a run.

    Attributes:
        name: the file's name without its ending; unique within its run.
        evaluation: what the file holds.
        images: float32 ``(k, c, h, w)`` in [0, 1]; row ``i`` belongs to ``evaluation.gallery[i]``. ``k`` is 0 where
            the run keeps no pictures of this evaluation.
        adversarials: likewise, the images after the attack.
        inside: likewise, what becomes of these inside a network that purifies: ``transformed`` and ``purified``.
    """

    name: str
    evaluation: Evaluation
    images: Images
    adversarials: Images
    inside: Mapping[str, Images]


@dataclass(frozen=True)
class Study:
    """The study of a run's hard examples.

    Attributes:
        found: what the file holds.
        images: uint8 ``(k, c, h, w)``; row ``i`` belongs to ``found.gallery[i]``.
    """

    found: Difficulty
    images: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Run:
    """What a run folder holds; ``metrics`` has one mapping an epoch, in order of time."""

    folder: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    environment: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    results: Sequence[Result]
    certificates: Sequence[Certificates]
    analysis: Analysis | None
    study: Study | None
    date: date

    def part(self, key: str) -> str:
        """The name of a part of the recipe, such as its model; a dash where the recipe has none."""
        value = self.recipe.get(key)
        if isinstance(value, Mapping):
            value = value.get("name")
        return "–" if value is None else str(value)

    @property
    def smoothing(self) -> str:
        """What DPLS does in this run, in words; empty where it does nothing."""
        dpls = self.recipe.get("dpls")
        if not isinstance(dpls, Mapping) or not dpls.get("scale"):
            return ""
        earlier = len(dpls.get("sources") or ())
        since = f"from {earlier} earlier run{'s' if earlier > 1 else ''}"
        if not earlier:
            since = f"of epochs {dpls.get('first', 0) + 1} to {dpls.get('warmup')}"
        spread = "min-max" if dpls.get("min_max") else "strictly proportional"
        control = "" if dpls.get("control") == "none" else f", control: {dpls.get('control')}"
        amount = f"{spread}, scale {dpls['scale']}, cap {dpls.get('cap')}{control}"
        return f"DPLS, reconstructed: {dpls.get('difficulty')} {since}, {amount}"


def read_run(folder: Path) -> Run:
    """Read the run in ``folder``; only its recipe is required, whatever else is missing is empty.

    The run's date is the day (UTC) of its newest result or, where it has none, of its recipe.

    Raises:
        UserError: where the folder is not a run, or where one of its files is damaged, which is then named.
    """
    source = folder / "recipe.yaml"
    if not source.is_file():
        raise UserError(f"{folder} is not a run: it has no recipe.yaml; name a folder that 'redan train' made")
    recipe_text = _text(source)
    try:
        recipe = yaml.safe_load(recipe_text)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{source} is not a recipe: it must be a mapping with name, data, model and method")
    results = sorted((folder / "results").glob("*.json"))
    proofs = sorted((folder / CERTIFICATES).glob("*.json"))
    return Run(
        folder=folder,
        recipe=recipe,
        recipe_text=recipe_text,
        environment=_environment(folder / "environment.json"),
        metrics=_metrics(folder / "metrics.jsonl"),
        results=[_result(path) for path in results],
        certificates=_certificates(proofs),
        analysis=Analysis.load(folder / ANALYSIS) if (folder / ANALYSIS).exists() else None,
        study=_study(folder / DIFFICULTY) if (folder / DIFFICULTY).exists() else None,
        date=max(datetime.fromtimestamp(path.stat().st_mtime, UTC).date() for path in [*results, *proofs] or [source]),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _mapping(text: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a JSON object")
    return value


def _environment(path: Path) -> Mapping[str, Any]:
    return _mapping(_text(path), str(path)) if path.exists() else {}


def _metrics(path: Path) -> Sequence[Mapping[str, Any]]:
    if not path.exists():
        return []
    lines = _text(path).strip().split("\n")
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            metrics.append(_mapping(line, f"{path}, line {number},"))
        except UserError:
            if number < len(lines):
                raise  # only the last line may be what a kill left of one
    return metrics


def _result(path: Path) -> Result:
    evaluation = Evaluation.load(path)
    pictures = path.with_suffix(".safetensors")
    if not pictures.exists():
        nothing = np.zeros((0, 1, 1, 1), np.float32)
        return Result(path.stem, evaluation, nothing, nothing, {})
    tensors = _arrays(pictures)
    shapes = [tensors[name].shape if name in tensors else () for name in ("images", "adversarials")]
    rows = len(evaluation.gallery)
    if shapes[0] != shapes[1] or len(shapes[0]) != 4 or shapes[0][0] != rows or shapes[0][1] not in (1, 3):
        raise UserError(
            f"{pictures} must hold images and adversarials, both ({rows}, 1 or 3, h, w) as {path.name} has it; "
            f"they are {shapes[0]} and {shapes[1]}"
        )
    inside = {name: tensors[name] for name in INSIDE if name in tensors}
    for name, stage in inside.items():
        if stage.shape != shapes[0]:
            raise UserError(f"{pictures} must hold {name} of the images' shape {shapes[0]}; it is {stage.shape}")
    return Result(path.stem, evaluation, tensors["images"], tensors["adversarials"], inside)


def _certificates(paths: Sequence[Path]) -> list[Certificates]:
    """Those in the files, the shards of each joined."""
    groups: dict[tuple[str, int], list[Certificates]] = {}
    for path in paths:
        found = Certificates.load(path)
        key = (str(path), 1) if found.shard == (1, 1) else (found.fingerprint, found.shard[1])
        groups.setdefault(key, []).append(found)
    return [Certificates.join(parts) for parts in groups.values()]


def _study(path: Path) -> Study:
    found = Difficulty.load(path)
    pictures = path.with_suffix(".safetensors")
    images = _arrays(pictures).get("images", np.zeros(0))
    shape, rows = images.shape, len(found.gallery)
    if images.dtype != np.uint8 or len(shape) != 4 or shape[0] != rows or shape[1] not in (1, 3):
        raise UserError(
            f"{pictures} must hold images, uint8 ({rows}, 1 or 3, h, w) as {path.name} has it; "
            f"they are {images.dtype} {shape}"
        )
    return Study(found, images)


def _arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error
