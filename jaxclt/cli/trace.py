"""`jaxclt trace`: a prompt becomes a graph and its page."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from jaxclt.cli.attribution import AttributionFlags
from jaxclt.cli.common import answer, asked, page_line, table
from jaxclt.cli.progress import Run, progress
from jaxclt.cli.told import told
from jaxclt.cli.validate import validate_opened
from jaxclt.errors import InputError, check_at_least

if TYPE_CHECKING:
    import numpy as np

    from jaxclt.clt.coder import Dictionary
    from jaxclt.graph.attribute import AttributeConfig
    from jaxclt.graph.memory import MemoryPlan
    from jaxclt.io.model import Model
    from jaxclt.patching.subject import Reopened
    from jaxclt.text.prompts import Prompt
    from jaxclt.text.windows import TokenWindows
    from jaxclt.trace.prompt import Traced

__all__ = ["TraceFlags", "heading", "run_trace"]

_CONTEXT = 128  # tokens of a window of text that examples are looked for in


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceFlags(AttributionFlags):
    """Attribution graph of one prompt, written to a directory with a viewer page.
    After Ctrl-C or SIGTERM it is written with the features attributed so far; the rest
    counts as unexplored."""

    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """Text whose next token is explained."""
    out: Path
    """Directory to write graph.npz, report.json, graph.json and index.html to."""
    targets: tuple[str, ...] = ()
    """What to explain instead of the most probable tokens. A text that is one token is
    that token (mind leading spaces); id:N is token number N. "diff: Paris| London" is
    a difference of two logits, "diff:" that of answer and foil; "prob: Paris" and
    "logp: Paris" a probability, to first order; any of these and a token with "@P"
    after position P instead of the last; "top:P" for the most probable tokens there;
    "feature:LAYER:P:INDEX" for a feature; "vector:SITE@P:FILE.npz" for a direction
    `vec` at out, resid_mid:L, normalized:L, mlp_in:L, mlp_out:L, resid_post:L,
    resid_pre:L or attn_in:L. "2*..." gives a weight, otherwise all count the same;
    tokens alone count by probability."""
    foil: str | None = None
    """Token that the answer is compared with; it becomes the second target. By default
    the runner-up is the foil. With --targets diff: their difference is the target."""
    save: Literal["auto", "full", "pruned"] = "auto"
    """What graph.npz holds: `auto` is the whole graph up to 8 MB, else what pruning
    keeps, with total effects as in the whole one."""
    story: bool = True
    """Run the model without each token, group the most influential features, ablate the
    groups, and say in words what came of it."""
    counterfactual: str | None = None
    """Prompt to compare with, of as many tokens or one that begins or ends alike: the
    page and the story rank features by influence times how much their activation
    changes from there."""
    examples: Annotated[str | None, arg(metavar="TEXT")] = None
    """Text that the shown features are looked for in, as `jaxclt features --data` takes
    it: the page then has examples of each, and labels them by what they respond to."""
    example_tokens: int = 5_000
    """Tokens of that text."""
    attention: int = 20
    """Take the scores of this many of the strongest attention cells (a head that
    attends from one token to another) apart into pairs of nodes: attention.json, and
    the page's attention tab. 0: none."""
    prefilter: Path | None = None
    """Directory that `jaxclt globals` wrote: only features that its links shortlist may
    become nodes. What is left out counts as unexplored, and the scores' bounds say
    so."""
    prefilter_size: int | None = None
    """Features on that shortlist; by default twice max-features."""
    dry_run: bool = False
    """Say how much memory the graph needs and how it would be computed, then stop."""
    assume: str = ""
    """With --dry-run: plan for a prompt of tokens=N with active=N features at each
    token and layer, from a dictionary of features=N per layer that write to span=N
    layers, on an accelerator next to host=GB of memory (without host: on a CPU). Only
    config.json of --model is read; the prompt is ignored."""
    validate: bool = False
    """Compare the graph with patches of the model; adds validation.json and .md."""

    @property
    def contrasted(self) -> tuple[str, ...]:
        """The foil as a target's text."""
        return () if self.foil is None else (f"foil:{self.foil}",)


