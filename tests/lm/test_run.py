"""The decoder: causality, grouped queries, tied embeddings."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from cases import MODELS, case, close
from jax import Array

from jaxclt.errors import InputError
from jaxclt.lm.block import Past
from jaxclt.lm.cache import past_of, sample_text
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import embed, forward, native_mlp, record, run, unembed

pytestmark = pytest.mark.usefixtures("x64")

forward_jit = jax.jit(forward, static_argnames="cfg")
record_jit = jax.jit(record, static_argnames="cfg")


def test_a_token_changes_nothing_before_it() -> None:
    t = case("clt")
    changed = np.array(t.token_T)
    changed[3] = (changed[3] + 1) % t.cfg.d_vocab
    was = np.asarray(forward_jit(t.params, t.token_T, cfg=t.cfg))
    now = np.asarray(forward_jit(t.params, changed, cfg=t.cfg))
    np.testing.assert_array_equal(was[:3], now[:3])
    assert (np.abs(was[3:] - now[3:]).max(1) > 1e-3).all()


@pytest.mark.parametrize(
    "name",
    [
        "clt",
        "gemma3",
        "gpt2",
        "neox",
        *(pytest.param(m, marks=pytest.mark.slow) for m in MODELS[1:]),
    ],
)
def test_one_position_at_a_time_equals_all_at_once(name: str) -> None:
    """The rest of a prompt, run after the keys and values of its start."""
    t, n = case(name), 3

    @jax.jit
    def piece(token_T: Array, past: Past | None, start: Array):
        entering = embed(t.params, token_T, start=start)
        mlp = native_mlp(t.cfg)
        return run(t.params, entering, mlp, cfg=t.cfg, past=past, start=start)

    T = len(t.token_T)
    past = past_of(t.params, piece(t.token_T[:n], None, 0).taps, cfg=t.cfg, room=T - n)
    for start, end in ((n, n + 1), (n + 1, n + 2), (n + 2, T)):
        done = piece(t.token_T[start:end], past, start)
        close(done.out_TD, t.recording.out_TD[start:end], 1e-13)
        past = done.taps.past


@pytest.mark.parametrize("name", MODELS)
def test_attention_patterns_are_causal_and_sum_to_one(name: str) -> None:
    pattern = np.asarray(case(name).recording.frozen.pattern_LHTS)
    T = pattern.shape[-1]
    assert (pattern[..., ~np.tri(T, dtype=bool)] == 0).all()
    close(pattern.sum(-1), np.ones(pattern.shape[:-1]), 1e-14)


def test_grouped_queries_equal_repeated_key_value_heads() -> None:
    """Query head h reads key/value head h // (H / G)."""
    t = case("clt")
    b = t.params.blocks
    repeat = 2
    wide = dataclasses.replace(
        b,
        **{
            name: np.repeat(getattr(b, name), repeat, axis=axis)
            for name, axis in {
                "k_LDGC": 2, "v_LDGC": 2, "k_bias_LGC": 1, "v_bias_LGC": 1,
            }.items()
        },
    )  # fmt: skip
    params = dataclasses.replace(t.params, blocks=wide)
    cfg = dataclasses.replace(t.cfg, n_kv_heads=t.cfg.n_kv_heads * repeat)
    got = forward_jit(params, t.token_T, cfg=cfg)
    close(got, unembed(t.params, t.recording.out_TD), 1e-13)


def test_tied_and_untied_unembedding_agree() -> None:
    t = case("span2")
    assert t.params.unembed_DV is None
    untied = dataclasses.replace(t.params, unembed_DV=t.params.embed_VD.T)
    out_TD = t.recording.out_TD
    close(unembed(untied, out_TD), unembed(t.params, out_TD), 1e-14)


def test_position_reaches_attention_only_by_rotation() -> None:
    """With equal tokens every position sees one stream, so all logits are equal."""
    t = case("clt")
    same = np.full_like(t.token_T, 7)
    rec = record_jit(t.params, same, cfg=t.cfg)
    logits = np.asarray(unembed(t.params, rec.out_TD))
    close(logits, np.broadcast_to(logits[:1], logits.shape), 1e-13)
    uneven = np.ptp(np.asarray(rec.frozen.pattern_LHTS)[:, :, -1], axis=-1)
    assert uneven.max() > 1e-3  # the patterns do depend on the distance


def test_recording_adds_up() -> None:
    """The taps are one stream: resid -> mid -> resid + write."""
    rec = case("clt").recording
    leaving_LTD = np.asarray(rec.mid_LTD) + rec.write_LTD
    close(np.asarray(rec.resid_LTD)[1:], leaving_LTD[:-1], 1e-15)
    close(np.asarray(rec.resid_LTD)[0], rec.embed_TD, 0)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"n_kv_heads": 3}, "multiple"), ({"d_head": 5}, "even"), ({"d_mlp": 0}, "d_mlp")],
)
def test_impossible_sizes_are_refused(change: dict[str, int], word: str) -> None:
    good = dataclasses.asdict(case("clt").cfg)
    with pytest.raises(InputError, match=word):
        LMConfig(**(good | change))


def test_sampled_text_is_drawn_from_the_models_distribution() -> None:
    """Token by token, the draw that the same key makes from the whole text's logits."""
    t, size, key = case("clt"), 6, jax.random.key(7)
    draw = jax.jit(sample_text, static_argnames=("cfg", "size"))
    text = draw(t.params, t.token_T[0], key, cfg=t.cfg, size=size)
    logit_TV = forward_jit(t.params, text, cfg=t.cfg)
    want = [
        int(jax.random.categorical(jax.random.fold_in(key, i + 1), logit_TV[i]))
        for i in range(size - 1)
    ]
    assert text.tolist() == [int(t.token_T[0]), *want]
    assert len(set(want)) > 1
