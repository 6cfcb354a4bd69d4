"""Gradients: two passes, accumulation, the architecture's special cases; the step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transcoder import decode, encode

from jaxclt.errors import InputError
from jaxclt.train import step as steps
from jaxclt.train.objectives import Batch, Standard, Terms, read_out
from jaxclt.train.params import Spec, init, n_params, to_clt
from jaxclt.train.schedules import Weights, control_start, learning_rate, steer, values

pytestmark = pytest.mark.usefixtures("x64")
L, T, D, F = 3, 16, 8, 12
NOW = {k: 0.1 for k in ("sparsity", "preactivation", "auxk", "jacobian")}
ALL = Terms(
    sparsity="tanh",
    preactivation="dead",
    auxk=2,
    auxk_share=0.5,
    matryoshka=(4,),
    jacobian=True,
)


def spec_of(activation: str = "jumprelu", span: int = 2, **more) -> Spec:
    return Spec(
        n_layers=L,
        d_model=D,
        n_features=F,
        span=span,
        activation=activation,  # pyright: ignore
        k=3,
        compute="float64",
        **more,
    )


def a_batch(dtype=jnp.float64) -> Batch:
    x, y, u, v = jax.random.normal(jax.random.key(1), (4, L, T, D), dtype)
    return Batch(
        read_LTD=x,
        write_LTD=y,
        dead_LF=jnp.arange(L * F).reshape(L, F) % 3 == 0,
        tangent_LTD=u,
        response_LTD=v,
    )


def now() -> dict[str, jax.Array]:
    return {k: jnp.float64(v) for k, v in NOW.items()}


def weights(spec: Spec, skip: bool = True):
    params = init(jax.random.key(0), spec, skip=skip, dtype=jnp.float64, theta=0.2)
    # larger than at the start, so that features are well on both sides
    return jax.tree.map(
        lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params
    )


def close(a, b, atol: float) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(x).max() > 1e-6
        np.testing.assert_allclose(x, y, atol=atol)


def two_pass(params, batch: Batch, spec: Spec):
    """As the step of `--memory per_source` does it, layer by layer."""
    ours = Standard(ALL)
    back, metrics = steps.first_pass(ours, params, batch, now(), spec)
    grads = []
    for l, p in enumerate(params):
        near = steps.near(back, l, spec)
        grads.append(steps.source_gradient(ours, p, near, batch.layer(l), now(), spec))
    return tuple(grads), metrics


@pytest.mark.parametrize(
    "activation",
    [
        pytest.param("relu", marks=pytest.mark.slow),
        "jumprelu",
        pytest.param("topk", marks=pytest.mark.slow),
        "batch_topk",
    ],
)
def test_two_passes_equal_autodiff(activation: str):
    spec = spec_of(activation)
    params, batch = weights(spec), a_batch()
    plain = jax.jit(lambda p: steps.gradients(Standard(ALL), p, batch, now(), spec))(
        params
    )
    twice = jax.jit(lambda p: two_pass(p, batch, spec))(params)
    close(plain[0], twice[0], 1e-13)
    close(plain[1], twice[1], 1e-13)


@pytest.mark.slow
def test_remat_changes_nothing():
    spec, batch = spec_of(), a_batch()
    params = weights(spec)
    plain = steps.gradients(Standard(ALL), params, batch, now(), spec)
    remat = steps.gradients(Standard(ALL), params, batch, now(), spec, remat=True)
    close(plain, remat, 1e-13)


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch():
    spec, batch = spec_of(), a_batch()
    params, objective = weights(spec), Standard(dataclasses.replace(ALL, auxk=0))
    whole, m = steps.gradients(objective, params, batch, now(), spec)
    parts, n = steps.gradients(objective, params, batch, now(), spec, accumulate=4)
    close(whole, parts, 1e-13)
    np.testing.assert_allclose(m["loss"], n["loss"])
    np.testing.assert_allclose(m["density_LF"], n["density_LF"])


@pytest.mark.parametrize("span", [1, 2, 3])
def test_the_loss_is_the_dictionarys_error(span: int):
    """Written once more through jaxclt.clt, in raw formulas."""
    spec, batch = spec_of(span=span), a_batch()
    params = weights(spec)
    clt = to_clt(params)
    a = encode(clt, batch.read_LTD, cfg=spec.clt_config())
    error = decode(clt, a, batch.read_LTD) - batch.write_LTD
    norm = np.stack(
        [np.linalg.norm(p.W_dec_FMD.reshape(F, -1), axis=1) for p in params]
    )
    want = (np.asarray(error) ** 2).mean((1, 2)).sum()
    want += 0.1 * np.tanh(4 * norm[:, None] * a).sum(2).mean(1).sum()
    loss, metrics = Standard(Terms())(params, batch, now(), spec)
    np.testing.assert_allclose(loss, want, rtol=1e-12)
    centred = batch.write_LTD - batch.write_LTD.mean(1, keepdims=True)
    np.testing.assert_allclose(
        metrics["fvu_L"], (error**2).sum((1, 2)) / (centred**2).sum((1, 2)), rtol=1e-12
    )
    np.testing.assert_allclose(metrics["l0_L"], (a > 0).sum(2).mean(1), rtol=1e-6)


def test_span_1_is_one_transcoder_per_layer():
    """Loss and gradient are sums over layers trained alone (maths 19.13)."""
    spec, batch = spec_of(span=1), a_batch()
    params = weights(spec)
    one = Spec(n_layers=1, d_model=D, n_features=F, span=1, compute="float64")
    together, m = steps.gradients(Standard(Terms()), params, batch, now(), spec)
    total = 0.0
    for l in range(L):
        alone = jax.tree.map(lambda x: x[l : l + 1], batch)  # noqa: B023
        grad, n = steps.gradients(
            Standard(Terms()), params[l : l + 1], alone, now(), one
        )
        close(grad[0], together[l], 1e-14)
        total += n["loss"]
    np.testing.assert_allclose(total, m["loss"])


@pytest.mark.slow
def test_matryoshka_is_the_mean_over_prefixes():
    spec, batch = spec_of("relu"), a_batch()
    params = weights(spec, skip=False)
    nested = Standard(Terms(sparsity="none", matryoshka=(2, 5)))
    plain = Standard(Terms(sparsity="none"))
    each = []
    for size in (2, 5, F):
        cut = [
            dataclasses.replace(
                p,
                W_enc_FD=p.W_enc_FD[:size],
                b_enc_F=p.b_enc_F[:size],
                W_dec_FMD=p.W_dec_FMD[:size],
            )
            for p in params
        ]
        small = dataclasses.replace(spec, n_features=size)
        each.append(plain(tuple(cut), batch, now(), small)[0])
    got = nested(params, batch, now(), spec)[0]
    np.testing.assert_allclose(got, np.mean(each), rtol=1e-12)


def test_auxk_reconstructs_the_error_with_dead_features_only():
    spec, batch = spec_of("topk"), a_batch()
    params = weights(spec)
    terms = Terms(sparsity="none", auxk=2, auxk_share=1.0)
    with_aux, _ = Standard(terms)(params, batch, now(), spec)
    without, _ = Standard(dataclasses.replace(terms, auxk=0))(
        params, batch, now(), spec
    )
    clt, dead = to_clt(params), np.asarray(batch.dead_LF)
    pre = np.einsum("LTD,LFD->LTF", batch.read_LTD, clt.W_enc_LFD)
    pre += np.asarray(clt.b_enc_LF)[:, None]
    kept = np.where(dead[:, None], pre, -np.inf)
    kept = np.where(kept >= np.sort(kept, -1)[..., -2:-1], kept, 0)
    aux = jnp.asarray(np.maximum(kept, 0))
    no_bias = dataclasses.replace(clt, b_dec_LD=jnp.zeros((L, D)), W_skip_LDD=None)
    from jaxclt.clt.estimators import topk

    a = jnp.stack([topk(jnp.asarray(h), 3) for h in pre])
    left = batch.write_LTD - decode(clt, a, batch.read_LTD)
    want = np.square(decode(no_bias, aux) - left).mean((1, 2)).sum()
    np.testing.assert_allclose(with_aux - without, 0.1 * want, rtol=1e-10)
    # The error is a constant: living features get no gradient from AuxK.
    grads = [
        steps.gradients(Standard(t), params, batch, now(), spec)[0]
        for t in (terms, dataclasses.replace(terms, auxk=0))
    ]
    for l in range(L):
        more = grads[0][l].W_dec_FMD - grads[1][l].W_dec_FMD
        assert np.abs(more[~dead[l]]).max() < 1e-14
        assert np.abs(more[dead[l]]).max() > 1e-4


def test_writes_of_all_sources_meet_at_their_targets():
    spec = spec_of(span=2)
    writes = [
        {
            "x": jnp.full((1, spec.n_writes(l), 1), 10.0**l)
            * jnp.array([1.0, 2.0])[None, : spec.n_writes(l), None]
        }
        for l in range(L)
    ]
    got = [float(x[0, 0]) for x in read_out(writes, spec)["x"]]
    assert got == [1.0, 10 + 2, 100 + 20]


def run(memory: str, n: int = 3, **more):
    spec = spec_of()
    params = weights(spec)
    tx = steps.optimiser(learning_rate(1e-2, 10, warmup=1))
    recipe = steps.Recipe(
        n_steps=10,
        weights=Weights(sparsity=1e-2, preactivation=1e-3, auxk=1e-2, jacobian=1e-2),
        dead_tokens=2 * T,
        memory=memory,
        **more,
    )
    state = steps.init_state(params, tx, jax.random.key(0))
    step = steps.make_step(Standard(ALL), spec, tx, recipe)
    logged = {}
    for _ in range(n):
        state, logged = step(state, a_batch())
    return state, logged


@pytest.mark.slow
def test_per_source_memory_gives_the_same_weights():
    full, m = run("full", clip=0.0)
    lean, n = run("per_source", clip=0.0)
    close(full.params, lean.params, 1e-9)
    np.testing.assert_allclose(m["loss"], n["loss"])
    np.testing.assert_array_equal(full.silent_LF, lean.silent_LF)


def test_silent_features_are_counted_in_tokens():
    state, logged = run("full", n=3)
    silent, density = np.asarray(state.silent_LF), np.asarray(state.density_LF)
    assert set(np.unique(silent)) <= {0, T, 2 * T, 3 * T}
    assert (density[silent == 3 * T] == 0).all()
    assert (density[silent == 0] > 0).all()
    np.testing.assert_allclose(logged["dead"], (silent >= 2 * T).mean(), rtol=1e-6)


def test_thresholds_stay_positive_and_are_not_clipped():
    spec = spec_of()
    p = weights(spec)[0]
    tx = steps.optimiser(1.0)
    grad = jax.tree.map(jnp.ones_like, p)
    assert p.theta_F is not None
    new, _ = steps.update_layer(tx, p, tx.init(p), grad, jnp.float32(100.0), 1e-3)  # pyright: ignore
    assert new.theta_F is not None
    assert float(new.theta_F.min()) == 0.0
    steps_taken = []
    for theta_grad in (1.0, 2.0):  # sgd shows what arrives at the optimiser
        import optax

        sgd = optax.sgd(1e-3)
        one = dataclasses.replace(grad, theta_F=grad.theta_F * theta_grad)
        got, _ = steps.update_layer(sgd, p, sgd.init(p), one, jnp.float32(100.0), 1.0)  # pyright: ignore
        steps_taken.append((p.theta_F - got.theta_F).max())
        np.testing.assert_allclose(p.b_enc_F - got.b_enc_F, 1e-5, rtol=1e-6)
    np.testing.assert_allclose(steps_taken, [1e-3, 2e-3])


@pytest.mark.slow
def test_bfloat16_inputs_leave_masters_in_float32():
    spec = dataclasses.replace(spec_of(), compute="bfloat16")
    params = init(jax.random.key(0), spec)
    batch = a_batch(jnp.float32)
    values = {k: jnp.float32(v) for k, v in NOW.items()}
    exact = dataclasses.replace(spec, compute="float32")
    low, _ = steps.gradients(Standard(Terms()), params, batch, values, spec)
    high, _ = steps.gradients(Standard(Terms()), params, batch, values, exact)
    assert {x.dtype for x in jax.tree.leaves(low)} == {jnp.dtype("float32")}
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True):
        scale = float(jnp.abs(b).max())
        assert 0 < float(jnp.abs(a - b).max()) < 0.05 * scale


def test_to_clt_stacks_every_leaf():
    params = weights(spec_of())
    clt = to_clt(params)
    close(clt.W_dec, tuple(p.W_dec_FMD for p in params), 0.0)
    for i, p in enumerate(params):
        for name in ("W_enc_LFD", "b_enc_LF", "b_dec_LD", "theta_LF", "W_skip_LDD"):
            stacked, own = getattr(clt, name), getattr(p, name.replace("_L", "_"))
            close(None if own is None else stacked[i], own, 0.0)
    assert n_params(spec_of(), skip=True) == sum(
        x.size for x in jax.tree.leaves(params)
    )


def test_the_controller_reaches_the_l0_that_is_asked():
    """On a stand-in for training: L0 falls as a power of the weight."""
    control, weight, l0 = control_start(), 1e-3, 300.0
    for step in range(600):
        now = values(Weights(sparsity=weight, ramp=0.2), jnp.int32(step), 600, control)
        l0 = 40.0 * (float(now["sparsity"]) + 1e-4) ** -0.4
        control = steer(control, jnp.float32(l0), 100.0, gain=0.03)
    assert abs(l0 / 100 - 1) < 0.02


def test_schedules():
    rate = learning_rate(1.0, 100, warmup=10)
    got = np.array([float(rate(i)) for i in range(101)])
    np.testing.assert_allclose(got[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert (got[10:80] == 1).all()
    np.testing.assert_allclose(got[80:], 1 - np.arange(21) / 20, atol=1e-6)
    ramp = [
        float(
            values(Weights(sparsity=2.0, ramp=0.5), jnp.int32(i), 8, control_start())[
                "sparsity"
            ]
        )
        for i in range(8)
    ]
    np.testing.assert_allclose(ramp, [0, 0.5, 1, 1.5, 2, 2, 2, 2])


def test_a_plain_function_is_an_objective_but_not_separable():
    def mine(params, batch, values, spec):
        return Standard(Terms(sparsity="l1"))(params, batch, values, spec)

    spec = spec_of()
    tx = steps.optimiser(1e-3)
    steps.make_step(mine, spec, tx, steps.Recipe(n_steps=1))
    with pytest.raises(InputError, match="needs a separable objective"):
        steps.make_step(mine, spec, tx, steps.Recipe(n_steps=1, memory="per_source"))
