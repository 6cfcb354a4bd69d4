"""The one exception for bad input: a single line that says what to change."""

from __future__ import annotations

import reprlib

__all__ = ["InputError", "shown"]

_MOST = 300  # characters of a message
_HEAD = 230  # of them ahead of what is left out
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
    """A value as a message quotes it, in at most so many characters.

    Args:
      value: of a file or a command line, of any size and depth.
      most: characters.
    """
    text = _Brief(most).repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
