"""Many patches of one recording in one call: sorted by layer, chunked, vmapped.

One program serves a whole chunk: the model's weights are read once for all its patches.
Layers where nothing can have changed yet for any patch of a chunk cost no MLP, which is
why patches are sorted by the layer where they begin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.active import Active
from jaxclt.clt.coder import Coder, Dictionary, in_dtype, load
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import Run
from jaxclt.patching.edits import Edits
from jaxclt.patching.modes import (
    Gates,
    Mode,
    Nudge,
    Patchable,
    Tables,
    additive,
    clean_tables,
    constrained,
    first_edited,
    hold_of,
    iterative,
)
from jaxclt.types import LMParams, Recording

__all__ = [
    "How",
    "Local",
    "chunk_size",
    "default_range",
    "make_local",
    "make_patchable",
    "patch_many",
    "patch_one",
]

FULL_TABLE_BYTES = 2 << 30  # larger dictionaries re-encode what is active somewhere
CHUNK_BYTES = 512 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """The semantics of a patch; hashable, a static argument of jit."""

    mode: Mode = "constrained"
    freeze_pattern: bool = True
    freeze_norm: bool = False
    gates: Gates = "live"  # of the local replacement model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """The local replacement model's tables, and where a feature is in them."""

    tables: Tables
    feature_LU: tuple[np.ndarray, ...]  # sorted feature indices of each layer
    complete: bool  # False: features that are silent on the whole prompt stay so

    def slots(self, layer_E: np.ndarray, feature_E: np.ndarray) -> np.ndarray:
        """Places of features in the tables, int32."""
        pairs = zip(layer_E, feature_E, strict=True)
        found = [np.searchsorted(self.feature_LU[l], f) for l, f in pairs]
        return np.array(found, np.int32)


def make_patchable(
    dictionary: Dictionary, params: LMParams, recording: Recording, cfg: LMConfig
) -> Patchable:
    """A recording and the dictionary's conventions together."""
    coder = dictionary.coder(cfg)
    skips = [
        coder.skip(dictionary.fixed(params, layer)) for layer in range(cfg.n_layers)
    ]
    skip_LDD = None
    if skips[0] is not None:
        dtype = recording.mid_LTD.dtype
        skip_LDD = jnp.stack([jnp.asarray(W, dtype) for W in skips])
    return Patchable(
        params=params, recording=recording, skip_LDD=skip_LDD, cfg=cfg, coder=coder
    )


_clean_tables = jax.jit(clean_tables)


def make_local(
    dictionary: Dictionary,
    model: Patchable,
    active: Active,
    *,
    also: np.ndarray | None = None,
    limit: int = FULL_TABLE_BYTES,
) -> Local:
    """What the local replacement model re-encodes.

    Args:
      dictionary: whose features.
      model: the recording.
      active: its active features.
      also: int (layer, feature) rows that must be in the tables, edited ones.
      limit: bytes of encoder and decoder rows above which only features that are active
        somewhere on the prompt are held.
    """
    rec, coder, params = model.recording, model.coder, model.params
    L, F, dtype = model.cfg.n_layers, coder.shape.n_features, rec.mid_LTD.dtype
    own = not jax.tree.leaves(dictionary.encoders(params, 0))
    size = L * F * (coder.shape.span + 1) * model.cfg.d_model * dtype.itemsize
    if own or size <= limit:
        weights = load(dictionary, params, model.cfg).weights
        tables = Tables(enc=weights.enc, dec=weights.dec)
        every = (np.arange(F),) * L
        # Of neurons only those that counted on the prompt respond.
        complete = not coder.chooses
    else:
        also = np.zeros((0, 2), int) if also is None else also
        every = _level(
            [
                np.union1d(
                    active.feature_A[active.of_layer(layer)],
                    also[also[:, 0] == layer, 1],
                )
                for layer in range(L)
            ],
            F,
        )
        tables, complete = _rows(dictionary, params, every, coder, dtype), False
    return Local(
        tables=_clean_tables(model, tables), feature_LU=every, complete=complete
    )


def _level(wanted: list[np.ndarray], n_features: int) -> tuple[np.ndarray, ...]:
    """As many features of every layer, sorted: the wanted ones and the first others."""
    most = max(1, *map(len, wanted))
    every = np.arange(n_features)
    return tuple(
        np.union1d(some, np.setdiff1d(every, some)[: most - len(some)])
        for some in wanted
    )


def _rows(
    dictionary: Dictionary,
    params: LMParams,
    every: tuple[np.ndarray, ...],
    coder: Coder,
    dtype: Any,
) -> Tables:
    """Weights of the chosen features of each layer."""
    U, M, D = len(every[0]), coder.shape.span, coder.shape.d_model
    dec_LUMD = np.zeros((len(every), U, M, D), dtype)
    encs = []
    for layer, feature_U in enumerate(every):
        encs.append(in_dtype(dictionary.encoders(params, layer, feature_U), dtype))
        rows_UMD = dictionary.decoders(params, layer, feature_U)
        dec_LUMD[layer, :, : rows_UMD.shape[1]] = rows_UMD
    enc = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *encs)
    return Tables(enc=enc, dec=jnp.asarray(dec_LUMD))


