"""The shape of a decoder language model, as orthogonal switches.

A model family is a value of this config, never a class and never a test on a name.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxclt.errors import InputError

__all__ = ["LMConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """Static description of one decoder; hashable, passed to jit as a static argument.

    Whether a bias or an untied unembedding exists is told by the parameters (their
    leaf is None when absent), so the config holds only what the arrays cannot say.

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
    act: Literal["silu", "gelu_tanh"] = "silu"  # of the MLP's gate

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
        if self.d_head % 2:
            raise InputError(
                f"model config: d_head={self.d_head} must be even for rotary embeddings"
            )

    @property
    def n_queries_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads
