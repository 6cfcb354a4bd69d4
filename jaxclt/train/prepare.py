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
from jaxclt.trace.prompt import prompt_tokens
from jaxclt.train.config import TrainConfig
from jaxclt.train.evaluate import PROMPTS
from jaxclt.train.sample import sample_windows

__all__ = ["fitted", "identity", "run_windows"]

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


def identity(config: TrainConfig, model: Model, data: str) -> dict[str, Any]:
    """What the same command would give again."""
    ours = dataclasses.asdict(config)
    for name in _FREE:
        ours.pop(name)
    return {"config": ours, "model": model.hash, "data": data}


def run_windows(
    config: TrainConfig,
    model: Model,
    data: str,
    out: Path,
    stage: Callable[[str, int, int], None],
) -> Windows:
    """The windows of a run, those of ``windows.npz`` if it has been there before.

    Args:
      config: how many tokens, how they are cut, what is held out.
      model: whose tokens.
      data: text source, or ``model``.
      out: directory of the run.
      stage: progress, (what, done, of).

    Raises:
      InputError: if there is no text, or too little.
    """
    file = out / "windows.npz"
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
    make = _sampled if data == "model" else _read
    windows = make(config, model, data, out, stage)
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


def _read(
    config: TrainConfig,
    model: Model,
    data: str,
    out: Path,
    stage: Callable[[str, int, int], None],
) -> Windows:
    """Windows of text from files or the hub."""
    del out
    needed, held = _tokens_needed(config), None
    if config.heldout:
        held = read_documents(config.heldout, tokens=config.heldout_tokens)
    else:
        needed = math.ceil(needed / (1 - config.heldout_share))
    train_docs, held_docs = split_documents(
        read_documents(data, tokens=needed), held, config.heldout_share
    )
    return cut_windows(
        train_docs,
        held_docs,
        model.tokenizer,
        size=config.context,
        train_tokens=_tokens_needed(config),
        held_tokens=config.heldout_tokens,
        on_tokens=lambda done, total: stage("tokens", done, total),
    )


def _sampled(
    config: TrainConfig,
    model: Model,
    data: str,
    out: Path,
    stage: Callable[[str, int, int], None],
) -> Windows:
    """Windows that the model wrote itself."""
    if config.heldout:
        raise InputError(
            f"--data {data} holds out samples of its own: leave --heldout away"
        )
    return sample_windows(
        model.params,
        model.tokenizer,
        cfg=model.cfg,
        size=config.context,
        train_tokens=_tokens_needed(config),
        held_tokens=config.heldout_tokens,
        per_call=config.windows_per_call,
        seed=config.seed,
        partial_file=out / "samples.npz",
        on_tokens=lambda done, total: stage("sampling", done, total),
    )
