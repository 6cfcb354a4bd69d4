"""Sweeps: resumed, a failed prompt skipped, the same files as without interruption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxclt.cli import main as cli
from jaxclt.errors import InputError
from jaxclt.trace import files as trace_files
from jaxclt.trace import sweep

GOLDEN = Path(__file__).parent / "goldens" / "circuit_tracer_clt"
PROMPTS = ["w7 w31 w7 w55 w12 w90", "w3 " * 500, "w12 w90", "w7 w7 w44 w31 w2"]


def run(prompts: Path, out: Path, *more: object) -> list[dict]:
    words = ["sweep", prompts, "--model", GOLDEN / "model", "--out", out]
    words += ["--dictionary", GOLDEN / "dictionary", *more]
    cli.main([str(word) for word in words])
    return [json.loads(x) for x in (out / "index.jsonl").read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n\n")
    return path


def test_a_failed_prompt_is_reported_and_skipped(prompts: Path, tmp_path: Path):
    index = run(prompts, tmp_path / "out")
    assert [line["status"] for line in index] == ["done", "failed", "done", "done"]
    assert "context" in index[1]["error"]
    for line in index:
        report = tmp_path / "out" / line["directory"] / "report.json"
        assert report.exists() == (line["status"] == "done")


def test_resumed_equals_uninterrupted(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = run(prompts, tmp_path / "whole")
    real, calls = sweep.trace_prompt, []

    def killed(*args, **kwargs):
        calls.append(args[2].prompt)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sweep, "trace_prompt", killed)
    with pytest.raises(SystemExit) as stop:
        run(prompts, tmp_path / "out")
    assert stop.value.code == 130
    # the next run starts where this one stopped, and its half-written prompt
    first = tmp_path / "out" / whole[0]["directory"]
    untouched = (first / "graph.npz").stat().st_mtime_ns
    calls.clear()
    monkeypatch.setattr(
        sweep,
        "trace_prompt",
        lambda *a, **k: calls.append(a[2].prompt) or real(*a, **k),
    )
    assert run(prompts, tmp_path / "out") == whole
    assert calls == PROMPTS[1:]
    assert (first / "graph.npz").stat().st_mtime_ns == untouched
    for line in whole:
        if line["status"] == "done":
            for name in ("graph.npz", "graph.json"):
                ours = (tmp_path / "out" / line["directory"] / name).read_bytes()
                theirs = (tmp_path / "whole" / line["directory"] / name).read_bytes()
                assert ours == theirs, name


def test_an_interrupted_repeat_keeps_the_whole_index(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = run(prompts, tmp_path / "out")
    seen = []

    def once(folder: Path, _: object) -> dict:
        seen.append(folder.name)
        if len(seen) > 1:
            raise KeyboardInterrupt
        return {"scores": "of now"}

    monkeypatch.setattr(sweep, "_finished", once)
    with pytest.raises(SystemExit):
        run(prompts, tmp_path / "out")
    lines = (tmp_path / "out" / "index.jsonl").read_text().splitlines()
    first, *rest = map(json.loads, lines)
    assert first["scores"] == "of now"
    assert rest == whole[1:]


def test_other_settings_are_traced_again(prompts: Path, tmp_path: Path):
    prompts.write_text(PROMPTS[0])
    run(prompts, tmp_path / "out")
    index = run(prompts, tmp_path / "out", "--max-features", 20)
    folder = tmp_path / "out" / index[0]["directory"]
    with np.load(folder / "graph.npz", allow_pickle=False) as graph:
        assert len(graph["layer_A"]) <= 20


def test_a_graph_of_other_settings_that_was_not_finished_is_not_taken_for_done(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its graph.npz lies beside the report and the page of the one before."""
    prompts.write_text(PROMPTS[0])
    (line,) = run(prompts, tmp_path / "out")
    file = tmp_path / "out" / line["directory"] / "graph.npz"
    before, real = file.read_bytes(), trace_files.save_graph

    def killed(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(trace_files, "save_graph", killed)
    with pytest.raises(SystemExit):
        run(prompts, tmp_path / "out", "--max-features", 20)
    assert file.read_bytes() != before
    monkeypatch.setattr(trace_files, "save_graph", real)
    run(prompts, tmp_path / "out")
    assert file.read_bytes() == before


def test_prompts_are_read_from_jsonl(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a b"}\n\n{"prompt": "c", "name": "x"}\n')
    assert sweep.read_prompts(path) == ["a b", "c"]
    path.write_text('{"prompt": "a b"}\n{"text": "c"}\n')
    with pytest.raises(InputError, match="line 2"):
        sweep.read_prompts(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no prompt"):
        sweep.read_prompts(path)
    with pytest.raises(InputError, match="cannot read"):
        sweep.read_prompts(tmp_path / "nothing.txt")
