"""Live attention differentiated, against jax's derivative of the model's own block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from cases import FAMILIES, case, close
from jax import Array

from jaxclt.lm import layers
from jaxclt.lm.block import block
from jaxclt.lm.live import Routes, make_live
from jaxclt.testing import Tiny
from jaxclt.types import Block, Held

pytestmark = pytest.mark.usefixtures("x64")

NAMES = ["clt", *FAMILIES]


def copies(
    t: Tiny, p: Block, norms: bool, query_TD: Array, key_TD: Array, rest_TD: Array
) -> Array:
    """What attention adds if queries, keys and the rest read a stream each.

    The rest is values and all denominators, which are held unless `norms`.
    """
    cfg, hold = t.cfg, (lambda x: x) if norms else jax.lax.stop_gradient
    norm = layers.attn_norm(p)
    scale_T = hold(layers.norm_scale(rest_TD, norm, eps=cfg.norm_eps))
    query_TD, key_TD, rest_TD = (
        layers.normalise(x, scale_T, norm) for x in (query_TD, key_TD, rest_TD)
    )
    query_scale, key_scale = hold(layers.head_scales(p, rest_TD, cfg=cfg))
    query_THC = layers.queries(p, query_TD, cfg=cfg, scale_TH=query_scale)
    key_SGC = layers.keys(p, key_TD, cfg=cfg, scale_TG=key_scale)
    score_HTS = layers.attention_scores(query_THC, key_SGC, cfg=cfg)
    pattern_HTS = layers.pattern_of(p, score_HTS, cfg=cfg)
    moved_TD = layers.move(p, pattern_HTS, layers.values(p, rest_TD), cfg=cfg)
    if p.post_attn_LD is None:
        return moved_TD
    post = layers.Norm(p.post_attn_LD)
    scale_T = hold(layers.norm_scale(moved_TD, post, eps=cfg.norm_eps))
    return layers.normalise(moved_TD, scale_T, post)


def own(t: Tiny, p: Block, resid_TD: Array, held: Held | None = None) -> Array:
    """What the model's own block adds to the stream, its MLP left out."""
    nothing = lambda x_TD, _: jnp.zeros_like(x_TD)  # noqa: E731
    return block(p, resid_TD, nothing, cfg=t.cfg, frozen=held)[0] - resid_TD


class Found(NamedTuple):
    """Cotangents of every layer, [L, T, B, D]."""

    ours: Array  # at once
    routes: Routes
    whole: Array  # jax's, of the model's own block
    values: Array  # jax's, of the block with its pattern and denominators held
    copies: list[Array]  # jax's, of `copies`: queries, keys and the rest


@functools.cache
def found(name: str, norms: bool) -> Found:
    """Ours and jax's; `copies` agrees with the block where all read the same."""
    t, B = case(name), 3
    T, D = t.recording.embed_TD.shape
    live = make_live(t.params.blocks, t.recording.resid_LTD, cfg=t.cfg, norms=norms)
    g_BTD = jax.random.normal(jax.random.key(7), (B, T, D), jnp.float64)

    def back(f: Callable[..., Array], *x_TD: Array) -> tuple[Array, list[Array]]:
        moved_TD, pull = jax.vjp(f, *x_TD)
        return moved_TD, [x.swapaxes(0, 1) for x in jax.lax.map(pull, g_BTD)]

    def of_layer(xs: tuple[Array, Block, Array, Held]) -> tuple:
        layer, p, x_TD, held = xs
        moved_TD, copied = back(partial(copies, t, p, norms), x_TD, x_TD, x_TD)
        own_TD, (whole_TBD,) = back(partial(own, t, p), x_TD)
        _, (value_TBD,) = back(lambda x_TD: own(t, p, x_TD, held), x_TD)
        g_TBD = g_BTD.swapaxes(0, 1)
        mine = live.pull(layer, g_TBD), live.routes(layer, g_TBD)
        return Found(*mine, whole_TBD, value_TBD, copied), moved_TD, own_TD

    frozen = t.recording.frozen
    held = Held(
        pattern_LHTS=frozen.pattern_LHTS,
        attn_scale_LT=frozen.attn_scale_LT,
        post_attn_scale_LT=frozen.post_attn_scale_LT,
    )
    every_L = jnp.arange(t.cfg.n_layers)
    every = every_L, t.params.blocks, t.recording.resid_LTD, held
    result, moved, own_moved = jax.jit(partial(jax.lax.map, of_layer))(every)
    close(moved, own_moved, 1e-13)
    return result


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_derivative_of_the_models_own_attention(name: str) -> None:
    """Maths 22.3: rotary, QK norms, soft caps, windows, groups, biases, post norms."""
    f = found(name, True)
    close(f.ours, f.whole, 1e-12)
    close(sum(f.routes), f.whole, 1e-12)
    close(f.routes.value_TBD, f.values, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_route_is_that_of_its_own_copy_of_the_stream(name: str) -> None:
    """Maths 22.3."""
    f = found(name, True)
    value, norm, query, key = f.routes
    for ours, theirs in zip((query, key, value + norm), f.copies, strict=True):
        assert float(jnp.abs(theirs).max()) > 1e-3
        close(ours, theirs, 1e-12)


@pytest.mark.parametrize("name", ["clt", "gemma2", "gemma3", "neox"])
def test_with_norms_held_only_patterns_answer(name: str) -> None:
    """Maths 22.3."""
    f = found(name, False)
    value, norm, query, key = f.routes
    close(f.ours, sum(f.copies), 1e-12)
    close(query, f.copies[0], 1e-12)
    close(key, f.copies[1], 1e-12)
    close(f.copies[2], value, 1e-12)
    assert float(jnp.abs(norm).max()) < 1e-14
