"""What a run would cost, without running it: parameters, bytes, FLOP, time.

Nothing is allocated, so the mesh need not exist. Counts per token, with
``W = Σ_l min(span, L - l)`` decoders (L for a PLT, L(L+1)/2 for a full CLT):

    forward   2 L D F (encoders) + 2 W D F (decoders)
    backward  2 L D F            + 4 W D F          no gradient to the reads
    training  4 L D F + 6 W D F;  + the encoders once more, 2 L D F, with per_source
              or remat: the backward pass needs activations again, not what they write

and the language model's own forward pass, once per harvested token.
"""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp

from jaxclt.errors import InputError
from jaxclt.graph.memory import available_bytes, host_available_bytes
from jaxclt.lm.config import LMConfig
from jaxclt.precision import jit
from jaxclt.text.corpus import check_context
from jaxclt.train.config import TrainConfig
from jaxclt.train.params import Spec, n_params

__all__ = [
    "Estimate",
    "check_memory",
    "device_bytes",
    "estimate",
    "flop_per_token",
    "host_bytes",
    "lm_flop_per_token",
    "matmul_peak",
    "recomputes",
]

SHARE_OF_PEAK = 0.6  # what a dense step should reach; the prediction assumes it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Costs of a run on a mesh."""

    parameters: int
    flop_per_token: float  # of the training step
    harvest_flop_per_token: float  # of the language model, divided by `reuse`
    bytes_per_device: dict[str, int]
    bytes_on_host: int  # harvested activations
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
            f"MiB on the host: {self.bytes_on_host / 2**20:,.0f} for a chunk of "
            "harvested activations, besides the model",
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
    again = 2 * L * D * F if recompute else 0
    return float(4 * L * D * F + 6 * W * D * F + again)


def lm_flop_per_token(cfg: LMConfig, context: int) -> float:
    """FLOP of the model's forward pass per token, without the unembedding."""
    attention = cfg.d_model * cfg.d_head * (2 * cfg.n_heads + 2 * cfg.n_kv_heads)
    scores = 2 * context * cfg.n_heads * cfg.d_head  # scores and mixing, full square
    return 2.0 * cfg.n_layers * (attention + scores + 3 * cfg.d_model * cfg.d_mlp)


@jit
def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def matmul_peak(dtype: str, n: int = 1024, runs: int = 5) -> float:
    """FLOP/s of the fastest of some square matmuls, summed in float32."""
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), dtype)
    jax.block_until_ready(_product(a, b))
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(_product(a, b))
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def recomputes(memory: str) -> bool:
    """Whether activations are computed twice.

    XLA for CPUs finds the second computation of `remat` equal to the first and drops
    it: there `remat` costs and saves nothing.
    """
    return memory == "per_source" or (
        memory == "remat" and jax.default_backend() != "cpu"
    )


def device_bytes(
    spec: Spec, config: TrainConfig, sizes: dict[str, int]
) -> dict[str, int]:
    """Bytes on one device by what they are for, at the moment that takes most.

    The counts of arrays are those of XLA's plan for a CPU, where a sum over sources is
    one operation: what all layers write, ``W T D``, is there at once. The tests compare
    with `memory_analysis` of compiled steps, to 15%. The clipping norm needs all
    gradients at once, except with per_source, which clips by that of the step before.
    """
    L, F, D = spec.n_layers, spec.n_features // sizes["feature"], spec.d_model
    W = sum(spec.n_writes(l) for l in range(L))
    P = n_params(spec, skip=config.skip) // sizes["feature"]
    T = config.batch_tokens // sizes["data"]
    part = T // config.accumulate
    stored = 2 if config.buffer == "bfloat16" else 4
    channels = len(config.matryoshka) + 1
    writes, sums = channels * W * part * D, channels * L * part * D
    if config.memory == "per_source":
        # First pass: activations of all layers, writes, their sums; the residual stays.
        # Second: a layer's gradient, activations, cotangents and residual.
        widest = spec.n_writes(0)
        gradients = F * D * (1 + widest)
        forward = L * part * F + writes + 3 * sums // 2
        backward = 3 * part * F + 3 * channels * widest * part * D // 2
        activations = sums + max(forward - gradients, backward)
    else:
        # Pre-activations (with thresholds), activations, what the penalty keeps, and
        # cotangents. Gradients take the place of the writes.
        kept = 1 if recomputes(config.memory) else L
        arrays = 4 if spec.gate.switch == "theta" else 3
        gradients = P * (2 if config.accumulate > 1 else 1)
        activations = arrays * kept * part * F + 2 * sums + max(writes - P, 0)
    return {
        "weights": 4 * P,
        "adam": 8 * P,
        "gradients": 4 * gradients,
        # cut into parts, it is copied
        "batch": 2 * L * T * D * stored * (2 if config.accumulate > 1 else 1),
        "activations": 4 * activations,
    }


def host_bytes(config: TrainConfig, lm: LMConfig) -> int:
    """Bytes of a chunk of harvested activations, which the host holds."""
    stored = 2 if config.buffer == "bfloat16" else 4
    return 2 * lm.n_layers * config.chunk_tokens * lm.d_model * stored


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

    Raises:
      InputError: if its windows do not fit the model.
    """
    check_context(config.context, lm.n_ctx)
    spec = config.spec(lm)
    flop = flop_per_token(spec, recompute=recomputes(config.memory))
    harvest = lm_flop_per_token(lm, config.context) / config.reuse
    peak = matmul_peak(config.compute) if peak is None else peak
    n = sizes["data"] * sizes["feature"]
    tokens = config.n_steps * config.batch_tokens
    return Estimate(
        parameters=n_params(spec, skip=config.skip),
        flop_per_token=flop,
        harvest_flop_per_token=harvest,
        bytes_per_device=device_bytes(spec, config, sizes),
        bytes_on_host=host_bytes(config, lm),
        peak_flop_per_s=peak,
        devices=n,
        seconds=tokens * (flop + harvest) / (n * peak * SHARE_OF_PEAK),
    )


def check_memory(config: TrainConfig, lm: LMConfig, sizes: dict[str, int]) -> None:
    """Refuse a run that cannot fit, by what is certain: activations are left out.

    Args:
      config: the recipe.
      lm: the model's shape.
      sizes: of the mesh, from `parse_mesh`.

    Raises:
      InputError: if it takes more memory than there is.
    """
    parts = device_bytes(config.spec(lm), config, sizes)
    device = sum(parts[x] for x in ("weights", "adam", "gradients", "batch"))
    # The stream of the windows that the model reads together.
    device = max(device, 4 * config.windows_per_call * config.context * lm.d_model)
    host = host_bytes(config, lm)
    needed = [(device, available_bytes()), (host, host_available_bytes())]
    if jax.local_devices()[0].platform == "cpu":  # the same memory, for all devices
        needed = [(device * sizes["data"] * sizes["feature"] + host, needed[1][1])]
    for n_bytes, free in needed:
        if n_bytes > free:
            raise InputError(
                f"this run needs at least {n_bytes / 1e9:,.1f} GB of memory and "
                f"{free / 1e9:,.1f} GB are free: lower --features (now "
                f"{config.features:,}), --batch-tokens, --chunk-tokens or "
                "--windows-per-call, or share them with --mesh"
            )
