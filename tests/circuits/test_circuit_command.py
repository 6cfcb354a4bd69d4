"""`jaxclt circuit` on a tiny model: what it writes, goes on with, and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import run_command as run

import jaxclt
from jaxclt.circuits import find
from jaxclt.circuits.ablation import Leads
from jaxclt.circuits.files import with_circuit
from jaxclt.errors import InputError
from jaxclt.viewer.graph_json import validate

GOLDEN = Path(__file__).parents[1] / "goldens" / "circuit_tracer_clt"
PROMPT = "w7 w31 w7 w55 w12 w90"
OTHER = "w7 w31 w7 w55 w12 w44"


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("circuit") / "graph"
    names = "--model", GOLDEN / "model", "--dictionary", GOLDEN / "dictionary"
    quick = "--attention", 0, "--no-story"
    assert run("trace", PROMPT, *names, "--out", out, *quick) == 0
    file = out / "graph.json"
    doc = json.loads(file.read_text("utf-8"))
    doc["jaxclt"]["story"] = {"text": ["Told."], "trust": "", "groups": []}
    file.write_text(json.dumps(doc))
    return out


@pytest.fixture
def directory(traced: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(traced, tmp_path / "graph"))


def test_it_is_written_and_goes_on_where_it_was(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    args = ["circuit", directory, "--counterfactual", OTHER]
    other = shutil.copytree(directory, directory.parent / "other")
    assert run("circuit", other, *args[2:], "--json") == 0
    whole = json.loads(capsys.readouterr().out)

    made: list[int] = []
    call = find._Count.__call__

    def counted(self: Any, n: int) -> None:
        call(self, n)
        made.append(n)
        if len(made) == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(find._Count, "__call__", counted)
    assert run(*args) == 130
    assert (directory / "circuit.measured.jsonl").is_file()
    assert not (directory / "circuit.json").exists()
    assert run(*args) == 0
    shown = capsys.readouterr().out
    said = json.loads((directory / "circuit.json").read_text("utf-8"))
    assert said["passes"] < whole["passes"] <= sum(made)
    assert said | {"passes": 0} == whole | {"passes": 0}
    assert not (directory / "circuit.measured.jsonl").exists()

    for name in ("circuit", "top by influence", "random", "all candidates"):
        assert name in shown
    doc = json.loads((directory / "graph.json").read_text("utf-8"))
    validate(doc)
    assert doc["jaxclt"]["story"]["text"] == ["Told.", said["text"]]
    names = {group["name"] for group in said["groups"]}
    assert {name for name, *_ in doc["qParams"]["supernodes"]} <= names
    assert said["text"][:20] in (directory / "index.html").read_text("utf-8")
    members = {row["node_id"] for row in said["members"]}
    assert members == {i for group in said["groups"] for i in group["members"]}
    assert said["measured"]["circuit"]["features"] == len(members)


@pytest.mark.slow
def test_the_circuit_of_python(directory: Path, tmp_path: Path):
    """Its numbers are those of patches, of the graph's own features."""
    model = jaxclt.load_model(GOLDEN / "model")
    dictionary = jaxclt.load_dictionary(GOLDEN / "dictionary", model)
    graph = jaxclt.load_graph(directory / "graph.npz")
    line = {"prompt": OTHER, "answer": "w3", "foil": "w4"}
    file = tmp_path / "more.jsonl"
    file.write_text(json.dumps(line) + "\n" + json.dumps(line | {"foil": "w9"}))
    found = jaxclt.circuit(
        model,
        dictionary,
        graph,
        size=4,
        paraphrases=jaxclt.tasks.read_tasks(file),
        on_done=lambda done, total: None,
    )
    assert len(found.nodes) == 4
    assert found.ablate == "zero"
    said = found.to_json()
    # A cross-layer dictionary: the local replacement model, patterns live.
    assert "local replacement" in said["measured_in"]
    group = jaxclt.Supernode("circuit", tuple(map(graph.feature, found.nodes)))
    edit = jaxclt.Edit(supernode=group, scale=0.0)
    live = {"mode": "iterative", "patterns": "live", "gates": "live"}
    layers = 0, model.cfg.n_layers - 1
    patched = jaxclt.patch(model, dictionary, graph, [edit], layers=layers, **live)
    lead = patched.logit_difference
    assert lead is not None
    assert said["leads"]["all"] == pytest.approx(lead["before"], abs=1e-4)
    dropped = said["measured"]["circuit"]["dropped"]
    assert dropped == pytest.approx(lead["after"], abs=1e-3)
    every = said["measured"]["all candidates"]
    assert (every["sufficiency"], every["necessity"]) == pytest.approx((1, 1), abs=1e-4)
    assert len(said["paraphrases"]["prompts"]) == 2
    short = jaxclt.tasks.Example(prompt="w7", answer="w3", foil="w4")
    with pytest.raises(InputError, match="give paraphrases of as many"):
        jaxclt.circuit(model, dictionary, graph, size=1, paraphrases=[short])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--counterfactual", PROMPT), "that is the traced prompt"),
        (("--counterfactual", "w3 w4"), "neither begin nor end alike"),
        (("--ablate", "counterfactual"), 'give --counterfactual "PROMPT"'),
        (("--ablate", "mean"), "give --data FILE"),
        (("--foil", "no such token"), "is not one token"),
        (("--paraphrases", "nothing.jsonl"), "nothing.jsonl"),
        (("--size", "0"), "--size"),
    ],
)
def test_refusals_are_one_line(
    directory: Path,
    flags: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
):
    before = sorted(path.name for path in directory.iterdir())
    assert run("circuit", directory, *flags) == 2
    last = capsys.readouterr().err.strip().splitlines()
    assert len(last) == 1
    assert words in last[0]
    assert sorted(path.name for path in directory.iterdir()) == before


