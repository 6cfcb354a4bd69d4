"""How much memory a graph takes, and what to do when there is less.

Three things grow with the prompt: attention patterns with its square, the source
vectors with the active features, the edge matrix with rows times columns. Each has a
smaller form: patterns computed again in each layer, sources gathered from the
dictionary's rows as they are used, edges kept for a pool of the most influential
features only (the others are summed into `rest`). A plan takes them in that order, and
smaller chunks last, until it fits; if nothing fits it says so before any work is done.

The counts are of arrays held at the same time at the worst moment, from shapes alone.
An accelerator has memory of its own: the dictionary's rows as they were read, and the
edges, stay on the host. Several accelerators have a copy each of all but their rows, so
that a plan is of one of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax

from jaxclt.errors import InputError
from jaxclt.graph.footprint import (
    FLOAT32,
    MATRIX,
    Sizes,
    answering_bytes,
    attending_bytes,
    matrix_bytes,
    n_columns,
    on_device,
    on_host,
    packing,
    pattern_bytes,
    score_bytes,
)
from jaxclt.lm.config import LMConfig

__all__ = [
    "FLOAT32",
    "MemoryPlan",
    "Sizes",
    "available_bytes",
    "host_available_bytes",
    "memory_plan",
    "patterns_kept",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The chosen forms, and the bytes they take."""

    keep_patterns: bool
    packed: bool  # source vectors written out
    pool: int  # features whose columns are kept while rows are computed
    chunk_size: int
    response_chunk: int  # of rows by response; 0: there are none
    full_matrix: bool  # rows of all active features would fit
    bytes: dict[str, int]  # by what they are for
    host_bytes: dict[str, int]  # beside an accelerator's memory; empty on a CPU

    @property
    def total(self) -> int:
        """Bytes in all, of the accelerator if there is one."""
        return sum(self.bytes.values())

    @property
    def host_total(self) -> int:
        """Bytes of the host beside an accelerator."""
        return sum(self.host_bytes.values())


def patterns_kept(
    cfg: LMConfig, n_tokens: int, budget: int, itemsize: int = FLOAT32
) -> bool:
    """Whether the attention patterns of a prompt may be held: up to 1/16 of memory.

    They are held twice for a moment, when the norm's scale is folded in.
    """
    return pattern_bytes(cfg, n_tokens, itemsize) <= budget // 16


_CHUNKS = (128, 64, 32, 16)


