"""What a patch changes, as the pytree that every mode of patching takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.patching.features import Features

__all__ = ["Change", "batched"]


@struct.dataclass
class Change:
    """E activations that are changed together: a becomes ``factor a + offset``.

    Of one patch, [E]; of a batch of separate patches, all leaves have a leading B.
    """

    features: Features
    factor_E: Array  # in the features' dtype
    offset_E: Array

    @classmethod
    def of(cls, features: Features, factor: Any = 0.0, offset: Any = 0.0) -> Change:
        """A change of some features, by one factor and offset or by one of each [E]."""
        like = np.asarray(features.value_E)
        given = (np.asarray(x, like.dtype) for x in (factor, offset))
        return cls(features, *(np.broadcast_to(x, like.shape) for x in given))  # pyright: ignore

    @property
    def node_E3(self) -> np.ndarray:  # noqa: N802
        """(layer, position, feature) of each."""
        f = self.features
        return np.stack([f.layer_E, f.pos_E, f.feature_E], -1)

    def amounts(self, value_E: Array) -> Array:
        """By how much activations change [E], given what they are."""
        one = jnp.ones((), value_E.dtype)
        return (self.factor_E - one) * value_E + self.offset_E

    def where(self, index: Any) -> Change:
        """Some of the changes, as numpy indexes them; of a batch, some patches."""
        return jax.tree.map(lambda x: np.asarray(x)[index], self)


def batched(change: Change, sizes: Sequence[int], *, least: int = 1) -> Change:
    """Consecutive changes as separate patches, leaves [B, E, ...].

    Args:
      change: of one patch after the other.
      sizes: how many changes each makes. Fewer than E are filled up with features of
        layer -1, which change nothing.
      least: the smallest E.
    """
    size_B1 = np.asarray(sizes)[:, None]
    slot_E = np.arange(max([least, *sizes]))
    real_BE = slot_E < size_B1
    at_BE = np.where(real_BE, np.cumsum(size_B1)[:, None] - size_B1 + slot_E, -1)

    def take(leaf: Array) -> np.ndarray:
        none = np.zeros((1, *leaf.shape[1:]), leaf.dtype)
        return np.concatenate([np.asarray(leaf), none])[at_BE]

    taken = jax.tree.map(take, change)
    layer_BE = np.where(real_BE, taken.features.layer_E, np.int32(-1))
    return dataclasses.replace(
        taken,
        features=dataclasses.replace(taken.features, layer_E=layer_BE),
        factor_E=np.where(real_BE, taken.factor_E, np.ones((), taken.factor_E.dtype)),
    )
