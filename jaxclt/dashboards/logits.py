"""The output tokens that a feature's decoder raises and lowers most.

What a feature writes is summed over the layers it writes to and taken through the final
norm's gain and the unembedding, demeaned over the vocabulary. The norm's denominator is
left out: it is positive and the same for all tokens.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.coder import Dictionary
from jaxclt.naming.vocabulary import GROUP, highest, written_logits
from jaxclt.precision import jit
from jaxclt.types import LMParams

__all__ = ["TokenEffects", "vocabulary_effects"]

_CELLS = 1 << 24  # feature-token pairs that are looked at together


class TokenEffects(NamedTuple):
    """Tokens by effect: of `top` the largest first, of `bottom` the least."""

    top_NK: np.ndarray
    top_value_NK: np.ndarray
    bottom_NK: np.ndarray
    bottom_value_NK: np.ndarray


def vocabulary_effects(
    dictionary: Dictionary,
    params: LMParams,
    layer: int,
    feature_N: np.ndarray,
    *,
    k: int = 10,
) -> TokenEffects:
    """The output tokens that features of a layer raise and lower most.

    Args:
      dictionary: of any kind.
      params: the model.
      layer: of the features.
      feature_N: which.
      k: tokens each way.
    """
    V = params.embed_VD.shape[0]
    k, rows = min(k, V), max(1, _CELLS // V)
    found = []
    for start in range(0, len(feature_N), rows):
        part_R = feature_N[start : start + rows]
        written_RMD = dictionary.decoders(params, layer, np.asarray(part_R))
        written_RD = jnp.asarray(written_RMD, params.embed_VD.dtype).sum(1)
        # One shape for all parts: padded rows are dropped again.
        n = min(rows, len(feature_N))
        padded = jnp.pad(written_RD, ((0, n - len(part_R)), (0, 0)))
        four = _strongest(params, padded, k=k)
        found.append([np.asarray(x)[: len(part_R)] for x in four])
    if not found:
        none = np.zeros((0, k))
        return TokenEffects(none.astype(np.int32), none, none.astype(np.int32), none)
    return TokenEffects(*map(np.concatenate, zip(*found, strict=True)))


@partial(jit, static_argnames="k")
def _strongest(params: LMParams, written_ND: Array, *, k: int) -> tuple[Array, ...]:
    logit_NV = written_logits(params, written_ND)
    top_value_NK, top_NK = highest(logit_NV, k, GROUP)
    bottom_value_NK, bottom_NK = highest(-logit_NV, k, GROUP)
    return top_NK, top_value_NK, bottom_NK, -bottom_value_NK
