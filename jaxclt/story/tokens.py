"""What each token of a prompt contributes, measured (maths 23.3).

A token's embedding is replaced by the mean embedding, everything in the model live, and
the answer's lead over the foil is compared. The graph's influence is no substitute: it
holds patterns, counts paths without sign, and a first token on which heads rest takes
much of it.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.graph.graph import Graph
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import native_mlp, readout, run, token_vectors, unembed
from jaxclt.precision import jit
from jaxclt.types import LMParams

__all__ = ["TokenEffect", "token_shares", "without_tokens"]

_TOGETHER = 8  # prompts that are run side by side


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenEffect:
    """One token of a prompt.

    Attributes:
      position: of it.
      token: its text, untrusted.
      effect: change of the answer's lead, in logits, without it.
      probability: of the answer without it.
      share: of the influence that the graph traces to tokens; None without a graph.
    """

    position: int
    token: str
    effect: float
    probability: float
    share: float | None = None


def token_shares(graph: Graph) -> np.ndarray:
    """Each token's share of the influence that a graph traces to tokens, [T]."""
    influence_T = graph.influence_N[graph.embed_cols].astype(np.float64)
    total = influence_T.sum()
    return influence_T / total if total > 0 else influence_T


def without_tokens(
    params: LMParams,
    embed_TD: Array,
    token_T: Array,
    answer_and_foil: tuple[int, int],
    *,
    cfg: LMConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """The lead of the answer and its probability, without each token, then with all.

    Args:
      params: the model.
      embed_TD: what enters layer 0.
      token_T: tokens, int32.
      answer_and_foil: two tokens.
      cfg: model shape.

    Returns:
      Leads [T + 1] in logits before any cap, and probabilities [T + 1].
    """
    pair_2 = jnp.asarray(answer_and_foil, jnp.int32)
    found = _without(params, embed_TD, jnp.asarray(token_T), pair_2, cfg=cfg)
    lead_T, prob_T = (np.asarray(x, np.float64) for x in found)
    return lead_T, prob_T


@partial(jit, static_argnames="cfg")
def _without(
    params: LMParams, embed_TD: Array, token_T: Array, pair_2: Array, *, cfg: LMConfig
) -> tuple[Array, Array]:
    T = len(embed_TD)
    mean_D = token_vectors(params, jnp.arange(params.embed_VD.shape[0])).mean(0)
    less_TD = mean_D[None] - token_vectors(params, token_T)

    def one(t: Array) -> tuple[Array, Array]:
        gone_T1 = (jnp.arange(T) == t)[:, None]
        changed_TD = jnp.where(gone_T1, embed_TD + less_TD, embed_TD)
        done = run(params, changed_TD, native_mlp(cfg), cfg=cfg, keep_patterns=False)
        out_D = done.out_TD[-1]
        logit_2 = readout(params, out_D)[pair_2]
        prob_V = jax.nn.softmax(unembed(params, out_D))
        return logit_2[0] - logit_2[1], prob_V[pair_2[0]]

    return jax.lax.map(one, jnp.arange(T + 1), batch_size=min(_TOGETHER, T + 1))
