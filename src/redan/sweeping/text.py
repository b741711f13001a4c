"""Keys, values and times as a sweep writes them."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from redan.errors import UserError

LONGEST_NAME = 255  # bytes that common file systems allow a folder's name


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Each dotted key's last part, or the whole key where two end alike."""
    last = {key: key.rpartition(".")[2] for key in keys}
    times = Counter(last.values())
    return {key: part if times[part] == 1 else key for key, part in last.items()}


def plain_value(key: str, value: Any) -> Any:
    """The value as a file would give it back.

    Raises:
        UserError: where no file could hold it.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise UserError(f"{key} takes numbers, text, true, false, null, lists and mappings, got {value!r}") from error


def flow(value: Any) -> str:
    """The value on one line, as it stands inside a YAML list."""
    return yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True).strip()[1:-1]


def as_text(value: Any) -> str:
    """The value as a person writes it: text without quotes, the rest as ``flow``."""
    return value if isinstance(value, str) else flow(value)


def dotted(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys, dotted."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def duration(seconds: float) -> str:
    """A time in its natural unit, such as ``45.0 min``."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What is another in ``new``, by dotted key, such as ``epochs is 3 there and 4 here``; empty where all is alike.

    What a description says does not count.
    """
    there, here = dotted(old), dotted(new)
    return "; ".join(
        f"{key} is {as_text(there.get(key))} there and {as_text(here.get(key))} here"
        for key in dict.fromkeys([*there, *here])
        if key.rpartition(".")[2] != "description" and there.get(key) != here.get(key)
    )


def folder_name(name: str) -> str:
    """The name without what folders' names had better not hold.

    Raises:
        UserError: where it is too long for one.
    """
    clean = re.sub(r"[^A-Za-z0-9._=+-]", "_", name)
    if len(clean) > LONGEST_NAME:
        raise UserError(f"the folder's name {clean!r} is longer than {LONGEST_NAME} characters")
    return clean


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table, its last line ended."""
    cells = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in cells)
