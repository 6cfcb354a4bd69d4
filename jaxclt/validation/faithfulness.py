"""How faithfully the replacement model of a traced prompt responds to perturbations.

The shell of `jaxclt.validation.perturb` (Circuit Tracing 2025, section 5.3 and appendix
G.3): which features are perturbed, and tables of what came of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxclt.patching.change import Change, batched
from jaxclt.patching.how import How
from jaxclt.patching.subject import Subject
from jaxclt.validation.perturb import (
    Agreement,
    Perturbation,
    nudged,
    perturb_many,
    upstream,
)
from jaxclt.validation.stats import mean_of

__all__ = ["VARIANTS", "by_distance", "faithfulness"]

KINDS = ("encoder", "absolute", "random", "data", "upstream")
# The replacement model as it is in the graph, with live norms, and with these and held
# gates.
VARIANTS = {
    "frozen": How(mode="iterative", norms="frozen"),
    "live": How(mode="iterative", gates="live"),
    "held": How(mode="iterative", gates="frozen"),
}


def faithfulness(
    subject: Subject,
    key: jax.Array,
    *,
    n_layers: int,
    n_perturbed: int,
    size: float = 0.1,
    rise: float = 0.1,
    variants: Sequence[str] = tuple(VARIANTS),
    on_batch: Callable[[int, int], None] = lambda n, n_diverged: None,
) -> tuple[dict[str, Any], list[int]]:
    """Cosine and NMSE of the two models' responses, with means over perturbations.

    Args:
      subject: the traced prompt.
      key: draws features and directions.
      n_layers: perturbed layers, evenly spread.
      n_perturbed: perturbations of a kind and layer.
      size: of a perturbation, share of the feature's activation.
      rise: of the activation, of absolute perturbations; 0.1 in the paper.
      variants: of `VARIANTS`: what of the replacement model is held.
      on_batch: called with the perturbations of each batch done, and those that
        diverged, which are in no mean.

    Returns:
      For each kind (`KINDS`; absolute: along encoders by `rise`, whatever the
      activation; data: towards the stream of another position) and variant
      (``KIND_live``, ``KIND_held``) ``cosine`` and ``nmse``, tables by perturbed layer
      (rows) and measured layer (columns), None where nothing is said; ``n``,
      perturbations that they are means of, by row; ``next_layer``, the mean cosine one
      layer on, over all perturbations, with its interval; ``flipped``, features that a
      perturbation switches on or off in the replacement model, likewise; and the
      perturbed layers.
    """
    L = subject.model.cfg.n_layers
    layers = sorted({round(x) for x in np.linspace(0, L - 2, n_layers)})
    layers = [layer for layer in layers if layer >= 0] or [0]
    made = _perturbations(subject, layers, key, n_perturbed, size, rise)
    hows = tuple(VARIANTS[name].of(subject.patchable.coder) for name in variants)
    out: dict[str, dict[str, Any]] = {name: {} for name in variants}
    for kind, (row_B, batch) in made.items():
        several: tuple[Agreement | None, ...] = (None,) * len(hows)
        if batch is not None and len(row_B):
            several = perturb_many(
                subject.patchable,
                subject.local.tables,
                batch,
                hows=hows,
                shared=kind != "upstream",
            )
        for name, done in zip(variants, several, strict=True):
            said, lost = _spread(done, row_B, layers, L, key)
            on_batch(len(row_B), lost)
            out[name][kind if name == "frozen" else f"{kind}_{name}"] = said
    return {kind: said for by in out.values() for kind, said in by.items()}, layers


def _spread(
    done: Agreement | None,
    row_B: np.ndarray,
    layers: list[int],
    n_layers: int,
    key: jax.Array,
) -> tuple[dict[str, Any], int]:
    """Tables and means of perturbations, and how many of these diverged."""
    tables, lost = np.full((2, len(layers), n_layers), np.nan), 0
    n_drawn, next_B, flipped_B = np.zeros(len(layers), int), np.zeros(0), np.zeros(0)
    if done is not None:
        fine_B = np.asarray(done.finite)
        lost = int((~fine_B).sum())
        for row in set(row_B[fine_B].tolist()):
            mine = (row_B == row) & fine_B
            tables[0, row] = np.asarray(done.cosine_L)[mine].mean(0)
            tables[1, row] = np.asarray(done.nmse_L)[mine].mean(0)
            n_drawn[row] = mine.sum()
        after_B = np.minimum(np.array(layers)[row_B] + 1, n_layers - 1)
        cosine_BL = np.asarray(done.cosine_L, np.float64)
        next_B = cosine_BL[np.arange(len(row_B)), after_B][fine_B]
        flipped_B = np.asarray(done.flipped, np.float64)[fine_B]
    found = {
        "cosine": _table(tables[0]),
        "nmse": _table(tables[1]),
        "n": n_drawn.tolist(),
        "next_layer": mean_of(next_B, key),
        "flipped": mean_of(flipped_B, key),
    }
    return found, lost


def by_distance(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Cosine and NMSE of each kind by layers passed, mean of prompts and layers.

    Args:
      lines: ``tables`` and ``layers`` from `faithfulness`, one a prompt.
    """
    found: dict[str, Any] = {}
    for kind in lines[0]["tables"]:
        found[kind] = {}
        for what in ("cosine", "nmse"):
            at: dict[int, list[float]] = {}
            for line in lines:
                table = line["tables"][kind][what]
                for layer, row in zip(line["layers"], table, strict=True):
                    for measured in range(layer, len(row)):
                        if row[measured] is not None:
                            at.setdefault(measured - layer, []).append(row[measured])
            found[kind][what] = {str(d): float(np.mean(at[d])) for d in sorted(at)}
    return found


