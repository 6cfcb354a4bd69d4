"""Total effects of a large graph: against an inverse and ablations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import case, case_graph, case_local, case_lrm, close, random_graph

from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.graph import Graph
from jaxclt.replacement.local import run_local

pytestmark = pytest.mark.usefixtures("x64")


def by_inverse(graph: Graph) -> np.ndarray:
    A = graph.n_features
    unit = graph.edge_RN[:, :A] / graph.value_A
    return unit[A:] @ np.linalg.inv(np.eye(A) - unit[:A]) * graph.value_A


@pytest.mark.parametrize("block", [4, 512])
def test_blocks_equal_an_inverse(block: int) -> None:
    graph = random_graph(3, counts=(4, 6, 3, 5), zero_rows=0.1)
    close(solve_total_effect(graph, block=block), by_inverse(graph), 1e-12)


def test_many_blocks_equal_an_inverse() -> None:
    graph = case_graph("clt")
    assert graph.n_features > 128
    close(solve_total_effect(graph, block=64), by_inverse(graph), 1e-12)


def test_silent_features_and_single_precision() -> None:
    graph = case_graph("clt")
    value_A, edge_RN = graph.value_A.copy(), graph.edge_RN.copy()
    value_A[5], edge_RN[:, 5] = 0, 0
    changed = {**vars(graph), "value_A": value_A, "edge_RN": edge_RN}
    fields = {name: changed[name] for name in Graph.__dataclass_fields__}
    exact = solve_total_effect(Graph(**fields))
    assert np.isfinite(exact).all()
    assert (exact[:, 5] == 0).all()
    fields |= {name: fields[name].astype(np.float32) for name in ("value_A", "edge_RN")}
    single = solve_total_effect(Graph(**fields))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, exact, atol=1e-4 * np.abs(exact).max())


def test_it_predicts_ablations_of_any_size_while_gates_hold() -> None:
    """One feature removed, or doubled and reversed; all others follow, gates clean."""
    t, graph, lrm = case("clt"), case_graph("clt"), case_lrm("clt")
    clean = case_local("clt").a_LTF
    gate_LTF = np.asarray(clean != 0)
    chosen = np.arange(0, graph.n_features, 7)
    place = (graph.layer_A[chosen], graph.pos_A[chosen], graph.feature_A[chosen])

    @jax.jit
    @jax.vmap
    def targets(factor_LTF: jax.Array) -> jax.Array:
        a = clean
        for _ in range(t.cfg.n_layers):
            pre = run_local(lrm, a_LTF=a).pre_LTF
            a = jnp.where(gate_LTF, pre * factor_LTF, 0)
        return t.targets.vec_KD @ run_local(lrm, a_LTF=a).out_TD[-1]

    effect_KA = solve_total_effect(graph)[:, chosen]
    base_K = graph.readout_R[graph.target_rows]
    for factor in (0.0, -2.0):
        factor_XLTF = np.ones((len(chosen), *clean.shape))
        factor_XLTF[(np.arange(len(chosen)), *place)] = factor
        change_KX = np.asarray(targets(factor_XLTF)).T - base_K[:, None]
        close(change_KX / (factor - 1), effect_KA, 1e-11)
