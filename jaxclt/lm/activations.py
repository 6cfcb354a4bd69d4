"""The nonlinearities of MLPs, and what a neuron without a gate is gated by."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.lm.config import LMConfig
from jaxclt.types import Block

__all__ = ["activate_gate", "gate_factor"]


def activate_gate(x: Array, p: Block, *, cfg: LMConfig) -> Array:
    """The MLP's nonlinearity, act(x)."""
    return x * gate_factor(x, p, cfg=cfg)


def gate_factor(x: Array, p: Block, *, cfg: LMConfig) -> Array:
    """act(x) / x, smooth or 0-1: what a neuron without a gate is gated by."""
    match cfg.act:
        case "silu":
            return jax.nn.sigmoid(x)
        case "gelu_tanh":
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
            return 0.5 * (1 + jnp.tanh(inner))
        case "gelu":
            return 0.5 * jax.lax.erfc(x * -math.sqrt(0.5))
        case "relu":
            return (x > 0).astype(x.dtype)
        case "relu2":
            return jax.nn.relu(x)
        case "xielu":
            return _xielu_factor(x, p)


_SLOPE = 0.5  # of xIELU at zero


def _xielu_factor(x: Array, p: Block) -> Array:
    """xIELU(x) / x (arXiv 2411.13010), of one layer."""
    assert p.bend_up_L1 is not None, "it has curvatures"
    assert p.bend_down_L1 is not None, "of both sides"
    up, down = (jax.nn.softplus(bend[0]) for bend in (p.bend_up_L1, p.bend_down_L1))
    below = jnp.where(x < 0, x, -1)  # no division by zero
    curved = (_SLOPE + down) * (jnp.expm1(below) / below - 1)
    return _SLOPE + jnp.where(x < 0, curved, up * jax.nn.relu(x))
