"""What can be proved of a network on test images: the lower side of the bracket.

Each image is classified; who is right goes through the verifier's cascade; one row an image. What is settled is kept
at once, so that a kill repeats no more than a batch's cheap bounds and the search on one image.
"""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redan.certification.network import Network, NetworkModule
from redan.certification.onnx_files import read_onnx
from redan.certification.reading import read_network
from redan.certification.rounding import SoundFloat
from redan.certification.solvers import Solver
from redan.certification.verifier import METHODS, Robustness, Verdict, Verifier
from redan.data.pipeline import center_crop, to_float
from redan.data.registry import load_dataset
from redan.errors import UserError
from redan.evaluation.journal import Journal
from redan.evaluation.kept import fingerprint
from redan.evaluation.progress import CertificationProgress
from redan.evaluation.results import CERTIFICATES, Accuracy, Certificates, CertifiedRow, CurvePoint
from redan.evaluation.stages import CURVE_RADII
from redan.evaluation.subject import Subject, asked_threat, find_subject, normalised
from redan.run import Checkpoint
from redan.tensors import save_tensors
from redan.threats import LpBall, Threat
from redan.version import __version__

BATCH = 100

# Codes in the journal.
OUTCOMES = ("unknown", "certified", "falsified", "misclassified")
STAGES = tuple(dict.fromkeys(stage for stages in METHODS.values() for stage in stages))


def certify(
    run: str | Path | nn.Module,
    *,
    threat: str | Threat | None = None,
    method: str = "cascade",
    samples: int | None = None,
    timeout: float = 60.0,
    sound_float: SoundFloat = "exact",
    solver: Solver = "auto",
    shard: str = "1/1",
    seed: int = 0,
    checkpoint: Checkpoint = "best",
    curve: bool = True,
    batch_size: int = BATCH,
    data: str | None = None,
    data_dir: str | Path | None = None,
    input_mean: Sequence[float] | None = None,
    input_std: Sequence[float] | None = None,
    out: str | Path | None = None,
    resume: bool | None = False,
    progress: bool = True,
) -> Certificates:
    """Certify a network on test images.

    Args:
        run: a run folder, an ONNX file, ``package.module:function`` that returns a module, or a module.
        threat: an Lp threat such as ``linf:8/255``; the run's own if None.
        method: the cascade or one of its parts, see ``redan.certification.verifier.METHODS``.
        samples: the first so many test images, in order; all if None.
        timeout: seconds for each image in the stages that go image by image.
        sound_float: which rounding errors a certificate covers: ``exact``, ``network`` or ``off``.
        solver: of the mixed-integer programs: ``scip``, ``highs``, ``gurobi`` (with a licence of your own), or ``auto``
            for the first that is installed.
        shard: ``i/n`` looks at the i-th of n parts of the images only.
        seed: of the attacks.
        checkpoint: of a run: ``best`` or ``last``.
        curve: also find by CROWN what can be proved at smaller radii.
        batch_size: images that are bounded together; verdicts do not depend on it.
        data: the data set; the run's own if None.
        data_dir: the folder of data sets.
        input_mean: for a network without its normalisation, subtracted from the images.
        input_std: likewise, divided by.
        out: folder of the result; a run's own ``certificates/`` if None. Without either nothing is written.
        resume: go on with the unfinished certification of the same settings; None does so if there is one.
        progress: show it on standard error.

    Returns:
        The certificates; counterexamples stand in a safetensors file beside the JSON one.

    Raises:
        UserError: for a mistake in any of these, or a network that cannot be read as a graph.
    """
    verifier = Verifier(method, timeout, sound_float, torch.get_num_threads(), solver)
    part, parts = _shard(shard)
    if batch_size < 1:
        raise UserError(f"--batch-size is at least 1, got {batch_size}")
    subject = find_subject(run, checkpoint)
    ball = LpBall.require(asked_threat(threat, subject), "certification")
    name = data or subject.data
    if name is None:
        raise UserError(f"{subject.name} does not say which images it is for; name them with --data")
    folder = Path(out) if out is not None else subject.folder / CERTIFICATES if subject.folder is not None else None
    if folder is None and resume:
        raise UserError("nothing says where to keep the results; name a folder with --out")
    dataset = load_dataset(name, Path(data_dir) if data_dir is not None else None)
    count = len(dataset.test) if samples is None else samples
    if not 1 <= count <= len(dataset.test):
        raise UserError(f"--samples is between 1 and {len(dataset.test)} for {name}, got {samples}")
    places = torch.arange(part - 1, count, parts)
    if not len(places):
        raise UserError(f"part {part} of {parts} of {count} images is empty; cut fewer parts")

    def images(which: Tensor) -> Tensor:
        found = to_float(dataset.test.images[which])
        return found if subject.size is None else center_crop(found, subject.size)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = tuple(images(places[:1]).shape[1:])
    model = whole_model(run, subject, input_mean, input_std).to(device).eval()
    network = graph_of(model, shape, len(dataset.class_names)).to(device=device)
    started = time.perf_counter()
    settings: dict[str, Any] = {
        "run": subject.name,
        "checkpoint": checkpoint if subject.folder is not None else "-",
        "data": name,
        "threat": str(ball),
        "method": method,
        "samples": count,
        "timeout": timeout,
        "sound_float": sound_float,
        "solver": solver,
        "seed": seed,
        "shard": [part, parts],
        "weights": fingerprint({str(i): v for i, v in enumerate(network.tensors())}),
        "images": fingerprint({"labels": dataset.test.labels[:count], "first": dataset.test.images[:8]}),
    }
    stem = _stem(settings, named=out is not None)
    # What is kept names stages by their places, which another version may have numbered otherwise.
    kept = settings | {"stages": list(STAGES)}
    journal = Journal(None if folder is None else folder / f"{stem}.partial", kept, resume=resume)
    labels = dataset.test.labels
    with journal.kept_when_stopped(), CertificationProgress(len(places), show=progress) as bar:
        work = _Work(verifier, network, model, ball, labels, images, seed, journal, bar, device)
        work.all(places, batch_size)
        points = work.curve(places, batch_size) if curve else ()
    shared = {k: v for k, v in settings.items() if k != "shard"}
    result = Certificates.of(
        [work.rows[int(i)] for i in places],
        redan_version=__version__,
        run=subject.name,
        checkpoint=settings["checkpoint"],
        dataset=name,
        threat=str(ball),
        method=method,
        sound_float=sound_float,
        timeout=timeout,
        seed=seed,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        samples=count,
        shard=(part, parts),
        seconds=round(time.perf_counter() - started + work.earlier_seconds, 3),
        fingerprint=fingerprint({repr(sorted(shared.items())): torch.zeros(0)}),
        curve=points,
    )
    if folder is not None:
        for suffix in (".json", ".safetensors"):
            (folder / f"{stem}{suffix}").unlink(missing_ok=True)
        found = sorted(work.counterexamples)
        if found:
            pictures = torch.stack([work.counterexamples[i] for i in found])
            save_tensors(folder / f"{stem}.safetensors", {"indices": torch.tensor(found), "counterexamples": pictures})
        result.save(folder / f"{stem}.json")
    journal.close()
    return result


