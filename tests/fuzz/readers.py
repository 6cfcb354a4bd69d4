"""Every reader of files: a folder with a valid sample, and what opens it.

`open` also does with what was opened what a command would do first: a damaged file that
opens must be safe to use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import gguf
import jax
import numpy as np
import safetensors.numpy
from io_models import CFG, WORDS, random_params, write_word_tokenizer
from test_weights_gguf import write_gguf

from jaxclt.clt.store import materialise
from jaxclt.clt.subset import Subset
from jaxclt.dashboards import files as feature_files
from jaxclt.dashboards import stream
from jaxclt.errors import InputError
from jaxclt.evaluation import concepts, judging
from jaxclt.files.lines import read_lines
from jaxclt.global_weights.files import (
    SavedGlobals,
    load_globals,
    load_statistics,
    save_globals,
    save_statistics,
)
from jaxclt.global_weights.ranking import Links
from jaxclt.global_weights.statistics import Coactivation, merge_coactivation
from jaxclt.global_weights.views import neighbourhood, page_document
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.graph import Graph
from jaxclt.graph.paths import strongest_paths
from jaxclt.graph.prune import prune, restrict
from jaxclt.graph.scores import scores
from jaxclt.io import dictionary, fetch
from jaxclt.io.gguf_file import open_gguf
from jaxclt.io.graph_file import load_graph, save_graph
from jaxclt.io.tokenizer import load_tokenizer
from jaxclt.io.weights_gguf import load_gguf
from jaxclt.io.weights_hf import load_hf, save_hf
from jaxclt.patching import subject
from jaxclt.runs import kept
from jaxclt.serve.folder import Folder
from jaxclt.serve.save import save_view
from jaxclt.testing import tiny
from jaxclt.text import prompts
from jaxclt.text.corpus import read_documents
from jaxclt.text.features import _read_features
from jaxclt.text.windows import TokenWindows
from jaxclt.trace import pages, sweep, target_text
from jaxclt.trace import supernodes as supernode_file
from jaxclt.train import checkpoint, prepare, sample, trainer
from jaxclt.train.normalise import Scales
from jaxclt.train.store import ChunkStore
from jaxclt.viewer.graph_json import graph_json

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"


class Reader(NamedTuple):
    """One kind of file.

    Attributes:
      make: writes a valid sample into a folder; returns the files that are damaged.
      open: opens and uses what is in the folder.
    """

    make: Callable[[Path], list[Path]]
    open: Callable[[Path], Any]


@functools.cache
def graph() -> Graph:
    return tiny(n_layers=3, n_tokens=4, n_features=8).graph(
        AttributeConfig(max_features=None, tolerance=0.0, devices=1, heads=20)
    )


def write(file: Path, value: Any) -> list[Path]:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
    return [file]


# -- graphs ----------------------------------------------------------------------------


def make_graph(folder: Path) -> list[Path]:
    save_graph(folder / "graph.npz", graph())
    return [folder / "graph.npz"]


def open_graph(folder: Path) -> None:
    found = load_graph(folder / "graph.npz")
    scores(found, found.pruning)
    strongest_paths(found, k=3)
    kept = dataclasses.replace(found, pruning=prune(found))
    graph_json(restrict(kept), slug="x")


@functools.cache
def document() -> dict[str, Any]:
    doc = graph_json(graph(), slug="x", scores={"certificate": {}, "scores": {}})
    doc["jaxclt"] |= {"labels_not_shown": {"0_1": "a"}, "features": {}}
    features = [n["node_id"] for n in doc["nodes"] if n["feature"] and "E" not in n]
    doc["qParams"] |= {"pinnedIds": features[:2], "supernodes": [["a", *features[:2]]]}
    return doc


def make_document(folder: Path) -> list[Path]:
    feature_files.write_layer(folder / "features", 0, [feature_files.pack(b"{}")])
    feature_files.write_index(
        folder / "features",
        {0: feature_files.read_offsets(folder / "features" / "layer_0.bin")},
    )
    return write(folder / "graph.json", document())


def open_document(folder: Path) -> None:
    Folder(folder).graphs()
    pages.with_saved_view(document(), folder)
    doc = pages.read_graph(folder / "graph.json")
    pages.directory_page(folder, compare=doc)
    supernode_file.read_supernodes(folder / "graph.json", graph())
    save_view(folder / "graph.json", {"qParams": {"pinnedIds": []}})


def make_beside(folder: Path) -> list[Path]:
    write(folder / "graph.json", document())
    about = {"prompt": graph().meta.prompt, "dictionary": graph().meta.dictionary}
    report = about | {"identity": {"hashes": {"model": "a", "dictionary": "b"}}}
    report |= {"model": "tiny", "environment": {"dtype": "float32"}, "scores": {}}
    traced = pages.traced_digest(report)
    patch = about | {"patches": [{"name": "a", "nodes": ["0_1_2"], "kl": 0.5}]}
    return [
        *write(folder / "report.json", report),
        *write(folder / "validation.json", about | {"traced": traced, "rows": [1]}),
        *write(folder / "patches.json", patch),
    ]


def open_beside(folder: Path) -> None:
    if not (folder / "graph.npz").exists():
        make_graph(folder)
    pages.directory_page(folder)
    (folder / "index.html").touch()
    sweep._finished(folder, {})
    stop = mock.Mock(side_effect=NotLoadedError)
    with (
        mock.patch.object(subject, "load_model", stop),
        contextlib.suppress(NotLoadedError),
    ):
        subject.reopen(folder)


class NotLoadedError(Exception):
    """In place of a model."""


def make_supernodes(folder: Path) -> list[Path]:
    doc = document()
    return write(folder / "groups.json", doc["qParams"]["supernodes"])


def open_supernodes(folder: Path) -> None:
    supernode_file.read_supernodes(folder / "groups.json", graph())


# -- global weights and features -------------------------------------------------------


@functools.cache
def statistics(sparse: bool) -> Coactivation:
    subset = Subset(np.array([0, 0, 1], np.int32), np.array([1, 4, 2], np.int32), 2)

    def tiles(shapes: list[tuple[int, int]]) -> tuple[Any, ...]:
        from scipy.sparse import csr_array

        found = [np.ones(shape) for shape in shapes]
        return tuple(csr_array(x) if sparse else x for x in found)

    by_layer = tiles([(2, 0), (1, 2)])
    tokens = {} if sparse else {"input_ind_UY": np.ones((3, 2))}
    heads = {} if sparse else {"head_ind": (np.ones((1, 2)),) * 1}
    return Coactivation(
        subset=subset,
        scaled=False,
        heads=() if sparse else ((1, 0),),
        input_Y=np.array([] if sparse else [3, 5], np.int32),
        sums={
            "n": np.array(10.0),
            "sum_U": np.ones(3),
            "count_U": np.ones(3),
            **{name: by_layer for name in ("ind", "act", "both")},
            **tokens,
            **heads,
        },
    )


def make_statistics(folder: Path) -> list[Path]:
    made = []
    for sparse in (False, True):
        file = folder / f"statistics_{sparse}.npz"
        save_statistics(file, statistics(sparse), identity={"model": "a"}, windows=3)
        made.append(file)
    return made


def open_statistics(folder: Path) -> None:
    for sparse in (False, True):
        found, more = load_statistics(folder / f"statistics_{sparse}.npz")
        assert more.get("windows", 0) >= 0
        assert len(found.mean) == len(found.frequency) == len(found.subset)
        if len(found.subset) == 3 and found.sparse == sparse:
            merge_coactivation(found, found)


def make_globals(folder: Path) -> list[Path]:
    one = np.ones(2, np.float32)
    place = {
        "source_layer_P": [0, 0], "source_feature_P": [1, 4],
        "target_layer_P": [1, 1], "target_feature_P": [2, 2],
    }  # fmt: skip
    links = {name: np.array(x, np.int32) for name, x in place.items()}
    links |= {x: one for x in Links._fields if x not in links}
    token_UK, weight_UK = np.array([[3, 5]] * 3, np.int32), np.ones((3, 2), np.float32)
    save_globals(
        folder / "globals.npz",
        SavedGlobals(
            meta={
                **{"by": "twera", "model": "m", "dictionary": "d", "tokens": 10},
                "token_text": {"3": "a", "5": "b"},
            },
            links=Links(**links),
            subset=statistics(True).subset,
            frequency_U=np.ones(3, np.float32),
            mean_U=np.ones(3, np.float32),
            **{f"{x}_token_UK": token_UK for x in ("input", "output", "lowest")},
            **{f"{x}_weight_UK": weight_UK for x in ("input", "output", "lowest")},
        ),
    )
    return [folder / "globals.npz"]


def open_globals(folder: Path) -> None:
    found = load_globals(folder)
    json.dumps(page_document(found), allow_nan=False)
    for layer, feature in zip(
        found.subset.layer_U, found.subset.feature_U, strict=True
    ):
        neighbourhood(found, int(layer), int(feature))


def make_choice(folder: Path) -> list[Path]:
    chosen = statistics(True).subset
    np.savez(folder / "f.npz", layer_U=chosen.layer_U, feature_U=chosen.feature_U)
    (folder / "f.txt").write_text("0:1\n0:4\n1:2\n")
    return [folder / "f.npz", folder / "f.txt", *write(folder / "f.json", [[0, 1]])]


def open_choice(folder: Path) -> None:
    sizes = SimpleNamespace(n_layers=2, n_features=8)
    for suffix in ("npz", "txt", "json"):
        Subset.of(_read_features(folder / f"f.{suffix}"), sizes)


SIZES = stream.Sizes(
    n_features=3, width=2, n_layers=2, n_windows=9, size=6, itemsize=4,
    options=stream.ExampleOptions(
        top=2, drawn=2, excerpt=4, bins=4, histogram_every=1, batch_tokens=12
    ),
)  # fmt: skip
WINDOWS = TokenWindows(np.zeros((9, 6), np.int32), np.ones((9, 6), bool))


def make_seen(folder: Path) -> list[Path]:
    seen, ours = stream._nothing(SIZES), {"model": "a"}
    stream._save(folder / stream.STATE, seen=seen, identity=ours, windows=4)
    write(folder / "run.json", {"model": "a"})
    return [folder / stream.STATE, folder / "run.json"]


def open_seen(folder: Path) -> None:
    seen = stream._nothing(SIZES)
    ours = {"model": "a"}
    assert 0 <= stream._load(folder / stream.STATE, seen, WINDOWS, ours) <= 9
    for best in (*seen.tops, seen.drawn):
        best.excerpts()
    with kept.claimed(folder, ours):
        pass


def make_records(folder: Path) -> list[Path]:
    layer = [feature_files.pack(json.dumps({"index": i}).encode()) for i in range(3)]
    feature_files.write_layer(folder, 1, layer)
    offsets = feature_files.read_offsets(folder / "layer_1.bin")
    feature_files.write_index(folder, {1: offsets})
    loose = folder / f"{feature_files.cantor(0, 2)}.json"
    index, records = folder / feature_files.INDEX, folder / "layer_1.bin"
    return [index, records, *write(loose, {"index": 5, "examples_quantiles": []})]


def open_records(folder: Path) -> None:
    feature_files._index.cache_clear()
    files = feature_files.FeatureFiles(folder)
    for layer, feature in ((0, 2), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)):
        files.paths(layer, feature)
        record = files.record(layer, feature)
        assert record is None or isinstance(record, dict)


# -- prompts, texts, caches ------------------------------------------------------------


def make_lines(folder: Path) -> list[Path]:
    def lines(name: str, rows: list[Any]) -> Path:
        (folder / name).write_text("".join(json.dumps(x) + "\n" for x in rows))
        return folder / name

    answer = {"not_asked": None, "usage": {"n": 1}}
    logged = {"key": "k", "judge": "j", "correct": True, "answer": answer}
    chat = [{"role": "user", "content": "a"}]
    pairs = [{"concept": "c", "with": "a b", "without": "b a"}]
    return [
        lines("prompts.jsonl", [{"prompt": "a"}, {"messages": chat}]),
        lines("text.jsonl", [{"text": "a b"}, {"text": "c"}]),
        lines("index.jsonl", [{"directory": "00000-a", "prompt": "a"}]),
        lines("log.jsonl", [logged]),
        lines("pairs.jsonl", pairs),
        lines("metrics.jsonl", [{"step": 3, "kind": "step"}, {"step": 9}]),
        *write(folder / "pairs.json", pairs),
    ]


def open_lines(folder: Path) -> None:
    prompts.read_prompts(folder / "prompts.jsonl")
    prompts.prompt_rows(folder / "text.jsonl")
    list(read_documents(folder / "text.jsonl"))
    sweep._index(folder)
    for row in read_lines(folder / "log.jsonl", judging._LOGGED):
        assert row["answer"]["usage"] is not None
    for name in ("pairs.jsonl", "pairs.json"):
        concepts.load_pairs(folder / name)
    run = SimpleNamespace(out=folder, config=SimpleNamespace(n_steps=9))
    trainer._Run._cut_log(run, 5)  # pyright: ignore


# -- training --------------------------------------------------------------------------


def make_training(folder: Path) -> list[Path]:
    token_WS = np.array([[1, 2, 3, -1], [1, 4, 2, 0]], np.int32)
    np.savez(
        folder / "windows.npz",
        train_WS=token_WS,
        held_WS=token_WS,
        digest=np.asarray("d"),
    )
    np.savez(
        folder / "samples.npz", token_WS=np.arange(24, dtype=np.int32).reshape(6, 4) % 5
    )
    scales = {
        part + field.name: np.ones(
            (2, 3) if field.name.endswith("D") else 2, np.float32
        )
        for field in dataclasses.fields(Scales)
        for part in ("", "units_")
    }
    np.savez(folder / "scales.npz", **scales)
    identity = {"model": "m", "windows": "w", "config": {}}
    entry = {"sha256": "0" * 64, "bytes": 3}
    return [
        *(folder / f"{name}.npz" for name in ("windows", "samples", "scales")),
        *write(folder / "run.json", {"config": {}, "model": "m", "data": "d"}),
        *write(
            folder / "manifest.json",
            {"identity": identity, "files": {"chunk_000000.safetensors": entry}},
        ),
    ]


def open_training(folder: Path) -> None:
    lm = SimpleNamespace(d_vocab=6, n_layers=2, d_model=3)
    tokenizer = mock.Mock(special_ids=[0], bos_id=1, eos_id=2)
    model = SimpleNamespace(hash="m", cfg=lm, tokenizer=tokenizer, params=None)
    config = SimpleNamespace(context=4)
    job = SimpleNamespace(config=config, model=model, data="d", out=folder)
    prepare.run_windows(job, print)  # pyright: ignore
    ours = {"config": {"lr": None}, "model": "m", "data": "d"}
    with kept.claimed(folder, ours):
        pass
    chunks = SimpleNamespace(use=lambda *_: None)
    run = SimpleNamespace(out=folder, model=model, chunks=chunks)
    trainer._Run._scales(run)  # pyright: ignore
    store = ChunkStore(folder, {"model": "m"}, (2, 3), passing=True)
    store.check()
    store.read(0)
    drawn = np.ones((2, 4), np.int32)
    partial = folder / "samples.npz"
    shutil.copy(partial, folder / "once.npz")  # it is deleted when all is drawn
    with mock.patch.object(sample, "sample", return_value=drawn):
        sample.sample_windows(
            model, size=4, train_tokens=9, held_tokens=3, per_call=2,  # pyright: ignore
            seed=0, partial_file=folder / "once.npz",
        )  # fmt: skip


def make_checkpoints(folder: Path) -> list[Path]:
    manifests = []
    for step in (1, 2):
        path = folder / f"{step:08d}"
        (path / "state").mkdir(parents=True)
        (path / "state" / "x").write_bytes(b"x")
        position = {"chunk": 0, "turn": 0, "offset": step}
        manifest = {"step": step, "position": position}
        files = checkpoint._digests(path)
        manifests = write(path / "manifest.json", manifest | {"files": files})
    return manifests


def open_checkpoints(folder: Path) -> None:
    """A damaged one is passed over for the one before it, never an error."""
    try:
        found = checkpoint.newest_intact(folder)
        assert found is not None
        position = checkpoint._manifest(found)["position"]
        trainer.Position(**position)
    except InputError as error:
        raise AssertionError("not passed over") from error


# -- models ----------------------------------------------------------------------------


def make_model(name: str, folder: Path) -> list[Path]:
    shutil.copy(GOLDENS / name / "config.json", folder)
    shutil.copy(GOLDENS / name / "model.safetensors", folder)
    return [folder / "config.json"]


def make_split(folder: Path) -> list[Path]:
    save_hf(random_params(), CFG, folder)
    whole = folder / "model.safetensors"
    shutil.move(whole, folder / "a.safetensors")
    names = safetensors.numpy.load_file(folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys(names, "a.safetensors")}
    return [
        folder / "a.safetensors",
        *write(folder / "model.safetensors.index.json", index),
    ]


def make_gguf(folder: Path) -> list[Path]:
    types = [3 if word.startswith("<") else 1 for word in WORDS]
    more = [
        ("add_tokenizer_model", "llama"),
        ("add_token_scores", [0.0] * len(WORDS)),
        ("add_token_types", types),
        ("add_bos_token_id", 1),
        ("add_unk_token_id", 3),
        ("add_array", "tokenizer.ggml.more", [["a"], ["b"]]),
    ]
    more += [("add_array", "tokenizer.ggml.tokens", WORDS)]
    # Its own list of tokens would be a second one.
    with mock.patch.object(gguf.GGUFWriter, "add_token_list"):
        write_gguf(folder / "m.gguf", random_params(), meta=more)
    return [folder / "m.gguf"]


def open_gguf_model(folder: Path) -> None:
    file = open_gguf(folder / "m.gguf")
    load_gguf(file)
    load_tokenizer(file).encode("the cat")


def make_tokenizer(folder: Path) -> list[Path]:
    write_word_tokenizer(folder)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return sorted(folder.glob("*.j*"))


def open_tokenizer(folder: Path) -> None:
    found = load_tokenizer(folder)
    found.token_strings(found.encode("the cat sat")[:3])
    found.chat([{"role": "user", "content": "the cat"}])


def make_source(folder: Path) -> list[Path]:
    (folder / "weights").write_text("x")
    files = {"weights": fetch.sha256(folder / "weights")}
    return write(folder / "source.json", {"source": "hub", "files": files})


def open_source(folder: Path) -> None:
    known = next(iter(fetch.KNOWN_MODELS.values()))
    assert fetch._verified(folder, known) in (True, False)


# -- dictionaries ----------------------------------------------------------------------


def make_dictionary(name: str, folder: Path) -> list[Path]:
    shutil.copytree(GOLDENS / "formats" / name, folder, dirs_exist_ok=True)
    (folder / "expected.npz").unlink()
    write(folder / "labels.json", {"0:1": "a"})
    # labels are read of a folder, whatever the format
    return sorted(x for x in folder.rglob("*") if x.is_file())


def open_dictionary(folder: Path) -> None:
    store = dictionary.open_dictionary(folder)
    dictionary.read_labels(folder)
    with jax.numpy_dtype_promotion("standard"):  # as it is outside the tests
        materialise(store)


def make_vector(folder: Path) -> list[Path]:
    np.savez(folder / "v.npz", vec=np.ones((2, 4), np.float32), const=np.ones(2))
    return [folder / "v.npz"]


def open_vector(folder: Path) -> None:
    vec_KD, const_K = target_text._read_vectors(str(folder / "v.npz"))
    assert vec_KD.ndim in (1, 2)
    assert np.isfinite(vec_KD).all()
    assert const_K is None or const_K.ndim < 2


FAMILIES = (
    *("llama_gqa_tied", "family_gemma3", "family_gemma3_images", "family_gpt2"),
    *("family_neox", "family_qwen2_window", "family_qwen3_yarn", "family_llama3"),
)
FORMATS = (
    *("gemma_scope", "gemma_scope_2", "gemma_scope_2_clt", "saelens", "sparsify"),
    *("clt_training", "llamascopium", "crosslayer", "decode_clt", "topk"),
)
READERS: dict[str, Reader] = {
    "graph.npz": Reader(make_graph, open_graph),
    "graph.json": Reader(make_document, open_document),
    "report.json and others beside it": Reader(make_beside, open_beside),
    "supernodes": Reader(make_supernodes, open_supernodes),
    "statistics.npz": Reader(make_statistics, open_statistics),
    "globals.npz": Reader(make_globals, open_globals),
    "features to choose": Reader(make_choice, open_choice),
    "seen.npz": Reader(make_seen, open_seen),
    "feature files": Reader(make_records, open_records),
    "lines": Reader(make_lines, open_lines),
    "training": Reader(make_training, open_training),
    "checkpoints": Reader(make_checkpoints, open_checkpoints),
    "split model": Reader(make_split, load_hf),
    "GGUF": Reader(make_gguf, open_gguf_model),
    "tokenizer": Reader(make_tokenizer, open_tokenizer),
    "source.json": Reader(make_source, open_source),
    "vector": Reader(make_vector, open_vector),
    **{
        f"model {name}": Reader(functools.partial(make_model, name), load_hf)
        for name in FAMILIES
    },
    **{
        f"dictionary {name}": Reader(
            functools.partial(make_dictionary, name), open_dictionary
        )
        for name in FORMATS
    },
}
