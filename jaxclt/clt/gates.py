"""Gates: which features of a layer are on, one row of a table for each.

A gate lets a pre-activation through or stops it (maths 2.2): under every gate an active
feature has ``a = h``, so that what explains h explains a. Everything that depends on
the kind of gate is a column here; formats say by name which ones they can express
(`jaxclt.io.formats.write`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.clt import estimators
from jaxclt.errors import check_choice

__all__ = ["GATES", "Gate", "find_gate"]


class Gate(NamedTuple):
    """One kind of gate.

    Attributes:
      switch: the pre-activation above which a feature is on: zero, or a threshold
        ``theta`` of its own; None where the others of its layer decide.
      on: which pre-activations [T, F] pass, from them, thresholds [F] and k; None for
        a gate that a single token does not determine, which only training has.
      signed: whether activations may be negative whatever the weights.
      grouped: whether k counts equal groups of neighbouring features.
      train: activations [T, F] whose gradient is that of training, from
        pre-activations, thresholds and a `Spec`; None if it is not trained here.
    """

    switch: Literal["zero", "theta"] | None
    on: Callable[[Array, Array | None, int], Array] | None
    signed: bool = False
    grouped: bool = False
    train: Callable[..., Array] | None = None

    @property
    def competes(self) -> bool:
        """Whether the other features of a layer decide if one is on."""
        return self.switch is None

    def is_on(self, pre_TF: Array, theta_F: Array | None, k: int | None) -> Array:
        """Which features of one layer are active, bool [T, F]; zero is never active.

        Args:
          pre_TF: pre-activations.
          theta_F: thresholds, of a gate that has them.
          k: features, or groups of them, that pass where some compete.
        """
        assert self.on is not None
        return self.on(pre_TF, theta_F, k or 0) & (pre_TF != 0)


def _positive(pre_TF: Array, theta_F: Array | None = None, k: int = 0) -> Array:
    del theta_F, k
    return ~(pre_TF <= 0)  # NaN passes: what went wrong must show


def _above(pre_TF: Array, theta_F: Array | None, k: int) -> Array:
    del k
    assert theta_F is not None, "a jumprelu has thresholds"
    return pre_TF > theta_F[None]


def _largest(pre_TF: Array, theta_F: Array | None, k: int) -> Array:
    del theta_F
    _, index = jax.lax.top_k(pre_TF, k)
    none_TF = jnp.zeros(pre_TF.shape, bool)
    return jnp.put_along_axis(none_TF, index, jnp.ones((), bool), -1, inplace=False)


def _largest_positive(pre_TF: Array, theta_F: Array | None, k: int) -> Array:
    return _largest(pre_TF, theta_F, k) & _positive(pre_TF)


def _largest_of_groups(pre_TF: Array, theta_F: Array | None, k: int) -> Array:
    del theta_F
    shape = pre_TF.shape
    grouped = pre_TF.reshape(*shape[:-1], k, shape[-1] // k)
    best = jnp.argmax(grouped, axis=-1, keepdims=True)
    at = jax.lax.broadcasted_iota(best.dtype, grouped.shape, grouped.ndim - 1)
    return (at == best).reshape(shape) & _positive(pre_TF)


GATES: dict[str, Gate] = {
    "relu": Gate("zero", _positive, train=estimators.relu),
    # strictly above the threshold
    "jumprelu": Gate(
        "theta",
        _above,
        train=lambda pre_TF, theta_F, spec: estimators.jumprelu(
            pre_TF, theta_F, spec.bandwidth, spec.ste_to_input
        ),
    ),
    # the k largest of what a ReLU lets through (Gao et al. 2024)
    "topk": Gate(
        None,
        _largest_positive,
        train=lambda pre_TF, _, spec: estimators.topk(pre_TF, spec.k),
    ),
    # the k largest with their sign, which circuit-tracer calls topk
    "signed_topk": Gate(None, _largest, signed=True),
    # the largest of each of k groups of neighbours, if positive
    "groupmax": Gate(None, _largest_of_groups, grouped=True),
    # the k largest of each token on average (Bussmann et al. 2024)
    "batch_topk": Gate(
        None, None, train=lambda pre_TF, _, spec: estimators.batch_topk(pre_TF, spec.k)
    ),
}


def find_gate(name: str) -> Gate:
    """The gate of a dictionary.

    Raises:
      InputError: if there is none of that name, or only training has it.
    """
    known = [key for key, gate in GATES.items() if gate.on is not None]
    check_choice("activation", name, known)
    return GATES[name]
