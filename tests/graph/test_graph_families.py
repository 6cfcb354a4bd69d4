"""Other families of models: the graph's identities hold with every switch."""

from __future__ import annotations

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    FAMILIES,
    FAMILY_CASES,
    case,
    case_active,
    case_graph,
    case_local,
    case_lrm,
    case_recorded,
    close,
    graph_rows,
    layer_cut,
)

from jaxclt.clt.active import active_features
from jaxclt.clt.coder import load
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.errors import InputError
from jaxclt.graph import provenance
from jaxclt.graph.attribute import AttributeConfig, attribute_recording
from jaxclt.graph.certificate import certificate
from jaxclt.graph.graph import Graph
from jaxclt.graph.prompt import Prompt
from jaxclt.lm.frozen import frozen_reads
from jaxclt.lm.run import readout, record, unembed
from jaxclt.replacement.errors import error_nodes
from jaxclt.replacement.local import run_local
from jaxclt.replacement.model import replacement_logits
from jaxclt.testing import tiny
from jaxclt.types import Reads, Sources

pytestmark = pytest.mark.usefixtures("x64")

NORMS_BEHIND = ["gemma2", "gemma3"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "olmo3")]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_local_replacement_model_equals_the_model(name: str) -> None:
    """Maths 4.3, 4.4: every stream, activation and logit."""
    t, local, active = case(name), case_local(name), case_active(name)
    rec = t.recording
    close(local.mid_LTD, rec.mid_LTD, 1e-13)
    close(unembed(t.params, local.out_TD), unembed(t.params, rec.out_TD), 1e-13)
    value = np.asarray(local.a_LTF)[active.layer_A, active.pos_A, active.feature_A]
    close(value, active.value_A, 1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_sum_to_preactivations_and_uncapped_logits(name: str) -> None:
    """Maths 6.3."""
    t, graph = case(name), case_graph(name)
    total_R = graph.edge_RN.sum(1) + graph.bias_R + graph.rest_R
    logit_V = np.asarray(readout(t.params, t.recording.out_TD))[-1]
    want = np.r_[
        case_active(name).preact_A, (logit_V - logit_V.mean())[graph.target_token_K]
    ]
    close(total_R, want, 1e-12)
    assert certificate(graph).max_relative_row_error < 5e-15


@pytest.mark.parametrize("name", FAMILIES)
def test_an_edge_predicts_a_change_of_any_size(name: str) -> None:
    """Maths 6.6: the strongest column of each kind times -7 moves rows by -8 edges."""
    t, graph, lrm = case(name), case_graph(name), case_lrm(name)
    run = jax.jit(partial(run_local, lrm))
    clean = [np.asarray(x) for x in (lrm.embed_TD, lrm.error_LTD)]
    clean.append(np.asarray(case_local(name).a_LTF))
    size_N = np.abs(graph.edge_RN).sum(0)
    for cols in (graph.feature_cols, graph.error_cols, graph.embed_cols):
        n = cols.start + int(size_N[cols].argmax())
        embed, error, a = (x.copy() for x in clean)
        if cols == graph.embed_cols:
            embed[n - cols.start] *= -7
        elif cols == graph.error_cols:
            error[divmod(n - cols.start, graph.n_tokens)] *= -7
        else:
            a[graph.layer_A[n], graph.pos_A[n], graph.feature_A[n]] *= -7
        local = run(embed_TD=embed, error_LTD=error, a_LTF=a)
        pre = np.asarray(local.pre_LTF)[graph.layer_A, graph.pos_A, graph.feature_A]
        target = np.asarray(local.out_TD)[-1] @ np.asarray(t.targets.vec_KD).T
        effect_R = (np.r_[pre, target] - graph.readout_R) / -8
        assert np.abs(effect_R).max() > 1e-2
        np.testing.assert_allclose(graph.edge_RN[:, n], effect_R, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_equal_jax_reverse_mode_of_the_frozen_stream(name: str) -> None:
    """Columns of errors and embeddings, all rows at once."""
    t, graph, active = case(name), case_graph(name), case_active(name)
    rec = t.recording
    sources = Sources(embed_TD=rec.embed_TD, write_LTD=rec.write_LTD)
    f = partial(frozen_reads, t.params, rec.frozen, cfg=t.cfg, skip=active.skip)
    R = len(graph.edge_RN)
    mid_RLTD = np.zeros((R, *rec.mid_LTD.shape))
    A = np.arange(graph.n_features)
    mid_RLTD[A, graph.layer_A, graph.pos_A] = active.reads()
    out_RTD = np.zeros((R, *rec.out_TD.shape))
    out_RTD[graph.target_rows, -1] = t.targets.vec_KD
    pull = jax.jit(lambda ct: jax.vmap(jax.vjp(f, sources)[1])(ct)[0])
    back = jax.tree.map(np.asarray, pull(Reads(mid_LTD=mid_RLTD, out_TD=out_RTD)))
    error = (back.write_LTD * error_nodes(active, rec)).sum(-1).reshape(R, -1)
    close(graph.edge_RN[:, graph.error_cols], error, 1e-13)
    embed = (back.embed_TD * np.asarray(sources.embed_TD)).sum(-1)
    close(graph.edge_RN[:, graph.embed_cols], embed, 1e-13)


@pytest.mark.parametrize("name", FAMILIES)
def test_pushing_equals_pulling(name: str) -> None:
    config = AttributeConfig(
        max_features=None, devices=1, tolerance=0.0, direction="push"
    )
    close(case(name).graph(config).edge_RN, case_graph(name).edge_RN, 1e-13)


@pytest.mark.parametrize("name", [*NORMS_BEHIND, "neox"])
def test_patterns_computed_again_give_the_same_graph(name: str) -> None:
    t = case(name)
    again = jax.jit(
        lambda params, token_T: record(params, token_T, cfg=t.cfg, keep_patterns=False)
    )(t.params, t.token_T)
    assert again.frozen.pattern_LHTS is None
    got = dataclasses.replace(t, recording=again).graph()
    close(got.edge_RN, case_graph(name).edge_RN, 1e-12)


@pytest.mark.parametrize("name", [*NORMS_BEHIND, "neox", *SLOW])
def test_parts_of_edges_sum_to_the_edges(name: str) -> None:
    """Maths 7.2 to 7.5: direct and by heads, by hops, and cut at a layer."""
    t = case(name)
    g = t.graph(AttributeConfig(max_features=None, heads=1 << 30))
    assert g.heads is not None
    assert g.edge_direct_RN is not None
    close(g.heads.edge, g.edge_RN[g.heads.row_E, g.heads.col_E], 1e-12)
    p = case_recorded(name)
    rows = graph_rows(p, t.targets.vec_KD)
    hop_QRN = provenance.hop_spectrum(p, rows, max_hops=2)
    close(hop_QRN.sum(0), g.edge_RN, 1e-12)
    bypass_RN, through_HRN = layer_cut(p, rows, 1)
    close(bypass_RN + through_HRN.sum(0), g.edge_RN, 1e-12)


@functools.cache
def neuron_graph(name: str, k: int | None) -> tuple[Graph, np.ndarray]:
    """Graph of a model's neurons, and their error nodes."""
    t = case(name)
    active = active_features(NeuronDictionary(k), t.params, t.recording, t.cfg)
    graph = t.graph(active=active)
    return graph, error_nodes(active, t.recording)


@pytest.mark.parametrize("name", [*NORMS_BEHIND, "neox", *SLOW])
def test_neurons_are_exact(name: str) -> None:
    """All of them leave no error; rows sum to up times the gate and any scale behind.

    Without a gate that is the activation, written ``(act(u) / u) u``.
    """
    t = case(name)
    size = np.abs(np.asarray(t.recording.write_LTD)).max()
    every = active_features(NeuronDictionary(), t.params, t.recording, t.cfg)
    assert np.abs(error_nodes(every, t.recording)).max() < 1e-13 * size
    graph, error_LTD = neuron_graph(name, 5)
    assert np.abs(error_LTD).max() > 1e-3 * size
    assert certificate(graph).max_relative_row_error < 1e-14
    close(graph.readout_R[: graph.n_features], graph.value_A, 1e-12)


@pytest.mark.parametrize("name", [*NORMS_BEHIND, "neox", *SLOW])
def test_neurons_with_their_errors_are_the_model(name: str) -> None:
    """Maths 3.4, and 3.2 with all neurons."""
    t, error_LTD = case(name), neuron_graph(name, 5)[1]

    @jax.jit
    def logits(params, loaded, token_T, **more):
        return replacement_logits(
            params, loaded, token_T, cfg=t.cfg, keep_first=False, **more
        )

    few = load(NeuronDictionary(5), t.params, t.cfg)
    every = load(NeuronDictionary(), t.params, t.cfg)
    want = unembed(t.params, t.recording.out_TD)
    close(logits(t.params, few, t.token_T, error_LTD=error_LTD), want, 1e-11)
    close(logits(t.params, every, t.token_T), want, 1e-12)
    assert np.abs(logits(t.params, few, t.token_T) - want).max() > 1e-3


# tests/lm/test_dense.py has models with the switches of the last two.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name in ("olmo3", "turned")
        else name
        for name in FAMILY_CASES
    ],
)
def test_the_certificate_is_small_in_float32(name: str) -> None:
    graph = tiny(dtype=jnp.float32, **FAMILY_CASES[name]).graph()
    assert graph.edge_RN.dtype == np.float32
    assert certificate(graph).max_relative_row_error < 1e-5


def test_half_precision_is_refused() -> None:
    """Rows would not sum to anything: a recording in bfloat16 has three digits."""
    t = case("gpt2")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), t.params)
    with pytest.raises(InputError, match="needs float32, the model is bfloat16"):
        attribute_recording(
            Prompt(half, t.recording, t.active, t.targets, cfg=t.cfg), t.meta
        )
