"""What may not change a graph: the side it is computed from, devices, memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FEW, case, case_active, case_graph, close, recorded, same_rows
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxclt.clt.active import Active
from jaxclt.errors import InputError
from jaxclt.graph import compute, pooled, pushed, stream
from jaxclt.graph.attribute import AttributeConfig, Timing
from jaxclt.graph.bank import RowTargets, writers
from jaxclt.graph.certificate import certificate
from jaxclt.graph.graph import Graph
from jaxclt.graph.memory import MemoryPlan, Sizes, memory_plan, patterns_kept
from jaxclt.graph.packing import bank_sizes, pack
from jaxclt.graph.plan import make_plan
from jaxclt.graph.rows import edge_rows, make_puller, visits
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import record
from jaxclt.testing import Tiny

pytestmark = pytest.mark.usefixtures("x64")

ALL = AttributeConfig(max_features=None, devices=1, tolerance=0.0)


def same(got: Graph, want: Graph, tol: float = 1e-13) -> None:
    close(got.edge_RN, want.edge_RN, tol)
    close(got.bias_R, want.bias_R, tol)
    close(got.influence_N, want.influence_N, tol)


@pytest.mark.parametrize("name", FEW)
def test_pulling_targets_equals_pushing_sources(name: str) -> None:
    """Rows of the transpose, and columns of the map itself."""
    pull, push = (
        case(name).graph(dataclasses.replace(ALL, direction=d, n_bands=3))
        for d in ("pull", "push")
    )
    same(push, pull)
    for graph in (pull, push):
        assert certificate(graph).max_relative_row_error < 5e-15


@pytest.mark.parametrize("P", [1, 5, 12, 13])
def test_blocks_of_a_causal_pattern_are_the_pattern(
    P: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways, and the share of the products that is counted."""
    monkeypatch.setattr(stream, "_BLOCK", 4)
    key = jax.random.key(P)
    pattern_JTS = jnp.tril(jax.random.normal(key, (3, P, P)))
    v_SBC = jax.random.normal(key, (P, 2, 5))
    whole, back = jax.vjp(lambda v: jnp.einsum("JTS,SBC->TBJC", pattern_JTS, v), v_SBC)
    parts, back_parts = jax.vjp(lambda v: stream._moved(pattern_JTS, v), v_SBC)
    close(parts, whole, 1e-14)
    close(back_parts(whole)[0], back(whole)[0], 1e-14)
    assert stream.causal_share(P) == pytest.approx(
        {1: 1, 5: 1, 12: 2 / 3}.get(P, 0.66), abs=0.01
    )


@pytest.mark.parametrize("direction", ["pull", "push"])
@pytest.mark.parametrize("name", ["clt", "skip"])
def test_eight_devices_equal_one(name: str, direction: str) -> None:
    """Targets (or sources) split over a mesh; nothing is exchanged."""
    assert jax.device_count() == 8
    config = dataclasses.replace(ALL, direction=direction, devices=8, chunk_size=8)
    same(case(name).graph(config), case_graph(name))


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="this machine has 8"):
        case("clt").graph(dataclasses.replace(ALL, devices=9))


def test_either_side_is_chosen_by_cost() -> None:
    """A full graph is pushed, a few rows of many are pulled; both state the cost."""
    chosen = []
    for cap in (None, 8):
        timing = Timing()
        config = dataclasses.replace(ALL, max_features=cap)
        case("clt").graph(config, active=case_active("clt"), timing=timing)
        assert timing.work["tflop"] > 0
        chosen.append(timing.work["direction"])
    assert chosen == ["push", "pull"]


def test_the_circuit_tracer_convention_from_either_side() -> None:
    """What is no node there (first position) is in the rest of every row."""
    config = dataclasses.replace(ALL, convention="circuit-tracer")
    pull, push = (
        case("clt").graph(dataclasses.replace(config, direction=d))
        for d in ("pull", "push")
    )
    same(push, pull)
    close(push.rest_R, pull.rest_R, 1e-13)
    close(push.rest_abs_R, pull.rest_abs_R, 1e-13)
    assert push.rest_R.any()
    assert certificate(push).max_relative_row_error < 5e-15


