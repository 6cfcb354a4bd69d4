"""Feature files in the packed form that circuit-tracer's viewer reads.

    features/index.json.gz   {"0": {"filename": "layer_0.bin", "offsets": [...]}, ...}
    features/layer_0.bin     record after record, feature by feature

A record is a little-endian uint32, its length, and that many bytes of gzip: a JSON
document. Feature f of a layer lies at ``offsets[f]`` to ``offsets[f + 1]``, equal where
it has no record. `FeatureFiles` reads this form and loose ``{number}.json``.
"""

from __future__ import annotations

import functools
import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxclt.errors import InputError, shown
from jaxclt.files.atomic import atomic_path
from jaxclt.files.json_file import MOST, parse_object, read_bounded, read_json
from jaxclt.files.json_text import to_json

__all__ = [
    "INDEX",
    "FeatureFiles",
    "cantor",
    "layer_file",
    "pack",
    "read_offsets",
    "uncantor",
    "write_index",
    "write_layer",
]

INDEX = "index.json.gz"
_LENGTH = struct.Struct("<I")
_MOST_INDEX = 1 << 27  # bytes, unpacked: about ten million features


def cantor(layer: int, feature: int) -> int:
    """The number that stands for a layer and a feature in file names."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def uncantor(number: int) -> tuple[int, int]:
    """Layer and feature of a number."""
    both = (math.isqrt(8 * number + 1) - 1) // 2
    feature = number - both * (both + 1) // 2
    return both - feature, feature


def layer_file(layer: int) -> str:
    """The name of a layer's file."""
    return f"layer_{layer}.bin"


def pack(document: bytes) -> bytes:
    """A record of a JSON document, the same bytes for the same document."""
    packed = gzip.compress(document, compresslevel=4, mtime=0)
    return _LENGTH.pack(len(packed)) + packed


def write_layer(folder: Path, layer: int, records: Iterable[bytes]) -> None:
    """Write the records of a layer, in the order of its features.

    Raises:
      InputError: if the folder cannot be written.
    """
    path = folder / layer_file(layer)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.writelines(records)


def read_offsets(path: Path) -> list[int]:
    """Where the records of a layer's file start, and its end.

    Raises:
      InputError: if the file is cut off.
    """
    end, offsets = path.stat().st_size, [0]
    with path.open("rb") as stream:
        while offsets[-1] < end:
            stream.seek(offsets[-1])
            head = stream.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                break
            offsets.append(offsets[-1] + _LENGTH.size + _LENGTH.unpack(head)[0])
    if offsets[-1] != end:
        raise InputError(f"{path} is damaged: remove it, and it is written again")
    return offsets


def write_index(folder: Path, offsets: dict[int, list[int]]) -> None:
    """Write where the records of each layer lie; the files are done then.

    Args:
      folder: of the layers' files.
      offsets: of each layer, F + 1 numbers.

    Raises:
      InputError: if the folder cannot be written.
    """
    index = {
        str(layer): {"filename": layer_file(layer), "offsets": numbers}
        for layer, numbers in offsets.items()
    }
    text = to_json(index, separators=(",", ":")).encode()
    with atomic_path(folder / INDEX) as temporary:
        temporary.write_bytes(gzip.compress(text, mtime=0))


class FeatureFiles:
    """Feature records in a folder: packed, or loose, or both (the latter first).

    `directory` is the folder of the files, or one with such a folder ``features``.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        folder = Path(directory)
        inner = folder / "features"
        packed = (folder / INDEX).is_file()
        self.folder = inner if not packed and (inner / INDEX).is_file() else folder

    def paths(self, layer: int, feature: int) -> list[Path]:
        """The existing files that a record is read from, in the order tried."""
        loose = self.folder / f"{cantor(layer, feature)}.json"
        index = self.folder / INDEX
        found = [loose]
        if index.is_file():
            found = [loose, index]
            place = _place(index, layer, feature)
            if place is not None:
                found.append(self.folder / place[0])
        return [path for path in found if path.is_file()]

    def record(self, layer: int, feature: int) -> dict[str, Any] | None:
        """The document of a feature, or None if it has none.

        Raises:
          InputError: if a file is damaged.
        """
        loose = self.folder / f"{cantor(layer, feature)}.json"
        if loose.is_file():
            return read_json(loose)
        index = self.folder / INDEX
        place = _place(index, layer, feature) if index.is_file() else None
        if place is None:
            return None
        name, start, end = place
        path = self.folder / name
        try:
            with path.open("rb") as stream:
                stream.seek(start)
                raw = stream.read(min(end - start, MOST))
            (length,) = _LENGTH.unpack_from(raw)
            packed = raw[_LENGTH.size : _LENGTH.size + length]
            body = _inflated(packed, MOST)
        except (OSError, zlib.error, struct.error) as error:
            raise InputError(
                f"{path}: the record of feature {layer}:{feature} cannot be read "
                f"({error})"
            ) from error
        return parse_object(body, path)


def _inflated(packed: bytes, most: int) -> bytes:
    """What gzip packed, unless that is more; zlib.error if it is damaged."""
    inflate = zlib.decompressobj(wbits=31)  # with gzip's header and checksum
    found = inflate.decompress(packed, most + 1)
    if len(found) > most:
        raise zlib.error(f"more than {most / 1e6:.0f} MB are packed in it")
    if not inflate.eof or inflate.unused_data:
        raise zlib.error("it ends early, or goes on")
    return found


def _place(index: Path, layer: int, feature: int) -> tuple[str, int, int] | None:
    """File and range of a record."""
    found = _index(index, index.stat().st_mtime_ns)
    entry = found.get(str(layer))
    if entry is None:
        return None
    name, offsets = entry
    if not 0 <= feature < len(offsets) - 1:
        return None
    start, end = offsets[feature : feature + 2].tolist()
    return (name, start, end) if start < end else None


@functools.lru_cache(maxsize=4)
def _index(path: Path, changed: int) -> dict[str, tuple[str, np.ndarray]]:
    """An index, read again when it has changed.

    Raises:
      InputError: if it is something else.
    """
    del changed
    wrong = f"{path} is not an index of feature files"
    try:
        text = _inflated(read_bounded(path, _MOST_INDEX), _MOST_INDEX)
    except zlib.error as error:
        raise InputError(f"{wrong} ({error})") from error
    found = {}
    for layer, entry in parse_object(text, path).items():
        try:
            name, offsets = entry["filename"], np.array(entry["offsets"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{wrong} (layer {shown(layer)})") from error
        # A file beside the index and nothing else, whoever wrote the index.
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
            raise InputError(f"{path} names a file outside its folder: {shown(name)}")
        if offsets.ndim != 1 or offsets.dtype.kind != "i" or (offsets < 0).any():
            raise InputError(f"{wrong} (the offsets of layer {shown(layer)})")
        found[layer] = name, offsets
    return found
