"""Purifiers by name, as recipes spell them."""

import importlib
import inspect
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from redan.errors import UserError, unknown
from redan.models.purifiers.base import Plain, Purifier
from redan.models.purifiers.inpainting import Inpainting
from redan.models.purifiers.masked_autoencoder import MaskedAutoencoder

PURIFIERS: dict[str, type[Purifier]] = {"inpainting": Inpainting, "masked-autoencoder": MaskedAutoencoder}


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    """What a user may set; channels and size, which have no default, are decided by the data."""
    if name not in PURIFIERS:
        raise unknown("purifier", name, [*PURIFIERS, "package.module:function"])
    parameters = inspect.signature(PURIFIERS[name]).parameters.values()
    return {p.name: p for p in parameters if p.default is not p.empty}


def purifier_options(name: str) -> dict[str, Any]:
    """The options of a purifier with their defaults; none for ``package.module:function``, which knows its own.

    Raises:
        UserError: for an unknown name.
    """
    return {} if ":" in name else {option: parameter.default for option, parameter in _parameters(name).items()}


def build_purifier(name: str, *, channels: int, size: int, **options: Any) -> Purifier:
    """A freshly initialised purifier.

    Args:
        name: a key of ``PURIFIERS``, or ``package.module:function``: a function that is called with channels, size and
            the options, and returns a module that takes images and holes as a ``Purifier`` does.
        channels: of the images.
        size: side of the images, in pixels.
        options: of that purifier, such as ``width``.

    Raises:
        UserError: for an unknown name or option, an option of the wrong kind or out of range, or a function that cannot
            be imported or called so, or returns no module.
    """
    if ":" in name:
        return _imported(name, channels=channels, size=size, **options)
    known = _parameters(name)
    for option, value in options.items():
        if option not in known:
            raise unknown(f"option of purifier {name}", option, known)
        kind = known[option].annotation
        try:
            TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError as error:
            raise UserError(f"purifier {name}: {option}: {error.errors()[0]['msg']}, got {value!r}") from error
        if kind is int and value < 1:
            raise UserError(f"purifier {name}: {option} is at least 1, got {value}")
    try:
        return PURIFIERS[name](channels=channels, size=size, **options)
    except ValueError as error:
        raise UserError(f"purifier {name}: {error}") from error


def _imported(name: str, **arguments: Any) -> Purifier:
    module, _, function = name.partition(":")
    try:
        network = getattr(importlib.import_module(module), function)(**arguments)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"cannot get a purifier from {name}: {error}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{name} returns {type(network).__name__}, not a torch module")
    return network if isinstance(network, Purifier) else Plain(network)
