"""The transcoder: activations, decoding, layouts, and one code path for all spans."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, case, case_active, close
from transcoder import activate, decode, encode

from jaxclt.clt.config import CLTConfig
from jaxclt.clt.sites import fold_reads, read_scale, read_site
from jaxclt.errors import InputError
from jaxclt.graph.attribute import AttributeConfig, attribute_recording
from jaxclt.graph.prompt import Prompt
from jaxclt.io.save import check_params
from jaxclt.lm.layers import Norm
from jaxclt.replacement.errors import error_nodes, reconstruct
from jaxclt.testing import Tiny

pytestmark = pytest.mark.usefixtures("x64")

encode_jit = jax.jit(encode, static_argnames="cfg")
decode_jit = jax.jit(decode)


def reads_of(t: Tiny) -> np.ndarray:
    """What the encoders read, written out site by site."""
    mid_LTD, frozen = np.asarray(t.recording.mid_LTD), t.recording.frozen
    if t.clt_cfg.read == "resid_mid":
        return mid_LTD
    normed = mid_LTD / np.sqrt((mid_LTD**2).mean(-1, keepdims=True) + t.cfg.norm_eps)
    close(mid_LTD * np.asarray(frozen.mlp_scale_LT)[..., None], normed, 1e-14)
    gain_L1D = np.asarray(t.params.blocks.norm_mlp_LD)[:, None]
    return normed if t.clt_cfg.read == "normalized" else normed * gain_L1D


def dense(t: Tiny) -> tuple[np.ndarray, np.ndarray]:
    """Pre-activations and activations, loop by loop in numpy."""
    W, b = np.asarray(t.clt.W_enc_LFD), np.asarray(t.clt.b_enc_LF)
    pre = np.einsum("ltd,lfd->ltf", reads_of(t), W) + b[:, None]
    if t.clt_cfg.gate.competes:
        cut = np.sort(pre, -1)[..., -t.clt_cfg.k, None]
        return pre, np.where(pre >= cut, pre, 0)
    theta = 0.0 if t.clt.theta_LF is None else np.asarray(t.clt.theta_LF)[:, None]
    return pre, np.where(pre > theta, pre, 0)


def gated(activation: str) -> CLTConfig:
    return CLTConfig(
        n_layers=1, d_model=2, n_features=4, span=1, k=2, activation=activation
    )


def test_jumprelu_is_strict() -> None:
    pre = jnp.array([[-1.0, 0.5, 0.5000001, 2.0]])
    got = activate(pre, jnp.full(4, 0.5), cfg=gated("jumprelu"))
    np.testing.assert_array_equal(got, [[0, 0, 0.5000001, 2.0]])
    got = activate(pre, None, cfg=gated("relu"))
    np.testing.assert_array_equal(got, [[0, 0.5, 0.5000001, 2.0]])


def test_topk_keeps_exactly_k_with_their_sign() -> None:
    pre = jnp.array([[3.0, -1.0, -2.0, -5.0], [1.0, 4.0, 2.0, 3.0]])
    got = activate(pre, None, cfg=gated("signed_topk"))
    np.testing.assert_array_equal(got, [[3, -1, 0, 0], [0, 4, 0, 3]])


@pytest.mark.parametrize(
    ("activation", "want"),
    [
        ("signed_topk", [[3, -1, 0, 0], [0, 4, 0, 3]]),
        ("topk", [[3, 0, 0, 0], [0, 4, 0, 3]]),
        ("groupmax", [[3, 0, 0, 0], [0, 4, 0, 3]]),
    ],
)
def test_competing_features(activation: str, want: list) -> None:
    pre = jnp.array([[3.0, -1.0, -2.0, -5.0], [1.0, 4.0, 2.0, 3.0]])
    cfg = gated(activation)
    assert cfg.gate.competes
    np.testing.assert_array_equal(activate(pre, None, cfg=cfg), want)
    # a tie: one of a group, the first
    tie = activate(jnp.array([[2.0, 2.0, 1.0, 1.0]]), None, cfg=cfg)
    assert int((tie != 0).sum()) == 2


@pytest.mark.parametrize("name", CASES)
def test_active_features_are_the_nonzero_activations(name: str) -> None:
    """Every read site and activation, against numpy; maths 5.1, nnz(a)."""
    t, active = case(name), case_active(name)
    pre, a = dense(t)
    layer, pos, feature = np.nonzero(a)
    np.testing.assert_array_equal(active.layer_A, layer)
    np.testing.assert_array_equal(active.pos_A, pos)
    np.testing.assert_array_equal(active.feature_A, feature)
    close(active.value_A, a[layer, pos, feature], 1e-13)
    close(active.preact_A, pre[layer, pos, feature], 1e-13)


@pytest.mark.parametrize("name", CASES)
def test_encoder_rows_read_the_stream(name: str) -> None:
    """The row pulled back to the residual stream gives the pre-activation."""
    t, active = case(name), case_active(name)
    mid_AD = np.asarray(t.recording.mid_LTD)[active.layer_A, active.pos_A]
    got = (active.reads() * mid_AD).sum(1) + active.read_bias_A
    close(got, active.preact_A, 1e-13)


@pytest.mark.parametrize("name", ["plt", "span2", "topk", "skip"])
def test_decoding_dense_sparse_and_by_hand_agree(name: str) -> None:
    t = case(name)
    read = reads_of(t)
    a = encode_jit(t.clt, read, cfg=t.clt_cfg)
    close(a, dense(t)[1], 1e-13)
    want = np.repeat(np.asarray(t.clt.b_dec_LD)[:, None], len(t.token_T), 1)
    for layer, W_FMD in enumerate(t.clt.W_dec):
        assert W_FMD.shape[1] == t.clt_cfg.n_writes(layer)
        for offset in range(W_FMD.shape[1]):
            want[layer + offset] += np.asarray(a)[layer] @ np.asarray(W_FMD)[:, offset]
    if t.clt.W_skip_LDD is not None:
        want += read @ np.asarray(t.clt.W_skip_LDD)
    close(decode_jit(t.clt, a, read), want, 1e-13)
    mid_LTD = np.asarray(t.recording.mid_LTD)
    close(reconstruct(case_active(name), mid_LTD), want, 1e-13)
    error_LTD = error_nodes(case_active(name), t.recording)
    close(error_LTD + want, np.asarray(t.recording.write_LTD), 1e-13)


def test_decode_needs_the_read_only_for_a_skip() -> None:
    t = case("skip")
    with pytest.raises(ValueError, match="read_LTD"):
        decode(t.clt, jnp.zeros((4, 6, 20)))


def test_plt_is_a_clt_with_only_diagonal_decoders() -> None:
    """Maths 2.1: same activations, same decoding, same graph."""
    t = case("plt")
    L = t.cfg.n_layers
    padded = dataclasses.replace(
        t.clt,
        W_dec=tuple(
            np.pad(W, ((0, 0), (0, L - 1 - layer), (0, 0)))
            for layer, W in enumerate(t.clt.W_dec)
        ),
    )
    cfg = dataclasses.replace(t.clt_cfg, span=L)
    check_params(padded, cfg)
    wide = dataclasses.replace(t, clt=padded, clt_cfg=cfg)
    a = dense(t)[1]
    close(decode_jit(padded, a), decode_jit(t.clt, a), 1e-14)
    narrow_active, wide_active = case_active("plt"), wide.active
    np.testing.assert_array_equal(narrow_active.value_A, wide_active.value_A)

    def edges(active: object) -> np.ndarray:
        return attribute_recording(
            Prompt(
                t.params,
                t.recording,
                active,
                t.targets,
                cfg=t.cfg,
                config=AttributeConfig(max_features=None, tolerance=0.0),
            ),
            t.meta,
        ).edge_RN

    close(edges(wide_active), edges(narrow_active), 1e-13)


@pytest.mark.parametrize("site", ["resid_mid", "normalized", "mlp_in"])
@pytest.mark.parametrize("bias", [False, True])
def test_read_sites_and_their_rows_at_the_stream(site: str, bias: bool) -> None:
    """A norm with a bias takes the mean off; rows with it folded in read the same."""
    drawn_XD = np.asarray(jax.random.normal(jax.random.key(0), (8, 4), jnp.float64))
    mid_TD, W_FD = drawn_XD[:3], drawn_XD[3:]
    scale_T, gain_D, bias_D = np.arange(1.0, 4), np.arange(1.0, 5), np.arange(4.0)
    norm = Norm(jnp.asarray(gain_D), jnp.asarray(bias_D) if bias else None)
    normal_TD = (mid_TD - bias * mid_TD.mean(1, keepdims=True)) * scale_T[:, None]
    want = {
        "resid_mid": mid_TD,
        "normalized": normal_TD,
        "mlp_in": normal_TD * gain_D + bias * bias_D,
    }[site]
    got = read_site(site, norm, jnp.asarray(mid_TD), jnp.asarray(scale_T))
    np.testing.assert_allclose(got, want, rtol=1e-14)
    rows_FD, const_F = fold_reads(site, norm, W_FD)
    pre_TF = read_scale(site, jnp.asarray(scale_T))[:, None] * (mid_TD @ rows_FD.T)
    np.testing.assert_allclose(pre_TF + const_F[None], want @ W_FD.T, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "word"), [({"span": 5}, "span"), ({"activation": "topk"}, "topk")]
)
def test_impossible_dictionaries_are_refused(change: dict, word: str) -> None:
    good = {"n_layers": 4, "d_model": 16, "n_features": 20, "span": 4}
    with pytest.raises(InputError, match=word):
        CLTConfig(**(good | change))


def test_arrays_that_do_not_fit_the_config_are_refused() -> None:
    t = case("clt")
    check_params(t.clt, t.clt_cfg)
    with pytest.raises(InputError, match="W_dec"):
        check_params(t.clt, dataclasses.replace(t.clt_cfg, span=2))
    with pytest.raises(InputError, match="W_enc_LFD"):
        check_params(t.clt, dataclasses.replace(t.clt_cfg, n_features=21))
