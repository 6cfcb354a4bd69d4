"""Attention of a traced prompt, on demand: the prompt is recorded again."""

from __future__ import annotations

import math
import re

import numpy as np

from jaxclt.attending import cells
from jaxclt.attending.apart import take_one_apart
from jaxclt.attending.brought import make_nodes
from jaxclt.attending.cells import Cell, HeadEffects, moved_cotangents, one_cell
from jaxclt.attending.document import cell_json
from jaxclt.attending.result import Attention
from jaxclt.clt.coder import Dictionary
from jaxclt.errors import InputError, check_at_least, on_one_line
from jaxclt.graph.bank import RowTargets
from jaxclt.graph.contrast import contrast
from jaxclt.graph.graph import Graph
from jaxclt.graph.nodes import quoted
from jaxclt.graph.prompt import Recorded
from jaxclt.io.model import Model
from jaxclt.trace.again import target_row
from jaxclt.trace.record import recorded

__all__ = ["attention", "head_effects"]


def head_effects(
    model: Model, dictionary: Dictionary, graph: Graph, *, n: int = 200
) -> HeadEffects:
    """What every attention head does to the answer of a traced prompt.

    The effect of a cell is exact in the local replacement model with gates held: it is
    what the answer would lose without what the cell moves (maths 22.20). On the logit
    of the first target minus that of the second, or the first target.

    Args:
      model: it was traced with.
      dictionary: it was traced with.
      graph: traced, by value.
      n: strongest cells to list.

    Raises:
      InputError: if the graph is another model's, or its targets are directions.
    """
    check_at_least(1, n=n)
    p = _recorded(graph, model, dictionary)
    return cells.head_effects(p, graph, _targets(graph, p), n=n)


def attention(
    model: Model,
    dictionary: Dictionary,
    graph: Graph,
    *,
    layer: int,
    head: int,
    query: int | str,
    key: int | str,
) -> Attention:
    """Why a head attends from one token to another: its score taken apart.

    Every node of the graph has its part on either side, features that are no nodes and
    all biases theirs; the parts sum to the model's own score (maths 22.22).

    Args:
      model: the graph was traced with.
      dictionary: it was traced with.
      graph: traced, by value.
      layer: of the head.
      head: its number.
      query: position that attends, or its token's text.
      key: position that it attends to, or its token's text.

    Raises:
      InputError: if there is no such cell, or the graph is another model's.
    """
    cfg = model.cfg
    for name, number, size in (
        ("layer", layer, cfg.n_layers),
        ("head", head, cfg.n_heads),
    ):
        if not 0 <= number < size:
            raise InputError(f"{name}={number}: the model has {name}s 0 to {size - 1}")
    at, to = (_position(graph, name, x) for name, x in (("query", query), ("key", key)))
    if to > at:
        raise InputError(
            f"key={to} comes after query={at}: a token attends to itself and to those "
            "before it"
        )
    p = _recorded(graph, model, dictionary)
    nodes = make_nodes(p, graph)
    unknown = (math.nan,) * 4
    cell, asked_K = Cell(layer, head, at, to, *unknown), contrast(graph).weight_K != 0
    # No file holds what a direction reads, and effects are not known without it.
    if (graph.target_token_K[asked_K] >= 0).all():
        moved_LTD = moved_cotangents(p, graph, _targets(graph, p))
        cell = one_cell(nodes.clean, moved_LTD, layer, head, at, to)
    apart = take_one_apart(nodes, cell)
    return Attention(
        apart=apart,
        said=cell_json(graph, apart),
        contrast=on_one_line(contrast(graph).text),
    )


def _recorded(graph: Graph, model: Model, dictionary: Dictionary) -> Recorded:
    if graph.meta.reading != "value":
        raise InputError(
            f"this graph's edges are by {graph.meta.reading}: give the one that they "
            "were made from"
        )
    return recorded(graph, model, dictionary)


def _targets(graph: Graph, p: Recorded) -> RowTargets:
    """What the targets of the contrast read; others nothing."""
    weight_K = contrast(graph).weight_K
    read_KD = np.zeros((graph.n_targets, p.cfg.d_model), p.error_LTD.dtype)
    for k in np.flatnonzero(weight_K).tolist():
        read_KD[k] = target_row(graph, k, p).read_RD[0]
    return RowTargets(
        layer_R=graph.target_layer_K, pos_R=graph.target_pos_K, read_RD=read_KD
    )


def _position(graph: Graph, name: str, place: int | str) -> int:
    """A position by its number, or by the text of its token."""
    tokens, T = graph.meta.tokens, graph.n_tokens
    if isinstance(place, str) and not re.fullmatch(r"-?\d{1,9}", place):
        found = [pos for pos, token in enumerate(tokens) if token == place]
        found = found or [p for p, t in enumerate(tokens) if t.strip() == place.strip()]
        if len(found) == 1:
            return found[0]
        said = f"this token stands at {found}" if found else "there is no such token"
        raise InputError(
            f"{name}={quoted(place)}: {said}: give a position, 0 to {T - 1}"
        )
    if not -T <= int(place) < T:
        raise InputError(f"{name}={place}: the prompt has positions 0 to {T - 1}")
    return int(place) % T
