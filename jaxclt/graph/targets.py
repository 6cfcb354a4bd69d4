"""What a graph explains: the salient next tokens, as output directions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.errors import InputError
from jaxclt.lm.run import unembed
from jaxclt.types import LMParams, Recording, Targets

__all__ = [
    "demeaned_unembedding",
    "salient_targets",
    "target_reads",
    "token_targets",
]


def demeaned_unembedding(params: LMParams, token_K: Array) -> Array:
    """Unembedding columns minus their mean over the vocabulary, [K, D].

    A softmax ignores what all logits share, so a target is the logit minus the mean
    logit (Circuit Tracing 2025, appendix E); its edges sum to zero over the vocabulary.
    """
    if params.unembed_DV is None:
        mean_D = params.embed_VD.mean(0)
        return params.embed_VD[token_K] - mean_D[None]
    mean_D = params.unembed_DV.mean(1)
    return params.unembed_DV[:, token_K].T - mean_D[None]


def token_targets(params: LMParams, out_D: Array, token_K: Array) -> Targets:
    """Targets for given token ids.

    Args:
      params: the model.
      out_D: normed output at the last position.
      token_K: int32 token ids.
    """
    prob_V = jax.nn.softmax(unembed(params, out_D))
    return Targets(
        token_K=token_K,
        prob_K=prob_V[token_K],
        vec_KD=demeaned_unembedding(params, token_K),
    )


def salient_targets(
    params: LMParams, out_D: Array, *, mass: float = 0.95, most: int = 10
) -> Targets:
    """The top tokens up to `mass` of the probability, at most `most` of them.

    Circuit Tracing (2025), section 3.1: K = min(10, fewest tokens that hold 95%).

    Args:
      params: the model.
      out_D: normed output at the last position.
      mass: cumulative probability to reach.
      most: cap on K.

    Raises:
      InputError: if the model's output is not finite.
    """
    prob_V = np.asarray(jax.nn.softmax(unembed(params, out_D)))
    if not np.isfinite(prob_V).all():
        raise InputError(
            "the model's output is not finite on this prompt: check its weights, or "
            "run it with --dtype float32"
        )
    order = np.argsort(-prob_V, kind="stable")[: min(most, len(prob_V))]
    reached = np.searchsorted(np.cumsum(prob_V[order]), mass) + 1
    token_K = jnp.asarray(order[:reached].astype(np.int32))
    return token_targets(params, out_D, token_K)


def target_reads(
    params: LMParams, recording: Recording, vec_KD: np.ndarray | Array, pos: int
) -> np.ndarray:
    """Target directions [K, D] pulled back through the frozen final norm at `pos`."""
    scale = np.asarray(recording.frozen.out_scale_T)[pos]
    return np.asarray(vec_KD) * (np.asarray(params.norm_out_D) * scale)[None, :]
