"""Prompts of every kind, and the rows of files of texts."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest

import jaxclt
from jaxclt.cli import main as cli
from jaxclt.errors import InputError
from jaxclt.evaluation.prompts import read_eval_text
from jaxclt.io.graph_file import load_graph
from jaxclt.io.model import Model
from jaxclt.patching.subject import Subject
from jaxclt.text.corpus import read_documents
from jaxclt.text.prompts import Prompt, prompt_ids, prompt_rows, read_prompts
from jaxclt.text.windows import TokenWindows, read_windows
from jaxclt.trace.prompt import identity, trace_prompt
from jaxclt.trace.record import prompt_tokens

GOLDEN = Path(__file__).parent / "goldens" / "circuit_tracer_clt"
# Roles are words of the tiny vocabulary.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no critic') "
    "}}{% endif %}w9 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w8{% "
    "endif %}"
)
CHAT = [{"role": "system", "content": "w3 w4"}, {"role": "user", "content": "w31 w7"}]


@functools.cache
def model() -> Model:
    found = jaxclt.load_model(GOLDEN / "model")
    found.tokenizer.backend.chat_template = TEMPLATE
    return found


@functools.cache
def dictionary():
    return jaxclt.load_dictionary(GOLDEN / "dictionary", model())


# -- prompts ---------------------------------------------------------------------------


def test_a_chat_is_its_text_and_keeps_its_messages(tmp_path: Path):
    text = "w9 w3 w4 w9 w31 w7 w8"
    assert prompt_tokens(model(), CHAT) == prompt_tokens(model(), text)
    traced = trace_prompt(model(), dictionary(), CHAT)
    plain = trace_prompt(model(), dictionary(), text)
    np.testing.assert_array_equal(traced.graph.edge_RN, plain.graph.edge_RN)
    assert traced.graph.meta.prompt == text
    assert traced.identity == plain.identity | {"messages": CHAT}
    # opened again: what it is, for the model and for the page
    jaxclt.write_trace(traced, tmp_path)
    assert load_graph(tmp_path / "graph.npz").meta.messages == CHAT
    assert json.loads((tmp_path / "graph.json").read_text())["jaxclt"]["messages"] == (
        CHAT
    )
    again = Subject.of(model(), dictionary(), load_graph(tmp_path / "graph.npz"))
    token_T = np.asarray(again.patchable.recording.token_T)
    assert token_T.tolist() == prompt_tokens(model(), text)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([*CHAT, {"role": "critic", "content": "w3"}], r"refuses .*\(no critic\)"),
        ([{"role": "user"}], "message 0 is not a role and a content"),
        ([*CHAT, "w3"], "message 2 is not a role and a content"),
        ([], "is empty"),
        ("  ", "is empty"),
        (["w3"], "a prompt is a text, a list of token ids, or"),
        ({"role": "user", "content": "w3"}, "a prompt is a text"),
        ([1.5], "a prompt is a text"),
        ([[1, 2], [3]], "a prompt is a text"),
        (None, "a prompt is a text"),
        ([3, 97], r"not in 0\.\.96"),
        ("w3 \udc80", "half a character"),
        ([{"role": "user", "content": "w3 \ud800"}], "half a character"),
    ],
)
def test_what_is_no_prompt_is_one_line(prompt, message: str):
    with pytest.raises(InputError, match=message) as error:
        jaxclt.attribute(model(), dictionary(), prompt)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 300


def test_windows_are_made_of_chats_too():
    found = read_windows(model(), [CHAT, "w3 w4", [5, 6, 7]])
    want = [prompt_ids(model().tokenizer, x) for x in (CHAT, "w3 w4", [5, 6, 7])]
    for row_S, ids in zip(found.token_WS, want, strict=True):
        assert row_S[row_S >= 0].tolist() == ids


def test_windows_of_another_model_are_refused():
    """No position beyond the context is taken for the last one."""
    for token_WS, message in (
        (np.zeros((2, 65), np.int32), "has 65 tokens, the model takes at most 64"),
        (np.full((2, 6), 97, np.int32), r"not in 0\.\.96"),
    ):
        windows = TokenWindows(token_WS, token_WS >= 0)
        with pytest.raises(InputError, match=message):
            read_windows(model(), windows)


def test_a_sweep_of_chats(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Rows of messages, and with --chat any row is what the user says."""
    rows = [{"messages": CHAT}, {"prompt": None}, {"prompt": "w31 w7"}]
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    says: list[Prompt] = [CHAT, [CHAT[1]]]
    prompts = read_prompts(file)
    assert prompts == [CHAT, "w31 w7"]
    folder = tmp_path / "model"
    folder.mkdir()
    for part in (GOLDEN / "model").iterdir():
        (folder / part.name).write_bytes(part.read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    args = ["sweep", file, "--chat", "--model", folder, "--out", out, "--json"]
    args += ["--dictionary", GOLDEN / "dictionary", "--max-features", 20]
    cli.main([str(arg) for arg in args])
    index = json.loads(capsys.readouterr().out)
    assert [line["messages"] for line in index] == says
    assert [line["directory"] for line in index] == ["00000-w31-w7", "00001-w31-w7"]
    assert [line["status"] for line in index] == ["done", "done"]
    for line, said in zip(index, says, strict=True):
        report = json.loads((out / line["directory"] / "report.json").read_text())
        assert report["identity"]["messages"] == said
    # The same command has nothing left to do.
    before = [f.stat().st_mtime_ns for f in sorted(out.rglob("graph.npz"))]
    cli.main([str(arg) for arg in args])
    assert [f.stat().st_mtime_ns for f in sorted(out.rglob("graph.npz"))] == before


def test_another_template_is_another_trace():
    config = jaxclt.trace.prompt.AttributeConfig()
    before = identity(model(), dictionary(), CHAT, config)
    tokenizer = dataclasses.replace(model().tokenizer, backend=Other())
    other = dataclasses.replace(model(), tokenizer=tokenizer)
    after = identity(other, dictionary(), CHAT, config)
    assert after["prompt"] == "said 1"
    assert after | {"prompt": before["prompt"]} == before


class Other:
    """A tokenizer whose template knows no two calls that are equal."""

    chat_template = "x"
    calls = 0

    def apply_chat_template(self, *args: object, **options: object) -> str:
        self.calls += 1
        return f"said {self.calls}"


# -- rows of files ---------------------------------------------------------------------

NO_TEXT = [("null", None), ('""', None), ('" \\n"', None)]
WRONG = [("3", "int"), ('["a"]', "list"), ('{"a": 1}', "dict"), ("true", "bool")]


@pytest.mark.parametrize(("value", "kind"), NO_TEXT + WRONG)
@pytest.mark.parametrize("key", ["text", "prompt"])
def test_a_row_without_text_is_passed_over(tmp_path: Path, key, value, kind):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"{key}": "w3 w4"}}\n\n{{"{key}": {value}, "x": 1}}\n')

    def read() -> list:
        return list(read_documents(file) if key == "text" else read_prompts(file))

    if kind is None:
        assert read() == ["w3 w4"]
        return
    with pytest.raises(InputError, match=rf"3: `{key}` is {kind}, not text"):
        read()


