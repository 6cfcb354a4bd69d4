"""Safetensors files read in place: headers parsed, tensors mapped, rows copied out.

The headers are parsed here because numpy, unlike safetensors' own reader, then sees
bfloat16 and touches no page that was not asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxclt.errors import InputError
from jaxclt.io.circuit_tracer_format import PICKLES

__all__ = ["TensorFile", "check_finite", "open_tensors", "pickle_message"]

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype("bfloat16"),
}


class _Tensor(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # from the start of the file


class TensorFile(NamedTuple):
    """A parsed header: where each tensor of a file lies."""

    path: Path
    tensors: Mapping[str, _Tensor]

    def map(self, name: str) -> np.ndarray:
        """Read-only view of a tensor; only the pages that are used get read."""
        t = self.tensors[name]
        return np.memmap(self.path, t.dtype, "r", t.offset, t.shape)

    def read(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """A finite copy of a tensor, or of some of its rows."""
        view = self.map(name)
        out = np.array(view if rows is None else view[rows])
        check_finite(out, f"{self.path}: {name}")
        return out


def check_finite(x: np.ndarray, where: str) -> None:
    """Raise InputError naming `where` if a value is NaN or infinite."""
    # min and max carry NaN and infinity and, unlike isfinite(x), need no mask
    if x.size and not (np.isfinite(x.min()) and np.isfinite(x.max())):
        raise InputError(f"{where} holds NaN or infinity; write the dictionary again")


def open_tensors(path: Path) -> TensorFile:
    """Parse a safetensors header and check it against the file's size."""
    if path.suffix in PICKLES:
        raise InputError(pickle_message(path))
    if not path.is_file():
        raise InputError(f"{path} is missing; copy or fetch the dictionary again")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(
                f"{path} is truncated or not a safetensors file ({size} bytes); "
                "copy or fetch it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise InputError(
                    f"{path}: {name!r} has dtype {entry['dtype']!r}; convert it to "
                    f"one of {', '.join(_DTYPES)}"
                )
        tensors = {k: _tensor(v, 8 + length) for k, v in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} has a broken safetensors header; copy or fetch it again"
        ) from error
    end = max((_end(t) for t in tensors.values()), default=8 + length)
    if end > size:
        raise InputError(
            f"{path} is truncated: {size} bytes of {end}; copy or fetch it again"
        )
    return TensorFile(path, tensors)


def _tensor(entry: Mapping[str, Any], base: int) -> _Tensor:
    begin, end = entry["data_offsets"]
    dtype, shape = _DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
    t = _Tensor(dtype, shape, base + int(begin))
    if min(shape, default=1) < 1 or begin < 0 or _end(t) != base + end:
        raise ValueError(entry)
    return t


def _end(t: _Tensor) -> int:
    return t.offset + math.prod(t.shape) * t.dtype.itemsize


def pickle_message(path: Path) -> str:
    """What to say to somebody who offers a pickle."""
    return f"{path} is a pickle, which is never loaded; convert it to safetensors"
