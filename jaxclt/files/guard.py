"""One at a time at a file that is read, changed and replaced, of all processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jaxclt.errors import InputError

__all__ = ["locked"]

_NAME = ".jaxclt-save.lock"
_THREADS = threading.Lock()


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], *, wait: float = 10.0) -> Iterator[None]:
    """Keep other threads and processes from replacing a file while the body does.

    The lock is the operating system's, on a hidden file beside it that stays: a file
    that is itself replaced cannot be locked.

    Args:
      path: of the file.
      wait: seconds in which another process may finish.

    Raises:
      InputError: if another process does not finish, or the folder cannot be written.
    """
    end = time.monotonic() + wait
    with _THREADS:
        try:
            handle = os.open(Path(path).parent / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(
                f"cannot write {path}: {error.strerror}; choose another place"
            ) from error
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > end:
                        raise InputError(
                            f"another process is writing {path}: try again"
                        ) from error
                time.sleep(0.01)
            yield
        finally:
            os.close(handle)
