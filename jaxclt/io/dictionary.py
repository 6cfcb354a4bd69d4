"""The front door of dictionaries: name, path or hub id -> a `Dictionary`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

from jaxclt.clt.coder import Dictionary
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.neurons import parse_neurons
from jaxclt.clt.store import DictionaryStore, materialise
from jaxclt.clt.transcoder import StoreDictionary
from jaxclt.errors import InputError, did_you_mean, shown
from jaxclt.files.json_file import read_json
from jaxclt.io.bundled import DICTIONARIES, bundled
from jaxclt.io.formats.pieces import FileStore
from jaxclt.io.formats.scope import chosen_files, is_scope
from jaxclt.io.formats.table import (
    LABELS,
    config_files,
    open_files,
    weight_files,
)
from jaxclt.io.hub import download_dictionary, parse_hub_ref
from jaxclt.io.model import Model
from jaxclt.io.published import repositories, supplement
from jaxclt.io.save import save_dictionary
from jaxclt.lm.config import LMConfig
from jaxclt.types import CLTParams

__all__ = [
    "LABELS",
    "FileStore",
    "check",
    "load_dictionary",
    "load_params",
    "locate_dictionary",
    "open_dictionary",
    "read_labels",
    "save_dictionary",
]


def load_dictionary(
    name_or_path: str | os.PathLike[str],
    model: Model,
    *,
    progress: Callable[[str], None] | None = None,
) -> Dictionary:
    """Open a dictionary for a model.

    Args:
      name_or_path: `neurons`, `neurons:k`, `neurons@x`, a bundled one (see
        `jaxclt.io.bundled`), a directory in one of the formats of
        `jaxclt.io.formats.table` (or one that holds such a directory as `dictionary`),
        or a hub id ``organisation/name[//folder][@revision]``.
      model: the model it reads.
      progress: called with what was chosen in each layer where the name left that open
        (``width_16k/average_l0_70`` of Gemma Scope: the nearest); it is in the
        dictionary's `provenance` as well.

    Raises:
      InputError: for an unknown name, a damaged directory, or one for another model.
    """
    name = str(name_or_path)
    neurons = parse_neurons(name)
    if neurons is not None:
        return dataclasses.replace(neurons, hash=model.hash)
    store = open_dictionary(name)
    if progress is not None:
        for what, chosen in store.provenance.items():
            if what != "files":
                listed = ", ".join(map(str, chosen))
                progress(f"{name}: {what} of layers 0 to {len(chosen) - 1}: {listed}")
    check(store, model.cfg, post_norm=model.params.blocks.post_mlp_LD is not None)
    return StoreDictionary(
        store,
        name=name,
        hash=store.digest(),
        labels=read_labels(store.path),
        provenance=store.provenance,
    )


def locate_dictionary(name: str) -> Path:
    """The directory that a bundled name, a path or a hub id stands for.

    What is not here yet is fetched from the hub: what the format needs, no more.

    Raises:
      InputError: if there is none of that name, or it cannot be had.
    """
    path = bundled(name) or Path(os.path.expanduser(name))
    if not name or not _is_there(path):
        ref = parse_hub_ref(name)
        if ref is None:
            raise InputError(
                f"no dictionary {shown(name)}: give neurons:k, "
                f"{', '.join(DICTIONARIES)}, a directory in a known format, or a hub "
                "id organisation/name[//folder][@revision] (`jaxclt fetch --list` "
                f"names some){did_you_mean(name, ('neurons', *DICTIONARIES))}"
            )
        try:
            path = download_dictionary(name, config_files, weight_files, chosen_files)
        except InputError as error:
            hint = did_you_mean(ref.repo, repositories("dictionary"))
            raise InputError(f"{error}{hint}") from error
    inside = path / "dictionary"
    return inside if inside.is_dir() and not (path / "config.yaml").exists() else path


def _is_there(path: Path) -> bool:
    try:
        return path.exists() or is_scope(path)
    except OSError:  # a name that no file can have
        return False


def open_dictionary(name_or_path: str | os.PathLike[str]) -> FileStore:
    """Open a dictionary without reading its weights.

    Args:
      name_or_path: as for `load_dictionary`, but not neurons.

    Returns:
      A lazy store.

    Raises:
      InputError: if a file is missing, truncated, a pickle, of the wrong shape, or asks
        for what cannot be represented.
    """
    name = os.fspath(name_or_path)
    if isinstance(name_or_path, os.PathLike):
        return open_files(Path(name))
    return open_files(locate_dictionary(name), supplement(name))


def load_params(path: str | Path) -> tuple[CLTParams, CLTConfig]:
    """Read a whole dictionary into memory.

    Raises:
      InputError: as `open_dictionary`, and if a weight is not finite.
    """
    store = open_dictionary(path)
    return materialise(store), store.cfg


def check(store: DictionaryStore, lm_cfg: LMConfig, *, post_norm: bool = False) -> None:
    """Raise InputError unless the dictionary fits the model.

    Args:
      store: the dictionary.
      lm_cfg: the model.
      post_norm: the model normalises what its MLPs write.
    """
    cfg = store.cfg
    trained_on = getattr(store, "model_name", None)
    hint = f" (it names {trained_on})" if trained_on else ""
    for what, ours, theirs in (
        ("layers", cfg.n_layers, lm_cfg.n_layers),
        ("residual dimensions", cfg.d_model, lm_cfg.d_model),
    ):
        if ours != theirs:
            raise InputError(
                f"the dictionary has {ours} {what}, the model {theirs}; give the model "
                f"the dictionary was trained on{hint} or another dictionary"
            )
    if post_norm and getattr(store, "write", "stream") == "mlp":
        raise InputError(
            "the dictionary reconstructs what the MLPs write ahead of the norm after "
            "them (feature_output_hook mlp.hook_out), whose denominator is another at "
            "each token: give one that writes hook_mlp_out"
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
                f'{file}: write {{"LAYER:FEATURE": "label", ...}}, not {shown(key)}'
            )
        found[int(place[1]), int(place[2])] = text
    return found
