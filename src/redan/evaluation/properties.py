"""VNN-COMP's formats end to end: a property in a VNN-LIB file, decided; a network's robustness as such files.

A VNN-LIB file describes what must not happen: inputs in a box whose outputs meet some condition. It ``holds`` where no
such input exists, and is ``violated`` by a counterexample.
"""

import csv
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from redan.certification.network import Network, NetworkModule
from redan.certification.onnx_files import read_onnx, write_onnx
from redan.certification.regions import Region, Specification
from redan.certification.rounding import SoundFloat
from redan.certification.solvers import Solver
from redan.certification.verifier import Verifier
from redan.certification.vnnlib import read_vnnlib, write_counterexample, write_vnnlib
from redan.data.pipeline import center_crop, to_float
from redan.data.registry import load_dataset
from redan.errors import UserError
from redan.evaluation.certify import BATCH, graph_of, whole_model
from redan.evaluation.progress import CertificationProgress
from redan.evaluation.results import Frozen
from redan.evaluation.subject import asked_threat, find_subject
from redan.files import write_atomically
from redan.run import Checkpoint
from redan.threats import LpBall

ATTACK_STEPS = {"pgd": 20, "apgd-t": 200}


class Decision(Frozen):
    """What is known of a property.

    ``verdict`` is ``holds``, ``violated`` or ``unknown``; ``by`` the stage that settled it, or tried last.
    """

    network: str
    property: str
    verdict: Literal["holds", "violated", "unknown"]
    by: str | None
    seconds: float


class _Property:
    """One box and one condition as a question for the verifier: ``redan.certification.verifier.Question``."""

    def __init__(self, network: Network, region: Region, specification: Specification) -> None:
        self.region, self.specification = region, specification
        self._model = NetworkModule(network)

    def attack(self, name: str, who: Tensor) -> Tensor:
        """Down the sign of each function's own gradient from the middle of the box, by ever shorter steps."""
        (lower, upper), count = self.region.inner(), self.specification.weights.shape[1]
        images = ((lower + upper) / 2).expand(count, *lower.shape[1:]).clone()
        best, least = images[:1], torch.inf
        for k in range(ATTACK_STEPS[name]):
            images.requires_grad_()
            with torch.enable_grad():
                values = self.specification.values(self._model(images))
                (gradient,) = torch.autograd.grad(values.diagonal().sum(), images)
            images = images.detach()
            worst = self.specification.worst(values.detach())
            if float(worst.min()) < least:
                best, least = images[worst.argmin()][None], float(worst.min())
            step = (upper - lower) * 0.5 * (1 - k / ATTACK_STEPS[name])
            images = (images - step * gradient.sign()).clamp(lower, upper)
        return best

    def refutes(self, candidates: Tensor, who: Tensor) -> Tensor:
        inside = (candidates.double() >= self.region.lower) & (candidates.double() <= self.region.upper)
        with torch.no_grad():
            values = self.specification.values(self._model(candidates))
        return inside.flatten(1).all(1) & (self.specification.worst(values) <= 0)


def decide(
    network: str | Path,
    vnnlib: str | Path,
    *,
    method: str = "cascade",
    timeout: float = 60.0,
    sound_float: SoundFloat = "exact",
    solver: Solver = "auto",
    input_mean: Sequence[float] | None = None,
    input_std: Sequence[float] | None = None,
    counterexample: str | Path | None = None,
) -> Decision:
    """Decide whether a property holds of a network.

    Args:
        network: an ONNX file.
        vnnlib: a VNN-LIB file, or one compressed by gzip.
        method: as of ``certify``.
        timeout: seconds for each box of the file.
        sound_float: as of ``certify``.
        solver: likewise.
        input_mean: for a network without its normalisation, subtracted from the inputs.
        input_std: likewise, divided by.
        counterexample: file for the counterexample, in VNN-COMP's format, should there be one.

    Raises:
        UserError: for a mistake in any of these.
    """
    verifier = Verifier(method, timeout, sound_float, torch.get_num_threads(), solver)
    graph = read_onnx(Path(network), input_mean, input_std)
    cases = read_vnnlib(Path(vnnlib), graph.input_shape, graph.classes)
    started, verdict, by = time.perf_counter(), "holds", None
    for region, specification in cases:
        (found,) = verifier(graph, _Property(graph, region, specification))
        if verdict == "holds" or found.outcome != "certified":
            by = found.by
        if found.outcome == "falsified":
            assert found.counterexample is not None
            verdict = "violated"
            if counterexample is not None:
                image = found.counterexample.view(graph.input_shape)
                outputs = NetworkModule(graph)(image[None])[0]
                write_counterexample(Path(counterexample), image, outputs.detach())
            break
        if found.outcome == "unknown":
            verdict = "unknown"
    return Decision.model_validate(
        {
            "network": str(network),
            "property": str(vnnlib),
            "verdict": verdict,
            "by": by,
            "seconds": round(time.perf_counter() - started, 3),
        }
    )


