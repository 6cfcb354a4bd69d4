"""GGUF files, the format of llama.cpp: their header, and slices of their tensors.

The header is parsed here in one pass over the bytes: `gguf.GGUFReader` makes several
numpy objects per vocabulary entry, 5 s for 49 152 tokens where this takes 0.1 s, and
it maps truncated files without complaint. Tensors are dequantised by `gguf`.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from jaxclt.errors import InputError, shown

__all__ = ["GGUFFile", "GGUFTensor", "open_gguf"]

_VERSIONS = (2, 3)
_DEEPEST, _MOST_ITEMS = 8, 1 << 22  # of arrays: the longest are vocabularies
_MOST_AXES = 8
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies in the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # as numpy counts: the last axis is contiguous
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A parsed header and the mapped bytes after it."""

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    data: np.ndarray  # uint8, the whole file

    def get(self, name: str, part: tuple[slice, ...] = (), /) -> np.ndarray:
        """Dequantised tensor, float32, or a slice of each of its axes.

        Raises:
          InputError: if the tensor is missing or its type cannot be dequantised.
        """
        if name not in self.tensors:
            raise InputError(f"{self.path}: tensor {name} is missing from the weights")
        t = self.tensors[name]
        block, n_bytes = GGML_QUANT_SIZES[t.kind]
        whole = tuple(slice(0, n) for n in t.shape)
        *before, last = part or whole
        # Numbers of the last axis come in blocks: those that hold what is wanted.
        first = last.start // block
        blocks = self.data[t.offset : t.offset + t.n_bytes].reshape(
            *t.shape[:-1], -1, n_bytes
        )[(*before, slice(first, -(-last.stop // block)))]
        # gguf works on 16 rows at a time: rows of about 8192 numbers, whatever the
        # tensor's own, keep its temporaries in cache and its Python loop short.
        n_blocks = math.prod(blocks.shape[:-1])
        per_row = math.gcd(max(n_blocks, 1), max(8192 // block, 1))
        rows = np.ascontiguousarray(blocks).reshape(-1, per_row * n_bytes)
        try:
            # The dtype says what plain numbers are, the bytes what blocks are.
            plain = {"F32": "<f4", "F16": "<f2"}.get(t.kind.name)
            rows = rows if plain is None else rows.view(plain)
            w = dequantize(rows, t.kind).astype(np.float32, copy=False)
            w = w.reshape(*blocks.shape[:-2], -1)
            return w[..., last.start - first * block : last.stop - first * block]
        except (NotImplementedError, ValueError) as error:
            raise InputError(
                f"{self.path}: tensor {name} of type {t.kind.name} cannot be "
                "dequantised; use a file of another quantisation"
            ) from error


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Parse the header of a GGUF file and check that all its tensors lie inside it.

    Raises:
      InputError: if the file is missing, no GGUF file, or truncated.
    """
    path = Path(path)
    try:
        data = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is empty; fetch the model again") from error
    if bytes(data[:4]) != b"GGUF":
        raise InputError(f"{path} is not a GGUF file (its first bytes are not 'GGUF')")
    try:
        meta, tensors = _header(data.data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise InputError(
            f"{path} is truncated or damaged (its header ends early or is not GGUF); "
            "fetch the model again"
        ) from error
    for name, t in tensors.items():
        if t.offset + t.n_bytes > data.size:
            raise InputError(
                f"{path} is truncated: tensor {name} ends at byte "
                f"{t.offset + t.n_bytes} of {data.size}; fetch the model again"
            )
    return GGUFFile(path, meta, tensors, data)


def _header(buf: memoryview) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensor table; every read beyond the end raises."""
    version, n_tensors, n_keys = struct.unpack_from("<IQQ", buf, 4)
    if version not in _VERSIONS:
        raise InputError(
            f"GGUF version {version} is not supported; "
            f"supported: {', '.join(map(str, _VERSIONS))} (little endian)"
        )
    at = 24
    meta: dict[str, Any] = {}
    for _ in range(n_keys):
        key, at = _string(buf, at)
        (kind,) = struct.unpack_from("<I", buf, at)
        meta[key], at = _value(buf, at + 4, GGUFValueType(kind))

    found = []
    for _ in range(n_tensors):
        name, at = _string(buf, at)
        (n_dims,) = struct.unpack_from("<I", buf, at)
        if n_dims > _MOST_AXES:
            raise ValueError("a tensor of too many axes")
        *dims, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", buf, at + 4)
        at += 4 + 8 * n_dims + 12
        found.append((name, tuple(reversed(dims)), kind, offset))

    align = meta.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1:
        raise InputError(f"general.alignment {shown(align)} is not a positive integer")
    base = -(-at // align) * align
    tensors = {}
    for name, shape, kind, offset in found:
        kind = GGMLQuantizationType(kind)
        block, n_bytes = GGML_QUANT_SIZES[kind]
        if not shape or name in tensors or shape[-1] % block:
            raise InputError(f"tensor {name} is listed twice or has a bad shape")
        size = math.prod(shape) // block * n_bytes
        tensors[name] = GGUFTensor(kind, shape, base + offset, size)
    return meta, tensors


def _string(buf: memoryview, at: int) -> tuple[str, int]:
    (n,) = struct.unpack_from("<Q", buf, at)
    end = at + 8 + n
    if end > len(buf):
        raise ValueError("string beyond the end")
    return str(buf[at + 8 : end], "utf-8"), end


def _value(
    buf: memoryview, at: int, kind: GGUFValueType, depth: int = 0
) -> tuple[Any, int]:
    if kind == GGUFValueType.STRING:
        return _string(buf, at)
    if kind != GGUFValueType.ARRAY:
        dtype = np.dtype(_SCALARS[kind])
        (value,) = np.frombuffer(buf, dtype, 1, at)
        # The shortest decimal: 1e-5 as the model's author wrote it, not 9.99999975e-6.
        exact = float(str(value)) if dtype == "<f4" else value.item()
        return exact, at + dtype.itemsize
    raw, n = struct.unpack_from("<IQ", buf, at)
    if depth > _DEEPEST or n > _MOST_ITEMS:
        raise ValueError("an array that is too deep or too long")
    item, at = GGUFValueType(raw), at + 12
    if item in _SCALARS:
        dtype = np.dtype(_SCALARS[item])
        end = at + n * dtype.itemsize
        if end > len(buf):
            raise ValueError("array beyond the end")
        return np.frombuffer(buf, dtype, n, at).tolist(), end
    values = []
    for _ in range(n):
        value, at = _value(buf, at, item, depth + 1)
        values.append(value)
    return values, at
