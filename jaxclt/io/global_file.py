"""Global weights on disk: npz files of plain arrays, written atomically.

`statistics.npz` holds co-activation sums, to be merged or ranked again. `globals.npz`
holds the strongest links: for pairs P ``source_layer_P source_feature_P target_layer_P
target_feature_P virtual_P era_P twera_P coactivation_P`` (and ``era_norm_P
twera_norm_P``), a table of the features U with their strongest tokens, and `meta`, a
JSON string.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from jaxclt.errors import InputError, check_choice
from jaxclt.global_weights.ranking import KINDS, Kind, Links, largest
from jaxclt.global_weights.statistics import Coactivation
from jaxclt.global_weights.subset import Subset
from jaxclt.io.atomic import atomic_path

__all__ = [
    "SavedGlobals",
    "load_globals",
    "load_statistics",
    "save_globals",
    "save_statistics",
]

_SPARSE = ("data", "indices", "indptr", "shape")


def save_statistics(
    path: str | os.PathLike[str], found: Coactivation, **meta: Any
) -> None:
    """Write co-activation sums; `meta` must be JSON.

    Raises:
      InputError: if the file cannot be written.
    """
    arrays: dict[str, Any] = {
        "layer_U": found.subset.layer_U,
        "feature_U": found.subset.feature_U,
        "input_Y": found.input_Y,
        "output_Y": found.output_Y,
        "heads": np.asarray(found.heads, np.int32).reshape(-1, 2),
    }
    for name, value in found.sums.items():
        tiles = value if isinstance(value, tuple) else (value,)
        for i, tile in enumerate(tiles):
            key = f"{name}/{i}" if isinstance(value, tuple) else name
            if isinstance(tile, csr_array):
                for part in _SPARSE:
                    arrays[f"{key}/{part}"] = np.asarray(getattr(tile, part))
            else:
                arrays[key] = tile
    told = {
        "n_layers": found.subset.n_layers,
        "scaled": found.scaled,
        "sums": {
            name: len(value) if isinstance(value, tuple) else 0
            for name, value in found.sums.items()
        },
        "more": meta,
    }
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream, allow_pickle=False, meta=np.asarray(json.dumps(told)), **arrays
        )


def load_statistics(
    path: str | os.PathLike[str],
) -> tuple[Coactivation, dict[str, Any]]:
    """Read what `save_statistics` wrote: the sums, and what else was told.

    Raises:
      InputError: if there is no such file, or it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))

            def tile(key: str) -> Any:
                if f"{key}/data" not in file:
                    return file[key]
                data, indices, indptr, shape = (file[f"{key}/{x}"] for x in _SPARSE)
                return csr_array((data, indices, indptr), shape=tuple(shape.tolist()))

            sums = {
                name: tuple(tile(f"{name}/{i}") for i in range(n)) if n else tile(name)
                for name, n in meta["sums"].items()
            }
            subset = Subset(file["layer_U"], file["feature_U"], meta["n_layers"])
            found = Coactivation(
                subset=subset,
                scaled=meta["scaled"],
                sums=sums,
                heads=tuple((int(a), int(b)) for a, b in file["heads"]),
                input_Y=file["input_Y"],
                output_Y=file["output_Y"],
            )
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} holds no co-activation statistics ({type(error).__name__}): run "
            "`jaxclt globals` again"
        ) from error
    return found, meta["more"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedGlobals:
    """The strongest links of a `jaxclt globals` run.

    Attributes:
      meta: what was run on what, the interference, and the text of tokens by id.
      links: strongest first by ``meta["by"]``.
      subset: the features.
      frequency_U: share of tokens on which each fires.
      mean_U: E[a].
      input_token_UK: tokens with the largest embedding weights, with `input_weight_UK`.
      output_token_UK: tokens with the largest logit weights, with `output_weight_UK`.
      lowest_token_UK: those with the most negative ones, with `lowest_weight_UK`.
    """

    meta: dict[str, Any]
    links: Links
    subset: Subset
    frequency_U: np.ndarray
    mean_U: np.ndarray
    input_token_UK: np.ndarray
    input_weight_UK: np.ndarray
    output_token_UK: np.ndarray
    output_weight_UK: np.ndarray
    lowest_token_UK: np.ndarray
    lowest_weight_UK: np.ndarray

    def inputs(
        self, layer: int, feature: int, k: int = 10, *, by: Kind | None = None
    ) -> Links:
        """The strongest kept sources of a feature, as `GlobalWeights.inputs`."""
        self.subset.slot(layer, feature)
        return self._where("target", layer, feature, k, by)

    def outputs(
        self, layer: int, feature: int, k: int = 10, *, by: Kind | None = None
    ) -> Links:
        """The strongest kept targets of a feature, as `GlobalWeights.outputs`."""
        self.subset.slot(layer, feature)
        return self._where("source", layer, feature, k, by)

    def _where(
        self, end: str, layer: int, feature: int, k: int, by: Kind | None
    ) -> Links:
        links = self.links
        kind: str = by or self.meta["by"]
        check_choice("kind", kind, KINDS)
        here = np.flatnonzero(
            (getattr(links, f"{end}_layer_P") == layer)
            & (getattr(links, f"{end}_feature_P") == feature)
        )
        here = here[largest(getattr(links, f"{kind}_P")[here], k)]
        return Links(*(column[here] for column in links))


_TABLE = tuple(
    field.name
    for field in dataclasses.fields(SavedGlobals)
    if field.name not in ("meta", "links", "subset")
)


def save_globals(path: str | os.PathLike[str], found: SavedGlobals) -> None:
    """Write the strongest links.

    Raises:
      InputError: if the file cannot be written.
    """
    links = {
        name: column.astype(np.int32 if column.dtype.kind == "i" else np.float32)
        for name, column in found.links._asdict().items()
    }
    meta = found.meta | {"n_layers": found.subset.n_layers}
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            allow_pickle=False,
            meta=np.asarray(json.dumps(meta, ensure_ascii=False)),
            layer_U=found.subset.layer_U,
            feature_U=found.subset.feature_U,
            **links,
            **{name: getattr(found, name) for name in _TABLE},
        )


def load_globals(path: str | os.PathLike[str]) -> SavedGlobals:
    """Read `globals.npz`, or the one in a directory.

    Raises:
      InputError: if there is none, or it is damaged.
    """
    path = Path(path)
    file_path = path / "globals.npz" if path.is_dir() else path
    try:
        with np.load(file_path, allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            return SavedGlobals(
                meta=meta,
                links=Links(**{name: file[name] for name in Links._fields}),
                subset=Subset(file["layer_U"], file["feature_U"], meta["n_layers"]),
                **{name: file[name] for name in _TABLE},
            )
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{file_path} holds no global weights ({type(error).__name__}): give a "
            "directory that `jaxclt globals` wrote"
        ) from error
