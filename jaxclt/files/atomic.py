"""Write a file or a directory so that readers see all of it or none of it.

The new content is made beside the target (the same file system, so that the last step
is a rename), forced to disk and renamed over it. When the body raises, the target is as
it was before and nothing is left behind. What a killed process leaves has that
process's word in its name, and is removed by the next one that writes there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxclt.errors import InputError
from jaxclt.files.owner import OWNER, is_gone, owner

__all__ = [
    "atomic_directory",
    "atomic_path",
    "blame",
    "is_temporary",
    "sweep",
    "write_text",
]

_TEMPORARY = re.compile(rf"\.(?P<target>.+)\.(?P<owner>{OWNER})-\w+")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that becomes the file `path` when the body succeeds.

    Raises:
      InputError: if the folder cannot be made or written, `path` is a folder, or the
        disk is full.
    """
    target = Path(path)
    with blame(target):
        if target.is_dir():
            raise InputError(f"{target} is a directory: give the name of a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=_prefix(target))
        os.close(handle)
    temporary = Path(name)
    try:
        with _blame_full_disk(target):
            yield temporary
        with blame(target):
            # mkstemp makes private files; the result gets the mode of any new file.
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of text in UTF-8.

    Raises:
      InputError: as `atomic_path`.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that becomes the folder `path` when the body succeeds.

    An older folder at `path` is replaced as a whole.

    Raises:
      InputError: if the parent folder cannot be made or written, `path` is a file, or
        the disk is full.
    """
    target = Path(path)
    with blame(target):
        if target.exists() and not target.is_dir():
            raise InputError(f"{target} is a file: give the name of a directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        for name in os.listdir(target.parent):
            if name.startswith(f".{target.name}."):
                _remove_dead(target.parent / name)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target)))
    temporary = scratch / "new"
    try:
        temporary.mkdir()
        with _blame_full_disk(target):
            yield temporary
        with blame(target):
            for file in temporary.rglob("*"):
                _sync(file)
            # A folder cannot be renamed over a full one: move the old one aside.
            with contextlib.suppress(FileNotFoundError):
                os.replace(target, scratch / "old")
            try:
                os.replace(temporary, target)
            except OSError:
                if (scratch / "old").exists() and not target.exists():
                    os.replace(scratch / "old", target)
                raise
            _sync(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is one of those yielded above."""
    return _TEMPORARY.fullmatch(name) is not None


def sweep(directory: str | os.PathLike[str]) -> None:
    """Remove the temporaries of processes that have ended.

    Args:
      directory: where, and in the folders two levels below it: nothing is written
        deeper, and it may be the root of a large tree.
    """
    root = Path(directory)
    for folder, folders, names in os.walk(root):
        for name in [*folders, *names]:
            _remove_dead(Path(folder, name))
        if len(Path(folder).relative_to(root).parts) == 2:
            folders.clear()


def _remove_dead(path: Path) -> None:
    """Remove what a process that has ended left, or finish it if all was there."""
    found = _TEMPORARY.fullmatch(path.name)
    if found is None or not is_gone(found["owner"]):
        return
    with contextlib.suppress(OSError):
        if not path.is_dir() or path.is_symlink():
            path.unlink()
            return
        target = path.parent / found["target"]
        if (path / "old").exists() and not target.exists():
            os.replace(path / "new", target)
        shutil.rmtree(path)


def _prefix(target: Path) -> str:
    return f".{target.name}.{owner()}-"


@contextlib.contextmanager
def blame(target: Path) -> Iterator[None]:
    """Turn an operating system error into one line about `target`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}; choose another place"
        ) from error


@contextlib.contextmanager
def _blame_full_disk(target: Path) -> Iterator[None]:
    """The same for a disk or a limit that the body filled; its other errors stay."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"no room left to write {target} ({error.strerror}): free some of the "
            "disk, raise the limit on files, or choose another place"
        ) from error


def _sync(path: Path) -> None:
    """Force a file or folder to disk; folders cannot be opened on every platform."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
