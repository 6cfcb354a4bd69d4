"""Text and windows to global weights: the Python calls and the command."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import run_command as run

import jaxclt
from jaxclt.clt.active import active_features
from jaxclt.clt.coder import Bound
from jaxclt.clt.subset import Subset
from jaxclt.errors import InputError
from jaxclt.global_weights import gather as global_gather
from jaxclt.global_weights.sparse import check_size
from jaxclt.io.model import Model
from jaxclt.runs import kept
from jaxclt.text import features as global_text
from jaxclt.trace.record import record_prompt

GOLDEN = Path(__file__).parents[1] / "goldens" / "circuit_tracer_clt"
MODEL, DICTIONARY = GOLDEN / "model", GOLDEN / "dictionary"


@pytest.fixture(scope="module")
def model() -> Model:
    return jaxclt.load_model(MODEL)


@pytest.fixture(scope="module")
def dictionary(model: Model):
    return jaxclt.load_dictionary(DICTIONARY, model)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    documents = [
        " ".join(f"w{min(96, 3 + int(rng.expovariate(0.05)))}" for _ in range(100))
        for _ in range(40)
    ]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("<|endoftext|>".join(documents), "utf-8")
    return file


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches and flushes of a few windows."""
    monkeypatch.setattr(global_gather, "BATCH_TOKENS", 144)
    monkeypatch.setattr(global_gather, "FLUSH_TOKENS", 300)


WINDOWS = [[5, 9, 30, 12, 60, 7], [70, 9, 9, 44, 13, 8], [3, 4, 5, 6, 7, 8]]


def test_a_file_of_prompts_gives_a_window_each(model: Model, tmp_path: Path):
    """Where the context is too short for windows of text, too."""
    prompts, file = ["w3 w4 w9", "w5 w6", "w7 w8"], tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": x}) + "\n" for x in prompts))
    found = jaxclt.read_windows(model, file)
    np.testing.assert_array_equal(
        found.token_WS, jaxclt.read_windows(model, prompts).token_WS
    )
    assert len(jaxclt.read_windows(model, file, tokens=3).token_WS) == 2
    short = dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, n_ctx=16))
    with pytest.raises(InputError, match=r"too short .* give a \.jsonl"):
        jaxclt.read_windows(short, tmp_path / "text.txt")


def test_windows_of_ids_text_and_masks(model: Model):
    found = jaxclt.read_windows(model, WINDOWS)
    assert found.token_WS.tolist() == WINDOWS
    assert found.mask_WS[:, 1:].all()
    assert not found.mask_WS[:, 0].any()
    last = jaxclt.read_windows(model, WINDOWS, mask=np.arange(6) == 5)
    assert last.n_tokens == 3
    ragged = jaxclt.read_windows(
        model, iter(["w5 w9 w30", [7, 8]]), mask=[[1, 0, 1], [0, 1]]
    )
    assert ragged.token_WS.tolist() == [[5, 9, 30], [7, 8, -1]]
    assert ragged.mask_WS.tolist() == [[True, False, True], [False, True, False]]
    everywhere = jaxclt.read_windows(model, [[0, 5], [7]], mask="all")
    assert everywhere.mask_WS.tolist() == [[True, True], [True, False]]
    for bad, kwargs, message in (
        ([], {}, "no tokens"),
        ([[5, 97]], {}, r"not in 0\.\.96"),
        ([[5, -1, 6]], {}, "put it after the text"),
        ([[5] * 65], {}, "at most 64"),
        ([[5, 6]], {"mask": [True]}, "1 positions, the windows 2"),
        ([[5, 6]], {"mask": "some"}, "give None"),
        ([[5, 6]], {"mask": [[1, 1], [1, 1]]}, "2 rows"),
        ([[5]], {}, "no position of the data counts"),
    ):
        with pytest.raises(InputError, match=message):
            jaxclt.read_windows(model, bad, **kwargs)


