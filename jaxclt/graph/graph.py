"""The attribution graph of one prompt: nodes, signed direct effects, and their sums.

Rows are what is explained, columns are sources; `Layout` says which is where.
Everything a row needs to sum to what it explains is kept:
``edge_RN.sum(1) + bias_R + rest_R == readout_R`` (maths 6.3).

Arrays live on the host (numpy): a graph is a result, shared by the scores, the file
formats and the viewer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from jaxclt.files.json_text import to_json
from jaxclt.graph.blocks import row_strength
from jaxclt.graph.head_table import HeadLoads
from jaxclt.graph.kinds import SOURCES
from jaxclt.graph.layout import Layout
from jaxclt.graph.response_table import Response

__all__ = ["VIRTUAL_TOKEN", "Graph", "GraphMeta", "Pruning"]

# Custom directions have no vocabulary entry. Readers of graph.json want a non-negative
# integer in the node id, so they are numbered from here, above every real vocabulary.
VIRTUAL_TOKEN = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphMeta:
    """Where a graph comes from; everything in it is JSON."""

    model: str
    dictionary: str
    prompt: str
    tokens: tuple[str, ...]  # T token strings, untrusted: escape where shown
    target_tokens: tuple[str, ...]  # K token strings, or labels of other targets
    n_layers: int
    # of a chat: role and content, untrusted like tokens; `prompt` is its text
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)
    convention: str = "paper"  # or "circuit-tracer"
    weights: str = "probability"  # what target_prob_K holds, or "chosen"
    reading: str = "value"  # what edges say, or "response", see `graph.response`
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    # what features stand for, by "layer:feature"; untrusted like tokens
    # What shown feature nodes say of themselves, by "layer:pos:feature": `label`, and
    # what it is made of (`jaxclt.naming.label`); untrusted like tokens.
    said: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    version: str = ""
    schema: int = 1
    sources: tuple[str, ...] = SOURCES  # kinds of the columns, in their order

    def label(self, layer: int, pos: int, feature: int) -> str:
        """What the dictionary calls a feature, else what its node says of itself."""
        own = self.labels.get(f"{layer}:{feature}", "")
        return own or self.said.get(f"{layer}:{pos}:{feature}", {}).get("label", "")

    def to_json(self) -> str:
        """Serialise; `of` reads it, parsed."""
        raw = dataclasses.asdict(self)
        for name, usual in (("sources", SOURCES), ("reading", "value"), ("said", {})):
            if getattr(self, name) == usual:
                del raw[name]
        return to_json(raw, ensure_ascii=False)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> GraphMeta:
        """From what `to_json` wrote; unknown keys of newer versions are ignored."""
        known = {f.name for f in dataclasses.fields(cls)}
        raw = {k: v for k, v in raw.items() if k in known}
        lists = {"tokens", "target_tokens", "sources"} & set(raw)
        return cls(**{**raw, **{name: tuple(raw[name]) for name in lists}})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
    """Which nodes and edges of a graph to show (Circuit Tracing 2025, appendix F)."""

    keep_N: np.ndarray  # bool, one per column (source node)
    keep_edge_RN: np.ndarray  # bool; True only between kept nodes
    node_threshold: float
    edge_threshold: float


def _absent() -> np.ndarray:
    return np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """Attribution graph of one prompt, unpruned (Circuit Tracing 2025, section 3).

    A feature nodes are ordered by layer, then position, then feature index, so that the
    feature block ``edge_RN[:A, :A]`` is strictly lower triangular.
    """

    meta: GraphMeta
    token_T: np.ndarray  # int32
    layer_A: np.ndarray  # int32
    pos_A: np.ndarray  # int32
    feature_A: np.ndarray  # int32
    value_A: np.ndarray  # activation
    preact_A: np.ndarray  # pre-activation, what the feature's row sums to
    attributed_R: np.ndarray  # bool, False: the row was not computed (all zero)
    target_token_K: np.ndarray  # int32, -1 for a custom direction
    target_prob_K: np.ndarray  # what influence starts with: probability, or a weight
    edge_RN: np.ndarray  # signed direct effects, source value x linear weight
    bias_R: np.ndarray  # every bias pushed through the frozen maps
    rest_R: np.ndarray  # sources that are not columns of this graph, summed with sign
    rest_abs_R: np.ndarray  # the same summed without sign: their share of the inputs
    readout_R: np.ndarray  # pre-activation, or demeaned logit
    influence_N: np.ndarray  # on the targets (section 5.2.1)
    pruning: Pruning
    # Where targets read, int32: layer l < L the stream after its attention, L the
    # output. Left out (graphs of older files): the output at the last position.
    target_layer_K: np.ndarray = dataclasses.field(default_factory=_absent)
    target_pos_K: np.ndarray = dataclasses.field(default_factory=_absent)
    # How edges travelled (maths 7); None in graphs of versions that did not say.
    direct_RN: csr_array | None = None  # residual-direct parts, between equal positions
    heads: HeadLoads | None = None  # the strongest kept edges by their last head
    # What small changes do (maths 22); None where that was not computed.
    response: Response | None = None  # before other features answer
    # In the real model, all answers included: source value x derivative of each target.
    derivative_KN: np.ndarray | None = None
    # Of a restricted graph: signed total effects of features in the whole one, whose
    # paths led through more nodes; see `jaxclt.graph.effects.total_effects`.
    total_effect_KA: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Fill in where targets read if that was left out."""
        last = {"target_layer_K": self.n_layers, "target_pos_K": self.n_tokens - 1}
        for name, value in last.items():
            if len(getattr(self, name)) == 0:
                full_K = np.full(self.n_targets, value, np.int32)
                object.__setattr__(self, name, full_K)

    def __repr__(self) -> str:
        """What is explained, and how large it is."""
        answers = ", ".join(map(repr, self.meta.target_tokens[:3]))
        shown = int(self.pruning.keep_N.sum())
        return (
            f"Graph({self.meta.prompt[-60:]!r} -> {answers}; {self.n_features} "
            f"features, {shown} nodes shown; {self.meta.dictionary} of "
            f"{self.meta.model})"
        )

    @functools.cached_property
    def nodes(self) -> Any:
        """Shown nodes as a table, see `jaxclt.graph.tables.node_table`."""
        from jaxclt.graph.tables import node_table

        return node_table(self)

    @functools.cached_property
    def edges(self) -> Any:
        """Shown edges as a table, see `jaxclt.graph.tables.edge_table`."""
        from jaxclt.graph.tables import edge_table

        return edge_table(self)

    def to_networkx(self) -> Any:
        """See `jaxclt.graph.tables.to_networkx`."""
        from jaxclt.graph.tables import to_networkx

        return to_networkx(self)

    @functools.cached_property
    def layout(self) -> Layout:
        """Where its nodes stand."""
        return Layout(
            n_features=self.n_features,
            n_layers=self.n_layers,
            n_tokens=self.n_tokens,
            n_targets=self.n_targets,
            sources=self.meta.sources,
        )

    @functools.cached_property
    def row_strength(self) -> np.ndarray:
        """Sum of the absolute edges of every row."""
        return row_strength(self.edge_RN, self.n_features)

    @functools.cached_property
    def side_R(self) -> np.ndarray:  # noqa: N802  an axis, as in the fields
        """The side of zero that rows are on, [R]: -1 for features below it, else 1.

        An edge times its row's side is positive where the source strengthens a feature
        (raises a target): what lowers a feature that is below zero makes it larger.
        Which side a neuron is on means nothing by itself, it could read and write the
        opposite and be the same neuron.
        """
        side_A = np.where(self.value_A < 0, -1, 1)
        return np.concatenate([side_A, np.ones(self.n_targets, side_A.dtype)])

    @property
    def is_next_token(self) -> np.ndarray:
        """Which targets are logits at the last position, [K]."""
        at_end_K = self.target_pos_K == self.n_tokens - 1
        at_end_K &= self.target_layer_K == self.n_layers
        return at_end_K & (self.target_token_K >= 0)

    @property
    def target_id_K(self) -> np.ndarray:  # noqa: N802  as named in graph.json
        """What tells targets at one position apart in graph.json, [K] int.

        The token, or for a direction, and for a token that was there before,
        `VIRTUAL_TOKEN` + k.
        """
        at_K2 = np.stack([self.target_token_K, self.target_pos_K], 1)
        first_K = np.unique(at_K2, axis=0, return_index=True)[1]
        id_K = VIRTUAL_TOKEN + np.arange(self.n_targets)
        own_K = first_K[self.target_token_K[first_K] >= 0]
        id_K[own_K] = self.target_token_K[own_K]
        return id_K

    @property
    def edge_direct_RN(self) -> np.ndarray | None:  # noqa: N802  as in graph.npz
        """Residual-direct part of every edge, made dense; the rest passed a head."""
        return None if self.direct_RN is None else self.direct_RN.toarray()

    def feature(self, a: int) -> tuple[int, int, int]:
        """Layer, position and index of feature node `a`."""
        return int(self.layer_A[a]), int(self.pos_A[a]), int(self.feature_A[a])

    @property
    def n_tokens(self) -> int:
        """T."""
        return len(self.token_T)

    @property
    def n_layers(self) -> int:
        """L."""
        return self.meta.n_layers

    @property
    def n_features(self) -> int:
        """A, feature nodes."""
        return len(self.layer_A)

    @property
    def n_targets(self) -> int:
        """K, targets."""
        return len(self.target_token_K)

    @property
    def feature_cols(self) -> slice:
        """Columns (and rows) of the feature nodes."""
        return self.layout.nodes["feature"]

    @property
    def error_cols(self) -> slice:
        """Columns of the error nodes, layer-major: layer * T + position."""
        return self.layout.nodes["error"]

    @property
    def embed_cols(self) -> slice:
        """Columns of the embedding nodes, one per position."""
        return self.layout.nodes["embed"]

    @property
    def target_rows(self) -> slice:
        """Rows of the targets."""
        return self.layout.target_rows