def memory_plan(
    sizes: Sizes,
    budget: int,
    *,
    chunk_size: int = 128,
    n_copies: int = 1,
    host_budget: int | None = None,
) -> MemoryPlan:
    """The fastest plan that fits.

    Args:
      sizes: of the prompt.
      budget: bytes that may be used, of one accelerator if `host_budget` is given.
      chunk_size: most rows pulled back together on one device.
      n_copies: devices that share this memory, each with a copy of what kernels need.
      host_budget: bytes of the host that may be used; None: the same memory.

    Raises:
      InputError: if even the smallest plan does not fit, with what it needs.
    """
    keep = patterns_kept(sizes.cfg, sizes.n_tokens, budget, sizes.itemsize)
    chunks = (chunk_size, *(c for c in _CHUNKS if c < chunk_size))

    def planned(chunk: int, packed: bool) -> MemoryPlan:
        one = on_device(sizes, keep, packed, chunk)
        device = {part: size * n_copies for part, size in one.items()}
        host = on_host(sizes)
        smallest = n_copies * answering_bytes(sizes, chunks[-1])
        if sizes.response:
            device["response"] = smallest
            host["edges by response"] = matrix_bytes(sizes, sizes.n_rows, sizes.n_rows)
        if sizes.attention:
            # Rows are done by then: their chunk's room is free again.
            device["attention"] = max(
                0, attending_bytes(sizes, chunk) - device["chunk"]
            )
            host["scores taken apart"] = score_bytes(sizes)
        room = budget - sum(device.values()) if host_budget is None else host_budget
        room -= sum(host.values())
        pool = _pool(sizes, room)
        edges = matrix_bytes(sizes, sizes.n_rows, pool)
        host |= {"edges": edges}
        joined, written = packing(sizes, packed)
        written *= n_copies
        # Rows are packed before chunks and edges are made: those have their room.
        if host_budget is None:
            # Joined and copied first, then written out as the sources.
            copied = joined + written - packed * device["sources"]
            before = max(copied, written) - device["chunk"] - edges
            device["packing"] = max(0, before)
        else:
            device["packing"] = max(0, written - device["chunk"])
            host["rows joined"] = max(0, joined - edges)
        answering = 0
        if sizes.response:
            # Rows by value are done by then: their chunk's room is free again.
            free = budget - sum(device.values()) + device["chunk"] + smallest
            free -= sum(host.values()) if host_budget is None else 0
            every = {c: n_copies * answering_bytes(sizes, c) for c in chunks}
            answering = max((c for c in chunks if every[c] <= free), default=chunks[-1])
            device["response"] = max(smallest, every[answering] - device["chunk"])
        return MemoryPlan(
            keep_patterns=keep,
            packed=packed,
            pool=pool,
            chunk_size=chunk,
            response_chunk=answering,
            full_matrix=matrix_bytes(sizes, sizes.n_active, sizes.n_active) <= room,
            bytes=device | (host if host_budget is None else {}),
            host_bytes={} if host_budget is None else host,
        )

    def fits(plan: MemoryPlan) -> bool:
        on_host = host_budget is None or plan.host_total <= host_budget
        return plan.total <= budget and on_host

    for chunk, packed in itertools.product(chunks, (True, False)):
        plan = planned(chunk, packed)
        # A pool cut below four times the rows picks them with too little choice.
        enough = plan.pool >= min(sizes.n_active, 4 * sizes.n_rows)
        if fits(plan) and enough:
            return plan
    smallest = planned(chunks[-1], packed=False)
    if fits(smallest):
        return smallest
    raise _too_large(sizes, smallest, budget, host_budget)


def _too_large(
    sizes: Sizes, plan: MemoryPlan, budget: int, host_budget: int | None
) -> InputError:
    """What the smallest plan needs, and the flags that lower it."""
    lower = f"lower --max-features (now {sizes.n_rows:,})"
    lower += ", leave out --response" * sizes.response
    lower += ", give --attention 0" * (sizes.attention > 0)
    where, needed, given = "", plan.total, budget
    if host_budget is not None and plan.host_total > host_budget:
        where, needed, given = " of the host", plan.host_total, host_budget
    return InputError(
        f"this graph needs {_gb(needed)} of memory{where} and "
        f"{_gb(given)} may be used: {lower}, shorten the prompt "
        f"({sizes.n_tokens:,} tokens), or raise --memory"
    )


def _gb(n_bytes: int) -> str:
    gb = n_bytes / 1e9
    return f"{gb:,.1f} GB" if gb >= 0.1 else f"{gb:.1g} GB"


def _pool(sizes: Sizes, room: int) -> int:
    """Columns that fit beside errors and embeddings, at least one per row."""
    per_column = (sizes.n_rows + sizes.n_targets) * sizes.itemsize * MATRIX
    fits = int(room / max(per_column, 1)) - n_columns(sizes, 0)
    return max(min(fits, sizes.n_active), min(sizes.n_rows, sizes.n_active))


def available_bytes() -> int:
    """Memory that may be used: of one accelerator, else what the machine has free."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            return int(stats["bytes_limit"])
    return host_available_bytes()


def host_available_bytes() -> int:
    """Memory that the machine has free, whatever accelerators it has."""
    import psutil

    free = psutil.virtual_memory().available
    limit = _cgroup_room()
    return free if limit is None else min(free, limit)


def _cgroup_room() -> int | None:
    """What a container's limit leaves beside its processes' memory; None: no limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        stat = dict(s.split() for s in (root / "memory.stat").read_text().splitlines())
        used = int(stat["anon"])  # the page cache gives way
    except (OSError, ValueError, KeyError):
        return None
    return None if limit == "max" else max(int(limit) - used, 0)
