"""What a run begins with: a directory that is its own, and its windows of tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxclt.errors import InputError
from jaxclt.files.atomic import atomic_path, is_temporary
from jaxclt.files.json_file import TEXT, check_json, json_schema, read_json, record
from jaxclt.files.json_text import to_json
from jaxclt.files.npz import Must, open_npz
from jaxclt.io.model import Model
from jaxclt.runs.lock import LOCK
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

__all__ = ["Job", "claim_directory", "claimed", "fitted", "run_windows", "write_json"]

Stage = Callable[[str, int, int], None]

_RUN = json_schema(record({"config": {"type": "object"}, "model": TEXT, "data": TEXT}))
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
        return {
            "config": json.loads(to_json(ours)),
            "model": self.model.hash,
            "data": self.data,
        }


def claim_directory(out: Path, ours: dict[str, Any]) -> None:
    """Make the directory that of this run, or see that it is.

    A directory in which another run came to nothing is free.

    Args:
      out: directory.
      ours: see `Job.identity`.

    Raises:
      InputError: if it holds anything else.
    """
    file = out / "run.json"
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    names = {name for name in names if name != LOCK and not is_temporary(name)}
    if names <= {file.name}:
        write_json(file, ours)
        return
    if file.name not in names:
        raise InputError(
            f"--out {out} is not empty and holds no run: give another directory"
        )
    theirs = read_json(file)
    check_json(theirs, _RUN, f"{file} is damaged, give another --out")
    config, rest = theirs["config"], {k: theirs[k] for k in ("model", "data")}
    for name, value in ours["config"].items():
        if config.get(name) != value:
            flag = name.replace("_", "-")
            raise InputError(
                f"--out {out} holds a run with --{flag} {config.get(name)}, not "
                f"{value}: give the same flags to go on, or another directory"
            )
    for name, value in rest.items():
        if value != ours[name]:
            raise InputError(
                f"--out {out} holds a run of another {name}: give another directory"
            )


@contextlib.contextmanager
def claimed(out: Path, ours: dict[str, Any]) -> Iterator[None]:
    """`claim_directory`, undone if the body fails and has left nothing there.

    Raises:
      InputError: as `claim_directory`.
    """
    file = out / "run.json"
    claim_directory(out, ours)
    try:
        yield
    except BaseException:
        if all(path.name[0] == "." for path in out.iterdir() if path != file):
            file.unlink()
            with contextlib.suppress(OSError):  # unless something hidden is there
                out.rmdir()
        raise


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
    with atomic_path(file) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(to_json(content, indent=1), "utf-8")
