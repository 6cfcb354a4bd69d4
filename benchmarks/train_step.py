"""Training step: tokens/s, FLOP per token, share of this machine's own matmul peak.

    python benchmarks/train_step.py                  # one case
    python benchmarks/train_step.py --growth         # against F and L
    python benchmarks/train_step.py --smoke          # seconds

Random activations; the model's forward pass is not part of it. The peak is measured
between the repetitions, since other work on the machine changes both. One JSON line a
case.
"""

from __future__ import annotations

import argparse
import json
import statistics

import _timing
import jax
import jax.numpy as jnp

from jaxclt.train import dryrun
from jaxclt.train.objectives import Batch, Standard, Terms
from jaxclt.train.params import Spec, init
from jaxclt.train.schedules import Weights
from jaxclt.train.step import Recipe, init_state, make_step, optimiser


def measure(spec: Spec, tokens: int, memory: str, sparsity: str, runs: int) -> dict:
    terms = Terms(sparsity=sparsity)  # pyright: ignore[reportArgumentType]
    recipe = Recipe(n_steps=1000, weights=Weights(sparsity=1e-3), memory=memory)
    tx = optimiser(1e-4)
    state = init_state(init(jax.random.key(0), spec), tx, jax.random.key(1))
    step = make_step(Standard(terms), spec, tx, recipe)
    shape = (2, spec.n_layers, tokens, spec.d_model)
    read_LTD, write_LTD = jax.random.normal(jax.random.key(2), shape)
    dead_LF = jnp.zeros((spec.n_layers, spec.n_features), bool)
    batch = Batch(read_LTD=read_LTD, write_LTD=write_LTD, dead_LF=dead_LF)

    def once() -> jax.Array:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    _, compile_s, _ = _timing.timed(once)
    jax.block_until_ready(once())
    wall, cpu, peaks = [], [], []
    for _ in range(runs):
        peaks.append(dryrun.matmul_peak(spec.compute, runs=2))
        _, w, c = _timing.timed(once)
        wall.append(w)
        cpu.append(c)
    flop = dryrun.flop_per_token(spec, recompute=memory != "full") * tokens
    # Each step against the peak measured just before it.
    shares = [flop / w / p for w, p in zip(wall, peaks, strict=True)]
    return {
        "L": spec.n_layers,
        "D": spec.d_model,
        "F": spec.n_features,
        "span": spec.span,
        "activation": spec.activation,
        "compute": spec.compute,
        "memory": memory,
        "batch_tokens": tokens,
        "parameters": dryrun.n_params(spec),
        "mflop_per_token": flop / tokens / 1e6,
        "step_median_s": statistics.median(wall),
        "step_min_s": min(wall),
        "step_cpu_s": min(cpu),
        "tokens_per_s": tokens / statistics.median(wall),
        "peak_gflops": statistics.median(peaks) / 1e9,
        "share_of_peak": statistics.median(shares),
        "share_best_of_each": flop / min(wall) / max(peaks),
        "compile_s": compile_s,
        "peak_rss_gib": round(_timing.peak_rss_gib(), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--span", type=int, default=0)
    parser.add_argument("--activation", default="jumprelu")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--sparsity", default="tanh")
    parser.add_argument("--compute", default="float32")
    parser.add_argument("--memory", default="full")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    if a.smoke:
        a.layers, a.d_model, a.features, a.batch_tokens, a.runs = 3, 16, 32, 32, 1
    cases = [(a.layers, a.features)]
    if a.growth:
        cases = [(a.layers, f) for f in (256, 512, 1024, 2048)]
        cases += [(n, a.features) for n in (2, 4, 12)]
    print(f"# {_timing.hardware_line()}, jaxclt {_timing.git_sha()}")
    for layers, features in cases:
        spec = Spec(
            n_layers=layers,
            d_model=a.d_model,
            n_features=features,
            span=a.span or layers,
            activation=a.activation,
            k=a.k,
            compute=a.compute,
        )
        found = measure(spec, a.batch_tokens, a.memory, a.sparsity, a.runs)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
