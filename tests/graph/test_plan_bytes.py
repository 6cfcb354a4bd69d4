"""Plans against the arrays that are made: as much at least, and not much more.

Skewed actives, as real prompts have them: the first position has several times as many
as the others, layers differ, and the recording is padded.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxclt.clt.active import Active
from jaxclt.graph.bank import RowTargets, _joined, readers, writers
from jaxclt.graph.compute import writers_sizes
from jaxclt.graph.footprint import (
    Sizes,
    entry_bytes,
    on_device,
    table_bytes,
    tile_bytes,
)
from jaxclt.graph.memory import memory_plan
from jaxclt.graph.packing import bank_sizes, counts, pack
from jaxclt.graph.plan import make_plan
from jaxclt.graph.prompt import Recorded
from jaxclt.graph.rows import _pull_chunk, make_puller, padded_reads
from jaxclt.io.config_hf import is_tied
from jaxclt.testing import Tiny, tiny
from jaxclt.trace.assume import Assumed, _bank

T, N_TOKENS = 24, 20  # with padding, without


def skewed(span: int) -> tuple[Tiny, Active]:
    t = tiny(span, n_tokens=T, n_features=1500, span=span, activation="relu")
    active = t.active
    draw = np.asarray(jax.random.uniform(jax.random.key(0), active.layer_A.shape))
    share_L = np.linspace(0.05, 0.3, t.cfg.n_layers)
    keep_A = draw < np.where(active.pos_A == 0, 0.9, share_L[active.layer_A])
    return t, active.where(keep_A & (active.pos_A < N_TOKENS))


def row_targets(active: Active) -> RowTargets:
    return RowTargets(
        layer_R=active.layer_A, pos_R=active.pos_A, read_RD=active.reads()
    )


def held(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def close_to(planned: int, real: int) -> bool:
    return real <= planned <= 1.15 * real


@pytest.mark.parametrize("span", [1, 2, 3])
def test_a_bank_is_as_large_as_was_planned(span: int):
    t, active = skewed(span)
    D, items = t.cfg.d_model, writers(active)
    sizes = writers_sizes(active, T)
    bank = pack(items, T)
    assert (sizes.n_shared, sizes.n_positions, sizes.width) == bank.shared.row.shape
    assert (sizes.n_overflow, sizes.width) == bank.overflow.row.shape
    assert sizes.n_blocks == bank.n_blocks
    packed, gathered = (bank.on_device(packed=x) for x in (True, False))
    assert tile_bytes(sizes, D, 4) == held((packed.shared, packed.overflow))
    entries = held((gathered.shared.entries, gathered.overflow.entries))
    assert entry_bytes(sizes, 4) == entries
    assert gathered.shared.table_UD is not None
    assert table_bytes(sizes, D, 4) == gathered.shared.table_UD.nbytes
    assert table_bytes(sizes, D, 4) == _joined(items.tables).nbytes
    # The vectors alone are far less, which is what plans once were of.
    alone = sum(items.n_sites[layer] for layer in active.layer_A.tolist())
    assert sizes.n_vectors > 1.2 * alone


def test_a_bank_of_targets_is_as_large_as_was_planned():
    t, active = skewed(3)
    L = t.cfg.n_layers
    rows = row_targets(active)
    bank = pack(readers(rows, L), T)
    count_MT = counts(active.layer_A, active.pos_A, L + 1, T)
    sizes = bank_sizes(count_MT, (1,) * (L + 1), len(active.layer_A))
    made = bank.on_device(packed=True)
    assert tile_bytes(sizes, t.cfg.d_model, 4) == held((made.shared, made.overflow))
    assert sizes.n_blocks == made.n_blocks


@pytest.mark.parametrize(("span", "packed"), [(1, True), (3, True), (3, False)])
def test_what_a_chunk_takes_is_what_was_planned(span: int, packed: bool):
    """By XLA's own account: what it is given, needs and leaves, twice in flight."""
    t, active = skewed(span)
    p = Recorded(t.params, t.recording, active, cfg=t.cfg, n_tokens=N_TOKENS)
    sizes = Sizes(
        cfg=t.cfg,
        n_tokens=T,
        n_active=len(active.layer_A),
        n_rows=600,
        n_targets=10,
        bank=writers_sizes(active, T),
    )
    plan = on_device(sizes, True, packed, 128)
    chunks = make_plan(600, n_positions=T, flops_per_position=1.0)
    puller = make_puller(p, plan=chunks, mesh=None, packed=packed)
    rows = row_targets(active)
    chunk = puller.chunks(rows)[0]
    assert chunk.capacity == 128
    reads = padded_reads(rows, chunk)
    made = _pull_chunk.lower(puller.held, reads, None, P=T, mesh=None).compile()
    found = made.memory_analysis()
    real = 2 * found.output_size_in_bytes + found.temp_size_in_bytes
    assert close_to(plan["chunk"], real)
    sources = plan["sources"] + (0 if packed else plan["dictionary rows"])
    way = plan["attention maps"] + plan["patterns"] // 2
    assert way == held(puller.held.way)
    # Gathered, shared and overflow tiles have one table, which XLA counts twice.
    given = found.argument_size_in_bytes - (0 if packed else plan["dictionary rows"])
    assert close_to(sources + way + plan["recording"] + held(reads), given)


def test_a_plan_covers_each_stage():
    """Rows are joined, written out, multiplied: no stage takes more than is planned."""
    t, active = skewed(3)
    bank = writers_sizes(active, T)
    sizes = Sizes(
        cfg=t.cfg,
        n_tokens=T,
        n_active=len(active.layer_A),
        n_rows=1,
        n_targets=1,
        bank=bank,
        row_bytes=sum(x.nbytes for x in (*active.encoder, *active.decoder)),
    )
    D, small = t.cfg.d_model, 16  # rows of a chunk
    table, tiles = table_bytes(bank, D, 4), tile_bytes(bank, D, 4)
    one = memory_plan(sizes, 1 << 40, chunk_size=small)
    assert one.packed
    b = one.bytes
    joining = b["dictionary rows as read"] + 2 * table
    rows = sum(b.values()) - b["packing"]
    writing = b["dictionary rows as read"] + table + entry_bytes(bank, 4) + tiles
    stages = joining, writing, rows
    assert max(stages) <= one.total <= 1.15 * max(stages) + b["active features"]
    apart = memory_plan(sizes, 1 << 40, chunk_size=small, host_budget=1 << 40)
    assert apart.total >= table + entry_bytes(bank, 4) + tiles
    read = apart.host_bytes["dictionary rows as read"]
    assert apart.host_total >= read + max(table, apart.host_bytes["edges"])


def test_assumed_prompts_are_planned_by_the_same_banks():
    """As many features everywhere; tokens are padded as recordings are."""
    cfg, tokens, active = tiny(0).cfg, 17, 100
    L = cfg.n_layers
    bank, row_bytes = _bank(cfg, Assumed(tokens=tokens, active=active), T)
    count_MT = np.where(np.arange(T) < tokens, active, 0)[None].repeat(L, 0)
    spans = tuple(range(L, 0, -1))
    assert bank == bank_sizes(count_MT, spans, tokens * active * sum(spans))
    assert row_bytes == tokens * active * (L + sum(spans)) * cfg.d_model * 4
    llama = {"model_type": "llama"}
    assert not is_tied(llama)
    assert is_tied(llama | {"tie_word_embeddings": True})
    assert is_tied({"model_type": "gemma2"})
