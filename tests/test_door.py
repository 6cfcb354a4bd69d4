"""Whatever goes wrong in a command is one line and a status, before work is spent."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import re
import subprocess
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jaxclt
from jaxclt.api import attribute
from jaxclt.cli import door as cli_door
from jaxclt.cli import main as cli
from jaxclt.cli.parse import parse
from jaxclt.errors import InputError, did_you_mean
from jaxclt.graph.config import AttributeConfig
from jaxclt.io import model as model_io
from jaxclt.io.graph_file import save_graph
from jaxclt.testing.tiny import tiny

LINE = 300  # characters
HUGE = 10**30
# Fields whose numbers may be below zero, or zero.
NEGATIVE = {"seed", "scale", "set", "add", "theta"}
ZERO = NEGATIVE | {
    *("attention", "heads", "tolerance", "drawn", "logits", "generate", "temperature"),
    *("layer_tokens", "graphs", "perturbed", "sort", "contrastive"),
    *("span", "l0", "sparsity", "ramp", "preactivation", "auxk", "auxk_features"),
    *("jacobian", "warmup", "clip", "outlier", "eval_every", "agreement_windows"),
    *("graph_features", "kl_steps"),
}
ADDITION = ("--model", "addition", "--dictionary", "addition-clt")
BASE: dict[str, tuple[object, ...]] = {
    "demo": (),
    "trace": ("36+59=", *ADDITION),
    "sweep": ("{files}/prompts.txt", *ADDITION),
    "fetch": ("addition",),
    "convert": ("addition-clt", "{out}", "--to", "saelens"),
    "view": ("{files}",),
    "serve": ("{files}",),
    "explain": ("{files}", "embed 1", "0"),
    "patch": ("{files}", "--feature", "0:1:2"),
    "validate": ("{files}",),
    "circuit": ("{files}",),
    "eval": ADDITION,
    "globals": (*ADDITION, "--data", "{files}/prompts.txt"),
    "features": (*ADDITION, "--data", "{files}/prompts.txt"),
    "train": ("--model", "addition", "--data", "{files}/prompts.txt"),
}
OUT = ("demo", "trace", "sweep", "eval", "globals", "features", "train")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands read: a traced directory, and prompts."""
    folder = tmp_path_factory.mktemp("files")
    save_graph(folder / "graph.npz", tiny(seed=1, n_tokens=4).graph())
    report = {"model": "addition", "dictionary": "addition-clt"}
    report |= {"environment": {}, "identity": {"hashes": {}}}
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "prompts.txt").write_text("36+59=\n")
    return folder


def arguments(command: str, files: Path, out: Path) -> list[str]:
    args = [str(x).format(files=files, out=out) for x in BASE[command]]
    return [*args, "--out", str(out)] if command in OUT else args


def status(*args: object) -> int:
    try:
        cli.main([str(arg) for arg in args])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def one_line(capsys: pytest.CaptureFixture[str], *, start: str = "jaxclt: ") -> str:
    """What stderr holds, which is one line."""
    err = capsys.readouterr().err
    assert err.startswith(start), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert len(err) <= LINE + 1, len(err)
    return err


