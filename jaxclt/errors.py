"""The one exception for bad input: a single line that says what to change."""

from __future__ import annotations

__all__ = ["InputError"]


class InputError(Exception):
    """Bad input from the user: a file, a name, a flag or a shape.

    The message is one sentence that names the culprit and says what to change.
    The command line prints it without a traceback and exits with status 2.
    """
