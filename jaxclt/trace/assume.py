"""A memory plan for an imagined prompt, on a model whose weights need not be here.

``jaxclt trace --dry-run --assume tokens=6000,active=100`` says whether a graph will fit
before anything is downloaded or rented.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from jaxclt.errors import InputError, did_you_mean
from jaxclt.files.json_file import read_json
from jaxclt.graph.config import AttributeConfig
from jaxclt.graph.memory import FLOAT32, MemoryPlan, Sizes, memory_plan
from jaxclt.io.config_hf import shape_from_hf
from jaxclt.lm.config import LMConfig

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
    cfg = shape_from_hf(read_json(path))
    L = cfg.n_layers
    span = min(assumed.span or L, L)
    n_active = assumed.tokens * L * assumed.active
    unique = None if assumed.features is None else L * assumed.features
    cap = config.max_features
    sizes = Sizes(
        cfg=cfg,
        n_tokens=assumed.tokens,
        n_active=n_active,
        n_rows=n_active if cap is None else min(n_active, cap),
        n_targets=n_targets,
        n_sites=sum(min(span, L - l) for l in range(L)) / L,
        n_unique=unique,
        params_bytes=_parameters(cfg) * FLOAT32,
        response=config.response,
        attention=config.attention,
        itemsize=FLOAT32,
    )
    host = None if assumed.host is None else assumed.host * 10**9
    plan = memory_plan(sizes, budget, chunk_size=config.chunk_size, host_budget=host)
    return plan, n_active


def _parameters(cfg: LMConfig) -> int:
    """How many parameters the model has, its embeddings tied."""
    attention = cfg.d_model * cfg.d_head * 2 * (cfg.n_heads + cfg.n_kv_heads)
    mlp = 3 * cfg.d_model * cfg.d_mlp
    norms = 2 * cfg.d_model
    embeddings = cfg.d_vocab * cfg.d_model
    return cfg.n_layers * (attention + mlp + norms) + embeddings + cfg.d_model
