"""The one exception for bad input, the checks that raise it, and their words."""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

__all__ = ["InputError", "check_at_least", "check_choice", "check_finite"]
__all__ += ["check_positive", "check_share", "did_you_mean", "first_line"]
__all__ += ["on_one_line", "options_of", "shown"]

Options = TypeVar("Options")

_MOST = 292  # characters of a message: 300 with "jaxclt: " before it
_HEAD = 190  # of them ahead of what is left out
_GAP = " ... "
_BREAKS = dict.fromkeys([*range(32), *range(127, 160), 0x2028, 0x2029], " ")


class InputError(Exception):
    """Bad input from the user: a file, a name, a flag or a shape.

    The message is one sentence that names the culprit and says what to change.
    The command line prints it without a traceback and exits with status 2. Line ends
    in it become spaces, and the middle of a long one is left out.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_one_line(str(message)))


def _one_line(text: str) -> str:
    if len(text) > _MOST:
        text = text[:_HEAD] + _GAP + text[len(_GAP) + _HEAD - _MOST :]
    # Half of a character, which a file name may hold, can be printed by nobody.
    return text.translate(_BREAKS).encode("utf-8", "replace").decode()


class _Brief(reprlib.Repr):
    """Representations whose cost does not grow with what they show."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxtuple = 3, 4, 4, 4
        self.maxstring = self.maxother = most

    def repr_int(self, x: int, level: int) -> str:
        """All digits, unless they fill a line (or are too many for Python to say)."""
        bits = x.bit_length()
        return f"a number of {bits} bits" if bits > 128 else repr(x)


def shown(value: object, most: int = 60) -> str:
    """A value as a message quotes it, in at most this many characters.

    Args:
      value: of a file or a command line, of any size and depth.
      most: characters.
    """
    text = _Brief(most).repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def on_one_line(text: str) -> str:
    """A name on one line; nothing in it can steer a terminal, or fail to print."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """What an exception says, up to its first line's end; its class if it is silent."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_LOOKED_UP = 200  # characters of a name; longer ones are like nothing that is known
_LARGEST = 10**15  # more of anything is a slip, and overflows somewhere


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown name; empty if nothing is like it."""
    if len(name) > _LOOKED_UP:
        return ""
    by_lower = {x.lower(): x for x in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    if not close or by_lower[close[0]] == name:
        return ""
    return f'; did you mean "{by_lower[close[0]]}"?'


def options_of(kind: type[Options], call: str, given: Mapping[str, Any]) -> Options:
    """Options that a call was given by keyword.

    Args:
      kind: their dataclass.
      call: name of the function, for the message.
      given: the keyword arguments.

    Raises:
      TypeError: for one that there is not.
    """
    known = getattr(kind, "__dataclass_fields__", {})
    for name in sorted(set(given) - set(known)):
        raise TypeError(
            f"{call}() has no option {name!r}; there are {', '.join(sorted(known))}"
            f"{did_you_mean(name, known)}"
        )
    return kind(**given)


def check_at_least(
    least: float, most: float = _LARGEST, /, **values: float | None
) -> None:
    """Raise InputError unless numbers are finite and not below `least`.

    Args:
      least: the smallest that is allowed.
      most: the largest.
      **values: by the name of their field, which is also that of their flag; None is
        what was not given.
    """
    _check(values, lambda x: not x > most, f"at most {most:,}")
    _check(values, lambda x: x >= least, f"at least {least:,}")


def check_choice(what: str, value: str, known: Collection[str]) -> None:
    """Raise InputError unless a value is one of those that are known."""
    if value not in known:
        raise InputError(
            f"{what} {value!r}: choose one of {', '.join(known)}"
            f"{did_you_mean(value, known)}"
        )


def check_finite(**values: float | None) -> None:
    """Raise InputError unless numbers are finite; named as for `check_at_least`."""
    _check(values, lambda x: abs(x) <= _LARGEST, "a finite number")


def check_positive(**values: float | None) -> None:
    """Raise InputError unless numbers are above 0; named as for `check_at_least`."""
    _check(values, lambda x: 0 < x <= _LARGEST, "a number above 0")


def check_share(
    *, zero: bool = False, one: bool = True, **values: float | None
) -> None:
    """Raise InputError unless numbers are shares; named as for `check_at_least`.

    Args:
      zero: whether 0 is one.
      one: whether 1 is one.
      **values: the numbers.
    """
    interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
    _check(
        values,
        lambda x: 0 < x < 1 or (x == 0 and zero) or (x == 1 and one),
        f"a share in {interval}",
    )


def _check(
    values: dict[str, float | None], fits: Callable[[float], bool], wanted: str
) -> None:
    for name, value in values.items():
        if value is not None and not fits(value):
            raise InputError(f"--{name.replace('_', '-')} {value}: give {wanted}")
