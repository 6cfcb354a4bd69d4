"""The shape and the conventions of a transcoder dictionary."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxclt.errors import InputError

__all__ = ["Activation", "CLTConfig", "ReadSite", "Shape"]

ReadSite = Literal["resid_mid", "normalized", "mlp_in"]
Activation = Literal["relu", "jumprelu", "topk", "relu_topk", "groupmax"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of any dictionary; hashable.

    `span` is how many MLP outputs a feature writes, its own layer included: the
    number of layers for a full CLT, 1 for a per-layer transcoder (PLT).
    """

    n_layers: int
    d_model: int
    n_features: int  # per layer
    span: int

    def n_writes(self, layer: int) -> int:
        """How many MLP outputs a feature of `layer` writes."""
        return min(self.span, self.n_layers - layer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLTConfig(Shape):
    """Static description of a transcoder; hashable, a static argument of jit.

    `read` is the tensor the encoder reads (Circuit Tracing 2025, section 2.1):
    ``resid_mid`` the residual stream where the MLP reads (after attention, unless both
    stand side by side), ``normalized`` that stream divided by its norm (and a LayerNorm
    takes its mean off), ``mlp_in`` with the norm's gain and bias, what the MLP sees.

    `activation` is one of `jaxclt.clt.activations`; ``relu_topk`` keeps the k largest
    of what a ReLU lets through, ``groupmax`` the largest of each of k groups.

    Raises:
      InputError: if a field is out of its range.
    """

    activation: Activation = "jumprelu"
    k: int | None = None  # features kept per layer and position, where some compete
    read: ReadSite = "resid_mid"

    def __post_init__(self) -> None:
        if not 1 <= self.span <= self.n_layers:
            raise InputError(
                f"dictionary config: span={self.span} must lie in 1..{self.n_layers}"
            )
        if self.competes and not (self.k and 1 <= self.k <= self.n_features):
            raise InputError(
                f"dictionary config: {self.activation} needs 1 <= k <= "
                f"{self.n_features}, not {self.k}"
            )
        if self.activation == "groupmax" and self.n_features % (self.k or 1):
            raise InputError(
                f"dictionary config: groupmax needs k={self.k} equal groups of "
                f"{self.n_features} features"
            )

    @property
    def competes(self) -> bool:
        """Whether the other features of a layer decide if one is active."""
        return self.activation in ("topk", "relu_topk", "groupmax")

    @property
    def signed(self) -> bool:
        """Whether activations may be negative whatever the weights."""
        return self.activation == "topk"
