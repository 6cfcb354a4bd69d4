"""What rows read when norms and gates answer to a change: reads of the live ways.

Targets are those of `jaxclt.graph.targets`, placed; features those of a prompt, with
what their dictionary says of their norm and gates (`jaxclt.clt.live`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.coder import Dictionary
from jaxclt.clt.live import live_feature_reads, mlp_unit
from jaxclt.clt.sites import reads_past_norm
from jaxclt.graph.bank import RowTargets
from jaxclt.graph.prompt import Prompt
from jaxclt.lm.layers import attn_norm, live_reads, out_norm, unit

__all__ = ["answering", "answering_rows", "past_final_norm", "rows_in_parts"]
__all__ += ["summed", "written_live"]


def answering_rows(p: Prompt, dictionary: Dictionary) -> RowTargets:
    """What features and targets read: as held, and what norms and gates add to that."""
    a, rows = p.active, p.all_rows()
    A = len(a.layer_A)
    place_A3 = np.stack([a.layer_A, a.pos_A, a.feature_A], 1)
    found = live_feature_reads(
        dictionary, p.params, p.recording, place_A3, rows.read_RD[:A], cfg=p.cfg
    )
    past_norm = reads_past_norm(dictionary.coder(p.cfg).site)
    norm_KD = _target_norms(p, rows.read_RD[A:], past_norm=past_norm)
    norm_RD = np.concatenate([found.norm_KD, norm_KD])
    gate_RD = np.concatenate([found.gate_KD, np.asarray(p.targets.gate_KD)])
    return dataclasses.replace(rows, more_RSD=np.stack([norm_RD, gate_RD], 1))


def summed(rows: RowTargets) -> RowTargets:
    """The same with all that a row reads as one vector."""
    return RowTargets(
        layer_R=rows.layer_R, pos_R=rows.pos_R, read_RD=rows.read_SRD.sum(0)
    )


def rows_in_parts(rows: RowTargets) -> tuple[RowTargets, np.ndarray]:
    """What states of `jaxclt.graph.live.Parts` read, and which rows have live gates."""
    norm_R1D, gate_R1D = np.split(rows.more_RSD, 2, axis=1)
    states = dataclasses.replace(summed(rows), more_RSD=norm_R1D)
    return states, np.asarray(gate_R1D.any((1, 2)))


def answering(p: Prompt) -> Prompt:
    """The prompt with the norm before what targets read live, but for the final one."""
    t = p.targets
    vec_KD, write_KD = np.array(t.vec_KD), np.array(t.write_KD)
    for k in np.flatnonzero(t.norm_K).tolist():
        layer, at = int(t.layer_K[k]), np.asarray(t.pos_K)[[k]]
        if t.norm_K[k] == 1:
            unit_1D = mlp_unit(p.params, p.recording, layer, at)
        else:
            unit_1D = _attn_unit(p, layer if p.cfg.parallel else layer + 1, at)
        for read_KD in (vec_KD, write_KD):
            read_KD[[k]] = live_reads(jnp.asarray(read_KD[[k]]), unit_1D)
    targets = dataclasses.replace(t, vec_KD=vec_KD, write_KD=write_KD)
    return dataclasses.replace(p, targets=targets)


def written_live(p: Prompt) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Targets that read an MLP's output, and their edges to what writes it.

    As `Prompt.written` has them, norms held, and what live norms add to that.
    """
    live = dict(answering(p).written())
    for k, edge_N in p.written():
        yield k, edge_N, live[k] - edge_N


def past_final_norm(p: Prompt, read_KD: np.ndarray, pos_K: np.ndarray) -> np.ndarray:
    """Reads [K, D] through the final norm with its denominator live.

    Args:
      p: the prompt.
      read_KD: the same with it held.
      pos_K: where each is.
    """
    scale_K = p.recording.frozen.out_scale_T[pos_K]
    unit_KD = unit(p.recording.end_TD[pos_K], scale_K, out_norm(p.params))
    return np.asarray(live_reads(jnp.asarray(read_KD), unit_KD))


def _attn_unit(p: Prompt, layer: int, pos_K: np.ndarray) -> Array:
    norm = attn_norm(p.params.blocks).of_layer(layer)
    scale_K = p.recording.frozen.attn_scale_LT[layer, pos_K]
    return unit(p.recording.resid_LTD[layer, pos_K], scale_K, norm)


def _target_norms(p: Prompt, held_KD: np.ndarray, *, past_norm: bool) -> np.ndarray:
    """What live denominators add to the reads of targets, [K, D]."""
    live = answering(p)
    t, live_KD = live.targets, live.target_rows().read_RD.copy()
    layer_K, pos_K = np.asarray(t.layer_K), np.asarray(t.pos_K)
    out = np.flatnonzero(layer_K == p.cfg.n_layers)
    live_KD[out] = past_final_norm(p, live_KD[out], pos_K[out])
    if p.active.skip is not None and past_norm:
        for k in np.flatnonzero(np.asarray(t.write_KD).any(1)).tolist():
            layer, at = int(layer_K[k]), pos_K[[k]]
            read_1D = p.active.skip.at(layer, at).read(np.asarray(t.write_KD)[[k]])
            unit_1D = mlp_unit(p.params, p.recording, layer, at)
            live_KD[[k]] += live_reads(jnp.asarray(read_1D), unit_1D) - read_1D
    return live_KD - held_KD
