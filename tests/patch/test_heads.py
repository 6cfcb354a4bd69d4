"""A feature changed only inside queries or keys of some heads (maths 15.19)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAMILIES, case, case_active, close

from jaxclt.lm.block import block
from jaxclt.lm.layers import mlp_at, norm_scale, normalise, out_norm
from jaxclt.lm.rotary import rotary_frequencies
from jaxclt.lm.run import Run
from jaxclt.patching.change import Change
from jaxclt.patching.features import gather_features
from jaxclt.patching.heads import Head, choose_heads, in_heads
from jaxclt.patching.how import How
from jaxclt.patching.modes import underlying
from jaxclt.patching.patchable import Patchable, hold_of, make_patchable
from jaxclt.types import Held

pytestmark = pytest.mark.usefixtures("x64")

NAMES = ["clt", "skip", *FAMILIES]
LAYER, HEAD, M = 2, 3, -2.5
LIVE = How(patterns="live")


@functools.cache
def model(name: str) -> Patchable:
    with jax.enable_x64(True):
        t = case(name)
        return make_patchable(t.dictionary, t.params, t.recording, t.cfg)


@functools.partial(jax.jit, static_argnames="how")
def run_jit(model: Patchable, change: Change, heads: Any, how: How) -> Run:
    return in_heads(model, change, heads, how=how, keep_patterns=True)


@functools.partial(jax.jit, static_argnames="how")
def clean_jit(model: Patchable, how: How) -> Run:
    hold, first = hold_of(model.recording, how), jnp.int32(LAYER)
    return underlying(model, first, hold, keep_patterns=True)


def sources(name: str) -> np.ndarray:
    """A feature of each of the first two layers, at the two first positions."""
    a = case_active(name)
    place_A3 = np.stack([a.layer_A, a.pos_A, a.feature_A], 1)
    found = [(a.layer_A == l) & (a.pos_A == l) & (a.value_A != 0) for l in (0, 1)]
    return place_A3[[np.flatnonzero(here)[0] for here in found]]


def run(name: str, side: Any, factor: float = M, how: How = LIVE) -> Run:
    features = gather_features(case(name).dictionary, model(name), sources(name))
    chosen = choose_heads([Head(LAYER, HEAD, side)], case(name).cfg)
    return run_jit(model(name), Change.of(features, factor), chosen, how)


class Plain:
    """One layer's weights in numpy, and its attention as the paper writes it."""

    def __init__(self, name: str, layer: int) -> None:
        t, self.layer = case(name), layer
        self.cfg, rec = t.cfg, t.recording
        blocks = vars(t.params.blocks).items()
        self.p = {k: np.asarray(x[layer]) for k, x in blocks if x is not None}
        self.resid, self.frozen = np.asarray(rec.resid_LTD[layer]), rec.frozen

    def held(self, name: str) -> np.ndarray:
        return np.asarray(getattr(self.frozen, name)[self.layer])

    def normed(self, x: np.ndarray, *, bias: bool) -> np.ndarray:
        shift = self.p.get("norm_attn_bias_LD")
        if "norm_attn_LD" not in self.p:
            return x
        if shift is not None:
            x = x - x.mean(-1, keepdims=True)
        x = x * self.held("attn_scale_LT")[:, None] * self.p["norm_attn_LD"]
        return x if shift is None or not bias else x + shift

    def moved(self, x: np.ndarray) -> np.ndarray:
        """What frozen attention makes of a stream, biases aside."""
        v = np.einsum("td,dgc->tgc", self.normed(x, bias=False), self.p["v_LDGC"])
        v = v.repeat(self.cfg.n_queries_per_kv, 1)
        out = np.einsum(
            "hts,shc,hcd->td", self.held("pattern_LHTS"), v, self.p["o_LHCD"]
        )
        if "post_attn_LD" in self.p:
            out = (
                out * self.held("post_attn_scale_LT")[:, None] * self.p["post_attn_LD"]
            )
        return out

    def side(self, x: np.ndarray, letter: str, *, bias: bool) -> np.ndarray:
        """Queries or keys of a stream in all heads, denominators held."""
        weight = self.p["q_LDHC" if letter == "q" else "k_LDGC"]
        shift = self.p.get("q_bias_LHC" if letter == "q" else "k_bias_LGC", 0)
        clean = np.einsum("td,dhc->thc", self.normed(self.resid, bias=True), weight)
        out = np.einsum("td,dhc->thc", self.normed(x, bias=bias), weight)
        out = out + shift if bias else out
        joint = f"{letter}_norm_LHC" if letter == "q" else f"{letter}_norm_LGC"
        gain = self.p.get(f"{letter}_norm_LC", self.p.get(joint))
        late = gain is not None and self.cfg.norm_turned
        if gain is not None:
            over = (-2, -1) if joint in self.p else -1
            size = ((clean + shift) ** 2).mean(over, keepdims=True) + self.cfg.norm_eps
            out = out / np.sqrt(size) * (1 if late else gain)
        out = self.turned(out) * (gain if late else 1)
        return out if letter == "q" else out.repeat(self.cfg.n_queries_per_kv, 1)

    def turned(self, x: np.ndarray) -> np.ndarray:
        cfg, J = self.cfg, self.cfg.n_turning // 2
        if not self.p.get("turning_L", True):
            return x
        freq = rotary_frequencies(2 * J, cfg.rope_theta, cfg.rope_scaling)
        if cfg.rope_local_theta is not None and self.p["local_L"]:
            freq = rotary_frequencies(2 * J, cfg.rope_local_theta)
        turn = np.exp(1j * np.arange(len(x))[:, None, None] * freq)
        z = (x[..., :J] + 1j * x[..., J : 2 * J]) * turn
        return np.concatenate([z.real, z.imag, x[..., 2 * J :]], -1)

    def scores(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Products [T, S] of one head's queries and keys."""
        scale = self.cfg.query_scale or self.cfg.d_head**-0.5
        return q @ k.T * scale

    def pattern(self, score: np.ndarray) -> np.ndarray:
        cfg, T = self.cfg, len(score)
        if cfg.attn_cap is not None:
            score = cfg.attn_cap * np.tanh(score / cfg.attn_cap)
        back = np.arange(T)[:, None] - np.arange(T)
        seen = back >= 0
        if cfg.window is not None and self.p.get("local_L", True):
            seen &= back < cfg.window
        e = np.where(seen, np.exp(score - score.max()), 0)
        return e / e.sum(-1, keepdims=True)


def contributed(name: str) -> list[np.ndarray]:
    """What the features together make of the streams that enter the layers."""
    t, a = case(name), case_active(name)
    x, out = np.zeros(t.recording.embed_TD.shape), []
    for l in range(LAYER + 1):
        out.append(x)
        after = x + Plain(name, l).moved(x)
        mid = x if t.cfg.parallel else after
        write = np.zeros_like(x)
        for layer, pos, feature in sources(name):
            rows = np.asarray(t.clt.W_dec[layer][feature])
            here = (a.layer_A == layer) & (a.pos_A == pos) & (a.feature_A == feature)
            if 0 <= l - layer < len(rows):
                write[pos] += a.value_A[here] * rows[l - layer]
        if a.skip is not None:
            write += a.skip.at(l, slice(None)).write(mid)
        x = after + write
    return out


@functools.cache
def changed_pattern(name: str, side: str) -> np.ndarray:
    """The head's pattern [T, S]: the model's scores and (M - 1) times the parts."""
    plain, c = Plain(name, LAYER), contributed(name)[LAYER]
    q, k = (plain.side(plain.resid, x, bias=True)[:, HEAD] for x in "qk")
    Q, K = ((M - 1) * plain.side(c, x, bias=False)[:, HEAD] for x in "qk")
    score = plain.scores(q, k)
    close(plain.pattern(score), plain.held("pattern_LHTS")[HEAD], 1e-12)
    if side != "key":
        score = score + plain.scores(Q, k)
    if side != "query":
        score = score + plain.scores(q, K)
    if side == "both":
        score = score + plain.scores(Q, K)
    return plain.pattern(score)


@pytest.mark.parametrize("name", NAMES)
def test_scores_change_by_the_features_part_of_them(name: str) -> None:
    """Brute force, all denominators held; no other head of the layer sees it."""
    clean_HTS = np.asarray(case(name).recording.frozen.pattern_LHTS)[LAYER]
    for side in ("query", "key", "both"):
        found_HTS = np.asarray(run(name, side).taps.pattern_HTS)[LAYER]
        want = changed_pattern(name, side)
        close(found_HTS[HEAD], want, 1e-12)
        assert np.abs(want - clean_HTS[HEAD]).max() > 1e-4
        close(np.delete(found_HTS, HEAD, 0), np.delete(clean_HTS, HEAD, 0), 1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_from_the_softmax_on_the_model_answers(name: str) -> None:
    """As block by block by hand, with the head's own pattern put in."""
    t, rec = case(name), case(name).recording
    pattern_HTS = np.array(rec.frozen.pattern_LHTS)[LAYER]
    pattern_HTS[HEAD] = changed_pattern(name, "query")

    @jax.jit
    def by_hand(params: Any, resid_TD: Any, pattern_HTS: Any) -> Any:
        for l in range(LAYER, t.cfg.n_layers):
            p = jax.tree.map(lambda x, l=l: x[l], params.blocks)
            resid_TD, _ = block(
                p,
                resid_TD,
                lambda mid, scale, p=p: mlp_at(p, mid, scale, cfg=t.cfg)[0],
                cfg=t.cfg,
                frozen=Held(pattern_LHTS=pattern_HTS) if l == LAYER else None,
            )
        norm = out_norm(params)
        return normalise(resid_TD, norm_scale(resid_TD, norm, eps=t.cfg.norm_eps), norm)

    want = by_hand(t.params, rec.resid_LTD[LAYER], pattern_HTS)
    close(run(name, "query").out_TD, want, 1e-12)
    assert np.abs(want - rec.out_TD).max() > 1e-5


def test_a_factor_of_one_is_the_model_bit_for_bit() -> None:
    for how in (LIVE, How(norms="frozen", patterns="live")):
        for side in ("query", "both"):
            found, want = run("clt", side, 1.0, how), clean_jit(model("clt"), how)
            np.testing.assert_array_equal(found.out_TD, want.out_TD)
            np.testing.assert_array_equal(found.taps.pattern_HTS, want.taps.pattern_HTS)


def test_other_patterns_are_held_unless_they_are_live() -> None:
    clean = np.asarray(case("clt").recording.frozen.pattern_LHTS)
    frozen, live = (
        np.asarray(run("clt", "key", how=how).taps.pattern_HTS) for how in (How(), LIVE)
    )
    close(frozen[LAYER + 1 :], clean[LAYER + 1 :], 1e-13)
    close(frozen[LAYER], live[LAYER], 1e-13)
    assert np.abs(live[LAYER + 1] - clean[LAYER + 1]).max() > 1e-4
