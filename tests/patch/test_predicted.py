"""Predictions of a patch beside what it did (maths 16.13)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import jaxclt
from jaxclt.cli.main import main
from jaxclt.patching.predicted import RULE, as_predicted, told

GOLDEN = Path(__file__).parents[1] / "goldens" / "circuit_tracer_clt"
PROMPT = str(np.load(GOLDEN / "graph.npz")["prompt"])


@pytest.fixture(scope="module")
def traced():
    model = jaxclt.load_model(GOLDEN / "model")
    clt = jaxclt.load_dictionary(GOLDEN / "dictionary", model)
    return model, clt, jaxclt.attribute(model, clt, PROMPT, tolerance=0.0)


@pytest.fixture(scope="module")
def edits(traced) -> list[jaxclt.Edit]:
    """A feature that is doubled, one that is set and one that is ablated."""
    graph = traced[2]
    order = np.argsort(-graph.influence_N[: graph.n_features])
    chosen = [next(a for a in order if graph.layer_A[a] == layer) for layer in range(3)]
    places = [
        {"layer": int(graph.layer_A[a]), "pos": int(graph.pos_A[a])}
        | {"feature": int(graph.feature_A[a])}
        for a in chosen
    ]
    changes = ({"scale": 2.0}, {"set": 0.7}, {"scale": 0.0})
    return [jaxclt.Edit(**p, **c) for p, c in zip(places, changes, strict=True)]


def test_the_graphs_prediction_is_its_own_equations(traced, edits):
    """In numpy: features that are set do not answer, all others do."""
    model, clt, graph = traced
    found = jaxclt.patch(model, clt, graph, edits, predict=True).predicted
    A, value_A = graph.n_features, graph.value_A.astype(float)
    unit = graph.edge_RN[:, :A].astype(float) / value_A
    delta_A = np.zeros(A)
    for edit in edits:
        place = (graph.layer_A, graph.pos_A, graph.feature_A)
        wanted = (edit.layer, edit.pos, edit.feature)
        a = np.flatnonzero(
            np.all([x == w for x, w in zip(place, wanted, strict=True)], axis=0)
        )[0]
        after = edit.set if edit.set is not None else edit.scale * value_A[a]
        delta_A[a] = after - value_A[a]
        unit[a] = 0
    for a in np.lexsort((graph.feature_A, graph.pos_A, graph.layer_A)):
        delta_A[a] += unit[a] @ delta_A  # inputs come first: they have their changes
    want_K = unit[A:] @ delta_A
    rows = found[: graph.n_targets]
    np.testing.assert_allclose([r["graph"] for r in rows], want_K, rtol=2e-4, atol=1e-5)
    contrast = found[graph.n_targets]
    for key in ("graph", "derivative", "replacement", "measured"):
        parts = found[0][key] - found[1][key]
        assert contrast[key] == pytest.approx(parts, abs=1e-5)


def test_with_norms_held_the_replacement_model_is_the_graph(traced, edits):
    """Every active feature is a node here: two ways to the same number."""
    done = jaxclt.patch(*traced, edits, predict=True, norms="frozen")
    for row in done.predicted:
        assert row["replacement"] == pytest.approx(row["graph"], rel=1e-3, abs=1e-4)


def test_what_is_not_known_is_not_said(traced, edits):
    model, clt, _ = traced
    without = jaxclt.patch(model, clt, PROMPT, edits, predict=True).predicted
    assert all(row["graph"] is row["derivative"] is None for row in without)
    assert all(row["replacement"] is not None for row in without)
    assert jaxclt.patch(model, clt, PROMPT, edits).predicted is None


@pytest.mark.parametrize(
    ("predicted", "measured", "why"),
    [
        (1.0, 0.5, None),
        (1.0, 0.49, "less than half of it"),
        (-1.0, -2.0, None),
        (-1.0, -2.1, "more than twice as much"),
        (1.0, -0.5, "it goes the other way"),
        (0.05, -0.05, None),
        (0.0, 0.1, None),
        (0.0, 0.2, "more than twice as much"),
    ],
)
def test_the_rule(predicted: float, measured: float, why: str | None):
    assert as_predicted(predicted, measured) == why
    said = told({"as_predicted": why is None, "why": why})
    assert said == ("as predicted" if why is None else f"not as predicted: {why}")


def test_the_command_says_whether_it_went_as_predicted(
    traced, edits, capsys: pytest.CaptureFixture[str]
):
    feature = f"{edits[1].layer}:{edits[1].pos}:{edits[1].feature}"
    args = ("--model", str(GOLDEN / "model"), "--dictionary")
    args += (str(GOLDEN / "dictionary"), "--feature", feature)
    main(["patch", PROMPT, *args])
    said = " ".join(capsys.readouterr().out.split())
    assert RULE in said
    assert "as predicted │" in said
