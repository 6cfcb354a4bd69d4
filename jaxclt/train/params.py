"""The weights as training holds them: one struct per layer.

Everything of a layer in one place lets a step differentiate, update and shard one
source layer at a time; gradients of slices of stacked arrays would be padded to full
size and added, once per layer. `to_clt` stacks what `jaxclt.clt` wants stacked.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxclt.clt.config import CLTConfig, ReadSite
from jaxclt.clt.gates import GATES, Gate
from jaxclt.errors import InputError
from jaxclt.types import CLTParams

__all__ = [
    "GateName",
    "LayerParams",
    "Spec",
    "TrainParams",
    "decoder_norm",
    "init",
    "n_params",
    "to_clt",
]

# those of `GATES` that are trained, spelled out for the command line
GateName = Literal["relu", "jumprelu", "topk", "batch_topk"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Static description of what is trained; hashable.

    Raises:
      InputError: if a field is out of its range.
    """

    n_layers: int
    d_model: int
    n_features: int  # per layer
    span: int  # MLP outputs a feature writes, its own layer included; 1 is a PLT
    activation: GateName = "jumprelu"
    k: int | None = None  # features a layer keeps per token, topk and batch_topk
    bandwidth: float = 1.0  # of the straight-through estimator, in pre-activation units
    ste_to_input: bool = True  # the estimator's gradient reaches the pre-activation too
    read: ReadSite = "resid_mid"
    compute: Literal["float32", "bfloat16", "float64"] = "float32"  # of matmul inputs

    def __post_init__(self) -> None:
        if not 1 <= self.span <= self.n_layers:
            raise InputError(f"--span {self.span} must lie in 1..{self.n_layers}")
        if self.n_features < 1:
            raise InputError(f"--features {self.n_features}: give at least 1")
        if self.gate.competes and not (self.k and 1 <= self.k <= self.n_features):
            raise InputError(
                f"{self.activation} keeps --l0 features per layer and token: it must "
                f"lie in 1..{self.n_features}, not {self.k}"
            )
        if self.bandwidth <= 0:
            raise InputError(f"bandwidth {self.bandwidth} must be above 0")

    @property
    def gate(self) -> Gate:
        """What lets features through."""
        return GATES[self.activation]

    def n_writes(self, layer: int) -> int:
        """How many MLP outputs a feature of `layer` writes."""
        return min(self.span, self.n_layers - layer)

    def clt_config(self) -> CLTConfig:
        """The config of the exported dictionary: sparse gates become thresholds."""
        return CLTConfig(
            n_layers=self.n_layers,
            d_model=self.d_model,
            n_features=self.n_features,
            span=self.span,
            activation="relu" if self.gate.switch == "zero" else "jumprelu",
            read=self.read,
        )


@struct.dataclass
class LayerParams:
    """Weights of one layer's features, and the constants of the MLP output it reads.

    ``W_dec_FMD[f, j]`` is what feature f writes j layers further on.
    """

    W_enc_FD: Array
    b_enc_F: Array
    W_dec_FMD: Array
    b_dec_D: Array  # of this layer's MLP output
    theta_F: Array | None = None  # JumpReLU thresholds, held directly (not their log)
    W_skip_DD: Array | None = None  # read @ W_skip adds to this layer's MLP output


TrainParams = tuple[LayerParams, ...]


def init(
    key: Array,
    spec: Spec,
    *,
    theta: float = 0.03,
    skip: bool = False,
    dtype: jnp.dtype | type = jnp.float32,
) -> TrainParams:
    """Random weights, uniform as in Circuit Tracing (2025), appendix D.2.

    ``W_enc ~ U(±1/sqrt(F))``, ``W_dec ~ U(±1/sqrt(L D))``, biases and skip zero.

    Args:
      key: PRNG key.
      spec: what is trained.
      theta: initial threshold, for jumprelu.
      skip: add a linear path, initially zero.
      dtype: of every leaf; masters are float32.
    """
    L, F, D = spec.n_layers, spec.n_features, spec.d_model
    jump = spec.gate.switch == "theta"

    def layer(key: Array, l: int) -> LayerParams:
        key_enc, key_dec = jax.random.split(key)
        M = spec.n_writes(l)
        return LayerParams(
            W_enc_FD=jax.random.uniform(key_enc, (F, D), dtype, -1, 1) * F**-0.5,
            b_enc_F=jnp.zeros((F,), dtype),
            W_dec_FMD=jax.random.uniform(key_dec, (F, M, D), dtype, -1, 1)
            * (L * D) ** -0.5,
            b_dec_D=jnp.zeros((D,), dtype),
            # an array of its own: steps donate every leaf
            theta_F=jnp.full((F,), theta, dtype) if jump else None,
            W_skip_DD=jnp.zeros((D, D), dtype) if skip else None,
        )

    return tuple(layer(jax.random.fold_in(key, l), l) for l in range(L))


def decoder_norm(p: LayerParams) -> Array:
    """Norm [F] of the concatenation of all decoders of each feature.

    The gradient of the norm at zero is taken as zero, not as nan.
    """
    square_F = jnp.sum(jnp.square(p.W_dec_FMD), axis=(1, 2))
    safe_F = jnp.where(square_F > 0, square_F, jnp.ones((), square_F.dtype))
    return jnp.where(square_F > 0, jnp.sqrt(safe_F), jnp.zeros((), square_F.dtype))


def to_clt(params: TrainParams) -> CLTParams:
    """The same weights as `jaxclt.clt` takes them."""
    theta = [p.theta_F for p in params if p.theta_F is not None]
    skip = [p.W_skip_DD for p in params if p.W_skip_DD is not None]
    return CLTParams(
        W_enc_LFD=jnp.stack([p.W_enc_FD for p in params]),
        b_enc_LF=jnp.stack([p.b_enc_F for p in params]),
        W_dec=tuple(p.W_dec_FMD for p in params),
        b_dec_LD=jnp.stack([p.b_dec_D for p in params]),
        theta_LF=jnp.stack(theta) if theta else None,
        W_skip_LDD=jnp.stack(skip) if skip else None,
    )


def n_params(spec: Spec, *, skip: bool = False) -> int:
    """How many numbers are trained."""
    L, F, D = spec.n_layers, spec.n_features, spec.d_model
    writes = sum(spec.n_writes(l) for l in range(L))
    per_feature = 2 if spec.gate.switch == "theta" else 1  # bias, threshold
    return L * F * (D + per_feature) + writes * F * D + L * D + skip * L * D * D
