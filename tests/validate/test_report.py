"""`jaxclt patch`, `jaxclt validate` and `trace --validate` on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cases import run_command as run

from jaxclt.cli.patch import parse_feature
from jaxclt.errors import InputError
from jaxclt.io.graph_file import load_graph

GOLDEN = Path(__file__).parents[1] / "goldens" / "circuit_tracer_clt"
MODEL, DICTIONARY = GOLDEN / "model", GOLDEN / "dictionary"
PROMPT = str(np.load(GOLDEN / "graph.npz")["prompt"])


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traced and validated."""
    out = tmp_path_factory.mktemp("trace") / "graph"
    args = ("--model", MODEL, "--dictionary", DICTIONARY, "--out", out)
    assert run("trace", PROMPT, *args, "--validate") == 0
    return out


@pytest.fixture(scope="module")
def node(traced: Path) -> str:
    graph = load_graph(traced / "graph.npz")
    order = np.argsort(-graph.influence_N[: graph.n_features])
    a = next(a for a in order if graph.layer_A[a] == 1)
    return f"1:{graph.pos_A[a]}:{graph.feature_A[a]}"


def test_trace_validate_writes_the_report_of_the_contract(traced: Path):
    names = {p.name for p in traced.iterdir()}
    assert {
        "validation.json", "validation.md", "validation_effects.png",
        "validation_influence.png", "validation_faithfulness.png",
    } <= names  # fmt: skip
    report = json.loads((traced / "validation.json").read_text())
    for mode in ("constrained", "iterative", "additive"):
        found = report["total_effect"][mode]
        low, high = found["interval"]
        assert -1 <= low <= found["spearman"] <= high <= 1
        assert found["n"] == report["n_top"] + report["n_random"]
        assert {"pearson", "small"} <= set(found)
    live = report["patterns_live"]
    assert live["small"]["predicted_by"] == "derivative"
    for found in (live["small"], live["full"], *live["patterns"].values()):
        assert -1 <= found["interval"][0] <= found["spearman"] <= 1
        assert 0 <= found["sign"] <= 1
    assert live["small"]["n"] == live["full"]["n"] == 50
    assert live["patterns"]["small"]["cosine"] > 0.2
    assert set(report["influence_vs_kl"]) >= {"influence", "activation", "direct"}
    assert -1 <= report["pairwise"]["spearman"] <= 1
    assert report["pairwise"]["n"] > 10
    layers = report["faithfulness_layers"]
    for kind in ("encoder", "random", "upstream", "encoder_live"):
        cosine = np.array(report["faithfulness"][kind]["cosine"], float)
        nmse = np.array(report["faithfulness"][kind]["nmse"], float)
        assert cosine.shape == nmse.shape == (len(layers), 4)
        for row, layer in enumerate(layers):
            if not np.isnan(cosine[row]).all():
                assert cosine[row, layer] == pytest.approx(1, abs=1e-4)
                assert nmse[row, layer] == pytest.approx(0, abs=1e-4)
                assert np.isnan(cosine[row, :layer]).all()
                assert nmse[row, layer + 1] > 1e-3
    text = (traced / "validation.md").read_text()
    assert report["verdict"] in text
    assert "## Where it fails" in text
    assert "| times 0.9 | the model's own derivative |" in text
    assert "With patterns live too, small changes follow" in report["verdict"]
    assert {"held_poor", "live_poor", "patterns_live"} <= set(report["levels"])
    for kind in ("held", "live"):
        found = report[kind]
        assert found["on"] == "targets"  # no answer is sure
        assert found["n"] == report["n_top"] + report["n_random"]
        assert found["top"]["n"] == report["n_top"]
        assert set(found["intervals"]) == {
            "spearman", "pearson", "sign", "slope", "within_2",
        }  # fmt: skip


def test_the_graph_predicts_its_replacement_model_exactly(traced: Path):
    """Every active feature is a node here: correlation 1 (maths 16.1)."""
    report = json.loads((traced / "validation.json").read_text())
    assert report["total_effect"]["replacement"]["pearson"] > 1 - 1e-5
    assert report["complete_replacement"] is True