def run_trace(flags: TraceFlags, run: Run) -> None:
    """Trace, write, print."""
    from jaxclt.global_weights.files import load_globals
    from jaxclt.patching.subject import Reopened
    from jaxclt.trace.files import write_trace
    from jaxclt.trace.prompt import plan_trace, trace_prompt

    if not flags.prompt.strip():
        raise InputError("the prompt is empty: give some text to trace")
    check_at_least(
        1, prefilter_size=flags.prefilter_size, example_tokens=flags.example_tokens
    )
    if flags.assume:
        _plan_assumed(flags)
        return
    prompt = asked(flags.prompt, chat=flags.chat, bos=flags.bos)
    config = flags.config()
    if not flags.dry_run:
        run.own(flags.out, makes="trace")
    started = time.perf_counter()
    model, dictionary = flags.load(run, plan=flags.dry_run)
    run.look()
    loaded = time.perf_counter() - started
    other, longer = _counterfactual(flags, model, prompt)
    text = _text(flags, model)
    if flags.dry_run:
        planned = plan_trace(model, dictionary, prompt, config=config)
        _show_plan(*planned, config, flags.json)
        return
    prefilter = None
    if flags.prefilter is not None:
        size = flags.prefilter_size or 2 * flags.max_features
        prefilter = load_globals(flags.prefilter), size
    with progress(run.say, "attributing", "rows/s") as on_rows:
        traced = trace_prompt(
            model,
            dictionary,
            prompt,
            targets=(*flags.targets, *flags.contrasted),
            prefilter=prefilter,
            on_rows=on_rows,
            stop=run.stop,
            config=config,
        )
    traced.timing["load"] = loaded
    stopped = "stopped" in traced.work
    found = change_A = None
    if not stopped:
        found, change_A = _story(flags, model, dictionary, traced, other)
    report = write_trace(
        traced, flags.out, save=flags.save, told=found, change_A=change_A
    )
    verdict = []
    if not stopped:
        opened = Reopened(
            model=model, dictionary=dictionary, graph=traced.graph, report=report
        )
        _examples(flags.out, run, opened, text)
        verdict = _validated(flags, run, opened, other, longer)
    paths = "\n".join(_path_lines(report))
    small = _small_changes(report["derivative"])
    page = page_line(flags.out / "index.html")
    shown = (*told(report), _summary(report), paths, small, *verdict, page)
    answer(flags.json, report, *shown)
    if stopped:
        sys.exit(run.stop.status)


def _validated(
    flags: TraceFlags,
    run: Run,
    opened: Reopened,
    other: Prompt | None,
    longer: int,
) -> list[Text]:
    """What came of a validation, if one is asked for.

    `other`, the counterfactual prompt, has `longer` tokens more than the prompt.
    """
    if not flags.validate:
        return []
    if longer:
        run.warn(
            "The counterfactual prompt has another number of tokens: in the "
            "validation, what is not shown is held at zero."
        )
    reference = None if longer else other
    report = validate_opened(
        opened, flags.out, run, foil=flags.foil, reference=reference
    )
    return [Text(report["verdict"])]


def _text(flags: TraceFlags, model: Model) -> TokenWindows | None:
    """The text that examples are looked for in, if there is one."""
    if flags.examples is None:
        return None
    from jaxclt.text.windows import read_windows

    context = min(_CONTEXT, model.cfg.n_ctx)
    return read_windows(
        model, flags.examples, tokens=flags.example_tokens, context=context
    )


def _examples(out: Path, run: Run, opened: Reopened, text: TokenWindows | None) -> None:
    """Examples of the shown features from a text, put into the page."""
    if text is None:
        return
    from jaxclt.dashboards.gather import feature_dashboards
    from jaxclt.trace.pages import EXAMPLES, write_page

    graph = opened.graph
    shown = graph.pruning.keep_N[graph.feature_cols].nonzero()[0].tolist()
    places = {(int(graph.layer_A[a]), int(graph.feature_A[a])) for a in shown}
    shutil.rmtree(out / EXAMPLES, ignore_errors=True)  # of the graph before
    with run.stages(units={"files": "layers/s"}) as stages:
        feature_dashboards(
            opened.model,
            opened.dictionary,
            text,
            out / EXAMPLES,
            features=sorted(places),
            on_stage=stages,
        )
    write_page(out)


