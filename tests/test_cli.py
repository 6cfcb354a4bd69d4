"""The command line on a tiny model: what it writes, and how it says no."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import run_command as run

from jaxclt.cli.trace import heading
from jaxclt.dashboards.files import FeatureFiles
from jaxclt.io.graph_file import load_graph
from jaxclt.viewer.graph_json import validate

GOLDEN = Path(__file__).parent / "goldens" / "circuit_tracer_clt"
MODEL, DICTIONARY = GOLDEN / "model", GOLDEN / "dictionary"
PROMPT = str(np.load(GOLDEN / "graph.npz")["prompt"])


def trace(out: Path, *more: object, prompt: str = PROMPT, model: object = MODEL) -> int:
    dictionary = () if "--dictionary" in more else ("--dictionary", DICTIONARY)
    if "--attention" not in more:  # tests/attending has that, and it takes time
        more = (*more, "--attention", 0)
    return run("trace", prompt, "--model", model, *dictionary, "--out", out, *more)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trace") / "graph"
    assert trace(out) == 0
    return out


def test_trace_writes_the_four_files_of_the_contract(traced: Path):
    assert sorted(p.name for p in traced.iterdir()) == [
        "graph.json", "graph.npz", "index.html", "report.json",
    ]  # fmt: skip
    report = json.loads((traced / "report.json").read_text())
    assert report["certificate"]["max_relative_row_error"] < 1e-5
    assert {
        "replacement",
        "completeness",
        "completeness_ct",
        "completeness_logit_edges",
        "mean_path_length",
    } <= set(report["scores"]["full"]) & set(report["scores"]["pruned"])
    assert {
        "load",
        "record",
        "compile",
        "attribute",
        "influence",
        "prune",
        "write",
    } <= set(report["timing_s"])
    validate(json.loads((traced / "graph.json").read_text()))
    agreement = report["derivative"]
    assert agreement["n"] == report["graph"]["features_attributed"]
    assert 0 <= agreement["sign"] <= 1
    assert {"contrast", "spearman", "slope", "after_first"} < set(agreement)
    page = (traced / "index.html").read_text("utf-8")
    # No address but names of standards, and the pattern of what links may begin with.
    for known in ("http-equiv", "http://www.w3.org", r"^https:\/\/"):
        page = page.replace(known, "")
    assert "http" not in page


def test_the_heading_is_the_end_of_the_prompt():
    assert heading("one\ntwo") == "one⏎two"
    assert heading("word " * 2000 + "last") == "…" + ("word " * 40 + "last")[-119:]


def test_what_another_command_made_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("statistics.npz", "partial.npz", "run.json"):
        out = tmp_path / name
        out.mkdir()
        (out / name).touch()
        assert trace(out) == 2
        assert "whose report would be replaced" in capsys.readouterr().err
        assert [p.name for p in out.iterdir()] == [name]


def test_npz_rows_sum_without_our_code(traced: Path):
    with np.load(traced / "graph.npz", allow_pickle=False) as graph:
        total = graph["edge_RN"].sum(1) + graph["bias_R"] + graph["rest_R"]
        np.testing.assert_allclose(total, graph["readout_R"], atol=1e-4)
        meta = json.loads(str(graph["meta"]))
        A, T, K = (len(graph[k]) for k in ("layer_A", "token_T", "target_token_K"))
        shape = graph["edge_RN"].shape
    L = meta["n_layers"]
    assert meta["prompt"] == PROMPT
    assert len(meta["tokens"]) == T
    assert total.shape == (A + K,)
    assert shape == (A + K, A + L * T + T)


def test_pruned_file_still_sums_and_reads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """And has examples of what it shows, from a text; of the last trace."""
    out, text = tmp_path / "g", tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"prompt": PROMPT}) + "\n" for _ in range(3)))
    some = ("--save", "pruned", "--max-features", 60, "--no-story")
    (out / "examples").mkdir(parents=True)
    (out / "examples" / "older.json").write_text("{}")
    assert trace(out, *some, "--examples", text) == 0
    graph = load_graph(out / "graph.npz")
    shown = FeatureFiles(out / "examples")
    assert not (out / "examples" / "older.json").exists()
    for layer, feature in zip(graph.layer_A, graph.feature_A, strict=True):
        examples = (shown.record(int(layer), int(feature)) or {})["examples_quantiles"]
        assert PROMPT.split()[0] in str(examples)
    assert "examples_quantiles" in (out / "index.html").read_text()
    capsys.readouterr()
    assert run("view", out, "--node-threshold", 0.95) == 2
    assert "trace the prompt again with --save full" in capsys.readouterr().err
    total = graph.edge_RN.sum(1) + graph.bias_R + graph.rest_R
    np.testing.assert_allclose(total, graph.readout_R, atol=1e-4)
    assert 0 < graph.n_features < 60


def test_json_report_on_stdout_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert trace(tmp_path / "g", "--json", "--dictionary", "neurons:3") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dictionary"] == "neurons:3"
    assert report == json.loads((tmp_path / "g" / "report.json").read_text())


def test_what_a_reader_saved_outlives_another_trace(tmp_path: Path):
    """Of the same prompt; patches that lie there are on the new page too."""
    out, file = tmp_path / "g", tmp_path / "g" / "graph.json"
    options = ("--dictionary", "neurons:3")
    assert trace(out, *options) == 0
    doc = json.loads(file.read_text("utf-8"))
    node = next(n for n in doc["nodes"] if n["activation"])
    node["clerp"] = "mine"
    doc["qParams"]["supernodes"] = [["pair", node["node_id"]]]
    file.write_text(json.dumps(doc), "utf-8")
    about = {"prompt": PROMPT, "dictionary": "neurons:3"}
    patches = about | {"patches": [{"name": "done before"}]}
    (out / "patches.json").write_text(json.dumps(patches))
    assert trace(out, *options, "--node-threshold", 0.7) == 0
    again = json.loads(file.read_text("utf-8"))
    assert again["qParams"]["supernodes"] == doc["qParams"]["supernodes"]
    assert "done before" in (out / "index.html").read_text("utf-8")
    # its label, though fewer nodes were shown meanwhile
    assert trace(out, *options) == 0
    again = json.loads(file.read_text("utf-8"))["nodes"]
    assert {n["node_id"]: n["clerp"] for n in again}[node["node_id"]] == "mine"
    assert trace(out, *options, prompt="w3 w4") == 0
    again = json.loads(file.read_text("utf-8"))
    groups = again["jaxclt"]["story"]["groups"]  # of the new prompt
    assert [g[0] for g in again["qParams"]["supernodes"]] == [g["name"] for g in groups]


def test_dry_run_states_the_memory_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert trace(out, "--dry-run", "--json", "--memory", 3) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["budget_gb"] == 3
    assert plan["total_gb"] == pytest.approx(sum(plan["memory_gb"].values()), abs=0.01)
    assert 0 < plan["total_gb"] < 3
    assert list(out.glob("*")) == []


def test_dry_run_of_an_assumed_prompt_reads_no_weights(
    capsys: pytest.CaptureFixture[str],
):
    """6,000 tokens at the size of Gemma-2-2B on 80 GB."""
    shape = Path(__file__).parents[1] / "benchmarks/shapes/gemma-2-2b.json"
    rest = ("--dictionary", "any", "--out", "any", "--dry-run", "--json")
    size = "tokens=6000,active=100,features=16384,host=200"

    def plan(*more: object) -> int:
        return run("trace", "any", "--model", shape, *rest, *more)

    assert plan("--memory", 80, "--assume", f"{size},span=1") == 0
    one = json.loads(capsys.readouterr().out)
    # All the decoders of a CLT of 426k features do not fit beside it in float32.
    assert plan("--memory", 80, "--assume", size) == 2
    assert "or raise --memory" in capsys.readouterr().err
    # Halves are no way out: attribution holds float32.
    assert plan("--memory", 80, "--dtype", "bfloat16", "--assume", size) == 2
    assert "or raise --memory" in capsys.readouterr().err
    assert plan("--memory", 160, "--dtype", "bfloat16", "--assume", size) == 0
    full = json.loads(capsys.readouterr().out)
    assert one["features_active"] == full["features_active"] == 6000 * 26 * 100
    assert one["total_gb"] < full["total_gb"] <= 160
    assert full["patterns"] == "recomputed"
    # Parameters by the model card: 2.6 billion.
    assert 2.5 < full["memory_gb"]["parameters"] / 4 < 2.7
    assert plan("--memory", 80, "--assume", size.replace("200", "20")) == 2
    assert "of the host" in capsys.readouterr().err
    for wrong in ("tokens=6000", "tokens=0,active=1", "words=3", "tokens"):
        assert plan("--assume", wrong) == 2
        assert "--assume" in capsys.readouterr().err


def test_given_targets_replace_the_top_tokens(tmp_path: Path, traced: Path):
    token = json.loads((traced / "report.json").read_text())["top_tokens"][1][0]
    assert trace(tmp_path / "g", "--targets", token) == 0
    report = json.loads((tmp_path / "g" / "report.json").read_text())
    assert [text for text, _ in report["top_tokens"]] == [token]


def test_view_without_the_features_named_says_so(
    traced: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("view", traced, "--features", traced / "nothing") == 2
    assert "nothing is not a folder" in capsys.readouterr().err


def test_view_prunes_again(traced: Path, tmp_path: Path):
    page = tmp_path / "tight.html"
    assert run("view", traced, "--node-threshold", 0.3, "--out", page) == 0
    assert len(page.read_text()) < len((traced / "index.html").read_text())


def test_view_offers_supernodes_on_request(traced: Path, tmp_path: Path):
    plain, offered = tmp_path / "plain.html", tmp_path / "offered.html"
    assert run("view", traced, "--out", plain) == 0
    assert run("view", traced, "--out", offered, "--suggest") == 0
    assert '"suggested_supernodes":[' not in plain.read_text("utf-8")
    embedded = offered.read_text("utf-8")
    found = re.search(r'"suggested_supernodes":(\[\[.*?\]\])', embedded)
    assert found is not None
    graph = json.loads((traced / "graph.json").read_text("utf-8"))
    shown = {node["node_id"] for node in graph["nodes"]}
    for _, *members in json.loads(found[1]):
        assert len(members) > 1
        assert set(members) <= shown


def test_view_goes_by_either_reading(
    traced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("view", traced, "--by", "response") == 2
    assert "trace the prompt with --response" in capsys.readouterr().err
    out, page = tmp_path / "both", tmp_path / "response.html"
    assert trace(out, "--response") == 0
    assert run("view", out, "--by", "response", "--suggest", "--out", page) == 0
    assert '"reading":"response"' in page.read_text("utf-8")


def test_view_sets_a_second_graph_beside(traced: Path, tmp_path: Path):
    page = tmp_path / "both.html"
    assert run("view", traced, "--compare", traced, "--out", page) == 0
    assert '"other":{' in page.read_text()
    assert run("view", traced, "--compare", tmp_path, "--out", page) == 2


@pytest.mark.parametrize("which", ["--node-threshold", "--edge-threshold"])
def test_view_takes_a_threshold_of_zero_as_given(
    traced: Path, tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]
):
    """Zero is no share to keep, and not the same as not given."""
    assert run("view", traced, which, 0, "--out", tmp_path / "none.html") == 2
    assert f"{which} 0.0: give a share in (0, 1]" in capsys.readouterr().err
    assert not (tmp_path / "none.html").exists()


def test_the_bound_of_a_truncated_graph_is_stated_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Scores, certificate, report, graph.json and the table; exact only if asked."""
    assert trace(tmp_path / "some", "--max-features", 100) == 0
    table = capsys.readouterr().out
    report = json.loads((tmp_path / "some" / "report.json").read_text())
    graph, full = report["graph"], report["scores"]["full"]
    assert graph["features_attributed"] < graph["features_active"]
    bound = graph["unexplored_influence"]
    assert 0 < bound < 1
    assert f"{bound:.2%}" in table
    small = report["derivative"]
    said = f"derivative: Spearman {small['spearman']:.2f}, sign {small['sign']:.0%}"
    assert said in " ".join(table.split())
    assert report["certificate"]["rest_share"] > 0
    doc = json.loads((tmp_path / "some" / "graph.json").read_text())
    assert doc["jaxclt"]["scores"]["full"]["unexplored_share"] == bound
    assert trace(tmp_path / "all", "--tolerance", 0) == 0
    exact = json.loads((tmp_path / "all" / "report.json").read_text())
    assert exact["graph"]["unexplored_influence"] == 0
    assert exact["certificate"]["rest_share"] == 0
    assert "the graph is exact" in capsys.readouterr().out
    for name in ("replacement", "completeness"):
        value = exact["scores"]["full"][name]
        assert full[name] - 1e-6 <= value <= full[f"{name}_at_most"] + 1e-6
        assert exact["scores"]["full"][f"{name}_at_most"] == value