def test_prompts_for_windows_pass_over_the_same_rows(tmp_path: Path):
    """An empty one would ask for the token behind nothing."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": null}\n{"prompt": "w3 w4", "answer": null}\n')
    text = read_eval_text(model(), file, tokens=10, context=16)
    assert text.windows.token_WS.shape == (1, 2)
    file.write_text('{"prompt": "w3", "answer": 5}\n')
    with pytest.raises(InputError, match="line 1: `answer` is int, not text"):
        read_eval_text(model(), file, tokens=10, context=16)
    file.write_text('{"prompt": null}\n{"prompt": " "}\n')
    for read in (prompt_rows, read_prompts, lambda f: read_windows(model(), f)):
        with pytest.raises(InputError, match="holds no prompt"):
            read(file)
    file.write_text('{"prompt": "w3", "messages": []}\n')
    with pytest.raises(InputError, match="line 1: give a prompt or messages"):
        read_prompts(file)
    file.write_text('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(InputError, match="line 1: message 0 is not a role"):
        read_prompts(file)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"not json", r"is not JSON \(Expecting value: line 2 column 1\)"),
        (b"[" * 100_000, "is nested deeper than"),
        (b"1" * 10_000, r"is not JSON \(Exceeds the limit"),
        (b'{"prompt": "\xff"}', "is not UTF-8"),
    ],
)
def test_a_line_that_is_no_json_is_named(tmp_path: Path, line: bytes, why: str):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"prompt": "w3"}\n' + line + b"\n")
    with pytest.raises(InputError, match=rf"rows.jsonl:2 {why}") as error:
        read_prompts(file)
    assert len(str(error.value)) < 250


def test_lines_end_where_files_end_them(tmp_path: Path):
    """U+2028 and a form feed stand in texts; a byte order mark is no letter."""
    odd = "w3\u2028w4\x0c w5\x85"
    for name, end in (("rows.jsonl", "\r\n"), ("rows.txt", "\n")):
        file = tmp_path / name
        row = json.dumps({"prompt": odd}, ensure_ascii=False)
        text = row if name == "rows.jsonl" else odd
        file.write_bytes(b"\xef\xbb\xbf" + f"{text}{end}".encode())
        assert read_prompts(file) == [odd]
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": odd}, ensure_ascii=False), "utf-8")
    assert list(read_documents(file)) == [odd.strip()]
    file.write_text('{"text": "half \\ud800 a letter"}')
    assert list(read_documents(file)) == ["half \ufffd a letter"]
