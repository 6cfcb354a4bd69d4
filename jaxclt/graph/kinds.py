"""The kinds of nodes: one row of a table each, and nothing else tells them apart.

A kind says how its nodes are numbered, named and drawn, and what they count as. A new
kind of source is a row of `KINDS`; a graph that has it names it in `GraphMeta.sources`.

Names are formats of what `jaxclt.graph.nodes.facts` knows of a node: its ``layer``,
``pos`` and ``number`` (a feature's index, a token's vocabulary entry), and so on.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

__all__ = ["KINDS", "SOURCES", "NodeKind"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeKind:
    """One kind of node."""

    axes: str  # what its nodes are numbered by, in order: letters of `Layout.shape`
    names: tuple[str, ...]  # that users may type; the first is the short one
    label: str  # in paths
    # What a walk that ends in such a node counts as; None: the walk goes on from it.
    ends: Literal["input", "error", "bias"] | None = None
    kept_by: tuple[str, ...] = ()  # conventions whose pruning keeps all of them
    # In graph.json. Its `node_id` is layer_number_pos.
    drawn: str  # the `feature_type`
    layer: str = "{layer}"
    number: str = "{number}"
    js_id: str = "{layer}_{number}-{pos}"
    feature: str = "{number}"
    clerp: str = ""  # viewers name tokens and errors themselves
    always_drawn: bool = False  # also where none of its links is kept

    @property
    def node_id(self) -> str:
        """Format of the ids in graph.json."""
        return f"{self.layer}_{self.number}_{{pos}}"


KINDS = {
    "feature": NodeKind(
        axes="A",
        names=("{layer}:{pos}:{number}",),
        label="L{layer} feature {number}@{pos}",
        drawn="cross layer transcoder",
        js_id="{layer}_{number}-0",
        feature="{cantor}",
        clerp="{text}",
    ),
    "error": NodeKind(
        axes="LT",
        names=("error {layer}:{pos}",),
        label="L{layer} error@{pos}",
        ends="error",
        kept_by=("paper",),
        drawn="mlp reconstruction error",
        number="-1",
        js_id="{layer}_-1-{pos}",
        feature="-1",
    ),
    "embed": NodeKind(
        axes="T",
        names=("embed {pos}", "token {pos}"),
        label="token {quoted}@{pos}",
        ends="input",
        kept_by=("paper", "circuit-tracer"),
        drawn="embedding",
        layer="E",
        js_id="E_{number}-{pos}",
        feature="{pos}",
        always_drawn=True,
    ),
    "target": NodeKind(
        axes="K",
        names=("target {k}",),
        label="{what} {quoted}{where}",
        drawn="logit",
        js_id="L_{number}-{pos}",
        clerp='Output "{token}" (p={probability:.3f})',
        always_drawn=True,
    ),
}
SOURCES = ("feature", "error", "embed")  # of every graph, in the order of its columns
