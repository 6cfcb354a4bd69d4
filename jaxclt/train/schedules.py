"""What changes over a run: learning rate, penalty weights, and the L0 controller."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from jaxclt.errors import check_at_least, check_positive, check_share

__all__ = ["Control", "Weights", "control_start", "learning_rate", "steer", "values"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Final weights of the penalties, and how they come up.

    Raises:
      InputError: for a weight below zero or a ramp outside 0..1.
    """

    sparsity: float = 0.0
    preactivation: float = 0.0
    auxk: float = 0.0
    jacobian: float = 0.0
    ramp: float = 1.0  # share of the run over which sparsity rises linearly from 0

    def __post_init__(self) -> None:
        check_at_least(
            0,
            sparsity=self.sparsity,
            preactivation=self.preactivation,
            auxk=self.auxk,
            jacobian=self.jacobian,
        )
        check_share(zero=True, ramp=self.ramp)


@struct.dataclass
class Control:
    """State of the L0 controller."""

    log_scale: Array  # the sparsity weight is multiplied by its exponential
    l0_mean: Array  # running mean of the features active per token, all layers


def control_start() -> Control:
    """No correction yet."""
    return Control(log_scale=jnp.float32(0), l0_mean=jnp.float32(-1))


def learning_rate(
    peak: float, n_steps: int, *, warmup: int, decay: float = 0.2
) -> optax.Schedule:
    """Linear warm-up, constant, linear to zero over the last `decay` of the run."""
    down = max(1, int(n_steps * decay))
    warmup = max(1, min(warmup, n_steps // 10))
    check_positive(lr=peak)
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / warmup, peak, warmup - 1),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, down),
        ],
        [warmup - 1, max(warmup, n_steps - down)],
    )


def values(
    weights: Weights, step: Array, n_steps: int, control: Control
) -> dict[str, Array]:
    """Schedule values at a step: what an objective is given besides the batch.

    ``sparsity`` is ``weight · min(1, step / (ramp · n_steps)) · exp(log_scale)``;
    ``progress`` runs from 0 to 1.
    """
    progress = step.astype(jnp.float32) / n_steps
    ramp = jnp.where(
        weights.ramp > 0, jnp.minimum(progress / max(weights.ramp, 1e-9), 1.0), 1.0
    )
    return {
        "progress": progress,
        "sparsity": weights.sparsity * ramp * jnp.exp(control.log_scale),
        "preactivation": jnp.float32(weights.preactivation),
        "auxk": jnp.float32(weights.auxk),
        "jacobian": jnp.float32(weights.jacobian),
    }


def steer(
    control: Control, l0: Array, target: float, *, gain: float, memory: float = 0.95
) -> Control:
    """Move the sparsity weight so that the requested L0 is reached and held.

        log_scale += gain · clip(log(l0_mean / target), -1, 1)

    An integral controller on the logarithm: the weight stops moving exactly when the
    running mean of L0 is the target, whatever weight that takes.

    Args:
      control: its state.
      l0: features active per token in this batch, summed over layers.
      target: the L0 to hold, summed over layers.
      gain: step of the logarithm per training step; 0 switches the controller off.
      memory: of the running mean, per step.
    """
    first = control.l0_mean < 0
    mean = jnp.where(first, l0, memory * control.l0_mean + (1 - memory) * l0)
    excess = jnp.log(jnp.maximum(mean, 1e-3) / target)
    return Control(
        log_scale=jnp.clip(
            control.log_scale + gain * jnp.clip(excess, -1.0, 1.0), -12.0, 12.0
        ),
        l0_mean=mean,
    )
