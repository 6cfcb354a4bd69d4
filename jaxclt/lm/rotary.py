"""Rotary embeddings: how queries and keys turn with their positions."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.lm.config import LMConfig, RopeScaling
from jaxclt.types import Block

__all__ = ["frequencies", "rotary_frequencies", "rotate"]


def rotary_frequencies(
    d_head: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
    """Radians per position of every pair of channels, [C / 2] in float64."""
    freq_J = theta ** (-np.arange(0, d_head, 2) / d_head)
    if scaling is None:
        return freq_J
    if scaling.kind == "linear":
        return freq_J / scaling.factor
    if scaling.kind == "factors":
        return freq_J / np.asarray(scaling.factors)
    turns_J = scaling.n_ctx * freq_J / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_J = np.clip((turns_J - low) / (high - low), 0, 1)
    return kept_J * freq_J + (1 - kept_J) * freq_J / scaling.factor


def frequencies(p: Block, cfg: LMConfig, dtype: jnp.dtype) -> Array:
    """Rotary frequencies of one layer, of each pair of channels that turns."""
    # Angles of late positions are large: half precision would not tell them apart.
    dtype = dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
    freq_J = jnp.asarray(
        rotary_frequencies(cfg.n_turning, cfg.rope_theta, cfg.rope_scaling), dtype
    )
    if p.local_L is not None and cfg.rope_local_theta is not None:
        local_J = rotary_frequencies(cfg.n_turning, cfg.rope_local_theta)
        freq_J = jnp.where(p.local_L, jnp.asarray(local_J, dtype), freq_J)
    return freq_J if p.turning_L is None else jnp.where(p.turning_L, freq_J, 0)


def rotate(x_THC: Array, freq_J: Array, *, start: Array | int = 0) -> Array:
    """Rotary embedding by halves: channel j turns with channel j + J, others stay.

    The first row stands at position `start` of the prompt.
    """
    if len(freq_J) == 0:
        return x_THC
    x_THC, stay_THC = jnp.split(x_THC, [2 * len(freq_J)], axis=-1)
    dtype = freq_J.dtype
    pos_T = jnp.arange(len(x_THC), dtype=dtype) + jnp.asarray(start, dtype)
    angle_TJ = pos_T[:, None] * freq_J[None, :]
    cos, sin = (f(angle_TJ)[:, None, :].astype(x_THC.dtype) for f in (jnp.cos, jnp.sin))
    left, right = jnp.split(x_THC, 2, axis=-1)
    rotated = left * cos - right * sin, right * cos + left * sin
    return jnp.concatenate([*rotated, stay_THC], -1)