@pytest.mark.slow
def test_validate_again_gives_the_same_numbers(
    traced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """From the directory alone; the same seed draws the same features."""
    copy = Path(shutil.copytree(traced, tmp_path / "copy"))
    assert run("validate", copy, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    first = json.loads((traced / "validation.json").read_text())
    for mode in ("constrained", "additive"):
        assert again["total_effect"][mode]["spearman"] == pytest.approx(
            first["total_effect"][mode]["spearman"], abs=1e-3
        )


@pytest.mark.slow
def test_another_foil_is_what_effects_are_of(
    traced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = Path(shutil.copytree(traced, tmp_path / "copy"))
    few = ("--n-features", 5, "--json")
    assert run("validate", copy, "--foil", "w7", *few) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["contrast"].endswith(" - logit(w7)")
    assert report["held"]["on"] == report["live"]["on"] == "contrast"
    assert "foil" in report["levels"]
    assert f"Effects are of {report['contrast']}, as asked." in report["verdict"]
    assert run("validate", copy, "--foil", "no token", *few) == 2
    assert "is not one token of this model" in capsys.readouterr().err
    args = ("--model", MODEL, "--dictionary", DICTIONARY, "--out", tmp_path / "diff")
    contrast = ("--foil", "w7", "--targets", "diff:")
    assert run("trace", PROMPT, *args, *contrast) == 0
    assert load_graph(tmp_path / "diff" / "graph.npz").target_token_K.tolist() == [-1]
    capsys.readouterr()
    assert run("validate", tmp_path / "diff", *few) == 0
    assert json.loads(capsys.readouterr().out)["held"]["n"] > 0


def test_patch_prints_the_contract(
    traced: Path, node: str, capsys: pytest.CaptureFixture[str]
):
    more = ("--sweep-end", "--generate", 3, "--json")
    assert run("patch", traced, "--feature", node, "--scale", -1, *more) == 0
    out = json.loads(capsys.readouterr().out)
    assert set(out) >= {"mode", "layers", "edits", "kl", "targets"}
    assert set(out["targets"][0]) == {
        "token", "p_before", "p_after", "logit_before", "logit_after",
    }  # fmt: skip
    assert out["kl"] > 0
    assert [row["token"] for row in out["predicted"]][: len(out["targets"])] == [
        target["token"] for target in out["targets"]
    ]
    assert set(out["predicted"][0]) == {
        "token", "graph", "derivative", "replacement", "measured", "as_predicted",
        "why",
    }  # fmt: skip
    assert out["curve"]["scale"][0] == -2
    assert out["curve"]["scale"][-1] == 4
    assert len(out["sweep_end"]["last_layers"]) == 3
    assert len(out["generated"]["tokens_after"]) == 3
    assert (traced / "patch.png").read_bytes()[:4] == b"\x89PNG"


def test_patch_prints_a_table_and_warns_of_double_counting(
    traced: Path, node: str, capsys: pytest.CaptureFixture[str]
):
    assert run("patch", traced, "--feature", node, "--mode", "additive") == 0
    said = capsys.readouterr()
    assert "KL" in said.out
    assert "twice" in said.err


def test_groups_come_from_a_file_of_the_viewer(
    traced: Path, node: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    layer, pos, feature = node.split(":")
    file = tmp_path / "groups.json"
    file.write_text(json.dumps([["mine", f"{layer}_{feature}_{pos}"]]))
    groups = ("--supernodes", file, "--json", "--group")
    assert run("patch", traced, *groups, "mine") == 0
    grouped = json.loads(capsys.readouterr().out)
    assert run("patch", traced, "--feature", node, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kl"] == grouped["kl"]
    assert run("patch", traced, *groups, "other") == 2
    assert "no supernode 'other'" in capsys.readouterr().err


def test_members_without_an_activation_are_named_not_dropped(
    traced: Path, node: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    layer, pos, feature = node.split(":")
    file = tmp_path / "groups.json"
    own, token = (
        f"{layer}_{feature}_{pos}",
        json.loads((traced / "graph.json").read_text("utf-8"))["nodes"],
    )
    embedding = next(n["node_id"] for n in token if n["feature_type"] == "embedding")
    groups = ("--supernodes", file, "--json", "--group", "mine")
    file.write_text(json.dumps([["mine", own, embedding]]))
    assert run("patch", traced, *groups) == 0
    said = capsys.readouterr()
    assert f"{embedding} stay as they are" in said.err
    assert embedding in json.loads(said.out)["warning"]
    file.write_text(json.dumps([["mine", embedding]]))
    assert run("patch", traced, *groups) == 2
    assert "has no features" in capsys.readouterr().err
    file.write_text(json.dumps([["mine", own, "Paris?"]]))
    assert run("patch", traced, *groups) == 2
    said = capsys.readouterr().err
    assert "supernode 'mine': no node \"Paris?\" in this graph" in said
    assert said.count("\n") == 1
    # as other viewers save them: text in a graph.json
    file.write_text(
        json.dumps({"qParams": {"supernodes": json.dumps([["mine", own]])}})
    )
    assert run("patch", traced, *groups) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--feature", "1:2:4000"), "feature 4000 is unknown"),
        (("--feature", "9:2:4"), "layer 9 is unknown"),
        (("--feature", "1:70:4"), "position 70 is not in the prompt"),
        (("--feature", "1:2"), "write LAYER:POS:FEATURE"),
        (("--layers", "3:1"), "an empty range"),
        (("--layers", "0:9"), "are not in the model"),
        (("--scale", "nan"), "give a finite number"),
        (("--scale", "1", "--add", "2"), "give only one of"),
        (("--generate", "100"), "cannot generate 100 tokens"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    traced: Path,
    node: str,
    capsys: pytest.CaptureFixture[str],
    args: tuple,
    message: str,
):
    feature = () if "--feature" in args else ("--feature", node)
    assert run("patch", traced, *feature, *args) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert err.count("\n") == 0
    assert err.startswith("jaxclt: ")


def test_no_feature_no_directory_and_other_weights_are_refused(
    traced: Path, node: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("patch", traced) == 2
    assert "nothing to patch" in capsys.readouterr().err
    assert run("validate", tmp_path) == 2
    assert "no graph in" in capsys.readouterr().err
    other = GOLDEN.parent / "circuit_tracer_plt" / "model"
    assert run("validate", traced, "--model", other) == 2
    assert "is not the one that was traced" in capsys.readouterr().err
    assert run("patch", traced, "--feature", node, "--dictionary", "neurons:4") == 2
    assert "is not the one that was traced" in capsys.readouterr().err
    copy = Path(shutil.copytree(traced, tmp_path / "copy"))
    (copy / "report.json").write_text("{}")
    assert run("validate", copy) == 2
    assert "is not a report of trace" in capsys.readouterr().err


def test_features_are_read_from_text():
    assert parse_feature("12:5:345") == (12, 5, 345)
    assert parse_feature("12:-1:0") == (12, -1, 0)
    assert parse_feature("0:3..6:7") == (0, slice(3, 6), 7)
    assert parse_feature("0:3..:7") == (0, slice(3, None), 7)
    for text in ("a:b:c", "1:2:3:4", "1:2.5:3", "-1:2:3"):
        with pytest.raises(InputError, match="write LAYER"):
            parse_feature(text)
