"""Gates and their straight-through estimators against closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclt.clt import estimators

pytestmark = pytest.mark.usefixtures("x64")

EPS = 0.5


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


@pytest.mark.parametrize("ste_to_input", [True, False])
def test_jumprelu_gradients_are_the_written_ones(ste_to_input: bool):
    pre, g = draw(0, 7, 40), draw(1, 7, 40)
    theta = jnp.abs(draw(2, 40))
    a, pull = jax.vjp(
        lambda h, t: estimators.jumprelu(h, t, EPS, ste_to_input), pre, theta
    )
    h, t, g = map(np.asarray, (pre, theta, g))
    np.testing.assert_array_equal(a, h * (h > t))
    rect = np.abs(h - t) < EPS / 2
    assert 0 < rect.mean() < 1
    g_h, g_t = pull(jnp.asarray(g))
    np.testing.assert_allclose(g_t, -(g * t / EPS * rect).sum(0), atol=1e-14)
    want = g * (h > t) + (g * t / EPS * rect if ste_to_input else 0)
    np.testing.assert_allclose(g_h, want, atol=1e-14)


def test_heaviside_gradient_is_the_derivative_of_a_smoothed_count():
    """The estimator equals the true derivative for uniform noise of width ε."""
    n, theta = 200_000, 0.3
    h = jnp.linspace(-3, 3, n)[:, None]
    grad = jax.grad(lambda t: estimators.heaviside(h, t, EPS).mean(0).sum(), argnums=0)(
        jnp.array([theta])
    )
    # Uniform h on [-3, 3]: P(h > θ) falls by 1/6 per unit of θ.
    np.testing.assert_allclose(grad, [-1 / 6], rtol=1e-4)
    to_h = jax.grad(lambda h: estimators.heaviside(h, jnp.array([theta]), EPS).sum())(h)
    near = np.abs(np.asarray(h) - theta) < EPS / 2
    np.testing.assert_array_equal(to_h, near / EPS)


def test_topk_keeps_the_k_largest_positive_and_their_gradient():
    pre = draw(3, 9, 30).at[0].set(-1.0)
    a, pull = jax.vjp(lambda h: estimators.topk(h, 4), pre)
    a, h = np.asarray(a), np.asarray(pre)
    assert (a[0] == 0).all()  # nothing positive: nothing kept
    for row in range(1, 9):
        best = np.sort(np.argsort(h[row])[-4:])
        np.testing.assert_array_equal(np.flatnonzero(a[row]), best)
        np.testing.assert_array_equal(a[row, best], h[row, best])
    np.testing.assert_array_equal(pull(jnp.ones_like(pre))[0], a != 0)


def test_batch_topk_keeps_the_largest_of_the_batch():
    pre = draw(4, 16, 32) + jnp.arange(16.0)[:, None] / 8  # some tokens take more
    a = np.asarray(estimators.batch_topk(pre, 3))
    h = np.asarray(pre)
    np.testing.assert_array_equal(a, np.where(h >= np.sort(h.ravel())[-48], h, 0))
    assert len(set((a > 0).sum(1))) > 1


def test_the_compiled_top_k_is_no_full_sort():
    """Without the barrier XLA turns the sliced TopK of a CPU into a sort."""
    text = (
        jax.jit(lambda x: estimators.topk(x, 16))
        .lower(jax.ShapeDtypeStruct((64, 512), jnp.float32))
        .compile()
        .as_text()
    )
    assert text is not None
    assert "TopK" in text
    assert " sort(" not in text