class WorkError(InputError):
    """A model would be loaded."""


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command gets further than to where its model is looked up."""

    def stop(*_: object) -> Path:
        raise WorkError("the work begins")

    monkeypatch.setattr(model_io, "_locate", stop)


# -- the door --------------------------------------------------------------------------


def raises(error: BaseException) -> Callable[[Console], None]:
    def run(say: Console) -> None:
        del say
        raise error

    return run


def guarded(run: Callable[[Console], None], *, debug: bool = False) -> int:
    return cli_door.guarded(run, debug=debug, lower="fewer layers", kept="all is kept")


def too_large(say: Console) -> None:
    del say
    jnp.zeros((1 << 30, 1 << 14), jnp.int8).block_until_ready()


def endless(say: Console) -> None:
    endless(say)


@pytest.mark.parametrize(
    ("run", "wanted", "words"),
    [
        (raises(InputError("no model 'x'")), 2, "no model 'x'"),
        (raises(InputError("a\nb" * 500)), 2, "a b"),
        (raises(MemoryError()), 2, "try fewer layers"),
        (lambda _: np.zeros(1 << 55) and None, 2, "try fewer layers"),
        (too_large, 2, "try fewer layers"),
        (raises(KeyboardInterrupt()), 130, "interrupted; all is kept"),
        (endless, 70, "RecursionError"),
        (
            raises(KeyError("absent")),
            70,
            "a fault of jaxclt's own (KeyError: 'absent')",
        ),
        (raises(ValueError("one\ntwo " * 999)), 70, "--debug"),
        (raises(AssertionError()), 70, "(AssertionError); add --debug"),
        (lambda _: open("/nowhere/at/all").close(), 2, "cannot use /nowhere/at/all"),
        (lambda _: os.stat("x" * 300) and None, 2, "(File name too long)"),
        (raises(OSError(errno.EFBIG, "File too large")), 2, "no room left to write"),
        (raises(OSError("no number")), 70, "OSError: no number"),
    ],
)
def test_whatever_is_raised_is_a_line_and_a_status(
    run: Callable[[Console], None],
    wanted: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
):
    assert guarded(run) == wanted
    assert words in one_line(capsys)
    if wanted == 130:
        return
    assert guarded(run, debug=True) == wanted
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert words in err.splitlines()[-1]


PRINTERS: tuple[Callable[[Console], None], ...] = (
    lambda _: print("x"),  # noqa: T201
    lambda _: Console().print("x"),
)


@pytest.mark.parametrize("buffered", [True, False])
def test_a_closed_pipe_ends_quietly(
    buffered: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Printed by Python or by rich, at once or when it is flushed."""
    for run in PRINTERS:
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb", buffering=0) as raw:
            into: Any = io.BufferedWriter(raw) if buffered else raw
            stream = io.TextIOWrapper(into, write_through=not buffered)
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", stream)
                assert guarded(run) == 141
            stream.detach()
    assert capsys.readouterr().err == ""


def test_results_that_do_not_fit_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    for run in PRINTERS:
        with open("/dev/full", "w") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert guarded(run) == 2
        assert "could not be printed (No space left on device)" in one_line(capsys)


