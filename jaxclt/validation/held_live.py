"""Predictions of ablations beside measurements that share their assumptions.

A total effect holds attention patterns, norms' denominators and gates. The model does
not hold its norms: where the answer is most of the final stream, the last norm takes
back most of what a patch does to its logit. So there are two lines (maths 16.11):

- ``held``, inside the graph's assumptions: total effects against ablations in the model
  with all norms held;
- ``live``, in the model: the local replacement model with norms live and gates held,
  ablated likewise, against ablations with norms live. Total effects and the model's own
  derivative stand beside it.

Both on the graph's targets and on its contrast, answer minus foil, which is what counts
where the answer is all but certain. Features at massive positions, where no prediction
holds, are a line of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxclt.files.json_text import rounded
from jaxclt.graph.agreement import slope
from jaxclt.lm.massive import MASSIVE, massive_positions
from jaxclt.patching.how import How
from jaxclt.validation.ablations import Ablated, Bench
from jaxclt.validation.lines import line

__all__ = ["HELD", "LOCAL", "held_and_live"]

HELD = How(mode="constrained", norms="frozen")
LOCAL = How(mode="iterative", norms="live", gates="frozen")


def held_and_live(bench: Bench, done: Ablated) -> dict[str, Any]:
    """The lines ``held``, ``live`` and ``first_position`` of a report.

    Args:
      bench: what is patched.
      done: its constrained ablations with norms live.
    """
    node_B = bench.choice.node_B
    held = bench.patch(bench.single, HELD)
    local = bench.patch(bench.single, LOCAL, everywhere=True)
    said_BK = -bench.effect_KA[:, node_B].T.astype(np.float64)
    local_BK = np.where(local.fine_B[:, None], local.change_BK, np.nan)
    by_held = {"value": (said_BK, held)}
    last_BK = -bench.last_norm_KA[:, node_B].T.astype(np.float64)
    by_live = {
        "local": (local_BK, done),
        "derivative": (-bench.derivative_KA[:, node_B].T, done),
        "value": (said_BK, done),
        "last_norm": (last_BK, done),
    }
    massive = massive_positions(bench.subject.patchable.recording, bench.graph.n_tokens)
    apart_B = np.isin(bench.graph.pos_A[node_B], massive)
    found: dict[str, Any] = {
        "contrast": bench.contrast,
        "probability": rounded(bench.probability),
        "held": _section(bench, by_held, apart_B),
        "live": _section(bench, by_live, apart_B),
    }
    if apart_B.any():
        found["first_position"] = {
            "positions": massive.tolist(),
            "rule": f"stream over {MASSIVE:g} times as long as at the median position",
            "n": int(apart_B.sum()),
            "held": _line(bench, said_BK, held, apart_B),
            "live": _line(bench, local_BK, done, apart_B),
        }
    return found


def _section(
    bench: Bench, by: dict[str, tuple[np.ndarray, Ablated]], apart_B: np.ndarray
) -> dict[str, Any]:
    """A line by the first prediction; others, and other sets and sums, in it."""
    (name, first), *others = by.items()
    control_B = bench.choice.control_B
    return {
        "predicted_by": name,
        "on": bench.on,
        **_line(bench, *first, ~apart_B),
        "targets": _line(bench, *first, ~apart_B, on="targets"),
        "contrast": _line(bench, *first, ~apart_B, on="contrast"),
        "top": _line(bench, *first, ~apart_B & ~control_B),
        "random": _line(bench, *first, ~apart_B & control_B),
        **{
            name: _line(bench, *pair, ~apart_B)
            | {"slope_on_targets": _slope(bench, *pair, ~apart_B)}
            for name, pair in others
        },
    }


def _line(
    bench: Bench,
    predicted_BK: np.ndarray,
    done: Ablated,
    of_B: np.ndarray,
    *,
    on: str | None = None,
) -> dict[str, Any]:
    return line(*_pairs(bench, predicted_BK, done, of_B, on or bench.on), bench.key)


def _slope(
    bench: Bench, predicted_BK: np.ndarray, done: Ablated, of_B: np.ndarray
) -> float | None:
    return rounded(slope(*_pairs(bench, predicted_BK, done, of_B, "targets")))


def _pairs(
    bench: Bench, predicted_BK: np.ndarray, done: Ablated, of_B: np.ndarray, on: str
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and measured effects of the patches that have both."""
    keep_B = of_B & done.fine_B & np.isfinite(predicted_BK).all(1)
    measured_BX = bench.measure(done.change_BK[keep_B], on)
    return bench.measure(predicted_BK[keep_B], on), measured_BX
