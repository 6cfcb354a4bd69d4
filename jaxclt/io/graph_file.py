"""Graphs on disk: one npz of plain arrays, readable with numpy alone.

Array names and letters are those of `jaxclt.graph.graph.Graph`; `meta` is a JSON
string. Never pickled, written atomically. `edge_direct_RN` is dense and, being mostly
zeros, compressed; so are `keep_edge_RN` and `meta`. A restricted graph has
`total_effect_KA`. The table of last heads, if there is one, has the arrays
`heads_row_E`, `heads_col_E` and so on, one for each of its fields. So have edges by
response, `response_RN`, `response_rest_R` and `response_rest_abs_R`, and their parts
`parts_row_E` to `parts_gate_E`. What was not computed is not there.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from scipy.sparse import csr_array, vstack

from jaxclt.errors import InputError
from jaxclt.files.atomic import atomic_path
from jaxclt.files.json_file import TEXT, TEXTS, json_schema, named, record
from jaxclt.files.json_text import to_json
from jaxclt.files.npz import Must, Npz, check_array, check_order, open_npz
from jaxclt.graph.graph import Graph, GraphMeta, Pruning
from jaxclt.graph.head_table import EdgeTable, HeadLoads
from jaxclt.graph.layout import Layout, check_sources
from jaxclt.graph.response_table import EFFECT_PARTS, PARTS, Response, ResponseParts

__all__ = ["load_graph", "save_graph"]

_TOKENS = 1 << 31
_ARRAYS = {
    "token_T": Must("int", "T", 0, _TOKENS),
    "layer_A": Must("int", "A", 0, "L"),
    "pos_A": Must("int", "A", 0, "T"),
    "feature_A": Must("int", "A", 0, _TOKENS),
    "value_A": Must("float", "A"),
    "preact_A": Must("float", "A"),
    "attributed_R": Must("bool", "R"),
    "target_token_K": Must("int", "K", -1, _TOKENS),
    "target_prob_K": Must("float", "K", 0),
    "edge_RN": Must("float", "RN"),
    "bias_R": Must("float", "R"),
    "rest_R": Must("float", "R"),
    "rest_abs_R": Must("float", "R"),
    "readout_R": Must("float", "R"),
    "influence_N": Must("float", "N"),
    "target_layer_K": Must("int", "K", 0, "S"),
    "target_pos_K": Must("int", "K", 0, "T"),
    "keep_N": Must("bool", "N"),
    "keep_edge_RN": Must("bool", "RN"),
}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_THRESHOLDS = ("node_threshold", "edge_threshold")
_META = json_schema(
    record(
        {
            **dict.fromkeys(("model", "dictionary", "prompt"), TEXT),
            **dict.fromkeys(("tokens", "target_tokens"), TEXTS),
            "n_layers": {"type": "integer", "minimum": 1, "maximum": 1 << 16},
            "pruning": record(dict.fromkeys(_THRESHOLDS, _SHARE)),
        },
        {
            **dict.fromkeys(("convention", "weights", "version"), TEXT),
            **dict.fromkeys(("hashes", "labels"), named(TEXT)),
            "config": {"type": "object"},
            "reading": {"enum": ["value", "response"]},
            "sources": TEXTS,
        },
    )
)
_LATER = ("target_layer_K", "target_pos_K")  # older files lack them: `Graph` knows
_EDGES = {
    "row_E": Must("int", "E", 0, "R"),
    "col_E": Must("int", "E", 0, "N"),
}
_HEADS = _EDGES | {
    "direct_E": Must("float", "E"),
    "layer_EJ": Must("short", "EJ", 0, "L"),
    "head_EJ": Must("short", "EJ", 0, 1 << 15),
    "load_EJ": Must("float", "EJ"),
    "rest_E": Must("float", "E"),
}
_PARTS = _EDGES | {f"{part}_E": Must("float", "E") for part in PARTS}
_RESPONSE = {  # names in the file, without `edge`
    "edge_RN": ("response_RN", Must("float", "RN")),
    "rest_R": ("response_rest_R", Must("float", "R")),
    "rest_abs_R": ("response_rest_abs_R", Must("float", "R")),
    "effect_QN": ("response_effect_QN", Must("float", "QN")),
}
_TOTAL, _TOTALS = "total_effect_KA", Must("float", "KA")  # of restricted graphs
_DIRECT, _DERIVATIVE = "edge_direct_RN", "derivative_KN"
_BLOCK_BYTES = 1 << 24  # of dense rows held at once
_MOST_PACKED = 1 << 27  # bytes of one array; more is not unpacked when it is read


def save_graph(path: str | os.PathLike[str], graph: Graph) -> None:
    """Write a graph to an npz file, atomically.

    Raises:
      InputError: if the file cannot be written.
    """
    meta = json.loads(graph.meta.to_json())
    meta["pruning"] = {
        "node_threshold": graph.pruning.node_threshold,
        "edge_threshold": graph.pruning.edge_threshold,
    }
    of_pruning = ("keep_N", "keep_edge_RN")
    arrays = {
        name: getattr(graph.pruning if name in of_pruning else graph, name)
        for name in _ARRAYS
    }
    arrays |= _table("heads", graph.heads, _HEADS)
    if graph.response is not None:
        arrays |= {
            saved: getattr(graph.response, name)
            for name, (saved, _) in _RESPONSE.items()
        }
        arrays |= _table("parts", graph.response.parts, _PARTS)
        arrays |= _total(graph.response, "response_")
    if graph.derivative_KN is not None:
        arrays[_DERIVATIVE] = graph.derivative_KN
    arrays |= _total(graph, "")
    packed = {"meta": np.array(to_json(meta, ensure_ascii=False))}
    if graph.pruning.keep_edge_RN.nbytes < _MOST_PACKED:
        packed["keep_edge_RN"] = arrays.pop("keep_edge_RN")
    with atomic_path(path) as temporary:
        with temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        # Level 1: zeros shrink to nothing at any level, numbers at none.
        with zipfile.ZipFile(
            temporary, "a", zipfile.ZIP_DEFLATED, compresslevel=1
        ) as file:
            for name, array in packed.items():
                with file.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, array, allow_pickle=False)
            if graph.direct_RN is not None:
                with file.open(f"{_DIRECT}.npy", "w", force_zip64=True) as stream:
                    _write_dense(stream, graph.direct_RN)


def _total(of: Graph | Response, prefix: str) -> dict[str, np.ndarray]:
    """The total effects that a restricted graph remembers; none of a whole one."""
    if of.total_effect_KA is None:
        return {}
    return {f"{prefix}{_TOTAL}": of.total_effect_KA}


def _table(
    prefix: str, table: EdgeTable | None, musts: dict[str, Must]
) -> dict[str, np.ndarray]:
    """Arrays of a table by their names in the file; none if there is no table."""
    if table is None:
        return {}
    return {f"{prefix}_{name}": getattr(table, name) for name in musts}


def _read_table(
    file: Npz, prefix: str, musts: dict[str, Must], sizes: dict[str, int]
) -> dict[str, np.ndarray]:
    """What `_table` named; every table has its own number of edges."""
    own = dict(sizes)
    return {x: file.array(f"{prefix}_{x}", must, own) for x, must in musts.items()}


def _write_dense(stream: IO[bytes], x_RN: csr_array) -> None:
    """Write a sparse matrix as a dense npy array, a few rows at a time."""
    header = {
        "descr": np.lib.format.dtype_to_descr(x_RN.dtype),
        "fortran_order": False,
        "shape": tuple(map(int, x_RN.shape or ())),
    }
    np.lib.format.write_array_header_1_0(stream, header)
    R, N = header["shape"]
    n = max(1, _BLOCK_BYTES // max(1, N * x_RN.dtype.itemsize))
    for start in range(0, R, n):
        stream.write(x_RN[start : start + n].toarray().tobytes())


def _read_dense(file: Npz, sizes: dict[str, int]) -> csr_array:
    """Read what `_write_dense` wrote, a few rows at a time."""
    must, blocks = Must("float", "RN"), []
    with file.stream(_DIRECT, must, sizes) as (stream, header):
        (R, N), dtype = header.shape, np.dtype(header.dtype)
        if header.fortran:
            raise ValueError(f"{_DIRECT} has its axes in another order")
        n = max(1, _BLOCK_BYTES // max(1, N * dtype.itemsize))
        for start in range(0, R, n):
            rows = min(n, R - start)
            data = stream.read(rows * N * dtype.itemsize)
            block_RN = np.frombuffer(data, dtype).reshape(rows, N)
            check_array(_DIRECT, block_RN, must, sizes)
            blocks.append(csr_array(block_RN))
    return csr_array(vstack(blocks, format="csr")) if blocks else csr_array((R, N))


def load_graph(path: str | os.PathLike[str]) -> Graph:
    """Read what `save_graph` wrote.

    Raises:
      InputError: if the file is missing, damaged, or no graph.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"no graph at {path}: give a graph.npz written by trace")
    with open_npz(path, "is not a complete graph file", "trace the prompt again") as f:
        raw = f.json("meta", _META)
        meta = GraphMeta.of(raw)
        T, K, L = len(meta.tokens), len(meta.target_tokens), meta.n_layers
        sizes = {"T": T, "K": K, "L": L, "S": L + 1}
        arrays = {"layer_A": f.array("layer_A", _ARRAYS["layer_A"], sizes)}
        A = sizes["A"]
        check_sources(meta.sources)
        layout = Layout(
            n_features=A, n_layers=L, n_tokens=T, n_targets=K, sources=meta.sources
        )
        sizes |= {"R": layout.target_rows.stop, "N": layout.n_columns}
        for name, must in _ARRAYS.items():
            if name not in arrays and (name in f or name not in _LATER):
                arrays[name] = f.array(name, must, sizes)
        if not arrays["target_prob_K"].any():
            raise ValueError("its targets have no weight")
        check_order(*(arrays[x] for x in ("layer_A", "pos_A", "feature_A")))
        direct_RN = _read_dense(f, sizes) if _DIRECT in f else None
        heads = response = derivative_KN = total_effect_KA = None
        if "heads_row_E" in f:
            heads = HeadLoads(**_read_table(f, "heads", _HEADS, sizes))
        if "response_RN" in f:
            response = _read_response(f, sizes)
        if _DERIVATIVE in f:
            derivative_KN = f.array(_DERIVATIVE, Must("float", "KN"), sizes)
        if _TOTAL in f:
            total_effect_KA = f.array(_TOTAL, _TOTALS, sizes)
    pruning = Pruning(
        keep_N=arrays.pop("keep_N"),
        keep_edge_RN=arrays.pop("keep_edge_RN"),
        **{name: float(raw["pruning"][name]) for name in _THRESHOLDS},
    )
    return Graph(
        meta=meta,
        pruning=pruning,
        direct_RN=direct_RN,
        heads=heads,
        response=response,
        derivative_KN=derivative_KN,
        total_effect_KA=total_effect_KA,
        **arrays,
    )


def _read_response(file: Npz, sizes: dict[str, int]) -> Response:
    own = {**sizes, "Q": len(EFFECT_PARTS)}
    arrays = {
        name: file.array(saved, must, own) for name, (saved, must) in _RESPONSE.items()
    }
    if f"response_{_TOTAL}" in file:
        arrays[_TOTAL] = file.array(f"response_{_TOTAL}", _TOTALS, own)
    parts = ResponseParts(**_read_table(file, "parts", _PARTS, sizes))
    return Response(parts=parts, **arrays)