def test_the_process_itself_ends_quietly():
    """Python flushes once more as it exits, which must not fail either."""
    script = f"""
        {sys.executable} -m jaxclt --version | true; echo ${{PIPESTATUS[0]}}
        {sys.executable} -m jaxclt --version > /dev/full; echo $?
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["141", "2"]
    assert done.stderr.startswith("jaxclt: the results could not be printed")
    assert done.stderr.count("\n") == 1


def test_what_libraries_say_is_one_line(capsys: pytest.CaptureFixture[str]):
    import logging

    def run(say: Console) -> None:
        del say
        warnings.simplefilter("always")
        warnings.warn("first\nsecond", stacklevel=1)
        try:
            raise OSError("no disk")
        except OSError:
            logging.getLogger("some.library").exception("failed\nbadly")

    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []  # pytest's own
    try:
        assert guarded(run) == 0
    finally:
        root.handlers = handlers
    assert capsys.readouterr().err.splitlines() == [
        "jaxclt: warning: first second",
        "jaxclt: warning: failed badly (OSError: no disk)",
    ]


# -- command lines ---------------------------------------------------------------------


def test_the_command_alone_says_where_to_begin(capsys: pytest.CaptureFixture[str]):
    assert status() == status("--debug") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert {"demo", "trace", "serve"} <= set(said.out.split())
    assert max(map(len, said.out.splitlines())) <= 80
    assert status("--version") == 0
    assert capsys.readouterr().out == f"jaxclt {jaxclt.__version__}\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    assert status("--help") == 0
    said = capsys.readouterr().out
    assert set(BASE) == set(cli._COMMANDS)
    assert [line.split()[0] for line in said.splitlines() if line[2:3].strip()][2:] == [
        *cli._COMMANDS
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trase"], '`jaxclt --help` lists them; did you mean "trace"?'),
        (["trace"], "trace needs PROMPT, --model M, --dictionary D and --out PATH"),
        (["trace", "x", "--modle", "m"], 'has no flag --modle: see `jaxclt trace'),
        (["trace", "x", "--max_feature=3"], 'did you mean "--max-features"?'),
        (["view", "a", "b c"], "view has no place for 'b c'"),
        (["view", "a", "--out"], "--out: give a path"),
        (["view", "a", "--out", ""], "--out: the path is empty"),
        (["view", ""], "DIR: the path is empty"),
        (["view", "x" * 300], "DIR: a name of 300 bytes, too long"),
        (["view", "a", "--compare=" + "é" * 200], "a name of 400 bytes"),
        (["globals", *ADDITION, "--out", "o", "--merge", "a", ""], "a : give a path"),
        (["convert", "a", "b", "--to", "saelns"], 'jaxclt; did you mean "saelens"?'),
        (["trace", "x", "--bos", "Auto"], 'auto, always, never; did you mean "auto"?'),
        (["patch", "d", "--generate", "1e3"], "--generate 1e3: give a whole number"),
        (["patch", "d", "--generate", "nan"], "--generate nan: give a whole number"),
        (["patch", "d", "--generate", "9" * 5000], "--generate"),
        (["patch", "d", "--scale", "much"], "--scale much: give a number"),
        (["eval", *ADDITION, "--baselines", "1", "x"], "--baselines 1 x: give a nu"),
        (["trace", "w5\udc80"], r"'w5\udc80' is not UTF-8"),
        (["view", "\udcff/a"], "is not UTF-8"),
        (["fetch", "smolm2-135m"], 'did you mean "smollm2-135m"?'),
        (["convert", "addition-ctl", "o", "--to", "saelens"], 'mean "addition-clt"?'),
        (["convert", "~nobody-here/x", "o", "--to", "saelens"], "no dictionary"),
    ],
)  # fmt: skip
def test_a_command_line_that_is_wrong_is_one_line(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    assert status(*args) == 2
    assert words in one_line(capsys)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model", "adition"), 'gemma-3-270m; did you mean "addition"?'),
        (("--model", "x" * 5000), "no model 'xxx"),
        (("--model", "~nobody-here/x"), "no model '~nobody-here/x'"),
        (("--dictionary", "Addition-CLT"), 'did you mean "addition-clt"?'),
        (("--dictionary", "neuron"), 'did you mean "neurons"?'),
        (("--dictionary", "neurons:" + "9" * 5000), "write neurons:k"),
        (("--dictionary", "x" * 5000), "no dictionary 'xxx"),
        (("--dictionary", ""), "no dictionary ''"),
        (("--targets", "top:-1"), "write top:position, a whole number from 0 to 5"),
        (("--targets", "feature:99999999999999999999:0:0"), "write feature:layer"),
        (("--targets", "x" * 5000), "tokens, not one"),
        (("--assume", "tokens=1,actve=2", "--dry-run"), 'did you mean "active"?'),
    ],
)  # fmt: skip
def test_names_and_texts_of_trace(
    flags: tuple[str, ...],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    args = arguments("trace", tmp_path, tmp_path / "out")
    assert status("trace", *args, *flags) == 2
    assert words in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", ["before", "after"])
def test_debug_shows_tracebacks_wherever_it_stands(
    at: str, tmp_path: Path, idle: None, capsys: pytest.CaptureFixture[str]
):
    args = ["trace", *arguments("trace", tmp_path, tmp_path / "out")]
    args = ["--debug", *args] if at == "before" else [*args, "--debug"]
    assert status(*args) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1] == "jaxclt: the work begins"


# -- every field of every command ------------------------------------------------------


def types(kind: type[Any], *, extras: bool = False) -> dict[str, str]:
    """Fields and their types; with what they are annotated with, if asked."""
    hints = typing.get_type_hints(kind, include_extras=extras)
    return {f.name: str(hints[f.name]) for f in dataclasses.fields(kind)}


def numbers(kind: type[Any]) -> Iterator[tuple[str, type]]:
    """Fields that hold numbers, and of what type."""
    for name, of in types(kind).items():
        for number in (float, int):
            if re.search(rf"\b{number.__name__}\b", of):
                yield name, number


def trials(kind: type[Any]) -> Iterator[tuple[str, Any, bool | None]]:
    """A field, a value, and whether it must be refused; None if it may be either."""
    for name, number in numbers(kind):
        values: dict[Any, bool | None] = {-1: name not in NEGATIVE, HUGE: None}
        values[0] = name not in ZERO
        if number is float:
            values |= {math.nan: True, math.inf: True, -math.inf: True}
        several = "tuple" in types(kind)[name]
        for value, refused in values.items():
            value = number(value) if math.isfinite(value) else value
            yield name, (value,) if several else value, refused


@pytest.mark.parametrize("command", [name for name in BASE if name != "serve"])
def test_numbers_are_checked_before_any_work(
    command: str,
    files: Path,
    tmp_path: Path,
    idle: None,
    capsys: pytest.CaptureFixture[str],
):
    kind, _ = cli._parts(command)
    base = parse(kind, command, arguments(command, files, tmp_path / "out"))
    before = {path.name for path in files.iterdir()}
    n = 0
    for name, value, refused in trials(kind):
        if command in ("view", "explain") and value in (0, HUGE) and not refused:
            continue  # these have no model to stop at
        change = {name: value}  # which some refuse as soon as they are made
        found = guarded(
            lambda say, change=change: cli._start(
                command, dataclasses.replace(base, **change), say
            )
        )
        assert found == 2, (name, value)
        line = one_line(capsys)
        begun = "the work begins" in line
        assert refused is None or begun != refused, (name, value, line)
        if not begun and name != "shard":
            assert f"--{name.replace('_', '-')} " in line, (name, value, line)
        assert list(tmp_path.iterdir()) == [], (name, value)
        n += 1
    assert {path.name for path in files.iterdir()} == before
    assert n or command in ("demo", "fetch", "convert")


PATHS = {
    "empty": "",
    "long": "x" * 300,
    "long inside": "a/" + "x" * 300 + "/b",
    "missing": "nothing/here",
    "file": "{files}/prompts.txt",
    "in a file": "{files}/prompts.txt/x",
}


@pytest.mark.parametrize("which", PATHS)
@pytest.mark.parametrize("command", [name for name in BASE if name != "fetch"])
def test_paths_that_lead_nowhere(
    command: str,
    which: str,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    idle: None,
    capsys: pytest.CaptureFixture[str],
):
    """In the place of every path that a command takes."""
    monkeypatch.chdir(tmp_path)
    args = arguments(command, files, tmp_path / "out")
    kind, _ = cli._parts(command)
    value = PATHS[which].format(files=files)
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    positional = 0
    annotated = types(kind, extras=True)
    for name, of in types(kind).items():
        place, here = positional, "Positional" in annotated[name]
        positional += here
        if "Path" not in of:
            continue
        changed = [*args, f"--{name.replace('_', '-')}", value]
        if here:
            changed = [*args[:place], value, *args[place + 1 :]]
        if command == "view" and name == "out" and which in ("missing", "file"):
            continue  # it is the page
        found = status(command, *changed)
        line = one_line(capsys)
        assert found == 2, (name, line)
        assert list(tmp_path.iterdir()) == [], name
    assert {path.name: path.read_bytes() for path in files.iterdir()} == before


STRINGS = {
    "empty": "",
    "half a character": "w5\ud800",
    "long": "x" * 5000,
    "dots": "..",
}
ELSEWHERE = {"host", "name"}  # of serve and fetch: would listen, or ask the network


@pytest.mark.parametrize("which", STRINGS)
@pytest.mark.parametrize("command", [name for name in BASE if name != "serve"])
def test_texts_that_mean_nothing(
    command: str,
    which: str,
    files: Path,
    tmp_path: Path,
    idle: None,
    capsys: pytest.CaptureFixture[str],
):
    """In the place of every text that a command takes: refused, or not looked at."""
    kind, _ = cli._parts(command)
    base = parse(kind, command, arguments(command, files, tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    for name, of in types(kind).items():
        if "str" not in of or name in ELSEWHERE:
            continue
        value: Any = STRINGS[which]
        value = (value,) if "tuple" in of else value
        config = dataclasses.replace(base, **{name: value})
        found = guarded(lambda say, config=config: cli._start(command, config, say))
        said = capsys.readouterr()
        if found == 0 and command in ("view", "explain", "convert"):
            continue
        assert found == 2, (name, said.err)
        assert said.err.count("\n") == 1, (name, said.err)
        assert len(said.err) <= LINE + 1
        assert not any((tmp_path / "out").glob("**/*")), name
    assert {path.name: path.read_bytes() for path in files.iterdir()} == before


# -- Python calls ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_features", 0),
        ("tolerance", math.nan),
        ("tolerance", 1.0),
        ("node_threshold", math.nan),
        ("edge_threshold", 0.0),
        ("heads", -1),
        ("devices", 0),
        ("chunk_size", 0),
        ("memory_gb", math.inf),
        ("direction", "sideways"),
    ],
)
def test_attribute_checks_its_options(option: str, value: Any):
    nothing: Any = None
    with pytest.raises(InputError, match=option.split("_")[0]):
        attribute(nothing, nothing, "prompt", **{option: value})


def test_options_of_the_other_calls_check_themselves():
    from jaxclt.dashboards.gather import FeatureOptions
    from jaxclt.evaluation.measures import EvalOptions
    from jaxclt.train.config import TrainConfig
    from jaxclt.validation.report import ValidateOptions

    for make in (
        lambda: ValidateOptions(n_features=2),
        lambda: ValidateOptions(size=math.nan),
        lambda: EvalOptions(tokens=0),
        lambda: EvalOptions(baselines=(math.inf,)),
        lambda: EvalOptions(filter="papr"),  # pyright: ignore[reportArgumentType]
        lambda: TrainConfig(lr=math.nan),
        lambda: TrainConfig(matryoshka=(8, 4)),
        lambda: TrainConfig(dead_tokens=2**31),
        lambda: TrainConfig(tokens=10**14),
        lambda: TrainConfig(chunk_tokens=8, context=8, batch_tokens=64),
        lambda: TrainConfig(features=4096, matryoshka=(4096,)),
        lambda: FeatureOptions(top=0),
        lambda: FeatureOptions(context=-1),
    ):
        with pytest.raises(InputError):
            make()


def test_training_without_a_warm_up_starts_at_its_peak():
    from jaxclt.train.schedules import learning_rate

    rate = learning_rate(0.5, 100, warmup=0)
    assert [float(rate(step)) for step in (0, 1, 50)] == [0.5] * 3


def test_an_unknown_option_of_attribute_names_the_nearest():
    nothing: Any = None
    with pytest.raises(TypeError, match='did you mean "max_features"'):
        attribute(nothing, nothing, "prompt", max_feature=3)


def test_all_numbers_of_attribute_config_can_be_left_as_they_are():
    assert AttributeConfig(max_features=None, memory_gb=None, devices=None)


# -- names and directories -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("trase", "trace"),
        ("TRACE", "trace"),
        ("trace", ""),
        ("zzzz", ""),
        ("", ""),
        ("x" * 10**6, ""),
        ("viev", "view"),
    ],
)
def test_did_you_mean(name: str, found: str):
    hint = f'; did you mean "{found}"?' if found else ""
    assert did_you_mean(name, ["trace", "sweep", "view"]) == hint
    assert did_you_mean(name, []) == ""


def test_published_dictionaries_are_known_by_name(monkeypatch: pytest.MonkeyPatch):
    from jaxclt.io import dictionary
    from jaxclt.io.published import repositories

    def none(name: str, *_: object) -> Path:
        raise InputError(f"the hub has no dictionary {name}")

    monkeypatch.setattr(dictionary, "download_dictionary", none)
    for name in repositories("dictionary"):
        with pytest.raises(InputError) as refused:
            dictionary.locate_dictionary(name.replace("-", "", 1))
        assert str(refused.value).endswith(f'; did you mean "{name}"?')
        with pytest.raises(InputError) as refused:
            dictionary.locate_dictionary(name)
        assert "did you mean" not in str(refused.value)


def test_a_training_that_memory_cannot_hold_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    args = ("train", "--model", "addition", "--data", "model", "--context", 16)
    for flags in (
        ("--features", 10**12),
        ("--chunk-tokens", 10**13),
        ("--windows-per-call", 10**12),
    ):
        assert status(*args, *flags, "--out", tmp_path / "run") == 2
        assert "GB of memory" in one_line(capsys)
        assert list(tmp_path.iterdir()) == []


def test_a_training_without_text_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = Path(__file__).parent / "goldens" / "circuit_tracer_clt" / "model"
    args = ("train", "--model", model, "--context", 32, "--out", tmp_path / "a" / "run")
    assert status(*args, "--data", tmp_path / "nothing") == 2
    assert "no such file or folder" in one_line(capsys)
    assert not list((tmp_path / "a").glob("*"))


def test_a_run_that_came_to_nothing_leaves_its_directory_free(tmp_path: Path):
    from jaxclt.runs.kept import claimed

    def claim(out: Path, ours: dict[str, Any], *leaves: str) -> None:
        with claimed(out, ours, leaves):
            pass

    ours = {"config": {"lr": 1}, "model": "m", "data": "d"}
    other = ours | {"config": {"lr": 2}}
    claim(tmp_path / "run", ours)
    claim(tmp_path / "run", other)
    (tmp_path / "run" / "windows.npz").touch()
    claim(tmp_path / "run", other)
    with pytest.raises(InputError, match=r"differs in lr \(2, not 1\)"):
        claim(tmp_path / "run", ours)
    out = tmp_path / "features"
    claim(out, {"top": 1}, "features")
    claim(out, {"top": 2}, "features")
    (out / "features").mkdir()
    claim(out, {"top": 1}, "features")
    (out / "features" / "5.json").touch()
    with pytest.raises(InputError, match=r"differs in top \(1, not 2\)"):
        claim(out, {"top": 2}, "features")
