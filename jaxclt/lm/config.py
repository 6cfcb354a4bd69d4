"""The shape of a decoder language model, as orthogonal switches.

A model family is a value of this config, never a class and never a test on a name.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxclt.errors import InputError

__all__ = ["Act", "LMConfig", "RopeScaling"]

Act = Literal["silu", "gelu_tanh", "gelu", "relu", "relu2", "xielu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for longer prompts.

    `linear` divides all by `factor`. `llama3` leaves those that turn at least
    `high_freq_factor` times in `n_ctx` tokens, divides those that turn at most
    `low_freq_factor` times, and goes from one to the other in between. `factors`
    divides each by its own.

    Raises:
      InputError: for factors that cannot be.
    """

    kind: Literal["linear", "llama3", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    n_ctx: int = 8192  # of the model before it was extended
    factors: tuple[float, ...] = ()  # one for each pair of channels

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise InputError(f"model config: rope factor={self.factor} is below 1")
        if self.kind == "llama3" and not (
            0 < self.low_freq_factor < self.high_freq_factor and self.n_ctx > 0
        ):
            raise InputError(
                "model config: rope low_freq_factor must be above 0 and below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if any(not factor > 0 for factor in self.factors):
            raise InputError("model config: rope factors must be above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """Static description of one decoder; hashable, passed to jit as a static argument.

    Whether a bias, a norm or an untied unembedding exists, the parameters say (their
    leaf is None when absent); the config holds only what the arrays cannot say. Layers
    that attend locally (`Block.local_L`; if that is None, all) see the last `window`
    positions.

    Raises:
      InputError: if the sizes cannot belong to one model.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int  # n_heads is a multiple: query head h reads kv head h // (H / G)
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int  # longest prompt in tokens
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    act: Act = "silu"  # of the MLP
    parallel: bool = False  # the MLP reads what attention reads, not what it adds
    d_rotary: int | None = None  # first channels of a head that turn; None: all
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None  # base of local layers, not scaled
    window: int | None = None  # positions seen, the query's own included
    query_scale: float | None = None  # None: d_head ** -0.5
    attn_cap: float | None = None  # c: attention scores are c tanh(x / c)
    norm_turned: bool = (
        False  # gains of queries' and keys' norms are of turned channels
    )

    def __post_init__(self) -> None:
        sizes = "n_layers d_model n_heads n_kv_heads d_head d_mlp d_vocab n_ctx"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise InputError(f"model config: {name} must be at least 1")
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"model config: n_heads={self.n_heads} is not a multiple of "
                f"n_kv_heads={self.n_kv_heads}"
            )
        for name in ("window", "rope_local_theta", "query_scale", "attn_cap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"model config: {name}={value} must be above 0")
        turning = self.n_turning
        name = "d_head" if self.d_rotary is None else "d_rotary"
        if self.d_rotary is not None and not 0 <= turning <= self.d_head:
            raise InputError(
                f"model config: d_rotary={turning} must lie in 0..{self.d_head}, the "
                "channels of a head"
            )
        scaling = self.rope_scaling
        n_factors = len(scaling.factors) if scaling else 0
        if scaling and scaling.kind == "factors" and n_factors != turning // 2:
            raise InputError(
                f"model config: {n_factors} rope factors for heads of "
                f"{name}={turning}, which need half as many"
            )
        if turning % 2:
            raise InputError(
                f"model config: {name}={turning} must be even for rotary embeddings"
            )

    @property
    def n_turning(self) -> int:
        """Channels of a head that rotary embeddings turn, the first ones."""
        return self.d_head if self.d_rotary is None else self.d_rotary

    @property
    def score_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.d_head**-0.5 if self.query_scale is None else self.query_scale

    @property
    def n_queries_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads
