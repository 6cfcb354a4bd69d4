"""`jaxclt patch`: features of a prompt are changed, and the model answers."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from jaxclt.cli.common import answer, asked, load
from jaxclt.cli.progress import Run
from jaxclt.cli.reopened import ReopenFlags
from jaxclt.errors import InputError, check_at_least, check_finite, did_you_mean
from jaxclt.io.tokenizer import Bos
from jaxclt.patching.how import Mode, Part

if TYPE_CHECKING:
    from jaxclt.patching.heads import Head
    from jaxclt.patching.patch import PatchResult
    from jaxclt.patching.subject import Reopened, Subject
    from jaxclt.types import Supernode

__all__ = ["PatchFlags", "parse_feature", "parse_head", "run_patch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchFlags(ReopenFlags):
    """Change features of a prompt and see what the model answers.

    For a traced directory the result is kept in its patches.json and shown on its page.
    A prompt that was not traced needs --model and --dictionary; nothing is written.
    """

    prompt: Annotated[Positional[str], arg(metavar="DIR|PROMPT")]
    """Directory that trace wrote, or the text of a prompt."""
    bos: Bos = "auto"
    """For a prompt that was not traced: put a beginning-of-sequence token first."""
    chat: bool = False
    """For a prompt that was not traced: it is what the user says, in the model's own
    chat template."""
    feature: tuple[str, ...] = ()
    """LAYER:POS:FEATURE; POS counts from 0, or from the end if it is negative, or is a
    slice a..b without b (0.. is everywhere, generated tokens included), in which the
    feature is scaled wherever it is active."""
    group: tuple[str, ...] = ()
    """Names of supernodes of a traced directory to change."""
    scale: float | None = None
    """Factor on the activation: 0 ablates (the default), -1 inhibits, 2 doubles."""
    set: float | None = None
    """Activation to set instead of a factor."""
    add: float | None = None
    """Activation to add instead of a factor."""
    mode: Mode = "constrained"
    """constrained: MLP outputs in the layer range clamped; iterative: the replacement
    model in the range; additive: writes added while all MLPs respond."""
    layers: str | None = None
    """First and last layer of the range, a:b, both included; by default from the first
    edited layer to two after the last one (constrained: as far as the dictionary
    writes, leaving the model's last MLP to answer; additive: all)."""
    qk: tuple[str, ...] = ()
    """L9H3:key: the change is seen only by the keys (or :query, or both, the default)
    of these heads, of layers after the features'; the real model answers."""
    sweep_end: bool = False
    """Also patch with every end layer of the range."""
    patterns: Part = "frozen"
    """Attention patterns: frozen are those of the clean prompt, as in graphs; live ones
    respond, so that QK answers too."""
    norms: Part = "live"
    """Norm denominators: live, or frozen at those of the clean prompt."""
    gates: Literal["auto", "live", "frozen"] = "auto"
    """Gates of the replacement model (iterative); auto: live, frozen for neurons."""
    generate: int = 0
    """Tokens to generate with the edits held, and without."""
    temperature: float = 0.0
    """Temperature of generation; 0 takes the most probable token."""
    seed: int = 0
    """Seed of sampled generation."""
    plot: Path | None = None
    """Where to draw the target's probability against the factor (-2 to 4); by default
    patch.png in the traced directory."""


def _asked(
    flags: PatchFlags,
) -> tuple[Any, dict[str, Any], list[tuple[int, int | slice, int]], Path | None]:
    """Layers, operation, places and the traced directory, before work is spent."""
    layers, edits_of = _layers(flags.layers), _operation(flags)
    check_at_least(0, generate=flags.generate, temperature=flags.temperature)
    check_finite(seed=flags.seed)
    if not flags.feature and not flags.group:
        raise InputError("nothing to patch: give --feature LAYER:POS:FEATURE")
    places = [parse_feature(text) for text in flags.feature]
    directory = Path(flags.prompt) if os.path.isdir(flags.prompt) else None
    if directory is not None and (flags.chat or flags.bos != "auto"):
        flag = "--chat" if flags.chat else "--bos"
        raise InputError(
            f"{flag} goes with a prompt: a traced directory keeps its tokens"
        )
    return layers, edits_of, places, directory


def run_patch(flags: PatchFlags, run: Run) -> None:
    """Reopen, patch, print."""
    layers, edits_of, places, directory = _asked(flags)
    heads = [parse_head(text) for text in flags.qk]
    from jaxclt.patching import patch as patching
    from jaxclt.patching.edits import Edit
    from jaxclt.patching.how import How
    from jaxclt.patching.log import patch_record
    from jaxclt.patching.plan import plan_patch
    from jaxclt.patching.subject import Subject

    opened = None if directory is None else flags.reopen(directory, run)
    if opened is None:
        subject = _untraced(flags, run)
    else:
        subject = Subject.of(opened.model, opened.dictionary, opened.graph)

    edits = [Edit(layer=l, pos=p, feature=f, **edits_of) for l, p, f in places]
    if opened is not None and directory is not None:
        groups = _chosen(flags, directory, opened)
        edits += [Edit(supernode=group, **edits_of) for group in groups]
    how = How(
        mode=flags.mode,
        patterns=flags.patterns,
        norms=flags.norms,
        gates=None if flags.gates == "auto" else flags.gates,
    )
    patch = plan_patch(
        subject, edits, how, layers=layers, n_later=flags.generate, heads=heads
    )
    result = patching.measure(patch, predict=True)
    out = result.to_json()
    if flags.sweep_end:
        first = None if layers is None else layers[0]
        out["sweep_end"] = patching.sweep_end(patch, first=first)
    plot = flags.plot or (directory and directory / "patch.png")
    if plot or flags.json:
        out["curve"] = patching.scale_curve(patch)
    if plot:
        from jaxclt.validation.plots import draw_patch

        draw_patch(plot, out["curve"], result, out.get("sweep_end"))
        out["plot"] = str(plot)
    if opened is not None and directory is not None and result.edits:
        names = [*flags.group, *flags.feature]
        _keep(directory, opened, patch_record(result, names, edits_of))
    said = [result.warning]
    if flags.generate:
        out["generated"] = patching.generate(
            patch, temperature=flags.temperature, seed=flags.seed
        )
        said.append(out["generated"]["warning"])
    for line in dict.fromkeys(filter(None, said)):
        run.warn(line)
    plotted = [f"plot: {out['plot']}"] if "plot" in out else []
    shown = [
        _targets(result),
        *_predicted(result),
        _rows(result, out, _naming(opened, subject)),
    ]
    answer(flags.json, out, *shown, *plotted)


def _untraced(flags: PatchFlags, run: Run) -> Subject:
    """A prompt of which there is no graph.

    Raises:
      InputError: if it looks like the name of a directory, or something of a graph is
        asked for.
    """
    prompt = flags.prompt
    if not prompt.strip():
        raise InputError("the prompt is empty: give some text, or a traced directory")
    if flags.model is None or flags.dictionary is None:
        raise InputError(
            f"{prompt[:100]!r} is not a directory; if it is a prompt, give --model and "
            "--dictionary"
        )
    if os.sep in prompt and not re.search(r"\s", prompt) and _beside(prompt):
        raise InputError(
            f"{prompt[:100]!r} looks like a directory but is not one: give one that "
            "trace wrote, or the text of a prompt"
        )
    if flags.group or flags.supernodes:
        raise InputError(
            "--group takes supernodes of a graph: trace the prompt and give its "
            "directory, or name the features"
        )
    from jaxclt.patching.subject import Subject

    model, dictionary = load(flags.model, flags.dictionary, run)
    return Subject.of(model, dictionary, asked(prompt, chat=flags.chat, bos=flags.bos))


def _beside(path: str) -> bool:
    """Whether the folder that would hold it exists."""
    return os.path.isdir(os.path.dirname(path.rstrip(os.sep)))


def _chosen(flags: PatchFlags, directory: Path, opened: Reopened) -> list[Supernode]:
    """The supernodes that the command names.

    Raises:
      InputError: for a name that no supernode has.
    """
    if not flags.group:
        return []
    known = {g.name: g for g in flags.groups(directory, opened)}
    for name in flags.group:
        if name not in known:
            names = ", ".join(map(repr, known))
            hint = f"choose one of {names}" if known else "none is saved, name features"
            near = did_you_mean(name, known)
            raise InputError(f"no supernode {name!r}: {hint}{near}")
    return [known[name] for name in flags.group]


def _keep(directory: Path, opened: Reopened, record: dict[str, Any]) -> None:
    """Into the directory's patches and its page."""
    from jaxclt.patching.log import keep_patch
    from jaxclt.trace.pages import write_page

    keep_patch(directory, record, opened.graph.meta)
    if (directory / "graph.json").is_file():
        write_page(directory)


def _targets(result: PatchResult) -> Table:
    first, last = result.layers
    title = f"{result.mode}, layers {first}-{last}, KL {_said(result.kl, '.4g')} nats"
    made = Table("target", "p", "patched", "logit", "patched", title=Text(title))
    for t in result.targets:
        numbers = (_said(t[f"p_{when}"], ".4f") for when in ("before", "after"))
        logits = (_said(t[f"logit_{when}"], ".3f") for when in ("before", "after"))
        made.add_row(Text(repr(t["token"])), *numbers, *logits)
    return made


def _predicted(result: PatchResult) -> list[Table | Text]:
    """What was to be expected of each target, and the rule by which it is judged."""
    from jaxclt.patching.predicted import RULE, told

    if not result.predicted:
        return []
    names = ("graph", "derivative", "replacement", "measured")
    made = Table("change of the logit", *names, "")
    tokens = [repr(target["token"]) for target in result.targets]
    contrasts = [row["token"] for row in result.predicted[len(tokens) :]]
    for name, row in zip(tokens + contrasts, result.predicted, strict=True):
        numbers = (_said(row[key], "+.3f") for key in names)
        made.add_row(Text(name), *numbers, told(row))
    return [made, Text(RULE)]


def _naming(
    opened: Reopened | None, subject: Subject
) -> Callable[[dict[str, Any]], str]:
    """What names a row's feature: its place, and its label where it has one."""
    from jaxclt.graph.nodes import labelled

    labels = subject.dictionary.labels

    def named(row: dict[str, Any]) -> str:
        place = row["layer"], row["pos"], row["feature"]
        if opened is not None:
            label = opened.graph.meta.label(*place)
        else:
            label = labels.get((row["layer"], row["feature"]), "")
        return labelled(_place(row), label)

    return named


def _rows(
    result: PatchResult, out: dict[str, Any], named: Callable[[dict[str, Any]], str]
) -> Table:
    """What else a patch did, a row each."""

    def top(tokens: list[tuple[str, float]]) -> str:
        return ", ".join(f"{t!r} {p:.3f}" for t, p in tokens) or "-"

    made = Table(show_header=False)

    def row(name: str, value: str) -> None:
        made.add_row(Text(name), Text(value))

    if result.heads:
        row("seen by", ", ".join(result.heads))
    row("model", ", ".join(f"{k} {result.options[k]}" for k in ("patterns", "norms")))
    row("top tokens", top(result.top_before))
    row("patched", top(result.top_after))
    if difference := result.logit_difference:
        was, now = (_said(difference[when], ".3f") for when in ("before", "after"))
        row("logit difference", f"{was} -> {now} (first two targets)")
    for e in result.edits:
        row(f"edit {named(e)}", f"{e['before']:.4g} -> {e['after']:.4g}")
    for f in result.features:
        share = f"{_said(f['share'], '.0%')} of {f['before']:.4g}"
        row(f"feature {named(f)}", share if f["before"] else "")
    if swept := out.get("sweep_end"):
        columns = swept["last_layers"], swept["kl"], swept["probability"]
        for end, kl, p in zip(*columns, strict=True):
            name = f"layers {swept['first']}-{end}"
            row(name, f"KL {_said(kl, '.4g')}, p {_said(p[0], '.4f')}")
    if "generated" in out:
        row("generated", repr(out["generated"]["before"]))
        row("with edits", repr(out["generated"]["after"] or ""))
    return made


def _place(row: dict[str, Any]) -> str:
    return f"{row['layer']}:{row['pos']}:{row['feature']}"


def _said(x: float | None, form: str) -> str:
    """A number, or a dash if there is none."""
    return "-" if x is None else format(x, form)


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


def parse_head(text: str) -> Head:
    """Read L9H3, L9H3:query or L9H3:key.

    Raises:
      InputError: for any other text.
    """
    from jaxclt.patching.heads import Head

    match = re.fullmatch(rf"L({_N})H({_N})(?::(query|key|both))?", text)
    if match is None:
        raise InputError(f"head {text!r}: write L9H3, L9H3:query or L9H3:key")
    layer, head, side = match.groups("both")
    return Head(int(layer), int(head), side)  # pyright: ignore[reportArgumentType]


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


def _operation(flags: PatchFlags) -> dict[str, Any]:
    given = {
        name: value
        for name in ("scale", "set", "add")
        if (value := getattr(flags, name)) is not None
    }
    if len(given) > 1:
        raise InputError(f"give only one of --{' and --'.join(given)}")
    check_finite(**given)
    return given or {"scale": 0.0}
