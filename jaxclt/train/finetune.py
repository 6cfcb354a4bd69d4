"""Fine-tuning a dictionary so that the replacement model predicts as the model does.

    loss = mean over tokens of KL(model | replacement),   nothing frozen, no errors

The gradient runs through the whole replacement model: encoders, decoders, and live
attention in between. Measured by others on GPT-2 (the Circuits Research Landscape):
KL falls, but graphs may explain less; compare both before keeping the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxclt.clt.config import CLTConfig
from jaxclt.clt.transcoder import loaded_params
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import forward
from jaxclt.precision import jit
from jaxclt.replacement.agreement import divergence
from jaxclt.replacement.model import replacement_logits
from jaxclt.text.corpus import Windows
from jaxclt.train.step import apply_gradient
from jaxclt.types import CLTParams, LMParams

__all__ = ["Finetune", "finetune_kl", "replacement_kl"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune:
    """How long, and how fast."""

    n_steps: int
    windows: int = 4  # of a step
    lr: float = 1e-5


def replacement_kl(
    clt: CLTParams,
    params: LMParams,
    token_T: Array,
    valid_T: Array,
    *,
    cfg: LMConfig,
    clt_cfg: CLTConfig,
    keep_first: bool = True,
) -> Array:
    """``KL(model | replacement)`` in nats, mean over valid positions.

    Args:
      clt: dictionary in raw units; the gradient is taken of this.
      params: the model.
      token_T: token ids.
      valid_T: 1 where a position counts, else 0.
      cfg: model shape.
      clt_cfg: dictionary shape.
      keep_first: the true MLPs stay at the first position.
    """
    true_TV = forward(params, token_T, cfg=cfg)
    loaded = loaded_params(clt, clt_cfg)
    found_TV = replacement_logits(
        params, loaded, token_T, cfg=cfg, keep_first=keep_first
    )
    kl_T = divergence(true_TV, found_TV)
    valid_T = valid_T.astype(kl_T.dtype)
    one = jnp.ones((), kl_T.dtype)
    return jnp.sum(kl_T * valid_T) / jnp.maximum(valid_T.sum(), one)


def finetune_kl(
    params: LMParams,
    clt: CLTParams,
    windows: Windows,
    how: Finetune,
    *,
    cfg: LMConfig,
    clt_cfg: CLTConfig,
    on_step: Callable[[int, float], None] = lambda step, kl: None,
) -> tuple[CLTParams, list[float]]:
    """Adam on `replacement_kl` over the training windows, in their order.

    Args:
      params: the model.
      clt: dictionary in raw units; it is not changed.
      windows: token windows.
      how: steps, windows of each, and the learning rate, which is constant.
      cfg: model shape.
      clt_cfg: dictionary shape.
      on_step: progress.

    Returns:
      The new dictionary, and the loss of every step.
    """
    tx = optax.adam(how.lr)

    @partial(jit, donate_argnums=(0, 1))
    def update(
        clt: CLTParams, opt: Any, params: LMParams, token_WT: Array, valid_WT: Array
    ) -> tuple[CLTParams, Any, Array]:
        def loss(clt: CLTParams) -> Array:
            one = partial(
                replacement_kl,
                clt,
                params,
                cfg=cfg,
                clt_cfg=clt_cfg,
                keep_first=not windows.first,
            )
            return jax.lax.map(lambda x: one(*x), (token_WT, valid_WT)).mean()

        found, grad = jax.value_and_grad(loss)(clt)
        return *apply_gradient(tx, clt, opt, grad), found

    clt = jax.tree.map(jnp.array, clt)  # a copy: the update consumes its input
    opt: Any = tx.init(clt)  # pyright: ignore[reportArgumentType]
    valid_WS = windows.valid(windows.train_WS)
    history = []
    for step in range(how.n_steps):
        rows = np.arange(how.windows) + step * how.windows
        rows = rows % len(windows.train_WS)
        token_WT = jnp.maximum(jnp.asarray(windows.train_WS[rows]), 0)
        clt, opt, kl = update(clt, opt, params, token_WT, jnp.asarray(valid_WS[rows]))
        history.append(float(kl))
        on_step(step, history[-1])
    return clt, history
