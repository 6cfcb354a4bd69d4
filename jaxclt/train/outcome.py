"""What a run has come to: its dictionary, exported and measured on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.clt.config import CLTConfig
from jaxclt.clt.store import ParamsStore
from jaxclt.clt.transcoder import StoreDictionary, loaded_params
from jaxclt.files.atomic import write_text
from jaxclt.files.json_text import to_json
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.scores import scores
from jaxclt.io.dictionary import save_dictionary
from jaxclt.io.model import Model
from jaxclt.replacement.agreement import agreement
from jaxclt.replacement.reconstruction import (
    Reconstruction,
    decoder_reach,
    reconstructed,
)
from jaxclt.trace.prompt import trace_prompt
from jaxclt.train.chunks import Chunks
from jaxclt.train.export import calibrate, threshold_form
from jaxclt.train.finetune import Finetune, finetune_kl
from jaxclt.train.normalise import Scales, fold
from jaxclt.train.prepare import Job
from jaxclt.types import CLTParams

__all__ = ["Outcome", "graph_scores", "reconstruction"]

CALIBRATION_TOKENS = 4096


class Outcome:
    """Turns the weights of a run into a dictionary on disk and its measures.

    Args:
      job: the run.
      chunks: its activations and normalisation, for the calibration of thresholds.
    """

    def __init__(self, job: Job, chunks: Chunks) -> None:
        self.model, self.config, self.out = job.model, job.config, job.out
        self.spec = job.config.spec(job.model.cfg)
        self.chunks, self.windows = chunks, chunks.windows
        self._held: tuple[np.ndarray, np.ndarray] | None = None
        self._calibration: np.ndarray | None = None

    @property
    def scales(self) -> Scales:
        """What activations are normalised by."""
        assert self.chunks.scales is not None
        return self.chunks.scales

    def evaluate(self, params: Any) -> dict[str, Any]:
        """Export to ``dictionary/``; what was measured."""
        clt, cfg = self._dictionary(params)
        found = reconstruction(clt, cfg, *self._held_rows())
        found["decoder_reach"] = decoder_reach(loaded_params(clt, cfg).weights.dec)
        return found | self._export(
            fold(clt, self.scales), cfg, self.out / "dictionary"
        )

    def finetune(
        self, params: Any, stage: Callable[[str, int, int], None]
    ) -> dict[str, Any]:
        """A copy of the dictionary after `--kl-steps`, and the same measurements."""
        config = self.config
        clt, cfg = self._dictionary(params)

        def report(step: int, kl: float) -> None:
            del kl
            stage("fine-tuning", step + 1, config.kl_steps)

        raw, history = finetune_kl(
            self.model.params,
            fold(clt, self.scales),
            self.windows,
            Finetune(
                n_steps=config.kl_steps, windows=config.kl_windows, lr=config.kl_lr
            ),
            cfg=self.model.cfg,
            clt_cfg=cfg,
            on_step=report,
        )
        read_LTD, write_LTD = (np.array(x) for x in self._held_rows())
        s = jax.tree.map(np.asarray, self.scales)
        read_LTD *= s.read_scale_L[:, None, None]
        read_LTD += s.read_mean_LD[:, None]
        write_LTD *= s.write_scale_L[:, None, None]
        write_LTD += s.write_mean_LD[:, None]
        found: dict[str, Any] = reconstruction(raw, cfg, read_LTD, write_LTD)
        found |= self._export(raw, cfg, self.out / "finetuned" / "dictionary")
        found = {"kl_steps": config.kl_steps, "train_kl": history, **found}
        write_text(self.out / "finetuned" / "metrics.json", to_json(found, indent=1))
        return found

    def _dictionary(self, params: Any) -> tuple[CLTParams, CLTConfig]:
        """The dictionary of weights on the host, in normalised units."""
        theta_L = None
        params = jax.tree.map(jnp.asarray, params)
        if self.spec.k is not None:
            theta_L = calibrate(params, self.calibration_rows(), self.spec.k)
        return threshold_form(params, self.spec, theta_L)

    def calibration_rows(self) -> np.ndarray:
        """What encoders read on training text; the same rows every time."""
        if self._calibration is None:
            read_LND, _ = self.chunks.rows(0, 0, CALIBRATION_TOKENS)
            self._calibration = np.asarray(read_LND)
        return self._calibration

    def _held_rows(self) -> tuple[np.ndarray, np.ndarray]:
        if self._held is None:
            held_WS = self.windows.held_WS
            rows = self.chunks.harvested(held_WS, self.scales, "float32")
            read, write = zip(*rows, strict=True)
            n = self.config.heldout_tokens
            self._held = (
                np.concatenate(read, 1)[:, :n],
                np.concatenate(write, 1)[:, :n],
            )
        return self._held

    def _export(self, raw: CLTParams, cfg: CLTConfig, folder: Path) -> dict[str, Any]:
        """Write a dictionary in raw units; measure its replacement model and graphs."""
        after_norm = self.model.params.blocks.post_mlp_LD is not None
        save_dictionary(
            raw,
            cfg,
            folder,
            model_name=self.model.name,
            write="stream" if after_norm else None,
        )
        held_WS = self.windows.held_WS[: self.config.agreement_windows]
        found: dict[str, Any] = {}
        if len(held_WS):
            found = agreement(
                self.model.params,
                loaded_params(raw, cfg),
                held_WS,
                self.windows.valid(held_WS),
                cfg=self.model.cfg,
                keep_first=not self.windows.first,
            )
        if self.config.graph_features and self.config.prompts:
            found["graphs"] = graph_scores(
                self.model,
                raw,
                cfg,
                self.config.prompts,
                max_features=self.config.graph_features,
            )
        return found


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
    cuts = [slice(start, start + rows) for start in range(0, T, rows)]
    parts = [reconstructed(loaded, read_LTD[:, x], write_LTD[:, x]) for x in cuts]
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
    config = AttributeConfig(max_features=max_features)
    keys = ("replacement", "completeness", "mean_path_length")
    each: list[dict[str, Any]] = []
    for prompt in prompts:
        found = scores(trace_prompt(model, dictionary, prompt, config=config).graph)
        each.append({"prompt": prompt} | {key: getattr(found, key) for key in keys})
    means = {key: float(np.mean([one[key] for one in each])) for key in keys}
    return means | {"prompts": each}
