"""The exceptions a user may see, and the message for a name that is not among those allowed.

The command line prints a message as one line and leaves with exit status 2, or 1 for a `Failure`.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A user's mistake. The message names the value, what is allowed and what to do."""


class Failure(RuntimeError):
    """Something went wrong that no setting would have prevented. Exit status 1, one line."""


class FailedElsewhere(Failure):
    """Another process of the same run failed, and it says why. Exit status 1, no line."""


def unknown(what: str, value: object, allowed: Iterable[str], other: str = "") -> UserError:
    """The error for a value that is none of the names `allowed`.

    It lists them, then what `other` allows besides, and asks whether the closest was meant.
    """
    names = [*allowed]
    close = did_you_mean(str(value), names)
    return UserError(f"unknown {what} {value!r}: choose {', '.join(names)}{other}{close}")


def did_you_mean(value: str, names: Iterable[str]) -> str:
    """`; did you mean X?` with the closest of `names`; "" where none is close."""
    folded = {name.lower(): name for name in names}
    close = get_close_matches(value.lower(), folded, n=1, cutoff=0.7)
    return f"; did you mean {folded[close[0]]}?" if close else ""