def test_prompt_family_to_neighbourhood(model: Model, dictionary, tmp_path: Path):
    """What an application does with same-length prompts of ids."""
    features = [(layer, i) for layer in range(4) for i in range(0, 40, 3)]
    stats = jaxclt.coactivation(
        model,
        dictionary,
        WINDOWS * 30,
        features=features,
        mask=np.arange(6) >= 4,
        input_tokens=[7, 8, 60],
        output_tokens=2,
    )
    assert stats.n_tokens == 180
    assert len(stats.subset) == 56
    # The same from the tracing code, prompt by prompt.
    a_UN = np.zeros((56, 6))
    for w, ids in enumerate(WINDOWS):
        token = np.asarray(ids, np.int32)
        recording = record_prompt(model.params, token, model.cfg)
        active = active_features(dictionary, model.params, recording, model.cfg)
        for layer, pos, feature, value in zip(
            active.layer_A, active.pos_A, active.feature_A, active.value_A, strict=True
        ):
            if pos >= 4 and feature % 3 == 0:
                slot = stats.subset.slot(int(layer), int(feature))
                a_UN[slot, 2 * w + pos - 4] = value
    np.testing.assert_allclose(stats.mean, a_UN.mean(1), rtol=1e-4, atol=1e-6)
    weights = jaxclt.global_weights(model, dictionary, stats)
    share = (a_UN @ a_UN.T) / np.where(a_UN.sum(1), a_UN.sum(1), 1)[:, None]
    alive = [u for u in range(56) if stats.subset.layer_U[u] == 3 and a_UN[u].any()]
    layer, feature = 3, int(stats.subset.feature_U[alive[0]])
    links = weights.inputs(layer, feature, 5)
    assert len(links) == 5
    for row in links.rows():
        slot = stats.subset.slot(row["source_layer"], row["source_feature"])
        expected = share[alive[0], slot] * row["virtual"]
        assert row["twera"] == pytest.approx(expected, rel=1e-3)
    around = jaxclt.neighbourhood(
        weights, layer, feature, k=3, model=model, dictionary=dictionary
    )
    json.dumps(around)
    assert [x["layer"] for x in around["inputs"]] == links.source_layer_P[:3].tolist()
    assert len(around["tokens_in"]) == len(around["tokens_out_lowest"]) == 3
    written = jaxclt.write_globals(model, dictionary, weights, tmp_path, top=50)
    again = jaxclt.neighbourhood(tmp_path, layer, feature, k=3)
    for key in ("tokens_in", "tokens_out"):
        assert [x["text"] for x in again[key]] == [x["text"] for x in around[key]]
    assert [x["feature"] for x in again["inputs"]] == [
        x["feature"] for x in around["inputs"]
    ]
    assert len(written.links) == len(jaxclt.load_globals(tmp_path).links)
    assert len(weights.token_inputs(layer, feature, by="virtual").token_P) == 3
    row = links.rows()[0]
    block = jaxclt.virtual_weights(
        model,
        dictionary,
        (layer, [feature, 0]),
        (row["source_layer"], [row["source_feature"]]),
    )
    assert block[0, 0] == pytest.approx(row["virtual"], rel=1e-5)
    subset, strongest = jaxclt.strongest_virtual(
        model, dictionary, 2, features=features
    )
    np.testing.assert_array_equal(subset.feature_U, stats.subset.feature_U)
    best = weights.inputs(layer, feature, 2, by="virtual")
    np.testing.assert_allclose(
        strongest.input_weight_UK[alive[0]], best.virtual_P, rtol=1e-5
    )
    with pytest.raises(InputError, match="is not among the 56"):
        jaxclt.neighbourhood(tmp_path, 3, 1)