def whole_model(
    run: str | Path | nn.Module, subject: Subject, mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    """The subject's network with its normalisation; an ONNX file is read anew, so that its graph has it, too."""
    if isinstance(subject.network, NetworkModule) and isinstance(run, str | Path):
        return NetworkModule(read_onnx(Path(run), mean, std))
    return normalised(subject.network, mean, std)


def graph_of(model: nn.Module, shape: tuple[int, ...], classes: int) -> Network:
    """The network as a graph on images of that shape, in float64.

    Raises:
        UserError: where it cannot be read, or does not fit the images or their classes.
    """
    if not isinstance(model, NetworkModule):
        network = read_network(model, shape)
    elif torch.Size(model.graph.input_shape).numel() == torch.Size(shape).numel():
        network = model.graph.taking(shape)
    else:
        raise UserError(f"the network takes inputs of shape {model.graph.input_shape}; the images have {shape}")
    if network.classes != classes:
        raise UserError(f"the network gives {network.classes} outputs an image; the data have {classes} classes")
    return network


class _Work:
    """Batches through the verifier, with what is settled kept in the journal."""

    def __init__(
        self,
        verifier: Verifier,
        network: Network,
        model: nn.Module,
        threat: LpBall,
        labels: Tensor,
        images: Any,
        seed: int,
        journal: Journal,
        bar: CertificationProgress,
        device: torch.device,
    ) -> None:
        self._verifier, self._network, self._model, self._threat = verifier, network, model, threat
        self._labels, self._images, self._seed, self._device = labels, images, seed, device
        self._journal, self._bar = journal, bar
        self.rows: dict[int, CertifiedRow] = {}
        self.counterexamples: dict[int, Tensor] = {}
        self.earlier_seconds = 0.0
        for piece in journal.pieces("rows"):
            self._enter(piece)
            self.earlier_seconds += float(piece["seconds"].sum())

    def all(self, places: Tensor, batch_size: int) -> None:
        """Settle the images at those places, as far as they are not yet."""
        left = torch.tensor([i for i in places.tolist() if i not in self.rows], dtype=torch.int64)
        self._bar.show(Counter(row.verdict for row in self.rows.values()), "")
        for batch in left.split(batch_size) if len(left) else ():
            self._batch(batch)

    def _batch(self, places: Tensor) -> None:
        images, labels = self._images(places).to(self._device), self._labels[places].to(self._device)
        with torch.no_grad():
            predictions = self._model(images).argmax(1)
        right = (predictions == labels).cpu()
        wrong = [Verdict() for _ in range(int((~right).sum()))]
        self._write(places[~right], predictions.cpu()[~right], wrong, misclassified=True)
        if not right.any():
            return
        question = Robustness(
            self._model,
            images[right],
            labels[right],
            places[right],
            self._threat,
            classes=self._network.classes,
            seed=self._seed,
        )
        mine, said = places[right], predictions.cpu()[right]

        last = METHODS[self._verifier.method][-1]

        def told(stage: str, verdicts: list[Verdict]) -> None:
            left = [k for k in range(len(verdicts)) if int(mine[k]) not in self.rows]
            done = [k for k in left if verdicts[k].outcome != "unknown" or verdicts[k].by == last]
            self._write(mine[done], said[done], [verdicts[k] for k in done])
            self._bar.show(Counter(row.verdict for row in self.rows.values()), stage)

        verdicts = self._verifier(self._network, question, told=told)
        open_ = [k for k in range(len(verdicts)) if int(mine[k]) not in self.rows]
        self._write(mine[open_], said[open_], [verdicts[k] for k in open_])
        self._bar.show(Counter(row.verdict for row in self.rows.values()), "")

    def _write(
        self, places: Tensor, predictions: Tensor, verdicts: list[Verdict], *, misclassified: bool = False
    ) -> None:
        if not len(places):
            return
        outcomes = ["misclassified" if misclassified else it.outcome for it in verdicts]
        found = [it.counterexample for it in verdicts if it.counterexample is not None]
        shape = self._images(places[:1]).shape[1:]
        piece = {
            "places": places,
            "predictions": predictions,
            "outcomes": torch.tensor([OUTCOMES.index(it) for it in outcomes]),
            "by": torch.tensor([-1 if it.by is None else STAGES.index(it.by) for it in verdicts]),
            "margins": torch.tensor([torch.nan if it.margin is None else it.margin for it in verdicts]).double(),
            "seconds": torch.tensor([it.seconds for it in verdicts]).double(),
            "counterexamples": torch.stack(found).view(-1, *shape) if found else torch.zeros(0, *shape),
        }
        self._journal.write("rows", int(places[0]), piece)
        self._enter(piece)

    def _enter(self, piece: dict[str, Tensor]) -> None:
        found = iter(piece["counterexamples"])
        for k, i in enumerate(piece["places"].tolist()):
            by, margin = int(piece["by"][k]), float(piece["margins"][k])
            verdict: Any = OUTCOMES[int(piece["outcomes"][k])]
            if verdict == "falsified":
                self.counterexamples[i] = next(found)
            self.rows[i] = CertifiedRow(
                index=i,
                label=int(self._labels[i]),
                prediction=int(piece["predictions"][k]),
                verdict=verdict,
                by=None if by < 0 else STAGES[by],
                margin=margin if abs(margin) < float("inf") else None,
                seconds=round(float(piece["seconds"][k]), 4),
            )

    def curve(self, places: Tensor, batch_size: int) -> tuple[CurvePoint, ...]:
        """Share that is certified at each radius: at smaller ones by CROWN, of images that were not at the full one.

        A certificate at one radius is one at every smaller radius.
        """
        proved = torch.tensor([self.rows[int(i)].verdict == "certified" for i in places])
        right = torch.tensor([self.rows[int(i)].verdict != "misclassified" for i in places])
        points = [CurvePoint(radius=self._threat.radius, accuracy=Accuracy.of(int(proved.sum()), len(places)))]
        verifier = Verifier("crown", self._verifier.timeout, self._verifier.sound)
        for scale in sorted((it for it in CURVE_RADII if it < 1), reverse=True):
            smaller = type(self._threat)(scale * self._threat.radius)
            left = (right & ~proved).nonzero().squeeze(1)
            for some in left.split(batch_size) if len(left) else ():
                batch = places[some]
                question = Robustness(
                    self._model,
                    self._images(batch).to(self._device),
                    self._labels[batch].to(self._device),
                    batch,
                    smaller,
                    classes=self._network.classes,
                    seed=self._seed,
                )
                verdicts = verifier(self._network, question)
                proved[some] = torch.tensor([it.outcome == "certified" for it in verdicts])
            self._bar.show(Counter(row.verdict for row in self.rows.values()), f"radius {smaller.radius:.3g}")
            points.append(CurvePoint(radius=smaller.radius, accuracy=Accuracy.of(int(proved.sum()), len(places))))
        points.append(CurvePoint(radius=0.0, accuracy=Accuracy.of(int(right.sum()), len(places))))
        return tuple(reversed(points))


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UserError(f"--shard is i/n with 1 <= i <= n, such as 2/8, got {text!r}")
    return int(part), int(parts)


def _stem(settings: dict[str, Any], *, named: bool) -> str:
    """The name of the files; certifications that differ in a setting have files of their own."""
    parts = [settings["run"]] if named else []
    parts += [settings[key] for key in ("method", "threat", "samples", "checkpoint", "data")]
    parts += [f"sound_{settings['sound_float']}"] if settings["sound_float"] != "exact" else []
    parts += [f"timeout{settings['timeout']:g}", f"seed{settings['seed']}"]
    part, of = settings["shard"]
    parts += [f"shard{part}of{of}"] if of > 1 else []
    parts += [settings["weights"][:8]] if named else []  # networks of one name, or of two normalisations
    return "".join(c if c.isalnum() or c in "-+." else "_" for c in "-".join(map(str, parts)))
