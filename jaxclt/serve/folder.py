"""What the server hands out from a folder: graphs, and the feature files beside them.

Nothing else is, whatever its name: no hidden file or folder, nothing that links lead to
outside, no JSON that is not a graph. The list is kept: a file is read again only when
its time or size has changed.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxclt.dashboards.files import INDEX, FeatureFiles, uncantor
from jaxclt.serve.told import Kept, picture_of, said, told_by

__all__ = ["Folder", "NotServedError", "describe"]

GRAPH = "graph.json"
FEATURES = ("features", "examples")  # folders of feature files, first come
_HEAD, _LONG = 1 << 16, 1 << 24  # bytes in which metadata end, most and all
_LONGEST = 300  # characters of a prompt in the list
REPORT = "report.json"
_NUMBERS = 10**20  # a file's name has an end
_OBJECT = re.compile(rb"(?:\xef\xbb\xbf)?\s*\{\s*")
_FIRST = re.compile(_OBJECT.pattern + rb'"metadata"\s*:\s*')
_METADATA = re.compile(rb'"metadata"\s*:\s*(?=\{)')
_LISTS = [re.compile(rb'"%s"\s*:\s*\[' % name) for name in (b"nodes", b"links")]

Entry = dict[str, Any]  # slug and prompt, or what is wrong as error


class NotServedError(Exception):
    """A name that stands for nothing that is handed out."""


class Folder:
    """A folder of graphs.

    Args:
      root: what it is.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._known: dict[Path, tuple[tuple[int, int], Entry | None]] = {}
        self._scanning = threading.Lock()
        self._reports, self._pictures = Kept(told_by), Kept(picture_of)

    def graphs(self) -> list[Entry]:
        """Every graph: its ``path`` as addresses name it, ``slug`` and ``prompt``.

        Also when it was ``changed`` (seconds since 1970), and as far as its report
        says: ``model``, ``dictionary``, ``answer`` with ``probability``,
        ``replacement`` and ``completeness``. What should be a graph and cannot be read
        has ``path`` and ``error`` instead.
        """
        with self._scanning:
            found, known = [], {}
            for path, wrong in self._candidates():
                entry = wrong or self._entry(path)
                if path in self._known:
                    known[path] = self._known[path]
                if entry is not None:
                    more = {} if "error" in entry else self._told(path, entry)
                    found.append({"path": said(self._name(path)), **more, **entry})
            self._known = known
        return sorted(found, key=lambda entry: entry["path"])

    def graph(self, name: str) -> Path:
        """The file of the graph that an address names.

        Raises:
          NotServedError: if there is none.
        """
        file = self.inside(self.root / name.strip("/"))
        if os.path.isdir(file):
            file = self.inside(file / GRAPH)
        here = file.suffix == ".json" and os.path.isfile(file)
        if not here or self._entry(file) is None:
            raise NotServedError("no such graph")
        return file

    def picture(self, name: str) -> str:
        """The nodes of a graph by layer and position, as a small SVG.

        Raises:
          NotServedError: if there is no such graph, or it has no nodes.
        """
        try:
            found = self._pictures.of(self.graph(name))
        except OSError:
            found = ""
        if not found:
            raise NotServedError("no such picture")
        return found

    def feature(self, name: str, number: int) -> dict[str, Any]:
        """The record of a feature, by the number that feature files have.

        Raises:
          NotServedError: if there is none.
          InputError: if its file is damaged.
        """
        traced = self.graph(name).parent
        there = [x for x in FEATURES if (traced / x).is_dir()] or FEATURES
        files = FeatureFiles(self.inside(traced / there[0]))
        if number >= _NUMBERS:
            raise NotServedError("no such feature")
        place = uncantor(number)
        self.inside(files.folder / INDEX)  # links may lead elsewhere
        for file in files.paths(*place):
            self.inside(file)
        record = files.record(*place)
        if record is None:
            raise NotServedError("no such feature")
        return record

    def inside(self, path: Path) -> Path:
        """A path without links.

        Raises:
          NotServedError: if it leads out of the folder, or to something hidden.
        """
        try:
            resolved = path.resolve()
            parts = resolved.relative_to(self.root).parts
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a loop
            raise NotServedError("no such graph") from error
        if any(part.startswith(".") for part in parts):
            raise NotServedError("no such graph")
        return resolved

    def _candidates(self) -> Iterator[tuple[Path, Entry | None]]:
        """Files that may be graphs, and folders that cannot be looked into."""
        folders = [self.root]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    seen = [e for e in entries if not e.name.startswith(".")]
            except OSError as error:
                yield folder, {"error": f"cannot be read: {error.strerror}"}
                continue
            whole = os.path.isfile(folder / GRAPH)
            for entry in seen:
                if entry.is_dir(follow_symlinks=False):
                    if not (whole and entry.name in FEATURES):
                        folders.append(folder / entry.name)
                elif entry.name == GRAPH if whole else entry.name.endswith(".json"):
                    yield folder / entry.name, None

    def _told(self, path: Path, entry: Entry) -> Entry:
        """What the report of a graph says, if it is of this prompt, and the date."""
        try:
            report = self.inside(path.parent / REPORT) if path.name == GRAPH else None
            told = self._reports.of(report) if report else {}
        except (NotServedError, OSError):
            report, told = None, {}
        if told.get("prompt") != entry["prompt"]:
            report, told = None, {}
        try:
            return {**told, "changed": (report or path).stat().st_mtime}
        except OSError:  # it has just gone
            return {**told, "changed": 0.0}

    def _name(self, path: Path) -> str:
        place = path
        if path.name == GRAPH and path.parent != self.root:
            place = path.parent
        return place.relative_to(self.root).as_posix()

    def _entry(self, path: Path) -> Entry | None:
        """What a file is, None if no graph; read only if it has changed."""
        try:
            state = path.stat()
            if not stat.S_ISREG(state.st_mode):
                return None
            stamp = (state.st_mtime_ns, state.st_size)
            kept = self._known.get(path)
            if kept is None or kept[0] != stamp:
                self.inside(path)
                kept = self._known[path] = (stamp, describe(path))
        except NotServedError:
            return None
        except OSError as error:
            return {"error": f"cannot be read: {error.strerror}"}
        entry, name = kept[1], self._name(path)
        if entry is not None and (said(name) != name or "\n" in name):
            return {"error": "no address can hold its name: rename it"}
        return entry


