"""`jaxclt globals`: virtual weights and how text uses them."""

from __future__ import annotations

import dataclasses
import re
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.table import Table
from tyro.conf import arg

from jaxclt.cli.common import answer, load, page_line, table
from jaxclt.cli.flags import AsJson, Context, Debug, ModelName, TextSource
from jaxclt.cli.progress import Run
from jaxclt.errors import InputError, check_at_least

if TYPE_CHECKING:
    from jaxclt.global_weights.files import SavedGlobals

__all__ = ["GlobalsFlags", "run_globals"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalsFlags:
    """Weights between features that hold for any prompt, and which of them text uses.

    Writes globals.npz (the strongest links), statistics.npz (co-activation sums),
    report.json and the page index.html. The same command resumes an interrupted run.
    """

    model: ModelName
    dictionary: Annotated[str, arg(metavar="D")]
    """Local directory in a known format, or hub id; not neurons."""
    data: TextSource = ""
    out: Path
    """Directory to write to."""
    features: str = "top:4096"
    """top:K, the K that fire most often; all (pairs that ever fire together are kept,
    sparsely); or a file: lines LAYER:FEATURE, a .json list of pairs, or a .npz with
    layer_U and feature_U."""
    tokens: int = 200_000
    """Tokens of text to look at; first positions and special tokens do not count."""
    context: Context = 256
    top: int = 32
    """Links kept: this many inputs and outputs of every feature by each of |V|, |ERA|
    and |TWERA|."""
    by: Literal["virtual", "era", "twera", "era_norm", "twera_norm"] = "twera"
    """What the links are ordered by; _norm: with the target's norm denominator in every
    term, which makes ERA exact where encoders read after the norm."""
    heads: tuple[str, ...] = ()
    """LAYER:HEAD: also gather the sums in statistics.npz for paths through this
    head."""
    shard: str = "0/1"
    """I/N: only every N-th window from the I-th (from 0) on, for several machines; give
    the same --features file to all."""
    merge: tuple[Path, ...] = ()
    """Directories of shards, whose statistics are joined instead of reading --data."""
    json: AsJson = False
    debug: Debug = False


def run_globals(flags: GlobalsFlags, run: Run) -> None:
    """Gather, rank, write, print."""
    from jaxclt.global_weights import circuit, gather, views
    from jaxclt.global_weights.files import load_statistics
    from jaxclt.global_weights.statistics import merge_coactivation

    heads = _heads(flags.heads)
    shard = _shard(flags.shard)
    check_at_least(1, tokens=flags.tokens, context=flags.context, top=flags.top)
    if bool(flags.data) == bool(flags.merge):
        raise InputError("give --data TEXT, or --merge with directories of shards")
    run.own(flags.out, makes="globals")
    model, dictionary = load(flags.model, flags.dictionary, run)
    started = time.perf_counter()
    stages = run.stages(units={"tokens of features": "layers/s"})
    if flags.merge:
        parts = [load_statistics(x / "statistics.npz") for x in flags.merge]
        for place, (_, more) in zip(flags.merge, parts, strict=True):
            if more.get("identity", {}).get("dictionary") != dictionary.hash:
                raise InputError(
                    f"--merge {place}: its statistics are of another dictionary; give "
                    "the one it was made with"
                )
        statistics = merge_coactivation(*(found for found, _ in parts))
    else:
        with stages:
            statistics = gather.coactivation(
                model,
                dictionary,
                flags.data,
                features=flags.features,
                tokens=flags.tokens,
                context=flags.context,
                heads=heads,
                shard=shard,
                state=flags.out,
                on_stage=stages,
            )
    seconds = time.perf_counter() - started
    weights = circuit.global_weights(model, dictionary, statistics, kind=flags.by)
    run.look()
    with stages:
        found = views.write_globals(
            model,
            dictionary,
            weights,
            flags.out,
            top=flags.top,
            meta={
                "data": flags.data or [str(x) for x in flags.merge],
                "seconds": round(seconds, 2),
            },
            on_layer=partial(stages, "tokens of features"),
        )
    meta = {k: v for k, v in found.meta.items() if k != "token_text"}
    page = page_line(flags.out / "index.html")
    answer(flags.json, meta, _summary(meta, found), page)


def _summary(meta: dict[str, Any], found: SavedGlobals) -> Table:
    share = meta["interference"]
    rows = {
        "features": f"{meta['features']:,}, {share['pairs']:,} pairs",
        "tokens": f"{meta['tokens']:,}",
        "links": f"{meta['links']:,}",
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
    return table("global weights", rows)


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
