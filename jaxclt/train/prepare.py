"""What a run begins with: its recipe, its identity and its windows of tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxclt.errors import InputError
from jaxclt.files.npz import Must, open_npz, write_npz
from jaxclt.io.model import Model
from jaxclt.text.corpus import (
    Windows,
    check_context,
    cut_windows,
    read_documents,
    split_documents,
)
from jaxclt.text.windows import check_windows
from jaxclt.trace.record import prompt_tokens
from jaxclt.train.config import PROMPTS, TrainConfig
from jaxclt.train.sample import sample_windows

__all__ = ["Job", "fitted", "run_windows"]

Stage = Callable[[str, int, int], None]

# What may change between two parts of a run without changing its weights.
_FREE = (
    *("log_every", "eval_every", "checkpoint_every", "prompts"),
    *("agreement_windows", "graph_features", "kl_steps", "kl_lr", "kl_windows"),
)


def fitted(config: TrainConfig, model: Model, given: Windows | None) -> TrainConfig:
    """The recipe for a model, without those of our own prompts that it cannot read.

    Args:
      config: the recipe.
      model: what it is to be trained on.
      given: windows instead of text.

    Raises:
      InputError: if windows or prompts do not fit the model.
    """
    if given is None:
        check_context(config.context, model.cfg.n_ctx)
    else:
        check_windows(model, given.train_WS)
        check_windows(model, given.held_WS)
    kept = []
    for prompt in config.prompts if config.graph_features else ():
        try:
            prompt_tokens(model, prompt)
            kept.append(prompt)
        except InputError as error:
            # A model of a small domain reads none of those that come with the recipe.
            if prompt not in PROMPTS:
                raise InputError(f"--prompts {prompt[:40]!r}: {error}") from None
    return dataclasses.replace(config, prompts=tuple(kept))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a run trains a dictionary for, on what, where, and how."""

    model: Model
    data: str  # where its text comes from
    out: Path
    config: TrainConfig

    @property
    def identity(self) -> dict[str, Any]:
        """What the same command would give again."""
        ours = dataclasses.asdict(self.config)
        for name in _FREE:
            ours.pop(name)
        return {"config": ours, "model": self.model.hash, "data": self.data}


def run_windows(job: Job, stage: Stage) -> Windows:
    """The windows of a run, those of ``windows.npz`` if it has been there before.

    Args:
      job: how many tokens, of which text, how they are cut, what is held out.
      stage: progress, (what, done, of).

    Raises:
      InputError: if there is no text, or too little.
    """
    config, model = job.config, job.model
    file = job.out / "windows.npz"
    special = frozenset(model.tokenizer.special_ids)
    if file.is_file():
        with open_npz(file, "cannot be read", "give another --out") as found:
            sizes = {"S": config.context}
            most = model.cfg.d_vocab
            return Windows(
                train_WS=found.array("train_WS", Must("int", "TS", -1, most), sizes),
                held_WS=found.array("held_WS", Must("int", "HS", -1, most), sizes),
                special=special,
                digest=found.text("digest"),
            )
    windows = (_sampled if job.data == "model" else _read)(job, stage)
    write_npz(
        file,
        train_WS=windows.train_WS,
        held_WS=windows.held_WS,
        digest=np.asarray(windows.digest),
    )
    return windows


def _tokens_needed(config: TrainConfig) -> int:
    distinct = max(math.ceil(config.tokens / config.reuse), config.norm_tokens)
    return distinct + config.chunk_tokens


def _read(job: Job, stage: Stage) -> Windows:
    """Windows of text from files or the hub."""
    config = job.config
    needed, held = _tokens_needed(config), None
    if config.heldout:
        held = read_documents(config.heldout, tokens=config.heldout_tokens)
    else:
        needed = math.ceil(needed / (1 - config.heldout_share))
    train_docs, held_docs = split_documents(
        read_documents(job.data, tokens=needed), held, config.heldout_share
    )
    return cut_windows(
        train_docs,
        held_docs,
        job.model.tokenizer,
        size=config.context,
        train_tokens=_tokens_needed(config),
        held_tokens=config.heldout_tokens,
        on_tokens=lambda done, total: stage("tokens", done, total),
    )


def _sampled(job: Job, stage: Stage) -> Windows:
    """Windows that the model wrote itself."""
    config = job.config
    if config.heldout:
        raise InputError(
            f"--data {job.data} holds out samples of its own: leave out --heldout"
        )
    return sample_windows(
        job.model,
        size=config.context,
        train_tokens=_tokens_needed(config),
        held_tokens=config.heldout_tokens,
        per_call=config.windows_per_call,
        seed=config.seed,
        partial_file=job.out / "samples.npz",
        on_tokens=lambda done, total: stage("sampling", done, total),
    )
