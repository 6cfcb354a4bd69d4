"""How edges travelled: every split sums to the edge, and equals gates switched off.

The oracle knows nothing of paths: `jax.vjp` of the frozen stream with heads' patterns
multiplied by gates.
"""

from __future__ import annotations

import dataclasses
import functools
from functools import partial

import jax
import numpy as np
import pytest
from cases import (
    case,
    case_active,
    case_recorded,
    close,
    graph_rows,
    layer_cut,
    recorded,
)

from jaxclt.graph import heads, provenance
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.bank import RowTargets
from jaxclt.graph.head_table import HeadLoads
from jaxclt.graph.heads import head_loadings
from jaxclt.lm.frozen import frozen_reads
from jaxclt.replacement.errors import error_nodes
from jaxclt.types import Reads, Sources

pytestmark = pytest.mark.usefixtures("x64")

# Full CLT, span 1, skip; all with grouped heads.
NAMES = ("clt", "plt", "skip")


@functools.cache
def errors(name: str) -> np.ndarray:
    return error_nodes(case_active(name), case(name).recording)


@functools.cache
def rows(name: str) -> RowTargets:
    return graph_rows(case_recorded(name), case(name).targets.vec_KD)


@functools.cache
def direct(name: str) -> np.ndarray:
    return provenance.direct_edges(case_recorded(name), rows(name)).toarray()


@functools.cache
def loads(name: str, per_edge: int = 16) -> HeadLoads:
    """Of all edges, zeros too."""
    edges = map(np.ravel, np.indices(direct(name).shape))
    return head_loadings(case_recorded(name), rows(name), *edges, per_edge=per_edge)


@functools.cache
def gated(name: str):
    """Edges of all rows as a function of the gates [L, H], compiled once."""
    t, active, target = case(name), case_active(name), rows(name)
    R = len(target.pos_R)
    sources = Sources(embed_TD=t.recording.embed_TD, write_LTD=t.recording.write_LTD)
    mid_RLTD = np.zeros((R, *t.recording.mid_LTD.shape))
    out_RTD = np.zeros((R, *t.recording.out_TD.shape))
    A = np.arange(len(active.pos_A))
    mid_RLTD[A, target.layer_R[A], target.pos_R[A]] = target.read_RD[A]
    out_RTD[len(A) :, -1] = t.targets.vec_KD

    @jax.jit
    def pull(gate_LH: jax.Array) -> Sources:
        frozen = t.recording.frozen
        pattern_LHTS = frozen.pattern_LHTS * gate_LH[:, :, None, None]
        gates = frozen.replace(pattern_LHTS=pattern_LHTS)
        f = partial(frozen_reads, t.params, gates, cfg=t.cfg, skip=active.skip)
        reads = Reads(mid_LTD=mid_RLTD, out_TD=out_RTD)
        return jax.vmap(jax.vjp(f, sources)[1])(reads)[0]

    def edges(gate_LH: np.ndarray) -> np.ndarray:
        with jax.enable_x64(True):
            back = jax.tree.map(np.asarray, pull(gate_LH))
        want_RN = np.zeros(direct(name).shape)
        for s in A:
            layer = active.layer_A[s]
            rows_MD = active.decoder[layer][active.row_A[s]]
            g_RMD = back.write_LTD[:, layer : layer + len(rows_MD), active.pos_A[s]]
            want_RN[:, s] = active.value_A[s] * (g_RMD * rows_MD).sum((1, 2))
        error = (back.write_LTD * errors(name)).sum(-1).reshape(R, -1)
        embed = (back.embed_TD * np.asarray(sources.embed_TD)).sum(-1)
        want_RN[:, len(A) :] = np.hstack([error, embed])
        return want_RN

    return edges


def gates(name: str, value: float = 1.0) -> np.ndarray:
    return np.full((case(name).cfg.n_layers, case(name).cfg.n_heads), value)


@functools.cache
def whole(name: str) -> np.ndarray:
    """The edges, as tests/graph/test_rows.py has them."""
    return gated(name)(gates(name))


