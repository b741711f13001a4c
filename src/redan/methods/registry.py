"""Methods by name, as recipes spell them."""

import inspect
from typing import Any

from torch import nn

from redan.errors import UserError, unknown
from redan.methods.base import Adversary, NetworkMethod
from redan.methods.mart import MART
from redan.methods.pgd_at import PGDAT
from redan.methods.standard import Standard
from redan.methods.targets import Targets
from redan.methods.trades import TRADES
from redan.threats import parse_number

METHODS: dict[str, type[NetworkMethod]] = {"standard": Standard, "pgd-at": PGDAT, "trades": TRADES, "mart": MART}


def method_options(name: str) -> dict[str, Any]:
    """The options of a method with their defaults. Raises: UserError for an unknown name."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    parameters = inspect.signature(METHODS[name].__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def build_method(
    name: str, network: nn.Module, *, adversary: Adversary | None, targets: Targets, **options: Any
) -> NetworkMethod:
    """A method around a network.

    Raises:
        UserError: for an unknown name or option, or an option out of range.
    """
    known = method_options(name)
    numbers = {}
    for option, value in options.items():
        if option not in known:
            raise unknown(f"option of method {name}", option, known)
        try:
            numbers[option] = parse_number(value)
        except UserError as error:
            raise UserError(f"method {name}: {option}: {error}") from error
    return METHODS[name](network, adversary=adversary, targets=targets, **numbers)
