"""The same graphs as circuit-tracer 0.5.0, in float32 (maths 21).

Goldens come from its own code, see goldens/make_circuit_tracer.py. Its square matrix
has nodes [features][errors, layer-major][tokens][logits]; its first position has
neither features nor errors.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxclt.clt.active import Active, active_features
from jaxclt.clt.transcoder import StoreDictionary
from jaxclt.graph.attribute import AttributeConfig, attribute_recording
from jaxclt.graph.certificate import certificate
from jaxclt.graph.graph import Graph, GraphMeta
from jaxclt.graph.prompt import Prompt
from jaxclt.graph.scores import scores
from jaxclt.graph.targets import salient_targets
from jaxclt.io.dictionary import open_dictionary
from jaxclt.io.model import Model, load_model
from jaxclt.lm.run import record, unembed
from jaxclt.types import Recording, Targets

GOLDENS = Path(__file__).parent / "goldens"
NAMES = ("clt", "plt", "plt_skip")
TOL = 1e-5

record_jit = jax.jit(record, static_argnames="cfg")


class Traced(NamedTuple):
    golden: dict[str, np.ndarray]
    model: Model
    recording: Recording
    active: Active
    targets: Targets


@functools.cache
def load(directory: str) -> tuple[Model, Recording]:
    model = load_model(GOLDENS / directory / "model")
    token_T = np.load(GOLDENS / directory / "graph.npz")["token_T"]
    return model, record_jit(model.params, token_T, cfg=model.cfg)


@functools.cache
def traced(name: str) -> Traced:
    kind, _, skip = name.partition("_")
    directory = f"circuit_tracer_{kind}"
    suffix = f"_{skip}" if skip else ""
    model, recording = load(directory)
    with np.load(GOLDENS / directory / f"graph{suffix}.npz") as file:
        golden = dict(file)
    np.testing.assert_array_equal(golden["token_T"], recording.token_T)
    store = open_dictionary(GOLDENS / directory / f"dictionary{suffix}")
    active = active_features(StoreDictionary(store), model.params, recording, model.cfg)
    targets = salient_targets(model.params, recording.out_TD[-1])
    return Traced(golden, model, recording, active, targets)


@functools.cache
def graph(name: str, which: str, convention: str = "circuit-tracer") -> Graph:
    """The graph with all features, or with the half that circuit-tracer picks."""
    golden, model, recording, active, targets = traced(name)
    rows = int(golden["reduced_batch_size"] * golden["reduced_update_interval"])
    config = AttributeConfig(
        convention=convention,
        max_features=None if which == "full" else len(golden["active_A3"]) // 2,
        tolerance=0.0,
        rows_per_update=rows,
    )
    meta = GraphMeta(
        model=name,
        dictionary=name,
        prompt=str(golden["prompt"]),
        tokens=tuple(map(str, golden["token_T"])),
        target_tokens=tuple(map(str, golden["logit_token_K"])),
        n_layers=model.cfg.n_layers,
    )
    return attribute_recording(
        Prompt(model.params, recording, active, targets, cfg=model.cfg, config=config),
        meta,
    )


def golden_places(name: str, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Where our rows and columns are among circuit-tracer's nodes."""
    g, golden = graph(name, which), traced(name).golden
    selected = golden["active_A3"][golden[f"{which}_selected_A"]]
    place = {tuple(slot): i for i, slot in enumerate(selected)}
    ours = zip(g.layer_A, g.pos_A, g.feature_A, strict=True)
    feature = np.array([place[tuple(map(int, slot))] for slot in ours])
    assert len(feature) == len(selected)
    N = g.edge_RN.shape[1]
    fixed = np.arange(g.n_features, N)
    return np.r_[feature, N + np.arange(g.n_targets)], np.r_[feature, fixed]


both = pytest.mark.parametrize("which", ["full", "reduced"])
every = pytest.mark.parametrize("name", NAMES)


