"""The frozen stream: linear, and equal to the recording it came from."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAMILY_CASES, MODELS, case, case_active, close

from jaxclt.lm.frozen import bias_reads, frozen_reads, replay
from jaxclt.lm.run import native_mlp, run
from jaxclt.types import Reads, Sources

pytestmark = pytest.mark.usefixtures("x64")

replay_jit = jax.jit(replay, static_argnames="cfg")
reads_jit = jax.jit(frozen_reads, static_argnames="cfg")
bias_jit = jax.jit(bias_reads, static_argnames="cfg")


def clean_sources(name: str) -> Sources:
    rec = case(name).recording
    return Sources(embed_TD=rec.embed_TD, write_LTD=rec.write_LTD)


@pytest.mark.parametrize("name", [*MODELS, *FAMILY_CASES])
def test_replay_of_the_recorded_writes_is_the_recording(name: str) -> None:
    t = case(name)
    reads = replay_jit(t.params, t.recording.frozen, clean_sources(name), cfg=t.cfg)
    close(reads.mid_LTD, t.recording.mid_LTD, 1e-14)
    close(reads.out_TD, t.recording.out_TD, 1e-14)


def test_replay_through_a_skip_is_the_recording() -> None:
    """What the skip writes is computed from the stream, the rest is given."""
    t = case("skip")
    scale_LT, W_skip_LDD = case_active("skip").skip
    read_LTD = np.asarray(t.recording.mid_LTD * scale_LT[:, :, None])
    skip_LTD = read_LTD @ np.asarray(W_skip_LDD)
    assert np.abs(skip_LTD).max() > 0.1
    given = dataclasses.replace(
        clean_sources("skip"), write_LTD=t.recording.write_LTD - skip_LTD
    )
    reads = replay_jit(
        t.params, t.recording.frozen, given, cfg=t.cfg, skip=(scale_LT, W_skip_LDD)
    )
    close(reads.mid_LTD, t.recording.mid_LTD, 1e-14)
    close(reads.out_TD, t.recording.out_TD, 1e-14)


@pytest.mark.parametrize("name", ["skip", "no_bias", "gemma2"])
def test_replay_is_its_linear_part_plus_its_bias_path(name: str) -> None:
    """Maths 4.8: a read is linear in the sources, plus what it holds without any."""
    t = case(name)
    skip, frozen = case_active(name).skip, t.recording.frozen
    some = jax.tree.map(lambda x: -3 * np.asarray(x) + 1, clean_sources(name))
    none = np.zeros_like(some.write_LTD)
    linear = reads_jit(t.params, frozen, some, cfg=t.cfg, skip=skip)
    bias = bias_jit(t.params, frozen, none, cfg=t.cfg, skip=skip)
    whole = replay_jit(t.params, frozen, some, cfg=t.cfg, skip=skip)
    jax.tree.map(lambda a, b, c: close(a + b, c, 1e-13), linear, bias, whole)
    size = float(jnp.abs(bias.out_TD).max())
    assert size == 0 if name == "no_bias" else size > 1e-3


def test_bias_path_is_the_derivative_along_all_biases() -> None:
    """Maths 4.8: the bias column from the Jacobian equals the zero-source forward."""
    t = case("skip")
    skip, frozen, b = case_active("skip").skip, t.recording.frozen, t.params.blocks
    names = ("v_bias_LGC", "o_bias_LD")

    @jax.jit
    def reads(biases: tuple) -> Reads:
        block = dataclasses.replace(b, **dict(zip(names, biases[0], strict=True)))
        params = dataclasses.replace(t.params, blocks=block)
        return bias_reads(params, frozen, biases[1], cfg=t.cfg, skip=skip)

    write_LTD = jnp.broadcast_to(t.clt.b_dec_LD[:, None], t.recording.mid_LTD.shape)
    true = (tuple(getattr(b, n) for n in names), write_LTD)
    none = jax.tree.map(lambda x: np.zeros(x.shape), true)
    at_zero, along = jax.jvp(reads, (none,), (true,))
    assert all(not leaf.any() for leaf in jax.tree.leaves(at_zero))
    jax.tree.map(lambda a, c: close(a, c, 1e-14), along, reads(true))


def test_jax_transposes_the_frozen_stream() -> None:
    """`linear_transpose` accepts it, and <y, J x> = <J^T y, x>."""
    t = case("skip")
    x = clean_sources("skip")
    skip = case_active("skip").skip
    f = partial(reads_jit, t.params, t.recording.frozen, cfg=t.cfg, skip=skip)
    reads = f(x)
    y = jax.tree.map(np.cos, reads)
    (back,) = jax.jit(jax.linear_transpose(f, x))(y)

    def dot(a: object, b: object) -> float:
        products = jax.tree.map(lambda u, v: (np.asarray(u) * v).sum(), a, b)
        return float(sum(jax.tree.leaves(products)))

    want = dot(y, reads)
    assert abs(want) > 1e-2
    assert dot(back, x) == pytest.approx(want, rel=1e-11)


def test_jax_refuses_to_transpose_the_live_model() -> None:
    t = case("clt")

    def live(embed_TD: jax.Array) -> jax.Array:
        return run(t.params, embed_TD, native_mlp(t.cfg), cfg=t.cfg).out_TD

    # JAX stops at the first product of two things that depend on the input.
    with pytest.raises((AssertionError, NotImplementedError)):
        jax.linear_transpose(live, t.recording.embed_TD)(t.recording.out_TD)


def test_frozen_reads_are_causal() -> None:
    t = case("clt")
    x = clean_sources("clt")
    later_LTD = np.array(x.write_LTD)
    later_LTD[:, 4:] += 5.0
    f = partial(reads_jit, t.params, t.recording.frozen, cfg=t.cfg)
    was, now = (
        np.asarray(f(Sources(embed_TD=x.embed_TD, write_LTD=write)).mid_LTD)
        for write in (x.write_LTD, later_LTD)
    )
    np.testing.assert_array_equal(was[:, :4], now[:, :4])
    np.testing.assert_array_equal(was[0], now[0])  # layer 0 reads before any write
    assert (np.abs(was - now)[1:, 4:].max(-1) > 1e-3).all()
