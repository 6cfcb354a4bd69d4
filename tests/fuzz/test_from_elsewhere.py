"""Files that were made to harm: refused in one line, exit 2, with little memory."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutate import saved
from readers import (
    READERS,
    document,
    make_checkpoints,
    make_document,
    make_globals,
    make_graph,
    make_model,
)

from jaxclt.cli import main as cli
from jaxclt.dashboards.files import INDEX, FeatureFiles
from jaxclt.errors import InputError
from jaxclt.files.yaml_file import read_yaml
from jaxclt.io import dictionary
from jaxclt.io.gguf_file import open_gguf
from jaxclt.io.weights_hf import load_hf
from jaxclt.trace.sweep import read_prompts
from jaxclt.train.checkpoint import newest_intact

LITTLE = 200 << 20  # bytes
DEEP = 100_000


@contextmanager
def refused(match: str, most: int = LITTLE) -> Iterator[None]:
    """InputError in one short line, and little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=match) as error:
            yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 300


def command(capsys: pytest.CaptureFixture, *args: object) -> str:
    """What a command that is refused says, in one line."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    said = capsys.readouterr().err.strip().splitlines()
    assert (stop.value.code, len(said)) == (2, 1), said
    return said[0]


@pytest.fixture
def traced(tmp_path: Path) -> Path:
    make_graph(tmp_path)
    make_document(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["graph.json", "report.json", "validation.json"])
@pytest.mark.parametrize(
    "text", ["[" * DEEP, '{"a":' * DEEP, "[" * DEEP + "]" * DEEP, "[" * 80 + "]" * 80]
)
def test_json_nested_deep(traced: Path, capsys, name: str, text: str):
    (traced / name).write_text(text)
    how = (
        ("patch", traced, "--feature", "0:0:0") if name[0] == "r" else ("view", traced)
    )
    assert f"{name} is nested deeper" in command(capsys, *how)


def test_prompts_nested_deep(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + "[" * DEEP)
    with refused(r"p\.jsonl:2 is nested deeper"):
        read_prompts(tmp_path / "p.jsonl")


def test_gguf_arrays_nested_deep(tmp_path: Path):
    array, name = struct.pack("<I", 9), b"general.x"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(name)) + name
    nested = array + (array + struct.pack("<Q", 1)) * DEEP
    (tmp_path / "m.gguf").write_bytes(head + nested + bytes(64))
    with refused("m.gguf is truncated or damaged"):
        open_gguf(tmp_path / "m.gguf")


CHANGES: dict[str, Any] = {
    "meta is a number": ("meta", lambda x: np.array("5"), "not of type"),
    "meta is a list": ("meta", lambda x: np.array("[]"), "not of type"),
    "meta is not text": ("meta", lambda x: np.arange(3), "meta is not text"),
    "no meta": ("meta", None, "it has no meta"),
}
OF_GRAPH: dict[str, Any] = CHANGES | {
    "dtype": ("edge_RN", lambda x: x.astype(np.int32), "no floating-point"),
    "text": ("token_T", lambda x: x.astype("<U3"), "no whole numbers"),
    "half": ("value_A", lambda x: x.astype(np.float16), "no floating-point"),
    "length": ("bias_R", lambda x: x[:-1], "bias_R has shape"),
    "square": ("edge_RN", lambda x: x[:, :-1], "edge_RN has shape"),
    "mask": ("keep_N", lambda x: x.astype(np.int8), "no truth values"),
    "layer": ("layer_A", lambda x: x + 99, "layer_A holds"),
    "position": ("pos_A", lambda x: x - 1, "pos_A holds -1"),
    "head": ("heads_row_E", lambda x: x + 9999, "heads_row_E holds"),
    "nan": ("edge_RN", lambda x: np.where(x == x[0, 0], np.nan, x), "NaN"),
    "infinite": ("influence_N", lambda x: x + np.inf, "NaN, infinity"),
    "order": ("layer_A", lambda x: x[::-1], "not in order"),
}
OF_GLOBALS: dict[str, Any] = CHANGES | {
    "dtype": ("virtual_P", lambda x: x.astype(np.int32), "no floating-point"),
    "length": ("mean_U", lambda x: x[:-1], "mean_U has shape"),
    "layer": ("layer_U", lambda x: x + 9, "layer_U holds"),
    "link": ("source_feature_P", lambda x: x + 50, "not among its features"),
    "token": ("input_token_UK", lambda x: x + 1, "no text of token"),
    "nan": ("era_P", lambda x: x * np.nan, "NaN"),
}


@pytest.mark.parametrize(
    ("kind", "change"),
    [("graph", x) for x in OF_GRAPH] + [("globals", x) for x in OF_GLOBALS],
)
def test_arrays_that_are_not_what_they_should_be(
    tmp_path: Path, kind: str, change: str
):
    make = {"graph": make_graph, "globals": make_globals}[kind]
    (file,) = make(tmp_path)
    name, changed, match = {"graph": OF_GRAPH, "globals": OF_GLOBALS}[kind][change]
    with np.load(file) as found:
        arrays = dict(found)
    old = arrays.pop(name)
    if changed is not None:
        arrays[name] = changed(np.asarray(old))
    file.write_bytes(saved(arrays))
    with refused(match):
        READERS[f"{kind}.npz"].open(tmp_path)


@pytest.mark.parametrize("kind", ["graph", "globals", "vector"])
@pytest.mark.parametrize("packed", [0, 8])
def test_a_header_that_claims_terabytes(tmp_path: Path, kind: str, packed: int):
    reader = READERS["vector" if kind == "vector" else f"{kind}.npz"]
    file = reader.make(tmp_path)[0]
    with zipfile.ZipFile(file) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    name = {"graph": "layer_A", "globals": "layer_U", "vector": "vec"}[kind] + ".npy"
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "<i4", "fortran_order": False, "shape": (1 << 40,)}
    )
    if kind == "vector":
        stream = io.BytesIO(stream.getvalue().replace(b"<i4", b"<f4"))
    parts[name] = stream.getvalue() + bytes(64)
    with zipfile.ZipFile(file, "w", packed) as new:
        for part, data in parts.items():
            new.writestr(part, data)
    with refused(rf"{name}|{name.removesuffix('.npy')}", 20 << 20):
        reader.open(tmp_path)


def test_an_own_part_that_is_none(traced: Path, capsys):
    doc = document() | {"jaxclt": 5}
    (traced / "graph.json").write_text(json.dumps(doc))
    assert "$.jaxclt: 5" in command(capsys, "view", traced)


@pytest.mark.parametrize("value", [["llama"], {"a": 1}, 5])
@pytest.mark.parametrize("field", ["model_type", "hidden_act"])
def test_a_field_of_another_type(tmp_path: Path, capsys, field: str, value: Any):
    (file,) = make_model("llama_gqa_tied", tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with refused(rf"config.json: \$\.{field}"):
        load_hf(tmp_path)
    args = ("--model", tmp_path, "--dictionary", "neurons:2", "--out", tmp_path / "o")
    assert f"$.{field}" in command(capsys, "trace", "a", *args)


@pytest.mark.parametrize("text", ["[]", "5", "null", '{"files": []}', "{", "[" * DEEP])
def test_a_checkpoint_whose_manifest_is_none(tmp_path: Path, text: str):
    """The one before it is taken, and a line says why."""
    (newest,) = make_checkpoints(tmp_path)
    newest.write_text(text)
    heard: list[str] = []
    found = newest_intact(tmp_path, heard.append)
    assert found is not None
    assert found.name == "00000001"
    assert len(heard) == 1
    assert "00000002 is damaged (its manifest cannot be read)" in heard[0]


BOMBS = {
    "lists": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "model_kind: *i\n",
    "maps": "a: &a {k: 1, l: 2}\n"
    + "".join(
        f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "model_kind: 1\n",
    "texts": f"a: &a {'x' * 20_000}\nb: [{', '.join(['*a'] * 500)}]\n",
    "itself": "a: &a [*a]\n",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_yaml_aliases_that_stand_for_too_much(tmp_path: Path, bomb: str):
    (tmp_path / "config.yaml").write_text(BOMBS[bomb])
    with refused("config.yaml is not valid YAML", 20 << 20):
        dictionary.open_dictionary(tmp_path)


def test_yaml_aliases_are_read(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("a: &a [1, 2]\nb: *a\nc: &c {k: 1}\nd: {<<: *c}\n")
    found = {"a": [1, 2], "b": [1, 2], "c": {"k": 1}, "d": {"k": 1}}
    assert read_yaml(tmp_path / "c.yaml") == found


def test_a_long_value_is_quoted_shortly(tmp_path: Path):
    value = ["y" * 1000, {"z": list(range(50))}] * 8
    (tmp_path / "config.yaml").write_text(json.dumps({"model_kind": value}))
    with refused("model_kind is", 50 << 20):
        dictionary.open_dictionary(tmp_path)


def test_an_index_that_unpacks_to_very_much(tmp_path: Path):
    with gzip.open(tmp_path / INDEX, "wb", compresslevel=1) as stream:
        stream.write(b"[")
        for _ in range(400):
            stream.write(b" " * (1 << 20))
    assert (tmp_path / INDEX).stat().st_size < 4 << 20
    with refused("134 MB are packed", 300 << 20):
        FeatureFiles(tmp_path).record(0, 0)
