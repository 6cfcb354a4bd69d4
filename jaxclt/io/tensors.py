"""Safetensors and npz files read in place: headers parsed, tensors mapped.

The headers are parsed here because numpy, unlike safetensors' own reader, then sees
bfloat16 and touches no page that was not asked for; and because numpy's own reader of
npz files copies every member as a whole.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxclt.errors import InputError, shown
from jaxclt.files.npz import DAMAGE, Header, check_claim, read_header

__all__ = ["PICKLES", "TensorFile", "check_finite", "is_pickle", "open_tensors"]
__all__ += ["pickle_message", "refuse_pickles"]

PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".dcp"}

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype("bfloat16"),
}
_NPY_DTYPES = {x.str: x for x in map(np.dtype, ("<f8", "<f4", "<f2"))}
_MOST_HEADER = 100_000_000  # bytes, which safetensors' own reader does not exceed


class _Tensor(NamedTuple):
    dtype: np.dtype  # opaque bytes where we do not read it
    shape: tuple[int, ...]
    offset: int  # from the start of the file, or of the inflated member
    member: str | None = None  # of an archive, where it cannot be mapped
    fortran: bool = False  # the first axis is the fastest
    other: str = ""  # the name of a type that we do not read

    @property
    def size(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(NamedTuple):
    """A parsed header: where each tensor of a file lies."""

    path: Path
    tensors: Mapping[str, _Tensor]

    def map(self, name: str) -> np.ndarray:
        """Read-only view of a tensor; only the pages that are used get read.

        A member of an archive that is compressed is read as a whole.
        """
        t = self.tensors[name]
        order = "F" if t.fortran else "C"
        if t.member is None:
            return np.memmap(self.path, t.dtype, "r", t.offset, t.shape, order)
        with _blame(self.path), zipfile.ZipFile(self.path) as archive:
            raw = archive.read(t.member)
        if len(raw) != t.offset + t.size:
            raise InputError(f"{self.path}: {name} is damaged; copy or fetch it again")
        return np.frombuffer(raw, t.dtype, offset=t.offset).reshape(
            t.shape, order=order
        )

    def read(self, name: str) -> np.ndarray:
        """A finite copy of a tensor."""
        out = np.array(self.map(name))
        check_finite(out, f"{self.path}: {name}")
        return out


def check_finite(x: np.ndarray, where: str) -> None:
    """Raise InputError naming `where` if a value is NaN or infinite."""
    # min and max carry NaN and infinity and, unlike isfinite(x), need no mask
    if x.size and not (np.isfinite(x.min()) and np.isfinite(x.max())):
        raise InputError(f"{where} holds NaN or infinity; write the dictionary again")


def open_tensors(path: Path, *, others: bool = False) -> TensorFile:
    """Parse the header of a safetensors or npz file and check it against the size.

    Args:
      path: the file.
      others: a safetensors file may hold other types too, which are not to be read.

    Raises:
      InputError: if the file is missing, truncated, damaged, a pickle, or holds
        anything but floating point numbers.
    """
    if is_pickle(path):
        raise InputError(pickle_message(path))
    if not os.path.isfile(path):  # which knows no impossible names
        refuse_pickles(path.parent)
        raise InputError(f"{path} is missing; copy or fetch the dictionary again")
    return _open_npz(path) if path.suffix == ".npz" else _open_flat(path, others)


def _open_flat(path: Path, others: bool) -> TensorFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise InputError(
                f"{path} is truncated or not a safetensors file ({size} bytes); "
                "copy or fetch it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES and not others:
                raise InputError(
                    f"{path}: {shown(name)} has dtype {shown(entry['dtype'])}; convert "
                    f"it to one of {', '.join(_DTYPES)}"
                )
        tensors = {k: _tensor(v, 8 + length) for k, v in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} has a broken safetensors header; copy or fetch it again"
        ) from error
    end = _tiled(path, tensors.values(), 8 + length)
    if end > size:
        raise InputError(
            f"{path} is truncated: {size} bytes of {end}; copy or fetch it again"
        )
    if end < size:
        raise InputError(
            f"{path} holds {size - end} bytes that its header does not name; copy or "
            "fetch it again"
        )
    return TensorFile(path, tensors)


def _tensor(entry: Mapping[str, Any], base: int) -> _Tensor:
    begin, end = map(_whole, entry["data_offsets"])
    kind, shape = entry["dtype"], tuple(map(_whole, entry["shape"]))
    t = _Tensor(_DTYPES["F32"], shape, base + begin)
    if kind in _DTYPES:
        t = t._replace(dtype=_DTYPES[kind])
    else:
        size = (end - begin) // max(math.prod(shape), 1)
        t = t._replace(dtype=np.dtype((np.void, max(size, 1))), other=shown(kind))
    if min(t.shape, default=1) < 1 or begin + t.size != end:
        raise ValueError(entry)
    return t


def _whole(x: Any) -> int:
    # 2.9 and "2" are not sizes, and True is not 1
    if type(x) is not int or not 0 <= x < 1 << 60:
        raise ValueError(x)
    return x


def _tiled(path: Path, tensors: Iterable[_Tensor], start: int) -> int:
    """Where the last tensor ends; tensors may leave no gap and may not overlap."""
    for t in sorted(tensors, key=lambda t: t.offset):
        if t.offset != start:
            raise InputError(
                f"{path} has a broken safetensors header (tensors overlap or leave "
                "gaps); copy or fetch it again"
            )
        start += t.size
    return start


def _open_npz(path: Path) -> TensorFile:
    with _blame(path), zipfile.ZipFile(path) as archive, path.open("rb") as file:
        tensors, size = {}, path.stat().st_size
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename or name in tensors:
                raise InputError(
                    f"{path}: {shown(info.filename)} is not an array; give a file that "
                    "numpy.savez wrote"
                )
            with archive.open(info) as member:
                header = read_header(member)
            t = _npy_tensor(path, name, header)
            check_claim(info, header, t.dtype.itemsize, size)
            if info.compress_type == zipfile.ZIP_STORED:
                begin = _data_of(file, info)
                if begin + info.file_size > size:
                    raise ValueError(info)
                t = t._replace(offset=begin + t.offset)
            else:
                t = t._replace(member=info.filename)
            tensors[name] = t
    return TensorFile(path, tensors)


def _npy_tensor(path: Path, name: str, header: Header) -> _Tensor:
    if header.dtype not in _NPY_DTYPES:
        raise InputError(
            f"{path}: {shown(name)} has dtype {shown(header.dtype)}; convert it to one "
            f"of {', '.join(_NPY_DTYPES)}"
        )
    if min(header.shape, default=1) < 1:
        raise ValueError(header)
    dtype = _NPY_DTYPES[header.dtype]
    return _Tensor(dtype, header.shape, header.start, fortran=header.fortran)


def _data_of(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member that is stored as it is begin."""
    file.seek(info.header_offset)
    local = file.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise ValueError(info)
    name, extra = struct.unpack("<HH", local[26:30])
    return info.header_offset + 30 + name + extra


@contextlib.contextmanager
def _blame(path: Path) -> Iterator[None]:
    """Turn whatever zipfile raises on damaged archives into one line."""
    try:
        yield
    except DAMAGE as error:
        raise InputError(
            f"{path} is truncated or not an npz file; copy or fetch it again"
        ) from error


def is_pickle(path: Path) -> bool:
    """Whether a file's name says that it is a pickle."""
    return path.suffix in PICKLES


def pickle_message(path: Path) -> str:
    """What to say to somebody who offers a pickle."""
    return f"{path} is a pickle, which is never loaded; convert it to safetensors"


def refuse_pickles(path: Path) -> None:
    """Say so if pickles are what a file or a directory offers in place of safetensors.

    Raises:
      InputError: naming the pickle.
    """
    # no deeper than formats go: the directory may be anybody's home
    inside = sorted((*path.glob("*"), *path.glob("*/*"))) if os.path.isdir(path) else []
    for file in (path, *inside):
        if is_pickle(file):
            raise InputError(pickle_message(file))
