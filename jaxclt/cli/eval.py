"""`jaxclt eval`: dictionaries side by side."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.table import Table
from rich.text import Text
from tyro.conf import arg

from jaxclt.cli.common import answer, options, use_compilation_cache
from jaxclt.cli.flags import AsJson, Context, Debug, ModelName
from jaxclt.cli.progress import Run
from jaxclt.errors import InputError, check_at_least, check_positive

__all__ = ["EvalFlags", "run_eval"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalFlags:
    """Every measure of the paper, for one dictionary or several side by side.

    Writes eval.json, rows.jsonl (a line for each prompt and window), table.md with the
    paper's claims in words, and plots. The same command resumes an interrupted run.
    """

    model: ModelName
    dictionary: Annotated[tuple[str, ...], arg(metavar="D")]
    """One or more: neurons:k, neurons@x (whose write has at least the norm x), a
    bundled name, a local directory in a known format, or a hub id."""
    data: str = ""
    """Held-out text, as for `jaxclt train --data`; or a .jsonl file of prompts, lines
    {"prompt": ..., "answer": ...}. The bundled model brings its own."""
    out: Path = Path("out/eval")
    """Directory to write to."""
    prompts: Path | None = None
    """Prompts of the graphs, a .txt or .jsonl file as for `jaxclt sweep`; by default
    they are taken from the text."""
    filter: Literal["auto", "paper", "none"] = "auto"
    """Which prompts to take from the text. paper: the model is right with less than 80%
    confidence, the next token is rare and new; auto: paper for text, none for a file of
    prompts."""
    tokens: int = 8_192
    """Tokens of text for reconstruction, and to find examples of features in."""
    context: Context = 128
    agreement_tokens: int = 2_048
    """Tokens on which the replacement model is compared."""
    layer_tokens: int = 128
    """Tokens on which each layer alone is replaced; 0: none."""
    graphs: int = 16
    """Prompts to trace."""
    max_features: int = 512
    """Most feature nodes of a graph."""
    perturbed: int = 3
    """Prompts on which perturbations are followed through the layers."""
    baselines: tuple[float, ...] = (1.0, 4.0)
    """Also evaluate thresholded neurons, this many times as many of them active as the
    transcoders have features."""
    judge: str = "baseline"
    """Who sorts: baseline (naive Bayes, offline), local:M (a model, by probability),
    http://HOST/v1#MODEL (OpenAI-compatible; key in OPENAI_API_KEY), or none."""
    judge_budget: int | None = None
    """Tokens after which an address gets no more requests; run again to continue."""
    judge_per_minute: float | None = None
    """Most requests to an address per minute."""
    concepts: Path | None = None
    """Sentence pairs of the Contrastive Eval instead of the built-in ones."""
    sort: int = 200
    """Trials of the Sort Eval, and of its variant with similar features."""
    contrastive: int = 200
    """Trials of the Contrastive Eval."""
    seed: int = 0
    """Seed of everything drawn at random."""
    json: AsJson = False
    debug: Debug = False


def run_eval(flags: EvalFlags, run: Run) -> None:
    """Measure, write, print."""
    import jax

    from jaxclt.evaluation.claims import check_claims
    from jaxclt.evaluation.concepts import load_pairs
    from jaxclt.evaluation.evaluate import EvalOptions, evaluate
    from jaxclt.evaluation.http_client import ClientOptions
    from jaxclt.evaluation.judging import read_judge
    from jaxclt.evaluation.prompts import read_eval_text
    from jaxclt.evaluation.report import write_evaluation
    from jaxclt.io.bundled import bundled_text
    from jaxclt.io.dictionary import load_dictionary
    from jaxclt.io.model import load_model
    from jaxclt.trace.sweep import read_prompts

    measured = options(EvalOptions, flags)
    data = flags.data or bundled_text(flags.model)
    if not data:
        raise InputError("give --data: held-out text, or a .jsonl file of prompts")
    check_at_least(1, context=flags.context, judge_budget=flags.judge_budget)
    check_positive(judge_per_minute=flags.judge_per_minute)
    run.own(flags.out)
    prompts = None if flags.prompts is None else read_prompts(flags.prompts)
    pairs = load_pairs(flags.concepts)
    judge = None
    if flags.judge != "none":
        judge = read_judge(
            flags.judge,
            ClientOptions(
                cache_dir=flags.out / "judge",
                max_tokens_total=flags.judge_budget,
                requests_per_minute=flags.judge_per_minute,
            ),
        )
    started = time.perf_counter()
    use_compilation_cache()
    model = load_model(flags.model, progress=run.line)
    dictionaries = [load_dictionary(name, model) for name in flags.dictionary]
    text = read_eval_text(model, data, tokens=flags.tokens, context=flags.context)
    text = dataclasses.replace(text, pairs=pairs)
    with run.stages(unit="done/s") as stages:
        rows, raw = evaluate(
            model,
            dictionaries,
            text,
            options=measured,
            prompts=prompts,
            judge=judge,
            out=flags.out,
            on_stage=stages,
        )
    claims = check_claims(rows, raw, jax.random.key(flags.seed))
    meta = {
        "model": model.name,
        "data": str(data),
        "options": dataclasses.asdict(measured),
        "judge": flags.judge,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_evaluation(rows, raw, claims, flags.out, meta=meta)
    verdicts = "\n".join(f"{claim.verdict}: {claim.text}" for claim in claims)
    where = f"table: {flags.out / 'table.md'}"
    answer(flags.json, rows, _measures(model.name, rows), verdicts, where)


def _measures(name: str, rows: list[dict[str, Any]]) -> Table:
    """Dictionaries below each other, measures beside each other."""
    from jaxclt.evaluation.report import cells

    heads, body = cells(rows)
    made = Table(title=f"{name}: each row a measure, 95% intervals")
    made.add_column("")
    for line in body:
        made.add_column(Text(line[0]), overflow="fold")
    for i, head in enumerate(heads[1:], 1):
        made.add_row(head, *(Text(line[i]) for line in body))
    return made
