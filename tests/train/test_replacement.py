"""The replacement model: exact with exact writes, and fine-tuned by its own KL."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclt.lm.run import forward
from jaxclt.replacement.model import (
    agreement,
    neuron_logits,
    replacement_logits,
)
from jaxclt.testing import tiny
from jaxclt.train.finetune import finetune_kl, replacement_kl
from jaxclt.train.text import Windows

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def case(x64: None):
    return tiny(0, n_layers=3, n_tokens=7, read="mlp_in", dtype=jnp.float64)


def test_each_encoder_reads_the_replacements_own_stream(case):
    """Against a plain loop over layers, written out."""
    from jaxclt.clt.activations import activate
    from jaxclt.lm import layers

    p, clt, cfg = case.params, case.clt, case.cfg
    resid = p.embed_VD[case.token_T]
    a = []
    for l in range(cfg.n_layers):
        block = jax.tree.map(lambda x: x[l], p.blocks)  # noqa: B023
        scale = layers.rms_scale(resid, eps=cfg.norm_eps)
        normed = layers.normalise(resid, scale, block.norm_attn_LD)
        pattern = layers.attention_pattern(block, normed, cfg=cfg)
        mid = resid + layers.move(block, pattern, normed, cfg=cfg, biases=True)
        scale = layers.rms_scale(mid, eps=cfg.norm_eps)
        read = layers.normalise(mid, scale, block.norm_mlp_LD)
        pre = read @ clt.W_enc_LFD[l].T + clt.b_enc_LF[l][None]
        a.append(activate(pre, clt.theta_LF[l], cfg=case.clt_cfg))
        write = clt.b_dec_LD[l][None] + sum(
            a[s] @ clt.W_dec[s][:, l - s] for s in range(l + 1)
        )
        true = layers.mlp(block, read, cfg=cfg)
        resid = mid + write.at[0].set(true[0])
    scale = layers.rms_scale(resid, eps=cfg.norm_eps)
    want = layers.normalise(resid, scale, p.norm_out_D) @ p.unembed_DV
    got = replacement_logits(p, clt, case.token_T, cfg=cfg, clt_cfg=case.clt_cfg)
    np.testing.assert_allclose(got, want, atol=1e-12)
    # the first position keeps its MLPs and sees only itself: the model's own logits
    true_TV = forward(p, case.token_T, cfg=cfg)
    np.testing.assert_allclose(got[0], true_TV[0], atol=1e-12)
    assert np.abs(got[1:] - true_TV[1:]).max() > 1e-2


def test_all_neurons_are_the_model_and_few_are_not(case):
    """T-RM1: a dictionary that is the MLP gives the model's own logits."""
    true_TV = forward(case.params, case.token_T, cfg=case.cfg)
    whole = partial(neuron_logits, case.params, case.token_T, cfg=case.cfg)
    every = whole(k=case.cfg.d_mlp, keep_first=False)
    np.testing.assert_allclose(every, true_TV, atol=1e-12)
    few = whole(k=3)
    np.testing.assert_allclose(few[0], true_TV[0], atol=1e-12)
    assert np.abs(few[1:] - true_TV[1:]).max() > 1e-2
    assert np.abs(whole(k=3, keep_first=False)[0] - true_TV[0]).max() > 1e-2


def test_agreement_counts_valid_positions(case):
    token_WS = np.stack([np.asarray(case.token_T)] * 2)
    valid = np.ones((2, 7), bool)
    found = agreement(
        case.params, case.clt, token_WS, valid, cfg=case.cfg, clt_cfg=case.clt_cfg
    )
    true = forward(case.params, case.token_T, cfg=case.cfg)
    other = replacement_logits(
        case.params, case.clt, case.token_T, cfg=case.cfg, clt_cfg=case.clt_cfg
    )
    same = np.asarray(true.argmax(-1) == other.argmax(-1))
    assert found["top1"] == same.mean()
    p = jax.nn.softmax(true)
    kl = (p * (jnp.log(p) - jax.nn.log_softmax(other))).sum(-1)
    np.testing.assert_allclose(found["kl"], kl.mean())
    only_first = valid & (np.arange(7) == 0)
    found = agreement(
        case.params, case.clt, token_WS, only_first, cfg=case.cfg, clt_cfg=case.clt_cfg
    )
    assert found["top1"] == 1.0
    assert abs(found["kl"]) < 1e-12


@pytest.mark.slow
def test_the_gradient_of_the_kl_is_its_slope(case):
    loss = jax.jit(
        partial(
            replacement_kl,
            params=case.params,
            token_T=case.token_T,
            valid_T=jnp.arange(7) > 0,
            cfg=case.cfg,
            clt_cfg=case.clt_cfg,
        )
    )
    grad = jax.jit(jax.grad(loss))(case.clt)
    way = jax.tree.map(
        lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), case.clt
    )
    way = way.replace(theta_LF=jnp.zeros_like(way.theta_LF))  # the gate has no slope
    h = 1e-6
    plus, minus = (
        loss(jax.tree.map(lambda x, v: x + s * h * v, case.clt, way))  # noqa: B023
        for s in (1.0, -1.0)
    )
    slope = sum(
        jnp.vdot(g, v)
        for g, v in zip(jax.tree.leaves(grad), jax.tree.leaves(way), strict=True)
    )
    np.testing.assert_allclose((plus - minus) / (2 * h), slope, rtol=1e-4)


@pytest.mark.slow
def test_fine_tuning_lowers_the_kl(case):
    tokens = np.asarray(jax.random.randint(jax.random.key(7), (4, 7), 3, 40), np.int32)
    windows = Windows.of(tokens, tokens)
    before = jax.tree.map(np.asarray, case.clt)
    _, history = finetune_kl(
        case.params,
        case.clt,
        windows,
        cfg=case.cfg,
        clt_cfg=case.clt_cfg,
        n_steps=12,
        lr=3e-3,
    )
    assert history[-1] < 0.8 * history[0]
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(case.clt), strict=True):
        np.testing.assert_array_equal(a, b)
