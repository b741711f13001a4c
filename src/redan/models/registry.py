"""Networks by name, as recipes and the command line spell them."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from redan.errors import UserError, unknown
from redan.models.convnet import cnn7, conv_med, conv_med_big, small_cnn
from redan.models.norms import Normalise
from redan.models.options import defaults, settable
from redan.models.preact_resnet import PreActResNet
from redan.models.resnet import ResNet
from redan.models.wide_resnet import WideResNet

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ResNet, depths=(2, 2, 2, 2)),
    "resnet34": partial(ResNet, depths=(3, 4, 6, 3)),
    "preact-resnet18": partial(PreActResNet, depths=(2, 2, 2, 2)),
    "wide-resnet": WideResNet,
    "convmed": conv_med,
    "convmedbig": conv_med_big,
    "cnn7": cnn7,
    "small-cnn": small_cnn,
    "small-cnn-bn": partial(small_cnn, batch_norm=True),
}

# What the data and the name decide; all other arguments are options that a user may set.
_DECIDED = {"normalise", "depths", "in_channels", "size", "classes", "batch_norm"}


def model_options(name: str) -> dict[str, Any]:
    """The options of a network with their defaults. Raises: UserError for an unknown name."""
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return defaults(settable(MODELS[name], _DECIDED))


def build_model(
    name: str,
    normalise: Normalise,
    *,
    in_channels: int,
    size: int,
    classes: int,
    **options: int,
) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: a key of ``MODELS``.
        normalise: its first layer.
        in_channels: of the images.
        size: side of the images, in pixels.
        classes: number of logits.
        options: of that network, such as ``width``.

    Raises:
        UserError: for an unknown name or option, or an option out of range.
    """
    known = model_options(name)
    for option, value in options.items():
        if option not in known:
            raise unknown(f"option of model {name}", option, known)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"model {name}: {option} is a whole number of at least 1, got {value!r}")
    decided = {"in_channels": in_channels, "classes": classes}
    if "size" in inspect.signature(MODELS[name]).parameters:  # networks that pool globally take any size
        decided["size"] = size
    try:
        return MODELS[name](normalise, **decided, **options)
    except ValueError as error:
        raise UserError(f"model {name}: {error}") from error
