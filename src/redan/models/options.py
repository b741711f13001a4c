"""What a recipe may set of a part that it names: the arguments that neither the data nor the name decides."""

import importlib
import inspect
from collections.abc import Callable, Container, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from redan.errors import UserError, unknown


def settable(make: Callable[..., Any], decided: Container[str]) -> dict[str, inspect.Parameter]:
    """The parameters of what makes the part, by name, but for those that are decided."""
    parameters = inspect.signature(make).parameters.values()
    return {parameter.name: parameter for parameter in parameters if parameter.name not in decided}


def defaults(parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """What each is if nobody sets it."""
    return {option: parameter.default for option, parameter in parameters.items()}


def check_options(part: str, known: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> None:
    """Raise UserError for an option that the part, such as ``transform rt2``, does not know, or of another kind."""
    for option, value in options.items():
        if option not in known:
            raise unknown(f"option of {part}", option, known)
        try:
            TypeAdapter(known[option].annotation).validate_python(value, strict=True)
        except ValidationError as error:
            raise UserError(f"{part}: {option}: {error.errors()[0]['msg']}, got {value!r}") from error


def imported(kind: str, text: str, **arguments: Any) -> nn.Module:
    """What a user's ``package.module:function`` returns when it is called with these arguments.

    Raises:
        UserError: where it cannot be imported or called so, or returns no module; ``kind`` says what it was to be.
    """
    module, _, function = text.partition(":")
    try:
        network = getattr(importlib.import_module(module), function)(**arguments)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"cannot get a {kind} from {text}: {error}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{text} returns {type(network).__name__}, not a torch module")
    return network
