"""`jaxclt patch` and `jaxclt validate`: configs and runners; registered in cli."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxclt.cli.compiled import use_compilation_cache
from jaxclt.cli.progress import Run, lines, long_command, progress
from jaxclt.errors import InputError, check_at_least, check_finite, did_you_mean
from jaxclt.files.json_text import to_json

if TYPE_CHECKING:
    from jaxclt.patching.patch import PatchResult
    from jaxclt.patching.subject import Reopened, Subject
    from jaxclt.types import Supernode
    from jaxclt.validation.report import ValidateOptions

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

    model: Annotated[str | None, tyro.conf.arg(metavar="M")] = None
    """The model; of a traced directory only where it is now, if it has moved."""
    dictionary: Annotated[str | None, tyro.conf.arg(metavar="D")] = None
    """The dictionary; of a traced directory only where it is now, if it has moved."""
    supernodes: Path | None = None
    """JSON file of groups, [["name", "layer_feature_pos", ...], ...] as the viewer
    saves them; or a graph.json that has some."""
    json: bool = False
    """Print the result as JSON on stdout."""
    debug: bool = False
    """Show tracebacks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchConfig(_Reopen):
    """Change features of a prompt and see what the model answers.

    Of a traced directory the result is kept in its patches.json and shown on its page.
    A prompt needs no graph, but --model and --dictionary, and nothing is written.
    """

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR|PROMPT")]
    """Directory that trace wrote, or the text of a prompt."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Put a beginning-of-sequence token first, of a prompt that was not traced."""
    chat: bool = False
    """A prompt that was not traced is what the user says, in the model's own chat
    template."""
    feature: tuple[str, ...] = ()
    """LAYER:POS:FEATURE; POS from 0, negative from the end, or a slice a..b, b not
    included (0.. is everywhere, generated tokens too): there it is scaled where it is
    active."""
    group: tuple[str, ...] = ()
    """Names of supernodes to change, of a traced directory."""
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
    """Where to draw target probability against the factor (-2 to 4); if not given,
    patch.png in the traced directory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidateConfig(_Reopen):
    """Compare what the graph predicts with what patches of the model do."""

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Directory that trace wrote."""
    n_features: int = 100
    """Most influential features to patch, and as many random ones."""
    seed: int = 0
    """Of the random features, perturbations and bootstrap."""


def _asked(
    config: PatchConfig,
) -> tuple[Any, dict[str, Any], list[tuple[int, int | slice, int]], Path | None]:
    """Layers, operation, places and the traced directory, before work is spent."""
    layers, edits_of = _layers(config.layers), _operation(config)
    check_at_least(0, generate=config.generate, temperature=config.temperature)
    check_finite(seed=config.seed)
    if not config.feature and not config.group:
        raise InputError("nothing to patch: give --feature LAYER:POS:FEATURE")
    places = [parse_feature(text) for text in config.feature]
    directory = Path(config.prompt) if os.path.isdir(config.prompt) else None
    if directory is not None and (config.chat or config.bos != "auto"):
        flag = "--chat" if config.chat else "--bos"
        raise InputError(f"{flag} is of a prompt: a traced directory keeps its tokens")
    return layers, edits_of, places, directory


def run_patch(config: PatchConfig, say: Console) -> None:
    """Reopen, patch, print."""
    layers, edits_of, places, directory = _asked(config)
    opened = None if directory is None else _reopen(config, directory, say)
    subject = _untraced(config, say) if opened is None else _traced(opened)
    from jaxclt.patching import patch as patching
    from jaxclt.patching.edits import Edit
    from jaxclt.patching.log import patch_record

    edits = [Edit(layer=l, pos=p, feature=f, **edits_of) for l, p, f in places]
    if opened is not None and directory is not None:
        groups = _chosen(config, directory, opened)
        edits += [Edit(supernode=group, **edits_of) for group in groups]
    gates = None if config.gates == "auto" else config.gates
    how = subject.how(
        config.mode,
        freeze_pattern=config.freeze_patterns,
        freeze_norm=config.freeze_norms,
        gates=gates,
    )
    result = patching.patch(
        subject.model,
        subject.dictionary,
        subject.traced or config.prompt,
        edits,
        mode=config.mode,
        layers=layers,
        freeze_pattern=config.freeze_patterns,
        freeze_norm=config.freeze_norms,
        gates=gates,
        n_later=config.generate,
        subject=subject,
    )
    out, later = result.to_json(), config.generate
    if config.sweep_end:
        first = None if layers is None else layers[0]
        out["sweep_end"] = patching.sweep_end(
            subject, edits, how=how, first=first, n_later=later
        )
    plot = config.plot or (directory and directory / "patch.png")
    if plot or config.json:
        out["curve"] = patching.scale_curve(
            subject, edits, how=how, layers=layers, n_later=later
        )
    if plot:
        from jaxclt.validation.plots import draw_patch

        draw_patch(plot, out["curve"], result, out.get("sweep_end"))
        out["plot"] = str(plot)
    if opened is not None and directory is not None and result.edits:
        names = [*config.group, *config.feature]
        _keep(directory, opened, patch_record(result, names, edits_of))
    said = [result.warning]
    if later:
        out["generated"] = patching.generate_patched(
            subject,
            edits,
            how=how,
            n_new=later,
            layers=layers,
            temperature=config.temperature,
            seed=config.seed,
        )
        said.append(out["generated"]["warning"])
    for line in dict.fromkeys(filter(None, said)):
        say.print(f"jaxclt: warning: {line}", markup=False, soft_wrap=True)
    if config.json:
        print(to_json(out))  # noqa: T201
        return
    _show_patch(result, out)


