"""Does the replacement model predict what the model predicts?

Circuit Tracing (2025), section 2.2: top-1 agreement and ``KL(model | replacement)``,
position by position, so that any set of positions can be averaged afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.coder import Loaded
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import forward
from jaxclt.replacement.model import replacement_logits
from jaxclt.types import LMParams

__all__ = [
    "Compared",
    "agreement",
    "compare",
    "compare_layers",
    "divergence",
    "predict",
]

TOGETHER = 256  # positions whose logits over the vocabulary are held at a time


@dataclasses.dataclass(frozen=True)
class Compared:
    """Both models at every position of W windows; what stands behind the text is noise.

    Attributes:
      model_WS: the model's most probable next token, int32.
      found_WS: the replacement's.
      kl_WS: ``KL(model | replacement)`` in nats, float64.
      confidence_WS: the probability of the model's most probable token.
    """

    model_WS: np.ndarray
    found_WS: np.ndarray
    kl_WS: np.ndarray
    confidence_WS: np.ndarray

    @property
    def same_WS(self) -> np.ndarray:  # noqa: N802
        """Where both say the same."""
        return self.model_WS == self.found_WS


def divergence(true_TV: Array, found_TV: Array) -> Array:
    """``KL(model | replacement)`` [T] in nats, of logits."""
    log_p_TV = jax.nn.log_softmax(true_TV)
    log_q_TV = jax.nn.log_softmax(found_TV)
    return jnp.sum(jnp.exp(log_p_TV) * (log_p_TV - log_q_TV), -1)


@partial(jax.jit, static_argnames=("cfg", "keep_first"))
def _compare(
    params: LMParams,
    loaded: Loaded,
    token_WS: Array,
    cfg: LMConfig,
    keep_first: tuple[bool, ...],
) -> list[tuple[Array, Array, Array, Array]]:
    def one(token_S: Array) -> list[tuple[Array, Array, Array, Array]]:
        true_SV = forward(params, token_S, cfg=cfg)
        said_S = true_SV.argmax(-1)
        confidence_S = jax.nn.softmax(true_SV).max(-1)
        rows = []
        for keep in keep_first:
            found_SV = replacement_logits(
                params, loaded, token_S, cfg=cfg, keep_first=keep
            )
            kl_S = divergence(true_SV, found_SV)
            rows.append((said_S, found_SV.argmax(-1), kl_S, confidence_S))
        return rows

    return jax.vmap(one)(jnp.maximum(token_WS, 0))


def _chunks(token_WS: np.ndarray) -> Iterator[np.ndarray]:
    """Windows that go through the models together, all of one shape."""
    W, S = token_WS.shape
    n = min(W, max(1, TOGETHER // S))
    for start in range(0, W, n):
        part = token_WS[start : start + n]
        yield np.pad(part, ((0, n - len(part)), (0, 0)))


def compare(
    params: LMParams,
    loaded: Loaded,
    token_WS: np.ndarray,
    *,
    cfg: LMConfig,
    keep_first: tuple[bool, ...] = (True,),
    on_windows: Callable[[int, int], None] = lambda done, total: None,
) -> list[Compared]:
    """Run model and replacement on windows, a few at a time.

    Args:
      params: model weights.
      loaded: the dictionary, from `jaxclt.clt.coder.load`.
      token_WS: windows, padded with -1 behind the text.
      cfg: model shape.
      keep_first: whether the true MLPs stay at the first position; for each entry a
        replacement model is run, the model itself once for all.
      on_windows: progress, (windows done, of).

    Returns:
      One for each entry of `keep_first`.
    """
    chunks = []
    W = len(token_WS)
    for part_WS in _chunks(token_WS):
        found = _compare(params, loaded, jnp.asarray(part_WS), cfg, keep_first)
        chunks.append(jax.tree.map(np.asarray, found))
        on_windows(min(W, len(chunks) * len(part_WS)), W)
    whole = jax.tree.map(lambda *x: np.concatenate(x)[:W], *chunks)
    return [
        Compared(model_WS, found_WS, kl_WS.astype(np.float64), confidence_WS)
        for model_WS, found_WS, kl_WS, confidence_WS in whole
    ]


_logits = jax.jit(
    lambda params, token_WS, cfg: jax.vmap(partial(forward, params, cfg=cfg))(token_WS),
    static_argnames="cfg",
)


@partial(jax.jit, static_argnames="cfg")
def _one_layer(
    params: LMParams,
    loaded: Loaded,
    token_WS: Array,
    true_WSV: Array,
    layer_L: Array,
    cfg: LMConfig,
) -> tuple[Array, Array]:
    def one(token_S: Array, true_SV: Array) -> tuple[Array, Array]:
        found_SV = replacement_logits(params, loaded, token_S, cfg=cfg, layer_L=layer_L)
        same_S = true_SV.argmax(-1) == found_SV.argmax(-1)
        return same_S, divergence(true_SV, found_SV)

    return jax.vmap(one)(token_WS, true_WSV)


def compare_layers(
    params: LMParams,
    loaded: Loaded,
    token_WS: np.ndarray,
    *,
    cfg: LMConfig,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The model with one layer's MLP replaced, each in turn; few windows.

    The first position keeps its MLP. The model's logits of all windows are held.

    Args:
      params: model weights.
      loaded: the dictionary, from `jaxclt.clt.coder.load`.
      token_WS: windows, padded with -1 behind the text.
      cfg: model shape.
      on_layer: progress, (layers done, of).

    Returns:
      Whether the most probable token is the same, and the KL in nats, [L, W, S] each.
    """
    L = cfg.n_layers
    tokens = jnp.maximum(jnp.asarray(token_WS), 0)
    true_WSV = _logits(params, tokens, cfg)
    rows = []
    for layer in range(L):
        chosen = jnp.arange(L) == layer
        found = _one_layer(params, loaded, tokens, true_WSV, chosen, cfg)
        rows.append([np.asarray(x) for x in found])
        on_layer(layer + 1, L)
    same_LWS, kl_LWS = (np.stack(x) for x in zip(*rows, strict=True))
    return same_LWS, kl_LWS.astype(np.float64)


