"""A CLT trained on what a known CLT wrote finds its features again."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transcoder import decode, encode

from jaxclt.train import step as steps
from jaxclt.train.export import calibrate, threshold_form
from jaxclt.train.objectives import Batch, Standard, Terms
from jaxclt.train.params import Spec, TrainParams, init, to_clt
from jaxclt.train.schedules import Weights, learning_rate

L, D, F, T, K = 3, 32, 48, 512, 3


def planted(key: jax.Array) -> TrainParams:
    """Unit encoder directions, decoders of one norm to all later layers."""
    spec = Spec(n_layers=L, d_model=D, n_features=F, span=L, activation="relu")
    params = init(key, spec)

    def unit(x, axis):
        return x / jnp.linalg.norm(x, axis=axis, keepdims=True)

    return tuple(
        dataclasses.replace(
            p, W_enc_FD=unit(p.W_enc_FD, 1), W_dec_FMD=unit(p.W_dec_FMD, 2)
        )
        for p in params
    )


def activity(key: jax.Array) -> jax.Array:
    """About K features a token and layer, independent, of size 1 to 2."""
    on, size = jax.random.split(key)
    fires = jax.random.bernoulli(on, K / F, (L, T, F)).astype(jnp.float32)
    return fires * (1 + jax.random.uniform(size, (L, T, F)))


def batch_of(truth: TrainParams, key: jax.Array) -> Batch:
    """Reads hold the features' encoder directions, writes their decoders."""
    a_LTF = activity(key)
    clt = to_clt(truth)
    read_LTD = jnp.einsum("LTF,LFD->LTD", a_LTF, clt.W_enc_LFD)
    write_LTD = decode(clt, a_LTF)
    scale = jnp.sqrt(write_LTD.var(axis=(1, 2), keepdims=True))
    return Batch(
        read_LTD=read_LTD / read_LTD.std(),
        write_LTD=write_LTD / scale,
        dead_LF=jnp.zeros((L, F), bool),
    )


def recovered(truth: TrainParams, found: TrainParams) -> np.ndarray:
    """Best cosine [L, F] of each true decoder (all targets) with a found one."""
    best = []
    for p, q in zip(truth, found, strict=True):
        # Each target was scaled by itself; per-target cosines do not mind.
        cos = np.ones((F, len(q.b_enc_F)))
        for m in range(p.W_dec_FMD.shape[1]):
            a, b = (np.asarray(x.W_dec_FMD[:, m]) for x in (p, q))
            a = a / np.linalg.norm(a, axis=1, keepdims=True)
            b = b / (np.linalg.norm(b, axis=1, keepdims=True) + 1e-12)
            cos = np.minimum(cos, a @ b.T)
        best.append(cos.max(1))
    return np.stack(best)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["batch_topk", "jumprelu"])
def test_planted_features_are_recovered(activation: str):
    truth = planted(jax.random.key(0))
    n_steps = 600 if activation == "batch_topk" else 1500
    spec = Spec(
        n_layers=L,
        d_model=D,
        n_features=2 * F,
        span=L,
        activation=activation,  # pyright: ignore
        k=K,
    )
    tx = steps.optimiser(learning_rate(3e-3, n_steps, warmup=50))
    jump = activation == "jumprelu"
    recipe = steps.Recipe(
        n_steps=n_steps,
        weights=Weights(sparsity=1e-2 if jump else 0.0, auxk=1 / 32, ramp=0.5),
        l0=K * L if jump else None,
        dead_tokens=50 * T,
    )
    terms = Terms(sparsity="tanh" if jump else "none", auxk=16)
    state = steps.init_state(init(jax.random.key(1), spec), tx, jax.random.key(2))
    step = steps.make_step(Standard(terms), spec, tx, recipe)
    make = jax.jit(lambda key: batch_of(truth, key))
    logged = {}
    for i in range(n_steps):
        state, logged = step(state, make(jax.random.fold_in(jax.random.key(3), i)))
    cosine_LF = recovered(truth, state.params)
    share = (cosine_LF > 0.9).mean()

    assert share > 0.9
    if jump:  # the controller held what was asked
        assert abs(float(logged["l0_L"].sum()) / (K * L) - 1) < 0.1
        return
    held = batch_of(truth, jax.random.key(99))
    theta_L = calibrate(state.params, held.read_LTD, K)
    clt, cfg = threshold_form(state.params, spec, theta_L)
    a_LTF = encode(clt, held.read_LTD, cfg=cfg)
    error = decode(clt, a_LTF) - held.write_LTD
    assert float(jnp.square(error).mean()) < 0.15
