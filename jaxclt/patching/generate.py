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
from jax import Array

from jaxclt.lm.block import Past
from jaxclt.lm.cache import past_of
from jaxclt.lm.run import Run, embed, native_mlp, run, unembed
from jaxclt.patching.edits import Edits, amounts
from jaxclt.patching.features import activation
from jaxclt.patching.modes import Patchable, pending
from jaxclt.types import Block

__all__ = ["continue_prompt"]


@partial(jax.jit, static_argnames="n_new")
def continue_prompt(
    model: Patchable,
    done: Run,
    later: Edits | None,
    layers_2: Array,
    key: Array,
    temperature: Array,
    *,
    n_new: int,
) -> Array:
    """Token ids [n_new] that follow a patched prompt.

    Args:
      model: the recording.
      done: the patched pass on the prompt.
      later: edits of positions behind the prompt, None for none.
      layers_2: first and last layer that `later` writes to.
      key: for sampling.
      temperature: of the softmax that is sampled; 0 takes the most probable token.
      n_new: tokens to generate.
    """
    T, dtype = len(model.recording.token_T), model.recording.token_T.dtype
    index_L = jnp.arange(model.cfg.n_layers, dtype=jnp.int32)
    native = native_mlp(model.cfg)

    def choose(out_D: Array, key: Array) -> Array:
        logit_V = unembed(model.params, out_D)
        warm = jnp.where(temperature > 0, temperature, jnp.ones_like(temperature))
        drawn = jax.random.categorical(key, logit_V / warm.astype(logit_V.dtype))
        return jnp.where(temperature > 0, drawn, jnp.argmax(logit_V)).astype(dtype)

    def step(
        state: tuple[Array, Past], now: tuple[Array, Array]
    ) -> tuple[tuple[Array, Past], Array]:
        (token, past), (t, key) = state, now
        # The one row of this pass is position t.
        here = None if later is None else _moved(later, -t)

        def policy(
            carry: Any, mid_TD: Array, scale_T: Array, p: Block, x: Array
        ) -> tuple[Any, Array]:
            _, real_TD = native(None, mid_TD, scale_T, p, None)
            if here is None:
                return carry, real_TD
            f, index = here.features, x
            mid_ED = jnp.broadcast_to(mid_TD, (len(f.pos_E), mid_TD.shape[1]))
            scale_E = jnp.broadcast_to(scale_T, f.pos_E.shape)
            now_E = activation(f, p, mid_ED, scale_E, coder=model.coder)
            carry = jnp.where(f.layer_E == index, amounts(here, now_E), carry)
            inside = (layers_2[0] <= index) & (index <= layers_2[1])
            added_TD = pending(here, carry, index, mid_TD)
            return carry, jnp.where(inside, real_TD + added_TD, real_TD)

        again = run(
            model.params,
            embed(model.params, token[None], start=t),
            policy,
            cfg=model.cfg,
            carry=None if here is None else jnp.zeros_like(here.factor_E),
            per_layer=index_L,
            past=past,
            start=t,
        )
        assert again.taps.past is not None
        return (choose(again.out_TD[0], key), again.taps.past), token

    keys = jax.random.split(key, n_new)
    past = past_of(model.params, done.taps, cfg=model.cfg, room=n_new - 1)
    first = choose(done.out_TD[-1], keys[0])
    position = jnp.arange(T, T + n_new - 1, dtype=jnp.int32)
    (last, _), before = jax.lax.scan(step, (first, past), (position, keys[1:]))
    return jnp.append(before, last)


def _moved(edits: Edits, by: Array) -> Edits:
    """The same edits with their positions counted from elsewhere."""
    features = edits.features
    return dataclasses.replace(
        edits, features=dataclasses.replace(features, pos_E=features.pos_E + by)
    )
