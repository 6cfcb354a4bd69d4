"""Sides of attention scores: a query, a key, or the key that a query meets on average.

A side is C channels of one head that are read of the stream at one position, or at
many with weights. They are affine in the stream that enters the layer as long as all
norm denominators are held. One function says how; its derivative is what reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.attending.clean import Layer

__all__ = ["Side", "Sides", "channels", "packed", "read_vector"]


class Side(NamedTuple):
    """One side of one layer."""

    is_query: bool
    head: int  # of the queries, or of the keys
    weight_T: np.ndarray  # of the first positions, as many as there are


class Sides(NamedTuple):
    """Several sides, padded to P positions."""

    is_query_S: Any
    head_S: Any
    weight_SP: Any


def packed(
    sides: Sequence[Side], size: int, n_positions: int, dtype: np.dtype
) -> Sides:
    """Sides next to each other; empty ones weigh nothing."""
    numbers = np.zeros(size, bool), np.zeros(size, np.int32)
    found = Sides(*numbers, np.zeros((size, n_positions), dtype))
    for s, side in enumerate(sides):
        found.is_query_S[s], found.head_S[s] = side.is_query, side.head
        found.weight_SP[s, : len(side.weight_T)] = side.weight_T
    return found


def channels(here: Layer, sides: Sides, resid_PD: Array) -> Array:
    """Channels [S, C] of sides, of a stream that enters the layer."""
    query_PHC, key_PGC = here.heads(resid_PD)

    def one(side: Sides) -> Array:
        is_query, head, weight_P = side
        group = jnp.minimum(head, here.cfg.n_kv_heads - 1)
        asked_PC = jnp.where(is_query, query_PHC[:, head], key_PGC[:, group])
        return jnp.einsum("P,PC->C", weight_P, asked_PC)

    # One at a time: where many streams do this together, channels are many numbers.
    return jax.lax.map(one, sides)


def read_vector(here: Layer, side: Sides, mix_C: Array) -> Array:
    """What a weighted sum of the channels of one side reads of the stream, [P, D]."""
    alone = Sides(*(leaf[None] for leaf in side))
    _, back = jax.vjp(lambda x_PD: channels(here, alone, x_PD), here.resid_TD)
    return back(mix_C[None])[0]
