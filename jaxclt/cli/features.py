"""`jaxclt features`: what features respond to in text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from jaxclt.cli.common import answer, load, table
from jaxclt.cli.flags import AsJson, Debug, ModelName, TextSource
from jaxclt.cli.progress import Run
from jaxclt.dashboards.gather import FeatureOptions
from jaxclt.errors import check_at_least
from jaxclt.files.json_text import to_json

__all__ = ["FeaturesFlags", "run_features"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """What `jaxclt --help` shows before the options."""

    model: ModelName
    dictionary: Annotated[str, arg(metavar="D")]
    """Local directory in a known format, or hub id; or neurons, neurons:K,
    neurons@X."""
    data: TextSource
    out: Path
    """Directory to write to."""
    features: str = "all"
    """all; top:K, the K that fire most often; or a file: lines LAYER:FEATURE, a .json
    list of pairs, or a .npz with layer_U and feature_U."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesFlags(FeatureOptions, _Source):
    """What features respond to: examples from text, histograms, tokens they raise.

    Writes feature files that `jaxclt view --features` and other viewers read, and
    report.json. The same command resumes an interrupted run.
    """

    labels: str = ""
    """Let a chat model label every feature: http://HOST/v1#MODEL (OpenAI-compatible;
    key in OPENAI_API_KEY). Writes labels.json, each label beginning with "auto: "."""
    labels_budget: int | None = None
    """Tokens after which no more labels are asked for."""
    json: AsJson = False
    debug: Debug = False


def run_features(flags: FeaturesFlags, run: Run) -> None:
    """Gather, write, print."""
    from jaxclt.dashboards.gather import feature_dashboards
    from jaxclt.evaluation.http_client import Client, ClientOptions
    from jaxclt.evaluation.labels import automatic_labels
    from jaxclt.files.atomic import write_text
    from jaxclt.io.dictionary import LABELS

    check_at_least(1, labels_budget=flags.labels_budget)
    run.own(flags.out, makes="run")
    client = None
    if flags.labels:
        url, _, name = flags.labels.partition("#")
        options = ClientOptions(
            cache_dir=flags.out / "judge", max_tokens_total=flags.labels_budget
        )
        client = Client(url, name, options)
    model, dictionary = load(flags.model, flags.dictionary, run)
    units = {"files": "layers/s", "labels": "labels/s"}
    with run.stages(units=units) as stages:
        report, examples = feature_dashboards(
            model,
            dictionary,
            flags.data,
            flags.out,
            flags,
            features=flags.features,
            on_stage=stages,
        )
        if client is not None:
            labels = automatic_labels(
                client,
                examples,
                model.tokenizer.token_strings,
                on_label=lambda done, total: stages("labels", done, total),
            )
            text = to_json(labels, indent=0, ensure_ascii=False)
            write_text(flags.out / LABELS, text)
            report["labels"] = {"by": flags.labels, "n": len(labels)} | client.usage
    rate = report.get("tokens_per_second")
    rows = {
        "features": f"{report['features']:,}",
        "tokens": f"{report['tokens']:,}",
        "never active": f"{report['never_active']:.1%}",
        "mean frequency": f"{report['active_share']:.3%}",
        "tokens/s": "-" if rate is None else f"{rate:,.0f}",
        "seconds": f"{report['seconds']['all']:,.1f}",
        "files": f"{report['bytes']['features'] / 1e6:,.1f} MB",
    }
    where = f"features: {flags.out / 'features'}"
    answer(flags.json, report, table("features", rows), where)
