"""Graphs on disk: one npz of plain arrays, readable with numpy alone.

Array names and letters are those of `jaxclt.graph.graph.Graph`; `meta` is a JSON
string. Never pickled, written atomically. `edge_direct_RN` is dense and, being mostly
zeros, the one compressed array. The table of last heads, if there is one, has the
arrays `heads_row_E`, `heads_col_E` and so on, one for each of its fields.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
import zlib
from typing import IO

import numpy as np
from scipy.sparse import csr_array, vstack

from jaxclt.errors import InputError
from jaxclt.graph.graph import Graph, GraphMeta, Pruning
from jaxclt.graph.head_table import HeadLoads
from jaxclt.io.atomic import atomic_path
from jaxclt.json_text import to_json

__all__ = ["load_graph", "save_graph"]

_ARRAYS = tuple(
    field.name
    for field in dataclasses.fields(Graph)
    if field.name not in ("meta", "pruning", "direct_RN", "heads")
)
_HEADS = tuple(field.name for field in dataclasses.fields(HeadLoads))
_DIRECT = "edge_direct_RN"
_BLOCK_BYTES = 1 << 24  # of dense rows held at once


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
    arrays = {name: getattr(graph, name) for name in _ARRAYS}
    if graph.heads is not None:
        arrays |= {f"heads_{name}": getattr(graph.heads, name) for name in _HEADS}
    with atomic_path(path) as temporary:
        with temporary.open("wb") as stream:
            np.savez(
                stream,
                allow_pickle=False,
                meta=np.array(to_json(meta, ensure_ascii=False)),
                keep_N=graph.pruning.keep_N,
                keep_edge_RN=graph.pruning.keep_edge_RN,
                **arrays,
            )
        if graph.direct_RN is not None:
            # Level 1: zeros shrink to nothing at any level, numbers at none.
            packed = zipfile.ZipFile(
                temporary, "a", zipfile.ZIP_DEFLATED, compresslevel=1
            )
            with (
                packed as file,
                file.open(f"{_DIRECT}.npy", "w", force_zip64=True) as stream,
            ):
                _write_dense(stream, graph.direct_RN)


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


def _read_dense(stream: IO[bytes], shape: tuple[int, int]) -> csr_array:
    """Read what `_write_dense` wrote; ValueError if it has another shape."""
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"{_DIRECT} has format version {version}")
    found, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if found != shape or fortran or dtype.kind != "f":
        raise ValueError(f"{_DIRECT} should be a float array of shape {shape}")
    (R, N), blocks = shape, []
    n = max(1, _BLOCK_BYTES // max(1, N * dtype.itemsize))
    for start in range(0, R, n):
        rows = min(n, R - start)
        data = stream.read(rows * N * dtype.itemsize)
        blocks.append(csr_array(np.frombuffer(data, dtype).reshape(rows, N)))
    return csr_array(vstack(blocks, format="csr"))


def _provenance(file: np.lib.npyio.NpzFile, shape: tuple[int, int]) -> dict:
    """The optional fields; ValueError if they do not fit the graph."""
    direct_RN = heads = None
    if _DIRECT in file.files:
        assert file.zip is not None
        with file.zip.open(f"{_DIRECT}.npy") as stream:
            direct_RN = _read_dense(stream, shape)
    if f"heads_{_HEADS[0]}" in file.files:
        heads = HeadLoads(**{name: file[f"heads_{name}"] for name in _HEADS})
        E, J = heads.load_EJ.shape
        for name in _HEADS:
            want = (E, J) if name.endswith("EJ") else (E,)
            if getattr(heads, name).shape != want:
                raise ValueError(f"heads_{name} should have shape {want}")
        for index, size in zip((heads.row_E, heads.col_E), shape, strict=True):
            if E and not 0 <= index.min() <= index.max() < size:
                raise ValueError("heads lists an edge that is not in the graph")
    return {"direct_RN": direct_RN, "heads": heads}


def load_graph(path: str | os.PathLike[str]) -> Graph:
    """Read what `save_graph` wrote.

    Raises:
      InputError: if the file is missing, damaged, or no graph.
    """
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            names = (*_ARRAYS, "keep_N", "keep_edge_RN")
            # Older files lack these: `Graph` fills them in.
            later = {"target_layer_K", "target_pos_K"} - set(file.files)
            arrays = {name: file[name] for name in names if name not in later}
            arrays |= _provenance(file, arrays["edge_RN"].shape)
            text = str(file["meta"])
        meta, raw = GraphMeta.from_json(text), json.loads(text)
        thresholds = raw["pruning"]
    except FileNotFoundError as error:
        raise InputError(
            f"no graph at {path}: give a graph.npz written by trace"
        ) from error
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise InputError(
            f"{path} is not a complete graph file ({type(error).__name__}: {error}); "
            "trace the prompt again"
        ) from error
    pruning = Pruning(
        keep_N=arrays.pop("keep_N"),
        keep_edge_RN=arrays.pop("keep_edge_RN"),
        **thresholds,
    )
    graph = Graph(meta=meta, pruning=pruning, **arrays)
    K = graph.n_targets
    R, N = graph.n_features + K, graph.embed_cols.stop
    for name, shape in {
        "target_prob_K": (K,),
        "target_layer_K": (K,),
        "target_pos_K": (K,),
        "edge_RN": (R, N),
        "bias_R": (R,),
        "rest_R": (R,),
        "readout_R": (R,),
        "influence_N": (N,),
    }.items():
        if getattr(graph, name).shape != shape:
            raise InputError(f"{path}: {name} should have shape {shape}; trace again")
    return graph