@every
def test_the_model_is_the_same(name: str) -> None:
    golden, model, recording, *_ = traced(name)
    logit_TV = np.asarray(unembed(model.params, recording.out_TD))
    scale = np.abs(golden["logit_TV"]).max()
    np.testing.assert_allclose(logit_TV, golden["logit_TV"], atol=TOL * scale)
    write_LTD = golden["write_LTD"]
    np.testing.assert_allclose(
        recording.write_LTD, write_LTD, atol=TOL * np.abs(write_LTD).max()
    )


@every
def test_active_features_are_the_same(name: str) -> None:
    golden, *_, active, _ = traced(name)
    later = active.pos_A > 0
    ours = np.stack([active.layer_A, active.pos_A, active.feature_A], 1)[later]
    np.testing.assert_array_equal(ours, golden["active_A3"])
    want = golden["value_A"]
    np.testing.assert_allclose(
        active.value_A[later], want, rtol=0, atol=TOL * want.max()
    )
    assert not later.all()  # it drops the first position, we do not


@every
def test_targets_are_the_same(name: str) -> None:
    golden, *_, targets = traced(name)
    np.testing.assert_array_equal(targets.token_K, golden["logit_token_K"])
    np.testing.assert_allclose(targets.weight_K, golden["logit_prob_K"], rtol=TOL)


@every
@both
def test_edges_are_the_same(name: str, which: str) -> None:
    """All of the adjacency; what circuit-tracer has elsewhere is zero."""
    rows, columns = golden_places(name, which)
    golden_NN = traced(name).golden[f"{which}_edge_NN"]
    want = golden_NN[np.ix_(rows, columns)]
    np.testing.assert_allclose(
        graph(name, which).edge_RN, want, rtol=0, atol=TOL * np.abs(want).max()
    )
    assert np.count_nonzero(golden_NN) == np.count_nonzero(want)


@every
@both
def test_influence_is_the_same(name: str, which: str) -> None:
    _, columns = golden_places(name, which)
    want = traced(name).golden[f"{which}_influence_N"][columns]
    np.testing.assert_allclose(
        graph(name, which).influence_N, want, rtol=0, atol=TOL * want.max()
    )


@every
@both
def test_pruning_is_the_same(name: str, which: str) -> None:
    """Node for node and edge for edge: no flips at these goldens."""
    golden = traced(name).golden
    rows, columns = golden_places(name, which)
    pruning = graph(name, which).pruning
    nodes = golden[f"{which}_node_mask_N"]
    np.testing.assert_array_equal(pruning.keep_N, nodes[columns])
    edges = golden[f"{which}_edge_mask_NN"][np.ix_(rows, columns)]
    np.testing.assert_array_equal(pruning.keep_edge_RN, edges)
    assert 0 < nodes[columns].sum() < len(columns)
    assert edges.sum() == golden[f"{which}_edge_mask_NN"].sum()


@every
@both
def test_scores_are_the_same(name: str, which: str) -> None:
    """Its completeness counts nodes without inputs as explained: `completeness_ct`."""
    golden, got = traced(name).golden, scores(graph(name, which))
    assert got.replacement == pytest.approx(golden[f"{which}_replacement"], abs=TOL)
    want = golden[f"{which}_completeness"]
    assert got.completeness_ct == pytest.approx(want, abs=TOL)
    assert got.completeness < want - 0.01


@every
def test_our_rows_sum_in_float32_and_its_rows_do_not(name: str) -> None:
    """Maths 6.3 on a model from files; 21.3 and 21.5, what its rows leave out."""
    ours = graph(name, "full", "paper")
    rounding = 16 * float(np.finfo(np.float32).eps)  # of sums over all layers
    assert certificate(ours).max_relative_row_error < rounding
    assert certificate(graph(name, "reduced")).max_relative_row_error < rounding
    rows, _ = golden_places(name, "full")
    its_sum_R = traced(name).golden["full_edge_NN"][rows].sum(1)
    readout_R = graph(name, "full").readout_R
    missing = np.abs(its_sum_R - readout_R) / np.abs(readout_R)
    assert np.median(missing) > 0.05
