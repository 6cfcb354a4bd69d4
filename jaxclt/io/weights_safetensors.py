"""The safetensors of a model's directory in the Hugging Face layout.

Either one `model.safetensors`, or shards with `model.safetensors.index.json`. Of a
tensor only the slices that are asked for are read. Pickled weights are never opened.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from jaxclt.errors import InputError, shown
from jaxclt.files.json_file import read_json
from jaxclt.io.tensors import TensorFile, open_tensors, refuse_pickles

__all__ = ["locate_tensors", "read_part"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def locate_tensors(directory: Path) -> dict[str, TensorFile]:
    """The file that each tensor of a directory lies in; reads no data yet.

    Raises:
      InputError: when there are only pickled weights or none, or when a file is
        truncated, damaged or missing.
    """
    if (directory / _SINGLE).is_file():
        file = open_tensors(directory / _SINGLE, others=True)
        return dict.fromkeys(file.tensors, file)
    if not (directory / _INDEX).is_file():
        refuse_pickles(directory)
        raise InputError(f"{directory} holds no {_SINGLE} and no {_INDEX}")
    wanted, where = _read_index(directory / _INDEX), {}
    for shard in sorted(set(wanted.values())):
        path = directory / shard
        if not os.path.isfile(path):  # which knows no impossible names
            raise InputError(f"shard {path} is missing; fetch the model again")
        file = open_tensors(path, others=True)
        listed = {name for name, place in wanted.items() if place == shard}
        for name in sorted(listed - set(file.tensors)):
            raise InputError(
                f"{path}: tensor {name} is missing although {_INDEX} lists it; "
                "fetch the model again"
            )
        where |= dict.fromkeys(listed, file)
    return where


def read_part(file: TensorFile, name: str, part: tuple[slice, ...]) -> np.ndarray:
    """A slice of each axis of a tensor, float32.

    Raises:
      InputError: for a tensor that is not of a floating point type, or unreadable.
    """
    if file.tensors[name].other:
        raise InputError(
            f"{file.path}: cannot read tensor {name} (its type is "
            f"{file.tensors[name].other.strip(chr(39))}, not floating point)"
        )
    try:
        return np.asarray(file.map(name)[part]).astype(np.float32, copy=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{file.path}: cannot read tensor {name} ({error})") from error


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
