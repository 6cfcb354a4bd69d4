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
from jaxclt.precision import jit
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
    """Both models at every position of W windows; what follows the text is noise.

    Attributes:
      model_WS: the model's most probable next token, int32.
      confidence_WS: its probability.
      found_WS: the replacement's most probable next token.
      kl_WS: ``KL(model | replacement)`` in nats, float64.
    """

    model_WS: np.ndarray
    confidence_WS: np.ndarray
    found_WS: np.ndarray
    kl_WS: np.ndarray

    @property
    def same_WS(self) -> np.ndarray:  # noqa: N802
        """Where both say the same."""
        return self.model_WS == self.found_WS


def divergence(true_TV: Array, found_TV: Array) -> Array:
    """``KL(model | replacement)`` [T] in nats, of logits."""
    log_p_TV = jax.nn.log_softmax(true_TV)
    log_q_TV = jax.nn.log_softmax(found_TV)
    return jnp.sum(jnp.exp(log_p_TV) * (log_p_TV - log_q_TV), -1)


@partial(jit, static_argnames=("cfg", "keep_first"))
def _compare(
    params: LMParams,
    loaded: Loaded | None,
    token_WS: Array,
    cfg: LMConfig,
    keep_first: tuple[bool, ...],
) -> tuple[tuple[Array, Array], list[tuple[Array, Array]]]:
    """What the model says and how sure it is; what replacements say, and the KL."""

    def one(token_S: Array) -> tuple[tuple[Array, Array], list[tuple[Array, Array]]]:
        true_SV = forward(params, token_S, cfg=cfg)
        rows = []
        for keep in keep_first:
            assert loaded is not None
            found_SV = replacement_logits(
                params, loaded, token_S, cfg=cfg, keep_first=keep
            )
            rows.append((found_SV.argmax(-1), divergence(true_SV, found_SV)))
        return (true_SV.argmax(-1), jax.nn.softmax(true_SV).max(-1)), rows

    return jax.vmap(one)(jnp.maximum(token_WS, 0))


def _compared(
    params: LMParams,
    loaded: Loaded | None,
    token_WS: np.ndarray,
    cfg: LMConfig,
    keep_first: tuple[bool, ...] = (),
) -> Iterator[tuple[int, tuple]]:
    """`_compare` a few windows at a time, and how many are done."""
    W, S = token_WS.shape
    n = min(W, max(1, TOGETHER // S))
    for start in range(0, W, n):
        part_WS = token_WS[start : start + n]
        done = start + len(part_WS)
        part_WS = np.pad(part_WS, ((0, n - len(part_WS)), (0, 0)))  # all of one shape
        found = _compare(params, loaded, jnp.asarray(part_WS), cfg, keep_first)
        yield done, jax.tree.map(lambda x: np.asarray(x)[: done - start], found)  # noqa: B023


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
      token_WS: windows, padded with -1 after the text.
      cfg: model shape.
      keep_first: whether the true MLPs stay at the first position; for each entry a
        replacement model is run, the model itself once for all.
      on_windows: progress, (windows done, of).

    Returns:
      One for each entry of `keep_first`.
    """
    parts = []
    for done, part in _compared(params, loaded, token_WS, cfg, keep_first):
        parts.append(part)
        on_windows(done, len(token_WS))
    said, rows = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    said_WS, sure_WS = said
    return [
        Compared(said_WS, sure_WS, found_WS, kl_WS.astype(np.float64))
        for found_WS, kl_WS in rows
    ]


def predict(
    params: LMParams, token_WS: np.ndarray, *, cfg: LMConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The model's most probable next tokens [W, S] and their probabilities.

    Args:
      params: model weights.
      token_WS: windows, padded with -1 after the text.
      cfg: model shape.
    """
    parts = [said for _, (said, _) in _compared(params, None, token_WS, cfg)]
    said_WS, sure_WS = (np.concatenate(x) for x in zip(*parts, strict=True))
    return said_WS, sure_WS


_logits = jit(
    lambda params, token_WS, cfg: jax.vmap(partial(forward, params, cfg=cfg))(token_WS),
    static_argnames="cfg",
)


@partial(jit, static_argnames="cfg")
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
    Arguments are those of `compare`; `on_layer` is called with (layers done, of).

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


def agreement(
    params: LMParams,
    loaded: Loaded,
    token_WS: np.ndarray,
    valid_WS: np.ndarray,
    *,
    cfg: LMConfig,
    keep_first: bool = True,
) -> dict[str, float]:
    """Means of `compare` over the positions of `valid_WS`: ``top1`` and ``kl``."""
    (found,) = compare(params, loaded, token_WS, cfg=cfg, keep_first=(keep_first,))
    return {
        "top1": float(found.same_WS[valid_WS].mean()),
        "kl": float(found.kl_WS[valid_WS].mean()),
    }
