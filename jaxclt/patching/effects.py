"""What a patch does, measured on its run: logits, divergence, activations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxclt.lm.run import Run, cap_logits, readout
from jaxclt.patching.features import Features, activation
from jaxclt.patching.modes import Patchable

__all__ = ["Ask", "Effect", "clean_effect", "measure_effect", "watch_values"]


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


def measure_effect(model: Patchable, done: Run, ask: Ask) -> Effect:
    """Measure one run of a patch."""
    clean_V = readout(model.params, model.recording.out_TD[ask.last])
    return _effect(model, done, ask, clean_V)


def clean_effect(model: Patchable, ask: Ask) -> Effect:
    """The same of the recording itself."""
    rec = model.recording
    logit_V = readout(model.params, rec.out_TD[ask.last])
    watch = None if ask.watch is None else ask.watch.value_E
    return _answer(model, logit_V, logit_V, ask, watch)


def watch_values(model: Patchable, done: Run, watch: Features) -> Array:
    """Activations [W] of watched features in a run."""
    at = watch.layer_E, watch.pos_E
    blocks = jax.tree.map(lambda x: x[watch.layer_E], model.params.blocks)
    taps = done.taps
    return activation(
        watch, blocks, taps.mid_TD[at], taps.mlp_scale_T[at], coder=model.coder
    )


def _effect(model: Patchable, done: Run, ask: Ask, clean_V: Array) -> Effect:
    logit_V = readout(model.params, done.out_TD[ask.last])
    watch = None if ask.watch is None else watch_values(model, done, ask.watch)
    return _answer(model, logit_V, clean_V, ask, watch)


def _answer(
    model: Patchable, uncapped_V: Array, clean_V: Array, ask: Ask, watch: Array | None
) -> Effect:
    """The answer that readouts before any cap are."""
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
