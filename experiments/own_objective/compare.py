"""Participation ratio against tanh and L1 at equal L0, on some layers of a store.

    python compare.py STORE [layer ...]

STORE is a folder that `jaxclt train --store` filled; per-layer transcoders of the
chosen layers are trained on its first chunk, the last 2,000 tokens of which are held
out. The controller steers every objective to the same L0; what is left of a difference
is removed by one threshold a layer that keeps just as many features (`calibrate`).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from participation import objective
from safetensors import safe_open

from jaxclt.train.export import calibrate, threshold_form
from jaxclt.train.objectives import Batch, Standard, Terms
from jaxclt.train.outcome import reconstruction
from jaxclt.train.params import Spec, init
from jaxclt.train.schedules import Weights, learning_rate
from jaxclt.train.step import Recipe, init_state, make_step, optimiser

F, L0, B, REUSE, HELD = 512, 32, 512, 48, 2000
OBJECTIVES = {
    # final weight before the controller corrects it
    "tanh": (Standard(Terms(sparsity="tanh")), 3e-3),
    "l1": (Standard(Terms(sparsity="l1")), 3e-3),
    "participation": (objective, 3e-3),
}


def load(store: Path, layers: list[int]) -> list[np.ndarray]:
    with safe_open(store / "chunk_000000.safetensors", "flax") as file:
        return [
            np.stack([np.asarray(file.get_slice(name)[l]) for l in layers])
            for name in ("read_LND", "write_LND")
        ]


def main(store: Path, layers: list[int]) -> None:
    read_LND, write_LND = load(store, layers)
    L, N, D = read_LND.shape
    n_batches = (N - HELD) // B
    n_steps = REUSE * n_batches
    spec = Spec(n_layers=L, d_model=D, n_features=F, span=1, activation="jumprelu")
    for name, (chosen, weight) in OBJECTIVES.items():
        recipe = Recipe(
            n_steps=n_steps,
            weights=Weights(sparsity=weight, ramp=0.3),
            l0=L0 * L,
            gain=0.02,
            dead_tokens=20_000,
        )
        tx = optimiser(learning_rate(3e-3, n_steps, warmup=10))
        state = init_state(init(jax.random.key(0), spec), tx, jax.random.key(1))
        step = make_step(chosen, spec, tx, recipe)
        for i in range(n_steps):
            key = jax.random.fold_in(jax.random.key(2), i // n_batches)
            order = np.asarray(jax.random.permutation(key, n_batches * B))
            here = order[i % n_batches * B :][:B]
            state, logged = step(
                state,
                Batch(
                    read_LTD=jnp.asarray(read_LND[:, here]),
                    write_LTD=jnp.asarray(write_LND[:, here]),
                    dead_LF=jnp.zeros((L, F), bool),
                ),
            )
        clt, cfg = threshold_form(state.params, spec)
        held = [x[:, -HELD:].astype(np.float32) for x in (read_LND, write_LND)]
        found = reconstruction(clt, cfg, *held)
        theta_L = calibrate(state.params, read_LND[:, : n_batches * B], L0)
        theta_LF = jnp.broadcast_to(theta_L[:, None], clt.b_enc_LF.shape)
        equal = reconstruction(dataclasses.replace(clt, theta_LF=theta_LF), cfg, *held)
        print(
            json.dumps(
                {
                    "objective": name,
                    "layers": layers,
                    "tokens": n_steps * B,
                    "held_fvu_L": np.round(found["fvu_L"], 4).tolist(),
                    "held_l0_L": np.round(found["l0_L"], 2).tolist(),
                    "equal_fvu_L": np.round(equal["fvu_L"], 4).tolist(),
                    "equal_l0_L": np.round(equal["l0_L"], 2).tolist(),
                    "dead": round(found["dead"], 4),
                    "weight": float(logged["sparsity_weight"]),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(x) for x in sys.argv[2:]] or [4, 20])
