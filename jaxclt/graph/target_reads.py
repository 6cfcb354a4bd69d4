"""What the rows of targets need: where they read, what they sum to, what is constant.

For targets that `jaxclt.graph.targets.place_targets` has placed.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import Array

from jaxclt.clt.active import Active
from jaxclt.graph.bank import RowTargets, written_at
from jaxclt.graph.layout import Layout
from jaxclt.lm.layers import Norm, fold_norm, out_norm
from jaxclt.types import LMParams, Reads, Recording, Targets

__all__ = [
    "target_bias",
    "target_readouts",
    "target_reads",
    "target_rows",
    "written_edges",
]


def target_reads(
    params: LMParams,
    recording: Recording,
    vec_KD: np.ndarray | Array,
    pos: int | np.ndarray,
) -> np.ndarray:
    """Directions [K, D] of the output pulled back through the frozen final norm.

    Args:
      params: the model.
      recording: its clean pass.
      vec_KD: directions.
      pos: position of all, or of each.
    """
    scale_K = np.asarray(recording.frozen.out_scale_T)[np.atleast_1d(pos)]
    norm: Norm = jax.tree.map(np.asarray, out_norm(params))
    return fold_norm(np.asarray(vec_KD), norm) * scale_K[:, None]  # pyright: ignore


def target_rows(
    params: LMParams, recording: Recording, active: Active, targets: Targets
) -> RowTargets:
    """Where the rows of placed targets read, and what of the residual stream.

    The direction on an MLP's output reaches the stream below only through a
    dictionary's linear skip; what it reads of the sources at its own place is
    `written_edges`.
    """
    layer_K, pos_K = np.asarray(targets.layer_K), np.asarray(targets.pos_K)
    read_KD = np.array(targets.vec_KD)
    is_out = layer_K == active.n_layers
    read_KD[is_out] = target_reads(params, recording, read_KD[is_out], pos_K[is_out])
    if active.skip is not None:
        for k in np.flatnonzero(~is_out):
            skip = active.skip.at(layer_K[k], pos_K[[k]])
            read_KD[[k]] += skip.read(np.asarray(targets.write_KD)[[k]])
    return RowTargets(layer_R=layer_K, pos_R=pos_K, read_RD=read_KD)


def written_edges(
    active: Active, error_LTD: np.ndarray, targets: Targets, k: int, *, n_tokens: int
) -> np.ndarray:
    """Edges [N] of target k through the MLP output that it reads itself.

    They come on top of those through the stream: `jaxclt.graph.rows` treats a target of
    layer l as reading before that layer's MLP writes.

    Args:
      active: the features, columns of the edges.
      error_LTD: error vectors.
      targets: placed targets.
      k: which of them.
      n_tokens: T of the columns.
    """
    layer, pos = int(targets.layer_K[k]), int(targets.pos_K[k])
    write_D = np.asarray(targets.write_KD)[k]
    layout = Layout(
        n_features=len(active.layer_A), n_layers=active.n_layers, n_tokens=n_tokens
    )
    edge_N = np.zeros(layout.n_columns, write_D.dtype)
    for slots, write_AD in written_at(active, layer, pos):
        edge_N[slots] = write_AD @ write_D
    edge_N[layout.at("error", layer, pos)] = error_LTD[layer, pos] @ write_D
    return edge_N


def target_readouts(recording: Recording, targets: Targets) -> np.ndarray:
    """What the rows of placed targets sum to, [K]: the functionals of the clean run."""
    mid_LTD, write_LTD = np.asarray(recording.mid_LTD), np.asarray(recording.write_LTD)
    value_K = _out_values(recording.out_TD, targets, len(mid_LTD))
    for k in np.flatnonzero(targets.layer_K < len(mid_LTD)):
        place = targets.layer_K[k], targets.pos_K[k]
        value_K[k] = targets.vec_KD[k] @ mid_LTD[place]
        value_K[k] += targets.write_KD[k] @ write_LTD[place]
    return value_K + np.asarray(targets.const_K, value_K.dtype)


def target_bias(
    active: Active, bias: Reads, targets: Targets, rows: RowTargets
) -> np.ndarray:
    """The constant part of placed targets, [K]: all biases, pushed through.

    Args:
      active: the features (their dictionary's biases).
      bias: from `jaxclt.lm.frozen.bias_reads`.
      targets: placed targets.
      rows: theirs, from `target_rows`.
    """
    mid_LTD = np.asarray(bias.mid_LTD)
    value_K = _out_values(bias.out_TD, targets, active.n_layers)
    for k in np.flatnonzero(targets.layer_K < active.n_layers):
        layer, pos = targets.layer_K[k], targets.pos_K[k]
        value_K[k] = rows.read_RD[k] @ mid_LTD[layer, pos]
        value_K[k] += targets.write_KD[k] @ active.write_bias_LD[layer]
    return value_K + np.asarray(targets.const_K, value_K.dtype)


def _out_values(out_TD: Array, targets: Targets, n_layers: int) -> np.ndarray:
    """``vec · out`` of the targets that read the output, [K], zero for the others."""
    host_TD, vec_KD = np.asarray(out_TD), np.asarray(targets.vec_KD)
    # numpy multiplies bfloat16 matrices to float32.
    value_K = np.zeros(len(vec_KD), (vec_KD[:1] @ host_TD[0]).dtype)
    is_out_K = np.asarray(targets.layer_K) == n_layers
    for pos in np.unique(np.asarray(targets.pos_K)[is_out_K]):
        here = np.flatnonzero(is_out_K & (targets.pos_K == pos))
        value_K[here] = vec_KD[here] @ host_TD[pos]
    return value_K
