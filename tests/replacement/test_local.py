"""The local replacement model: equal to the model here, linear in its free inputs."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, case, case_local, case_lrm, close, run_local_jit

from jaxclt.clt.transcoder import loaded_params
from jaxclt.lm.run import unembed
from jaxclt.replacement.errors import error_nodes
from jaxclt.replacement.local import LocalReplacement, local_replacement, run_local

pytestmark = pytest.mark.usefixtures("x64")

freeze_jit = jax.jit(local_replacement, static_argnames="cfg")


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_model_at_every_layer_and_position(name: str) -> None:
    """Maths 4.3: every residual stream and the logits of all positions."""
    rec, local = case(name).recording, case_local(name)
    close(local.mid_LTD, rec.mid_LTD, 1e-13)
    close(local.out_TD, rec.out_TD, 1e-13)
    params = case(name).params
    close(unembed(params, local.out_TD), unembed(params, rec.out_TD), 1e-13)


@pytest.mark.parametrize("name", CASES)
def test_reencoded_activations_are_the_clean_ones(name: str) -> None:
    """Maths 4.4: layer by layer (padded scan) equals all layers at once."""
    t, local = case(name), case_local(name)
    active = t.active
    dense = np.zeros(local.a_LTF.shape)
    dense[active.layer_A, active.pos_A, active.feature_A] = active.value_A
    close(local.a_LTF, dense, 1e-12)
    np.testing.assert_array_equal(np.asarray(local.a_LTF) != 0, dense != 0)
    pre = np.asarray(local.pre_LTF)[active.layer_A, active.pos_A, active.feature_A]
    close(pre, active.preact_A, 1e-12)


def corners(lrm: LocalReplacement, clean_a: jax.Array, key: jax.Array) -> list:
    """Four inputs x, x+u, x+v, x+u+v of (embeddings, errors, activations)."""
    x = tuple(map(np.asarray, (lrm.embed_TD, lrm.error_LTD, clean_a)))
    size = sum(a.size for a in x)
    flat = np.asarray(jax.random.normal(key, (2 * size,), jnp.float64))
    cut = np.cumsum([a.size for a in x])[:-1]
    u, v = (
        [d.reshape(a.shape) for d, a in zip(np.split(part, cut), x, strict=True)]
        for part in np.split(flat, 2)
    )
    return [
        [a + i * du + j * dv for a, du, dv in zip(x, u, v, strict=True)]
        for i, j in ((0, 0), (3, 0), (0, 3), (3, 3))
    ]


@pytest.mark.parametrize("name", CASES)
def test_it_is_affine_in_embeddings_errors_and_activations(name: str) -> None:
    """Maths 4.5 at any distance: mixed differences vanish with activations free."""
    lrm = case_lrm(name)
    points = corners(lrm, case_local(name).a_LTF, jax.random.key(1))

    def mixed(free: bool) -> tuple[float, float]:
        runs = [
            run_local_jit(lrm, embed_TD=e, error_LTD=r, a_LTF=a if free else None)
            for e, r, a in points
        ]
        flat = [np.r_[r.pre_LTF.ravel(), r.out_TD.ravel()] for r in runs]
        return np.abs(flat[0] - flat[1] - flat[2] + flat[3]).max(), np.abs(
            flat[3]
        ).max()

    difference, size = mixed(free=True)
    assert difference < 1e-13 * size
    if name == "clt":  # re-encoded, the gates bend it
        difference, size = mixed(free=False)
        assert difference > 1e-3 * size


def test_second_derivatives_are_zero() -> None:
    """Maths 4.5: exactly, by forward-over-forward; none of the frozen parts moves."""
    lrm = case_lrm("skip")
    x, u, v, _ = corners(lrm, case_local("skip").a_LTF, jax.random.key(2))
    du = [b - a for a, b in zip(x, u, strict=True)]
    dv = [b - a for a, b in zip(x, v, strict=True)]

    def out(inputs: list) -> jax.Array:
        e, r, a = inputs
        return run_local(lrm, embed_TD=e, error_LTD=r, a_LTF=a).out_TD

    def along(inputs: list) -> jax.Array:
        return jax.jvp(out, (inputs,), (du,))[1]

    first, second = jax.jit(lambda: jax.jvp(along, (x,), (dv,)))()
    assert np.abs(np.asarray(first)).max() > 0.1
    assert (np.asarray(second) == 0).all()


@pytest.mark.parametrize("scale", [30.0, 0.0])
def test_any_dictionary_gives_the_model(scale: float) -> None:
    """Maths 4.6: whatever the dictionary says wrong, error nodes take up."""
    t = case("clt")
    loud = dataclasses.replace(
        t.clt, W_dec=tuple(np.asarray(W) * scale for W in t.clt.W_dec)
    )
    lrm = freeze_jit(t.params, loaded_params(loud, t.clt_cfg), t.recording, cfg=t.cfg)
    change = np.abs(np.asarray(lrm.error_LTD) - case_lrm("clt").error_LTD).max()
    assert change > 0.1
    local = run_local_jit(lrm)
    close(local.mid_LTD, t.recording.mid_LTD, 1e-12)
    close(local.out_TD, t.recording.out_TD, 1e-12)


def test_without_errors_it_is_not_the_model() -> None:
    """The check above can fail."""
    t = case("clt")
    lrm = case_lrm("clt")
    silent = dataclasses.replace(lrm, error_LTD=np.zeros_like(lrm.error_LTD))
    gap = np.abs(np.asarray(run_local_jit(silent).out_TD - t.recording.out_TD))
    assert gap.max() > 0.1


@pytest.mark.parametrize("name", ["skip", "span2"])
def test_errors_of_the_sparse_and_the_dense_path_agree(name: str) -> None:
    t = case(name)
    want = np.asarray(case_lrm(name).error_LTD)
    close(error_nodes(t.active, t.recording), want, 1e-13)


def test_it_can_be_batched() -> None:
    """vmap over perturbed embeddings equals one at a time."""
    lrm, a = case_lrm("clt"), case_local("clt").a_LTF
    embed = np.asarray(lrm.embed_TD)
    batch = np.stack([embed, 2 * embed])
    f = jax.jit(jax.vmap(partial(run_local, lrm, error_LTD=None, a_LTF=a)))
    got = f(embed_TD=batch).out_TD
    for one, e in zip(got, batch, strict=True):
        want = run_local_jit(lrm, embed_TD=e, error_LTD=lrm.error_LTD, a_LTF=a)
        close(one, want.out_TD, 1e-13)
