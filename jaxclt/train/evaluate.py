"""What is measured on held-out text while a run goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.active import StoreDictionary
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.model import decode, encode
from jaxclt.clt.store import ParamsStore
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.scores import scores
from jaxclt.io.model import Model
from jaxclt.trace import trace_prompt
from jaxclt.types import CLTParams

__all__ = ["PROMPTS", "decoder_reach", "graph_scores", "reconstruction"]

PROMPTS = (
    "The Eiffel Tower is in the city of",
    "The capital of France is",
    "The opposite of hot is",
)
DENSE = 0.1  # a feature active on more of the tokens than this is called dense


@partial(jax.jit, static_argnames="cfg")
def _sums(clt: CLTParams, read_LTD: Array, write_LTD: Array, cfg: CLTConfig):
    a_LTF = encode(clt, read_LTD, cfg=cfg)
    error_LTD = decode(clt, a_LTF, read_LTD) - write_LTD
    return (
        jnp.sum(jnp.square(error_LTD), (1, 2)),
        jnp.sum(write_LTD, 1),
        jnp.sum(jnp.square(write_LTD), 1),
        jnp.sum(a_LTF > 0, 1),
    )


def reconstruction(
    clt: CLTParams,
    cfg: CLTConfig,
    read_LTD: np.ndarray,
    write_LTD: np.ndarray,
    *,
    rows: int = 1024,
) -> dict[str, Any]:
    """FVU and L0 per layer, dead and dense features, on the given tokens.

    ``fvu_L = Σ|y - ŷ|² / Σ|y - mean y|²`` (spec 6.4); a feature is dead here if it is
    silent on all these tokens.

    Args:
      clt: dictionary in the units of the activations.
      cfg: its shape.
      read_LTD: what encoders read.
      write_LTD: what the MLPs wrote.
      rows: tokens computed together.
    """
    T = read_LTD.shape[1]
    total: list[np.ndarray] | None = None
    for start in range(0, T, rows):
        here = slice(start, start + rows)
        part = _sums(
            clt,
            jnp.asarray(read_LTD[:, here], clt.W_enc_LFD.dtype),
            jnp.asarray(write_LTD[:, here], clt.W_enc_LFD.dtype),
            cfg,
        )
        found = [np.asarray(x, np.float64) for x in part]
        total = found if total is None else [a + b for a, b in zip(total, found)]  # noqa: B905
    assert total is not None
    error_L, sum_LD, square_LD, count_LF = total
    variance_L = (square_LD - sum_LD**2 / T).sum(1)
    fvu_L = error_L / variance_L
    density_LF = count_LF / T
    return {
        "fvu": float(fvu_L.mean()),
        "fvu_L": fvu_L.tolist(),
        "l0": float(density_LF.sum(1).mean()),
        "l0_L": density_LF.sum(1).tolist(),
        "dead": float((count_LF == 0).mean()),
        "dead_L": (count_LF == 0).mean(1).tolist(),
        "dense": float((density_LF > DENSE).mean()),
        "heldout_tokens": T,
    }


def decoder_reach(clt: CLTParams) -> list[float]:
    """Share of the squared decoder norm by distance, source to target layer.

    Sparsity through the decoder norm can reward features that skip the layers between;
    a share that grows with distance says so.
    """
    span = max(W.shape[1] for W in clt.W_dec)
    total = np.zeros(span)
    for W_FMD in clt.W_dec:
        total[: W_FMD.shape[1]] += np.square(np.asarray(W_FMD)).sum((0, 2))
    return (total / max(total.sum(), 1e-30)).tolist()


def graph_scores(
    model: Model,
    clt: CLTParams,
    cfg: CLTConfig,
    prompts: Sequence[str],
    *,
    max_features: int,
) -> dict[str, Any]:
    """Replacement, completeness and path length of graphs of fixed prompts.

    Args:
      model: the language model.
      clt: dictionary in raw units.
      cfg: its shape.
      prompts: texts.
      max_features: most feature nodes of each graph; the rest counts as unexplained.
    """
    clt = jax.tree.map(np.asarray, clt)
    dictionary = StoreDictionary(ParamsStore(clt, cfg), name="training")
    each = [
        dataclasses.asdict(
            scores(
                trace_prompt(
                    model,
                    dictionary,
                    prompt,
                    config=AttributeConfig(max_features=max_features),
                ).graph
            )
        )
        for prompt in prompts
    ]
    keys = ("replacement", "completeness", "mean_path_length")
    return {key: float(np.mean([one[key] for one in each])) for key in keys} | {
        "prompts": [
            {"prompt": prompt} | {key: one[key] for key in keys}
            for prompt, one in zip(prompts, each, strict=True)
        ]
    }
