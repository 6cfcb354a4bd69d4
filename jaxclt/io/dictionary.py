"""The front door of dictionaries: name, path or hub id -> a `Dictionary`."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from jaxclt.clt.active import Dictionary, StoreDictionary
from jaxclt.clt.neurons import parse_neurons
from jaxclt.errors import InputError
from jaxclt.io.bundled import DICTIONARIES, bundled
from jaxclt.io.circuit_tracer_read import (
    CircuitTracerDir,
    check,
    dictionary_hash,
    load_params,
    open_dictionary,
)
from jaxclt.io.circuit_tracer_write import save_dictionary
from jaxclt.io.hub import download, parse_hub_id
from jaxclt.io.model import Model
from jaxclt.io.weights_safetensors import read_json

LABELS = "labels.json"

__all__ = [
    "LABELS",
    "CircuitTracerDir",
    "check",
    "dictionary_hash",
    "load_dictionary",
    "load_params",
    "open_dictionary",
    "read_labels",
    "save_dictionary",
]


def load_dictionary(name_or_path: str | os.PathLike[str], model: Model) -> Dictionary:
    """Open a dictionary for a model.

    Args:
      name_or_path: `neurons`, `neurons:k`, `neurons@x`, a bundled one (see
        `jaxclt.io.bundled`), a directory in circuit-tracer's format (or one that holds
        such a directory as `dictionary`), or a hub id `organisation/name[@revision]`.
      model: the model it reads.

    Raises:
      InputError: for an unknown name, a damaged directory, or one for another model.
    """
    name = str(name_or_path)
    neurons = parse_neurons(name)
    if neurons is not None:
        return dataclasses.replace(neurons, hash=model.hash)
    path = bundled(name) or Path(name).expanduser()
    if not path.exists():
        if parse_hub_id(name) is None:
            raise InputError(
                f"no dictionary {name!r}: give neurons:k, {', '.join(DICTIONARIES)}, a "
                "directory that holds a "
                "config.yaml in circuit-tracer's format, or a hub id organisation/name"
            )
        path = download(name, "dictionary", allow=["config.yaml", "*.safetensors"])
    if (path / "dictionary").is_dir() and not (path / "config.yaml").exists():
        path = path / "dictionary"
    store = open_dictionary(path)
    check(store, model.cfg)
    return StoreDictionary(
        store, name=name, hash=dictionary_hash(store), labels=read_labels(path)
    )


def read_labels(folder: Path) -> dict[tuple[int, int], str]:
    """Labels of features, from an optional labels.json: ``{"LAYER:FEATURE": text}``.

    Raises:
      InputError: if the file is there and holds anything else.
    """
    file = folder / LABELS
    if not file.is_file():
        return {}
    found = {}
    for key, text in read_json(file).items():
        place = re.fullmatch(r"(\d{1,9}):(\d{1,9})", key)
        if place is None or not isinstance(text, str):
            raise InputError(
                f'{file}: write {{"LAYER:FEATURE": "label", ...}}, not {key!r}'
            )
        found[int(place[1]), int(place[2])] = text
    return found
