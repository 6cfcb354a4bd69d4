"""`jaxclt eval` on a tiny model: files, JSON, judges, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases import run_command as run
from tiny_run import GOLDEN, MODEL, write_text


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("eval_command")
    (folder / "prompts.txt").write_text("w3 w9 w4 w5\nw7 w3 w8 w4\n")
    return [
        *("eval", "--model", MODEL, "--dictionary", GOLDEN / "dictionary"),
        *("--data", write_text(folder / "text", 8), "--tokens", 120),
        *("--context", 17, "--agreement-tokens", 60, "--layer-tokens", 0),
        *("--prompts", folder / "prompts.txt", "--max-features", 40),
        *("--perturbed", 0, "--sort", 12, "--contrastive", 4),
    ]


def test_the_command(
    small: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    small = [*small, "--out", out, "--baselines"]
    assert run(*small, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    wanted = "dictionary fvu l0 dead top1 kl completeness completeness_ct replacement"
    for key in f"{wanted} path_length sort contrastive intervals".split():
        assert key in row
    assert row["graphs"] == 2
    assert row["judge"].startswith("baseline")
    assert 0 <= row["sort"] <= 1
    # the tiny tokenizer reads none of the built-in sentences
    assert row["contrastive"] is None
    document = json.loads((out / "eval.json").read_text())
    assert document["rows"] == [row]
    assert document["options"]["tokens"] == 120
    logged = list((out / "judged").rglob("sort.jsonl"))
    assert len(logged) == 1
    assert len(logged[0].read_text().splitlines()) == row["judged"]["sort"]["n"] > 0
    assert run(*small) == 0  # everything is there already
    shown = capsys.readouterr().out
    assert "path length" in shown
    assert "table.md" in shown


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--data", ""], "give --data"),
        (["--judge", "nobody"], "judge 'nobody' is unknown"),
        (["--tokens", "0"], "--tokens 0"),
        (["--agreement-tokens", "0"], "--agreement-tokens 0"),
        (["--dictionary", "neurons@none"], "neurons@x"),
        (["--concepts", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_bad_input_says_what_to_change(
    small: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    says: str,
):
    assert run(*small, "--out", tmp_path, *change) == 2
    assert says in capsys.readouterr().err.replace("\n", " ")
