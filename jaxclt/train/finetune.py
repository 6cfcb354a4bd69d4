"""Fine-tuning a dictionary so that the replacement model predicts as the model does.

    loss = mean over tokens of KL(model | replacement),   nothing frozen, no errors

The gradient runs through the whole replacement model: encoders, decoders, and live
attention in between. Measured by others on GPT-2 (the Circuits Research Landscape):
KL falls, but graphs may explain less; compare both before keeping the result.
"""

from __future__ import annotations

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
from jaxclt.replacement.model import replacement_logits
from jaxclt.text.corpus import Windows
from jaxclt.types import CLTParams, LMParams

__all__ = ["finetune_kl", "replacement_kl"]


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
    found_TV = replacement_logits(
        params,
        loaded_params(clt, clt_cfg),
        token_T,
        cfg=cfg,
        keep_first=keep_first,
    )
    log_p_TV = jax.lax.stop_gradient(jax.nn.log_softmax(true_TV))
    log_q_TV = jax.nn.log_softmax(found_TV)
    kl_T = jnp.sum(jnp.exp(log_p_TV) * (log_p_TV - log_q_TV), -1)
    valid_T = valid_T.astype(kl_T.dtype)
    one = jnp.ones((), kl_T.dtype)
    return jnp.sum(kl_T * valid_T) / jnp.maximum(valid_T.sum(), one)


@partial(
    jax.jit,
    static_argnames=("cfg", "clt_cfg", "tx", "keep_first"),
    donate_argnums=(0, 1),
)
def _update(
    clt: CLTParams,
    opt: Any,
    params: LMParams,
    token_WT: Array,
    valid_WT: Array,
    cfg: LMConfig,
    clt_cfg: CLTConfig,
    tx: optax.GradientTransformation,
    keep_first: bool,
) -> tuple[CLTParams, Any, Array]:
    def loss(clt: CLTParams) -> Array:
        one = partial(
            replacement_kl,
            clt,
            params,
            cfg=cfg,
            clt_cfg=clt_cfg,
            keep_first=keep_first,
        )
        return jax.lax.map(lambda x: one(*x), (token_WT, valid_WT)).mean()

    found, grad = jax.value_and_grad(loss)(clt)
    # optax mixes a Python float with its integer count, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        step, opt = tx.update(grad, opt, clt)  # pyright: ignore[reportArgumentType]
        clt = optax.apply_updates(clt, step)  # pyright: ignore
    return clt, opt, found


def finetune_kl(
    params: LMParams,
    clt: CLTParams,
    windows: Windows,
    *,
    cfg: LMConfig,
    clt_cfg: CLTConfig,
    n_steps: int,
    windows_per_step: int = 4,
    lr: float = 1e-5,
    on_step: Callable[[int, float], None] = lambda step, kl: None,
) -> tuple[CLTParams, list[float]]:
    """Adam on `replacement_kl` over the training windows, in their order.

    Args:
      params: the model.
      clt: dictionary in raw units; it is not changed.
      windows: token windows.
      cfg: model shape.
      clt_cfg: dictionary shape.
      n_steps: updates.
      windows_per_step: of each.
      lr: constant learning rate.
      on_step: progress.

    Returns:
      The new dictionary, and the loss of every step.
    """
    tx = optax.adam(lr)
    clt = jax.tree.map(jnp.array, clt)  # a copy: the update consumes its input
    opt: Any = tx.init(clt)  # pyright: ignore[reportArgumentType]
    valid_WS = windows.valid(windows.train_WS)
    history = []
    for step in range(n_steps):
        rows = np.arange(windows_per_step) + step * windows_per_step
        rows = rows % len(windows.train_WS)
        token_WT = jnp.maximum(jnp.asarray(windows.train_WS[rows]), 0)
        clt, opt, kl = _update(
            clt,
            opt,
            params,
            token_WT,
            jnp.asarray(valid_WS[rows]),
            cfg,
            clt_cfg,
            tx,
            not windows.first,
        )
        history.append(float(kl))
        on_step(step, history[-1])
    return clt, history
