"""`jaxclt patch` and `jaxclt validate`: configs and runners; registered in cli."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxclt.cli_progress import Run, lines, long_command, progress
from jaxclt.compiled import use_compilation_cache
from jaxclt.errors import InputError

if TYPE_CHECKING:
    from jaxclt.intervene import PatchResult
    from jaxclt.subject import Reopened
    from jaxclt.types import Supernode

__all__ = [
    "PatchConfig",
    "ValidateConfig",
    "parse_feature",
    "run_patch",
    "run_validate",
    "validate_opened",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reopen:
    """What patch and validate have in common."""

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Directory that trace wrote."""
    model: Annotated[str | None, tyro.conf.arg(metavar="M")] = None
    """Where the traced model is now, if it has moved."""
    dictionary: Annotated[str | None, tyro.conf.arg(metavar="D")] = None
    """Where the traced dictionary is now, if it has moved."""
    supernodes: Path | None = None
    """JSON file of groups, [["name", "layer_feature_pos", ...], ...] as the viewer
    saves them; or a graph.json that has some."""
    json: bool = False
    """Print the result as JSON on stdout."""
    debug: bool = False
    """Show tracebacks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchConfig(_Reopen):
    """Change features of a traced prompt and see what the model answers.

    The result is kept in the directory's patches.json and shown on its page.
    """

    feature: tuple[str, ...] = ()
    """LAYER:POS:FEATURE; POS from 0, negative from the end, or a slice a..b (b not
    included; a.. also holds for generated tokens)."""
    group: tuple[str, ...] = ()
    """Names of supernodes to change."""
    scale: float | None = None
    """Factor on the activation: 0 ablates (the default), -1 inhibits, 2 doubles."""
    set: float | None = None
    """Activation to set instead of a factor."""
    add: float | None = None
    """Activation to add instead of a factor."""
    mode: Literal["constrained", "iterative", "additive"] = "constrained"
    """constrained: MLP outputs in the layer range clamped; iterative: the replacement
    model in the range; additive: writes added while all MLPs respond."""
    layers: str | None = None
    """First and last layer of the range a:b, both included; by default from the first
    edited layer to two behind the last one (constrained: as far as the dictionary
    writes, and the model's last MLP is left to answer; additive: all)."""
    sweep_end: bool = False
    """Also patch with every end layer of the range."""
    freeze_patterns: bool = True
    """Keep the clean attention patterns."""
    freeze_norms: bool = False
    """Keep the clean norm denominators."""
    gates: Literal["auto", "live", "frozen"] = "auto"
    """Gates of the replacement model (iterative); auto: live, for neurons frozen."""
    generate: int = 0
    """Tokens to generate with the edits held, and without."""
    temperature: float = 0.0
    """Of generation; 0 takes the most probable token."""
    seed: int = 0
    """Of sampled generation."""
    plot: Path | None = None
    """Where to draw target probability against the factor (-2 to 4); patch.png in the
    directory if not given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidateConfig(_Reopen):
    """Compare what the graph predicts with what patches of the model do."""

    n_features: int = 100
    """Most influential features to patch, and as many random ones."""
    seed: int = 0
    """Of the random features, perturbations and bootstrap."""


def run_patch(config: PatchConfig, say: Console) -> None:
    """Reopen, patch, print."""
    layers = _layers(config.layers)
    edits_of = _operation(config)
    if not config.feature and not config.group:
        raise InputError("nothing to patch: give --feature LAYER:POS:FEATURE")
    places = [parse_feature(text) for text in config.feature]
    opened = _reopen(config, say)
    from jaxclt import intervene
    from jaxclt.patch_log import patch_record
    from jaxclt.patching.edits import Edit
    from jaxclt.subject import Subject

    edits = [Edit(layer=l, pos=p, feature=f, **edits_of) for l, p, f in places]
    groups = {g.name: g for g in _supernodes(config, opened)} if config.group else {}
    for name in config.group:
        if name not in groups:
            known = ", ".join(map(repr, groups))
            raise InputError(
                f"no supernode {name!r}: "
                + (
                    f"choose one of {known}"
                    if known
                    else "none is saved, name features"
                )
            )
        edits.append(Edit(supernode=groups[name], **edits_of))
    subject = Subject.of(opened.model, opened.dictionary, opened.graph)
    gates = None if config.gates == "auto" else config.gates
    how = subject.how(
        config.mode,
        freeze_pattern=config.freeze_patterns,
        freeze_norm=config.freeze_norms,
        gates=gates,
    )
    result = intervene.patch(
        opened.model,
        opened.dictionary,
        opened.graph,
        edits,
        mode=config.mode,
        layers=layers,
        freeze_pattern=config.freeze_patterns,
        freeze_norm=config.freeze_norms,
        gates=gates,
        subject=subject,
    )
    out = result.to_json()
    if config.sweep_end:
        first = None if layers is None else layers[0]
        out["sweep_end"] = intervene.sweep_end(subject, edits, how=how, first=first)
    curve = intervene.scale_curve(subject, edits, how=how, layers=layers)
    out["curve"] = curve
    from jaxclt.validation.plots import draw_patch

    plot = config.plot or config.directory / "patch.png"
    draw_patch(plot, curve, result, out.get("sweep_end"))
    out["plot"] = str(plot)
    names = [*config.group, *config.feature]
    _keep(config.directory, opened, patch_record(result, names, edits_of))
    if config.generate:
        out["generated"] = intervene.generate_patched(
            subject,
            edits,
            how=how,
            n_new=config.generate,
            layers=layers,
            temperature=config.temperature,
            seed=config.seed,
        )
    if result.warning:
        say.print(f"jaxclt: warning: {result.warning}", markup=False, soft_wrap=True)
    if config.json:
        print(json.dumps(out))  # noqa: T201
        return
    _show_patch(result, out)


def _keep(directory: Path, opened: Reopened, record: dict[str, Any]) -> None:
    """Into the directory's patches and its page."""
    from jaxclt.pages import write_page
    from jaxclt.patch_log import keep_patch

    keep_patch(directory, record, opened.graph.meta)
    if (directory / "graph.json").is_file():
        write_page(directory)


def _show_patch(result: PatchResult, out: dict[str, Any]) -> None:
    console = Console()
    first, last = result.layers
    title = f"{result.mode}, layers {first}-{last}, KL {result.kl:.4g} nats"
    table = Table("target", "p", "patched", "logit", "patched", title=Text(title))
    for t in result.targets:
        numbers = (f"{t['p_before']:.4f}", f"{t['p_after']:.4f}")
        numbers += (f"{t['logit_before']:.3f}", f"{t['logit_after']:.3f}")
        table.add_row(Text(repr(t["token"])), *numbers)
    console.print(table)

    def line(top: list[tuple[str, float]]) -> Text:
        return Text(", ".join(f"{t!r} {p:.3f}" for t, p in top))

    rows = Table(show_header=False)
    rows.add_row("top tokens", line(result.top_before))
    rows.add_row("patched", line(result.top_after))
    if result.logit_difference:
        d = result.logit_difference
        text = f"{d['before']:.3f} -> {d['after']:.3f} (first two targets)"
        rows.add_row("logit difference", text)
    for e in result.edits:
        place = f"{e['layer']}:{e['pos']}:{e['feature']}"
        rows.add_row(f"edit {place}", f"{e['before']:.4g} -> {e['after']:.4g}")
    for f in result.features:
        place = f"{f['layer']}:{f['pos']}:{f['feature']}"
        share = "" if f["share"] is None else f"{f['share']:.0%} of {f['before']:.4g}"
        rows.add_row(f"feature {place}", share)
    if "sweep_end" in out:
        sweep = out["sweep_end"]
        for end, kl, p in zip(
            sweep["last_layers"], sweep["kl"], sweep["probability"], strict=True
        ):
            name = f"layers {sweep['first']}-{end}"
            rows.add_row(name, f"KL {kl:.4g}, p {p[0]:.4f}")
    if "generated" in out:
        rows.add_row("generated", Text(repr(out["generated"]["before"])))
        rows.add_row("with edits", Text(repr(out["generated"]["after"])))
    console.print(rows)
    console.print(f"plot: {out['plot']}", markup=False, soft_wrap=True)


@long_command
def run_validate(config: ValidateConfig, say: Console, run: Run) -> None:
    """Reopen, validate, print."""
    if config.n_features < 3:
        raise InputError(f"--n-features {config.n_features}: give at least 3")
    _check_traced(config.directory)
    run.own(config.directory)
    opened = _reopen(config, say)
    report = validate_opened(
        opened,
        config.directory,
        say,
        n_features=config.n_features,
        seed=config.seed,
        groups=_supernodes(config, opened),
        look=run.look,
    )
    if config.json:
        print(json.dumps(report))  # noqa: T201
        return
    Console().print(Text(report["verdict"]))
    Console().print(f"report: {config.directory / 'validation.md'}", markup=False)


def validate_opened(
    opened: Reopened,
    directory: Path,
    say: Console,
    *,
    n_features: int = 100,
    seed: int = 0,
    groups: list[Supernode] | None = None,
    look: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Validate a graph whose model is loaded; shared with `trace --validate`."""
    from jaxclt.pages import traced_digest, write_page
    from jaxclt.subject import Subject
    from jaxclt.validate import ValidateOptions, validate_graph, write_validation
    from jaxclt.validation.words import left_out

    started = time.perf_counter()
    subject = Subject.of(opened.model, opened.dictionary, opened.graph)
    with progress(say, "validating", "patches/s", look) as on_done:
        report = validate_graph(
            subject,
            ValidateOptions(n_features=n_features, seed=seed),
            groups=groups,
            on_done=on_done,
        )
    for said in left_out(report):
        say.print(f"jaxclt: warning: {said}", markup=False, soft_wrap=True)
    report["traced"] = traced_digest(opened.report)
    report["seconds"] = round(time.perf_counter() - started, 2)
    write_validation(report, directory)
    if (directory / "graph.json").is_file():
        write_page(directory)
    return report


def parse_feature(text: str) -> tuple[int, int | slice, int]:
    """Read LAYER:POS:FEATURE.

    Raises:
      InputError: for any other text.
    """
    match = re.fullmatch(r"(\d+):(-?\d+|-?\d*\.\.-?\d*):(\d+)", text)
    if match is None:
        raise InputError(
            f"feature {text!r}: write LAYER:POS:FEATURE, for example 12:5:345, or "
            "12:3..6:345 for several positions"
        )
    layer, pos, feature = match.groups()
    if ".." not in pos:
        return int(layer), int(pos), int(feature)
    start, _, stop = pos.partition("..")
    ends = (int(x) if x else None for x in (start, stop))
    return int(layer), slice(*ends), int(feature)


def _layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise InputError(f"layers {text!r}: write FIRST:LAST, for example 12:14")
    first, last = map(int, match.groups())
    if first > last:
        raise InputError(
            f"layers {first}:{last} are an empty range: both ends are included, give "
            "the smaller one first"
        )
    return first, last


def _operation(config: PatchConfig) -> dict[str, Any]:
    given = {
        name: value
        for name in ("scale", "set", "add")
        if (value := getattr(config, name)) is not None
    }
    if len(given) > 1:
        raise InputError(f"give only one of --{' and --'.join(given)}")
    for name, value in given.items():
        if value != value or value in (float("inf"), float("-inf")):
            raise InputError(f"--{name} {value}: give a finite number")
    return given or {"scale": 0.0}


def _reopen(config: _Reopen, say: Console) -> Reopened:
    from jaxclt.trace_files import check_writable

    # The place to write to is checked before anything long begins.
    _check_traced(config.directory)
    check_writable(config.directory)
    use_compilation_cache()
    from jaxclt.subject import reopen

    return reopen(
        config.directory,
        model=config.model,
        dictionary=config.dictionary,
        progress=lines(say),
    )


def _check_traced(directory: Path) -> None:
    if not (directory / "graph.npz").is_file():
        raise InputError(f"no graph in {directory}: give a directory that trace wrote")


def _supernodes(config: _Reopen, opened: Reopened) -> list[Supernode]:
    """Groups from a file, else those saved in the directory's graph.json."""
    from jaxclt.supernode_file import read_supernodes

    path = config.supernodes or config.directory / "graph.json"
    if config.supernodes is None and not path.is_file():
        return []
    return read_supernodes(path, opened.graph)
