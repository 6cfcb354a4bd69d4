"""The shape and the conventions of a transcoder dictionary."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxclt.clt.gates import Gate, find_gate
from jaxclt.errors import InputError

__all__ = ["CLTConfig", "ReadSite", "Shape"]

ReadSite = Literal["resid_mid", "normalized", "mlp_in"]


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

    `activation` is a row of `jaxclt.clt.gates.GATES`.

    Raises:
      InputError: if a field is out of its range.
    """

    activation: str = "jumprelu"
    k: int | None = None  # features kept per layer and position, where some compete
    read: ReadSite = "resid_mid"

    def __post_init__(self) -> None:
        if not 1 <= self.span <= self.n_layers:
            raise InputError(
                f"dictionary config: span={self.span} must lie in 1..{self.n_layers}"
            )
        gate = self.gate
        if gate.competes and not (self.k and 1 <= self.k <= self.n_features):
            raise InputError(
                f"dictionary config: {self.activation} needs 1 <= k <= "
                f"{self.n_features}, not {self.k}"
            )
        if gate.grouped and self.n_features % (self.k or 1):
            raise InputError(
                f"dictionary config: {self.activation} needs k={self.k} equal groups "
                f"of {self.n_features} features"
            )

    @property
    def gate(self) -> Gate:
        """What lets features through."""
        return find_gate(self.activation)
