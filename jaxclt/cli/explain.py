"""`jaxclt explain`: how one edge of a traced prompt travelled."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from jaxclt.cli.common import answer, load
from jaxclt.cli.flags import AsJson, Debug, TracedDirectory
from jaxclt.cli.progress import Run
from jaxclt.errors import InputError, check_at_least

if TYPE_CHECKING:
    from jaxclt.clt.coder import Dictionary
    from jaxclt.io.model import Model

__all__ = ["ExplainFlags", "run_explain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainFlags:
    """How an edge travelled: straight up the residual stream, or through which heads;
    and what a small change of its source does: to queries, keys, norms and gates.

    Nodes are named as on the page and in graph.json: layer:position:feature (12:5:345,
    or 12_345_5), "error 12:5", "embed 2"; a target by its number, its text or id:TOKEN.

    With --head, why that head attends instead: from the token TARGET, which asks, to
    the token SOURCE, whose values come; both by position or text.
    """

    directory: TracedDirectory
    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """Feature, error or token the edge starts at."""
    target: Annotated[Positional[str], arg(metavar="TARGET")]
    """Feature or target it leads to."""
    head: str = ""
    """LAYER:HEAD, for example 9:3: take the head's score from TARGET to SOURCE apart
    into pairs of nodes. Loads the model."""
    hops: bool = False
    """Load the model to split the edge by the number of heads it passed, to list its
    last heads and what a small change does even if trace did not, and the queries and
    keys of which heads that changes."""
    max_hops: int = 3
    """With --hops: paths through this many heads or more count as one part."""
    model: str = ""
    """With --hops or --head: the model, if it has moved since it was traced."""
    dictionary: str = ""
    """With --hops or --head: the dictionary, if it has moved since it was traced."""
    json: AsJson = False
    debug: Debug = False


def run_explain(flags: ExplainFlags, run: Run) -> None:
    """Print the parts of the edge."""
    from jaxclt.graph.explain import edge_parts
    from jaxclt.io.graph_file import load_graph
    from jaxclt.trace.again import edge_parts_with_model
    from jaxclt.trace.attended import attention

    check_at_least(1, max_hops=flags.max_hops)
    graph = load_graph(flags.directory / "graph.npz")

    def loaded() -> tuple[Model, Dictionary]:
        model = flags.model or graph.meta.model
        return load(model, flags.dictionary or graph.meta.dictionary, run)

    if flags.head:
        layer, head = _head(flags.head)
        place = {"query": flags.target, "key": flags.source}
        found = attention(*loaded(), graph, layer=layer, head=head, **place)
        answer(flags.json, found.to_dict(), str(found))
        return
    parts = edge_parts(graph, flags.source, flags.target)
    if flags.hops:
        model, dictionary = loaded()
        parts = edge_parts_with_model(
            graph,
            flags.source,
            flags.target,
            model=model,
            dictionary=dictionary,
            max_hops=flags.max_hops,
        )
    answer(flags.json, parts.to_dict(), parts.text())


def _head(text: str) -> tuple[int, int]:
    """Read LAYER:HEAD.

    Raises:
      InputError: for another form.
    """
    found = re.fullmatch(r"L?(\d{1,6})[:.H](\d{1,6})", text.strip())
    if found is None:
        raise InputError(f"--head {text!r}: write LAYER:HEAD, for example 9:3")
    return int(found[1]), int(found[2])
