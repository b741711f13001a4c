"""The one loop that runs any method, on Lightning Fabric: CPU, one GPU, several GPUs."""

import hashlib
import json
import platform
import signal
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from lightning_fabric import Fabric
from tensorboardX import SummaryWriter
from torch import Tensor

from redan.attacks.pgd import PGD
from redan.attacks.search import SearchModel
from redan.data.pipeline import Augmentation, TrainingBatches, center_crop, to_float
from redan.data.registry import load_dataset
from redan.data.types import Batch, ImageSet
from redan.errors import Stopped, UserError
from redan.files import write_atomically
from redan.methods.base import Method, Phase, StepOutput
from redan.models.purified import Purified
from redan.recipes.build import build, image_size, positions, split
from redan.recipes.schema import Recipe, load_recipe
from redan.run import STATE, build_targets, take_over
from redan.seeds import derive_seed, generator
from redan.tensors import below, load_tensors, save_tensors
from redan.training.checkpoint import optimizer_tensors, restore_optimizer
from redan.training.hardware import resolved, worth_compiling
from redan.training.monitor import ExampleRecord, Monitor
from redan.training.optim import build_optimizer, learning_rate_factor
from redan.training.progress import TrainingProgress
from redan.version import __version__

CHECKPOINT_SECONDS = 300.0  # a kill loses no more than this, or an epoch if that is shorter
CLEAN_EVERY = 10  # steps between looks at the clean accuracy where the method does not compute it itself
VALIDATION_BATCH = 250
SEEN = "scalar_seen_"

Record = dict[str, float | int | str | None]


@dataclass(frozen=True)
class Validation:
    """What a look at the held-out images showed.

    Attributes:
        epoch: after which it was, from 1, over all phases.
        score: of these weights: clean or robust accuracy, as the method has it.
        best: of the weights that the phase would ship if it ended here.
        last: whether the run ends with this epoch.
    """

    epoch: int
    score: float
    best: float
    last: bool


OnValidation = Callable[[Validation], None]