def test_the_most_influential_features_from_either_side() -> None:
    """A cap below all: pushed rows are ranked by influence, the rest is summed."""
    full = case_graph("no_bias")
    n = full.n_features // 3
    config = dataclasses.replace(ALL, max_features=n, direction="push")
    got = case("no_bias").graph(config)
    best = np.sort(np.argsort(-full.influence_N[: full.n_features])[:n])
    assert list(zip(got.layer_A, got.pos_A, got.feature_A, strict=True)) == [
        (full.layer_A[i], full.pos_A[i], full.feature_A[i]) for i in best
    ]
    assert certificate(got).max_relative_row_error < 5e-15
    assert got.rest_abs_R.any()


# -- memory ----------------------------------------------------------------------------


def without_patterns(t: Tiny) -> Tiny:
    """The same prompt, its attention patterns computed again where they are used."""
    recorded = jax.jit(
        lambda params, token_T: record(params, token_T, cfg=t.cfg, keep_patterns=False)
    )(t.params, t.token_T)
    assert recorded.frozen.pattern_LHTS is None
    return dataclasses.replace(t, recording=recorded)


@pytest.mark.parametrize("name", ["clt", pytest.param("skip", marks=pytest.mark.slow)])
def test_patterns_computed_again_change_nothing(name: str) -> None:
    got = without_patterns(case(name)).graph(dataclasses.replace(ALL, n_bands=2))
    same(got, case_graph(name), 1e-12)
    assert certificate(got).max_relative_row_error < 1e-13


@pytest.mark.parametrize("name", ["clt", "plt", "span2"])
def test_gathered_sources_equal_packed_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = compute.plan_attribution

    def gathered(*args, **kwargs) -> MemoryPlan:
        return dataclasses.replace(plan(*args, **kwargs), packed=False)

    monkeypatch.setattr(compute, "plan_attribution", gathered)
    got = case(name).graph(dataclasses.replace(ALL, direction="pull"))
    same(got, case_graph(name))


