"""Passes in which whole sets of features are held at given values (maths 16.14, 24.2).

What an edit of one feature is to `jaxclt.patching.modes`, a set of thousands is here:
features are told by a mask over the replacement model's tables, not one by one, so that
"all but these" costs no more than one pass. A mask may also say how far a feature is
held, from 0 to 1: the derivative by it, one pass back, is what holding or releasing
each feature would change to first order.
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
from jaxclt.patching.local import Tables, encode, every_value
from jaxclt.patching.modes import (
    Here,
    Needed,
    Writing,
    clamped,
    run_writing,
)
from jaxclt.patching.patchable import Patchable, hold_of
from jaxclt.precision import jit

__all__ = ["Held", "held_chunk", "held_slopes"]


@struct.dataclass
class Held:
    """Which features are held, at which values; all of the tables' slots."""

    held_LTU: Array  # bool, or how far: 0 is not at all, 1 altogether
    value_LTU: Array

    def at(self, layer: Array, a_TU: Array) -> Array:
        """Activations of one layer with what is held of them."""
        held_TU, value_TU = self.held_LTU[layer], self.value_LTU[layer]
        if held_TU.dtype == bool:
            return jnp.where(held_TU, value_TU, a_TU)
        return a_TU + held_TU * (value_TU - a_TU)


def _writing(model: Patchable, held: Held, how: How) -> Writing:
    """What MLPs write: as recorded and what features change by, or by themselves."""
    if how.mode == "additive":
        return _answering(model, held)
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
        a_TU = held.at(was.index, a_TU)
        now_MTD = ahead_MTD + model.coder.write(here.p, table.dec, a_TU - clean_TU)
        return jnp.roll(now_MTD, -1, 0).at[-1].set(0), clamped(model, here, now_MTD[0])

    return Writing(jnp.zeros((span, T, D), model.recording.embed_TD.dtype), write)


def _answering(model: Patchable, held: Held) -> Writing:
    """The MLPs' own answer, in which the held features alone are put at their values.

    Of a per-layer dictionary: writes to later layers would be counted twice.
    """

    def write(carry: None, here: Here) -> tuple[None, Array]:
        was, table = here.was, here.was.table
        assert table is not None
        a_TU = every_value(model, table, here.read_TD, here.p)
        off_TU = held.at(was.index, a_TU) - a_TU
        (off_TD,) = model.coder.write(here.p, table.dec, off_TU)
        return carry, here.real_TD + off_TD

    return Writing(None, write)


def _passed(model: Patchable, tables: Tables, held: Held, ask: Ask, how: How) -> Effect:
    """One pass over all layers in which some features are held; measured."""
    L = model.cfg.n_layers
    every_L = jnp.ones(L, bool)
    real_L = every_L if how.mode == "additive" else ~every_L
    done: Any = run_writing(
        model,
        _writing(model, held, how),
        jnp.asarray([0, L - 1], jnp.int32),
        Needed(real_L, every_L),
        hold=hold_of(model.recording, how),
        tables=tables,
        keep_patterns=False,
    )
    return measure_effect(model, done, ask)


@partial(jit, static_argnames=("how", "together"))
def held_chunk(
    model: Patchable,
    tables: Tables,
    held_BLTU: Array,
    value_LTU: Array,
    ask: Ask,
    *,
    how: How,
    together: bool = False,
) -> Effect:
    """B passes over all layers, in each of which some features are held; measured.

    Args:
      model: the recording.
      tables: the local replacement model's.
      held_BLTU: which features are held.
      value_LTU: at which values.
      ask: what to measure.
      how: ``constrained``: the others stay as recorded; ``iterative``: they respond;
        ``additive``: the model's own MLPs answer, of dictionaries that write to their
        own layer alone.
      together: side by side, which reads the weights once; otherwise one after the
        other, in the least memory.
    """

    def one(held_LTU: Array) -> Effect:
        return _passed(model, tables, Held(held_LTU, value_LTU), ask, how)

    return (jax.vmap(one) if together else partial(jax.lax.map, one))(held_BLTU)


@partial(jit, static_argnames="how")
def held_slopes(
    model: Patchable,
    tables: Tables,
    held_BLTU: Array,
    value_LTU: Array,
    ask: Ask,
    weight_K: Array,
    *,
    how: How,
) -> Array:
    """What holding a little more of each feature changes, [B, L, T, U].

    The derivative of the sum of `weight_K` times the asked demeaned logits by how far
    each feature is held: of one that is free to first order what holding it adds, of
    one that is held minus what releasing it would.

    Args:
      model: the recording.
      tables: the local replacement model's.
      held_BLTU: where it is taken, bool.
      value_LTU: at which values features are held.
      ask: what is measured.
      weight_K: of the logits.
      how: as in `held_chunk`.
    """

    def lead(held_LTU: Array) -> Array:
        held = Held(held_LTU, value_LTU)
        return _passed(model, tables, held, ask, how).logit_K @ weight_K

    return jax.vmap(jax.grad(lead))(held_BLTU.astype(value_LTU.dtype))
