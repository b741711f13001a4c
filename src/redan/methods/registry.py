"""Methods by name, as recipes spell them."""

import inspect
from typing import Any, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from redan.errors import UserError, unknown
from redan.methods.arat import ARAT
from redan.methods.arrest import ARREST
from redan.methods.atop import AToP
from redan.methods.base import Adversary, NetworkMethod
from redan.methods.colt import COLT
from redan.methods.crown_ibp import CROWNIBP
from redan.methods.dpls import DPLSConfig
from redan.methods.ibp import IBP
from redan.methods.lbgat import LBGAT
from redan.methods.mart import MART
from redan.methods.mtl_ibp import MTLIBP
from redan.methods.pgd_at import PGDAT
from redan.methods.sabr import SABR
from redan.methods.standard import Standard
from redan.methods.targets import Targets
from redan.methods.trades import TRADES
from redan.threats import parse_number

METHODS: dict[str, type[NetworkMethod]] = {
    "standard": Standard,
    "pgd-at": PGDAT,
    "trades": TRADES,
    "mart": MART,
    "arat": ARAT,
    "lbgat": LBGAT,
    "arrest": ARREST,
    "atop": AToP,
    "colt": COLT,
    "ibp": IBP,
    "crown-ibp": CROWNIBP,
    "sabr": SABR,
    "mtl-ibp": MTLIBP,
}


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    # A method has the options of the one that it extends, too.
    makers = [vars(family)["__init__"] for family in reversed(METHODS[name].__mro__) if "__init__" in vars(family)]
    parameters = [p for make in makers for p in inspect.signature(make).parameters.values()]
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def method_options(name: str) -> dict[str, Any]:
    """The options of a method with their defaults. Raises: UserError for an unknown name."""
    return {option: parameter.default for option, parameter in _parameters(name).items()}


def _read(kind: Any, value: Any) -> Any:
    """Names may be numbers: a chain's layers are."""
    return TypeAdapter(kind, config=ConfigDict(coerce_numbers_to_str=True)).validate_python(value)


def parse_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options as a recipe gives them, as the method takes them: numbers may be fractions, lists become tuples.

    Raises:
        UserError: for an unknown method or option, or a value that is of another kind than it takes.
    """
    known = _parameters(name)
    parsed = {}
    for option, value in options.items():
        if option not in known:
            raise unknown(f"option of method {name}", option, known)
        kind = known[option].annotation
        try:
            parsed[option] = parse_number(value) if kind is float else _read(kind, value)
        except UserError as error:
            raise UserError(f"method {name}: {option}: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            reason = first["msg"].replace("tuple", "list")  # as a recipe's reader knows it
            if first["type"] == "missing":
                reason = f"a list of {len(get_args(kind))} is needed"
            raise UserError(f"method {name}: {option}: {reason}, got {value!r}") from error
    return parsed


def check_dpls(config: DPLSConfig, name: str) -> None:
    """Raise UserError where the method's loss computes no logits of the images whose difficulty is asked for."""
    clean = config.difficulty == "clean-confidence"
    if config.sources or (METHODS[name].sees_clean if clean else METHODS[name].attacks):
        return
    able = sorted(known for known, family in METHODS.items() if (family.sees_clean if clean else family.attacks))
    raise UserError(
        f"dpls.difficulty {config.difficulty}: method {name} computes no logits of such images ({', '.join(able)} do); "
        "choose another difficulty, or dpls.sources"
    )


def check_teacher(name: str) -> None:
    """Raise UserError where a method takes no teacher, and one is given."""
    if not METHODS[name].takes_teacher:
        taking = ", ".join(sorted(known for known, family in METHODS.items() if family.takes_teacher))
        raise UserError(f"method {name} takes no teacher; leave it out (one goes with: {taking})")


def check_purification(name: str, given: bool) -> None:
    """Raise UserError where a purifier is described for a method that trains none, or none for one that does."""
    if given == METHODS[name].purifies:
        return
    able = ", ".join(sorted(known for known, family in METHODS.items() if family.purifies))
    raise UserError(
        f"method {name} trains no purifier; leave purification out (it goes with: {able})"
        if given
        else f"method {name} trains a purifier; describe it under purification"
    )


def build_method(
    name: str,
    network: nn.Module,
    *,
    adversary: Adversary | None,
    targets: Targets,
    parts: dict[str, Any] | None = None,
    **options: Any,
) -> NetworkMethod:
    """A method around a network.

    Args:
        name: a key of ``METHODS``.
        network: what it trains.
        adversary: what it trains against.
        targets: what the labels become.
        parts: what this method alone takes beside them, such as a ``teacher``.
        options: see the method.

    Raises:
        UserError: for an unknown name or option, or an option out of range.
    """
    return METHODS[name](network, adversary=adversary, targets=targets, **(parts or {}), **parse_options(name, options))
