"""Global weights on disk: npz files of plain arrays, written atomically.

`statistics.npz` holds co-activation sums, to be merged or ranked again. `globals.npz`
holds the strongest links: for pairs P ``source_layer_P source_feature_P target_layer_P
target_feature_P virtual_P era_P twera_P coactivation_P`` (and ``era_norm_P
twera_norm_P``), a table of the features U with their strongest tokens, and `meta`, a
JSON string.
"""

from __future__ import annotations

import dataclasses
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from jaxclt.clt.subset import Subset
from jaxclt.errors import check_choice, shown
from jaxclt.files.json_file import COUNT, TEXT, json_schema, named, record
from jaxclt.files.json_text import to_json
from jaxclt.files.npz import Must, Npz, check_order, open_npz, write_npz
from jaxclt.global_weights.ranking import KINDS, Kind, Links, largest
from jaxclt.global_weights.statistics import Coactivation

__all__ = [
    "SavedGlobals",
    "load_globals",
    "load_statistics",
    "save_globals",
    "save_statistics",
]

_MANY = 1 << 31
_SPARSE = {
    "data": Must("float", "E"),
    "indices": Must("int", "E", 0, "N"),
    "indptr": Must("int", "S", 0),
    "shape": Must("int", "2", 0),
}
_WHOLE = {
    "n": "", "sum_U": "U", "count_U": "U",
    "input_count_Y": "I", "input_ind_UY": "UI", "input_act_UY": "UI",
    "input_ind_norm_UY": "UI", "input_act_norm_UY": "UI",
    "output_sum_Y": "O", "output_act_YU": "OU", "output_act_norm_YU": "OU",
}  # fmt: skip
_BY_LAYER = ("ind", "act", "both", "ind_norm", "act_norm")
_BY_HEAD = ("head_ind", "head_act")
_LAYERS = {"type": "integer", "minimum": 1, "maximum": 1 << 16}
_STATISTICS = json_schema(
    record(
        {
            "n_layers": _LAYERS,
            "scaled": {"type": "boolean"},
            "sums": named(COUNT),
            "more": record({}, {"identity": {"type": "object"}, "windows": COUNT}),
        }
    )
)
_GLOBALS = json_schema(
    record(
        {
            "n_layers": _LAYERS,
            "by": {"enum": KINDS},
            "model": TEXT,
            "dictionary": TEXT,
            "tokens": COUNT,
            "token_text": named(TEXT),
        }
    )
)


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
    about = {
        "n_layers": found.subset.n_layers,
        "scaled": found.scaled,
        "sums": {
            name: len(value) if isinstance(value, tuple) else 0
            for name, value in found.sums.items()
        },
        "more": meta,
    }
    write_npz(path, meta=np.asarray(to_json(about)), **arrays)


def load_statistics(
    path: str | os.PathLike[str],
) -> tuple[Coactivation, dict[str, Any]]:
    """Read what `save_statistics` wrote: the sums, and its `meta`.

    Raises:
      InputError: if there is no such file, or it is damaged.
    """
    do = "run `jaxclt globals` again"
    with open_npz(Path(path), "holds no co-activation statistics", do) as f:
        meta = f.json("meta", _STATISTICS)
        sizes: dict[str, int] = {"L": meta["n_layers"]}
        subset = _subset(f, sizes)
        heads = f.array("heads", Must("int", "H2", 0, _MANY), sizes | {"2": 2})
        if (heads[:, 0] >= sizes["L"]).any():
            raise ValueError("heads names a layer that is not there")
        found = Coactivation(
            subset=subset,
            scaled=meta["scaled"],
            heads=tuple((int(a), int(b)) for a, b in heads),
            input_Y=f.array("input_Y", Must("int", "I", 0, _MANY), sizes),
            output_Y=f.array("output_Y", Must("int", "O", 0, _MANY), sizes),
            sums={},
        )
        names = ("n", "sum_U", "count_U", *_BY_LAYER[: 5 if found.scaled else 3])
        if missing := sorted(set(names) - set(meta["sums"])):
            raise ValueError(f"it has no {missing[0]}")
        for name, n in meta["sums"].items():
            found.sums[name] = _sums(f, found, name, n, sizes)
    return found, meta["more"]


