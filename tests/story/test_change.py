"""What changes from a counterfactual prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import jaxclt
from jaxclt.cli.main import main
from jaxclt.errors import InputError
from jaxclt.graph.nodes import node_id
from jaxclt.story.change import aligned, change_from
from jaxclt.trace.pages import with_changes
from jaxclt.viewer.graph_json import graph_json, validate

GOLDEN = Path(__file__).parents[1] / "goldens" / "circuit_tracer_clt"
PROMPT = str(np.load(GOLDEN / "graph.npz")["prompt"])


@pytest.mark.parametrize(
    ("one", "other", "there"),
    [
        ([1, 2, 3], [4, 2, 5], [0, 1, 2]),
        ([1, 2, 3, 9], [1, 7, 8, 3, 9], [0, -1, 3, 4]),
        ([1, 7, 8, 9], [1, 9], [0, -1, -1, 1]),
        ([1, 1, 1], [1, 1], [0, 1, -1]),
        ([1, 1], [1, 1, 1], [0, 1]),
    ],
)
def test_prompts_are_aligned(one: list[int], other: list[int], there: list[int]):
    assert aligned(one, other).tolist() == there


@pytest.mark.parametrize(
    ("other", "why"), [([1, 2], "is the traced"), ([3, 4, 5], "nor end alike")]
)
def test_what_cannot_be_compared(other: list[int], why: str):
    with pytest.raises(InputError, match=why):
        aligned([1, 2], other)


def test_change_of_features():
    """Maths 23.5: nothing before the changed token; after it, the other graph's."""
    model = jaxclt.load_model(GOLDEN / "model")
    dictionary = jaxclt.load_dictionary(GOLDEN / "dictionary", model)
    graph = jaxclt.attribute(model, dictionary, PROMPT, attention=0)
    ids = graph.token_T.tolist()
    at = len(ids) - 2
    ids[at] = (ids[at] + 1) % model.cfg.d_vocab
    change_A = change_from(model, dictionary, graph, ids)
    influence_A = graph.influence_N[graph.feature_cols]
    before_A = graph.pos_A < at
    assert change_A[before_A] == pytest.approx(0, abs=1e-6)
    other = jaxclt.attribute(model, dictionary, ids, attention=0)
    values = {other.feature(a): float(v) for a, v in enumerate(other.value_A)}
    for a in np.flatnonzero(~before_A):
        now, then = float(graph.value_A[a]), values.get(graph.feature(int(a)), 0.0)
        want = influence_A[a] * abs(1 - then / now)
        assert change_A[a] == pytest.approx(want, rel=1e-3, abs=1e-6)
    assert change_A[~before_A].max() > 0.01 * influence_A.max()
    doc = with_changes(graph_json(graph, slug="x"), change_A, graph)
    validate(doc)
    assert doc["jaxclt"]["changes"] == "counterfactual prompt"
    said = {n["node_id"]: n["change"] for n in doc["nodes"] if "change" in n}
    assert said
    for a in range(len(change_A)):
        if (name := node_id(graph, a)) in said:
            assert said[name] == pytest.approx(change_A[a], rel=1e-3)


def test_a_bad_counterfactual_is_refused_before_the_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model, dictionary = str(GOLDEN / "model"), str(GOLDEN / "dictionary")
    where = ("--model", model, "--dictionary", dictionary, "--out", str(tmp_path / "g"))
    with pytest.raises(SystemExit) as ended:
        main(["trace", PROMPT, *where, "--counterfactual", PROMPT])
    assert ended.value.code == 2
    assert "that is the traced prompt: change a word" in capsys.readouterr().err
    assert not (tmp_path / "g" / "graph.npz").exists()