def damaged(tmp_path: Path, what: str) -> Path:
    """A copy of the golden model or dictionary with one file cut short."""
    source = {"model": MODEL, "dictionary": DICTIONARY}[what]
    copy = Path(shutil.copytree(source, tmp_path / what))
    file = sorted(copy.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    return copy


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"more": ("--tolerance", "1.5")}, "--tolerance 1.5"),
        ({"prompt": "word " * 3000}, "the model's context holds"),
        ({"model": "no-such-model"}, "no model 'no-such-model'"),
        ({"more": ("--dictionary", "nothing")}, "no dictionary 'nothing'"),
        ({"more": ("--dictionary", "neurons:x")}, "write neurons:k"),
        ({"more": ("--max-features", 0)}, "give at least 1"),
        ({"more": ("--memory", -1)}, "give GB above 0"),
        ({"more": ("--memory", 1e-6)}, "may be used: lower --max-features"),
        ({"more": ("--memory", 1e-6, "--dry-run")}, "or raise --memory"),
        ({"more": ("--devices", 99)}, "this machine has"),
        ({"more": ("--node-threshold", 1.5)}, "give a share in"),
        ({"more": ("--targets", "two words")}, "tokens, not one"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: dict, message: str
):
    more = args.pop("more", ())
    assert trace(tmp_path / "out", *more, **args) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert "Traceback" not in err
    assert err.count("jaxclt: ") == 1


