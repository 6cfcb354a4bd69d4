"""Text after a patched prompt, edits held.

The patched prompt keeps its stream: new tokens see its keys and values, which are
those of the patched pass in any mode. They run the real model, one position at a time;
edits without an end also act on them, additively, for there is no recording to clamp.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.clt.coder import Dictionary, in_dtype
from jaxclt.lm import layers
from jaxclt.lm.block import Past
from jaxclt.lm.cache import past_of
from jaxclt.lm.run import Policy, Run, cap_logits, embed, readout, run
from jaxclt.patching.change import Change
from jaxclt.patching.effects import sound
from jaxclt.patching.features import Features, activation
from jaxclt.patching.modes import pending
from jaxclt.patching.patchable import Patchable, read
from jaxclt.precision import jit
from jaxclt.types import Block

__all__ = ["Rivals", "continue_prompt", "rivals"]


@struct.dataclass
class Rivals:
    """All features of the edited layers, where they compete to be active."""

    layer_U: Array  # int32
    enc: Any  # encoders, leaves with a leading U


def rivals(dictionary: Dictionary, model: Patchable, later: Change) -> Rivals | None:
    """What decides on new tokens whether edited features are active.

    None where a feature's own gate does.
    """
    if not model.coder.competes:
        return None
    layer_U = np.unique(later.features.layer_E)
    dtype = model.recording.mid_LTD.dtype
    encoders = [
        in_dtype(dictionary.encoders(model.params, int(layer)), dtype)
        for layer in layer_U
    ]
    return Rivals(
        layer_U=jnp.asarray(layer_U),
        enc=jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *encoders),
    )


@partial(jit, static_argnames="n_new")
def continue_prompt(
    model: Patchable,
    done: Run,
    later: Change | None,
    layers_2: Array,
    key: Array,
    temperature: Array,
    *,
    n_new: int,
    among: Rivals | None = None,
) -> Array:
    """Token ids [n_new] that follow a patched prompt; -1 where a patch diverged.

    Args:
      model: the recording.
      done: the patched pass on the prompt.
      later: what changes at positions after the prompt, None for nothing.
      layers_2: first and last layer that `later` writes to.
      key: for sampling.
      temperature: of the softmax that is sampled; 0 takes the most probable token.
      n_new: tokens to generate.
      among: what edited features compete with, see `rivals`.
    """
    T, dtype = len(model.recording.token_T), model.recording.token_T.dtype
    index_L = jnp.arange(model.cfg.n_layers, dtype=jnp.int32)

    def choose(done: Run, key: Array) -> Array:
        uncapped_V = readout(model.params, done.out_TD[-1])
        logit_V = cap_logits(model.params, uncapped_V)
        warm = jnp.where(temperature > 0, temperature, jnp.ones_like(temperature))
        drawn = jax.random.categorical(key, logit_V / warm.astype(logit_V.dtype))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logit_V))
        fine = sound(done) & jnp.isfinite(uncapped_V).all()
        return jnp.where(fine, token, -1).astype(dtype)

    def step(
        state: tuple[Array, Past], now: tuple[Array, Array]
    ) -> tuple[tuple[Array, Past], Array]:
        (token, past), (t, key) = state, now
        # The one row of this pass is position t.
        here = None if later is None else _at_start(later, t)

        def write(
            carry: Any, mid_TD: Array, scale_T: Array, p: Block, x: Array
        ) -> tuple[Any, Array]:
            real_TD, post_T = layers.mlp_at(p, mid_TD, scale_T, cfg=model.cfg)
            if here is None:
                return carry, real_TD
            f, index = here.features, x
            now_E = _activation(model, f, p, mid_TD, scale_T, post_T, index, among)
            carry = jnp.where(f.layer_E == index, here.amounts(now_E), carry)
            inside = (layers_2[0] <= index) & (index <= layers_2[1])
            added_TD = pending(here, carry, index, mid_TD)
            return carry, jnp.where(inside, real_TD + added_TD, real_TD)

        none_E = None if here is None else jnp.zeros_like(here.factor_E)
        again = run(
            model.params,
            embed(model.params, token[None], start=t),
            Policy(write, none_E, index_L),
            cfg=model.cfg,
            past=past,
            start=t,
        )
        assert again.taps.past is not None
        return (choose(again, key), again.taps.past), token

    keys = jax.random.split(key, n_new)
    past = past_of(model.params, done.taps, cfg=model.cfg, room=n_new - 1)
    first = choose(done, keys[0])
    position = jnp.arange(T, T + n_new - 1, dtype=jnp.int32)
    (last, _), before = jax.lax.scan(step, (first, past), (position, keys[1:]))
    return jnp.append(before, last)


def _activation(
    model: Patchable,
    f: Features,
    p: Block,
    mid_1D: Array,
    scale_1: Array,
    post_1: Array | None,
    index: Array,
    among: Rivals | None,
) -> Array:
    """Activations [E] at the one new position, of the features of layer `index`."""
    if among is None:
        if f.post_E is not None and post_1 is not None:
            f = dataclasses.replace(f, post_E=jnp.broadcast_to(post_1, f.post_E.shape))
        E = len(f.value_E)
        mid_ED = jnp.broadcast_to(mid_1D, (E, mid_1D.shape[1]))
        scale_E = jnp.broadcast_to(scale_1, (E,))
        return activation(f, p, mid_ED, scale_E, coder=model.coder)

    def compete() -> Array:
        at = jnp.argmax(among.layer_U == index)
        enc = jax.tree.map(lambda x: x[at], among.enc)
        read_1D = read(model, mid_1D, scale_1, p)
        return model.coder.encode(p, enc, read_1D, post_1).a_TF[0, f.feature_E]

    here = (among.layer_U == index).any()
    return jax.lax.cond(here, compete, lambda: jnp.zeros_like(f.value_E))


def _at_start(change: Change, t: Array) -> Change:
    """The same with positions counted from t."""
    f = change.features
    return dataclasses.replace(
        change, features=dataclasses.replace(f, pos_E=f.pos_E - t)
    )
