"""The replacement model: exact with exact writes, and fine-tuned by its own KL."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclt.replacement.agreement as comparing
from jaxclt.clt.active import active_features
from jaxclt.clt.coder import load
from jaxclt.clt.neurons import NeuronDictionary, parse_neurons
from jaxclt.clt.transcoder import loaded_params
from jaxclt.lm.run import forward
from jaxclt.replacement.agreement import agreement
from jaxclt.replacement.errors import error_nodes
from jaxclt.replacement.model import replacement_logits
from jaxclt.replacement.reconstruction import Reconstruction, reconstructed
from jaxclt.testing import tiny
from jaxclt.text.corpus import Windows
from jaxclt.train.finetune import Finetune, finetune_kl, replacement_kl

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def case(x64: None):
    return tiny(0, n_layers=3, n_tokens=7, read="mlp_in", dtype=jnp.float64)


def test_each_encoder_reads_the_replacements_own_stream(case):
    """Against a plain loop over layers, written out."""
    from transcoder import activate

    from jaxclt.lm import layers

    p, clt, cfg = case.params, case.clt, case.cfg
    resid = p.embed_VD[case.token_T]
    a = []
    for l in range(cfg.n_layers):
        block = jax.tree.map(lambda x: x[l], p.blocks)  # noqa: B023
        norm = layers.attn_norm(block)
        scale = layers.norm_scale(resid, norm, eps=cfg.norm_eps)
        normed = layers.normalise(resid, scale, norm)
        pattern = layers.attention_pattern(block, normed, cfg=cfg)
        values = layers.values(block, normed)
        mid = resid + layers.move(block, pattern, values, cfg=cfg)
        norm = layers.mlp_norm(block)
        scale = layers.norm_scale(mid, norm, eps=cfg.norm_eps)
        read = layers.normalise(mid, scale, norm)
        pre = read @ clt.W_enc_LFD[l].T + clt.b_enc_LF[l][None]
        a.append(activate(pre, clt.theta_LF[l], cfg=case.clt_cfg))
        write = clt.b_dec_LD[l][None] + sum(
            a[s] @ clt.W_dec[s][:, l - s] for s in range(l + 1)
        )
        true = layers.mlp(block, read, cfg=cfg)
        resid = mid + write.at[0].set(true[0])
    scale = layers.norm_scale(resid, layers.out_norm(p), eps=cfg.norm_eps)
    want = layers.normalise(resid, scale, layers.out_norm(p)) @ p.unembed_DV
    got = replacement_logits(p, loaded_params(clt, case.clt_cfg), case.token_T, cfg=cfg)
    np.testing.assert_allclose(got, want, atol=1e-12)
    # the first position keeps its MLPs and sees only itself: the model's own logits
    true_TV = forward(p, case.token_T, cfg=cfg)
    np.testing.assert_allclose(got[0], true_TV[0], atol=1e-12)
    assert np.abs(got[1:] - true_TV[1:]).max() > 1e-2


def test_all_neurons_are_the_model_and_few_are_not(case):
    """Maths 3.2: a dictionary that is the MLP gives the model's own logits."""
    true_TV = forward(case.params, case.token_T, cfg=case.cfg)

    def whole(k, **more):
        loaded = load(NeuronDictionary(k), case.params, case.cfg)
        return replacement_logits(
            case.params, loaded, case.token_T, cfg=case.cfg, **more
        )

    every = whole(k=case.cfg.d_mlp, keep_first=False)
    np.testing.assert_allclose(every, true_TV, atol=1e-12)
    few = whole(k=3)
    np.testing.assert_allclose(few[0], true_TV[0], atol=1e-12)
    assert np.abs(few[1:] - true_TV[1:]).max() > 1e-2
    assert np.abs(whole(k=3, keep_first=False)[0] - true_TV[0]).max() > 1e-2


def test_zero_decoders_are_the_mean_mlp_model(case):
    """Maths 3.3: what is left is a constant in every MLP's place."""
    from jaxclt.lm.run import Policy, embed, run, unembed

    mean_LD = case.recording.write_LTD.mean(1)
    empty = jax.tree.map(jnp.zeros_like, case.clt).replace(b_dec_LD=mean_LD)
    got = replacement_logits(
        case.params,
        loaded_params(empty, case.clt_cfg),
        case.token_T,
        cfg=case.cfg,
        keep_first=False,
    )

    def constant(carry, mid_TD, scale_T, p, mean_D):
        return carry, jnp.broadcast_to(mean_D[None], mid_TD.shape)

    done = run(
        case.params,
        embed(case.params, case.token_T),
        Policy(constant, per_layer=mean_LD),
        cfg=case.cfg,
    )
    np.testing.assert_allclose(got, unembed(case.params, done.out_TD), atol=1e-12)


@pytest.mark.parametrize("kind", ["clt", "neurons:3", "neurons@0.01"])
def test_with_its_error_vectors_it_is_the_model(case, kind):
    """Maths 3.4: the errors of this prompt make up for any dictionary."""
    dictionary = case.dictionary if kind == "clt" else parse_neurons(kind)
    active = active_features(dictionary, case.params, case.recording, case.cfg)
    error_LTD = jnp.asarray(error_nodes(active, case.recording))
    assert np.abs(error_LTD).max() > 1e-3
    got = replacement_logits(
        case.params,
        load(dictionary, case.params, case.cfg),
        case.token_T,
        cfg=case.cfg,
        keep_first=False,
        error_LTD=error_LTD,
    )
    true_TV = forward(case.params, case.token_T, cfg=case.cfg)
    np.testing.assert_allclose(got, true_TV, atol=1e-12)


