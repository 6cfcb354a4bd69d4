"""Automatic labels: asked once, cached, marked, read back as a dictionary's labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_chat import FakeChat, reply
from tiny_run import GOLDEN, MODEL, write_text

from jaxclt.cli import main as cli
from jaxclt.evaluation.labels import LONGEST, MARK, parse_label
from jaxclt.io.dictionary import LABELS, read_labels


def test_only_the_last_label_line_counts():
    assert parse_label("LABEL: no\nwell\nLABEL:  'words  about w3'. ") == (
        "words  about w3"
    )
    assert parse_label("**Label**: bold") == "bold"
    assert parse_label("a label") is None
    assert parse_label("LABEL:   ") is None
    assert parse_label("LABEL: a\x00\u202eb") == "ab"
    assert len(parse_label("LABEL: " + "x" * 500) or "") == LONGEST


def test_the_command_labels_and_does_not_ask_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    text = write_text(tmp_path / "text", 6)

    def answer(body: dict, n: int):
        asked = body["messages"][-1]["content"]
        assert "[[" in asked  # tokens that switch the feature on are marked
        return reply(f"hm\nLABEL: says {len(asked)}" if "w3" in asked else "I refuse")

    with FakeChat(answer) as fake:
        args = ["features", "--model", MODEL, "--dictionary", GOLDEN / "dictionary"]
        args += ["--data", text, "--tokens", 200, "--context", 24, "--top", 3]
        args += ["--drawn", 1, "--excerpt", 8, "--features", "top:6", "--json"]
        args += ["--out", tmp_path / "out", "--labels", f"{fake.url}#fake"]
        cli.main(list(map(str, args)))
        report = json.loads(capsys.readouterr().out)
        asked = len(fake.bodies)
        assert asked == 6
        cli.main(list(map(str, args)))
        assert len(fake.bodies) == asked
    labels = json.loads((tmp_path / "out" / LABELS).read_text())
    assert report["labels"]["n"] == len(labels) > 0
    assert all(label.startswith(MARK + "says") for label in labels.values())
    assert len(read_labels(tmp_path / "out")) == len(labels)
    written = "".join(
        file.read_text("utf-8", errors="replace")
        for file in (tmp_path / "out").rglob("*.json*")
    )
    assert "secret-key" not in written
