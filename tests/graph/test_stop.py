"""A long graph that is stopped: what was attributed is kept, and it is exact."""

from __future__ import annotations

import dataclasses

import pytest
from cases import case, case_active, case_graph, close, same_rows

from jaxclt.graph.attribute import AttributeConfig, Timing
from jaxclt.graph.graph import Graph
from jaxclt.graph.scores import scores

pytestmark = pytest.mark.usefixtures("x64")

SMALL_CHUNKS = AttributeConfig(
    max_features=None,
    devices=1,
    tolerance=0.0,
    chunk_size=8,
    n_bands=3,
    rows_per_update=20,
    direction="pull",
)


def stopped(after: int, **config: object) -> tuple[Graph, Timing]:
    """The graph of a case that is stopped once so many rows are done."""
    done, timing = [0], Timing()

    def on_rows(n: int, total: int) -> None:
        assert n <= total
        done[0] = n

    graph = case("clt").graph(
        dataclasses.replace(SMALL_CHUNKS, **config),
        active=case_active("clt"),
        on_rows=on_rows,
        stop=lambda: done[0] >= after,
        timing=timing,
    )
    return graph, timing


@pytest.mark.parametrize("max_features", [None, 90], ids=["all", "by influence"])
def test_what_is_done_is_kept(max_features: int | None) -> None:
    full = case_graph("clt")
    got, timing = stopped(45, max_features=max_features)
    assert timing.work["stopped"]
    # What was under way is finished too: two chunks, and the targets.
    assert 20 <= got.n_features <= 45 + 16 < full.n_features
    same_rows(got, full)
    bound, exact = scores(got), scores(full)
    assert bound.replacement <= exact.replacement <= bound.replacement_at_most
    assert bound.completeness <= exact.completeness <= bound.completeness_at_most


def test_without_a_stop_nothing_is_said() -> None:
    got, timing = stopped(10**9)
    assert "stopped" not in timing.work
    close(got.edge_RN, case_graph("clt").edge_RN, 1e-13)


@pytest.mark.parametrize(("after", "direction"), [(0, "pull"), (30, "push")])
def test_where_there_is_no_graph_yet_the_stop_is_an_interrupt(
    after: int, direction: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped(after, direction=direction)
