"""How a patch moves attention patterns, predicted and measured (maths 22.71).

To first order ``dA(q, k) = A(q, k) (ds(q, k) - sum over k' of A(q, k') ds(q, k'))``:
the derivative of the local replacement model with attention and norms live, gates held.
For whole ablations that model itself is run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.patching.change import Change
from jaxclt.patching.finite import FINITE
from jaxclt.patching.how import How
from jaxclt.patching.local import Tables
from jaxclt.patching.modes import patched
from jaxclt.patching.patchable import Patchable
from jaxclt.precision import jit

__all__ = ["LIVE", "Moved", "moved_patterns"]

LIVE = How(mode="additive", patterns="live")


class Moved(NamedTuple):
    """Changes of the cells that move most, of B patches; and of all cells together."""

    predicted_BX: Array
    measured_BX: Array
    cosine_B: Array  # of all cells


@partial(jit, static_argnames="n_cells")
def moved_patterns(
    model: Patchable, change: Change, tables: Tables, factor: Array, *, n_cells: int
) -> tuple[Moved, Moved]:
    """What ablations and small patches do to attention patterns.

    Args:
      model: the recording, which has its patterns.
      change: ablations, leaves with a leading B, which know their slots in the tables.
      tables: of the local replacement model.
      factor: of the small patches.
      n_cells: X, cells of all heads to return of each patch.

    Returns:
      Of the ablations, predicted by the local replacement model; of the small patches,
      by its derivative.
    """
    L, clean_LHTS = model.cfg.n_layers, model.recording.frozen.pattern_LHTS
    assert clean_LHTS is not None
    range_2 = jnp.asarray([0, L - 1], jnp.int32)

    def patterns(change: Change, factor_E: Array, how: How) -> Array:
        change = dataclasses.replace(change, factor_E=factor_E)
        held = tables if how.mode == "iterative" else None
        done = patched(model, change, range_2, how=how, tables=held, keep_patterns=True)
        assert done.taps.pattern_HTS is not None
        return done.taps.pattern_HTS

    def one(change: Change) -> tuple[Moved, Moved]:
        one_E = jnp.ones_like(change.factor_E)
        less_E = one_E * factor - one_E

        def inside(factor_E: Array) -> tuple[Array, Array]:
            said = partial(patterns, change, how=FINITE)
            return jax.jvp(said, (factor_E,), (less_E,))

        def real(factor_E: Array) -> Array:
            return patterns(change, factor_E, LIVE) - clean_LHTS

        # One program of each for both factors.
        (ablated_LHTS, _), (_, small_LHTS) = _each(inside, one_E - one_E, one_E)
        full_LHTS, little_LHTS = _each(real, one_E - one_E, one_E + less_E)
        return (
            _compared(ablated_LHTS - clean_LHTS, full_LHTS, n_cells),
            _compared(small_LHTS, little_LHTS, n_cells),
        )

    return jax.lax.map(one, change)


def _each(f: Callable[[Array], Any], *values: Array) -> list[Any]:
    """What a function makes of values, compiled once."""
    found = jax.lax.map(f, jnp.stack(values))
    return [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(values))]


def _compared(predicted_LHTS: Array, measured_LHTS: Array, n_cells: int) -> Moved:
    """Of one patch."""
    predicted_X, measured_X = predicted_LHTS.ravel(), measured_LHTS.ravel()
    inner, *size = (
        (x_X * y_X).sum()
        for x_X, y_X in (
            (predicted_X, measured_X),
            (predicted_X, predicted_X),
            (measured_X, measured_X),
        )
    )
    # By both, since a choice by one would favour the other.
    most = jax.lax.top_k(jnp.abs(predicted_X) + jnp.abs(measured_X), n_cells)[1]
    cosine = inner / jnp.sqrt(size[0] * size[1])
    return Moved(predicted_X[most], measured_X[most], cosine)