def train(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    data_dir: str | Path | None = None,
    resume: bool = False,
    devices: int = 1,
    progress: bool = True,
    on_validation: OnValidation | None = None,
) -> Path:
    """Train what a recipe describes.

    Args:
        recipe: a recipe, the name of a shipped one, a YAML file or a run folder.
        out: the run folder; ``runs/<name of the recipe>`` if None.
        overrides: recipe values by dotted key.
        data_dir: the folder of data sets.
        resume: go on with what the run folder holds, to bitwise the same weights as an uninterrupted run.
        devices: processes, one a GPU (or on the CPU); they share each batch.
        progress: show it on standard error.
        on_validation: told of each validation, once its epoch is in the metrics and before the checkpoint; what it
            raises ends the run.

    Returns:
        The run folder.

    Raises:
        UserError: for a mistake in any of these, or a loss that is not finite.
        Stopped: on Ctrl-C or SIGTERM, after a checkpoint.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        raise UserError("overrides go with the name or the file of a recipe; a Recipe object is taken as it is")
    run = Path(out) if out is not None else Path("runs") / recipe.name
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning_fabric")
        with torch.random.fork_rng():
            training = _Training(recipe, run, data_dir=data_dir, resume=resume, devices=devices, progress=progress)
            training.run(on_validation)
    return run


class _Training:
    """A training run: what it needs, where it is, and how it goes on."""

    def __init__(
        self, recipe: Recipe, folder: Path, *, data_dir: str | Path | None, resume: bool, devices: int, progress: bool
    ) -> None:
        self.recipe, self.folder = recipe, folder
        self.state_file = folder / STATE
        _check_folder(recipe, folder, self.state_file, resume)
        dataset = load_dataset(recipe.data.name, Path(data_dir) if data_dir is not None else None)
        training, self.held_out = split(recipe, dataset)
        chosen, _ = positions(recipe, dataset)
        self.images = hashlib.blake2b(chosen.numpy().tobytes(), digest_size=8).hexdigest()

        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        if accelerator == "cuda" and devices > torch.cuda.device_count():
            raise UserError(f"--devices {devices}, but this machine has {torch.cuda.device_count()} GPUs")
        device = torch.device(accelerator)
        strategy = "ddp" if devices > 1 else "auto"
        # In float32 for Fabric: its mixed precision would round the images before the attack sees them.
        self.fabric = Fabric(accelerator=accelerator, devices=devices, strategy=strategy)
        self.bfloat16 = resolved(recipe.precision, device) == "bfloat16"
        self.attack_precision = resolved(recipe.attack.precision, device)
        self.fabric.launch()
        if recipe.batch_size % devices:
            raise UserError(f"batch_size {recipe.batch_size} cannot be shared by {devices} devices")
        torch.backends.cudnn.deterministic = True  # the same recipe, seed and machine give the same weights

        self.facts = dataset.facts
        self.size = image_size(recipe, dataset.facts)
        self.batches = TrainingBatches(
            training,
            recipe.batch_size // devices,
            Augmentation(self.size, recipe.data.padding, recipe.data.flip),
            seed=recipe.seed,
            device=self.fabric.device,
            rank=self.fabric.global_rank,
            world=devices,
        )
        compile = worth_compiling(recipe, len(self.batches), self.fabric.device)
        self.resumed = resume and self.state_file.exists()
        targets = build_targets(recipe, dataset, begun=self.resumed)
        self.method: Method = build(
            recipe, dataset.facts, targets=targets, precision=self.attack_precision, compile=compile
        )
        if not self.resumed:
            take_over(self.method, recipe, dataset)
        self.method.to(self.fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.phases = self.method.phases(Phase("training", recipe.epochs, recipe.optimizer, recipe.schedule))

        self.monitor = Monitor(self.method) if recipe.monitor is not None else None
        self.examples: ExampleRecord | None = None
        if recipe.monitor is not None and recipe.monitor.examples:
            self.examples = ExampleRecord(chosen, self.fabric.device)

        # Where the run is: epochs done, steps done of the present one, and what is known so far.
        self.epoch, self.step = 0, 0
        self.best: float | None = None
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.records: list[Record] = []
        self.show = progress and self.fabric.is_global_zero
        self.environment: dict[str, Any] = {
            "redan": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if accelerator == "cuda" else platform.processor() or "cpu",
            "devices": devices,
            "threads": torch.get_num_threads(),
            "precision": resolved(recipe.precision, device),
            "attack_precision": self.attack_precision,
            "compiled_attack": compile,
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }

    def run(self, on_validation: OnValidation | None) -> None:
        """Train from where the run is to its end."""
        self.on_validation = on_validation
        tensors: dict[str, Tensor] = {}
        if self.resumed:
            tensors = self._restore()
        elif self.fabric.is_global_zero:
            self.recipe.save(self.folder / "recipe.yaml")
            content = json.dumps(self.environment, indent=1)
            write_atomically(self.folder / "environment.json", content.encode())
        total = sum(phase.epochs for phase in self.phases)
        done = self._place()
        self.progress = TrainingProgress(total, len(self.batches), done, show=self.show)
        board = self.folder / "tensorboard"
        self.board = SummaryWriter(str(board), purge_step=self.epoch) if self.fabric.is_global_zero else None
        self.saved_at = time.monotonic()
        try:
            with _StopSignals() as self.stop, self.progress:
                first = 0
                for phase in self.phases:
                    if self.epoch < first + phase.epochs:
                        self._run_phase(phase, first, tensors)
                        tensors = {}
                    first += phase.epochs
        except OSError as error:
            raise UserError(
                f"cannot write into {self.folder}: {error.strerror}; the last checkpoint is kept"
            ) from error
        finally:
            if self.board is not None:
                with suppress(OSError):  # the disk may be full: what matters was written, or said, before
                    self.board.close()

    def _run_phase(self, phase: Phase, first: int, tensors: dict[str, Tensor]) -> None:
        """Run a phase that begins at epoch ``first`` of the run; ``tensors`` hold its optimiser's state on a resume."""
        self.method.enter(phase)
        self.method.zero_grad()  # of weights that are frozen now, too, or clipping would count them
        # Anew in each phase: who shares the gradients of several processes must know which weights are frozen.
        self.wrapped = self.fabric.setup_module(self.method)
        if (self.epoch, self.step) == (first, 0):
            self.best = None  # what an earlier phase came to is no rival
        self.optimizer = build_optimizer(phase.optimizer, self.method.parameters())
        restore_optimizer(self.optimizer, tensors)
        while self.epoch < first + phase.epochs:
            started = time.monotonic() - self.sums["seconds"]
            steps = len(self.batches)
            for batch in self.batches.epoch(self.epoch, self.step):
                done = self.epoch - first + self.step / steps
                self._train_step(batch, phase.optimizer.lr * learning_rate_factor(phase.schedule, done, phase.epochs))
                self.step += 1
                self.sums["seconds"] = time.monotonic() - started
                if self.stop.requested:
                    self._save()
                    raise Stopped(
                        f"stopped in epoch {self.epoch + 1} after step {self.step} of {steps}; nothing is lost, go on "
                        f"with: redan train {self.folder} --out {self.folder} --resume"
                    )
                if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                    self._save()
            self._end_epoch(phase)

    def _train_step(self, batch: Batch, rate: float) -> None:
        place = (self.recipe.seed, "step", self.epoch, self.step, self.fabric.global_rank)
        torch.manual_seed(derive_seed(*place))  # dropout draws from torch's own generator
        self.method.before_step(self.epoch + self.step / len(self.batches), generator(*place, "attack"))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.method.train()
        with torch.autocast(self.fabric.device.type, torch.bfloat16, enabled=self.bfloat16):
            output: StepOutput = self.wrapped(batch)
        if self.monitor is not None and self._place() % self.recipe.monitor.every == 0:  # type: ignore[union-attr]
            output.scalars = (output.scalars or {}) | self.monitor.look(output)
        if self.examples is not None:
            self.examples.observe(batch, output, self.fabric.all_gather)
        loss = output.loss.item()
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise UserError(
                f"the loss is {loss} in epoch {self.epoch + 1}, step {self.step + 1}, at learning rate {rate:.4g}; try "
                "a lower optimizer.lr, schedule.warmup=1, gradient_clip=1 or precision=float32 "
                "(the last checkpoint is kept)"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(output.loss)
        if self.recipe.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.method.parameters(), self.recipe.gradient_clip)
        self._count(batch, output, loss, rate)  # before the weights move: both accuracies are of the same ones
        self.optimizer.step()
        self.method.after_step()

    def _count(self, batch: Batch, output: StepOutput, loss: float, rate: float) -> None:
        """Add a step to the sums of the epoch."""
        n = len(batch.labels)
        clean, adversarial = output.clean_logits, output.adversarial_logits
        if clean is None and self.step % CLEAN_EVERY == 0:
            clean = self.method.clean_logits(batch.images)
        additions: dict[str, float] = {"seen": n, "loss": n * loss, "learning_rate": n * rate}
        for name, logits in (("clean", clean), ("robust", adversarial)):
            if logits is not None:
                additions[name] = int((logits.argmax(1) == batch.labels).sum())
                additions[f"{name}_seen"] = n
        for name, value in (output.scalars or {}).items():
            additions[f"scalar_{name}"] = n * float(value)
            additions[f"{SEEN}{name}"] = n
        for name, addition in additions.items():
            self.sums[name] += addition
        self.progress.step(
            self.epoch + 1, self.sums["loss"] / self.sums["seen"], self._share("clean"), self._share("robust")
        )

    def _place(self) -> int:
        """Steps done of the run."""
        return self.epoch * len(self.batches) + self.step

    def _share(self, name: str) -> float | None:
        seen = self.sums[f"{name}_seen"]
        return self.sums[name] / seen if seen else None

    def _end_epoch(self, phase: Phase) -> None:
        self.method.after_epoch(lambda: self.batches.epoch(self.epoch))
        record: Record = {
            "epoch": self.epoch + 1,
            "step": (self.epoch + 1) * len(self.batches),
            "phase": phase.name,
            "learning_rate": self.sums["learning_rate"] / self.sums["seen"],
            "loss": self.sums["loss"] / self.sums["seen"],
            "clean_accuracy": self._share("clean"),
            "robust_accuracy": self._share("robust"),
            "validation_clean_accuracy": None,
            "validation_robust_accuracy": None,
            "seconds": round(float(self.sums["seconds"]), 3),
        }
        seen = {k.removeprefix(SEEN): count for k, count in self.sums.items() if k.startswith(SEEN)}
        record |= {name: self.sums[f"scalar_{name}"] / count for name, count in seen.items()}
        if self.monitor is not None:
            record |= self.monitor.end_epoch()
        if self.examples is not None:
            self.examples.end_epoch()
        last = self.epoch + 1 == sum(phase.epochs for phase in self.phases)
        better = not len(self.held_out)
        validation: Validation | None = None
        if len(self.held_out) and ((self.epoch + 1) % self.recipe.validation.every == 0 or last):
            clean, robust = self._validate()
            record |= {"validation_clean_accuracy": clean, "validation_robust_accuracy": robust}
            score = clean if self.method.selects_by == "clean" else robust
            better = self.best is None or score > self.best or self.method.selects_by == "last"
            if better or self.best is None:
                self.best = score
            validation = Validation(self.epoch + 1, score, self.best, last)
        self.records.append(record)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, defaultdict(float)
        if record["validation_clean_accuracy"] is not None or not len(self.held_out):
            self.progress.epoch(record)
        if self.fabric.is_global_zero:
            weights = self.method.deployed().state_dict()
            described = {"epoch": self.epoch, "facts": asdict(self.facts)}
            if better:
                save_tensors(self.folder / "model.safetensors", weights, described)
            save_tensors(self.folder / "model-last.safetensors", weights, described)
            lines = "".join(json.dumps(record) + "\n" for record in self.records)
            write_atomically(self.folder / "metrics.jsonl", lines.encode())
            if self.examples is not None:
                self.examples.save(self.folder)
            if self.board is not None:
                for name, value in record.items():
                    if isinstance(value, float):
                        self.board.add_scalar(name, value, self.epoch)
                self.board.flush()
        if validation is not None and self.on_validation is not None:
            self.on_validation(validation)
        self._save()

    def _validate(self) -> tuple[float, float]:
        """Clean and PGD accuracy of the present weights on the held-out images, shared by all processes."""
        network = self.method.validated()
        search = SearchModel(network, precision=self.attack_precision)
        # Of a network that draws at random, one lucky draw of the attacker's is no defeat.
        drop = not isinstance(network, Purified)
        attack = PGD(self.recipe.parsed_threat(), steps=self.recipe.validation.steps, drop_broken=drop)
        rank, world = self.fabric.global_rank, self.fabric.world_size
        correct = torch.zeros(2, device=self.fabric.device)
        for i, start in enumerate(range(0, len(self.held_out), VALIDATION_BATCH)):
            if i % world != rank:
                continue
            images, labels = _batch(self.held_out, start, self.size, self.fabric.device)
            # A network that draws does so alike in every epoch, and after a resume.
            torch.manual_seed(derive_seed(self.recipe.seed, "validation", start, "network"))
            right = ~search.broken(images, labels)
            correct[0] += right.sum()
            images, labels = images[right], labels[right]
            if len(labels):
                draws = generator(self.recipe.seed, "validation", start)
                broken = search.broken(attack.run(search, images, labels, draws).images, labels)
                correct[1] += (~broken).sum()
        clean, robust = (self.fabric.all_reduce(correct, reduce_op="sum") / len(self.held_out)).tolist()  # type: ignore[union-attr, operator]
        return clean, robust

    def _save(self) -> None:
        """Write the checkpoint: the state from which the run goes on."""
        if self.fabric.is_global_zero:
            tensors = {f"method/{name}": tensor for name, tensor in self.method.state_dict().items()}
            tensors |= optimizer_tensors(self.optimizer)
            if self.monitor is not None:
                tensors |= {f"monitor/{name}": tensor for name, tensor in self.monitor.state_dict().items()}
            if self.examples is not None:
                tensors |= {f"examples/{name}": tensor for name, tensor in self.examples.state_dict().items()}
            place: dict[str, Any] = {"epoch": self.epoch, "step": self.step, "best": self.best, "sums": dict(self.sums)}
            place["images"] = self.images
            save_tensors(self.state_file, tensors, place | {"records": self.records})
        self.saved_at = time.monotonic()

    def _restore(self) -> dict[str, Tensor]:
        """Take over the checkpoint; returns its tensors, the optimiser's among them."""
        tensors, place = load_tensors(self.state_file)
        if place.get("images", self.images) != self.images:  # older checkpoints do not say
            raise UserError(f"{self.folder} was begun on other images; {self.recipe.data.indices} has changed since")
        self.method.load_state_dict(below("method/", tensors))
        if self.monitor is not None:
            self.monitor.load_state_dict(below("monitor/", tensors))
        if self.examples is not None:
            self.examples.load_state_dict(below("examples/", tensors))
            self.examples.load(self.folder, place["epoch"])
        self.epoch, self.step, self.best = place["epoch"], place["step"], place["best"]
        self.sums, self.records = defaultdict(float, place["sums"]), place["records"]
        first = 0
        for phase in self.phases:
            if self.step == 0 and self.epoch == first:
                return {}  # at the very start of a phase its optimiser is new
            first += phase.epochs
        return tensors


def _batch(images: ImageSet, start: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    part = slice(start, start + VALIDATION_BATCH)
    return center_crop(to_float(images.images[part].to(device)), size), images.labels[part].to(device)


def _check_folder(recipe: Recipe, folder: Path, state_file: Path, resume: bool) -> None:
    """Refuse to write over a run, and to resume another one than was begun."""
    begun = folder / "recipe.yaml"
    if resume:
        if not begun.exists():
            raise UserError(f"there is no run to resume in {folder}; leave --resume out to begin one")
        old, new = load_recipe(begun).model_dump(), recipe.model_dump()
        changed = [key for key in new if key != "description" and old[key] != new[key]]
        if changed:
            raise UserError(
                f"{folder} was begun with another recipe ({', '.join(changed)} differ); "
                f"resume it with: redan train {folder} --out {folder} --resume"
            )
    elif state_file.exists():
        raise UserError(f"{folder} holds a run already; go on with it by --resume, or choose another --out")
    elif folder.exists() and not begun.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; choose another --out")


class _StopSignals:
    """Turns the first Ctrl-C or SIGTERM into a request, so that the step in work ends and is saved."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "_StopSignals":
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt  # the second one means it
        self.requested = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