def decide_all(
    instances: str | Path,
    *,
    method: str = "cascade",
    sound_float: SoundFloat = "exact",
    solver: Solver = "auto",
    input_mean: Sequence[float] | None = None,
    input_std: Sequence[float] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[Decision]:
    """Decide a list of properties as VNN-COMP gives it.

    Args:
        instances: a file whose lines name a network, a property and seconds for it, as ``export`` writes them; its
            paths are relative to its folder. Where a file is not there, one of that name with ``.gz`` is taken.
        method: as of ``certify``; so are the next four.
        sound_float: likewise.
        solver: likewise.
        input_mean: likewise.
        input_std: likewise.
        out: a folder for ``results.csv`` (a line an instance: network, property, verdict, stage, seconds), kept after
            each, and the counterexamples, ``<network>-<property>.counterexample``.
        resume: go on behind the lines of that file.
        progress: show it on standard error.

    Raises:
        UserError: for a mistake in any of these.
    """
    path, folder = Path(instances), None if out is None else Path(out)
    asked = _instances(path)
    results = None if folder is None else folder / "results.csv"
    done: list[Decision] = []
    if resume:
        if results is None or not results.exists():
            raise UserError("there is no results.csv to go on with; name its folder with --out, or leave --resume out")
        done = _decisions(results, asked)
    elif results is not None and results.exists() and len(_cells(results)) < len(asked):
        raise UserError(f"{results} is of a list that was stopped; go on with --resume, or name another folder")
    with CertificationProgress(len(asked), show=progress) as bar:
        for network, vnnlib, seconds in asked[len(done) :]:
            bar.show(Counter(it.verdict for it in done), vnnlib)
            names = Path(network).name.partition(".onnx")[0], Path(vnnlib).name.partition(".vnnlib")[0]
            sat = None if folder is None else folder / f"{'-'.join(names)}.counterexample"
            found = decide(
                _there(path.parent / network),
                _there(path.parent / vnnlib),
                method=method,
                timeout=seconds,
                sound_float=sound_float,
                solver=solver,
                input_mean=input_mean,
                input_std=input_std,
                counterexample=sat,
            )
            done.append(found.model_copy(update={"network": network, "property": vnnlib}))
            if results is not None:
                lines = [f"{it.network},{it.property},{it.verdict},{it.by or ''},{it.seconds}\n" for it in done]
                write_atomically(results, "".join(lines).encode())
        bar.show(Counter(it.verdict for it in done), "")
    return done


def _instances(path: Path) -> list[tuple[str, str, float]]:
    found = []
    for number, cells in enumerate(_cells(path), 1):
        try:
            network, vnnlib, seconds = (it.strip() for it in cells)
            found.append((network, vnnlib, float(seconds)))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: expected network,property,seconds") from error
    if not found:
        raise UserError(f"{path} lists no instances")
    return found


def _decisions(path: Path, asked: Sequence[tuple[str, str, float]]) -> list[Decision]:
    cells = _cells(path)
    if [it[:2] for it in cells] != [list(it[:2]) for it in asked[: len(cells)]] or any(len(it) != 5 for it in cells):
        raise UserError(f"{path} is of other instances; leave --resume out or name another folder with --out")
    keys = ("network", "property", "verdict", "by", "seconds")
    return [Decision.model_validate({**dict(zip(keys, it, strict=True)), "by": it[3] or None}) for it in cells]


def _cells(path: Path) -> list[list[str]]:
    try:
        return list(csv.reader(path.read_text().splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _there(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.exists() and not path.exists() else path


def export(
    run: str | Path,
    out: str | Path,
    *,
    threat: str | None = None,
    samples: int = 0,
    timeout: float = 300.0,
    checkpoint: Checkpoint = "best",
    data: str | None = None,
    data_dir: str | Path | None = None,
    input_mean: Sequence[float] | None = None,
    input_std: Sequence[float] | None = None,
) -> Path:
    """Write a network as ONNX and its robustness on test images as VNN-LIB, for other verifiers.

    Args:
        run: as of ``certify``.
        out: a folder: ``network.onnx`` and, for each image that is classified correctly, ``image-<index>.vnnlib``, with
            ``instances.csv`` that lists network, property and seconds as VNN-COMP does.
        threat: an Linf threat; the run's own if None.
        samples: the first so many test images; none writes the network alone.
        timeout: seconds that ``instances.csv`` allows each.
        checkpoint: of a run: ``best`` or ``last``.
        data: the data set; the run's own if None.
        data_dir: the folder of data sets.
        input_mean: for a network without its normalisation, which the written one then has.
        input_std: likewise.

    Returns:
        The ONNX file.

    Raises:
        UserError: for a mistake in any of these.
    """
    subject, folder = find_subject(run, checkpoint), Path(out)
    Verifier(timeout=timeout)
    name = data or subject.data
    if name is None:
        raise UserError(f"{subject.name} does not say which images it is for; name them with --data")
    dataset = load_dataset(name, None if data_dir is None else Path(data_dir))
    if not 0 <= samples <= len(dataset.test):
        raise UserError(f"--samples is between 0 and {len(dataset.test)} for {name}, got {samples}")
    ball = LpBall.require(asked_threat(threat, subject), "a VNN-LIB file") if samples else None
    images = to_float(dataset.test.images[: max(samples, 1)])
    images = images if subject.size is None else center_crop(images, subject.size)
    model = whole_model(run, subject, input_mean, input_std).eval()
    network = graph_of(model, tuple(images.shape[1:]), len(dataset.class_names))
    path = folder / "network.onnx"
    write_onnx(network, path)
    if ball is None:
        return path
    labels = dataset.test.labels[:samples]
    regions, specifications = Region.around(images, ball), Specification.robust(labels, network.classes)
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in images.split(BATCH)]) == labels
    lines = []
    for i in right.nonzero().squeeze(1).tolist():
        write_vnnlib(folder / f"image-{i}.vnnlib", regions, specifications, i)
        lines.append(f"network.onnx,image-{i}.vnnlib,{timeout:g}\n")
    write_atomically(folder / "instances.csv", "".join(lines).encode())
    return path
