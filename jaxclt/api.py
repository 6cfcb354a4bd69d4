"""The calls a notebook makes: thin names over the rooms, re-exported by `jaxclt`."""

from __future__ import annotations

import dataclasses
import os
import webbrowser
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxclt.clt.coder import Dictionary
from jaxclt.errors import options_of
from jaxclt.files.atomic import atomic_path
from jaxclt.graph import prune as pruning
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.explain import edge_parts
from jaxclt.graph.graph import Graph
from jaxclt.io.model import Model
from jaxclt.io.tokenizer import Bos
from jaxclt.runs.pace import logged
from jaxclt.text.prompts import Opened, Prompt
from jaxclt.trace.again import edge_parts_with_model
from jaxclt.trace.explained import TargetChoice
from jaxclt.trace.files import scores_json
from jaxclt.trace.prompt import trace_prompt
from jaxclt.viewer.graph_json import graph_json
from jaxclt.viewer.page import page

__all__ = ["Page", "attribute", "explain", "influence", "prune", "show"]


def attribute(
    model: Model,
    dictionary: Dictionary,
    prompt: Prompt,
    *,
    targets: TargetChoice = (),
    bos: Bos = "auto",
    **config: Any,
) -> Graph:
    """The attribution graph of a prompt.

    Where it takes long, progress goes to the logger "jaxclt" (level INFO).

    Args:
      model: from `load_model`.
      dictionary: from `load_dictionary`.
      prompt: text, token ids, or a chat: ``[{"role": "user", "content": "Hi"}]``,
        which the model's own template makes a text of.
      targets: what to explain instead of the top tokens: texts as in
        `jaxclt.trace.target_text` (``" Paris"``, ``"diff: Paris| London"``,
        ``"feature:12:5:345"``), `Targets` from `jaxclt.graph.targets`, or a function
        that makes them from ``(params, recording)``.
      bos: whether a beginning-of-sequence token is put first.
      **config: fields of `AttributeConfig`, for example ``max_features=8192``.

    Raises:
      InputError: for input that does not fit the model.
    """
    return trace_prompt(
        model,
        dictionary,
        dataclasses.replace(Opened.of(prompt), bos=bos),
        config=options_of(AttributeConfig, "attribute", config),
        targets=targets,
        on_rows=partial(logged(), "attributing"),
    ).graph


def prune(
    graph: Graph, *, node_threshold: float = 0.8, edge_threshold: float = 0.98
) -> Graph:
    """The graph of the most influential nodes; its rows still sum (see `restrict`)."""
    kept = pruning.prune(
        graph, node_threshold=node_threshold, edge_threshold=edge_threshold
    )
    return pruning.restrict(dataclasses.replace(graph, pruning=kept))


def influence(graph: Graph) -> np.ndarray:
    """Influence of every source node on the targets, [N]."""
    return graph.influence_N


def explain(
    graph: Graph,
    source: str,
    target: str,
    *,
    model: Model | None = None,
    dictionary: Dictionary | None = None,
) -> str:
    """How an edge travelled, as text: straight up the residual stream, or by heads.

    Args:
      graph: from `attribute` or `load_graph`.
      source: a node, as the page and graph.json name it: ``12:5:345`` (or
        ``12_345_5``), ``error 12:5``, ``embed 2``.
      target: a feature, or a target by its text, its number or ``id:TOKEN``.
      model: with it and the dictionary, also by the number of heads passed, and the
        last heads of any edge.
      dictionary: see `model`.

    Raises:
      InputError: if there is no such node or edge, or the model is another.
    """
    if model is None or dictionary is None:
        return edge_parts(graph, source, target).text()
    found = edge_parts_with_model(
        graph, source, target, model=model, dictionary=dictionary
    )
    return found.text()


@dataclasses.dataclass(frozen=True)
class Page:
    """A graph as a self-contained HTML page; a notebook shows it inline."""

    html: str
    doc: dict[str, Any]  # what it shows, in the schema other viewers read

    def save(self, path: str | os.PathLike[str], *, open_browser: bool = False) -> Path:
        """Write the page; optionally open it in a browser."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.html, encoding="utf-8")
        if open_browser:
            webbrowser.open(Path(path).resolve().as_uri())
        return Path(path)

    def _repr_html_(self) -> str:
        # srcdoc keeps the page's scripts and styles away from the notebook's.
        inner = self.html.replace("&", "&amp;").replace('"', "&quot;")
        return (
            '<iframe style="width:100%;height:820px;border:0" '
            f'sandbox="allow-scripts allow-downloads" srcdoc="{inner}"></iframe>'
        )


def show(
    graph: Graph,
    *,
    compare: Graph | None = None,
    validation: dict[str, Any] | None = None,
    attention: dict[str, Any] | None = None,
) -> Page:
    """The pruned graph as a page, with its scores.

    Args:
      graph: from `attribute` or `load_graph`.
      compare: a second graph, whose nodes are set against this one's.
      validation: the content of ``validation.json``, shown as evidence.
      attention: the content of ``attention.json``: heads, and what makes them attend.
    """
    doc = _document(graph)
    other = None if compare is None else _document(compare)
    shown = page(doc, validation=validation, attention=attention, other=other)
    return Page(html=shown, doc=doc)


def _document(graph: Graph) -> dict[str, Any]:
    return graph_json(graph, slug="graph", scores=scores_json(graph))