def _counterfactual(
    flags: TraceFlags, model: Model, prompt: Prompt
) -> tuple[Prompt | None, int]:
    """The prompt to compare with, if there is one, and how many tokens it has more."""
    if flags.counterfactual is None:
        return None, 0
    from jaxclt.story.change import check_counterfactual

    other = asked(flags.counterfactual, chat=flags.chat, bos=flags.bos)
    return other, check_counterfactual(model, prompt, other)


def _story(
    flags: TraceFlags,
    model: Model,
    dictionary: Dictionary,
    traced: Traced,
    other: Prompt | None,
) -> tuple[dict[str, Any] | None, np.ndarray | None]:
    """What is told of a graph that explains tokens, and what changes from a prompt."""
    from jaxclt.story.change import change_from
    from jaxclt.story.tell import story
    from jaxclt.trace.target_text import read_token

    graph, change_A = traced.graph, None
    if other is not None:
        change_A = change_from(model, dictionary, graph, other)
    if not flags.story or not graph.is_next_token[0]:
        return None, change_A
    started = time.perf_counter()
    against = None if flags.foil is None else read_token(model, flags.foil)
    found = story(model, dictionary, graph, foil=against, change_A=change_A)
    traced.timing["story"] = time.perf_counter() - started
    return found.to_json(), change_A


def _path_lines(report: dict[str, Any]) -> list[str]:
    readings = {"strongest paths:": report}
    if "response" in report:
        readings["strongest paths by response:"] = report["response"]
    return [
        line
        for title, said in readings.items()
        for line in (title, *(f"  {path}" for path in said["paths"]))
    ]


def _plan_assumed(flags: TraceFlags) -> None:
    from jaxclt.graph.attribute import AttributeConfig
    from jaxclt.graph.compute import memory_budget
    from jaxclt.trace.assume import plan_assumed, read_assumed

    if not flags.dry_run:
        raise InputError("--assume goes with --dry-run: no graph can be made of it")
    config = AttributeConfig(
        max_features=flags.max_features,
        memory_gb=flags.memory,
        response=flags.response,
        attention=flags.attention,
    )
    assumed, budget = read_assumed(flags.assume), memory_budget(config)
    plan, n_active = plan_assumed(flags.model, assumed, config=config, budget=budget)
    _show_plan(plan, assumed.tokens, n_active, config, flags.json)


def _show_plan(
    plan: MemoryPlan,
    n_tokens: int,
    n_active: int,
    config: AttributeConfig,
    as_json: bool,
) -> None:
    from jaxclt.graph.compute import memory_budget

    result = {
        "tokens": n_tokens,
        "features_active": n_active,
        "max_features": config.max_features,
        "memory_gb": {k: round(v / 1e9, 3) for k, v in plan.bytes.items()},
        "host_gb": {k: round(v / 1e9, 3) for k, v in plan.host_bytes.items()},
        "total_gb": round(plan.total / 1e9, 3),
        "budget_gb": round(memory_budget(config) / 1e9, 3),
        "patterns": "kept" if plan.keep_patterns else "recomputed",
        "sources": "packed" if plan.packed else "gathered",
        "pool": plan.pool,
        "chunk_size": plan.chunk_size,
    }
    rows = {}
    for name, value in result.items():
        if isinstance(value, dict):
            host = "host: " if name == "host_gb" else ""
            rows |= {f"  {host}{part}": f"{gb:.3f} GB" for part, gb in value.items()}
        elif name.endswith("_gb"):
            rows[name.removesuffix("_gb")] = f"{value:.3f} GB"
        else:
            rows[name.replace("_", " ")] = f"{value}"
    answer(as_json, result, table("dry run: nothing was attributed", rows))


