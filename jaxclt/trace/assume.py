"""A memory plan for an imagined prompt, on a model whose weights need not be here.

``jaxclt trace --dry-run --assume tokens=6000,active=100`` says whether a graph will fit
before anything is downloaded or rented.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np

from jaxclt.errors import InputError, did_you_mean
from jaxclt.files.json_file import read_json
from jaxclt.graph.config import AttributeConfig
from jaxclt.graph.memory import FLOAT32, MemoryPlan, Sizes, memory_plan
from jaxclt.graph.packing import BankSizes, bank_sizes
from jaxclt.io.config_hf import is_tied, shape_from_hf
from jaxclt.lm.config import LMConfig
from jaxclt.shapes import bucket

__all__ = ["Assumed", "plan_assumed", "read_assumed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumed:
    """What the plan of a prompt depends on."""

    tokens: int
    active: int  # features, at each token and layer
    features: int | None = None  # of a layer of the dictionary; None: all distinct
    span: int | None = (
        None  # layers that a feature writes to; None: all from its own on
    )
    host: int | None = None  # GB next to an accelerator's memory; None: a CPU alone


def read_assumed(text: str) -> Assumed:
    """Read ``tokens=6000,active=100,features=16384,span=1``.

    Raises:
      InputError: for another form, an unknown name, or a number below 1.
    """
    names = [field.name for field in dataclasses.fields(Assumed)]
    given: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d{0,8})\s*", part)
        if match is None or match[1] not in names:
            hint = did_you_mean(part.partition("=")[0], names)
            raise InputError(
                f"--assume {text!r}: write tokens=N,active=N and, if known, "
                f"features=N,span=N,host=GB{hint}"
            )
        given[match[1]] = int(match[2])
    if not {"tokens", "active"} <= set(given):
        raise InputError(f"--assume {text!r}: give tokens=N and active=N at least")
    return Assumed(**given)


def plan_assumed(
    shape: str | Path,
    assumed: Assumed,
    *,
    config: AttributeConfig,
    budget: int,
    n_targets: int = 10,
) -> tuple[MemoryPlan, int]:
    """The plan, and how many features are active.

    Args:
      shape: a model directory or the path of its config.json; weights are not read.
      assumed: the prompt.
      config: how much to compute.
      budget: bytes that may be used.
      n_targets: tokens that are explained.

    Raises:
      InputError: if there is no such file, or the plan does not fit.
    """
    path = Path(shape)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(
            f"{shape}: with --assume give a model directory or its config.json"
        )
    hf = read_json(path)
    cfg = shape_from_hf(hf)
    L, n_tokens = cfg.n_layers, bucket(assumed.tokens)  # as recordings are padded
    n_active = assumed.tokens * L * assumed.active
    cap = config.max_features
    bank, row_bytes = _bank(cfg, assumed, n_tokens)
    sizes = Sizes(
        cfg=cfg,
        n_tokens=n_tokens,
        n_active=n_active,
        n_rows=n_active if cap is None else min(n_active, cap),
        n_targets=n_targets,
        bank=bank,
        row_bytes=row_bytes,
        params_bytes=_parameters(cfg, tied=is_tied(hf)) * FLOAT32,
        response=config.response,
        attention=config.attention,
        itemsize=FLOAT32,
    )
    host = None if assumed.host is None else assumed.host * 10**9
    plan = memory_plan(sizes, budget, chunk_size=config.chunk_size, host_budget=host)
    return plan, n_active


def _bank(cfg: LMConfig, assumed: Assumed, n_tokens: int) -> tuple[BankSizes, int]:
    """The bank of as many features everywhere, and bytes of their rows as read."""
    L = cfg.n_layers
    span = min(assumed.span or L, L)
    spans = tuple(min(span, L - layer) for layer in range(L))
    every = assumed.tokens * assumed.active  # of a layer
    unique = min(every, assumed.features or every)
    # Where all positions have as many, one tells the tiles of all.
    one = bank_sizes(np.full((L, 1), assumed.active), spans, unique * sum(spans))
    row_bytes = unique * (L + sum(spans)) * cfg.d_model * FLOAT32
    return one._replace(n_positions=n_tokens), row_bytes


def _parameters(cfg: LMConfig, *, tied: bool) -> int:
    """How many parameters the model has."""
    attention = cfg.d_model * cfg.d_head * 2 * (cfg.n_heads + cfg.n_kv_heads)
    mlp = 3 * cfg.d_model * cfg.d_mlp
    norms = 2 * cfg.d_model
    embeddings = (1 if tied else 2) * cfg.d_vocab * cfg.d_model
    return cfg.n_layers * (attention + mlp + norms) + embeddings + cfg.d_model
