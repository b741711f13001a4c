"""What redan says to a user who made a mistake: one line, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's: the message is one line that says what is wrong and what would be right."""


class DataError(UserError):
    """Data that are missing, truncated, corrupt or of the wrong shape; the message names the file or folder."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest that does.

    >>> str(unknown("recipe", "pgd-att", ["pgd-at", "trades"]))
    "no recipe 'pgd-att'; did you mean 'pgd-at'? (there are: pgd-at, trades)"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    listed = f"(there are: {', '.join(names)})" if near else f"there are: {', '.join(names)}"
    return UserError(f"no {kind} {name!r}{hint} {listed}")


class Stopped(Exception):
    """Work that the user stopped; the message says what was kept and how to go on."""
