"""What is evaluated: a run folder, a function that returns a network, or a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from redan.certification.network import NetworkModule
from redan.certification.onnx_files import read_onnx
from redan.errors import UserError
from redan.models.norms import Normalise
from redan.models.options import imported
from redan.run import Checkpoint, read_run
from redan.threats import Threat, parse_threat


@dataclass(frozen=True)
class Subject:
    """A network with the name, folder, data, image size and threat that it comes with."""

    name: str
    network: nn.Module
    folder: Path | None
    data: str | None
    size: int | None
    threat: str | None


def find_subject(run: str | Path | nn.Module, checkpoint: Checkpoint) -> Subject:
    """What ``run`` names: a run folder, an ONNX file, ``package.module:function`` that returns a module, or a module.

    Raises:
        UserError: where there is no such thing.
    """
    if isinstance(run, nn.Module):
        return Subject(type(run).__name__, run, None, None, None, None)
    text = str(run)
    if text.endswith(".onnx"):
        return Subject(Path(text).stem, NetworkModule(read_onnx(Path(text))).eval(), None, None, None, None)
    if ":" in text and not Path(text).exists():
        return Subject(text, imported("network", text).eval(), None, None, None, None)
    recipe, facts, network = read_run(run, checkpoint)
    size = recipe.data.crop or facts.size
    return Subject(Path(run).resolve().name, network, Path(run), recipe.data.name, size, recipe.threat)


def asked_threat(threat: str | Threat | None, subject: Subject) -> Threat:
    """The threat that is asked for, or else the subject's own.

    Raises:
        UserError: where there is none, or the text names none.
    """
    if isinstance(threat, Threat):
        return threat
    text = threat or subject.threat
    if text is None:
        raise UserError(f"{subject.name} does not say what it withstands; name the threat with --threat linf:8/255")
    return parse_threat(text)


def normalised(network: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    """The network with its normalisation as first layer, where the caller says that it lacks one.

    Raises:
        UserError: where only one of the two is given, or they do not fit.
    """
    if mean is None and std is None:
        return network
    if mean is None or std is None:
        raise UserError("--input-mean and --input-std go together")
    try:
        whole = nn.Sequential(Normalise(mean, std).train(network.training), network)
    except ValueError as error:
        raise UserError(str(error)) from error
    whole.training = network.training
    return whole