def test_the_answer_is_no_foil(directory: Path, capsys: pytest.CaptureFixture[str]):
    graph = jaxclt.load_graph(directory / "graph.npz")
    token = f"id:{int(graph.target_token_K[0])}"
    assert run("circuit", directory, "--foil", token) == 2
    assert "the foil is the answer itself" in capsys.readouterr().err
    assert run("circuit", directory.parent) == 2
    assert "no graph in" in capsys.readouterr().err


def test_shares_that_mislead_are_not_said():
    """Maths 24.3."""
    for all_, none in ((2.0, 1.9), (1.0, 3.0), (-3.0, -2.0), (0.0, 0.0)):
        leads = Leads(all=all_, none=none)
        assert leads.astray
        assert leads.shares(np.array([all_]), np.array([all_])).necessity[0] == 0
    assert not Leads(all=2.0, none=-1.0).astray
    assert not Leads(all=-1.0, none=-3.0).astray


class FoundOf:
    """What `with_circuit` asks of a circuit."""

    def __init__(self, graph: Any, supernodes: list[Any]) -> None:
        self.graph, self.supernodes, self.groups = graph, supernodes, supernodes

    def __str__(self) -> str:
        return "said"


def test_a_readers_groups_stay(directory: Path):
    graph = jaxclt.load_graph(directory / "graph.npz")
    doc = json.loads((directory / "graph.json").read_text("utf-8"))
    node = next(
        x for x in doc["nodes"] if x["feature_type"] == "cross layer transcoder"
    )
    layer, feature, pos = map(int, node["node_id"].split("_"))
    one = FoundOf(graph, [jaxclt.Supernode("mine", ((layer, pos, feature),))])
    made: Any = with_circuit(doc, one)  # pyright: ignore
    assert made["qParams"]["supernodes"] == [["mine", node["node_id"]]]
    assert made["jaxclt"]["circuit"]["on_page"]
    again: Any = with_circuit(made, one)  # pyright: ignore
    assert again == made
    saved = {**doc, "qParams": doc["qParams"] | {"supernodes": [["own", "0_1_2"]]}}
    kept: Any = with_circuit(saved, one)  # pyright: ignore
    assert kept["qParams"] == saved["qParams"]
    assert not kept["jaxclt"]["circuit"]["on_page"]