def default_range(
    layer_E: np.ndarray, *, span: int, n_layers: int, mode: Mode
) -> tuple[int, int]:
    """First and last layer of a patch for which the user gave none.

    From the first edited layer to two layers behind the last edited one (Circuit
    Tracing 2025, section G.2). The additive mode takes all layers.

    Constrained patches end where the dictionary's writes end: what a per-layer
    transcoder writes is all in its own layer, and a longer range would only shut out
    the model's answer. For the same reason they leave the model's last MLP to answer
    unless it is edited itself: once it is clamped too, nothing of the model responds
    but attention, and the patch returns the graph's own edges to the targets (maths
    15.9), whatever the model would have done.
    """
    if mode == "additive":
        return 0, n_layers - 1
    edited = int(layer_E.max())
    last = min(edited + 2, n_layers - 1)
    if mode == "constrained":
        last = max(edited, min(edited + span - 1, last, n_layers - 2))
    return int(layer_E.min()), last


def patch_one(
    model: Patchable,
    edits: Edits,
    layers_2: Array,
    local: tuple[Tables, Array] | None,
    *,
    how: How,
    flags: tuple[Array, Array] | None = None,
    nudge: Nudge | None = None,
) -> Run:
    """One patch in any mode; a pure function to jit, vmap or differentiate.

    Args:
      model: the recording.
      edits: what to change.
      layers_2: first and last layer of the range, included.
      local: tables and the edited features' slots, for the iterative mode.
      how: the semantics.
      flags: (live_L, local_L) of the batch that this patch is part of.
      nudge: for the iterative mode, a perturbation of the stream.
    """
    hold = hold_of(model.recording, pattern=how.freeze_pattern, norm=how.freeze_norm)
    live_L, local_L = flags or (None, None)
    first, last = layers_2[0], layers_2[1]
    if how.mode == "constrained":
        return constrained(model, edits, first, last, hold=hold, live_L=live_L)
    if how.mode == "additive":
        return additive(model, edits, first, last, hold=hold, live_L=live_L)
    assert local is not None
    tables, slot_E = local
    return iterative(
        model,
        edits,
        slot_E,
        tables,
        first,
        last,
        hold=hold,
        gates=how.gates,
        live_L=live_L,
        local_L=local_L,
        nudge=nudge,
    )


Measure = Callable[[Patchable, Run, Any], Any]


@partial(jax.jit, static_argnames=("how", "measure"))
def _chunk(
    model: Patchable,
    edits: Edits,
    layers_B2: Array,
    tables: Tables | None,
    slot_BE: Array | None,
    ask: Any,
    *,
    how: How,
    measure: Measure,
) -> Any:
    index_L = jnp.arange(model.cfg.n_layers, dtype=jnp.int32)
    first_B1, last_B1 = layers_B2[:, :1], layers_B2[:, 1:]
    edited_L = (edits.features.layer_E[..., None] == index_L[None, None]).any((0, 1))
    inside_L = ((index_L[None] >= first_B1) & (index_L[None] <= last_B1)).any(0)
    if how.mode == "additive":
        live_L = index_L > first_edited(edits.features.layer_E)
    else:
        live_L = (index_L[None] > last_B1).any(0)

    def one(edits: Edits, layers_2: Array, slot_E: Array | None) -> Any:
        local = None if tables is None or slot_E is None else (tables, slot_E)
        flags = (live_L, inside_L | edited_L)
        done = patch_one(model, edits, layers_2, local, how=how, flags=flags)
        return measure(model, done, ask)

    return jax.vmap(one)(edits, layers_B2, slot_BE)


def chunk_size(model: Patchable, n_edits: int, span: int) -> int:
    """How many patches fit into `CHUNK_BYTES`, at most 64."""
    L, T, D = model.recording.mid_LTD.shape
    per_patch = D * (3 * L * T + 2 * span * T + n_edits * (span + 2)) + 8 * T * (
        model.cfg.d_mlp
    )
    per_patch += 2 * model.cfg.n_heads * T * T  # a layer's patterns, where they respond
    size = CHUNK_BYTES // (per_patch * model.recording.mid_LTD.dtype.itemsize)
    return int(max(1, min(64, size)))


def patch_many(
    model: Patchable,
    edits: Edits,
    layers_B2: np.ndarray,
    *,
    how: How,
    measure: Measure,
    ask: Any = None,
    local: Local | None = None,
    slot_BE: np.ndarray | None = None,
    chunk: int | None = None,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """B separate patches, measured; compiled once per shape.

    Args:
      model: the recording.
      edits: leaves with a leading B, see `batch_edits`.
      layers_B2: first and last layer of every patch's range.
      how: the semantics of all of them.
      measure: (model, run, ask) -> arrays, for one patch; a function defined once, as
        it is a static argument.
      ask: what `measure` gets besides.
      local: for the iterative mode.
      slot_BE: the edited features' places in its tables.
      chunk: patches run together, padded up to; None: as many as fit, at most B.
      on_done: progress, (patches done, patches planned).

    Returns:
      What `measure` returns, numpy, with a leading B in the given order.
    """
    B, E = np.shape(edits.factor_E)
    # A given size is padded up to, so that batches of any length share a program.
    size = chunk or min(chunk_size(model, E, edits.features.span), B)
    order = np.lexsort((layers_B2[:, 1], layers_B2[:, 0]))
    parts = []
    for start in range(0, B, size):
        index = order[start : start + size]
        full = np.concatenate([index, np.repeat(index[-1:], size - len(index))])
        part = jax.tree.map(lambda x, i=full: np.asarray(x)[i], edits)
        done = _chunk(
            model,
            part,
            np.asarray(layers_B2, np.int32)[full],
            None if local is None or slot_BE is None else local.tables,
            None if slot_BE is None else slot_BE[full],
            ask,
            how=how,
            measure=measure,
        )
        kept = slice(len(index))
        parts.append(jax.tree.map(lambda x, i=kept: np.asarray(x)[i], done))
        on_done(min(start + size, B), B)
    back = np.argsort(order)
    return jax.tree.map(lambda *x: np.concatenate(x)[back], *parts)
