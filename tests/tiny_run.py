"""A tiny model with text for it, and a run on both."""

from __future__ import annotations

import functools
import random
from pathlib import Path

from jaxclt.io.model import Model, load_model
from jaxclt.train.config import TrainConfig

GOLDEN = Path(__file__).parent / "goldens" / "circuit_tracer_clt"
MODEL = GOLDEN / "model"


@functools.cache
def tiny_model() -> Model:
    return load_model(MODEL)


def write_text(folder: Path, n_documents: int = 60, seed: int = 0) -> Path:
    """Documents of words that the tiny tokenizer knows."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    documents = [
        " ".join(f"w{min(96, 3 + int(rng.expovariate(0.05)))}" for _ in range(100))
        for _ in range(n_documents)
    ]
    (folder / "text.txt").write_text("<|endoftext|>".join(documents), "utf-8")
    return folder


def tiny_config(**more) -> TrainConfig:
    settings = {
        "features": 32,
        "span": 2,
        "activation": "batch_topk",
        "objective": "none",
        "l0": 6.0,
        "lr": 3e-3,
        "warmup": 3,
        "tokens": 64 * 24,
        "batch_tokens": 64,
        "context": 32,
        "chunk_tokens": 512,
        "reuse": 2,
        "norm_tokens": 1000,
        "heldout_share": 0.1,
        "heldout_tokens": 300,
        "dead_tokens": 256,
        "log_every": 4,
        "eval_every": 0,
        "checkpoint_every": 8,
        "agreement_windows": 2,
        "graph_features": 0,
    }
    return TrainConfig(**(settings | more))


def as_flags(config: TrainConfig, **only) -> list[str]:
    """Command line of the fields that differ from the defaults."""
    default = TrainConfig()
    flags = []
    for name in config.__dataclass_fields__:
        value = getattr(config, name)
        if value != getattr(default, name):
            flags += [f"--{name.replace('_', '-')}", str(value)]
    for name, value in only.items():
        flags += [f"--{name}", str(value)]
    return flags
