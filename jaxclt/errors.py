"""The one exception for bad input, and what its messages are made with."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable

__all__ = [
    "InputError",
    "check_at_least",
    "check_finite",
    "check_share",
    "did_you_mean",
    "on_one_line",
]

LONGEST = 300  # characters of a message
LARGEST = 10**15  # more of anything is a slip, and overflows somewhere
_LOOKED_UP = 200  # characters of a name; longer ones are like nothing that is known


class InputError(Exception):
    """Bad input from the user: a file, a name, a flag or a shape.

    The message is one sentence that names the culprit and says what to change, on one
    line of at most 300 characters: of a longer one the middle is left out.
    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(on_one_line(message, most=LONGEST))


def on_one_line(text: str, most: int | None = None) -> str:
    """A text on one line in which nothing can steer a terminal, or fail to print.

    Args:
      text: anything, lone surrogates included.
      most: characters; of a longer text the middle is left out.
    """
    if most is not None and len(text) > most:
        end = most // 3
        text = f"{text[: most - end - 1]}…{text[-end:]}"
    line = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    # Escapes are longer than what they stand for.
    return line if most is None or len(line) <= most else on_one_line(line, most)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown name; empty if nothing is like it."""
    if len(name) > _LOOKED_UP:
        return ""
    by_lower = {x.lower(): x for x in known}
    close = difflib.get_close_matches(name.lower().strip(), by_lower, n=1)
    return f'; did you mean "{by_lower[close[0]]}"?' if close else ""


def check_at_least(least: float, **values: float | None) -> None:
    """Raise InputError unless numbers are finite and not below `least`.

    Args:
      least: the smallest that is allowed.
      **values: by the name of their field, which is also that of their flag; None is
        what was not given.
    """
    for name, value in values.items():
        if value is None or least <= value <= LARGEST:
            continue
        bound = f"at least {least:,}" if not value > LARGEST else f"at most {LARGEST:,}"
        raise InputError(f"{_flag(name)} {value}: give {bound}")


def check_finite(**values: float | None) -> None:
    """Raise InputError unless numbers are finite; named as for `check_at_least`."""
    for name, value in values.items():
        if value is not None and not abs(value) <= LARGEST:
            raise InputError(f"{_flag(name)} {value}: give a finite number")


def check_share(
    *, zero: bool = False, one: bool = True, **values: float | None
) -> None:
    """Raise InputError unless numbers are shares; named as for `check_at_least`.

    Args:
      zero: whether 0 is one.
      one: whether 1 is one.
      **values: the numbers.
    """
    for name, value in values.items():
        if value is None or 0 < value < 1 or (value == 0 and zero):
            continue
        if not (value == 1 and one):
            interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
            raise InputError(f"{_flag(name)} {value}: give a share in {interval}")


def _flag(name: str) -> str:
    return "--" + re.sub(r"_gb$", "", name).replace("_", "-")
