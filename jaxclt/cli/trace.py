"""`jaxclt trace` and `jaxclt sweep`: configs and runners; registered in cli."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxclt.cli.compiled import use_compilation_cache
from jaxclt.cli.patch import validate_opened
from jaxclt.cli.progress import Run, lines, long_command, progress
from jaxclt.errors import InputError, check_at_least
from jaxclt.files.json_text import to_json

if TYPE_CHECKING:
    from jaxclt.clt.coder import Dictionary
    from jaxclt.graph.attribute import AttributeConfig
    from jaxclt.graph.memory import MemoryPlan
    from jaxclt.io.model import Model
    from jaxclt.text.prompts import Prompt

__all__ = ["SweepConfig", "TraceConfig", "heading", "run_sweep", "run_trace"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Attribution:
    """What trace and sweep have in common."""

    model: Annotated[str, tyro.conf.arg(metavar="M")]
    """Known name (see `jaxclt fetch --list`), local directory, GGUF file or hub id."""
    dictionary: Annotated[str, tyro.conf.arg(metavar="D")]
    """neurons, neurons:K or neurons@X, the model's own (all; the K strongest of every
    token; those that write at least X); a bundled name; a local directory
    (circuit-tracer, GemmaScope, SAELens, sparsify and more formats); or a hub id
    organisation/name[//folder][@revision]."""
    max_features: int = 8192
    """Most feature nodes; the most influential ones are taken."""
    tolerance: float = 0.02
    """Stop adding features when less than this share of influence is unexplored; 0 adds
    all up to max-features. Not used with --compat circuit-tracer."""
    node_threshold: float = 0.8
    """Share of the influence that the shown nodes hold."""
    edge_threshold: float = 0.98
    """Share of the edge strength that the shown edges hold."""
    heads: int = 0
    """List the last attention heads of this many of the strongest shown edges."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Put a beginning-of-sequence token first; auto: as the model's tokenizer does."""
    chat: bool = False
    """A prompt is what the user says: put the model's own chat template around it, up
    to where the assistant answers."""
    compat: Literal["none", "circuit-tracer"] = "none"
    """circuit-tracer's conventions: a first token always, no features or errors there,
    its pruning and its completeness score."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; a graph is exact in float32."""
    precision: Literal["highest", "high", "default"] = "highest"
    """Of matmuls on accelerators; highest is full float32."""
    memory: float | None = None
    """Most memory to use, GB (of each accelerator, if there are any); what is free if
    not given. Graphs are fitted to it."""
    devices: int | None = None
    """How many accelerators share the rows of a graph; all if not given."""
    shard: int | None = None
    """Split the model's weights over this many devices, where one cannot hold them."""
    json: bool = False
    """Print the result as JSON on stdout."""
    debug: bool = False
    """Show tracebacks."""

    @property
    def environment(self) -> dict[str, Any]:
        """Settings that the report lists with the machine's."""
        return {"dtype": self.dtype, "precision": self.precision}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceConfig(_Attribution):
    """Attribution graph of one prompt, written to a directory with a viewer page.
    Ctrl-C or SIGTERM writes it with the features attributed so far, all else as
    unexplored."""

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
    """Text whose next token is explained."""
    out: Path
    """Directory to write graph.npz, report.json, graph.json and index.html to."""
    targets: tuple[str, ...] = ()
    """What to explain instead of the most probable tokens. A text that is one token is
    that token (mind leading spaces); id:N is token number N. "diff: Paris| London" is
    a difference of two logits; "prob: Paris" and "logp: Paris" a probability, to first
    order; any of these and a token with "@P" after position P instead of the last;
    "top:P" for the most probable tokens there; "feature:LAYER:P:INDEX" for a feature;
    "vector:SITE@P:FILE.npz" for a direction `vec` at out, resid_mid:L, normalized:L,
    mlp_in:L, mlp_out:L, resid_post:L, resid_pre:L or attn_in:L. "2*..." gives a weight,
    otherwise all count the same; tokens alone count by probability."""
    save: Literal["auto", "full", "pruned"] = "auto"
    """What graph.npz holds; auto is the full graph up to 512 MB."""
    prefilter: Path | None = None
    """Directory of `jaxclt globals`: only features that its links shortlist may become
    nodes. What is left out counts as unexplored, and the scores' bounds say so."""
    prefilter_size: int | None = None
    """Features on that shortlist; twice max-features if not given."""
    dry_run: bool = False
    """Say how much memory the graph needs and how it would be computed, then stop."""
    assume: str = ""
    """With --dry-run: plan for a prompt of tokens=N, active=N features at each token
    and layer, of a dictionary of features=N a layer that write to span=N layers, on an
    accelerator beside host=GB of memory (without: on a CPU). Reads only config.json
    of --model; the prompt is not looked at."""
    validate: bool = False
    """Compare the graph with patches of the model; adds validation.json and .md."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(_Attribution):
    """The same for many prompts: a directory each and an index; resumes by itself."""

    prompts: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PROMPTS")]
    """.txt file with a prompt a line, or .jsonl file of objects with `prompt`, or with
    `messages` of a chat, [{"role": ..., "content": ...}, ...]."""
    out: Path
    """Directory to write to."""
    save: Literal["auto", "full", "pruned"] = "pruned"
    """What each graph.npz holds."""


@long_command
def run_trace(config: TraceConfig, say: Console, run: Run) -> None:
    """Trace, write, print."""
    from jaxclt.global_weights.files import load_globals
    from jaxclt.io.chat import user_says
    from jaxclt.trace.files import write_trace
    from jaxclt.trace.prompt import trace_prompt

    if not config.prompt.strip():
        raise InputError("the prompt is empty: give some text to trace")
    check_at_least(1, prefilter_size=config.prefilter_size)
    if config.assume:
        _dry_run_assumed(config)
        return
    prompt = user_says(config.prompt) if config.chat else config.prompt
    model, dictionary, attribution, loaded = _prepare(config, say, run)
    if config.dry_run:
        _dry_run(model, dictionary, prompt, config, attribution)
        return
    prefilter = None
    if config.prefilter is not None:
        size = config.prefilter_size or 2 * config.max_features
        prefilter = load_globals(config.prefilter), size
    with progress(say, "attributing", "rows/s") as on_rows:
        traced = trace_prompt(
            model,
            dictionary,
            prompt,
            targets=config.targets,
            bos=config.bos,
            prefilter=prefilter,
            on_rows=on_rows,
            stop=run.stop,
            config=attribution,
        )
    traced.timing["load"] = loaded
    report = write_trace(
        traced, config.out, save=config.save, environment=config.environment
    )
    stopped = "stopped" in report["work"]
    checked: dict[str, Any] = {}
    if config.validate and not stopped:
        from jaxclt.patching.subject import Reopened

        opened = Reopened(
            model=model, dictionary=dictionary, graph=traced.graph, report=report
        )
        checked = validate_opened(opened, config.out, say, look=run.look)
    _show(config, report, checked)
    if stopped:
        sys.exit(run.stop.status)


def _show(config: TraceConfig, report: dict[str, Any], checked: dict[str, Any]) -> None:
    if config.json:
        print(to_json(report))  # noqa: T201
        return
    Console().print(_summary(report))
    Console().print("strongest paths:")
    for path in report["paths"]:
        Console().print(f"  {path}", markup=False, soft_wrap=True)
    if checked:
        Console().print(Text(checked["verdict"]))
    Console().print(f"page: {(config.out / 'index.html').resolve().as_uri()}")


def _dry_run(
    model: Model,
    dictionary: Dictionary,
    prompt: Prompt,
    config: TraceConfig,
    how: AttributeConfig,
) -> None:
    from jaxclt.graph.compute import memory_budget
    from jaxclt.trace.prompt import plan_trace

    plan, n_tokens, n_active = plan_trace(
        model, dictionary, prompt, config=how, bos=config.bos
    )
    _show_plan(plan, n_tokens, n_active, memory_budget(how), config)


def _dry_run_assumed(config: TraceConfig) -> None:
    from jaxclt.graph.attribute import AttributeConfig
    from jaxclt.graph.compute import memory_budget
    from jaxclt.trace.assume import plan_assumed, read_assumed

    if not config.dry_run:
        raise InputError("--assume goes with --dry-run: no graph can be made of it")
    how = AttributeConfig(max_features=config.max_features, memory_gb=config.memory)
    assumed, budget = read_assumed(config.assume), memory_budget(how)
    plan, n_active = plan_assumed(
        config.model,
        assumed,
        config=how,
        budget=budget,
    )
    _show_plan(plan, assumed.tokens, n_active, budget, config)


def _show_plan(
    plan: MemoryPlan, n_tokens: int, n_active: int, budget: int, config: TraceConfig
) -> None:
    result = {
        "tokens": n_tokens,
        "features_active": n_active,
        "max_features": config.max_features,
        "memory_gb": {k: round(v / 1e9, 3) for k, v in plan.bytes.items()},
        "host_gb": {k: round(v / 1e9, 3) for k, v in plan.host_bytes.items()},
        "total_gb": round(plan.total / 1e9, 3),
        "budget_gb": round(budget / 1e9, 3),
        "patterns": "kept" if plan.keep_patterns else "recomputed",
        "sources": "packed" if plan.packed else "gathered",
        "pool": plan.pool,
        "chunk_size": plan.chunk_size,
    }
    if config.json:
        print(to_json(result))  # noqa: T201
        return
    table = Table(title="dry run: nothing was attributed", show_header=False)
    for name, value in result.items():
        if isinstance(value, dict):
            for part, gb in value.items():
                host = "host: " if name == "host_gb" else ""
                table.add_row(f"  {host}{part}", f"{gb:.3f} GB")
        elif name.endswith("_gb"):
            table.add_row(name.removesuffix("_gb"), f"{value:.3f} GB")
        else:
            table.add_row(name.replace("_", " "), f"{value}")
    Console().print(table)


@long_command
def run_sweep(config: SweepConfig, say: Console, run: Run) -> None:
    """Trace all prompts, print how many."""
    from jaxclt.io.chat import user_says
    from jaxclt.trace.sweep import read_prompts, sweep_prompts

    prompts = read_prompts(config.prompts)
    if config.chat:
        prompts = [user_says(x) if isinstance(x, str) else x for x in prompts]
    model, dictionary, attribution, _ = _prepare(config, say, run)
    with progress(say, "prompts", "prompts/s", run.look) as on_prompt:
        index = sweep_prompts(
            model,
            dictionary,
            prompts,
            config.out,
            config=attribution,
            bos=config.bos,
            save=config.save,
            environment=config.environment,
            on_prompt=on_prompt,
        )
    for line in index:
        if line["status"] == "failed":
            lines(say)(f"{line['directory']}: {line['error']}")
    if config.json:
        print(to_json(index))  # noqa: T201
        return
    done = sum(line["status"] == "done" for line in index)
    Console().print(f"{done} of {len(index)} prompts traced: {config.out}/index.jsonl")


def _prepare(
    config: TraceConfig | SweepConfig, say: Console, run: Run
) -> tuple[Model, Dictionary, AttributeConfig, float]:
    """Check the output, load model and dictionary; with the seconds that took."""
    from jaxclt.graph.attribute import AttributeConfig
    from jaxclt.graph.compute import row_mesh
    from jaxclt.io.dictionary import load_dictionary
    from jaxclt.io.model import load_model

    attribution = AttributeConfig(
        max_features=config.max_features,
        tolerance=config.tolerance,
        node_threshold=config.node_threshold,
        edge_threshold=config.edge_threshold,
        heads=config.heads,
        convention="paper" if config.compat == "none" else config.compat,
        precision=config.precision,
        memory_gb=config.memory,
        devices=config.devices,
    )
    row_mesh(attribution)  # refuses devices that are not there
    if config.compat != "none":
        # That tool leaves out what is not explored: no bound could be stated.
        attribution = dataclasses.replace(attribution, tolerance=0.0)
    if isinstance(config, SweepConfig):
        run.own(config.out)
    elif not config.dry_run:
        run.own(config.out, makes="trace")
    use_compilation_cache()
    started = time.perf_counter()
    model = load_model(
        config.model, dtype=config.dtype, mesh=config.shard, progress=lines(say)
    )
    dictionary = load_dictionary(config.dictionary, model, progress=lines(say))
    run.look()
    return model, dictionary, attribution, time.perf_counter() - started


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


_HEADING = 120  # characters


def heading(prompt: str) -> str:
    """A prompt on one line; of a long one its end, which the graph explains."""
    line = prompt.replace("\n", "⏎")
    return line if len(line) <= _HEADING else "…" + line[1 - _HEADING :]


def _summary(report: dict[str, Any]) -> Table:
    """What a user wants to know first, as a table."""
    table = Table(title=Text(heading(report["prompt"])), show_header=False)
    top = ", ".join(f"{t!r} {p:.2f}" for t, p in report["top_tokens"][:3])
    full, kept = report["scores"]["full"], report["scores"]["pruned"]
    graph, proof = report["graph"], report["certificate"]

    stopped = ", stopped before the rest" if report["work"].get("stopped") else ""

    def pair(score: str) -> str:
        return f"{full[score]:.3f} (shown {kept[score]:.3f})"

    for name, value in {
        "top tokens": top,
        "features": f"{graph['features_attributed']:,} of {graph['features_active']:,} "
        f"active{stopped}",
        "unexplored influence": _unexplored(graph["unexplored_influence"], full),
        "shown": f"{graph['kept_nodes']:,} nodes, {graph['kept_edges']:,} edges",
        "replacement score": pair("replacement"),
        "completeness": pair("completeness"),
        "mean path length": f"{full['mean_path_length']:.2f}",
        "row error (max)": f"{proof['max_relative_row_error']:.1e}",
        "seconds": ", ".join(f"{k} {v:.1f}" for k, v in report["timing_s"].items()),
        "peak memory": f"{report['environment']['peak_memory_gb']:.1f} GB",
    }.items():
        table.add_row(name, Text(value))
    for target in report.get("targets", ()):
        layer = "output" if target["layer"] is None else f"layer {target['layer']}"
        place = f"{target['label']!r} at position {target['pos']}, {layer}"
        what = f"{place}: {target['readout']:.4g}, weight {target['weight']:.3g}"
        table.add_row("target", Text(what))
    return table
