"""npz files whose headers are checked before anything is allocated.

numpy's own reader believes what a header says: an array of 3.6 TiB in a file of a
kilobyte, indices that are text. Here headers are compared with the size of the file and
with a table of what an array must be.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jaxclt.errors import InputError, shown
from jaxclt.files.atomic import atomic_path
from jaxclt.files.json_file import Schema, check_json, parse_json

__all__ = [
    "DAMAGE",
    "Header",
    "Must",
    "Npz",
    "check_array",
    "check_claim",
    "check_order",
    "open_npz",
    "read_header",
    "write_npz",
]  # fmt: skip

# What zipfile and the checks below raise on a damaged archive.
DAMAGE = (
    *(zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError),
    *(OSError, OverflowError, IndexError, KeyError, zlib.error, struct.error),
)
_HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>[^']{1,16})', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>[0-9, ]*)\), *\} *\n"
)
_DTYPES = {
    "float": ("<f8", "<f4"),
    "half": ("<f8", "<f4", "<f2"),
    "int": ("<i8", "<i4"),
    "short": ("<i8", "<i4", "<i2"),
    "bool": ("|b1",),
}
_SAID = {"float": "floating-point numbers", "half": "floating-point numbers"}
_SAID |= {"int": "whole numbers", "short": "whole numbers", "bool": "truth values"}
# No deflated byte stands for more: a header that claims so is damaged, or a bomb.
_MOST_DEFLATED = 1032
_MOST_INFLATED = 1 << 28  # bytes of an array that the file itself does not hold
_LARGEST = 1e30  # sums of such numbers are still numbers in float32
_CHUNK = 1 << 18


class Must(NamedTuple):
    """What an array of a file must be.

    Attributes:
      kind: a key of `_DTYPES`.
      dims: a letter for each axis; axes of the same letter have the same length.
      least: smallest value.
      below: values are below this number, or below the length of this letter's axes.
      finite: no value may be NaN, infinite or near it.
    """

    kind: str
    dims: str
    least: float | None = None
    below: float | str | None = None
    finite: bool = True


class Header(NamedTuple):
    """What the header of an array says."""

    dtype: str
    shape: tuple[int, ...]
    fortran: bool
    start: int  # bytes of the header itself

    @property
    def size(self) -> int:
        """Numbers in the array."""
        return math.prod(self.shape)


def read_header(stream: IO[bytes]) -> Header:
    """Read the header of an npy array; ValueError if it is none."""
    start = stream.read(8)
    width = {b"\x01\x00": 2, b"\x02\x00": 4, b"\x03\x00": 4}.get(start[6:], 0)
    length = int.from_bytes(stream.read(width), "little")
    if start[:6] != b"\x93NUMPY" or not 0 < length < 1 << 12:
        raise ValueError("a part of it is not an array")
    found = _HEADER.fullmatch(stream.read(length))
    if found is None:
        raise ValueError("an array has a header that numpy does not write")
    shape = tuple(int(x) for x in found["shape"].split(b",") if x.strip())
    if any(n >= 1 << 60 for n in shape):
        raise ValueError("an array has an impossible shape")
    dtype = found["dtype"].decode("ascii")
    return Header(dtype, shape, found["fortran"] == b"True", 8 + width + length)


def check_claim(
    info: zipfile.ZipInfo, header: Header, itemsize: int, file_size: int
) -> None:
    """ValueError if an array is not as long as its header says, or cannot be.

    Args:
      info: what the archive says of it.
      header: what it says itself.
      itemsize: bytes of a number.
      file_size: bytes of the archive.
    """
    if header.start + header.size * itemsize != info.file_size:
        raise ValueError(f"{info.filename} is not as long as its header says")
    most = info.compress_size
    if info.compress_type != zipfile.ZIP_STORED:
        most = _MOST_DEFLATED * most + 64
    if info.header_offset + info.compress_size > file_size or info.file_size > most:
        raise ValueError(f"{info.filename} claims more than the file holds")


class Npz:
    """An open archive of arrays; what is wrong raises one of `DAMAGE`."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self.archive, self.size = archive, size

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self.archive.NameToInfo

    def header(self, name: str) -> Header:
        """The header of an array, compared with nothing."""
        with self._open(name) as (_, header, _):
            return header

    def array(self, name: str, must: Must, sizes: dict[str, int]) -> np.ndarray:
        """An array, checked.

        Args:
          name: of the array.
          must: what it must be.
          sizes: lengths of axes by letter; those of new letters are added.
        """
        check_header(name, self.header(name), must, sizes)
        x = self._read(name)
        check_array(name, x, must, sizes)
        return x

    def fill(self, name: str, out: np.ndarray) -> None:
        """Read an array into one of exactly the same type and shape."""
        header = self.header(name)
        if (header.dtype, header.shape) != (out.dtype.str, out.shape):
            raise ValueError(f"{name} has another type or shape")
        out[...] = self._read(name)

    def text(self, name: str) -> str:
        """A text that is kept as an array of one string."""
        header = self.header(name)
        if header.shape or not re.fullmatch(r"<U[1-9]\d{0,9}", header.dtype):
            raise ValueError(f"{name} is not text")
        return str(self._read(name))

    def json(self, name: str, schema: Schema) -> Any:
        """The value of a JSON text that is kept so.

        Raises:
          InputError: if it is none, or has other types than the schema.
        """
        where = f"{self.archive.filename}: {name}"
        value = parse_json(self.text(name), where)
        check_json(value, schema, where)
        return value

    @contextlib.contextmanager
    def stream(
        self, name: str, must: Must, sizes: dict[str, int]
    ) -> Iterator[tuple[IO[bytes], Header]]:
        """The numbers of an array as they are stored, its header checked."""
        with self._open(name) as (stream, header, info):
            check_header(name, header, must, sizes)
            check_claim(info, header, np.dtype(header.dtype).itemsize, self.size)
            yield stream, header

    def _read(self, name: str) -> np.ndarray:
        """An array of a known type, if the file's size bears out its header."""
        with self._open(name) as (stream, header, info):
            dtype = np.dtype(header.dtype)
            check_claim(info, header, dtype.itemsize, self.size)
            size, packed = header.size * dtype.itemsize, info.compress_size
            if size > max(packed, _MOST_INFLATED):
                raise ValueError(f"{name} is packed and larger than is unpacked")
            raw = np.empty(size, np.uint8)
            at = 0
            while part := stream.read(_CHUNK):  # to the end, where the sum is checked
                raw.data[at : at + len(part)] = part
                at += len(part)
            if at != size:
                raise ValueError(f"{name} ends early")
        order = "F" if header.fortran else "C"
        return raw.view(dtype).reshape(header.shape, order=order)

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[tuple[IO[bytes], Header, zipfile.ZipInfo]]:
        if name not in self:
            raise ValueError(f"it has no {name}")
        info = self.archive.getinfo(f"{name}.npy")
        with self.archive.open(info) as stream:
            yield stream, read_header(stream), info


