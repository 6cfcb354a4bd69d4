"""What is measured on held-out text while a run goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxclt.clt.config import CLTConfig
from jaxclt.clt.store import ParamsStore
from jaxclt.clt.transcoder import StoreDictionary, loaded_params
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.scores import scores
from jaxclt.io.model import Model
from jaxclt.replacement.reconstruction import Reconstruction, reconstructed
from jaxclt.trace.prompt import trace_prompt
from jaxclt.types import CLTParams

__all__ = ["PROMPTS", "graph_scores", "reconstruction"]

PROMPTS = (
    "The Eiffel Tower is in the city of",
    "The capital of France is",
    "The opposite of hot is",
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

    ``fvu_L = Σ|y - ŷ|² / Σ|y - mean y|²`` (maths 18.1); a feature is dead here if it is
    silent on all these tokens.

    Args:
      clt: dictionary in the units of the activations.
      cfg: its shape.
      read_LTD: what encoders read.
      write_LTD: what the MLPs wrote.
      rows: tokens computed together.
    """
    T = read_LTD.shape[1]
    loaded = loaded_params(clt, cfg)
    parts = [
        reconstructed(
            loaded,
            read_LTD[:, start : start + rows],
            write_LTD[:, start : start + rows],
        )
        for start in range(0, T, rows)
    ]
    return Reconstruction.joined(parts).summary()


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
