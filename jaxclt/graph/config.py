"""How much of a graph to compute, and how: the settings of the room."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from jaxclt.errors import InputError, check_at_least, check_choice, check_share
from jaxclt.precision import Precision, asked_precision

__all__ = ["AttributeConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributeConfig:
    """How much of a graph to compute, and how.

    Raises:
      InputError: for a value out of its range.
    """

    max_features: int | None = 8192  # most feature nodes; None: every active feature
    tolerance: float = 0.02  # stop when less influence than this is unexplored
    node_threshold: float = 0.8
    edge_threshold: float = 0.98
    convention: Literal["paper", "circuit-tracer"] = "paper"
    # Of float32 products, see `jaxclt.precision`; by default what is asked for already.
    precision: str = dataclasses.field(default_factory=asked_precision)
    response: bool = False  # edges by response, too: what small changes do
    heads: int = 0  # list the last heads of this many of the strongest kept edges
    attention: int = 0  # take apart this many of the strongest cells of patterns
    chunk_size: int = 128  # most targets pulled back together
    n_bands: int | None = None  # position bands, one compilation each; None: chosen
    rows_per_update: int | None = None  # between two rankings; None: a quarter or 512
    direction: Literal["auto", "pull", "push"] = "auto"  # rows or columns; by cost
    devices: int | None = None  # how many share the rows; None: all accelerators
    memory_gb: float | None = None  # most memory to use; None: what is free

    def __post_init__(self) -> None:
        check_at_least(
            1,
            max_features=self.max_features,
            chunk_size=self.chunk_size,
            n_bands=self.n_bands,
            rows_per_update=self.rows_per_update,
            devices=self.devices,
        )
        check_at_least(0, heads=self.heads, attention=self.attention)
        check_share(zero=True, one=False, tolerance=self.tolerance)
        check_share(
            node_threshold=self.node_threshold, edge_threshold=self.edge_threshold
        )
        check_choice("convention", self.convention, ("paper", "circuit-tracer"))
        check_choice("precision", self.precision, get_args(Precision))
        check_choice("direction", self.direction, ("auto", "pull", "push"))
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise InputError(f"--memory {self.memory_gb}: give GB above 0")
