"""Which process a file belongs to, as a word that can stand in its name.

A word names the machine, its boot, the process and the moment the process began, so
that what a killed process left can be told from what a running one is writing.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import secrets
from pathlib import Path

__all__ = ["OWNER", "is_gone", "owner"]

OWNER = r"[0-9a-f]{6}-[0-9a-f]{6}-[0-9]+-[0-9a-f]{6}"
# A number is given again, in a container often to the same command: this is not.
_PROCESS = secrets.token_hex(3)


def owner() -> str:
    """The word of this process."""
    return f"{_machine()}-{_boot()}-{os.getpid()}-{_PROCESS}"


def is_gone(word: str) -> bool:
    """Whether the process of a word has ended; False where that cannot be known."""
    if not re.fullmatch(OWNER, word):
        return False
    machine, boot, number, process = word.split("-")
    if machine != _machine():
        return False
    if boot != _boot():
        return True
    if int(number) == os.getpid():
        return process != _PROCESS
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


@functools.cache
def _machine() -> str:
    return _short(platform.node())


@functools.cache
def _boot() -> str:
    try:
        return _short(Path("/proc/sys/kernel/random/boot_id").read_text("utf-8"))
    except OSError:  # not Linux: only the process number is left to go by
        return _short("")


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
