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

from jaxclt.patching.change import Change
from jaxclt.patching.patchable import How
from jaxclt.patching.subject import Subject
from jaxclt.validation.perturb import (
    Perturbation,
    nudged,
    perturb_many,
    stack,
    upstream,
)

__all__ = ["VARIANTS", "by_distance", "faithfulness"]

# The replacement model as it is in the graph, and as it is in the model, by its norms.
VARIANTS = {
    "frozen": How(mode="iterative", freeze_norm=True),
    "live": How(mode="iterative", gates="live"),
}


def faithfulness(
    subject: Subject,
    key: jax.Array,
    *,
    n_layers: int = 8,
    n_perturbed: int = 3,
    size: float = 0.1,
    live: bool = True,
    on_batch: Callable[[int, int], None] = lambda n, n_diverged: None,
) -> tuple[dict[str, Any], list[int]]:
    """Cosine and NMSE of the two models' responses, with means over perturbations.

    Args:
      subject: the traced prompt.
      key: draws features and directions.
      n_layers: perturbed layers, evenly spread.
      n_perturbed: perturbations of a kind and layer.
      size: of a perturbation, share of the feature's activation.
      live: also with the replacement model's norms live (kinds ending in ``_live``).
      on_batch: called with the perturbations of each batch done, and those that
        diverged, which are in no mean.

    Returns:
      For each kind (encoder, random, upstream) ``cosine`` and ``nmse``, tables by
      perturbed layer (rows) and measured layer (columns), None where nothing is said;
      and the perturbed layers.
    """
    L = subject.model.cfg.n_layers
    layers = sorted({round(x) for x in np.linspace(0, L - 2, n_layers)})
    layers = [layer for layer in layers if layer >= 0] or [0]
    made = _perturbations(subject, layers, key, n_perturbed, size)
    out: dict[str, Any] = {}
    for norms, how in list(VARIANTS.items())[: 2 if live else 1]:
        for kind, (rows, batch) in made.items():
            name = kind if norms == "frozen" else f"{kind}_live"
            cosine, nmse = (np.full((len(layers), L), np.nan) for _ in range(2))
            lost = 0
            if batch:
                with jax.default_matmul_precision("highest"):
                    done = perturb_many(
                        subject.patchable,
                        subject.local.tables,
                        stack(batch),
                        how=how.of(subject.patchable.coder),
                    )
                fine_B = np.asarray(done.finite)
                lost = int((~fine_B).sum())
                for row in range(len(layers)):
                    mine = np.flatnonzero((np.array(rows) == row) & fine_B)
                    if len(mine):
                        cosine[row] = np.asarray(done.cosine_L)[mine].mean(0)
                        nmse[row] = np.asarray(done.nmse_L)[mine].mean(0)
            on_batch(len(batch), lost)
            out[name] = {"cosine": _table(cosine), "nmse": _table(nmse)}
    return out, layers


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
) -> dict[str, tuple[list[int], list[Perturbation]]]:
    """Rows of the heat map and perturbations of each kind."""
    a, rec = subject.active, subject.patchable.recording
    T, D = subject.n_tokens, subject.model.cfg.d_model
    dtype = np.asarray(rec.mid_LTD[0, 0, 0]).dtype
    made: dict[str, tuple[list[int], list[Perturbation]]] = {
        kind: ([], []) for kind in ("encoder", "random", "upstream")
    }
    live_A = a.value_A != 0
    if T > 1:
        # The first position's stream is so large in many models that float32 hides a
        # perturbation there.
        live_A = live_A & (a.pos_A > 0)
    drawn: list[tuple[int, int, bool]] = []  # row, feature, upstream
    for row, layer in enumerate(layers):
        key, here_key, before_key = jax.random.split(key, 3)
        n = n_perturbed
        here = _draw(live_A & (a.layer_A == layer), n, here_key)
        before = _draw(live_A & (a.layer_A < layer), n, before_key)
        drawn += [(row, int(s), False) for s in here]
        drawn += [(row, int(s), True) for s in before]
    if not drawn:
        return made
    slot_N = np.array([s for _, s, _ in drawn])
    node_N3 = np.stack([a.layer_A, a.pos_A, a.feature_A], 1)[slot_N]
    # Upstream changes raise an activation; the others only lend their shape.
    up_N = np.array([is_upstream for *_, is_upstream in drawn])
    rise_N = size * a.value_A[slot_N].astype(float) * up_N
    every = Change.of(subject.gather(node_N3), 1.0, rise_N)
    every = subject.local.placed(every)
    way_ND = np.asarray(jax.random.normal(key, (len(drawn), D))).astype(dtype)
    read_ND = a.reads(slot_N)
    zero_TD = np.zeros((T, D), dtype)
    for i, (row, s, is_upstream) in enumerate(drawn):
        one, layer, pos = every.where([i]), layers[row], int(a.pos_A[s])
        if is_upstream:
            made["upstream"][0].append(row)
            made["upstream"][1].append(upstream(one, layer, zero_TD))
            continue
        read_D = read_ND[i]
        step = size * a.value_A[s] / (read_D @ read_D)
        vector_D = (step * read_D).astype(dtype)
        any_D = way_ND[i] * (np.linalg.norm(vector_D) / np.linalg.norm(way_ND[i]))
        for kind, vector in (("encoder", vector_D), ("random", any_D)):
            made[kind][0].append(row)
            made[kind][1].append(nudged(one, layer, pos, vector, T))
    return made


def _draw(mask_A: np.ndarray, n: int, key: jax.Array) -> np.ndarray:
    found = np.flatnonzero(mask_A)
    return found[np.asarray(jax.random.permutation(key, len(found)))[:n]]
