"""The flags that `jaxclt trace` and `jaxclt sweep` have in common."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from jaxclt.cli.common import load, options
from jaxclt.cli.flags import AsJson, Debug, ModelName
from jaxclt.cli.progress import Run
from jaxclt.io.tokenizer import Bos
from jaxclt.precision import Precision

if TYPE_CHECKING:
    from jaxclt.clt.coder import Dictionary
    from jaxclt.graph.attribute import AttributeConfig
    from jaxclt.io.model import Model

__all__ = ["AttributionFlags"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributionFlags:
    """The model, its dictionary, and how much of a graph to compute."""

    model: ModelName
    dictionary: Annotated[str, arg(metavar="D")]
    """neurons, neurons:K or neurons@X for the model's own neurons (all; the K strongest
    at every token; those whose write has at least the norm X); a bundled name; a local
    directory (circuit-tracer, GemmaScope, SAELens, sparsify and more formats); or a hub
    id organisation/name[//folder][@revision]."""
    max_features: int = 8192
    """Most feature nodes; the most influential ones are taken."""
    tolerance: float = 0.02
    """Stop adding features when less than this share of influence is unexplored; 0 adds
    all up to max-features. Not used with --compat circuit-tracer."""
    node_threshold: float = 0.8
    """Share of the influence that the shown nodes hold."""
    edge_threshold: float = 0.98
    """Share of the edge strength that the shown edges hold."""
    response: bool = False
    """Also compute what small changes do: edges by response, with attention patterns
    and norms live, and their parts."""
    heads: int = 0
    """For this many of the strongest shown edges, list the last attention heads."""
    bos: Bos = "auto"
    """Put a beginning-of-sequence token first; auto: as the model's tokenizer does."""
    chat: bool = False
    """A prompt is what the user says: put the model's own chat template around it, up
    to where the assistant answers."""
    compat: Literal["none", "circuit-tracer"] = "none"
    """Follow circuit-tracer: a beginning-of-sequence token always comes first, without
    features or errors; pruning and completeness score are that tool's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. Attribution needs float32; bfloat16 is for --dry-run."""
    precision: Precision = "highest"
    """Of matrix products on accelerators: highest is full float32;
    TF32_TF32_F32_X3 (GPUs) and BF16_BF16_F32_X6 are nearly that, and faster. The
    report has it beside the row error that came of it."""
    memory: float | None = None
    """Most memory to use, in GB (per accelerator, if there are any); by default what is
    free. Graphs are fitted to it."""
    devices: int | None = None
    """How many accelerators share the rows of a graph; by default all."""
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

    def load(self, run: Run, *, plan: bool = False) -> tuple[Model, Dictionary]:
        """The model and its dictionary, for graphs or only for a plan of one.

        Raises:
          InputError: if there are graphs to make and `dtype` is too coarse for edges.
        """
        import jax.numpy as jnp

        from jaxclt.graph.prompt import check_exact

        if not plan:
            check_exact(jnp.dtype(self.dtype))
        return load(self.model, self.dictionary, run, dtype=self.dtype, mesh=self.shard)
