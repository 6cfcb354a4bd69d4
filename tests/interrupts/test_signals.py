"""Ctrl-C and SIGTERM: a flag that is never lost, and a second one that is."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console
from tiny_run import GOLDEN, MODEL, as_flags, tiny_config, write_text

from jaxclt.cli import main as cli
from jaxclt.cli.progress import Interrupted, Stages, Stop, stoppable
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.train import processes

BOTH = pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Ctrl-C is not ignored, as it is where the suite runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number: int, heard: Callable[[], bool]) -> None:
    """A signal to this process, until it is heard."""
    os.kill(os.getpid(), number)
    end = time.monotonic() + 10
    while not heard() and time.monotonic() < end:
        time.sleep(0.001)
    assert heard()


def exit_status(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert isinstance(end.value.code, int)
    return end.value.code


@BOTH
def test_a_signal_sets_the_flag_and_the_next_report_ends_the_work(
    number: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]
):
    say, before = Console(stderr=True), signal.getsignal(number)

    def work() -> None:
        with stoppable(say) as stop, Stages(say, look=stop.look) as stages:
            stages("rows", 1, 2)
            send(number, stop)
            stages("rows", 2, 2)

    with pytest.raises(Interrupted) as end:
        work()
    assert end.value.status == status
    assert signal.getsignal(number) is before
    assert "stopping at the next step" in capsys.readouterr().err


def test_a_loop_that_stops_by_itself_ends_with_the_status_of_the_signal():
    """As `jaxclt.graph` does where there is nothing to keep."""

    def work() -> None:
        with stoppable(Console(stderr=True)) as stop:
            send(signal.SIGTERM, stop)
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as end:
        work()
    assert end.value.status == 143


def test_a_signal_in_a_callback_of_the_collector_is_not_lost():
    """Where an exception would be written to stderr and forgotten."""
    sent = []

    def callback(phase: str, _: object) -> None:
        if not sent:
            sent.append(phase)
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # bytecodes, between which handlers run
                pass

    with stoppable(Console(stderr=True)) as stop:
        gc.callbacks.append(callback)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(callback)
        end = time.monotonic() + 10
        while not stop() and time.monotonic() < end:
            time.sleep(0.001)
        assert stop()


STUCK = """
import ctypes
from rich.console import Console
from jaxclt.cli.progress import stoppable
with stoppable(Console(stderr=True)):
    print("ready", flush=True)
    c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    c.pthread_mutex_lock(mutex)
    c.pthread_mutex_lock(mutex)  # for ever, whatever signals come
"""


@BOTH
def test_the_second_leaves_at_once_even_out_of_c_code(
    number: signal.Signals, status: int
):
    with subprocess.Popen(
        [sys.executable, "-c", STUCK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline() == "ready\n"
        running.send_signal(number)
        assert "stopping" in running.stderr.readline()
        assert running.poll() is None
        running.send_signal(number)
        assert running.wait(10) == status


def test_what_is_ignored_stays_ignored():
    """A job in the background of a script has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable(Console(stderr=True)) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            assert not stop()
    finally:
        signal.signal(signal.SIGINT, before)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(AttributeConfig):
    """Many short steps, between which a trace can be stopped."""

    chunk_size: int = 8
    n_bands: int | None = 3
    rows_per_update: int | None = 20
    direction: Literal["auto", "pull", "push"] = "pull"


@BOTH
def test_a_stopped_trace_keeps_its_graph(
    number: signal.Signals,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    from jaxclt.graph import attribute
    from jaxclt.trace import prompt as trace

    monkeypatch.setattr(attribute, "AttributeConfig", Small)
    real = trace.trace_prompt

    def traced(*args: object, stop: Stop, **more: object) -> object:
        def on_rows(done: int, total: int) -> None:
            if done >= 30 and not stop():
                send(number, stop)

        return real(*args, **(more | {"on_rows": on_rows, "stop": stop}))  # type: ignore

    monkeypatch.setattr(trace, "trace_prompt", traced)
    words = ["trace", "w7 w31 w7 w55 w12 w90", "--model", str(MODEL), "--json"]
    words += ["--dictionary", str(GOLDEN / "dictionary"), "--tolerance", "0"]
    out = tmp_path / "out"
    assert exit_status([*words, "--validate", "--out", str(out)]) == status
    report = json.loads(capsys.readouterr().out)
    assert report["work"]["stopped"]
    assert report == json.loads((out / "report.json").read_text())
    assert 20 < report["graph"]["features_attributed"] == report["identity"]["stopped"]
    assert report["certificate"]["max_relative_row_error"] < 1e-5
    assert (out / "index.html").is_file()
    assert not (out / "validation.json").exists()


@BOTH
def test_a_stopped_training_writes_a_checkpoint(
    number: signal.Signals,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    asked = []

    def agree(stop: Callable[[], bool], met: bool) -> bool:
        asked.append(met)
        if len(asked) == 3:
            send(number, stop)
        return stop()

    monkeypatch.setattr(processes, "agree", agree)
    out, text = tmp_path / "run", write_text(tmp_path / "text")
    words = ["train", "--model", str(MODEL), "--data", str(text), "--out", str(out)]
    assert exit_status([*words, *as_flags(tiny_config(tokens=64 * 8))]) == status
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["00000003"]
    assert "stopped after step 3 of 8" in capsys.readouterr().err
    # A run that nothing stops has no line there.
    assert not (out / "metrics.jsonl").read_text()
