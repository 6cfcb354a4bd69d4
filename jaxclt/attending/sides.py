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
    group_S = jnp.minimum(sides.head_S, here.cfg.n_kv_heads - 1)
    query_PSC, key_PSC = query_PHC[:, sides.head_S], key_PGC[:, group_S]
    asked_PSC = jnp.where(sides.is_query_S[None, :, None], query_PSC, key_PSC)
    return jnp.einsum("SP,PSC->SC", sides.weight_SP, asked_PSC)


def read_vector(here: Layer, side: Sides, mix_C: Array) -> Array:
    """What a weighted sum of the channels of one side reads of the stream, [P, D]."""
    alone = Sides(*(leaf[None] for leaf in side))
    _, back = jax.vjp(lambda x_PD: channels(here, alone, x_PD), here.resid_TD)
    return back(mix_C[None])[0]
