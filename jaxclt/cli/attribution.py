"""The flags that `jaxclt trace` and `jaxclt sweep` have in common."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

from rich.console import Console
from tyro.conf import arg

from jaxclt.cli.common import load, options
from jaxclt.cli.flags import AsJson, Debug, ModelName

if TYPE_CHECKING:
    from jaxclt.clt.coder import Dictionary
    from jaxclt.graph.attribute import AttributeConfig
    from jaxclt.io.model import Model

__all__ = ["AttributionFlags"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributionFlags:
    """What trace and sweep have in common."""

    model: ModelName
    dictionary: Annotated[str, arg(metavar="D")]
    """neurons, neurons:K or neurons@X, the model's own (all; the K strongest of every
    token; those that write at least X); a bundled name; a local directory
    (circuit-tracer, GemmaScope, SAELens, sparsify and more formats); or a hub id
    organisation/name[//folder][@revision]."""
    max_features: int = 8192
    """Most feature nodes; the most influential ones are taken."""
    tolerance: float = 0.02
    """Stop adding features when less than this share of influence is unexplored; 0 adds
    all up to max-features. Not used with --compat circuit-tracer."""
    node_threshold: float = 0.8
    """Share of the influence that the shown nodes hold."""
    edge_threshold: float = 0.98
    """Share of the edge strength that the shown edges hold."""
    heads: int = 0
    """List the last attention heads of this many of the strongest shown edges."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Put a beginning-of-sequence token first; auto: as the model's tokenizer does."""
    chat: bool = False
    """A prompt is what the user says: put the model's own chat template around it, up
    to where the assistant answers."""
    compat: Literal["none", "circuit-tracer"] = "none"
    """circuit-tracer's conventions: a first token always, no features or errors there,
    its pruning and its completeness score."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; a graph is exact in float32."""
    precision: Literal["highest", "high", "default"] = "highest"
    """Of matmuls on accelerators; highest is full float32."""
    memory: float | None = None
    """Most memory to use, GB (of each accelerator, if there are any); what is free if
    not given. Graphs are fitted to it."""
    devices: int | None = None
    """How many accelerators share the rows of a graph; all if not given."""
    shard: int | None = None
    """Split the model's weights over this many devices, where one cannot hold them."""
    json: AsJson = False
    debug: Debug = False

    def config(self) -> AttributeConfig:
        """How much to compute.

        Raises:
          InputError: for values out of their range, or devices that are not there.
        """
        from jaxclt.graph.attribute import AttributeConfig
        from jaxclt.graph.compute import row_mesh

        convention = "paper" if self.compat == "none" else self.compat
        config = options(
            AttributeConfig, self, convention=convention, memory_gb=self.memory
        )
        row_mesh(config)
        if self.compat == "none":
            return config
        # That tool leaves out what is not explored: no bound could be stated.
        return dataclasses.replace(config, tolerance=0.0)

    def load(self, say: Console) -> tuple[Model, Dictionary]:
        """The model and its dictionary."""
        return load(self.model, self.dictionary, say, dtype=self.dtype, mesh=self.shard)
