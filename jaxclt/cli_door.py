"""The one door for errors: whatever goes wrong in a command is one line and a status."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator

from rich.console import Console

from jaxclt.errors import InputError, on_one_line

__all__ = ["BAD_INPUT", "CLOSED_PIPE", "INTERRUPTED", "OUR_FAULT", "guarded"]

BAD_INPUT, OUR_FAULT = 2, 70
INTERRUPTED, CLOSED_PIPE = 130, 141  # 128 and the number of SIGINT, of SIGPIPE
_LONGEST = 300  # characters of a line
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def guarded(
    run: Callable[[Console], None], *, debug: bool, lower: str, kept: str
) -> int:
    """The exit status of a command, whose errors are said on stderr.

    Args:
      run: the command; gets what it may say progress on.
      debug: whether tracebacks are shown as well.
      lower: what to ask less of if memory runs out.
      kept: what is true of the output after an interrupt.
    """
    say = Console(stderr=True, highlight=False)
    try:
        with _library_warnings(say):
            status = _run(run, say)
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
    except BrokenPipeError:
        _leave_stdout()
        return CLOSED_PIPE
    except KeyboardInterrupt:
        status, line = INTERRUPTED, f"interrupted; {kept}"
    except Exception as error:
        status, line = _verdict(error, lower)
        if debug:
            traceback.print_exc()
    with contextlib.suppress(OSError):  # nobody listens
        say.print(f"jaxclt: {line}", markup=False, soft_wrap=True)
    return status


def _run(run: Callable[[Console], None], say: Console) -> int:
    try:
        run(say)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich leaves by this
            raise stop.__context__ from None
        return int(stop.code or 0)
    return 0


def _verdict(error: Exception, lower: str) -> tuple[int, str]:
    """Exit status and line for an exception."""
    reason = on_one_line(str(error).strip().split("\n", 1)[0], _LONGEST // 3)
    if isinstance(error, InputError):
        return BAD_INPUT, str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return BAD_INPUT, f"memory ran out ({reason or 'no more is free'}): try {lower}"
    if isinstance(error, OSError):
        why = error.strerror or reason
        if _leave_stdout(only_broken=True):
            return BAD_INPUT, (
                f"the results could not be printed ({why}): print them elsewhere; "
                "files that the command wrote are there"
            )
        if error.filename is not None:
            name = on_one_line(str(error.filename), _LONGEST // 2)
            return BAD_INPUT, f"cannot use {name} ({why})"
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


def _leave_stdout(*, only_broken: bool = False) -> bool:
    """Send what is left for stdout nowhere; whether that was done.

    Python would try again to write it when it exits, and print a traceback.
    """
    if sys.stdout is None:
        return False
    if only_broken:
        try:
            sys.stdout.flush()
        except OSError:
            pass
        else:
            return False
    with contextlib.suppress(OSError, ValueError):  # a test's stdout has no number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    return True


@contextlib.contextmanager
def _library_warnings(say: Console) -> Iterator[None]:
    """What libraries warn of and log is one line each."""

    def show(text: str) -> None:
        line = on_one_line(f"jaxclt: warning: {text.strip()}", _LONGEST)
        say.print(line, markup=False, soft_wrap=True)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reason = record.exc_info and record.exc_info[1]
            more = f" ({type(reason).__name__}: {reason})" if reason else ""
            show(record.getMessage() + more)

    last = logging.lastResort
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: show(str(message))
        # What has no handler of its own is shown with its traceback otherwise.
        logging.lastResort = Handler(logging.WARNING)
        try:
            yield
        finally:
            logging.lastResort = last