def _traced(opened: Reopened) -> Subject:
    from jaxclt.patching.subject import Subject

    return Subject.of(opened.model, opened.dictionary, opened.graph)


def _untraced(config: PatchConfig, say: Console) -> Subject:
    """The prompt itself, of which there is no graph.

    Raises:
      InputError: if it is rather the name of a directory, or something of a graph is
        asked for.
    """
    prompt = config.prompt
    if not prompt.strip():
        raise InputError("the prompt is empty: give some text, or a traced directory")
    if config.model is None or config.dictionary is None:
        raise InputError(
            f"{prompt[:100]!r} is no directory; if it is a prompt, give --model and "
            "--dictionary"
        )
    if os.sep in prompt and not re.search(r"\s", prompt) and _beside(prompt):
        raise InputError(
            f"{prompt[:100]!r} looks like a directory and is none: give one that trace "
            "wrote, or the text of a prompt"
        )
    if config.group or config.supernodes:
        raise InputError(
            "--group takes supernodes of a graph: trace the prompt and give its "
            "directory, or name the features"
        )
    use_compilation_cache()
    from jaxclt.io.chat import user_says
    from jaxclt.io.dictionary import load_dictionary
    from jaxclt.io.model import load_model
    from jaxclt.patching.subject import Subject

    model = load_model(config.model, progress=lines(say))
    dictionary = load_dictionary(config.dictionary, model)
    given = user_says(prompt) if config.chat else prompt
    return Subject.of(model, dictionary, given, bos=config.bos)


def _beside(path: str) -> bool:
    """Whether the folder that would hold it is there."""
    return os.path.isdir(os.path.dirname(path.rstrip(os.sep)))


def _chosen(config: PatchConfig, directory: Path, opened: Reopened) -> list[Supernode]:
    """The supernodes that the command names.

    Raises:
      InputError: for a name that is none's.
    """
    if not config.group:
        return []
    known = {g.name: g for g in _supernodes(config, directory, opened)}
    for name in config.group:
        if name not in known:
            names = ", ".join(map(repr, known))
            hint = f"choose one of {names}" if known else "none is saved, name features"
            near = did_you_mean(name, known)
            raise InputError(f"no supernode {name!r}: {hint}{near}")
    return [known[name] for name in config.group]


def _keep(directory: Path, opened: Reopened, record: dict[str, Any]) -> None:
    """Into the directory's patches and its page."""
    from jaxclt.patching.log import keep_patch
    from jaxclt.trace.pages import write_page

    keep_patch(directory, record, opened.graph.meta)
    if (directory / "graph.json").is_file():
        write_page(directory)


