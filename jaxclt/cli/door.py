"""The one door for errors: what goes wrong in a command is a line and a status."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.console import Console

from jaxclt.errors import InputError

__all__ = ["BAD_INPUT", "CLOSED_PIPE", "INTERRUPTED", "OUR_FAULT", "guarded"]

BAD_INPUT, OUR_FAULT = 2, 70
INTERRUPTED, CLOSED_PIPE = 130, 141  # 128 and the number of SIGINT, of SIGPIPE
_REASON = 100  # characters of an exception's own words
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def guarded(
    run: Callable[[Console], None], *, debug: bool, lower: str, kept: str
) -> int:
    """The exit status of a command, whose errors are printed on stderr.

    Args:
      run: the command; gets what it may say progress on.
      debug: whether tracebacks are shown as well.
      lower: what to ask less of if memory runs out.
      kept: what is true of the output after an interrupt.
    """
    say = Console(stderr=True, highlight=False)
    try:
        with _library_warnings(say), _watched_stdout():
            return _run(run, say)
    except BrokenPipeError:
        _leave_stdout()
        return CLOSED_PIPE
    except KeyboardInterrupt as stop:
        status = getattr(stop, "status", INTERRUPTED)  # a signal may bring its own
        line = f"interrupted; {kept}"
    except Exception as error:
        status, line = _verdict(error, lower)
        if debug:
            traceback.print_exc()
    with contextlib.suppress(OSError):  # nobody listens
        _say(say, line)
    return status


def _say(say: Console, text: str) -> None:
    """Print one line of at most 300 characters, as the messages of bad input are."""
    say.print(f"jaxclt: {InputError(text)}", markup=False, soft_wrap=True)


def _run(run: Callable[[Console], None], say: Console) -> int:
    status = 0
    try:
        run(say)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich leaves by this
            raise stop.__context__ from None
        status = int(stop.code or 0)
    print(end="", flush=True)  # noqa: T201  # here, since nobody hears of it later
    return status


def _verdict(error: Exception, lower: str) -> tuple[int, str]:
    """Exit status and line for an exception."""
    reason = str(error).strip().partition("\n")[0][:_REASON]
    if isinstance(error, InputError):
        return BAD_INPUT, str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return BAD_INPUT, f"memory ran out ({reason or 'no more is free'}): try {lower}"
    if isinstance(error, _StdoutError):
        _leave_stdout()
        return BAD_INPUT, (
            f"the results could not be printed ({reason}): send them elsewhere; files "
            "that the command wrote are whole"
        )
    if isinstance(error, OSError):
        why = error.strerror or reason
        if error.filename is not None:
            return BAD_INPUT, f"cannot use {error.filename} ({why})"
        if error.errno in _FULL:
            return BAD_INPUT, (
                f"no room left to write ({why}): free some of the disk, or raise the "
                "limit on the size of files"
            )
    name = type(error).__name__
    what = f"{name}: {reason}" if reason else name
    return OUR_FAULT, (
        f"a fault of jaxclt's own ({what}); add --debug to see where it happened, and "
        "please report that"
    )


class _StdoutError(Exception):
    """What was printed did not arrive."""


class _Watched:
    """A stream whose errors can be told from those of other files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._told():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._told():
            self._stream.flush()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _StdoutError(error.strerror or str(error)) from error


@contextlib.contextmanager
def _watched_stdout() -> Iterator[None]:
    if sys.stdout is None:  # the command was started without one
        yield
        return
    watched: Any = _Watched(sys.stdout)
    with contextlib.redirect_stdout(watched):
        yield


def _leave_stdout() -> None:
    """Send what is left for stdout nowhere.

    Python would try to write it when it exits, and print a traceback.
    """
    with contextlib.suppress(OSError, ValueError):  # a test's stdout has no number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def _library_warnings(say: Console) -> Iterator[None]:
    """Each warning and log record of a library becomes one line."""

    def show(text: str) -> None:
        _say(say, f"warning: {text.strip()}")

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reason = record.exc_info and record.exc_info[1]
            more = f" ({type(reason).__name__}: {reason})" if reason else ""
            show(record.getMessage() + more)

    last = logging.lastResort
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: show(str(message))
        # Otherwise loggers without a handler show tracebacks.
        logging.lastResort = Handler(logging.WARNING)
        try:
            yield
        finally:
            logging.lastResort = last
