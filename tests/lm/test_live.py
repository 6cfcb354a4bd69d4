"""Live attention differentiated, against jax's derivative of the model's own block."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from cases import FAMILIES, case, close
from jax import Array

from jaxclt.lm import layers
from jaxclt.lm.block import block
from jaxclt.lm.live import Routes, make_live
from jaxclt.testing import Tiny
from jaxclt.types import Block

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


def own(t: Tiny, p: Block, resid_TD: Array) -> Array:
    """What the model's own block adds to the stream, its MLP left out."""
    after_TD, _ = block(p, resid_TD, lambda x_TD, _: jnp.zeros_like(x_TD), cfg=t.cfg)
    return after_TD - resid_TD


@functools.cache
def found(name: str, norms: bool) -> dict[str, tuple[Array, Routes, Array, Routes]]:
    """Of every layer [L, T, B, D]: at once and by route, ours and jax's.

    Jax's at once is of the model's own block; its routes are of `copies`, which agrees
    with the block where all read the same.
    """
    t, B = case(name), 3
    T, D = t.recording.embed_TD.shape
    live = make_live(t.params.blocks, t.recording.resid_LTD, cfg=t.cfg, norms=norms)
    g_BTD = jax.random.normal(jax.random.key(7), (B, T, D), jnp.float64)

    def of_layer(xs: tuple[Array, Block, Array]) -> tuple:
        layer, p, x_TD = xs
        g_TBD = g_BTD.swapaxes(0, 1)
        f = functools.partial(copies, t, p, norms)
        moved_TD, back = jax.vjp(f, x_TD, x_TD, x_TD)
        own_TD, own_back = jax.vjp(functools.partial(own, t, p), x_TD)
        route = [x.swapaxes(0, 1) for x in jax.lax.map(back, g_BTD)]
        whole = jax.lax.map(lambda g_TD: own_back(g_TD)[0], g_BTD).swapaxes(0, 1)
        ours = live.pull(layer, g_TBD), live.routes(layer, g_TBD)
        return *ours, whole, Routes(*route), moved_TD, own_TD

    every = jnp.arange(t.cfg.n_layers), t.params.blocks, t.recording.resid_LTD
    *derivatives, moved, own_moved = jax.jit(lambda xs: jax.lax.map(of_layer, xs))(
        every
    )
    close(moved, own_moved, 1e-13)
    return derivatives


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_derivative_of_the_models_own_attention(name: str) -> None:
    """Maths 22.3: rotary, QK norms, soft caps, windows, groups, biases, post norms."""
    ours, routes, whole, _ = found(name, True)
    close(ours, whole, 1e-12)
    close(sum(routes), whole, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_route_is_that_of_its_own_copy_of_the_stream(name: str) -> None:
    """Maths 22.3."""
    _, routes, _, want = found(name, True)
    for ours, theirs in zip(routes, want, strict=True):
        assert float(jnp.abs(theirs).max()) > 1e-3
        close(ours, theirs, 1e-12)


@pytest.mark.parametrize("name", ["clt", "gemma2", "gemma3", "neox"])
def test_with_norms_held_only_patterns_answer(name: str) -> None:
    ours, routes, _, want = found(name, False)
    close(ours, sum(want), 1e-12)
    for mine, theirs in zip(routes, want, strict=True):
        close(mine, theirs, 1e-12)
