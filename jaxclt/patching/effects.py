"""What a patch does, measured on its run: logits, divergence, activations."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.lm.run import Run, cap_logits, readout
from jaxclt.patching.features import Features, activation
from jaxclt.patching.patchable import Patchable
from jaxclt.precision import precise

__all__ = [
    "Ask",
    "Effect",
    "clean_effect",
    "diverged",
    "measure_effect",
    "nats",
    "sound",
    "watch_values",
]


@struct.dataclass
class Ask:
    """What to measure; `watch` is downstream features, `last` the position read."""

    token_K: Array  # int32
    last: Array  # int32 scalar
    watch: Features | None = None
    n_top: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Effect:
    """The model's answer under a patch."""

    kl: Array  # nats, KL(clean || patched) at the position read
    logit_K: Array  # demeaned and before any cap, as the graph's readout
    raw_logit_K: Array
    prob_K: Array
    top_token_J: Array  # most probable tokens
    top_prob_J: Array
    watch_W: Array | None  # activations of the watched features


def diverged(effect: Effect) -> np.ndarray:
    """Whether a patch, each of a batch, left the range of its numbers: no answer."""
    parts = (effect.logit_K, effect.raw_logit_K, effect.prob_K)
    fine = np.isfinite(np.asarray(effect.kl))
    for part in parts:
        fine = fine & np.isfinite(np.asarray(part)).all(-1)
    return ~fine


def nats(kl: float) -> float | None:
    """A divergence, which rounding may leave below 0; None where there is no answer."""
    return max(0.0, float(kl)) if math.isfinite(kl) else None


def measure_effect(model: Patchable, done: Run, ask: Ask) -> Effect:
    """Measure one run of a patch."""
    logit_V = readout(model.params, done.out_TD[ask.last])
    logit_V = jnp.where(sound(done), logit_V, jnp.full((), jnp.nan, logit_V.dtype))
    watch = None if ask.watch is None else watch_values(model, done, ask.watch)
    return _answer(model, logit_V, ask, watch)


def clean_effect(model: Patchable, ask: Ask) -> Effect:
    """The same of the recording itself."""
    logit_V = readout(model.params, model.recording.out_TD[ask.last])
    watch = None if ask.watch is None else ask.watch.value_E
    return _answer(model, logit_V, ask, watch)


@precise
def watch_values(model: Patchable, done: Run, watch: Features) -> Array:
    """Activations [W] of watched features in a run."""
    at = watch.layer_E, watch.pos_E
    blocks = jax.tree.map(lambda x: x[watch.layer_E], model.params.blocks)
    taps = done.taps
    return activation(
        watch, blocks, taps.mid_TD[at], taps.mlp_scale_T[at], coder=model.coder
    )


def sound(done: Run) -> Array:
    """Whether no norm of a pass met numbers whose squares are too large.

    Its reciprocal denominator is then 0, which makes zeros of them: no NaN tells.
    """
    taps = done.taps
    scales = (taps.attn_scale_T, taps.mlp_scale_T, taps.post_attn_scale_T)
    scales = (*scales, done.out_scale_T)
    parts = [(scale > 0).all() for scale in scales if scale is not None]
    return jnp.stack(parts).all()


def _answer(
    model: Patchable, uncapped_V: Array, ask: Ask, watch: Array | None
) -> Effect:
    """The answer that readouts before any cap are."""
    clean_V = readout(model.params, model.recording.out_TD[ask.last])
    logit_V = cap_logits(model.params, uncapped_V)
    log_V = jax.nn.log_softmax(logit_V)
    clean_log_V = jax.nn.log_softmax(cap_logits(model.params, clean_V))
    top_prob_J, top_token_J = jax.lax.top_k(jnp.exp(log_V), ask.n_top)
    return Effect(
        kl=(jnp.exp(clean_log_V) * (clean_log_V - log_V)).sum(),
        logit_K=uncapped_V[ask.token_K] - uncapped_V.mean(),
        raw_logit_K=logit_V[ask.token_K],
        prob_K=jnp.exp(log_V)[ask.token_K],
        top_token_J=top_token_J,
        top_prob_J=top_prob_J,
        watch_W=watch,
    )