def test_interrupted_runs_go_on_and_shards_merge(
    model: Model,
    dictionary,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Equal to one uninterrupted run over everything."""
    args = {"features": "top:50", "tokens": 1500, "context": 48}
    whole = jaxclt.coactivation(model, dictionary, text, **args)
    assert 1500 <= whole.n_tokens < 1550
    monkeypatch.setattr(kept, "SAVE_S", 0.0)

    def stop(what: str, done: int, total: int) -> None:
        if what == "statistics" and done > 600:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jaxclt.coactivation(
            model, dictionary, text, state=tmp_path, on_stage=stop, **args
        )
    assert (tmp_path / "partial.npz").is_file()
    seen: list[int] = []
    found = jaxclt.coactivation(
        model,
        dictionary,
        text,
        state=tmp_path,
        on_stage=lambda what, done, total: seen.append(done),
        **args,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["statistics.npz"]
    assert len(seen) > 2
    halves = [
        jaxclt.coactivation(model, dictionary, text, shard=(i, 2), **args)
        for i in range(2)
    ]
    loaded, _ = jaxclt.load_statistics(tmp_path / "statistics.npz")
    for other in (found, loaded, jaxclt.merge_coactivation(*halves)):
        assert other.n_tokens == whole.n_tokens
        np.testing.assert_array_equal(other.subset.feature_U, whole.subset.feature_U)
        for a, b in zip(other.sums["act"], whole.sums["act"], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
    with pytest.raises(InputError, match="another run, which differs in features"):
        jaxclt.coactivation(
            model, dictionary, text, state=tmp_path, **(args | {"features": "top:9"})
        )


@pytest.mark.parametrize("save_s", [0.0, 60.0])
def test_wherever_a_run_is_stopped_its_sums_are_the_same_bits(
    save_s: float,
    model: Model,
    dictionary,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Between two flushes too, where sums are still in the model's dtype."""
    args = {"features": "top:50", "tokens": 1500, "context": 48}
    whole = jaxclt.coactivation(model, dictionary, text, **args)
    monkeypatch.setattr(kept, "SAVE_S", save_s)
    for n_reports in (1, 2, 3, 4, 5):
        state, left = tmp_path / str(n_reports), [n_reports] * 4

        def stop(what: str, *_: int, left: list[int] = left) -> None:
            if what == "statistics" and left:
                left[0] -= 1
                if not left[0]:
                    del left[0]
                    raise KeyboardInterrupt

        found = None
        while found is None:
            with contextlib.suppress(KeyboardInterrupt):
                found = jaxclt.coactivation(
                    model, dictionary, text, state=state, on_stage=stop, **args
                )
        assert len(left) < 4
        assert list(found.sums) == list(whole.sums)
        parts = (jax.tree.leaves(sums) for sums in (found.sums, whole.sums))
        for a, b in zip(*parts, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_all_features_are_held_sparsely(model: Model, dictionary):
    dense = jaxclt.coactivation(model, dictionary, WINDOWS, features="all")
    thin = jaxclt.coactivation(model, dictionary, WINDOWS, features="all", sparse=True)
    assert thin.sparse
    assert not dense.sparse
    pair = [jaxclt.global_weights(model, dictionary, x) for x in (dense, thin)]
    a, b = (x.strongest(3, ("twera",)) for x in pair)
    np.testing.assert_array_equal(a.target_feature_P, b.target_feature_P)
    np.testing.assert_allclose(a.twera_P, b.twera_P, rtol=1e-5)


def test_too_many_pairs_are_refused(
    model: Model, dictionary, monkeypatch: pytest.MonkeyPatch
):
    module = sys.modules[check_size.__module__]  # its package's name is a function's
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    with pytest.raises(InputError, match="pairs of features fire together"):
        jaxclt.coactivation(model, dictionary, WINDOWS, features="all", sparse=True)


def test_inhibition_is_one_ablation_away(model: Model, dictionary):
    """Against a loop over tokens, in which an edge is taken away from h."""
    sources = [(layer, i) for layer in (0, 1) for i in range(40)]
    targets = [(3, i) for i in range(0, 40, 2)]
    found = jaxclt.global_inhibition(
        model, dictionary, WINDOWS, targets, features=sources, mask="all"
    )
    on, every = Bound(dictionary, model.params, model.cfg), np.arange(40)
    from jaxclt.clt.active import encoded_layers
    from jaxclt.global_weights.weights import virtual_block

    V = [virtual_block(on, (3, every), (layer, every)) for layer in (0, 1)]
    effect = np.zeros((40, 80))
    released = np.zeros((40, 80))
    for ids in WINDOWS:
        recording = record_prompt(model.params, np.asarray(ids, np.int32), model.cfg)
        layers = list(encoded_layers(dictionary, model.params, recording, model.cfg))
        theta_F = layers[3].enc.theta_F
        theta_F = np.zeros(40) if theta_F is None else theta_F
        for pos in range(len(ids)):
            h_F = layers[3].pre_TF[pos]
            for source in (0, 1):
                edge_FF = V[source] * layers[source].a_TF[pos][None]
                held = (h_F <= theta_F)[:, None] & (
                    h_F[:, None] - edge_FF > theta_F[:, None]
                )
                part = slice(40 * source, 40 * source + 40)
                effect[:, part] += edge_FF * held
                released[:, part] += held
    assert released[::2].sum() > 10
    np.testing.assert_allclose(
        found.effect_RU[:, :80], effect[::2] / 18, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(found.released_RU[:, :80], released[::2] / 18, atol=1e-7)
    busiest = int(released[::2].sum(1).argmax())
    rows = found.inputs(3, 2 * busiest, 4)
    assert rows
    assert rows == sorted(rows, key=lambda row: row["effect"])
    assert all(row["effect"] < 0 and row["virtual"] < 0 for row in rows)
    with pytest.raises(InputError, match="not among the targets"):
        found.inputs(1, 0)


def test_bad_input_says_what_to_change(model: Model, dictionary, tmp_path: Path):
    neurons = jaxclt.load_dictionary("neurons:4", model)
    with pytest.raises(InputError, match="neurons have no global weights"):
        jaxclt.coactivation(model, neurons, WINDOWS)
    file = tmp_path / "features.txt"
    file.write_text("1:3\n2:9\n")
    windows = jaxclt.read_windows(model, WINDOWS)
    chosen = global_text.choose_features(model, dictionary, file, windows)
    assert chosen.layer_U.tolist() == [1, 2]
    (tmp_path / "f.json").write_text("[[2, 9], [1, 3]]")
    np.savez(tmp_path / "f.npz", layer_U=chosen.layer_U, feature_U=chosen.feature_U)
    for name in ("f.json", "f.npz"):
        again = global_text.choose_features(
            model, dictionary, str(tmp_path / name), windows
        )
        np.testing.assert_array_equal(again.feature_U, chosen.feature_U)
    file.write_text("1-3\n")
    for features, message in (
        (str(file), "cannot be read: write lines"),
        ("top:x", "write top:K"),
        ("nothing.txt", "no such file"),
        ([(9, 0)], "no layer 9"),
    ):
        with pytest.raises(InputError, match=message):
            global_text.choose_features(model, dictionary, features, windows)
    with pytest.raises(InputError, match="head 0:1: layers go from 1"):
        jaxclt.coactivation(model, dictionary, WINDOWS, heads=[(0, 1)])
    with pytest.raises(InputError, match="tokens to track"):
        jaxclt.coactivation(
            model, dictionary, WINDOWS, features=[(0, 1)], input_tokens=[97]
        )
    with pytest.raises(InputError, match="holds no global weights"):
        jaxclt.load_globals(tmp_path)
    stats = Subset.of(np.asarray([[0, 1]]), dictionary.cfg)
    assert len(stats) == 1


def test_the_command(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = ("globals", "--model", MODEL, "--dictionary", DICTIONARY)
    args = (*base, "--data", text, "--tokens", 1500, "--context", 48, "--top", 3)
    traced = tmp_path / "traced"
    traced.mkdir()
    (traced / "graph.npz").touch()
    for command in (args, ("features", *args[1:-2])):
        assert run(*command, "--out", traced) == 2
        assert "holds a traced graph" in " ".join(capsys.readouterr().err.split())
    assert [p.name for p in traced.iterdir()] == ["graph.npz"]
    out = tmp_path / "globals"
    assert run(*args, "--out", out, "--features", "top:50") == 0
    said = capsys.readouterr()
    assert "pairs that never fire together" in said.out
    assert sorted(p.name for p in out.iterdir()) == [
        "globals.npz",
        "index.html",
        "report.json",
        "statistics.npz",
    ]
    with np.load(out / "globals.npz", allow_pickle=False) as file:
        names = "virtual era twera coactivation source_layer target_feature"
        P = {len(file[f"{name}_P"]) for name in names.split()}
        assert len(P) == 1
        assert json.loads(str(file["meta"]))["features"] == 50
    assert run(*args, "--out", out, "--features", "top:50", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["interference"]["largest"][0]["share"] == 1e-4
    capsys.readouterr()
    for more, message in (
        (
            ("--features", "top:51"),
            "holds another run, which differs in features (top:50, not top:51)",
        ),
        (("--shard", "2/2"), "--shard 2/2: write I/N"),
        (("--heads", "1-2"), "--heads 1-2: write LAYER:HEAD"),
        (("--top", 0), "--top 0: give at least 1"),
        (("--merge", out), "give --data TEXT, or --merge"),
        (("--data", "nowhere"), "there is no such file or folder"),
        (("--context", 65), "the model takes at most 64"),
    ):
        assert run(*args, "--out", out, "--features", "top:50", *more) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_command_merges_shards(text: Path, tmp_path: Path):
    base = ("globals", "--model", MODEL, "--dictionary", DICTIONARY)
    args = (*base, "--data", text, "--tokens", 1500, "--context", 48, "--top", 3)
    out = tmp_path / "globals"
    assert run(*args, "--out", out, "--features", "top:50") == 0
    shards = [tmp_path / f"shard{i}" for i in range(2)]
    for i, shard in enumerate(shards):
        assert (
            run(*args, "--out", shard, "--features", "top:50", "--shard", f"{i}/2") == 0
        )
    merged = tmp_path / "merged"
    assert run(*base, "--merge", *shards, "--out", merged, "--top", 3) == 0
    a, b = (jaxclt.load_statistics(x / "statistics.npz")[0] for x in (out, shards[0]))
    assert b.n_tokens < a.n_tokens
    both = json.loads((merged / "report.json").read_text())
    assert both["tokens"] == a.n_tokens