@pytest.mark.parametrize("kind", ["clt", "neurons:3"])
def test_one_layer_can_be_replaced(case, kind):
    """None is the model, all is the replacement model, the last is in between."""
    dictionary = case.dictionary if kind == "clt" else parse_neurons(kind)
    sub = load(dictionary, case.params, case.cfg)
    at = partial(replacement_logits, case.params, sub, case.token_T, cfg=case.cfg)
    L = case.cfg.n_layers
    true_TV = forward(case.params, case.token_T, cfg=case.cfg)
    none = at(keep_first=False, layer_L=jnp.zeros(L, bool))
    np.testing.assert_allclose(none, true_TV, atol=1e-12)
    every = at(keep_first=False, layer_L=jnp.ones(L, bool))
    np.testing.assert_allclose(every, at(keep_first=False), atol=1e-12)
    # The last layer alone: the clean stream with one error taken away.
    active = active_features(dictionary, case.params, case.recording, case.cfg)
    error_TD = error_nodes(active, case.recording)[-1]
    resid_TD = case.recording.mid_LTD[-1] + case.recording.write_LTD[-1] - error_TD
    from jaxclt.lm import layers

    norm = layers.out_norm(case.params)
    scale_T = layers.norm_scale(resid_TD, norm, eps=case.cfg.norm_eps)
    out_TD = layers.normalise(resid_TD, scale_T, norm)
    last = at(keep_first=False, layer_L=jnp.arange(L) == L - 1)
    np.testing.assert_allclose(last, out_TD @ case.params.unembed_DV, atol=1e-12)


@pytest.mark.parametrize("kind", ["clt", "neurons", "neurons:3", "neurons@0.01"])
def test_reconstruction_is_that_of_the_error_nodes(case, kind):
    dictionary = case.dictionary if kind == "clt" else parse_neurons(kind)
    active = active_features(dictionary, case.params, case.recording, case.cfg)
    error_LTD = error_nodes(active, case.recording)
    sub = load(dictionary, case.params, case.cfg)
    r = case.recording
    gain_LTD = case.params.blocks.norm_mlp_LD[:, None]
    read_LTD = r.mid_LTD * r.frozen.mlp_scale_LT[..., None] * gain_LTD  # mlp_in
    mask_T = np.arange(7) > 0
    groups = []
    for part in (slice(0, 4), slice(3, 7)):  # position 3 is counted once
        here = mask_T[part] & ((np.arange(7) != 3)[part] if part.start else True)
        groups.append(
            reconstructed(
                sub,
                read_LTD[:, part],
                r.write_LTD[:, part],
                here,
                n_groups=2,
                params=case.params,
            )
        )
    found = Reconstruction.joined(groups)
    write = np.asarray(r.write_LTD)[:, mask_T]
    error = error_LTD[:, mask_T]
    want = (error**2).sum((1, 2)) / ((write - write.mean(1, keepdims=True)) ** 2).sum(
        (1, 2)
    )
    np.testing.assert_allclose(found.fvu_L(), want, rtol=1e-9, atol=1e-20)
    n = (active.pos_A > 0).sum()
    assert found.summary()["l0"] == pytest.approx(n / 6)
    assert found.count_LF.sum() == n
    if kind == "neurons":
        assert found.summary()["fvu"] < 1e-20
    every = np.arange(4)
    np.testing.assert_allclose(found.fvu_L(every), found.fvu_L())


def test_two_replacements_share_one_pass_of_the_model(case, monkeypatch):
    passes = []

    def counted(*args, **more):
        passes.append(1)
        return forward(*args, **more)

    monkeypatch.setattr(comparing, "forward", counted)
    token_WS = np.asarray(case.token_T)[None]
    sub = loaded_params(case.clt, case.clt_cfg)
    args = (case.params, sub, token_WS)
    both = comparing.compare(*args, cfg=case.cfg, keep_first=(True, False))
    assert len(passes) == 1
    for keep, found in zip((True, False), both, strict=True):
        (alone,) = comparing.compare(*args, cfg=case.cfg, keep_first=(keep,))
        np.testing.assert_array_equal(found.model_WS, alone.model_WS)
        np.testing.assert_allclose(found.kl_WS, alone.kl_WS, atol=1e-12)
    assert both[0].kl_WS[0, 0] < 1e-12 < both[1].kl_WS[0, 0]


def test_agreement_counts_valid_positions(case):
    token_WS = np.stack([np.asarray(case.token_T)] * 2)
    valid = np.ones((2, 7), bool)
    sub = loaded_params(case.clt, case.clt_cfg)
    found = agreement(case.params, sub, token_WS, valid, cfg=case.cfg)
    true = forward(case.params, case.token_T, cfg=case.cfg)
    other = replacement_logits(case.params, sub, case.token_T, cfg=case.cfg)
    same = np.asarray(true.argmax(-1) == other.argmax(-1))
    assert found["top1"] == same.mean()
    p = jax.nn.softmax(true)
    kl = (p * (jnp.log(p) - jax.nn.log_softmax(other))).sum(-1)
    np.testing.assert_allclose(found["kl"], kl.mean())
    only_first = valid & (np.arange(7) == 0)
    found = agreement(case.params, sub, token_WS, only_first, cfg=case.cfg)
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
        Finetune(n_steps=12, lr=3e-3),
        cfg=case.cfg,
        clt_cfg=case.clt_cfg,
    )
    assert history[-1] < 0.8 * history[0]
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(case.clt), strict=True):
        np.testing.assert_array_equal(a, b)
