"""`jaxclt eval`: dictionaries side by side; registered in cli."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxclt.cli.compiled import use_compilation_cache
from jaxclt.cli.progress import Run, Stages, lines, long_command
from jaxclt.errors import InputError, check_at_least, check_positive
from jaxclt.files.json_text import to_json

__all__ = ["EvalConfig", "run_eval"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Every measure of the paper, for one dictionary or several side by side.

    Writes eval.json, rows.jsonl (a line for each prompt and window), table.md with the
    paper's claims in words, and plots. An interrupted run goes on by itself.
    """

    model: Annotated[str, tyro.conf.arg(metavar="M")]
    """Known name (see `jaxclt fetch --list`), local directory, GGUF file or hub id."""
    dictionary: Annotated[tuple[str, ...], tyro.conf.arg(metavar="D")]
    """One or more: neurons:k, neurons@x (written norm at least x), bundled name, local
    directory in a known format, or hub id."""
    data: str = ""
    """Held-out text, as for `jaxclt train --data`; or a .jsonl file of prompts, lines
    {"prompt": ..., "answer": ...}. The bundled model brings its own."""
    out: Path = Path("out/eval")
    """Directory to write to."""
    prompts: Path | None = None
    """Prompts of the graphs, a .txt or .jsonl as for `jaxclt sweep`; without it they
    are taken from the text."""
    filter: Literal["auto", "paper", "none"] = "auto"
    """Which prompts to take from the text. paper: the model is right with less than 80%
    confidence, the next token is rare and new; auto: so for text, none for prompts."""
    tokens: int = 8_192
    """Tokens of text for reconstruction, and to find examples of features in."""
    context: int = 128
    """Tokens of a window of text."""
    agreement_tokens: int = 2_048
    """Tokens on which the replacement model is compared."""
    layer_tokens: int = 128
    """Tokens on which each layer is replaced by itself; 0: none."""
    graphs: int = 16
    """Prompts to trace."""
    max_features: int = 512
    """Most feature nodes of a graph."""
    perturbed: int = 3
    """Prompts on which perturbations are followed through the layers."""
    baselines: tuple[float, ...] = (1.0, 4.0)
    """Add thresholded neurons with so many times the active features of the
    transcoders."""
    judge: str = "baseline"
    """Who sorts: baseline (a naive Bayes, offline), local:M (a model, by probability),
    http://HOST/v1#MODEL (OpenAI-compatible; key in OPENAI_API_KEY), or none."""
    judge_budget: int | None = None
    """Tokens after which an address is asked nothing more; run again to go on."""
    judge_per_minute: float | None = None
    """Requests to an address per minute at most."""
    concepts: Path | None = None
    """Sentence pairs of the Contrastive Eval instead of the built-in ones."""
    sort: int = 200
    """Trials of the Sort Eval, and of its variant with similar features."""
    contrastive: int = 200
    """Trials of the Contrastive Eval."""
    seed: int = 0
    """Of everything drawn."""
    json: bool = False
    """Print the rows as JSON on stdout."""
    debug: bool = False
    """Show tracebacks."""


@long_command
def run_eval(config: EvalConfig, say: Console, run: Run) -> None:
    """Measure, write, print."""
    import jax

    from jaxclt.evaluation.claims import check_claims
    from jaxclt.evaluation.concepts import load_pairs
    from jaxclt.evaluation.evaluate import EvalOptions, evaluate
    from jaxclt.evaluation.http_client import ClientOptions
    from jaxclt.evaluation.judging import read_judge
    from jaxclt.evaluation.prompts import read_eval_text
    from jaxclt.evaluation.report import cells, write_evaluation
    from jaxclt.io.bundled import bundled_text
    from jaxclt.io.dictionary import load_dictionary
    from jaxclt.io.model import load_model
    from jaxclt.trace.sweep import read_prompts

    names = {field.name for field in dataclasses.fields(EvalOptions)}
    options = EvalOptions(
        **{k: v for k, v in dataclasses.asdict(config).items() if k in names}
    )
    data = config.data or bundled_text(config.model)
    if not data:
        raise InputError("give --data: held-out text, or a .jsonl file of prompts")
    check_at_least(1, context=config.context, judge_budget=config.judge_budget)
    check_positive(judge_per_minute=config.judge_per_minute)
    run.own(config.out)
    use_compilation_cache()
    prompts = None if config.prompts is None else read_prompts(config.prompts)
    pairs = load_pairs(config.concepts)
    judge = None
    if config.judge != "none":
        judge = read_judge(
            config.judge,
            ClientOptions(
                cache_dir=config.out / "judge",
                max_tokens_total=config.judge_budget,
                requests_per_minute=config.judge_per_minute,
            ),
        )
    started = time.perf_counter()
    model = load_model(
        config.model,
        progress=lines(say),
    )
    dictionaries = [load_dictionary(name, model) for name in config.dictionary]
    text = read_eval_text(model, data, tokens=config.tokens, context=config.context)
    text = dataclasses.replace(text, pairs=pairs)
    with Stages(say, unit="done/s", look=run.look) as stages:
        rows, raw = evaluate(
            model,
            dictionaries,
            text,
            options=options,
            prompts=prompts,
            judge=judge,
            out=config.out,
            on_stage=stages,
        )
    claims = check_claims(rows, raw, jax.random.key(config.seed))
    meta = {
        "model": model.name,
        "data": str(data),
        "options": dataclasses.asdict(options),
        "judge": config.judge,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_evaluation(rows, raw, claims, config.out, meta=meta)
    if config.json:
        print(to_json(rows))  # noqa: T201
        return
    heads, body = cells(rows)
    table = Table(title=f"{model.name}: each row a measure, 95% intervals")
    table.add_column("")
    for line in body:
        table.add_column(Text(line[0]), overflow="fold")
    for i, head in enumerate(heads[1:], 1):
        table.add_row(head, *(Text(line[i]) for line in body))
    console = Console()
    console.print(table)
    for claim in claims:
        console.print(f"{claim.verdict}: {claim.text}", markup=False, soft_wrap=True)
    console.print(f"table: {config.out / 'table.md'}", markup=False, soft_wrap=True)