def _table(values: np.ndarray) -> list[list[float | None]]:
    return [
        [round(float(x), 6) if math.isfinite(x) else None for x in row]
        for row in values
    ]


def _perturbations(
    subject: Subject,
    layers: list[int],
    key: jax.Array,
    n_perturbed: int,
    size: float,
    rise: float,
) -> dict[str, tuple[np.ndarray, Perturbation | None]]:
    """Rows of the heat map and perturbations of each kind."""
    a, T = subject.active, subject.n_tokens
    live_A = a.value_A != 0
    if T > 1:
        # The first position's stream is so large in many models that float32 hides a
        # perturbation there.
        live_A = live_A & (a.pos_A > 0)
    drawn: list[tuple[int, int, bool]] = []  # row, feature, upstream
    for row, layer in enumerate(layers):
        key, here_key, before_key = jax.random.split(key, 3)
        here = _draw(live_A & (a.layer_A == layer), n_perturbed, here_key)
        before = _draw(live_A & (a.layer_A < layer), n_perturbed, before_key)
        drawn += [(row, s, False) for s in here] + [(row, s, True) for s in before]
    if not drawn:
        return {kind: (np.zeros(0, int), None) for kind in KINDS}
    row_N, slot_N, up_N = (np.array(column) for column in zip(*drawn, strict=True))
    layer_N, pos_N, value_N = (
        np.array(layers)[row_N],
        a.pos_A[slot_N],
        a.value_A[slot_N],
    )
    # Upstream changes raise an activation; the others only lend their shape.
    node_N3 = np.stack([a.layer_A[slot_N], pos_N, a.feature_A[slot_N]], 1)
    rise_N = np.where(up_N, size * value_N.astype(float), 0)
    every = batched(Change.of(subject.gather(node_N3), 1.0, rise_N), [1] * len(row_N))
    every = subject.local.placed(every)
    read_ND = a.reads(slot_N)
    way_ND = np.asarray(jax.random.normal(key, read_ND.shape)).astype(read_ND.dtype)
    inner_N = np.array([read_D @ read_D for read_D in read_ND])
    vector_ND = (size * value_N / inner_N)[:, None] * read_ND
    data_ND, moves_N = _towards_data(subject, layer_N, pos_N, key)
    long_N1, direct = _length(vector_ND), np.flatnonzero(~up_N)
    sized = {
        "encoder": vector_ND,
        "absolute": (rise / inner_N)[:, None] * read_ND,
        "random": way_ND * (long_N1 / _length(way_ND)),
        "data": data_ND * (long_N1 / np.maximum(_length(data_ND), 1e-30)),
    }
    rows = {kind: direct for kind in sized} | {"data": np.flatnonzero(~up_N & moves_N)}
    made: dict[str, tuple[np.ndarray, Perturbation | None]] = {
        kind: (
            row_N[at],
            nudged(every.where(at), layer_N[at], pos_N[at], x_ND[at], T),
        )
        for kind, x_ND in sized.items()
        for at in [rows[kind]]
    }
    made["upstream"] = row_N[up_N], upstream(every.where(up_N), layer_N[up_N], T)
    return made


def _towards_data(
    subject: Subject, layer_N: np.ndarray, pos_N: np.ndarray, key: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    """From the stream to that of another position but the first, [N, D]; and where
    there is one."""
    mid_LTD = np.asarray(subject.patchable.recording.mid_LTD)
    first = min(1, subject.n_tokens - 1)
    others = subject.n_tokens - first
    step_N = 1 + np.asarray(jax.random.randint(key, pos_N.shape, 0, max(others - 1, 1)))
    other_N = first + (np.maximum(pos_N - first, 0) + step_N) % others
    way_ND = mid_LTD[layer_N, other_N] - mid_LTD[layer_N, pos_N]
    return way_ND, np.abs(way_ND).max(1) > 0


def _length(x_ND: np.ndarray) -> np.ndarray:
    return np.array([np.linalg.norm(x_D) for x_D in x_ND])[:, None]


def _draw(mask_A: np.ndarray, n: int, key: jax.Array) -> np.ndarray:
    found = np.flatnonzero(mask_A)
    return found[np.asarray(jax.random.permutation(key, len(found)))[:n]]
