"""A run that goes on where it was, whatever it was doing and however it ended.

What a run depends on is plain JSON, its identity: `digest` names it, `refuse_other`
compares two. A directory is held against other processes and other commands by
`owned`, and belongs to one identity by `claimed`. What a run has so far is saved now
and then by `State`; what it has finished is read back by `intact_json`, and `Answers`
come one at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxclt.errors import InputError, shown
from jaxclt.files.atomic import atomic_path, sweep, write_text
from jaxclt.files.json_file import (
    MOST_DATA,
    Schema,
    check_json,
    find_json,
    read_json,
)
from jaxclt.files.json_text import to_json
from jaxclt.files.lines import append_line, read_lines
from jaxclt.runs.lock import held

__all__ = [
    "RUN",
    "Answers",
    "State",
    "claimed",
    "digest",
    "intact_json",
    "owned",
    "refuse_other",
]

RUN = "run.json"  # the identity of the run that a directory belongs to
SAVE_S = 30.0  # between two states on disk
SAVE_SHARE = 0.05  # of the time that saving may take, where it is slow
# Files that tell which command a directory is of.
MAKES = {
    "trace": ("a traced graph", ("graph.npz",)),
    "globals": ("global weights", ("statistics.npz", "partial.npz")),
    "run": ("a run of features or train", (RUN,)),
}

Identity = Mapping[str, Any]  # JSON, in at most two levels


# -- identity --------------------------------------------------------------------------


def digest(identity: Any) -> str:
    """A name for what a result depends on: equal JSON has equal digests."""
    return hashlib.sha256(to_json(identity).encode()).hexdigest()


def refuse_other(place: Path, theirs: Identity, ours: Identity) -> None:
    """Refuse to go on with another run.

    Args:
      place: where the other run is.
      theirs: its identity, or whatever was found in its place.
      ours: the identity of this run; what only `theirs` has does not count.

    Raises:
      InputError: if they differ; names the first difference.
    """
    there = _flat(theirs)
    for name, value in _flat(json.loads(to_json(ours))).items():
        other = there.get(name)
        if other != value:
            values = "" if _long(other) or _long(value) else f" ({other}, not {value})"
            raise InputError(
                f"{place} holds another run, which differs in {name}{values}: give the "
                "same settings to go on, or another directory"
            )


def _flat(identity: Identity) -> dict[str, Any]:
    """Settings by their own names, whatever group they are in."""
    found = {}
    for name, value in identity.items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def _long(value: Any) -> bool:
    """Whether a value says nothing to a reader: a hash, a list, an absent one."""
    return value is None or isinstance(value, dict | list) or len(shown(value)) > 40


# -- the directory ---------------------------------------------------------------------


@contextlib.contextmanager
def owned(out: str | os.PathLike[str], *, makes: str = "") -> Iterator[None]:
    """Hold a directory that can be written, and is not another command's.

    What killed commands left unfinished there is removed; nothing else is left.

    Args:
      out: directory.
      makes: what of `MAKES` is to be written. What another command made has a report
        and a page of the same names, which would be lost.

    Raises:
      InputError: if another process or command holds it, or it cannot be written.
    """
    with held(out):
        for kind, (what, names) in MAKES.items():
            there = any(os.path.exists(Path(out) / name) for name in names)
            if makes and kind != makes and there:
                raise InputError(
                    f"{out} holds {what}, whose report would be replaced: give another "
                    "--out"
                )
        probe = Path(out) / ".jaxclt"
        with atomic_path(probe):
            pass
        probe.unlink()
        sweep(out)
        yield


@contextlib.contextmanager
def claimed(out: Path, ours: Identity, leaves: Collection[str] = ()) -> Iterator[None]:
    """Make a directory that of this run, or see that it is.

    A directory in which another run came to nothing is free, and so is this one after
    a body that fails and has left nothing.

    Args:
      out: directory.
      ours: the identity of this run.
      leaves: names of what a run leaves there; whatever is there counts if empty.

    Raises:
      InputError: if it holds anything else.
    """
    file = out / RUN
    theirs, begun = find_json(file), _has_any(out, leaves)
    if begun and theirs is None:
        raise InputError(f"{out} is not empty and holds no run: give another directory")
    # Another command's run leaves other names than ours.
    if theirs is not None and (begun or set(theirs) != set(ours)):
        refuse_other(out, theirs, ours)
    else:
        write_text(file, to_json(ours, indent=1) + "\n")
    try:
        yield
    except BaseException:
        if not _has_any(out, leaves):
            file.unlink()
            with contextlib.suppress(OSError):  # unless something hidden is there
                out.rmdir()
        raise


def _has_any(out: Path, leaves: Collection[str]) -> bool:
    """Whether a run left something: a lock or a temporary, which are hidden, is not."""
    names = os.listdir(out) if out.is_dir() else []
    names = [x for x in names if (x in leaves if leaves else x[0] != "." and x != RUN)]
    return any(not (out / x).is_dir() or os.listdir(out / x) for x in names)


# -- what there is so far --------------------------------------------------------------


class State:
    """A file of what a run has so far, saved now and then and when it is stopped.

    Attributes:
      path: the file; None keeps nothing.
      at: how far the run was when it was last saved.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.at = path, 0
        self._saved, self._cost = time.monotonic(), 0.0

    def step(
        self, at: int, write: Callable[[Path], None], report: Callable[[], None]
    ) -> None:
        """Save if it is time to, then report, which may stop the run.

        Args:
          at: how far the run is; nothing is saved twice.
          write: writes the file, whole or not at all.
          report: may raise KeyboardInterrupt, before which everything is saved.
        """
        self.save(at, write)
        try:
            report()
        except KeyboardInterrupt:
            self.save(at, write, now=True)
            raise

    def save(
        self, at: int, write: Callable[[Path], None], *, now: bool = False
    ) -> None:
        """Save if it is time to, or `now`; see `step`."""
        if self.path is None or at == self.at:
            return
        started = time.monotonic()
        wait = max(SAVE_S, self._cost / SAVE_SHARE) if SAVE_S else 0.0
        if now or started - self._saved >= wait:
            write(self.path)
            self.at, self._saved = at, time.monotonic()
            self._cost = self._saved - started

    def remove(self) -> None:
        """Delete the file: the run has come to its end."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


# -- what is finished ------------------------------------------------------------------


def intact_json(file: Path, schema: Schema) -> dict[str, Any] | None:
    """A result that was kept; None if there is none, or a damaged one: make it again.

    Args:
      file: where it was kept.
      schema: what it must be.
    """
    with contextlib.suppress(InputError):
        found = read_json(file, most=MOST_DATA)
        check_json(found, schema, file)
        return found
    return None


class Answers(dict[Any, dict[str, Any]]):
    """Answers by what was asked, each on disk before anybody sees it.

    Args:
      path: a .jsonl file, which may hold answers to other questions too; None keeps
        them in memory only. A line that was half written is passed over.
      schema: of its lines.
      key: of a line; None leaves it out.
    """

    def __init__(
        self,
        path: Path | None,
        schema: Schema,
        key: Callable[[dict[str, Any]], Any] = lambda row: row["key"],
    ) -> None:
        self.path = path
        rows = read_lines(path, schema) if path else []
        super().__init__((key(row), row) for row in rows)

    def add(self, key: Any, row: dict[str, Any]) -> None:
        """Keep an answer."""
        if self.path is not None:
            append_line(self.path, row)
        self[key] = row
