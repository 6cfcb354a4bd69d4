"""Passes in which whole sets of features are held at given values (maths 16.14).

What an edit of one feature is to `jaxclt.patching.modes`, a set of thousands is here:
features are told by a mask over the replacement model's tables, not one by one, so that
"all but these" costs no more than one pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxclt.patching.effects import Ask, Effect, measure_effect
from jaxclt.patching.how import How
from jaxclt.patching.local import Tables, encode
from jaxclt.patching.modes import (
    Here,
    Needed,
    Writing,
    clamped,
    run_writing,
)
from jaxclt.patching.patchable import Patchable, hold_of
from jaxclt.precision import jit

__all__ = ["Held", "held_chunk"]


@struct.dataclass
class Held:
    """Which features are held, at which values; all of the tables' slots."""

    held_LTU: Array  # bool
    value_LTU: Array


def _writing(model: Patchable, held: Held, how: How) -> Writing:
    """MLPs write as recorded, errors included, and what features change by."""
    gates = how.of(model.coder).gates
    (T, D), span = model.recording.embed_TD.shape, model.coder.shape.span

    def write(ahead_MTD: Array, here: Here) -> tuple[Array, Array]:
        was, table = here.was, here.was.table
        assert table is not None
        clean_TU = table.clean_LTU
        assert clean_TU is not None
        a_TU = clean_TU
        if how.mode == "iterative":
            a_TU = encode(model, table, here.read_TD, here.p, was.post_T, gates=gates)
        at = was.index
        a_TU = jnp.where(held.held_LTU[at], held.value_LTU[at], a_TU)
        now_MTD = ahead_MTD + model.coder.write(here.p, table.dec, a_TU - clean_TU)
        return jnp.roll(now_MTD, -1, 0).at[-1].set(0), clamped(model, here, now_MTD[0])

    return Writing(jnp.zeros((span, T, D), model.recording.embed_TD.dtype), write)


@partial(jit, static_argnames="how")
def held_chunk(
    model: Patchable,
    tables: Tables,
    held_BLTU: Array,
    value_LTU: Array,
    ask: Ask,
    *,
    how: How,
) -> Effect:
    """B passes over all layers, in each of which some features are held; measured.

    Args:
      model: the recording.
      tables: the local replacement model's.
      held_BLTU: which features are held.
      value_LTU: at which values.
      ask: what to measure.
      how: ``constrained``: the others stay as recorded; ``iterative``: they respond.
    """
    L = model.cfg.n_layers
    never_L = jnp.zeros(L, bool)

    def one(held_LTU: Array) -> Effect:
        done: Any = run_writing(
            model,
            _writing(model, Held(held_LTU, value_LTU), how),
            jnp.asarray([0, L - 1], jnp.int32),
            Needed(never_L, ~never_L),
            hold=hold_of(model.recording, how),
            tables=tables,
            keep_patterns=False,
        )
        return measure_effect(model, done, ask)

    return jax.lax.map(one, held_BLTU)
