"""One command at a time in a directory.

The lock is the operating system's, on a small file that says who holds it: however a
process ends, its lock ends with it. Where a file system has no locks, the file alone
counts, for as long as the process that it names lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxclt.errors import InputError
from jaxclt.files.atomic import blame
from jaxclt.files.json_file import parse_object
from jaxclt.files.json_text import to_json
from jaxclt.files.owner import is_gone, owner

__all__ = ["LOCK", "held"]

LOCK = ".jaxclt.lock"
_COMMAND = 80  # characters of it that a message quotes
_WAIT_S = 0.2  # for another process, about to end, to let go

_held: set[Path] = set()  # by this process, which may enter again


@contextlib.contextmanager
def held(out: str | os.PathLike[str], *, beside: bool = False) -> Iterator[None]:
    """Hold a directory, so that other processes that would write into it refuse.

    It is made if need be, and removed again if it stays empty.

    Args:
      out: directory.
      beside: put the lock next to it, for a directory that appears all at once.

    Raises:
      InputError: if another process holds it, which the line names, or the lock cannot
        be written.
    """
    place = Path(out).resolve()
    path = place / LOCK
    if beside:
        path = place.parent / f".{place.name}.lock"
    if path in _held:
        yield
        return
    new = [folder for folder in path.parents if not folder.exists()]
    with blame(Path(out)):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _taken(path, Path(out))
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        # While it is locked: afterwards it may be another's.
        path.unlink(missing_ok=True)
        os.close(handle)
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _taken(path: Path, out: Path) -> int:
    """The lock's file, open, locked and signed."""
    end = time.monotonic() + _WAIT_S
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        other, locks = _other(handle, path)
        if other is None:
            os.ftruncate(handle, 0)
            os.pwrite(handle, to_json(_about()).encode(), 0)
            return handle
        os.close(handle)
        if time.monotonic() >= end:
            break
        time.sleep(0.05)
    who = "another process"
    if "pid" in other:
        who = (
            f"process {other['pid']} on {other.get('host')} since "
            f"{other.get('since')} ({other.get('command')})"
        )
    rest = "" if locks else f"; if that has ended, delete {path}"
    raise InputError(
        f"{out} is being written to by {who}: wait for it, or choose another "
        f"directory{rest}"
    )


def _other(handle: int, path: Path) -> tuple[dict[str, Any] | None, bool]:
    """Who else holds the file, None if we do now; and whether locks work here."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(handle), True
    except OSError:
        found = _read(handle)
        free = "owner" not in found or is_gone(str(found["owner"]))
        return None if free else found, False
    try:
        same = os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        same = False
    # Else its last owner removed it after we had opened it.
    return None if same else {}, True


def _about() -> dict[str, Any]:
    command = shlex.join(["jaxclt", *sys.argv[1:]])
    if len(command) > _COMMAND:
        command = command[: _COMMAND - 1] + "…"
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "command": command,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "owner": owner(),
    }


def _read(handle: int) -> dict[str, Any]:
    try:
        return parse_object(os.pread(handle, 4096, 0), "a lock")
    except InputError:
        return {}
