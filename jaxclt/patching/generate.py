"""Text after a patched prompt, edits held.

The patched prompt keeps its stream: its MLP outputs, attention patterns and whatever
norms were held are those of the patched pass, in any mode. New tokens run the real
model and see the patched prompt through live attention; edits without an end also act
on them, additively, for there is no recording to clamp to.

Every step runs all positions again. A cache of keys and values would save that, but the
one `block` computes attention for all positions at once; for the few tokens that a
patch is judged by, one code path is worth more.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.lm import layers
from jaxclt.lm.run import Run, embed, run, unembed
from jaxclt.patching.edits import Edits, amounts
from jaxclt.patching.features import activation
from jaxclt.patching.modes import Patchable, pending, read
from jaxclt.types import Block, Held

__all__ = ["continue_prompt"]


@partial(jax.jit, static_argnames=("n_new", "freeze_norm"))
def continue_prompt(
    model: Patchable,
    done: Run,
    later: Edits | None,
    layers_2: Array,
    key: Array,
    temperature: Array,
    *,
    n_new: int,
    freeze_norm: bool = False,
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
      freeze_norm: the patched pass held its norm denominators; hold them on the prompt.
    """
    prompt_T = model.recording.token_T
    T, S = len(prompt_T), len(prompt_T) + n_new
    position_S = jnp.arange(S, dtype=jnp.int32)
    in_prompt_S = position_S < T

    def grow(x: Array, *axes: int) -> Array:
        width = [(0, n_new if axis in axes else 0) for axis in range(x.ndim)]
        return jnp.pad(x, width)

    taps = done.taps
    assert taps.pattern_HTS is not None, "a patched pass keeps its patterns"
    hold = Held(
        pattern_LHTS=grow(taps.pattern_HTS, 2, 3),
        attn_scale_LT=grow(taps.attn_scale_T, 1) if freeze_norm else None,
        mlp_scale_LT=grow(taps.mlp_scale_T, 1) if freeze_norm else None,
        out_scale_T=grow(done.out_scale_T, 0) if freeze_norm else None,
        held_T=in_prompt_S,
    )
    index_L = jnp.arange(model.cfg.n_layers, dtype=jnp.int32)
    write_LSD = grow(taps.write_TD, 1)

    def policy(
        carry: Any, mid_TD: Array, scale_T: Array, p: Block, x: Any
    ) -> tuple[Any, Array]:
        index, held_TD = x
        normed_TD = layers.normalise(mid_TD, scale_T, p.norm_mlp_LD)
        real_TD = layers.mlp(p, normed_TD, cfg=model.cfg)
        if later is not None:
            f = later.features
            read_TD = read(model, mid_TD, scale_T, p)
            now_E = activation(f, read_TD[f.pos_E], cfg=model.cfg)
            here_E = f.layer_E == index
            carry = jnp.where(here_E, amounts(later, now_E), carry)
            inside = (layers_2[0] <= index) & (index <= layers_2[1])
            added_TD = pending(later, carry, index, mid_TD)
            real_TD = jnp.where(inside, real_TD + added_TD, real_TD)
        return carry, jnp.where(in_prompt_S[:, None], held_TD, real_TD)

    def step(token_S: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        t, key = now
        again = run(
            model.params,
            embed(model.params, token_S),
            policy,
            cfg=model.cfg,
            carry=None if later is None else jnp.zeros_like(later.factor_E),
            per_layer=(index_L, write_LSD),
            frozen=hold,
        )
        logit_V = unembed(model.params, again.out_TD[t - 1])
        warm = jnp.where(temperature > 0, temperature, jnp.ones_like(temperature))
        drawn = jax.random.categorical(key, logit_V / warm.astype(logit_V.dtype))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logit_V))
        token = token.astype(token_S.dtype)
        return token_S.at[t].set(token), token

    start_S = jnp.pad(prompt_T, (0, n_new))
    keys = jax.random.split(key, n_new)
    _, new = jax.lax.scan(step, start_S, (position_S[T:], keys))
    return new
