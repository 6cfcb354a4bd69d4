"""What features write and read, against plain numpy, and the labels made of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cases import case, case_active, case_graph

from jaxclt.clt.active import active_features
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.naming.label import CLEAR, shown_features, with_said
from jaxclt.naming.words import label_of
from jaxclt.naming.writes import SAMPLE, features_spread, node_writes
from jaxclt.testing import Tiny
from jaxclt.types import LMParams

pytestmark = pytest.mark.usefixtures("x64")


def unembedded(params: LMParams, written_ND: np.ndarray) -> np.ndarray:
    """Demeaned logits of directions past the final norm's gain, by numpy."""
    gain_D = np.asarray(params.norm_out_D)
    if params.norm_out_bias_D is not None:  # a LayerNorm
        written_ND = written_ND - written_ND.mean(1, keepdims=True)
    x_ND = written_ND * gain_D
    x_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    tied = params.unembed_DV is None
    W_DV = np.asarray(params.embed_VD).T if tied else np.asarray(params.unembed_DV)
    logit_NV = x_ND @ W_DV
    return logit_NV - logit_NV.mean(1, keepdims=True)


def sampled(t: Tiny, dictionary: object) -> np.ndarray:
    """Summed decoders of the features that the spread is over."""
    F = dictionary.coder(t.cfg).shape.n_features  # pyright: ignore
    each = min(F, -(-SAMPLE // t.cfg.n_layers))
    some = np.unique(np.linspace(0, F - 1, each).astype(int))
    return np.concatenate(
        [
            np.asarray(dictionary.decoders(t.params, layer, some)).sum(1)  # pyright: ignore
            for layer in range(t.cfg.n_layers)
        ]
    )


@pytest.mark.parametrize(
    ("name", "neurons"), [("clt", False), ("gpt2", True), ("gemma2", True)]
)
def test_tokens_are_those_of_numpy(name: str, neurons: bool) -> None:
    """Maths 23.1: sums over writes, signs of activations, both ends, padding."""
    t = case(name)
    dictionary = NeuronDictionary() if neurons else t.dictionary
    active = active_features(dictionary, t.params, t.recording, t.cfg)
    spread = features_spread(dictionary, t.params, t.cfg)
    every_NV = unembedded(t.params, sampled(t, dictionary))
    np.testing.assert_allclose(spread.mean_V, every_NV.mean(0), atol=1e-10)
    np.testing.assert_allclose(spread.scale_V, every_NV.std(0), rtol=1e-8)
    node_N = np.arange(len(active.layer_A))[::3]
    found = node_writes(active, node_N, spread, t.params, k=3)
    written_ND = np.array(
        [
            np.sign(active.value_A[n])
            * active.decoder[active.layer_A[n]][active.row_A[n]].sum(0)
            for n in node_N
        ]
    )
    score_NV = unembedded(t.params, written_ND)
    z_NV = (score_NV - every_NV.mean(0)) / every_NV.std(0)
    for n, z_V in enumerate(z_NV):
        order = np.argsort(-z_V)
        np.testing.assert_allclose(found.raised_z_NK[n], z_V[order[:3]], rtol=1e-7)
        np.testing.assert_allclose(
            found.lowered_z_NK[n], -z_V[order[::-1][:3]], rtol=1e-7
        )
        assert found.raised_NK[n].tolist() == order[:3].tolist()
        first = np.r_[order[:3], order[-3:]]
        share = (score_NV[n, first] ** 2).sum() / (score_NV[n] ** 2).sum()
        assert found.share_N[n] == pytest.approx(share, rel=1e-9)
    if neurons:
        assert (active.value_A[node_N] < 0).any()


def test_a_planted_direction_says_its_token() -> None:
    """A decoder that is a token's row of the unembedding; below zero it lowers it."""
    t, active = case("clt"), case_active("clt")
    spread = features_spread(t.dictionary, t.params, t.cfg)
    row_D = (
        np.asarray(t.params.embed_VD)[7]
        if t.params.unembed_DV is None
        else (np.asarray(t.params.unembed_DV)[:, 7])
    )
    layer = int(active.layer_A[0])
    planted = active.decoder[layer].copy()
    planted[active.row_A[0]] = row_D / np.asarray(t.params.norm_out_D)
    decoder = tuple(
        planted if l == layer else table for l, table in enumerate(active.decoder)
    )
    for sign in (1.0, -1.0):
        value_A = active.value_A.copy()
        value_A[0] = sign
        made = dataclasses.replace(active, decoder=decoder, value_A=value_A)
        found = node_writes(made, np.array([0]), spread, t.params)
        first = found.raised_NK if sign > 0 else found.lowered_NK
        assert first[0, 0] == 7


def test_what_shown_nodes_rest_on() -> None:
    """Shares of the tokens' total effects, all paths counted by brute force."""
    t, active, graph = case("clt"), case_active("clt"), case_graph("clt")
    spread = features_spread(t.dictionary, t.params, t.cfg)
    said = with_said(
        graph, active, t.params, spread, lambda ids: [f"t{i}" for i in ids]
    )
    node_N = shown_features(graph)
    assert len(said) == len(node_N) > 10
    A = graph.n_features
    # An edge is its source's value times a weight.
    weight_AA = graph.edge_RN[:A, :A] / graph.value_A[None]
    unit_AT = np.linalg.solve(
        np.eye(A) - weight_AA, graph.edge_RN[:A, graph.embed_cols]
    )
    size_AT = np.abs(unit_AT)
    share_AT = size_AT / size_AT.sum(1, keepdims=True)
    for node in node_N.tolist():
        layer, pos, feature = graph.feature(node)
        reads = said[f"{layer}:{pos}:{feature}"]["reads"]
        order = np.argsort(-share_AT[node])
        want = [int(i) for i in order[:3] if share_AT[node, i] >= 0.1]
        assert [at for at, _, _ in reads] == want
        for at, _, share in reads:
            assert share == pytest.approx(share_AT[node, at], abs=6e-4)


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ({"raises": [[" Rome", 9.0], ["Rome", 8.0], [" Ulm", 7.0]]}, "says Rome, Ulm"),
        ({"lowers": [["city", 5.0]], "raises": []}, "lowers city"),
        ({"reads": [[1, " E", 0.5], [2, "iffel", 0.2]]}, 'reads " E", "iffel"'),
        ({"raises": [["\x1b[31m<b>", 9.0]]}, "says \\u001b[31m<b>"),
        ({"raises": [["a" * 40, 9.0]]}, f"says {'a' * 13}…"),
        ({"raises": [["  ", 9.0]], "reads": []}, ""),
    ],
)  # fmt: skip
def test_labels(said: dict[str, list], label: str) -> None:
    """Maths 23.2: no two words that read the same; nothing steers a terminal."""
    assert label_of({"raises": [], "lowers": [], "reads": []} | said) == label


def test_a_node_says_only_what_is_clear() -> None:
    t, active, graph = case("clt"), case_active("clt"), case_graph("clt")
    spread = features_spread(t.dictionary, t.params, t.cfg)
    wide = spread._replace(scale_V=spread.scale_V * 1e6)
    said = with_said(graph, active, t.params, wide, lambda ids: [str(i) for i in ids])
    assert not any(one["raises"] or one["lowers"] for one in said.values())
    narrow = spread._replace(scale_V=spread.scale_V / 1e6)
    said = with_said(graph, active, t.params, narrow, lambda ids: [str(i) for i in ids])
    assert all(z >= CLEAR for one in said.values() for _, z in one["raises"])
    assert all(one["label"].startswith("says") for one in said.values())
