"""How a perturbation of the stream spreads, in the replacement model and the model.

A vector is added where the MLP of a layer reads, at one position, in the local
replacement model and in the model, and the changes of their streams are compared at all
later layers and positions (Circuit Tracing 2025, sections 5.3 and G.3; maths 16.4 says
what is held in each). For neurons, a replacement model with frozen norms also keeps
their gates, as graphs do, and one with live norms computes them: with all neurons it is
the model itself.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.lm import layers
from jaxclt.lm.run import Run
from jaxclt.patching.batch import in_chunks
from jaxclt.patching.change import Change
from jaxclt.patching.how import How
from jaxclt.patching.local import Tables
from jaxclt.patching.modes import Needed, Nudge, needed, patched, underlying
from jaxclt.patching.patchable import Patchable, hold_of, read
from jaxclt.precision import jit

__all__ = ["Agreement", "Perturbation", "agreements", "compare", "perturb_many"]


@struct.dataclass
class Perturbation:
    """One perturbation: a nudge at `nudge.layer`, or a change of an earlier feature.

    An upstream perturbation has a change with an effect and a zero nudge; the others a
    nudge and a change of nothing. Both know their slots in the tables.
    """

    nudge: Nudge
    change: Change
    start: Array  # int32, layer from which the replacement model runs
    pos: Array  # int32, first position that is compared


@struct.dataclass
class Agreement:
    """Per measured layer; nan before the perturbation."""

    cosine_L: Array
    nmse_L: Array
    ratio_L: Array  # |delta| / |delta'|
    finite: Array  # bool, of both responses: a perturbation may diverge
    # Features that the replacement model's response switches on or off, from the
    # perturbed layer on; nan where gates are held or move smoothly.
    flipped: Array | None = None


def compare(local_LTD: Array, real_LTD: Array) -> Agreement:
    """Cosine, normalised squared error and size ratio of two responses, by layer.

    ``nmse = 1 + ratio^2 - 2 ratio cosine`` (maths 16.7).
    """
    inner_L = (local_LTD * real_LTD).sum((1, 2))
    local_L, real_L = ((x * x).sum((1, 2)) for x in (local_LTD, real_LTD))
    error_L = jnp.square(local_LTD - real_LTD).sum((1, 2))
    return Agreement(
        cosine_L=inner_L / jnp.sqrt(local_L * real_L),
        nmse_L=error_L / real_L,
        ratio_L=jnp.sqrt(local_L / real_L),
        finite=jnp.isfinite(local_L + real_L).all(),
        flipped=jnp.full((), jnp.nan, inner_L.dtype),
    )


def agreements(
    model: Patchable,
    tables: Tables,
    perturbation: Perturbation,
    *,
    hows: tuple[How, ...],
    shared: bool = False,
    need: Needed | None = None,
) -> tuple[Agreement, ...]:
    """How one perturbation spreads in the replacement model and in the model.

    Args:
      model: the recording.
      tables: of the replacement model.
      perturbation: what is changed.
      hows: iterative; what of the replacement model is held.
      shared: the model gets the same nudge in all of them (not so upstream, where it
        gets what the replacement model makes of the change): it runs once.
      need: of the batch that this one is part of, see `patched`.
    """
    rec, nudge, L = model.recording, perturbation.nudge, model.cfg.n_layers
    index_L = jnp.arange(L, dtype=jnp.int32)
    at_L = (index_L == nudge.layer)[:, None, None]
    zero = jnp.zeros((), rec.mid_LTD.dtype)

    def change(run: Run, nudge: Nudge) -> Array:
        """Of the stream where MLPs read; after attention, taps come before a nudge."""
        moved_LTD = run.taps.mid_TD - rec.mid_LTD
        if model.cfg.parallel:
            return moved_LTD
        return moved_LTD + jnp.where(at_L, nudge.delta_TD[None], zero)

    after_T = jnp.arange(len(rec.token_T), dtype=jnp.int32) >= perturbation.pos
    before_L = index_L < nudge.layer
    out, real_LTD = [], None
    for how in hows:
        done = patched(
            model,
            perturbation.change,
            _layers(perturbation, L),
            how=how,
            tables=tables,
            need=need,
            nudge=nudge,
        )
        local_LTD = change(done, nudge)
        if real_LTD is None or not shared:
            # The model gets what the replacement model's stream holds at the layer.
            given = Nudge(layer=nudge.layer, delta_TD=local_LTD[nudge.layer])
            real = underlying(model, given.layer, hold_of(rec, How()), nudge=given)
            real_LTD = change(real, given)
        found = compare(
            jnp.where(after_T[None, :, None], local_LTD, zero),
            jnp.where(after_T[None, :, None], real_LTD, zero),
        )
        cosine_L, nmse_L, ratio_L = (
            jnp.where(before_L, jnp.full((), jnp.nan, x_L.dtype), x_L)
            for x_L in (found.cosine_L, found.nmse_L, found.ratio_L)
        )
        flipped = found.flipped
        if how.gates == "live" and not (model.coder.gated or model.coder.chooses):
            there_LT = ~before_L[:, None] & after_T[None]
            count_LT = _flips(model, tables, rec.mid_LTD + local_LTD, how=how)
            count = jnp.where(there_LT, count_LT, 0).sum()
            flipped = count.astype(cosine_L.dtype)
        out.append(Agreement(cosine_L, nmse_L, ratio_L, found.finite, flipped))
    return tuple(out)


def _flips(model: Patchable, tables: Tables, mid_LTD: Array, *, how: How) -> Array:
    """How many features a stream has on that the recording has off, or the other way,
    by layer and position [L, T]."""
    rec, eps = model.recording, model.cfg.norm_eps

    def one(x: Any) -> Array:
        p, table, mid_TD, scale_T, post_T = x
        if how.norms == "live":
            scale_T = layers.norm_scale(mid_TD, layers.mlp_norm(p), eps=eps)
        read_TD = read(model, mid_TD, scale_T, p)
        found = model.coder.encode(p, table.enc, read_TD, post_T)
        return (found.on_TF != table.on_LTU).sum(1)

    scales = rec.frozen.mlp_scale_LT, rec.frozen.post_mlp_scale_LT
    return jax.lax.map(one, (model.params.blocks, tables, mid_LTD, *scales))


def _layers(perturbation: Perturbation, n_layers: int) -> Array:
    """First and last layer of the replacement model, [2] or, of a batch, [B, 2]."""
    start = jnp.asarray(perturbation.start)
    return jnp.stack([start, jnp.full_like(start, n_layers - 1)], -1)


@partial(jit, static_argnames=("hows", "shared"))
def _chunk(
    model: Patchable,
    tables: Tables,
    perturbations: Perturbation,
    *,
    hows: tuple[How, ...],
    shared: bool,
) -> tuple[Agreement, ...]:
    L = model.cfg.n_layers
    layers_B2 = _layers(perturbations, L)
    need = needed(perturbations.change, layers_B2, how=hows[0], n_layers=L)
    one = partial(agreements, model, tables, hows=hows, shared=shared, need=need)
    return jax.vmap(one)(perturbations)


def perturb_many(
    model: Patchable,
    tables: Tables,
    perturbations: Perturbation,
    *,
    hows: tuple[How, ...],
    shared: bool = False,
    chunk: int = 16,
) -> tuple[Agreement, ...]:
    """`agreements` of many perturbations, leaves with a leading B; numpy.

    Chunks are padded up to.
    """
    start_B = np.asarray(perturbations.start)
    order_B = np.argsort(start_B, kind="stable")
    call = partial(_chunk, model, tables, hows=hows, shared=shared)
    return in_chunks(call, perturbations, order_B, chunk)


def upstream(change: Change, layer_B: np.ndarray, n_tokens: int) -> Perturbation:
    """The perturbations that changes [B, 1] of earlier features cause at layers."""
    B, _, _, D = change.features.decoder_EMD.shape
    none_BTD: Any = np.zeros((B, n_tokens, D), change.factor_E.dtype)
    at_B: Any = np.asarray(layer_B, np.int32)
    start_B, pos_B, _ = change.node_E3[:, 0].T
    return Perturbation(Nudge(at_B, none_BTD), change, start_B, pos_B)


def nudged(
    change: Change,
    layer_B: np.ndarray,
    pos_B: np.ndarray,
    vector_BD: np.ndarray,
    n_tokens: int,
) -> Perturbation:
    """Vectors added to the stream; the change [B, 1] only lends its shape."""
    B, D = vector_BD.shape
    delta_BTD: Any = np.zeros((B, n_tokens, D), vector_BD.dtype)
    delta_BTD[np.arange(B), pos_B] = vector_BD
    none_B1 = np.full((B, 1), -1, np.int32)
    idle = dataclasses.replace(
        change, features=dataclasses.replace(change.features, layer_E=none_B1)
    )
    at_B: Any = np.asarray(layer_B, np.int32)
    first_B: Any = np.asarray(pos_B, np.int32)
    return Perturbation(Nudge(at_B, delta_BTD), idle, at_B, first_B)
