"""Progress where nobody watches: lines on stderr, and the log of Python calls."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import GOLDEN, MODEL, tiny_config, tiny_model, write_text

import jaxclt
from jaxclt.cli import main as cli
from jaxclt.cli.progress import Stages, lines, progress
from jaxclt.global_weights.gather import coactivation
from jaxclt.runs import pace
from jaxclt.runs.pace import Pace
from jaxclt.trace.sweep import sweep_prompts
from jaxclt.train.trainer import train


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_every_ten_seconds_with_rate_and_time_left():
    clock, said = Clock(), []
    tell = Pace(said.append, clock)
    for second in range(41):
        tell("rows", 50 * second, 8000, unit=" rows/s")
        clock.now += 1
    assert said == [
        "rows: 500 of 8,000, 50 rows/s, 0:02:30 left",
        "rows: 1,000 of 8,000, 50 rows/s, 0:02:20 left",
        "rows: 1,500 of 8,000, 50 rows/s, 0:02:10 left",
        "rows: 2,000 of 8,000, 50 rows/s, 0:02:00 left",
    ]


def test_stages_share_the_ten_seconds_and_have_rates_of_their_own():
    clock, said = Clock(), []
    tell = Pace(said.append, clock)
    clock.now += 7
    tell("tokens", 10, 10)
    tell("files", 0, 4)
    clock.now += 4
    tell("files", 2, 4)
    # What an earlier run did is not part of this one's rate.
    tell("rest", 900, 1000)
    clock.now += 20
    tell("rest", 910, 1000)
    clock.now += 30
    tell("rest", 0, 1000)  # begins again
    clock.now += 10
    tell("rest", 0, 1000, note="FVU 0.1")
    assert said == [
        "files: 2 of 4, 0.5/s, 0:00:04 left",
        "rest: 910 of 1,000, 0.5/s, 0:03:00 left",
        "rest: 0 of 1,000",
        "rest: 0 of 1,000, FVU 0.1",
    ]


def test_off_a_terminal_stages_are_lines_on_one_they_are_bars():
    out, clock = io.StringIO(), Clock()
    say = Console(file=out)
    with Stages(say, units={"files": "layers/s"}) as stages:
        stages.pace = Pace(lines(say), clock)
        stages("files", 0, 30)
        clock.now += 10
        stages("files", 10, 30)
        stages("steps", 0, 30)
    assert out.getvalue() == "files: 10 of 30, 1 layers/s, 0:00:20 left\n"
    out = io.StringIO()
    say = Console(file=out, force_terminal=True, width=100)
    with progress(say, "rows", "rows/s") as on_rows:
        on_rows(3, 8)
    assert "rows" in out.getvalue()
    assert "3/8" in out.getvalue()


@pytest.mark.parametrize("name", ["globals", "features"])
def test_lines_go_to_stderr_and_json_stays_json(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(pace, "EVERY_S", 0.0)
    words = [name, "--model", str(MODEL), "--dictionary", str(GOLDEN / "dictionary")]
    words += ["--data", str(write_text(tmp_path / "text")), "--context", "32"]
    cli.main([*words, "--tokens", "600", "--json", "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens"] >= 600
    what = {"globals": "statistics", "features": "examples"}[name]
    assert any(line.startswith(f"{what}: ") for line in err.splitlines())


def test_python_calls_write_to_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(pace, "EVERY_S", 0.0)
    caplog.set_level(logging.INFO, "jaxclt")
    model, text = tiny_model(), write_text(tmp_path / "text")
    dictionary = jaxclt.load_dictionary(str(GOLDEN / "dictionary"), model)

    def said() -> set[str]:
        found = {r.getMessage().partition(":")[0] for r in caplog.records}
        assert {r.name for r in caplog.records} <= {"jaxclt"}
        caplog.clear()
        return found

    jaxclt.attribute(model, dictionary, "w7 w31 w7")
    assert "attributing" in said()
    sweep_prompts(model, dictionary, ["w7 w31 w7"], tmp_path / "sweep")
    assert "prompts" in said()
    coactivation(model, dictionary, text, tokens=300, context=32)
    assert "statistics" in said()
    train(model, text, tmp_path / "run", tiny_config(tokens=64 * 4))
    assert {"normalisation", "steps"} <= said()
