"""The front door of dictionaries: name, path or hub id -> a `Dictionary`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from jaxclt.clt.active import Dictionary, StoreDictionary
from jaxclt.clt.neurons import NeuronDictionary, parse_neurons
from jaxclt.errors import InputError
from jaxclt.io.circuit_tracer_read import (
    CircuitTracerDir,
    check,
    dictionary_hash,
    load_params,
    open_dictionary,
)
from jaxclt.io.circuit_tracer_write import save_dictionary
from jaxclt.io.model import Model

__all__ = [
    "CircuitTracerDir",
    "check",
    "dictionary_hash",
    "load_dictionary",
    "load_params",
    "open_dictionary",
    "save_dictionary",
]

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<rev>[\w./-]+))?")


def load_dictionary(name_or_path: str | os.PathLike[str], model: Model) -> Dictionary:
    """Open a dictionary for a model.

    Args:
      name_or_path: `neurons`, `neurons:k`, a directory in circuit-tracer's format (or
        one that holds such a directory as `dictionary`), or a hub id
        `organisation/name[@revision]`.
      model: the model it reads.

    Raises:
      InputError: for an unknown name, a damaged directory, or one for another model.
    """
    name = str(name_or_path)
    neurons = parse_neurons(name)
    if neurons is not None:
        return NeuronDictionary(neurons.k, hash=model.hash)
    path = Path(name).expanduser()
    if not path.exists():
        path = _from_hub(name)
    if (path / "dictionary").is_dir() and not (path / "config.yaml").exists():
        path = path / "dictionary"
    store = open_dictionary(path)
    check(store, model.cfg)
    return StoreDictionary(store, name=name, hash=dictionary_hash(store))


def _from_hub(name: str) -> Path:
    hub_id = _HUB_ID.fullmatch(name)
    if hub_id is None:
        raise InputError(
            f"no dictionary {name!r}: give neurons:k, a directory that holds a "
            "config.yaml in circuit-tracer's format, or a hub id organisation/name"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            hub_id["repo"],
            revision=hub_id["rev"],
            allow_patterns=["config.yaml", "*.safetensors"],
        )
    except Exception as error:  # whatever its HTTP library of the day raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"no directory {name!r}, and the hub has no such dictionary or cannot be "
            f"reached ({reason})"
        ) from error
    return Path(folder)