def _subset(f: Npz, sizes: dict[str, int]) -> Subset:
    layer_U = f.array("layer_U", Must("int", "U", 0, "L"), sizes)
    feature_U = f.array("feature_U", Must("int", "U", 0, _MANY), sizes)
    check_order(layer_U, feature_U)
    return Subset(layer_U, feature_U, sizes["L"])


def _sums(f: Npz, found: Coactivation, name: str, n: int, sizes: dict[str, int]) -> Any:
    """One kind of sums: an array, or a matrix for each target layer or head."""
    starts = found.subset.starts
    if name in _WHOLE and not n:
        return f.array(name, Must("float", _WHOLE[name]), sizes)
    shapes = []
    if name in _BY_LAYER:
        shapes = [(end - first, first) for first, end in pairwise(starts)]
    elif name in _BY_HEAD:
        shapes = [(starts[-1] - starts[l], starts[l]) for l, _ in found.heads]
    if not shapes or n != len(shapes):
        raise ValueError(f"it has {n} of {shown(name)}")
    return tuple(_tile(f, f"{name}/{i}", *shape) for i, shape in enumerate(shapes))


def _tile(f: Npz, name: str, rows: int, columns: int) -> np.ndarray | csr_array:
    """A matrix, dense or sparse."""
    sizes = {"R": rows, "N": columns, "S": rows + 1, "2": 2}
    if name in f:
        return f.array(name, Must("float", "RN"), sizes)
    part = {x: f.array(f"{name}/{x}", must, sizes) for x, must in _SPARSE.items()}
    if part["shape"].tolist() != [rows, columns]:
        raise ValueError(f"{name} has another shape than its features")
    parts = (part["data"], part["indices"], part["indptr"])
    tile = csr_array(parts, shape=(rows, columns))
    tile.check_format(full_check=True)
    return tile


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


_TABLE = {
    "frequency_U": Must("float", "U", 0),
    "mean_U": Must("float", "U"),
    **{
        f"{name}_{what}_UK": must
        for name, dims in (("input", "UI"), ("output", "UO"), ("lowest", "UO"))
        for what, must in (
            ("token", Must("int", dims, 0, _MANY)),
            ("weight", Must("float", dims)),
        )
    },
}
_LINKS = {
    name: Must("int", "P", 0, "L" if name.endswith("_layer_P") else _MANY)
    if name.startswith(("source", "target"))
    else Must("float", "P")
    for name in Links._fields
}


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
    write_npz(
        path,
        meta=np.asarray(to_json(meta, ensure_ascii=False)),
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
    do = "give a directory that `jaxclt globals` wrote"
    with open_npz(file_path, "holds no global weights", do) as f:
        meta = f.json("meta", _GLOBALS)
        sizes: dict[str, int] = {"L": meta["n_layers"]}
        subset = _subset(f, sizes)
        links = Links(**{x: f.array(x, _LINKS[x], sizes) for x in Links._fields})
        table = {name: f.array(name, must, sizes) for name, must in _TABLE.items()}
        for end in ("source", "target"):
            layer_P, feature_P = (
                getattr(links, f"{end}_{x}_P") for x in ("layer", "feature")
            )
            if not _among(subset, layer_P, feature_P).all():
                raise ValueError(f"a link has a {end} that is not among its features")
        tokens = [x.ravel() for name, x in table.items() if "_token_" in name]
        unnamed = set(map(str, np.unique(np.concatenate(tokens)))) - {
            *meta["token_text"]
        }
        if unnamed:
            raise ValueError(f"it has no text of token {min(unnamed)}")
    return SavedGlobals(meta=meta, links=links, subset=subset, **table)


def _among(subset: Subset, layer_P: np.ndarray, feature_P: np.ndarray) -> np.ndarray:
    """Which (layer, feature) are in a subset."""
    key_U = subset.layer_U.astype(np.int64) * _MANY + subset.feature_U
    key_P = layer_P.astype(np.int64) * _MANY + feature_P
    at_P = np.minimum(np.searchsorted(key_U, key_P), max(len(key_U) - 1, 0))
    return key_U[at_P] == key_P if len(key_U) else np.zeros(len(key_P), bool)
