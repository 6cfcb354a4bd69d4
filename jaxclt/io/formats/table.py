"""The formats of dictionaries: how each is recognised, opened and fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxclt.errors import InputError
from jaxclt.io.circuit_tracer_format import OWN_FILE
from jaxclt.io.circuit_tracer_read import (
    CONFIG,
    is_circuit_tracer,
    open_circuit_tracer,
    read_yaml,
)
from jaxclt.io.formats import (
    crosslayer,
    decode_clt,
    llamascopium,
    saelens,
    sparsify,
)
from jaxclt.io.formats.pieces import FileStore
from jaxclt.io.tensors import is_pickle, pickle_message, refuse_pickles
from jaxclt.io.weights_safetensors import read_json

__all__ = ["FORMATS", "LABELS", "Format", "config_files", "open_files", "weight_files"]

LABELS = "labels.json"


class Format(NamedTuple):
    """One tool's layout of a directory."""

    is_here: Callable[[Path], bool]
    open: Callable[[Path], FileStore]


# In the order of asking: what says most of itself first. GemmaScope's and Gemma Scope
# 2's files are named by a config.yaml of circuit-tracer.
FORMATS: dict[str, Format] = {
    "crosslayer-transcoder": Format(
        crosslayer.is_crosslayer, crosslayer.open_crosslayer
    ),
    "circuit-tracer": Format(is_circuit_tracer, open_circuit_tracer),
    "llamascopium": Format(
        llamascopium.is_llamascopium, llamascopium.open_llamascopium
    ),
    "decode-clt": Format(decode_clt.is_decode_clt, decode_clt.open_decode_clt),
    "sparsify": Format(sparsify.is_sparsify, sparsify.open_sparsify),
    "saelens": Format(saelens.is_saelens, saelens.open_saelens),
}


def open_files(path: Path, supplement: Mapping[str, Any] | None = None) -> FileStore:
    """Open a dictionary in any known format without reading its weights.

    Args:
      path: its directory.
      supplement: what its config.yaml should say but does not.

    Raises:
      InputError: if it is in none of them, or damaged.
    """
    if is_pickle(path):
        raise InputError(pickle_message(path))
    if path.is_dir():
        for format in FORMATS.values():
            if not format.is_here(path):
                continue
            if supplement and format.open is open_circuit_tracer:
                return open_circuit_tracer(path, supplement)
            return format.open(path)
    refuse_pickles(path)
    raise InputError(
        f"{path} is not a dictionary: a directory in one of the formats "
        f"{', '.join(FORMATS)} is needed"
    )


def config_files(names: Sequence[str]) -> list[str]:
    """Which of a folder's files describe a dictionary; none if there is no such."""
    for one in (CONFIG, llamascopium.CONFIG):
        if one in names:
            return [x for x in (one, LABELS) if x in names]
    depth = {x: x.count("/") for x in names if Path(x).name == saelens.CONFIG}
    return [x for x, n in depth.items() if n <= 2] + [x for x in names if x == LABELS]


def weight_files(folder: Path, names: Sequence[str]) -> list[str]:
    """Which files the description in a folder asks for, itself included.

    Raises:
      InputError: if the description cannot be read.
    """
    described = config_files(names)
    if CONFIG in described:
        wanted = _of_yaml(read_yaml(folder / CONFIG), names)
    elif llamascopium.CONFIG in described:
        is_one = "sae_type" in read_json(folder / llamascopium.CONFIG)
        wanted = [x for x in llamascopium.WEIGHTS if x in names][:is_one]
    else:
        beside = {f"{Path(x).parent}/" for x in described}
        wanted = [
            f"{start}{name}".removeprefix("./")
            for start in beside
            for name in (saelens.WEIGHTS, sparsify.WEIGHTS, decode_clt.WEIGHTS)
        ]
    return described + [x for x in wanted if x in names]


def _of_yaml(config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    if isinstance(config.get("model"), dict):
        return [crosslayer.WEIGHTS]
    listed = config.get("transcoders")
    if isinstance(listed, list):  # what lies elsewhere is fetched when it is opened
        return [str(x) for x in listed if "://" not in str(x)]
    return [x for x in names if OWN_FILE.fullmatch(x)]