@pytest.mark.parametrize("pool", [60])
def test_a_pool_keeps_rows_exact(pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns outside the pool are summed: edges, rests and the bound stay exact."""
    full, plan, n = case_graph("clt"), compute.plan_attribution, 40

    def small(*args, **kwargs) -> MemoryPlan:
        return dataclasses.replace(plan(*args, **kwargs), pool=pool, full_matrix=False)

    monkeypatch.setattr(compute, "plan_attribution", small)
    got = case("clt").graph(
        dataclasses.replace(ALL, max_features=n, rows_per_update=16)
    )
    assert got.n_features == n
    same_rows(got, full)


def least_memory(t: Tiny, active: Active, config: AttributeConfig) -> float:
    """GB below which a graph is refused."""
    low, high = 0, 1 << 30
    while high - low > 1:
        middle = (low + high) // 2
        try:
            compute.plan_attribution(
                active,
                len(t.targets.token_K),
                cfg=t.cfg,
                params=t.params,
                config=dataclasses.replace(config, memory_gb=middle / 1e9),
                n_tokens=len(t.token_T),
            )
            high = middle
        except InputError:
            low = middle
    return high / 1e9


@pytest.mark.parametrize(
    "name", ["neox", "gemma2", pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_the_least_memory_gives_the_same_rows(name: str) -> None:
    """Patterns computed again, sources gathered and a pool, all at once.

    With norms that take the mean off, attention beside the MLP, and norms behind both.
    """
    t, active, full = without_patterns(case(name)), case_active(name), case_graph(name)
    n = full.n_features // 4
    config = dataclasses.replace(ALL, max_features=n, rows_per_update=16)
    config = dataclasses.replace(config, memory_gb=least_memory(t, active, config))
    timing = Timing()
    got = t.graph(config, active=active, timing=timing)
    work = timing.work
    found = work["patterns"], work["sources"], work["pool"] < full.n_features
    assert found == ("recomputed", "gathered", True)
    assert got.n_features == n
    same_rows(got, full)


def test_visits_without_rows_are_the_rows_own() -> None:
    t, active, full = case("clt"), case_active("clt"), case_graph("clt")
    A, T = full.n_features, t.recording.mid_LTD.shape[1]
    puller = make_puller(
        recorded(t, active),
        plan=make_plan(A, n_positions=T, flops_per_position=1.0, n_bands=2),
        mesh=Mesh(np.array(jax.devices()[:2]), ("rows",)),
        bank=pack(writers(active), T),
    )
    everything = RowTargets(
        layer_R=active.layer_A, pos_R=active.pos_A, read_RD=active.reads()
    )
    visit_R = np.linspace(0.0, 1.0, A)
    got = visits(puller, everything, visit_R, np.ones((t.cfg.n_layers, T), bool))
    edge = np.abs(full.edge_RN[:A])
    total = edge.sum(1, keepdims=True)
    share = np.divide(edge, total, out=np.zeros_like(edge), where=total > 0)
    close(got, (visit_R @ share)[:A], 1e-13)
    out = np.zeros_like(full.edge_RN[:A])
    edge_rows(puller, everything, out)
    close(out, full.edge_RN[:A], 1e-13)


SMOL = LMConfig(
    n_layers=30,
    d_model=576,
    n_heads=9,
    n_kv_heads=3,
    d_head=64,
    d_mlp=1536,
    d_vocab=49152,
    n_ctx=8192,
)


def smol(n_tokens: int, n_rows: int) -> Sizes:
    return Sizes(
        cfg=SMOL,
        n_tokens=n_tokens,
        n_active=n_tokens * 30 * 32,
        n_rows=n_rows,
        n_targets=10,
        bank=bank_sizes(np.full((30, n_tokens), 32), (1,) * 30, 30 * 1536),
        row_bytes=2 * 30 * 1536 * 576 * 4,
        params_bytes=540_000_000,
    )


def test_the_plan_shrinks_until_it_fits() -> None:
    """Less memory: first gathered sources, then smaller chunks, then a refusal."""
    plans = [memory_plan(smol(2048, 2048), gb << 30) for gb in (96, 12, 8)]
    assert plans[0].packed
    assert plans[0].keep_patterns
    for plan, gb in zip(plans, (96, 12, 8), strict=True):
        assert plan.total <= gb << 30
        assert plan.pool >= 4 * 2048
    assert not plans[1].packed
    assert not plans[1].keep_patterns
    assert plans[2].chunk_size < plans[0].chunk_size
    with pytest.raises(InputError, match=r"needs .* GB .* --max-features"):
        memory_plan(smol(2048, 2048), 2 << 30)


@pytest.mark.parametrize("asked", [{"response": True}, {"attention": 20}])
def test_what_is_asked_besides_has_its_place_in_the_plan(asked: dict[str, int]) -> None:
    """And in a refusal its name."""
    plain = smol(2048, 2048)
    sizes, (name,) = dataclasses.replace(plain, **asked), asked
    every, more = (memory_plan(x, 96 << 30) for x in (plain, sizes))
    assert more.bytes[name] > 100e6
    assert more.total > every.total
    assert memory_plan(sizes, 14 << 30).total <= 14 << 30
    memory_plan(plain, 5 << 30)
    with pytest.raises(InputError, match=f"--{name}.* or raise --memory"):
        memory_plan(sizes, 5 << 30)


def test_a_plan_is_of_one_accelerator_or_of_all_copies() -> None:
    """Kernels' arrays are on every device; only those of a CPU share its memory."""
    one, two = (memory_plan(smol(64, 128), 96 << 30, n_copies=n) for n in (1, 2))
    apart = memory_plan(smol(64, 128), 96 << 30, host_budget=96 << 30)
    kernels = set(apart.bytes)
    assert {k: two.bytes[k] for k in kernels} == {k: 2 * one.bytes[k] for k in kernels}
    host = {k: v for k, v in two.bytes.items() if k not in kernels}
    # Rows on their way to a device of its own are the host's.
    assert host == {k: v for k, v in apart.host_bytes.items() if k != "rows joined"}
    mesh = Mesh(np.array(jax.devices()), ("x",))
    split = NamedSharding(mesh, PartitionSpec(None, "x"))
    assert compute._share(jax.device_put(jnp.zeros((3, 16)), split)) == 6


def test_memory_is_planned_before_any_row_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*args, **kwargs) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(pooled, "edge_rows", forbidden)
    monkeypatch.setattr(pushed, "edge_columns", forbidden)
    with pytest.raises(InputError, match="lower --max-features"):
        case("clt").graph(dataclasses.replace(ALL, memory_gb=1e-6))


def test_patterns_of_short_prompts_are_kept() -> None:
    assert patterns_kept(SMOL, 128, 8 << 30)
    assert not patterns_kept(SMOL, 2048, 8 << 30)
