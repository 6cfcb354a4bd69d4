"""Every term of a loss against its formula in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxclt.train import penalties
from jaxclt.train.params import LayerParams, decoder_norm

pytestmark = pytest.mark.usefixtures("x64")
T, F, M, D = 6, 11, 3, 5


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


@pytest.fixture(scope="module")
def some(x64: None) -> tuple[jax.Array, jax.Array, jax.Array, LayerParams]:
    pre, dec = draw(0, T, F), draw(1, F, M, D)
    p = LayerParams(
        W_enc_FD=draw(2, F, D),
        b_enc_F=draw(3, F),
        W_dec_FMD=dec,
        b_dec_D=draw(4, D),
        theta_F=jnp.abs(draw(5, F)),
    )
    return pre, jnp.maximum(pre, 0.0), decoder_norm(p), p


def test_the_norm_is_of_all_decoders_together(some):
    *_, norm, p = some
    flat = np.asarray(p.W_dec_FMD).reshape(F, -1)
    np.testing.assert_allclose(norm, np.linalg.norm(flat, axis=1), rtol=1e-14)
    zero = jax.tree.map(jnp.zeros_like, p)
    grad = jax.grad(lambda p: decoder_norm(p).sum())(zero)
    assert (grad.W_dec_FMD == 0).all()  # and not nan


def test_tanh_and_l1(some):
    _, a, norm, _ = some
    x, n = np.asarray(a), np.asarray(norm)
    np.testing.assert_allclose(
        penalties.tanh_sparsity(a, norm, c=4.0),
        np.mean(
            [sum(np.tanh(4.0 * n[f] * x[t, f]) for f in range(F)) for t in range(T)]
        ),
        rtol=1e-14,
    )
    np.testing.assert_allclose(penalties.l1(a, norm), (x * n).sum(1).mean(), rtol=1e-14)
    check_grads(
        lambda a, n: penalties.tanh_sparsity(a, n, c=4.0), (a + 0.1, norm), 1, ["rev"]
    )
    grad = jax.grad(lambda a: penalties.tanh_sparsity(a, norm, c=4.0))(a)
    want = 4 * n / np.cosh(4 * n * x) ** 2 / T
    np.testing.assert_allclose(grad, want, atol=1e-14)


def test_l0_to_target_is_quadratic_and_its_gradient_the_estimators(some):
    pre, _, _, p = some
    theta = p.theta_F
    assert theta is not None
    h, t, eps = np.asarray(pre), np.asarray(theta), 0.7
    count = (h > t).sum(1).mean()

    def loss(h, t):
        return penalties.l0_to_target(h, t, target=2.0, bandwidth=eps)

    np.testing.assert_allclose(loss(pre, theta), (count / 2 - 1) ** 2)
    near = (np.abs(h - t) < eps / 2) / eps / T
    outer = 2 * (count / 2 - 1) / 2
    g_h, g_t = jax.grad(loss, (0, 1))(pre, theta)
    np.testing.assert_allclose(g_h, outer * near, atol=1e-14)
    np.testing.assert_allclose(g_t, -outer * near.sum(0), atol=1e-14)


def test_preactivation_pulls_only_what_it_should(some):
    pre, _, norm, p = some
    weight = jnp.asarray(np.arange(F) % 2 * 1.0)
    h, t, n, w = map(np.asarray, (pre, p.theta_F, norm, weight))
    got = penalties.preactivation(pre, p.theta_F, norm, weight)
    want = (w * n * np.maximum(t - h, 0)).sum(1).mean()
    np.testing.assert_allclose(got, want, rtol=1e-14)
    grad = jax.grad(penalties.preactivation)(pre, p.theta_F, norm, weight)
    np.testing.assert_allclose(grad, -w * n * (h < t) / T, atol=1e-15)
    without = penalties.preactivation(pre, None, norm, weight)
    np.testing.assert_allclose(without, (w * n * np.maximum(-h, 0)).sum(1).mean())


def test_jacobian_penalty_is_the_frobenius_distance_in_expectation(some):
    """Maths 19.5: summed over all D unit tangents it is |J_CLT - J_MLP|_F² / D."""
    pre, a, _, p = some
    J_mlp = draw(8, D, D)  # x -> y as v @ J
    one = a[:1]
    total = 0.0
    for d in range(D):
        v = jnp.zeros((1, D)).at[0, d].set(1.0)
        total += penalties.jacobian(one, p.W_enc_FD, p.W_dec_FMD[:, 0], v, v @ J_mlp)
    gate = np.asarray(pre[0]) > 0
    J_clt = np.asarray(p.W_enc_FD).T[:, gate] @ np.asarray(p.W_dec_FMD[:, 0])[gate]
    want = np.linalg.norm(J_clt - np.asarray(J_mlp)) ** 2 / D
    np.testing.assert_allclose(total, want, rtol=1e-12)