def _unexplored(share: float | None, full: dict[str, float]) -> str:
    """The bound, and what it means for the scores."""
    if share is None:
        return "not stated by this convention"
    if share == 0:
        return "none: the graph is exact"
    return (
        f"{share:.2%}: replacement is at most {full['replacement_at_most']:.3f}, "
        f"completeness {full['completeness_at_most']:.3f}"
    )


def _heads_lines(attention: dict[str, Any] | None) -> dict[str, str]:
    """The strongest cells in words, and how exactly their scores add up."""
    if attention is None or not attention["cells"]:
        return {}
    texts = "\n".join(cell["text"] for cell in attention["cells"][:3])
    error = f"{attention['max_relative_error']:.1e}"
    return {"heads that matter": texts, "score error (max)": error}


_HEADING = 120  # characters


def heading(prompt: str) -> str:
    """A prompt on one line; of a long one its end, which the graph explains."""
    line = prompt.replace("\n", "⏎")
    return line if len(line) <= _HEADING else "…" + line[1 - _HEADING :]


def _small_changes(found: dict[str, Any]) -> str:
    """How total effects compare with the model's derivative, in a sentence."""

    def said(agreement: dict[str, Any]) -> list[str]:
        rank, sign = agreement["spearman"], agreement["sign"]
        stated = "not defined" if rank is None else f"{rank:.2f}"
        return [stated, "none" if sign is None else f"{sign:.0%}"]

    rank, sign = said(found)
    response = ""
    if "by_response" in found:
        response = f" (by response {', '.join(said(found['by_response']))})"
    return (
        "in the model, small changes: the graph's total effects agree with the model's "
        f"own derivative: Spearman {rank}, sign {sign}{response}"
    )


def _pair(scores: dict[str, Any], name: str) -> str:
    return f"{scores['full'][name]:.3f} (shown {scores['pruned'][name]:.3f})"


def _by_response(said: dict[str, Any]) -> dict[str, str]:
    """Scores of the other reading, and what changes go through."""
    scores, parts = said["scores"], dict(said["parts"]["effects"])
    rows = {f"{x}, by response": _pair(scores, x) for x in _SCORES}
    if (left := parts.pop("left")) is not None:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in parts.items())
        rows["changes go by"] = f"{shares}; {left:.0%} is left as they cancel"
    return rows


_SCORES = ("replacement", "completeness")


def _summary(report: dict[str, Any]) -> Table:
    """What a user wants to know first, as a table."""
    top = ", ".join(f"{t!r} {p:.2f}" for t, p in report["top_tokens"][:3])
    scores, full = report["scores"], report["scores"]["full"]
    graph, proof = report["graph"], report["certificate"]
    stopped = ", stopped before the rest" if report["work"].get("stopped") else ""

    made = table(
        Text(heading(report["prompt"])),
        {
            "top tokens": top,
            "features": f"{graph['features_attributed']:,} of "
            f"{graph['features_active']:,} active{stopped}",
            "unexplored influence": _unexplored(graph["unexplored_influence"], full),
            "shown": f"{graph['kept_nodes']:,} nodes, {graph['kept_edges']:,} edges",
            "replacement score": _pair(scores, "replacement"),
            "completeness": _pair(scores, "completeness"),
            "mean path length": f"{full['mean_path_length']:.2f}",
            **(_by_response(report["response"]) if "response" in report else {}),
            "row error (max)": f"{proof['max_relative_row_error']:.1e}",
            **_heads_lines(report.get("attention")),
            "seconds": ", ".join(f"{k} {v:.1f}" for k, v in report["timing_s"].items()),
            "peak memory": f"{report['environment']['peak_memory_gb']:.1f} GB",
        },
    )
    for target in report.get("targets", ()):
        layer = "output" if target["layer"] is None else f"layer {target['layer']}"
        place = f"{target['label']!r} at position {target['pos']}, {layer}"
        what = f"{place}: {target['readout']:.4g}, weight {target['weight']:.3g}"
        made.add_row("target", Text(what))
    return made
