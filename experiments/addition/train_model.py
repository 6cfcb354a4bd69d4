"""A small transformer that really adds.

A decoder of jaxclt's own language model code, trained with optax on the answers of
8,000 of the 10,000 sums. Strong weight decay is what makes it learn to add instead of
learning the table.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import task
from jax import Array

from jaxclt.files.atomic import atomic_path
from jaxclt.io.weights_hf import save_hf
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import forward
from jaxclt.testing.random_lm import random_lm
from jaxclt.types import LMParams

CFG = LMConfig(
    n_layers=3,
    d_model=128,
    n_heads=4,
    n_kv_heads=4,
    d_head=32,
    d_mlp=256,
    d_vocab=task.D_VOCAB,
    n_ctx=16,
)
SEED, STEPS, BATCH, RATE, WARMUP, DECAY = 0, 1_000, 256, 3e-3, 100, 1.0
EVERY = 50  # steps between points of the curve


def start(seed: int = SEED) -> LMParams:
    """Random weights; embeddings as small as the other matrices' outputs."""
    found = random_lm(jax.random.key(seed), CFG)
    return dataclasses.replace(found, embed_VD=found.embed_VD * CFG.d_model**-0.5)


def optimiser() -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE, WARMUP, STEPS)

    def matrices(p: LMParams) -> Any:  # norm gains are stacked vectors
        return dataclasses.replace(
            jax.tree.map(lambda leaf: leaf.ndim > 2, p), embed_VD=True
        )

    return optax.adamw(rate, b2=0.98, weight_decay=DECAY, mask=matrices)


def answers(params: LMParams, token_BT: Array, last_B: Array) -> Array:
    """Logits [B, V] behind the `=`."""

    def one(token_T: Array, last: Array) -> Array:
        return forward(params, jnp.maximum(token_T, 0), cfg=CFG)[last]

    return jax.vmap(one)(token_BT, last_B)


def loss(
    params: LMParams, token_BT: Array, last_B: Array, sum_B: Array
) -> tuple[Array, Array]:
    """Cross entropy in nats, and the share of right answers."""
    logit_BV = answers(params, token_BT, last_B)
    nats_B = optax.softmax_cross_entropy_with_integer_labels(logit_BV, sum_B)
    return nats_B.mean(), (logit_BV.argmax(-1) == sum_B).mean()


@partial(jax.jit, donate_argnums=(0, 1))
def update(
    params: LMParams, opt: Any, token_BT: Array, last_B: Array, sum_B: Array
) -> tuple[LMParams, Any, Array]:
    graded = jax.value_and_grad(loss, has_aux=True)
    (nats, _), grad = graded(params, token_BT, last_B, sum_B)
    # optax mixes Python floats with its integer count, which the tests' strict
    # promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        step, opt = optimiser().update(grad, opt, params)  # pyright: ignore
        return optax.apply_updates(params, step), opt, nats  # pyright: ignore


measure = jax.jit(loss)


def train(
    stop: int = STEPS, say: Callable[[str], None] = print
) -> tuple[LMParams, list[dict[str, float]]]:
    """Train for `stop` of the `STEPS` steps; the weights, and the curve."""
    a, b = task.all_pairs()
    token_NT, last_N = task.all_tokens()
    sum_N = (a + b).astype(np.int32)
    seen, held = task.split()
    params = start()
    opt = optimiser().init(params)  # pyright: ignore
    key, curve, began = jax.random.key(SEED + 1), [], time.perf_counter()
    for step in range(1, stop + 1):
        draw = jax.random.randint(jax.random.fold_in(key, step), (BATCH,), 0, len(seen))
        rows = seen[np.asarray(draw)]
        params, opt, nats = update(
            params, opt, token_NT[rows], last_N[rows], sum_N[rows]
        )
        if step % EVERY == 0 or step == stop:
            held_nats, held_share = measure(
                params, token_NT[held], last_N[held], sum_N[held]
            )
            curve.append(
                {
                    "step": step,
                    "nats": float(nats),
                    "held_nats": float(held_nats),
                    "held_accuracy": float(held_share),
                }
            )
            say(f"{time.perf_counter() - began:6.0f} s  {json.dumps(curve[-1])}")
    return params, curve


def accuracy(params: LMParams) -> dict[str, float]:
    """Share of right answers on pairs it saw, on those it did not, and on all."""
    a, b = task.all_pairs()
    logit_NV = jax.jit(answers)(params, *map(jnp.asarray, task.all_tokens()))
    right_N = np.asarray(logit_NV.argmax(-1)) == a + b
    seen, held = task.split()
    return {
        "seen": float(right_N[seen].mean()),
        "held_out": float(right_N[held].mean()),
        "all": float(right_N.mean()),
    }


CARD = """# addition

A transformer of {n_layers} layers (width {d_model}, {n_heads} heads, SwiGLU of {d_mlp},
{params:,} parameters) that adds: `calc: a+b=` for a, b in 0..99, operands as digits,
the sum as one token. Made by `python experiments/addition/run.py` of jaxclt from seed
{seed}, on {n_seen:,} of the 10,000 sums; no outside data. Apache-2.0, like jaxclt.

| sums | right answers |
|---|---|
| seen in training | {seen:.2%} |
| held out | {held_out:.2%} |
| all | {all:.2%} |

It knows nothing but this task: other text is made of `<unk>`.
"""


def save(params: LMParams, curve: list[dict[str, float]], folder: Path) -> None:
    """Write the model as jaxclt loads it, with its card and its curve."""
    task.save_tokenizer(folder)
    save_hf(params, CFG, folder)
    found = accuracy(params)
    text = CARD.format(
        **dataclasses.asdict(CFG),
        **found,
        params=sum(leaf.size for leaf in jax.tree.leaves(params)),
        seed=SEED,
        n_seen=task.N**2 - task.HELD,
    )
    for name, content in {
        "README.md": text,
        "curve.json": json.dumps({"accuracy": found, "curve": curve}, indent=1),
    }.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
