"""circuit-tracer 0.5.0's feature_intervention on the goldens' models and dictionaries.

    python tests/goldens/make_interventions.py

Run with the environment of make_circuit_tracer.py, after it: reads the directories that
it wrote and adds interventions.npz to each. For every case C of interventions (layer,
position, feature, value), padded with -1:

    change_CE4       what is set
    constrained_CTV  logits, constrained_layers=all: patterns, norms, MLPs frozen
    partial_CTV      logits, constrained_layers=range(1, 3): norms live
    additive_CTV     logits, no constrained layers: MLPs respond, attention frozen
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from circuit_tracer import ReplacementModel
from make_circuit_tracer import CLT, N_LAYERS, PLT, PLT_SKIP, Case, load_dictionary

RANGES = {
    "constrained": range(N_LAYERS),
    "partial": range(1, 3),
    "additive": None,
}


def cases(golden: dict[str, np.ndarray]) -> list[list[tuple[int, int, int, float]]]:
    """Ablation, amplification, a negative value, several at once, a silent feature."""
    active, value = golden["active_A3"], golden["value_A"]

    def pick(layer: int, n: int = 1) -> list[int]:
        own = np.flatnonzero(active[:, 0] == layer)
        return own[np.argsort(-value[own])][:n].tolist()

    def change(a: int, factor: float) -> tuple[int, int, int, float]:
        layer, pos, feature = map(int, active[a])
        return layer, pos, feature, float(factor * value[a])

    (first,), (second,) = pick(0), pick(1)
    silent = {tuple(a) for a in active.tolist()}
    free = next(f for f in range(40) if (1, 3, f) not in silent)
    return [
        [change(first, 0.0)],
        [change(second, 3.0)],
        [change(second, -1.0)],
        [change(a, 0.0) for layer in range(3) for a in pick(layer, 2)],
        [(1, 3, free, 1.5)],
    ]


def make(case: Case) -> None:
    with np.load(case.root / f"graph{case.suffix}.npz") as file:
        golden = dict(file)
    model = ReplacementModel.from_pretrained_and_transcoders(
        str(case.root / "model"), load_dictionary(case), backend="nnsight",
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    tokens = torch.tensor(golden["token_T"].astype(np.int64))
    changes = cases(golden)
    most = max(map(len, changes))
    arrays = {
        "change_CE4": np.array(
            [c + [(-1, -1, -1, 0.0)] * (most - len(c)) for c in changes]
        )
    }
    for name, layers in RANGES.items():
        rows = []
        for change in changes:
            logits, _ = model.feature_intervention(
                tokens, change, constrained_layers=layers
            )
            rows.append(logits.detach().reshape(len(tokens), -1).numpy())
        arrays[f"{name}_CTV"] = np.stack(rows)
    np.savez_compressed(case.root / f"interventions{case.suffix}.npz", **arrays)
    moved = [np.abs(arrays[f"{n}_CTV"] - golden["logit_TV"]).max() for n in RANGES]
    sys.stdout.write(f"{case.directory}{case.suffix}: logits moved by up to {moved}\n")


if __name__ == "__main__":
    for case in (CLT, PLT, PLT_SKIP):
        make(case)
