"""The formats of dictionaries: how each is recognised, opened and fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxclt.errors import InputError
from jaxclt.files.yaml_file import read_yaml
from jaxclt.io.formats import (
    circuit_tracer,
    crosslayer,
    decode_clt,
    llamascopium,
    saelens,
    scope,
    sparsify,
)
from jaxclt.io.formats.circuit_tracer import CONFIG
from jaxclt.io.formats.pieces import FileStore
from jaxclt.io.tensors import is_pickle, pickle_message, refuse_pickles

__all__ = ["FORMATS", "LABELS", "Format", "config_files", "open_files", "weight_files"]

LABELS = "labels.json"


class Format(NamedTuple):
    """One tool's layout of a directory."""

    is_here: Callable[[Path], bool]
    open: Callable[..., FileStore]
    supplemented: bool = False  # what describes it may leave something unsaid
    within: bool = False  # a path may name one of several in a directory


# In the order of asking: what says most of itself first. GemmaScope's and Gemma Scope
# 2's files may also be named by a config.yaml of circuit-tracer.
FORMATS: dict[str, Format] = {
    "crosslayer-transcoder": Format(
        crosslayer.is_crosslayer, crosslayer.open_crosslayer
    ),
    "gemma-scope": Format(
        scope.is_scope, scope.open_scope, supplemented=True, within=True
    ),
    "circuit-tracer": Format(
        circuit_tracer.is_circuit_tracer,
        circuit_tracer.open_circuit_tracer,
        supplemented=True,
    ),
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
      InputError: if it is in no such format, or damaged.
    """
    if is_pickle(path):
        raise InputError(pickle_message(path))
    for format in FORMATS.values():
        if (path.is_dir() or format.within) and format.is_here(path):
            more = (supplement,) if format.supplemented else ()
            return format.open(path, *more)
    refuse_pickles(path)
    raise InputError(
        f"{path} is not a dictionary: a directory in one of the formats "
        f"{', '.join(FORMATS)} is needed"
    )


def config_files(names: Sequence[str]) -> list[str]:
    """Which of a folder's files describe a dictionary; none if there are none."""
    if CONFIG in names:
        return [x for x in (CONFIG, LABELS) if x in names]
    # a run of sparsify has both, and only the latter describe it
    found = [x for x in names if x == llamascopium.CONFIG]
    found += [x for x in names if Path(x).name == saelens.CONFIG and x.count("/") <= 2]
    return found + [x for x in names if x == LABELS and found]


def weight_files(folder: Path, names: Sequence[str]) -> list[str]:
    """Which files the description in a folder asks for, itself included.

    Returns:
      Names; none if there are no weights in a known format.

    Raises:
      InputError: if the description cannot be read.
    """
    described, wanted = config_files(names), []
    if CONFIG in described:
        wanted = _of_yaml(read_yaml(folder / CONFIG), names)
    elif llamascopium.is_llamascopium(folder):
        wanted = [x for x in llamascopium.WEIGHTS if x in names][:1]
    else:
        for config in (x for x in described if Path(x).name == saelens.CONFIG):
            beside = config.removesuffix(saelens.CONFIG)
            kinds = (saelens.WEIGHTS, sparsify.WEIGHTS, decode_clt.WEIGHTS)
            wanted += [f"{beside}{name}" for name in kinds]
    listed = CONFIG in described  # what it lists may all lie elsewhere
    kept = [x for x in wanted if x in names]
    return described + kept if kept or listed else []


def _of_yaml(config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    if isinstance(config.get("model"), dict):
        return [crosslayer.WEIGHTS]
    listed = config.get("transcoders")
    if isinstance(listed, list):  # what lies elsewhere is fetched when it is opened
        return [str(x) for x in listed if "://" not in str(x)]
    return [x for x in names if circuit_tracer.FILES.fullmatch(x)]
