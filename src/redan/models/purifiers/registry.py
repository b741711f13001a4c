"""Purifiers by name, as recipes spell them."""

import inspect
from typing import Any

from redan.errors import UserError, unknown
from redan.models.options import check_options, defaults, imported, settable
from redan.models.purifiers.base import Plain, Purifier
from redan.models.purifiers.inpainting import Inpainting
from redan.models.purifiers.masked_autoencoder import MaskedAutoencoder

PURIFIERS: dict[str, type[Purifier]] = {"inpainting": Inpainting, "masked-autoencoder": MaskedAutoencoder}


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    if name not in PURIFIERS:
        raise unknown("purifier", name, [*PURIFIERS, "package.module:function"])
    return settable(PURIFIERS[name], {"channels", "size"})


def purifier_options(name: str) -> dict[str, Any]:
    """The options of a purifier with their defaults; none for ``package.module:function``, which knows its own.

    Raises:
        UserError: for an unknown name.
    """
    return {} if ":" in name else defaults(_parameters(name))


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
        network = imported("purifier", name, channels=channels, size=size, **options)
        return network if isinstance(network, Purifier) else Plain(network)
    known = _parameters(name)
    check_options(f"purifier {name}", known, options)
    for option, value in options.items():
        if known[option].annotation is int and value < 1:
            raise UserError(f"purifier {name}: {option} is at least 1, got {value}")
    try:
        return PURIFIERS[name](channels=channels, size=size, **options)
    except ValueError as error:
        raise UserError(f"purifier {name}: {error}") from error
