"""Graphs on disk: one npz of plain arrays, readable with numpy alone.

Array names and letters are those of `jaxclt.graph.graph.Graph`; `meta` is a JSON
string. Never pickled, written atomically.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile

import numpy as np

from jaxclt.errors import InputError
from jaxclt.graph.graph import Graph, GraphMeta, Pruning
from jaxclt.io.atomic import atomic_path

__all__ = ["load_graph", "save_graph"]

_ARRAYS = tuple(
    field.name
    for field in dataclasses.fields(Graph)
    if field.name not in ("meta", "pruning")
)


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
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            allow_pickle=False,
            meta=np.array(json.dumps(meta, ensure_ascii=False)),
            keep_N=graph.pruning.keep_N,
            keep_edge_RN=graph.pruning.keep_edge_RN,
            **arrays,
        )


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
