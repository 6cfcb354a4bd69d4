"""Feature files: packed, read back, shown, and the command that makes them."""

from __future__ import annotations

import dataclasses
import gzip
import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxclt
from jaxclt.cli import main as cli
from jaxclt.clt.coder import Bound, load
from jaxclt.dashboards import documents, files
from jaxclt.dashboards.examples import Examples
from jaxclt.dashboards.files import FeatureFiles
from jaxclt.dashboards.gather import FeatureOptions, feature_dashboards
from jaxclt.dashboards.logits import vocabulary_effects
from jaxclt.dashboards.stream import STATE, gather_examples
from jaxclt.errors import InputError
from jaxclt.global_weights.weights import logit_weights
from jaxclt.io.model import Model
from jaxclt.runs import kept as keeping
from jaxclt.text.windows import read_windows
from jaxclt.trace import pages

GOLDEN = Path(__file__).parents[1] / "goldens" / "circuit_tracer_clt"
MODEL, DICTIONARY = GOLDEN / "model", GOLDEN / "dictionary"


@cache
def model() -> Model:
    return jaxclt.load_model(MODEL)


@cache
def dictionary(name: str = "") -> Any:
    return jaxclt.load_dictionary(name or DICTIONARY, model())


@cache
def text() -> str:
    key = jax.random.key(0)
    word_N = np.asarray(jax.random.randint(key, (1200,), 3, 90))
    words = [f"w{i}" for i in word_N.tolist()]
    parts = [" ".join(words[i : i + 100]) for i in range(0, len(words), 100)]
    return "<|endoftext|>".join(parts)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(text(), "utf-8")
    return file


def make(out: Path, data: Path, **more: Any) -> tuple[dict[str, Any], Examples]:
    settings = {
        "tokens": 500,
        "context": 24,
        "excerpt": 8,
        "top": 3,
        "drawn": 5,
        "batch_tokens": 240,
    }
    known = {field.name for field in dataclasses.fields(FeatureOptions)}
    settings |= {name: more.pop(name) for name in known & set(more)}
    which = more.pop("dictionary", dictionary())
    options = FeatureOptions(**settings)
    return feature_dashboards(model(), which, data, out, options, **more)


def contents(folder: Path) -> dict[str, bytes]:
    return {x.name: x.read_bytes() for x in sorted(folder.iterdir())}


def test_numbers_of_features_go_back_and_forth() -> None:
    assert files.cantor(2, 3) == 18
    for place in ((0, 0), (0, 7), (25, 1 << 20), (3, 0)):
        assert files.uncantor(files.cantor(*place)) == place


def test_records_hold_what_examples_do(tmp_path: Path, data: Path) -> None:
    report, examples = make(tmp_path / "out", data, loose=True)
    found = FeatureFiles(tmp_path / "out")
    strings = model().tokenizer.token_strings(range(model().cfg.d_vocab))
    effects = vocabulary_effects(dictionary(), model().params, 1, np.arange(8))
    assert report["tokens"] == examples.n_tokens >= 500
    assert report["features"] == len(examples.layer_U)
    assert report["never_active"] == (examples.count_U == 0).mean()
    seen = 0
    for u, (layer, feature) in enumerate(
        zip(examples.layer_U.tolist(), examples.feature_U.tolist(), strict=True)
    ):
        doc = found.record(layer, feature)
        assert doc is not None
        number = files.cantor(layer, feature)
        loose = tmp_path / "out" / "features" / f"{number}.json"
        assert json.loads(loose.read_bytes()) == doc
        assert doc["index"] == number
        assert doc["activation_frequency"] == pytest.approx(examples.frequency[u])
        assert sum(doc["histogram"]) == examples.histogram_UB[u].sum()
        first, *drawn = doc["examples_quantiles"]
        assert first["quantile_name"] == "Top activations"
        n_drawn = sum(len(q["examples"]) for q in drawn)
        assert n_drawn == (examples.drawn.window_UE[u] >= 0).sum()
        top = set(examples.top.window_UE[u].tolist())
        again = sum(e["is_repeated_datapoint"] for q in drawn for e in q["examples"])
        assert again == sum(w in top for w in examples.drawn.window_UE[u] if w >= 0)
        for e, example in enumerate(first["examples"]):
            at = example["train_token_ind"]
            window, pos = examples.top.window_UE[u, e], examples.top.pos_UE[u, e]
            assert example["tokens"][at] == strings[examples.token_WS[window, pos]]
            acts = example["tokens_acts_list"]
            assert len(acts) == len(example["tokens"]) == 8
            np.testing.assert_allclose(acts, examples.top.act_UEC[u, e], rtol=6e-4)
            assert acts[at] == max(acts) > 0
            assert doc["act_min"] <= acts[at] * 1.001
            assert acts[at] <= doc["act_max"] * 1.001
            seen += 1
        if layer == 1 and feature < 8:
            top_K = effects.top_NK[feature].tolist()
            assert doc["top_logits"] == [strings[t] for t in top_K]
    assert seen
    assert found.record(99, 0) is None
    assert found.record(0, 10**6) is None


