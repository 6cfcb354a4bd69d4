"""Many patches of one recording in one call: sorted by layer, chunked, vmapped.

One program serves a whole chunk: the model's weights are read once for all its patches.
Layers where nothing can have changed yet for any patch of a chunk cost no MLP, which is
why patches are sorted by the layer where they begin.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxclt.patching.change import Change
from jaxclt.patching.effects import Ask, Effect, measure_effect
from jaxclt.patching.heads import Heads, in_heads
from jaxclt.patching.how import How, Mode
from jaxclt.patching.local import Tables
from jaxclt.patching.modes import needed, patched
from jaxclt.patching.patchable import Patchable
from jaxclt.precision import jit

__all__ = ["chunk_size", "default_range", "in_chunks", "patch_chunk"]

CHUNK_BYTES = 512 << 20


def default_range(
    layer_E: np.ndarray, *, span: int, n_layers: int, mode: Mode
) -> tuple[int, int]:
    """First and last layer of a patch for which the user gave none.

    From the first edited layer to two layers after the last edited one (Circuit Tracing
    2025, section G.2). The additive mode takes all layers.

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


@partial(jit, static_argnames="how")
def patch_chunk(
    model: Patchable,
    change: Change,
    layers_B2: Array,
    tables: Tables | None,
    ask: Ask,
    heads: Heads | None = None,
    *,
    how: How,
) -> Effect:
    """B separate patches, measured: leaves with a leading B, ranges [B, 2].

    If there are heads, only these see the changes, and there is no range.
    """
    need = needed(change, layers_B2, how=how, n_layers=model.cfg.n_layers)

    def one(change: Change, layers_2: Array) -> Effect:
        if heads is not None:
            done = in_heads(model, change, heads, how=how)
        else:
            done = patched(model, change, layers_2, how=how, tables=tables, need=need)
        return measure_effect(model, done, ask)

    return jax.vmap(one)(change, layers_B2)


def chunk_size(model: Patchable, n_changes: int) -> int:
    """How many patches fit into `CHUNK_BYTES`, at most 64."""
    (L, T, D), span = model.recording.mid_LTD.shape, model.coder.shape.span
    per_patch = D * (3 * L * T + 2 * span * T + n_changes * (span + 2)) + 8 * T * (
        model.cfg.d_mlp
    )
    per_patch += 2 * model.cfg.n_heads * T * T  # a layer's patterns, where they respond
    size = CHUNK_BYTES // (per_patch * model.recording.mid_LTD.dtype.itemsize)
    return int(max(1, min(64, size)))


def in_chunks(
    call: Callable[[Any], Any],
    batch: Any,
    order_B: np.ndarray,
    size: int,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """What a program returns of a batch, taken in parts that all have one shape.

    Args:
      call: the program; gets leaves with a leading axis of `size`.
      batch: leaves with a leading B.
      order_B: in which the members are taken.
      size: of a part; the last one is filled with copies of its last member.
      on_done: progress, (members done, members planned).

    Returns:
      Its leaves in numpy, with a leading B in the order of `batch`.
    """
    B, parts = len(order_B), []
    for start in range(0, B, size):
        index = order_B[start : start + size]
        full = np.concatenate([index, np.repeat(index[-1:], size - len(index))])
        done = call(jax.tree.map(lambda x, i=full: np.asarray(x)[i], batch))
        kept = slice(len(index))
        parts.append(jax.tree.map(lambda x, i=kept: np.asarray(x)[i], done))
        on_done(min(start + size, B), B)
    back = np.argsort(order_B)
    return jax.tree.map(lambda *x: np.concatenate(x)[back], *parts)