@pytest.mark.parametrize("what", ["model", "dictionary"])
def test_a_truncated_file_leaves_an_older_output_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
):
    out = tmp_path / "out"
    assert trace(out) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    bad = damaged(tmp_path, what)
    extra = ("--dictionary", bad) if what == "dictionary" else ()
    model = bad if what == "model" else MODEL
    assert trace(out, *extra, model=model) == 2
    assert "truncated" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_dictionary_of_another_model_names_both_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = Path(__file__).parent / "goldens" / "llama_gqa_tied"
    model = Path(shutil.copytree(other, tmp_path / "model"))
    shutil.copy(MODEL / "tokenizer.json", model / "tokenizer.json")
    assert trace(tmp_path / "out", model=model) == 2
    assert "jaxclt: " in capsys.readouterr().err


def test_an_output_that_cannot_be_written_fails_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("in the way")
    assert trace(tmp_path / "file" / "out", model="no-such-model") == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_damaged_graph_is_refused(tmp_path: Path, traced: Path, capsys):
    folder = Path(shutil.copytree(traced, tmp_path / "graph"))
    file = folder / "graph.npz"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert run("view", folder) == 2
    assert "not a complete graph file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["trace", "patch"])
def test_help_needs_neither_jax_nor_transformers(name: str):
    code = (
        f"import sys; sys.argv=['jaxclt','{name}','--help']\n"
        "from jaxclt.cli import main as cli\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'jax', 'transformers', 'starlette'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "--json" in done.stdout
