"""What a run has come to: its dictionary, exported and measured on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.clt.config import CLTConfig
from jaxclt.clt.transcoder import loaded_params
from jaxclt.files.atomic import write_text
from jaxclt.files.json_text import to_json
from jaxclt.io.dictionary import save_dictionary
from jaxclt.io.model import Model
from jaxclt.replacement.agreement import agreement
from jaxclt.replacement.reconstruction import decoder_reach
from jaxclt.text.corpus import Windows
from jaxclt.train.chunks import Chunks, rows_of
from jaxclt.train.config import TrainConfig
from jaxclt.train.evaluate import graph_scores, reconstruction
from jaxclt.train.export import calibrate, threshold_form
from jaxclt.train.finetune import finetune_kl
from jaxclt.train.normalise import Scales, fold
from jaxclt.train.params import Spec
from jaxclt.types import CLTParams

__all__ = ["Outcome"]

CALIBRATION_TOKENS = 4096


class Outcome:
    """Turns the weights of a run into a dictionary on disk and its measures.

    Args:
      model: whose MLPs it stands for.
      config: of the run.
      spec: what is trained.
      windows: with those that are held out.
      chunks: activations, for the calibration of thresholds.
      scales: what they are normalised by.
      out: directory of the run.
    """

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        spec: Spec,
        windows: Windows,
        chunks: Chunks,
        scales: Scales,
        out: Path,
    ) -> None:
        self.model, self.config, self.spec = model, config, spec
        self.windows, self.chunks, self.scales = windows, chunks, scales
        self.out = out
        self._held: tuple[np.ndarray, np.ndarray] | None = None
        self._calibration: np.ndarray | None = None

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

        def heard(step: int, kl: float) -> None:
            del kl
            stage("fine-tuning", step + 1, config.kl_steps)

        raw, history = finetune_kl(
            self.model.params,
            fold(clt, self.scales),
            self.windows,
            cfg=self.model.cfg,
            clt_cfg=cfg,
            n_steps=config.kl_steps,
            windows_per_step=config.kl_windows,
            lr=config.kl_lr,
            on_step=heard,
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
            rows = rows_of(
                self.model.params,
                self.windows.held_WS,
                self.windows,
                self.scales,
                cfg=self.model.cfg,
                config=self.config.chunk_config(),
                dtype="float32",
            )
            read, write = zip(*rows, strict=True)
            n = self.config.heldout_tokens
            self._held = (
                np.concatenate(read, 1)[:, :n],
                np.concatenate(write, 1)[:, :n],
            )
        return self._held

    def _export(self, raw: CLTParams, cfg: CLTConfig, folder: Path) -> dict[str, Any]:
        """Write a dictionary in raw units; measure its replacement model and graphs."""
        behind_norm = self.model.params.blocks.post_mlp_LD is not None
        save_dictionary(
            raw,
            cfg,
            folder,
            model_name=self.model.name,
            write="stream" if behind_norm else None,
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
