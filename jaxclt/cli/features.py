"""`jaxclt features`: what features respond to in text; registered in cli."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxclt.cli.compiled import use_compilation_cache
from jaxclt.cli.progress import Run, Stages, lines, long_command
from jaxclt.errors import check_at_least
from jaxclt.files.json_text import to_json

__all__ = ["FeaturesConfig", "run_features"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """What features respond to: examples from text, histograms, tokens they raise.

    Writes feature files that `jaxclt view --features` and other viewers read, and
    report.json. An interrupted run goes on by itself.
    """

    model: Annotated[str, tyro.conf.arg(metavar="M")]
    """Known name (see `jaxclt fetch --list`), local directory, GGUF file or hub id."""
    dictionary: Annotated[str, tyro.conf.arg(metavar="D")]
    """Local directory in a known format, or hub id; or neurons, neurons:K,
    neurons@X."""
    data: str
    """Text file, or folder of .txt, .md, .rst, .utf8 and .jsonl files; a .jsonl file of
    prompts, lines {"prompt": ...}; or a dataset on the hub,
    hub:NAME[@REVISION][?config=..&split=..&text=..]."""
    out: Path
    """Directory to write to."""
    features: str = "all"
    """all; top:K, the K that fire most often; or a file: lines LAYER:FEATURE, a .json
    list of pairs, or a .npz with layer_U and feature_U."""
    tokens: int = 1_000_000
    """Tokens of text to look at; first positions and special tokens do not count."""
    context: int = 256
    """Tokens of a window of text."""
    excerpt: int = 32
    """Tokens of an example, three quarters of them before its peak."""
    top: int = 16
    """Examples with the largest activations, of each feature."""
    drawn: int = 24
    """Examples drawn at random among the windows where a feature is active."""
    histogram_every: int = 8
    """Histograms are of one window in so many, counts and extremes of all."""
    labels: str = ""
    """Let a chat model label every feature: http://HOST/v1#MODEL (OpenAI-compatible;
    key in OPENAI_API_KEY). Writes labels.json, each label beginning with "auto: "."""
    labels_budget: int | None = None
    """Tokens after which nothing more is asked."""
    loose: bool = False
    """Also write one file a feature, features/NUMBER.json."""
    json: bool = False
    """Print the report as JSON on stdout."""
    debug: bool = False
    """Show tracebacks."""


@long_command
def run_features(config: FeaturesConfig, say: Console, run: Run) -> None:
    """Gather, write, print."""
    from jaxclt.dashboards.gather import check_options, feature_dashboards
    from jaxclt.evaluation.http_client import Client, ClientOptions
    from jaxclt.evaluation.labels import automatic_labels
    from jaxclt.files.atomic import atomic_path
    from jaxclt.io.dictionary import LABELS, load_dictionary
    from jaxclt.io.model import load_model

    check_options(
        tokens=config.tokens,
        context=config.context,
        excerpt=config.excerpt,
        top=config.top,
        drawn=config.drawn,
        histogram_every=config.histogram_every,
    )
    check_at_least(1, labels_budget=config.labels_budget)
    run.own(config.out, makes="run")
    client = None
    if config.labels:
        url, _, name = config.labels.partition("#")
        options = ClientOptions(
            cache_dir=config.out / "judge", max_tokens_total=config.labels_budget
        )
        client = Client(url, name, options)
    use_compilation_cache()
    model = load_model(
        config.model,
        progress=lines(say),
    )
    dictionary = load_dictionary(config.dictionary, model)
    units = {"files": "layers/s", "labels": "labels/s"}
    with Stages(say, units=units, look=run.look) as stages:
        report, examples = feature_dashboards(
            model,
            dictionary,
            config.data,
            config.out,
            features=config.features,
            tokens=config.tokens,
            context=config.context,
            excerpt=config.excerpt,
            top=config.top,
            drawn=config.drawn,
            histogram_every=config.histogram_every,
            loose=config.loose,
            on_stage=stages,
        )
        if client is not None:
            labels = automatic_labels(
                client,
                examples,
                model.tokenizer.token_strings,
                on_label=lambda done, total: stages("labels", done, total),
            )
            with atomic_path(config.out / LABELS) as temporary:
                text = to_json(labels, indent=0, ensure_ascii=False)
                temporary.write_text(text, encoding="utf-8")
            report["labels"] = {"by": config.labels, "n": len(labels)} | client.usage
    if config.json:
        print(to_json(report))  # noqa: T201
        return
    Console().print(_summary(report))
    Console().print(f"features: {config.out / 'features'}", soft_wrap=True)


def _summary(report: dict[str, Any]) -> Table:
    table = Table(title="features", show_header=False)
    rate = report.get("tokens_per_second")
    for name, value in {
        "features": f"{report['features']:,}",
        "tokens": f"{report['tokens']:,}",
        "never active": f"{report['never_active']:.1%}",
        "mean frequency": f"{report['active_share']:.3%}",
        "tokens/s": "-" if rate is None else f"{rate:,.0f}",
        "seconds": f"{report['seconds']['all']:,.1f}",
        "files": f"{report['bytes']['features'] / 1e6:,.1f} MB",
    }.items():
        table.add_row(name, Text(value))
    return table
