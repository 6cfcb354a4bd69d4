"""The shell of evaluation: dictionaries of one model, side by side.

dictionaries, held-out text, prompts --jaxclt.evaluation.measures--> a row each
  --jaxclt.evaluation.report--> eval.json, rows.jsonl, table.md, plots

Another dictionary is added at its own cost: what was measured is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclt.clt.coder import Dictionary
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.errors import InputError
from jaxclt.evaluation.baselines import neuron_thresholds
from jaxclt.evaluation.concepts import load_pairs
from jaxclt.evaluation.judges import Judge
from jaxclt.evaluation.measures import EvalOptions, Measures, Stage
from jaxclt.evaluation.prompts import EvalText, graph_filter, pick_prompts
from jaxclt.io.model import Model
from jaxclt.replacement.agreement import predict
from jaxclt.runs.pace import logged
from jaxclt.text.prompts import Given
from jaxclt.trace.record import prompt_tokens

__all__ = ["EvalOptions", "Prompts", "choose_prompts", "evaluate"]

Prompts = Sequence[Given]

SEARCHED = 512  # windows at most in which prompts are looked for


def evaluate(
    model: Model,
    dictionaries: Sequence[Dictionary],
    text: EvalText,
    *,
    options: EvalOptions | None = None,
    prompts: Prompts | None = None,
    judge: Judge | None = None,
    out: Path | None = None,
    on_stage: Stage | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure dictionaries on the same text and prompts.

    Args:
      model: from `load_model`.
      dictionaries: from `load_dictionary`.
      text: from `read_eval_text`.
      options: how much to measure.
      prompts: of the graphs; None takes them from the text, see `choose_prompts`.
      judge: of the Sort and Contrastive Evals, from `jaxclt.evaluation.judges`; None
        leaves them out.
      out: directory to keep measures in; what is there already is not measured again.
      on_stage: progress, (what, done, of); to the log if not given.

    Returns:
      A row for each dictionary and baseline, and raw rows (one for each prompt or
      window).

    Raises:
      InputError: if there is no prompt to trace, or one or a dictionary does not fit.
    """
    options, on_stage = options or EvalOptions(), on_stage or logged()
    for i, prompt in enumerate(prompts or ()):
        try:
            prompt_tokens(model, prompt)
        except InputError as error:
            raise InputError(f"prompt {i} of --prompts: {error}") from None
    if prompts is None and options.graphs:
        prompts = choose_prompts(model, text, options, on_stage)
    if text.pairs is None:
        text = dataclasses.replace(text, pairs=load_pairs())
    rows: list[dict[str, Any]] = []
    raw: list[dict[str, Any]] = []

    def add(dictionary: Dictionary) -> None:
        one = Measures(
            model=model,
            dictionary=dictionary,
            text=text,
            prompts=list(prompts or ()),
            options=options,
            out=out,
            on_stage=on_stage,
        )
        row, lines = one.row(judge)
        rows.append(row)
        raw.extend(lines)

    for dictionary in dictionaries:
        add(dictionary)
    l0 = [row["l0"] for row in rows if row["kind"] != "neurons" and row["l0"] > 0]
    if l0 and options.baselines:
        typical = float(np.exp(np.mean(np.log(l0))))
        wanted = [factor * typical for factor in options.baselines]
        for threshold in neuron_thresholds(model, text.windows, wanted):
            add(NeuronDictionary(threshold=threshold, hash=model.hash))
    return rows, raw


def choose_prompts(
    model: Model,
    text: EvalText,
    options: EvalOptions,
    on_stage: Stage = lambda what, done, total: None,
) -> list[Sequence[int]]:
    """Prompts for graphs out of the text: token ids, drawn by the seed.

    Of a text the positions that pass the paper's filter (`graph_filter`); of a list of
    prompts any, unless the filter is asked for.

    Args:
      model: from `load_model`.
      text: from `read_eval_text`.
      options: how many, how long, which filter.
      on_stage: progress.

    Raises:
      InputError: if fewer than two are found.
    """
    key = jax.random.key(options.seed)
    strict = options.filter == "paper" or (
        options.filter == "auto" and not text.prompts
    )
    lengths = options.lengths
    token_WS = text.windows.token_WS
    if text.prompts:
        lengths = (1, token_WS.shape[1])
    size = min(token_WS.shape[1], lengths[1])
    order = np.asarray(jax.random.permutation(key, len(token_WS)))[:SEARCHED]
    token_WS, next_WS, ask_WS = (
        x_WS[order, :size] for x_WS in (token_WS, text.next_WS, text.ask_WS)
    )

    def picked(good_WS: np.ndarray) -> list[Sequence[int]]:
        return pick_prompts(token_WS, good_WS, options.graphs, key, lengths=lengths)

    found = [] if strict else picked(ask_WS)
    good_WS = np.zeros(token_WS.shape, bool)
    for start in range(0, len(token_WS) if strict else 0, 32):
        here = slice(start, start + 32)
        said_WS, sure_WS = predict(model.params, token_WS[here], cfg=model.cfg)
        good_WS[here] = ask_WS[here] & graph_filter(
            token_WS[here], said_WS, sure_WS, next_WS[here], text.count_V
        )
        found = picked(good_WS)
        on_stage("prompts of the paper's filter", len(found), options.graphs)
        if len(found) == options.graphs:
            break
    if len(found) < 2:
        raise InputError(
            f"{len(found)} prompts of the text pass the filter: give more --data, or "
            "--prompts FILE, or --filter none"
        )
    return found