def _show_patch(result: PatchResult, out: dict[str, Any]) -> None:
    console = Console()
    first, last = result.layers
    title = f"{result.mode}, layers {first}-{last}, KL {_said(result.kl, '.4g')} nats"
    table = Table("target", "p", "patched", "logit", "patched", title=Text(title))
    for t in result.targets:
        numbers = (_said(t[f"p_{when}"], ".4f") for when in ("before", "after"))
        logits = (_said(t[f"logit_{when}"], ".3f") for when in ("before", "after"))
        table.add_row(Text(repr(t["token"])), *numbers, *logits)
    console.print(table)

    def line(top: list[tuple[str, float]]) -> Text:
        return Text(", ".join(f"{t!r} {p:.3f}" for t, p in top) or "-")

    rows = Table(show_header=False)
    rows.add_row("top tokens", line(result.top_before))
    rows.add_row("patched", line(result.top_after))
    if result.logit_difference:
        was, now = (
            _said(result.logit_difference[k], ".3f") for k in ("before", "after")
        )
        rows.add_row("logit difference", f"{was} -> {now} (first two targets)")
    for e in result.edits:
        place = f"{e['layer']}:{e['pos']}:{e['feature']}"
        rows.add_row(f"edit {place}", f"{e['before']:.4g} -> {e['after']:.4g}")
    for f in result.features:
        place = f"{f['layer']}:{f['pos']}:{f['feature']}"
        share = "" if not f["before"] else f"{_said(f['share'], '.0%')} of "
        rows.add_row(f"feature {place}", share and f"{share}{f['before']:.4g}")
    if "sweep_end" in out:
        sweep = out["sweep_end"]
        for end, kl, p in zip(
            sweep["last_layers"], sweep["kl"], sweep["probability"], strict=True
        ):
            name = f"layers {sweep['first']}-{end}"
            rows.add_row(name, f"KL {_said(kl, '.4g')}, p {_said(p[0], '.4f')}")
    if "generated" in out:
        rows.add_row("generated", Text(repr(out["generated"]["before"])))
        rows.add_row("with edits", Text(repr(out["generated"]["after"] or "")))
    console.print(rows)
    if "plot" in out:
        console.print(f"plot: {out['plot']}", markup=False, soft_wrap=True)


def _said(x: float | None, form: str) -> str:
    """A number, or that there is none."""
    return "-" if x is None else format(x, form)


@long_command
def run_validate(config: ValidateConfig, say: Console, run: Run) -> None:
    """Reopen, validate, print."""
    from jaxclt.validation.report import ValidateOptions

    options = ValidateOptions(n_features=config.n_features, seed=config.seed)
    _check_traced(config.directory)
    run.own(config.directory)
    opened = _reopen(config, config.directory, say)
    report = validate_opened(
        opened,
        config.directory,
        say,
        options=options,
        groups=_supernodes(config, config.directory, opened),
        look=run.look,
    )
    if config.json:
        print(to_json(report))  # noqa: T201
        return
    Console().print(Text(report["verdict"]))
    Console().print(f"report: {config.directory / 'validation.md'}", markup=False)


def validate_opened(
    opened: Reopened,
    directory: Path,
    say: Console,
    *,
    options: ValidateOptions | None = None,
    groups: list[Supernode] | None = None,
    look: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Validate a graph whose model is loaded; shared with `trace --validate`."""
    from jaxclt.trace.pages import traced_digest, write_page
    from jaxclt.validation.report import validate_graph, write_validation
    from jaxclt.validation.words import left_out

    started = time.perf_counter()
    subject = _traced(opened)
    with progress(say, "validating", "patches/s", look) as on_done:
        report = validate_graph(
            subject,
            options,
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


_N = r"\d{1,9}"  # what an index can be
_PLACE = rf"({_N}):(-?{_N}|(?:-?{_N})?\.\.(?:-?{_N})?):({_N})"


def parse_feature(text: str) -> tuple[int, int | slice, int]:
    """Read LAYER:POS:FEATURE.

    Raises:
      InputError: for any other text.
    """
    match = re.fullmatch(_PLACE, text)
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
    match = re.fullmatch(rf"({_N}):({_N})", text)
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
    check_finite(**given)
    return given or {"scale": 0.0}


def _reopen(config: _Reopen, directory: Path, say: Console) -> Reopened:
    from jaxclt.runs.kept import check_writable

    # The place to write to is checked before anything long begins.
    _check_traced(directory)
    check_writable(directory)
    use_compilation_cache()
    from jaxclt.patching.subject import reopen

    return reopen(
        directory,
        model=config.model,
        dictionary=config.dictionary,
        progress=lines(say),
    )


def _check_traced(directory: Path) -> None:
    if not (directory / "graph.npz").is_file():
        raise InputError(f"no graph in {directory}: give a directory that trace wrote")


def _supernodes(config: _Reopen, directory: Path, opened: Reopened) -> list[Supernode]:
    """Groups from a file, else those saved in the directory's graph.json."""
    from jaxclt.trace.supernodes import read_supernodes

    path = config.supernodes or directory / "graph.json"
    if config.supernodes is None and not path.is_file():
        return []
    return read_supernodes(path, opened.graph)
