"""`jaxclt globals`: virtual weights and how text uses them; registered in cli."""

from __future__ import annotations

import dataclasses
import re
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxclt.cli.compiled import use_compilation_cache
from jaxclt.cli.progress import Run, Stages, lines, long_command
from jaxclt.errors import InputError, check_at_least
from jaxclt.files.json_text import to_json

if TYPE_CHECKING:
    from jaxclt.global_weights.files import SavedGlobals

__all__ = ["GlobalsConfig", "run_globals"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalsConfig:
    """Weights between features whatever the prompt, and which of them text uses.

    Writes globals.npz (the strongest links), statistics.npz (co-activation sums),
    report.json and the page index.html. An interrupted run goes on by itself.
    """

    model: Annotated[str, tyro.conf.arg(metavar="M")]
    """Known name (see `jaxclt fetch --list`), local directory, GGUF file or hub id."""
    dictionary: Annotated[str, tyro.conf.arg(metavar="D")]
    """Local directory in a known format, or hub id; not neurons."""
    data: str = ""
    """Text file, or folder of .txt, .md, .rst, .utf8 and .jsonl files; a .jsonl file of
    prompts, lines {"prompt": ...}; or a dataset on the hub,
    hub:NAME[@REVISION][?config=..&split=..&text=..]."""
    out: Path
    """Directory to write to."""
    features: str = "top:4096"
    """top:K, the K that fire most often; all (pairs that ever fire together are kept,
    sparsely); or a file: lines LAYER:FEATURE, a .json list of pairs, or a .npz with
    layer_U and feature_U."""
    tokens: int = 200_000
    """Tokens of text to look at; first positions and special tokens do not count."""
    context: int = 256
    """Tokens of a window of text."""
    top: int = 32
    """Links kept: so many inputs and outputs of every feature by |V|, |ERA| and |TWERA|
    each."""
    by: Literal["virtual", "era", "twera", "era_norm", "twera_norm"] = "twera"
    """What the links are ordered by; _norm: with the target's norm denominator in every
    term, which makes ERA exact where encoders read after the norm."""
    heads: tuple[str, ...] = ()
    """LAYER:HEAD: also gather statistics.npz's sums for paths through this head."""
    shard: str = "0/1"
    """I/N: only every N-th window from the I-th (from 0) on, for several machines; give
    the same --features file to all."""
    merge: tuple[Path, ...] = ()
    """Directories of shards, whose statistics are joined instead of reading --data."""
    json: bool = False
    """Print the result as JSON on stdout."""
    debug: bool = False
    """Show tracebacks."""


@long_command
def run_globals(config: GlobalsConfig, say: Console, run: Run) -> None:
    """Gather, rank, write, print."""
    from jaxclt.global_weights import circuit, gather, views
    from jaxclt.global_weights.files import load_statistics
    from jaxclt.global_weights.statistics import merge
    from jaxclt.io.dictionary import load_dictionary
    from jaxclt.io.model import load_model

    heads = _heads(config.heads)
    shard = _shard(config.shard)
    check_at_least(1, tokens=config.tokens, context=config.context, top=config.top)
    if bool(config.data) == bool(config.merge):
        raise InputError("give --data TEXT, or --merge with directories of shards")
    run.own(config.out, makes="globals")
    use_compilation_cache()
    model = load_model(
        config.model,
        progress=lines(say),
    )
    dictionary = load_dictionary(config.dictionary, model)
    started = time.perf_counter()
    stages = Stages(say, units={"tokens of features": "layers/s"}, look=run.look)
    if config.merge:
        parts = [load_statistics(x / "statistics.npz") for x in config.merge]
        for place, (_, more) in zip(config.merge, parts, strict=True):
            if more.get("identity", {}).get("dictionary") != dictionary.hash:
                raise InputError(
                    f"--merge {place}: its statistics are of another dictionary; give "
                    "the one it was made with"
                )
        statistics = merge(*(found for found, _ in parts))
    else:
        with stages:
            statistics = gather.coactivation(
                model,
                dictionary,
                config.data,
                features=config.features,
                tokens=config.tokens,
                context=config.context,
                heads=heads,
                shard=shard,
                state=config.out,
                on_stage=stages,
            )
    seconds = time.perf_counter() - started
    weights = circuit.global_weights(model, dictionary, statistics, kind=config.by)
    run.look()
    with stages:
        found = views.write_globals(
            model,
            dictionary,
            weights,
            config.out,
            top=config.top,
            meta={
                "data": config.data or [str(x) for x in config.merge],
                "seconds": round(seconds, 2),
            },
            on_layer=partial(stages, "tokens of features"),
        )
    told = {k: v for k, v in found.meta.items() if k != "token_text"}
    if config.json:
        print(to_json(told))  # noqa: T201
        return
    Console().print(_summary(told, found))
    Console().print(f"page: {(config.out / 'index.html').resolve().as_uri()}")


def _summary(told: dict[str, Any], found: SavedGlobals) -> Table:
    table = Table(title="global weights", show_header=False)
    share = told["interference"]
    rows = {
        "features": f"{told['features']:,}, {share['pairs']:,} pairs",
        "tokens": f"{told['tokens']:,}",
        "links": f"{told['links']:,}",
        "pairs that never fire together": f"{share['never']:.1%}",
    }
    for line in share["largest"]:
        name = f"of the largest {line['share']:.2%} of |V|"
        rows[name] = f"{line['never']:.1%} of {line['pairs']:,}"
    for row in found.links.rows()[:5]:
        source = f"{row['source_layer']}:{row['source_feature']}"
        name = f"{source} -> {row['target_layer']}:{row['target_feature']}"
        rows[name] = (
            f"TWERA {row['twera']:.3g}, ERA {row['era']:.3g}, V {row['virtual']:.3g}, "
            f"together on {row['coactivation']:.2%}"
        )
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _heads(texts: tuple[str, ...]) -> list[tuple[int, int]]:
    heads = []
    for text in texts:
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
        if match is None:
            raise InputError(f"--heads {text}: write LAYER:HEAD, for example 5:3")
        heads.append((int(match[1]), int(match[2])))
    return heads


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise InputError(f"--shard {text}: write I/N with I from 0 to N - 1")
    return int(match[1]), int(match[2])