@pytest.mark.parametrize("name", NAMES)
def test_direct_part_is_the_edge_with_all_gates_off(name: str) -> None:
    """Maths 7.2, 7.3: and nothing of it crosses positions."""
    close(direct(name), gated(name)(gates(name, 0.0)), 1e-13)
    target, (L, T, _) = rows(name), errors(name).shape
    pos_N = np.r_[case_active(name).pos_A, np.tile(np.arange(T), L), np.arange(T)]
    assert not direct(name)[target.pos_R[:, None] != pos_N].any()
    same = (target.pos_R[:, None] == pos_N) & (whole(name) != 0)
    assert (direct(name)[same] != 0).mean() > 0.99


@pytest.mark.parametrize("name", ["plt", "skip"])
def test_direct_part_is_the_virtual_weight_times_the_norm(name: str) -> None:
    """Maths 7.6: value x <decoder rows up to the target, encoder> x scale, no skip."""
    t = case(name)
    none = {"skip_LDD": None}
    active = dataclasses.replace(case_active(name), **none)
    scale_LT = np.asarray(t.recording.frozen.mlp_scale_LT)
    gain_LD = np.asarray(t.params.blocks.norm_mlp_LD)
    W_enc_LFD = np.asarray(t.clt.W_enc_LFD)
    A = len(active.pos_A)
    want = np.zeros((A, A))
    for r in range(A):
        lt, pos, f = active.layer_A[r], active.pos_A[r], active.feature_A[r]
        read_D = W_enc_LFD[lt, f] * (1.0 if name == "plt" else gain_LD[lt])
        for s in np.flatnonzero((active.layer_A < lt) & (active.pos_A == pos)):
            W_dec = np.asarray(t.clt.W_dec[active.layer_A[s]])[active.feature_A[s]]
            virtual = W_dec[: lt - active.layer_A[s]].sum(0) @ read_D
            want[r, s] = active.value_A[s] * virtual * scale_LT[lt, pos]
    assert np.count_nonzero(want) > 10
    p = dataclasses.replace(case_recorded(name), active=active)
    found = provenance.direct_edges(p, rows(name))
    close(found.toarray()[:A, :A], want, 1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_hops_sum_to_the_edge_and_are_its_polynomial(name: str) -> None:
    """Maths 7.3: A(z) = sum of A^(k) z^k at any z, A^(0) the direct part."""
    hop_QRN = provenance.hop_spectrum(case_recorded(name), rows(name), max_hops=4)
    close(hop_QRN.sum(0), whole(name), 1e-13)
    close(hop_QRN[0], direct(name), 1e-13)
    assert all(hop_RN.any() for hop_RN in hop_QRN)
    for z in (0.3, -2.0):
        power_Q = z ** np.arange(5.0)
        close(np.tensordot(power_Q, hop_QRN, 1), gated(name)(gates(name, z)), 1e-13)


def test_few_hops_keep_the_remainder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last entry holds all longer paths; chunks do not matter."""
    name = "clt"
    monkeypatch.setattr(provenance, "_AT_ONCE", 30)
    hop_QRN = provenance.hop_spectrum(case_recorded(name), rows(name), max_hops=1)
    close(hop_QRN[0], direct(name), 1e-13)
    close(hop_QRN[1], whole(name) - direct(name), 1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_direct_and_head_loads_sum_to_the_edge(name: str) -> None:
    """Maths 7.4, with all heads listed and with few."""
    edge_E = whole(name).ravel()
    close(loads(name).edge, edge_E, 1e-13)
    assert not loads(name).rest_E.any()
    few = loads(name, 3)
    close(few.edge, edge_E, 1e-13)
    np.testing.assert_array_equal(few.load_EJ, loads(name).load_EJ[:, :3])
    assert few.rest_E.any()
    assert (np.diff(np.abs(loads(name).load_EJ), axis=1) <= 0).all()


@pytest.mark.parametrize("name", ["clt", "skip"])
def test_head_loads_are_differences_of_gates(name: str) -> None:
    """Their definition: heads at and above l off, then one of layer l on again."""
    found = loads(name)
    load_ELH = np.zeros((len(found.row_E), *gates(name).shape))
    edge = np.arange(len(load_ELH))[:, None]
    load_ELH[edge, found.layer_EJ, found.head_EJ] = found.load_EJ
    for layer, head in np.ndindex(gates(name).shape):
        gate_LH = gates(name)
        gate_LH[layer:] = 0
        off_RN = gated(name)(gate_LH)
        gate_LH[layer, head] = 1
        want_RN = gated(name)(gate_LH) - off_RN
        close(load_ELH[:, layer, head].reshape(want_RN.shape), want_RN, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_a_cut(name: str) -> None:
    """Maths 7.5: bypass + through = edge; through a head is what its gate removes."""
    edge_RN = whole(name)
    for layer in range(case(name).cfg.n_layers):
        bypass_RN, through_HRN = layer_cut(case_recorded(name), rows(name), layer)
        close(bypass_RN + through_HRN.sum(0), edge_RN, 1e-13)
        gate_LH = gates(name)
        gate_LH[layer] = 0
        close(bypass_RN, gated(name)(gate_LH), 1e-13)
        gate_LH[layer, 1:] = 1
        close(through_HRN[0], edge_RN - gated(name)(gate_LH), 1e-12)


def test_kept_edges_of_a_smaller_graph_in_bands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows and columns of the selected features; several bands, chunks, few columns."""
    t = case("clt")
    monkeypatch.setattr(heads, "_FLOPS_WORTH_WINDOWS", 0)
    monkeypatch.setattr(heads, "_TOKENS", 24)
    monkeypatch.setattr(heads, "_EDGES", 7)
    graph = t.graph(
        AttributeConfig(max_features=30, tolerance=0.0, edge_threshold=0.7, n_bands=1)
    )
    active = provenance.graph_active(graph, t.active)
    np.testing.assert_array_equal(active.value_A, graph.value_A)
    p = dataclasses.replace(recorded(t, t.active), active=active)
    target = graph_rows(p, t.targets.vec_KD)
    row_E, col_E = np.nonzero(graph.pruning.keep_edge_RN)
    seen = []
    found = head_loadings(
        *(p, target, row_E, col_E),
        on_edges=lambda done, total: seen.append((done, total)),
    )
    close(found.edge, graph.edge_RN[row_E, col_E], 1e-12)
    assert seen[-1] == (len(row_E), len(row_E))
    assert len(seen) > 3
    back = head_loadings(p, target, row_E * 0, col_E)
    close(back.edge, graph.edge_RN[0, col_E], 1e-12)
    direct_RN = provenance.direct_edges(p, target).toarray()
    assert direct_RN.shape == graph.edge_RN.shape
    close(found.direct_E, direct_RN[row_E, col_E], 1e-13)


def test_a_cropped_recording_is_that_of_the_shorter_prompt() -> None:
    """Causality: what comes later changes nothing, so padding can be cut off."""
    t, name, n = case("skip"), "skip", 4
    recording, active = provenance.crop(t.recording, case_active(name), n)
    p = recorded(t, active, recording)
    close(p.error_LTD, errors(name)[:, :n])
    hop_QRN = provenance.hop_spectrum(p, graph_rows(p, t.targets.vec_KD))
    L, T, _ = errors(name).shape
    pos_A = case_active(name).pos_A
    pos_N = np.r_[pos_A, np.tile(np.arange(T), L), np.arange(T)]
    want_RN = whole(name)[: len(pos_A)][pos_A < n][:, pos_N < n]
    close(hop_QRN.sum(0)[: len(active.pos_A)], want_RN, 1e-13)


def test_no_edges_is_no_error() -> None:
    none = np.zeros(0, np.int64)
    found = head_loadings(case_recorded("clt"), rows("clt"), none, none)
    assert found.edge.shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skip", "gemma2", "neox"])
def test_patterns_that_are_not_kept_are_computed_again(name: str) -> None:
    """A long prompt is explained as a short one is: a layer's patterns at a time."""
    t = case(name)
    frozen = dataclasses.replace(
        t.recording.frozen, pattern_LHTS=None, clean_LTD=t.recording.resid_LTD
    )
    again = dataclasses.replace(t.recording, frozen=frozen)
    cropped, _ = provenance.crop(again, case_active(name), 4)
    assert cropped.frozen.clean_LTD is not None
    row = np.array([len(rows(name).pos_R) - 1])
    target = rows(name).take(row)
    index = np.zeros(30, np.int64), np.arange(30)
    want, found = (
        (
            provenance.hop_spectrum(p, target),
            head_loadings(p, target, *index),
        )
        for p in (case_recorded(name), recorded(t, case_active(name), again))
    )
    close(found[0], want[0], 1e-13)
    assert np.abs(want[0][1]).max() > 1e-3
    close(found[1].load_EJ, want[1].load_EJ, 1e-13)
