"""What a run would cost, without running it: parameters, bytes, FLOP, time.

Nothing is allocated, so the mesh need not exist. Counts per token, with
``W = Σ_l min(span, L - l)`` decoders (L for a PLT, L(L+1)/2 for a full CLT):

    forward   2 L D F (encoders) + 2 W D F (decoders)
    backward  2 L D F            + 4 W D F          no gradient to the reads
    training  4 L D F + 6 W D F;  + one forward with per_source or remat

and the language model's own forward pass, once per harvested token.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxclt.lm.config import LMConfig
from jaxclt.train.config import TrainConfig
from jaxclt.train.params import Spec, n_params

__all__ = ["Estimate", "estimate", "flop_per_token", "lm_flop_per_token", "matmul_peak"]

SHARE_OF_PEAK = 0.6  # what a dense step should reach; the prediction assumes it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Costs of a run on a mesh."""

    parameters: int
    flop_per_token: float  # of the training step
    harvest_flop_per_token: float  # of the language model, divided by `reuse`
    bytes_per_device: dict[str, int]
    peak_flop_per_s: float  # of one device, measured here
    devices: int
    seconds: float

    def lines(self) -> list[str]:
        """For people."""
        total = sum(self.bytes_per_device.values())
        parts = ", ".join(
            f"{k} {v / 2**20:,.0f}" for k, v in self.bytes_per_device.items()
        )
        rate = self.devices * self.peak_flop_per_s * SHARE_OF_PEAK
        per_token = self.flop_per_token + self.harvest_flop_per_token
        return [
            f"parameters: {self.parameters:,}",
            f"MiB per device: {total / 2**20:,.0f} ({parts})",
            f"FLOP per token: {self.flop_per_token / 1e6:,.1f} M training + "
            f"{self.harvest_flop_per_token / 1e6:,.1f} M for the model's activations",
            f"measured matmul peak: {self.peak_flop_per_s / 1e9:,.0f} GFLOP/s a device",
            f"at {SHARE_OF_PEAK:.0%} of it on {self.devices} devices: "
            f"{rate / per_token:,.0f} tokens/s, {self.seconds / 60:,.1f} minutes",
        ]


def flop_per_token(spec: Spec, *, recompute: bool = False) -> float:
    """FLOP of a dense training step per token, matmuls only."""
    L, F, D = spec.n_layers, spec.n_features, spec.d_model
    W = sum(spec.n_writes(l) for l in range(L))
    again = 2 * L * D * F + 2 * W * D * F if recompute else 0
    return float(4 * L * D * F + 6 * W * D * F + again)


def lm_flop_per_token(cfg: LMConfig, context: int) -> float:
    """FLOP of the model's forward pass per token, without the unembedding."""
    attention = cfg.d_model * cfg.d_head * (2 * cfg.n_heads + 2 * cfg.n_kv_heads)
    scores = 2 * context * cfg.n_heads * cfg.d_head  # scores and mixing, full square
    return 2.0 * cfg.n_layers * (attention + scores + 3 * cfg.d_model * cfg.d_mlp)


def matmul_peak(dtype: str, n: int = 1024, runs: int = 5) -> float:
    """FLOP/s of the fastest of some square matmuls, summed in float32."""

    @jax.jit
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, preferred_element_type=jnp.float32)

    a, b = jax.random.normal(jax.random.key(0), (2, n, n), dtype)
    jax.block_until_ready(product(a, b))
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(product(a, b))
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def device_bytes(
    spec: Spec, config: TrainConfig, sizes: dict[str, int]
) -> dict[str, int]:
    """Bytes on one device by what they are for."""
    L, F, D = spec.n_layers, spec.n_features // sizes["feature"], spec.d_model
    P = n_params(spec, skip=config.skip) // sizes["feature"]
    T = config.batch_tokens // sizes["data"]
    part = T // config.accumulate
    largest = F * D * (1 + spec.n_writes(0))
    stored = 2 if config.buffer == "bfloat16" else 4
    channels = len(config.matryoshka) + 1
    widest = spec.n_writes(0)
    layers_kept = L if config.memory == "full" else 1
    return {
        "weights": 4 * P,
        "adam": 8 * P,
        "gradients": 4 * (largest if config.memory == "per_source" else P)
        + (4 * P if config.accumulate > 1 else 0),
        "batch": 2 * L * T * D * stored,
        # pre-activations, activations and gates; what a layer writes; sums and errors
        "activations": layers_kept * part * F * 4 * 2
        + part * widest * D * 4 * 2
        + channels * 2 * L * part * D * 4,
    }


def estimate(
    config: TrainConfig,
    lm: LMConfig,
    sizes: dict[str, int],
    *,
    peak: float | None = None,
) -> Estimate:
    """Predict a run.

    Args:
      config: the recipe.
      lm: the model's shape.
      sizes: of the mesh, from `parse_mesh`.
      peak: FLOP/s of a device; measured on this machine if not given.
    """
    spec = config.spec(lm)
    flop = flop_per_token(spec, recompute=config.memory != "full")
    harvest = lm_flop_per_token(lm, config.context) / config.reuse
    peak = matmul_peak(config.compute) if peak is None else peak
    n = sizes["data"] * sizes["feature"]
    tokens = config.n_steps * config.batch_tokens
    return Estimate(
        parameters=n_params(spec, skip=config.skip),
        flop_per_token=flop,
        harvest_flop_per_token=harvest,
        bytes_per_device=device_bytes(spec, config, sizes),
        peak_flop_per_s=peak,
        devices=n,
        seconds=tokens * (flop + harvest) / (n * peak * SHARE_OF_PEAK),
    )


def as_json(found: Estimate) -> dict[str, Any]:
    """For programs."""
    return dataclasses.asdict(found)