def test_records_of_neurons_show_both_sides(tmp_path: Path, data: Path) -> None:
    """The larger side first; a feature on one side has one list, as any other."""
    places = [(0, 0), (0, 3), (1, 1), (1, 5), (2, 2)]
    _, examples = make(
        tmp_path, data, dictionary=dictionary("neurons:9"), features=places
    )
    found, both = FeatureFiles(tmp_path), 0
    for u, place in enumerate(places):
        doc = found.record(*place)
        assert doc is not None
        tops = [
            [e["tokens_acts_list"][e["train_token_ind"]] for e in q["examples"]]
            for q in doc["examples_quantiles"]
            if q["quantile_name"].startswith("Top")
        ]
        names = [q["quantile_name"] for q in doc["examples_quantiles"]]
        low, high = examples.min_U[u], examples.max_U[u]
        if low < 0 < high:
            both += 1
            order = ["above", "below"] if high >= -low else ["below", "above"]
            assert names[:2] == [f"Top activations {side} zero" for side in order]
            above, below = tops if high >= -low else tops[::-1]
            assert above == sorted(above, reverse=True)
            assert below == sorted(below)
            assert above[0] == pytest.approx(high, rel=1e-3)
            assert below[0] == pytest.approx(low, rel=1e-3)
            assert above[-1] > 0 > below[-1]
        else:
            assert names[0] == "Top activations"
            assert len(tops) == 1
    assert both > 1


def test_the_packed_form_is_circuit_tracers(tmp_path: Path, data: Path) -> None:
    """Read as its page does: a range of bytes, a length, gzip."""
    make(tmp_path, data, features=[(0, 2), (1, 0), (1, 5)])
    folder = tmp_path / "features"
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    F = load(dictionary(), model().params, model().cfg).n_features
    assert len(index) == model().cfg.n_layers
    for layer, feature in ((0, 2), (1, 0), (1, 5)):
        entry = index[str(layer)]
        assert entry["filename"] == f"layer_{layer}.bin"
        assert len(entry["offsets"]) == F + 1
        raw = (folder / entry["filename"]).read_bytes()
        raw = raw[entry["offsets"][feature] : entry["offsets"][feature + 1]]
        (length,) = struct.unpack("<I", raw[:4])
        assert len(raw) == 4 + length
        doc = json.loads(gzip.decompress(raw[4:]))
        assert (doc["layer"], doc["feature"]) == (layer, feature)
        assert FeatureFiles(folder).record(layer, feature) == doc
    assert FeatureFiles(folder).record(1, 4) is None
    documents.validate(json.dumps(doc).encode())
    del doc["examples_quantiles"]
    with pytest.raises(InputError, match="examples_quantiles"):
        documents.validate(json.dumps(doc).encode())


class KilledError(Exception):
    pass


def test_killed_anywhere_the_files_are_the_same(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "SAVE_S", 0.0)
    report, _ = make(tmp_path / "whole", data)
    left: list[str] = []

    def die(what: str, done: int, total: int) -> None:
        left.append(f"{what} {done}")
        if (what == "examples" and done and left.count("dead") < 2) or (
            what == "files" and left.count("dead") < 3
        ):
            left.append("dead")
            raise KilledError

    for _ in range(3):
        with pytest.raises(KilledError):
            make(tmp_path / "killed", data, on_stage=die)
    kept = (tmp_path / "killed" / "features" / "layer_0.bin").stat().st_mtime_ns
    folder = tmp_path / "killed" / "features"
    # Of a process on another machine, which may live: left alone, and not counted.
    foreign = folder / ".layer_1.bin.ffffff-ffffff-1-ffffff-abc"
    foreign.write_bytes(bytes(99))
    again, _ = make(tmp_path / "killed", data, on_stage=die)
    foreign.unlink()
    assert (folder / "layer_0.bin").stat().st_mtime_ns == kept
    assert contents(folder) == contents(tmp_path / "whole" / "features")
    for timed in ("seconds", "tokens_per_second"):
        del report[timed], again[timed]
    assert again == report
    with pytest.raises(
        InputError, match=r"another run, which differs in top \(3, not 2\)"
    ):
        make(tmp_path / "killed", data, top=2)


def test_a_folder_of_others_is_left_alone(tmp_path: Path, data: Path) -> None:
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "5.json").write_text("{}")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        make(tmp_path, data)


