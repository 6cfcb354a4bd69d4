"""Open the safetensors weights of a directory in the Hugging Face layout.

Either one `model.safetensors`, or shards with `model.safetensors.index.json`. Of a
tensor only the slices that are asked for are read. Pickled weights are never opened.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxclt.errors import InputError, shown
from jaxclt.files.json_file import read_json
from jaxclt.io.read_params import GetPart

__all__ = ["Weights", "open_weights"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_FLOATS = ("F64", "F32", "F16", "BF16")


class Weights(NamedTuple):
    """Named tensors of a model on disk."""

    shapes: dict[str, tuple[int, ...]]
    get: GetPart
    files: tuple[Path, ...]


def open_weights(directory: Path) -> Weights:
    """Open all weight files of `directory` and list their tensors; reads no data yet.

    Raises:
      InputError: when there are only pickled weights or none, or when a file is
        truncated, damaged or missing. `get` raises it for a missing tensor or one that
        is not of a floating point type.
    """
    if (directory / _SINGLE).is_file():
        files = (directory / _SINGLE,)
        wanted = None
    elif (directory / _INDEX).is_file():
        wanted = _read_index(directory / _INDEX)
        files = tuple(directory / name for name in sorted(set(wanted.values())))
    else:
        raise InputError(_nothing_to_open(directory))

    where = _locate(files, wanted)

    def get(name: str, part: tuple[slice, ...], /) -> np.ndarray:
        if name not in where:
            raise InputError(f"{directory}: tensor {name} is missing from the weights")
        try:
            return _read(where[name], name, part)
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{directory}: cannot read tensor {name} ({_line(error)})"
            ) from error

    shapes = {n: tuple(f.get_slice(n).get_shape()) for n, f in where.items()}
    return Weights(shapes, get, files)


def _locate(files: Sequence[Path], wanted: dict[str, str] | None) -> dict[str, Any]:
    """Tensor name -> open file; `wanted` is the index of shards, if there is one."""
    where = {}
    for file in files:
        handle = _open(file)
        names = set(handle.keys())
        listed = {n for n, shard in (wanted or {}).items() if shard == file.name}
        for name in sorted(listed - names):
            raise InputError(
                f"{file}: tensor {name} is missing although {_INDEX} lists it; "
                "fetch the model again"
            )
        where |= dict.fromkeys(names if wanted is None else listed, handle)
    return where


def _read(handle: Any, name: str, part: tuple[slice, ...]) -> np.ndarray:
    tensor = handle.get_slice(name)
    kind = tensor.get_dtype()
    if kind not in _FLOATS:
        raise TypeError(f"its type is {kind}, supported: {', '.join(_FLOATS)}")
    return np.asarray(tensor[part]).astype(np.float32, copy=False)


def _read_index(path: Path) -> dict[str, str]:
    wanted = read_json(path).get("weight_map")
    if not isinstance(wanted, dict) or not wanted:
        raise InputError(f"{path} has no weight_map; fetch the model again")
    for shard in wanted.values():
        # A shard lies beside its index: an index must not reach elsewhere.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(
                f"{path} names a shard outside its directory: {shown(shard)}"
            )
    return wanted


def _open(path: Path) -> Any:
    if not os.path.isfile(path):  # which knows no impossible names
        raise InputError(f"shard {path} is missing; fetch the model again")
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is truncated or no safetensors file ({_line(error)}); "
            "fetch the model again"
        ) from error


def _nothing_to_open(directory: Path) -> str:
    pickled = sorted(p.name for glob in _PICKLED for p in directory.glob(glob))
    if pickled:
        return (
            f"{directory} holds only pickled weights ({pickled[0]}), which are never "
            "opened: convert them to safetensors"
        )
    return f"{directory} holds no {_SINGLE} and no {_INDEX}"


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