@partial(jax.jit, static_argnames="cfg")
def _predict(params: LMParams, token_WS: Array, cfg: LMConfig) -> tuple[Array, Array]:
    def one(token_S: Array) -> tuple[Array, Array]:
        p_SV = jax.nn.softmax(forward(params, token_S, cfg=cfg))
        return p_SV.argmax(-1), p_SV.max(-1)

    return jax.vmap(one)(jnp.maximum(token_WS, 0))


def predict(
    params: LMParams, token_WS: np.ndarray, *, cfg: LMConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The model's most probable next tokens [W, S] and their probabilities.

    Args:
      params: model weights.
      token_WS: windows, padded with -1 behind the text.
      cfg: model shape.
    """
    found = [
        _predict(params, jnp.asarray(part_WS), cfg) for part_WS in _chunks(token_WS)
    ]
    said_WS, sure_WS = (
        np.concatenate([np.asarray(x) for x in column])[: len(token_WS)]
        for column in zip(*found, strict=True)
    )
    return said_WS, sure_WS


def agreement(
    params: LMParams,
    loaded: Loaded,
    token_WS: np.ndarray,
    valid_WS: np.ndarray,
    *,
    cfg: LMConfig,
    keep_first: bool = True,
) -> dict[str, float]:
    """Top-1 agreement and ``KL(model | replacement)`` in nats, over valid positions.

    Args:
      params: model weights.
      loaded: the dictionary, from `jaxclt.clt.coder.load`.
      token_WS: windows, padded with -1.
      valid_WS: positions that count.
      cfg: model shape.
      keep_first: the true MLPs stay at the first position.
    """
    (found,) = compare(params, loaded, token_WS, cfg=cfg, keep_first=(keep_first,))
    return {
        "top1": float(found.same_WS[valid_WS].mean()),
        "kl": float(found.kl_WS[valid_WS].mean()),
    }