@pytest.mark.parametrize("name", ["", "neurons"])
def test_tokens_that_decoders_raise_and_lower(name: str) -> None:
    params, layer = model().params, 1
    feature_N = np.asarray([0, 3, 11])
    if name:
        tied_DV = np.asarray(params.embed_VD).T
        raw_DV = tied_DV if params.unembed_DV is None else params.unembed_DV
        written_ND = np.asarray(params.blocks.down_LID)[layer][feature_N]
        gained_ND = written_ND * np.asarray(params.norm_out_D)[None]
        logit_NV = gained_ND @ np.asarray(raw_DV)
        logit_NV = logit_NV - logit_NV.mean(1, keepdims=True)
    else:
        logit_NV = logit_weights(
            Bound(dictionary(), params, model().cfg), layer, feature_N
        )
    found = vocabulary_effects(dictionary(name), params, layer, feature_N, k=4)
    order_NV = np.argsort(-logit_NV, 1)
    np.testing.assert_array_equal(found.top_NK, order_NV[:, :4])
    np.testing.assert_array_equal(found.bottom_NK, order_NV[:, :-5:-1])
    value_NK = np.take_along_axis(logit_NV, found.bottom_NK, 1)
    np.testing.assert_allclose(found.bottom_value_NK, value_NK, rtol=1e-4, atol=1e-5)


def test_significant_digits() -> None:
    x = np.asarray([0, 0.00012345, 1.23456, -98765.4, 1e-30, 2**-0.5])
    want = [0, 0.0001234, 1.235, -98770, 1e-30, 0.7071]
    np.testing.assert_allclose(documents.significant(x), want, rtol=1e-12)
    assert documents.significant(x)[2] == 1.235


def test_damaged_files_say_so(tmp_path: Path, data: Path) -> None:
    make(tmp_path, data, features=[(0, 2), (0, 3)])
    folder = tmp_path / "features"
    layer = folder / "layer_0.bin"
    layer.write_bytes(layer.read_bytes()[:-9])
    with pytest.raises(InputError, match="feature 0:3 cannot be read"):
        FeatureFiles(folder).record(0, 3)
    with pytest.raises(InputError, match="damaged"):
        files.read_offsets(layer)
    bad = {"0": {"filename": "../secret.bin", "offsets": [0, 9]}}
    (folder / "index.json.gz").write_bytes(gzip.compress(json.dumps(bad).encode()))
    with pytest.raises(InputError, match="outside its folder"):
        FeatureFiles(folder).record(0, 0)


@pytest.mark.parametrize("name", ["neurons", "neurons:5"])
def test_neurons_have_dashboards(name: str, tmp_path: Path, data: Path) -> None:
    if name == "neurons":
        with pytest.raises(InputError, match="every neuron is active"):
            make(tmp_path, data, dictionary=dictionary(name), features="top:6")
    few = [(0, 1), (0, 2), (1, 7)] if name == "neurons" else "top:6"
    report, examples = make(tmp_path, data, dictionary=dictionary(name), features=few)
    assert report["features"] == len(examples.layer_U) == (3 if few != "top:6" else 6)
    with pytest.raises(InputError, match="differs in neurons"):
        make(tmp_path, data, dictionary=dictionary("neurons:4"), features=[(0, 1)])
    layer, feature = int(examples.layer_U[0]), int(examples.feature_U[0])
    doc = FeatureFiles(tmp_path).record(layer, feature)
    assert doc is not None
    assert doc["top_logits"]
    assert doc["act_min"] < 0 < doc["act_max"]
    windows = read_windows(model(), data, tokens=500, context=24)
    encoder = load(dictionary(name), model().params, model().cfg)
    whole = gather_examples(model().params, encoder, windows)
    u = layer * encoder.n_features + feature
    assert whole.count_U[u] == examples.count_U[0]


def test_pages_show_packed_features(tmp_path: Path, data: Path) -> None:
    make(tmp_path, data)
    number = files.cantor(1, 3)
    doc: dict[str, Any] = {"nodes": [{"feature": number}, {"feature": None}, {}]}
    for folder in (tmp_path, tmp_path / "features"):
        shown = pages.with_features(doc, folder)
        found = shown["jaxclt"]["features"]
        assert list(found) == [str(number)]
        assert found[str(number)] == FeatureFiles(tmp_path).record(1, 3)


def test_the_command(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["features", "--model", MODEL, "--dictionary", DICTIONARY, "--data", data]
    args += ["--out", tmp_path / "out", "--tokens", 300, "--context", 24]
    args += ["--features", "top:5", "--top", 3, "--drawn", 2, "--excerpt", 6]
    cli.main(list(map(str, [*args, "--json"])))
    report = json.loads(capsys.readouterr().out)
    assert report["features"] == 5
    assert report["settings"]["drawn"] == 2
    assert (tmp_path / "out" / STATE).is_file()
    cli.main(list(map(str, args)))
    assert "never active" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, [*args, "--tokens", 0])))
    assert stop.value.code == 2
    assert "--tokens 0: give at least 1" in capsys.readouterr().err
