"""What changes go through: parts of total effects, and queries and keys by head."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import close
from test_response_edges import EVERYTHING, arrives, asked, asks, changes, rows_of_run

from jaxclt.attending.routes import head_routes
from jaxclt.clt.coder import Dictionary
from jaxclt.graph.answers import answering_rows, summed
from jaxclt.graph.contrast import contrast
from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.graph import Graph
from jaxclt.graph.part_shares import part_shares
from jaxclt.graph.prompt import Prompt
from jaxclt.graph.response import by_response
from jaxclt.graph.response_table import PARTS, Response
from jaxclt.graph.targets import functional_targets
from jaxclt.types import Added, Held

pytestmark = pytest.mark.usefixtures("x64")

# A norm before, within and after attention, gates, shared keys; the rest is slow.
EVERY = [
    ("gemma3", True),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("skip", False), ("neox", False), ("clt", False), ("gemma2", True))
    ),
]
WHOLE = dataclasses.replace(EVERYTHING, node_threshold=1.0)


@functools.cache
def graph(name: str, neurons: bool) -> Graph:
    """With all edges listed."""
    a = asked(name, neurons)
    return a.t.graph(WHOLE, active=a.active, dictionary=a.dictionary)


def dense_parts(g: Graph) -> np.ndarray:
    """All edges by their parts, the value first, [Q, R, N]."""
    assert g.response is not None
    listed = g.response.parts
    part_QRN = np.zeros((1 + len(PARTS), *g.edge_RN.shape))
    part_QRN[0] = g.edge_RN
    for q, part in enumerate(PARTS):
        part_QRN[1 + q, listed.row_E, listed.col_E] = getattr(listed, f"{part}_E")
    return part_QRN


def units(g: Graph) -> np.ndarray:
    """What a unit of every row does to the contrast by response, [R]."""
    A, weight_K = g.n_features, contrast(g).weight_K
    assert g.response is not None
    unit_RA = g.response.edge_RN[:, :A] / g.value_A
    unit_A = weight_K @ unit_RA[A:] @ np.linalg.inv(np.eye(A) - unit_RA[:A])
    return np.concatenate([unit_A, weight_K])


def response_of(g: Graph) -> Response:
    assert g.response is not None
    return g.response


@pytest.mark.parametrize(("name", "neurons"), EVERY)
def test_parts_of_total_effects_are_sums_of_parts_of_edges(
    name: str, neurons: bool
) -> None:
    """Maths 22.81: and they sum to the total effects by response, of all nodes."""
    g = graph(name, neurons)
    effect_QN, unit_R = response_of(g).effect_QN, units(g)
    close(effect_QN.sum(0), unit_R @ response_of(g).edge_RN, 1e-11)
    total_KA = solve_total_effect(by_response(g))
    want_A = contrast(g).weight_K @ total_KA
    close(effect_QN.sum(0)[: g.n_features], want_A, 1e-11)
    for got_N, part_RN in zip(effect_QN, dense_parts(g), strict=True):
        close(got_N, unit_R @ part_RN, 1e-11)


def test_a_target_that_reads_a_write_itself_has_parts() -> None:
    """Of the layer it reads at, and of all below."""
    a = asked("gemma3", True)
    rec = a.t.recording
    targets = functional_targets(
        a.t.params, rec, "mlp_out:2", 4, a.vec_SD[0], cfg=a.t.cfg
    )
    t = dataclasses.replace(a.t, targets=targets)
    g = t.graph(WHOLE, active=a.active, dictionary=a.dictionary)
    effect_QN = response_of(g).effect_QN
    for got_N, part_RN in zip(effect_QN, dense_parts(g), strict=True):
        close(got_N, units(g) @ part_RN, 1e-11)
    here_N = (g.layer_A == 2) & (g.pos_A == 4)
    assert effect_QN[0, : g.n_features][here_N].any()


def test_shares_of_parts() -> None:
    """Maths 22.83."""
    g = graph("gemma3", True)
    found, unit_R = part_shares(g), units(g)
    assert found is not None
    assert found["contrast"] == contrast(g).text
    part_QRN = unit_R[:, None] * dense_parts(g)
    keep_RN = np.zeros(g.edge_RN.shape, bool)
    keep_RN[response_of(g).parts.row_E, response_of(g).parts.col_E] = True
    wanted = {"edges": part_QRN[:, keep_RN], "effects": response_of(g).effect_QN}
    for what, part_QX in wanted.items():
        size_Q = np.abs(part_QX).sum(1)
        left = np.abs(part_QX.sum(0)).sum()
        want = [*size_Q, left] / size_Q.sum()
        assert list(found[what]) == ["value", *PARTS, "left"]
        close(list(found[what].values()), want, 1e-5)
    assert part_shares(dataclasses.replace(g, response=None)) is None


def strong_edges(g: Graph) -> list[tuple[int, int]]:
    """Row and column of edges that change queries as well as keys."""
    listed = response_of(g).parts
    both_E = np.abs(listed.query_E) * np.abs(listed.key_E)
    to_target = listed.row_E == g.n_features
    order = np.argsort(-both_E)[:2].tolist()
    order.append(int(np.argmax(both_E * to_target)))
    return [(int(listed.row_E[e]), int(listed.col_E[e])) for e in order]


def routes(
    name: str, dictionary: Dictionary, row: int, col: int, *, neurons: bool
) -> tuple[np.ndarray, np.ndarray]:
    a = asked(name, neurons)
    p = Prompt(a.t.params, a.t.recording, a.active, a.t.targets, cfg=a.t.cfg)
    past_norm = dictionary.coder(a.t.cfg).site != "resid_mid"
    read = summed(answering_rows(p, dictionary)).take(np.array([row]))
    return head_routes(p, read, col, past_norm=past_norm)


@pytest.mark.parametrize(("name", "neurons"), EVERY)
def test_queries_and_keys_by_head_sum_to_their_parts(name: str, neurons: bool) -> None:
    """Maths 22.82."""
    a, g = asked(name, neurons), graph(name, neurons)
    part_QRN = dense_parts(g)
    for row, col in strong_edges(g):
        found = routes(name, a.dictionary, row, col, neurons=neurons)
        for q, part_LH in zip((1, 2), found, strict=True):
            size = np.abs(part_LH).max()
            assert part_LH.sum() == pytest.approx(
                part_QRN[q, row, col], abs=1e-12 * size
            )


def test_a_head_is_what_its_own_queries_and_keys_change() -> None:
    """Maths 22.82: each alone gets what the source brings, with all above live."""
    name, neurons = "gemma3", True
    a, g = asked(name, neurons), graph(name, neurons)
    row, col = strong_edges(g)[-1]
    got = routes(name, a.dictionary, row, col, neurons=neurons)
    clean_LTD = a.t.recording.resid_LTD
    L, H = got[0].shape

    @jax.jit
    def found(change_STD: jax.Array) -> jax.Array:
        resid_LTD, _ = arrives(a, change_STD)
        brought = jax.jvp(lambda x: asks(a, x), (clean_LTD,), (resid_LTD,))[1]
        query_LTHC, key_LTHC = brought
        none_STD = jnp.zeros_like(change_STD)

        def read(query_LTHC: jax.Array, key_LTHC: jax.Array) -> jax.Array:
            added = Added(query_LTHC=query_LTHC, key_LTHC=key_LTHC)
            return rows_of_run(a, none_STD, added, Held())[0][row]

        nothing = jax.tree.map(jnp.zeros_like, brought)
        slope_query, slope_key = jax.grad(read, argnums=(0, 1))(*nothing)
        pairs = (slope_query, query_LTHC), (slope_key, key_LTHC)
        return jnp.stack([(x * y).sum((1, 3)) for x, y in pairs])

    want = np.asarray(found(changes(name, neurons)[col]))
    assert want.shape == (2, L, H)
    close(np.stack(got), want, 1e-12)