def describe(file: Path) -> Entry | None:
    """Slug and prompt of a graph file, what is wrong with it, or None for other JSON.

    It is not parsed, but for its metadata: graphs may be large.

    Raises:
      OSError: if it cannot be read.
    """
    with file.open("rb") as stream:
        start = _metadata_at(stream)
        if start is None:
            return {"error": "it is not a graph"} if file.name == GRAPH else None
        stream.seek(-min(64, stream.seek(0, os.SEEK_END)), os.SEEK_END)
        if not stream.read().rstrip().endswith(b"}"):
            return {"error": "it is cut off"}
        for many in (_HEAD, _LONG):
            stream.seek(start)
            try:
                text = stream.read(many).decode(errors="replace")
                return _told(file, json.JSONDecoder().raw_decode(text)[0])
            except (ValueError, RecursionError):
                continue  # longer than what was read, perhaps
    return {"error": "its metadata is not JSON"}


def _metadata_at(stream: BinaryIO) -> int | None:
    """Where the metadata of a graph begin; None if it is not a graph.

    At its start, or anywhere in files whose keys are in another order.
    """
    head = stream.read(_HEAD)
    if first := _FIRST.match(head):
        return first.end()
    if not _OBJECT.match(head):
        return None
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        there = _METADATA.search(text)
        lists = all(found.search(text) for found in _LISTS)
        return there.end() if there and lists else None


def _told(file: Path, meta: Any) -> Entry:
    if not isinstance(meta, dict):
        return {"error": "its metadata is not an object"}
    slug, prompt = meta.get("slug"), meta.get("prompt")
    return {
        "slug": said(slug if isinstance(slug, str) else file.stem)[:_LONGEST],
        "prompt": said(prompt if isinstance(prompt, str) else "")[:_LONGEST],
    }