def check_header(name: str, header: Header, must: Must, sizes: dict[str, int]) -> None:
    """Compare type and shape; ValueError if they differ."""
    if header.dtype not in _DTYPES[must.kind]:
        raise ValueError(f"{name} holds no {_SAID[must.kind]}")
    wanted = tuple(sizes.get(letter) for letter in must.dims)
    same = len(wanted) == len(header.shape) and all(
        n in (None, found) for n, found in zip(wanted, header.shape, strict=True)
    )
    if not same:
        want = ", ".join("any" if n is None else str(n) for n in wanted)
        raise ValueError(f"{name} has shape {shown(header.shape)}, not ({want})")
    for letter, n in zip(must.dims, header.shape, strict=True):
        if sizes.setdefault(letter, n) != n:
            raise ValueError(f"{name} has shape {shown(header.shape)}, not a square")


def check_array(name: str, x: np.ndarray, must: Must, sizes: Mapping[str, int]) -> None:
    """Compare values; ValueError if one is out of range, or not finite."""
    if not x.size or x.dtype.kind == "b":
        return
    low, high = x.min().item(), x.max().item()  # which carry NaN and infinity
    if must.finite and not (low >= -_LARGEST and high <= _LARGEST):
        raise ValueError(f"{name} holds NaN, infinity or a number beyond {_LARGEST:g}")
    below = sizes[must.below] if isinstance(must.below, str) else must.below
    if must.least is not None and low < must.least:
        raise ValueError(f"{name} holds {low}, below {must.least}")
    if below is not None and high >= below:
        raise ValueError(f"{name} holds {high}, not below {below}")


def check_order(*keys: np.ndarray) -> None:
    """ValueError unless rows ascend by some columns, of which the first counts most."""
    rises = np.zeros(max(len(keys[0]) - 1, 0), bool)
    for key in reversed(keys):
        step = np.diff(key)
        rises = (step > 0) | ((step == 0) & rises)
    if not rises.all():
        raise ValueError("its features are not in order")


@contextlib.contextmanager
def open_npz(path: Path, wrong: str, do: str) -> Iterator[Npz]:
    """An npz file; whatever is wrong with it in the body becomes one line.

    Args:
      path: the file.
      wrong: what to say of a damaged one: "is not a complete graph".
      do: what to do about it.

    Raises:
      InputError: if it is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield Npz(archive, path.stat().st_size)
    except DAMAGE as error:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{path} {wrong} ({said}): {do}") from error


def write_npz(path: str | os.PathLike[str], **arrays: Any) -> None:
    """Write an npz file, whole or not at all; a text is kept as an array of one.

    Raises:
      InputError: if it cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
