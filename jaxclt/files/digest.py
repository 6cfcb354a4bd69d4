"""Content hashes of files, read whole once and remembered.

A file's sha256 is kept in the process, and for large files in the user cache, by path,
inode, size and both times (a change in place moves the second even where the first was
put back). One that was touched within the last seconds is not remembered: the clock of
the file system may be too coarse to tell the next change from this one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from jaxclt.errors import InputError
from jaxclt.files.atomic import atomic_path

__all__ = ["cache_root", "fingerprint", "read_sha256", "sha256"]

_LARGE = 16 << 20  # bytes; smaller files are read again by the next process
_SETTLED_S = 2.0
_known: dict[str, str] = {}


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The user cache: `cache_dir`, else $JAXCLT_CACHE, else the platform's place."""
    chosen = cache_dir or os.environ.get("JAXCLT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("jaxclt", appauthor=False))


def fingerprint(files: Mapping[str, Path]) -> str:
    """Hex sha256 over names and contents, in the order of names.

    Of a single file it is the sha256 of the file, whatever its name.
    """
    if len(files) == 1:
        return sha256(*files.values())
    each = (f"{name}\0{sha256(path)}\n" for name, path in sorted(files.items()))
    return hashlib.sha256("".join(each).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hex sha256 of a file; read again only after it has changed."""
    path = path.resolve()
    stat = path.stat()
    times = (stat.st_mtime_ns, stat.st_ctime_ns)
    state = f"{path}\0{stat.st_ino}\0{stat.st_size}\0{times}"
    key = hashlib.sha256(state.encode(errors="surrogateescape")).hexdigest()
    note = cache_root() / "hashes" / key if stat.st_size >= _LARGE else None
    found = _known.get(key) or (_read(note) if note else None)
    if found is None:
        found = read_sha256(path)
        if time.time() - max(times) / 1e9 < _SETTLED_S:
            return found
        if note is not None:
            _write(note, found)
    _known[key] = found
    return found


def read_sha256(path: Path) -> str:
    """Hex sha256 of a file as it is on disk now, where damage is looked for."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(note: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = note.read_text("ascii")
        if re.fullmatch(r"[0-9a-f]{64}", text):
            return text
    return None


def _write(note: Path, found: str) -> None:
    """Remember a hash; a cache that cannot be written costs time only."""
    with contextlib.suppress(InputError, OSError), atomic_path(note) as temporary:
        temporary.write_text(found, "ascii")
