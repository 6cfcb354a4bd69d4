"""`jaxclt explain`: how one edge of a traced prompt travelled."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from tyro.conf import Positional, arg

from jaxclt.cli.common import answer, load
from jaxclt.cli.flags import AsJson, Debug, TracedDirectory
from jaxclt.cli.progress import Run
from jaxclt.errors import check_at_least

__all__ = ["ExplainFlags", "run_explain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainFlags:
    """How an edge travelled: straight up the residual stream, or through which heads;
    and what a small change of its source does: to queries, keys, norms and gates.

    Nodes are named as on the page and in graph.json: layer:position:feature (12:5:345,
    or 12_345_5), "error 12:5", "embed 2"; a target by its number, its text or id:TOKEN.
    """

    directory: TracedDirectory
    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """Feature, error or token the edge starts at."""
    target: Annotated[Positional[str], arg(metavar="TARGET")]
    """Feature or target it leads to."""
    hops: bool = False
    """Load the model to split the edge by the number of heads it passed, to list its
    last heads and what a small change does even if trace did not, and the queries and
    keys of which heads that changes."""
    max_hops: int = 3
    """With --hops: paths through this many heads or more count as one part."""
    model: str = ""
    """With --hops: the model, if it has moved since it was traced."""
    dictionary: str = ""
    """With --hops: the dictionary, if it has moved since it was traced."""
    json: AsJson = False
    debug: Debug = False


def run_explain(flags: ExplainFlags, run: Run) -> None:
    """Print the parts of the edge."""
    from jaxclt.graph.explain import edge_parts
    from jaxclt.io.graph_file import load_graph
    from jaxclt.trace.again import edge_parts_with_model

    check_at_least(1, max_hops=flags.max_hops)
    graph = load_graph(flags.directory / "graph.npz")
    parts = edge_parts(graph, flags.source, flags.target)
    if flags.hops:
        model, dictionary = load(
            flags.model or graph.meta.model,
            flags.dictionary or graph.meta.dictionary,
            run,
        )
        parts = edge_parts_with_model(
            graph,
            flags.source,
            flags.target,
            model=model,
            dictionary=dictionary,
            max_hops=flags.max_hops,
        )
    answer(flags.json, parts.to_dict(), parts.text())
