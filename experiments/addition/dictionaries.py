"""The three dictionaries: a cross-layer and a per-layer transcoder, and the neurons.

Trained by `jaxclt.train` on the model's activations at all positions of the pairs that
the model was trained on; the pairs it never saw are held out here too. The model has no
attention sink at its first position, so that one is trained on like the others, and the
replacement model needs no error node anywhere.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import task

from jaxclt.io.model import Model
from jaxclt.text.corpus import Windows
from jaxclt.train.config import TrainConfig
from jaxclt.train.trainer import Listener, train

PROMPTS = tuple(task.prompt(a, b) for a, b in ((36, 59), (8, 7), (42, 13), (95, 88)))
CLT = TrainConfig(
    features=512,
    span=0,
    activation="batch_topk",
    objective="none",
    l0=16.0,
    read="resid_mid",
    auxk=1 / 32,
    tokens=1_600_000,
    batch_tokens=2_000,
    lr=2e-3,
    warmup=50,
    context=task.LONGEST,
    chunk_tokens=8_000 * task.LONGEST,
    reuse=1_000,
    windows_per_call=500,
    buffer="float32",
    norm_tokens=40_000,
    outlier=0.0,
    heldout_tokens=10_000,
    dead_tokens=20_000,
    log_every=50,
    eval_every=0,
    checkpoint_every=400,
    agreement_windows=500,
    graph_features=0,
)
PLT = dataclasses.replace(CLT, span=1)


def windows() -> Windows:
    """Every pair's prompt as a window of its own."""
    token_NT, _ = task.all_tokens()
    seen, held = task.split()
    return Windows.of(token_NT[seen], token_NT[held], first=True)


def make(model: Model, config: TrainConfig, out: Path, say: Any = print) -> dict:
    """Train one dictionary, or go on with it; its card."""

    def step(record: dict[str, Any]) -> None:
        say(
            f"{out.name} step {record['step']}: FVU {record['fvu']:.4f}, "
            f"L0 {record['l0']:.1f}, {record['tokens_per_s']:,.0f} tokens/s, "
            f"{record['eta_s']:.0f} s left"
        )

    return train(model, windows(), out, config, listener=Listener(step=step, line=say))
