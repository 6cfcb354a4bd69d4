"""From which side the edges of a prompt are computed, and in how much memory.

Everything at once by pushing sources forward where that is cheaper and fits in memory
(`pushed`); else row by row (`pooled`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxclt.clt.active import Active
from jaxclt.errors import InputError
from jaxclt.graph.bank import writers
from jaxclt.graph.columns import push_flops
from jaxclt.graph.config import AttributeConfig
from jaxclt.graph.memory import (
    FLOAT32,
    MemoryPlan,
    Sizes,
    available_bytes,
    host_available_bytes,
    memory_plan,
)
from jaxclt.graph.packing import BankSizes, bank_sizes, counts, pack
from jaxclt.graph.plan import make_plan, mean_flops
from jaxclt.graph.pooled import pull_some
from jaxclt.graph.prompt import Computed, Prompt
from jaxclt.graph.pushed import push_all, push_side
from jaxclt.graph.rows import make_puller, pull_flops
from jaxclt.lm.config import LMConfig
from jaxclt.types import LMParams

__all__ = ["compute_edges", "memory_budget", "plan_attribution", "row_mesh"]


def plan_attribution(
    active: Active,
    n_targets: int,
    *,
    cfg: LMConfig,
    params: LMParams,
    config: AttributeConfig,
    n_tokens: int,
) -> MemoryPlan:
    """What a prompt's graph will hold in memory, known before any row is computed.

    Raises:
      InputError: if it does not fit, with the bytes needed and the flags that lower it.
    """
    A, cap = len(active.layer_A), config.max_features
    apart = jax.local_devices()[0].platform != "cpu"
    sizes = Sizes(
        cfg=cfg,
        n_tokens=n_tokens,
        n_active=A,
        n_rows=A if cap is None else min(A, cap),
        n_targets=n_targets,
        bank=writers_sizes(active, n_tokens),
        readers=None
        if config.direction == "pull"
        else _readers_sizes(active, n_targets, n_tokens),
        row_bytes=sum(rows.nbytes for rows in (*active.encoder, *active.decoder)),
        # A plan may be asked for a model in half precision, which no graph is made of.
        params_bytes=sum(
            (_share(leaf) if apart else leaf.size) * max(leaf.dtype.itemsize, FLOAT32)
            for leaf in jax.tree.leaves(params)
        ),
        response=config.response,
        attention=config.attention,
        itemsize=max(active.value_A.itemsize, FLOAT32),
    )
    budget = memory_budget(config)
    if config.memory_gb is None and not apart:
        budget += sizes.params_bytes  # what is free does not count what is loaded
    return memory_plan(
        sizes,
        budget,
        chunk_size=config.chunk_size,
        n_copies=1 if apart else row_mesh(config).size,
        host_budget=host_available_bytes() if apart else None,
    )


def writers_sizes(active: Active, n_tokens: int) -> BankSizes:
    """Of the bank of what features write, before it is packed."""
    spans = tuple(rows.shape[1] for rows in active.decoder)
    count_MT = counts(active.layer_A, active.pos_A, len(spans), n_tokens)
    n_rows = sum(rows.shape[0] * rows.shape[1] for rows in active.decoder)
    return bank_sizes(count_MT, spans, n_rows)


def _readers_sizes(active: Active, n_targets: int, n_tokens: int) -> BankSizes:
    """Of the bank of what features and targets at the last position read."""
    L = len(active.decoder)
    count_MT = counts(active.layer_A, active.pos_A, L + 1, n_tokens)
    count_MT[L, -1] += n_targets
    return bank_sizes(count_MT, (1,) * (L + 1), len(active.layer_A) + n_targets)


def _share(leaf: Array) -> int:
    """Numbers of an array that one of its devices holds."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def memory_budget(config: AttributeConfig) -> int:
    """Bytes that may be used, of one accelerator: as configured, else what is free."""
    if config.memory_gb is None:
        return available_bytes()
    return int(config.memory_gb * 1e9)


def row_mesh(config: AttributeConfig) -> Mesh:
    """The devices that share the rows.

    Raises:
      InputError: if the machine has fewer.
    """
    devices = jax.devices()
    # Several CPU devices share the same cores: splitting gains nothing.
    n_all = 1 if devices[0].platform == "cpu" else len(devices)
    n = n_all if config.devices is None else config.devices
    if not 1 <= n <= len(devices):
        raise InputError(f"--devices {n}: this machine has {len(devices)}")
    return Mesh(np.array(devices[:n]), ("rows",))


def compute_edges(p: Prompt, on_rows: Callable[[int, int], None]) -> Computed:
    """All rows that are wanted, from the cheaper side."""
    config, T, K = p.config, len(p.recording.token_T), p.n_targets
    kept = p.recording.frozen.pattern_LHTS is not None
    memory = plan_attribution(
        p.active, K, cfg=p.cfg, params=p.params, config=config, n_tokens=T
    )
    mesh = row_mesh(config)
    bank = pack(writers(p.active), T)
    plan = make_plan(
        p.n_selected + K,
        n_positions=T,
        flops_per_position=mean_flops(p.cfg, bank, T),
        n_bands=config.n_bands,
        chunk_size=memory.chunk_size,
        n_devices=mesh.size,
    )
    work: dict[str, Any] = {
        "chunk_size": plan.capacity,
        "bands": len(plan.band_end),
        "devices": mesh.size,
        "memory_gb": {k: round(v / 1e9, 3) for k, v in memory.bytes.items()},
        "patterns": "kept" if kept else "recomputed",
    }
    can_push = memory.packed and memory.full_matrix and kept and p.shortlist is None
    if config.direction == "push" and not can_push:
        raise InputError(
            "direction push computes every edge, which takes memory and leaves no room "
            "for a shortlist: use auto or pull"
        )
    if can_push and config.direction != "pull":
        push = push_side(p)
        cost = push_flops(push.columns, push.bank, plan)
        rows = pull_flops(p, bank, plan, push.rows)
        rows *= (p.n_selected + K) / len(push.rows.pos_R)
        if config.direction == "push" or cost <= rows:
            work |= {"direction": "push", "tflop": cost / 1e12}
            return push_all(p, push, plan, mesh, work, on_rows)
    puller = make_puller(p, plan=plan, mesh=mesh, bank=bank, packed=memory.packed)
    work |= {
        "direction": "pull",
        "sources": "packed" if memory.packed else "gathered",
        "pool": memory.pool,
    }
    return pull_some(p, puller, memory.pool, work, on_rows)
