"""A prompt is patched without a graph, and recorded again within its memory."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import run_command as run
from test_shell import (
    DICTIONARY,
    MODEL,
    PROMPT,
    edit,
    generated,
    parts,
    patched,
    strongest,
    subject,
)

import jaxclt
from jaxclt.graph.graph import Graph
from jaxclt.patching import patch as intervene
from jaxclt.patching.how import How, Mode
from jaxclt.patching.plan import plan_patch
from jaxclt.patching.subject import Subject
from jaxclt.trace import again
from jaxclt.trace.record import recorded
from jaxclt.types import Supernode

NAMES = ("--model", str(MODEL), "--dictionary", str(DICTIONARY))


def node() -> str:
    return ":".join(map(str, strongest()[0]))


@pytest.mark.parametrize("mode", ["constrained", "iterative", "additive"])
def test_a_prompt_is_patched_as_its_graph_is(mode: Mode):
    model, clt, graph = parts()
    edits = [edit(strongest()[0], scale=-1.0)]
    how: dict[str, Any] = {"mode": mode, "layers": (0, 2), "freeze_norm": True}
    want = patched(edits, **how)
    for prompt in (PROMPT, graph.token_T.tolist()):
        found = jaxclt.patch(model, clt, prompt, edits, **how)
        assert found.features == []  # which only a graph has
        assert want.features
        same = dataclasses.replace(found, features=want.features)
        assert same == want


def test_everything_that_takes_a_subject_takes_one_of_a_prompt():
    model, clt, _ = parts()
    s, edits = Subject.of(model, clt, PROMPT), [edit(strongest()[0])]
    how = How(freeze_pattern=False)
    one, two = (plan_patch(x, edits, how, n_later=3) for x in (s, subject()))
    for series in (intervene.scale_curve, intervene.sweep_end, intervene.generate):
        assert series(one) == series(two)


def test_patterns_are_frozen_or_live_by_one_name(
    capsys: pytest.CaptureFixture[str],
):
    what = (PROMPT, *NAMES, "--feature", node(), "--patterns", "live")
    assert run("patch", *what, "--json", "--sweep-end", "--generate", 3) == 0
    out = json.loads(capsys.readouterr().out)
    live, older, frozen = (
        patched([edit(strongest()[0])], **how)
        for how in ({"patterns": "live"}, {"freeze_pattern": False}, {})
    )
    assert live == older
    assert out["kl"] == live.kl != frozen.kl
    assert out["options"]["patterns"] == live.options["patterns"] == "live"
    assert frozen.options["patterns"] == "frozen"
    plan = plan_patch(
        subject(), [edit(strongest()[0])], How(patterns="live"), n_later=3
    )
    assert out["curve"] == intervene.scale_curve(plan)
    assert out["sweep_end"] == intervene.sweep_end(plan)
    assert out["generated"] == intervene.generate(plan)
    assert run("patch", *what) == 0
    assert "patterns live, norms live" in capsys.readouterr().out
    with pytest.raises(jaxclt.InputError, match="patterns 'alive': choose one of"):
        How(patterns="alive")  # pyright: ignore[reportArgumentType]


def test_only_heads_see_a_change_by_call_and_by_command(
    capsys: pytest.CaptureFixture[str],
):
    model, clt, graph = parts()
    edits = [edit(strongest()[0], scale=-3.0)]
    found = jaxclt.patch_qk(model, clt, graph, edits, [(2, 1), (3, 0)], side="key")
    assert (found.mode, found.layers) == ("qk", (2, 3))
    assert found.heads == ("L2H1:key", "L3H0:key")
    assert found.kl is not None
    assert found.kl > 1e-6
    assert min(f["layer"] for f in found.features) >= 2
    what = (PROMPT, *NAMES, "--feature", node(), "--scale", -3)
    assert run("patch", *what, "--qk", "L2H1:key", "L3H0:key", "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert out["heads"] == ["L2H1:key", "L3H0:key"]
    assert out["kl"] == pytest.approx(found.kl)
    assert out["curve"]["kl"][out["curve"]["scale"].index(1.0)] < 1e-6
    for more, why in (
        (("--qk", "2.1"), "head '2.1': write L9H3"),
        (("--qk", "L2H9"), "head L2H9 is unknown: the model has layers 0 to 3 and"),
        (("--qk", "L0H1"), "no head sees the change"),
        (("--qk", "L2H1", "--generate", 1), "answered by the real model"),
        (("--qk", "L2H1", "--layers", "1:2"), "answered by the real model"),
        (("--qk", "L2H1", "--mode", "iterative"), "answered by the real model"),
        (("--qk", "L2H1", "--sweep-end"), "has no layer range"),
    ):
        assert run("patch", *what, *more) == 2
        assert why in capsys.readouterr().err
    with pytest.raises(jaxclt.InputError, match="side 'keys': choose one of"):
        jaxclt.patch_qk(model, clt, graph, edits, [(2, 1)], side="keys")  # pyright: ignore[reportArgumentType]
    with pytest.raises(jaxclt.InputError, match="no head: name at least one"):
        jaxclt.patch_qk(model, clt, graph, edits, [])


def test_what_takes_the_graph_says_so():
    model, clt, _ = parts()
    s = Subject.of(model, clt, PROMPT)
    group = Supernode("g", (strongest()[0],))
    plain = jaxclt.patch(model, clt, PROMPT, [jaxclt.Edit(supernode=group, scale=0)])
    assert plain.kl == pytest.approx(patched([edit(strongest()[0])], s).kl)
    named = jaxclt.Edit(supernode=Supernode("g", (node(),)), scale=0)
    with pytest.raises(
        jaxclt.InputError, match="'g' names nodes in words, which needs"
    ):
        patched([named], s)
    with pytest.raises(jaxclt.InputError, match="trace it first"):
        s.watch(np.zeros(1, int))
    with pytest.raises(jaxclt.InputError, match="the prompt is empty"):
        jaxclt.patch(model, clt, " ", [named])


def test_the_command_needs_no_directory_and_writes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    what = ("--feature", "1:0..:39", "--scale", 2, "--mode", "additive")
    assert run("patch", PROMPT, *NAMES, *what, "--generate", 2, "--json") == 0
    out = json.loads(capsys.readouterr().out)
    layer, feature = 1, 39
    edits = [jaxclt.Edit(layer=layer, pos=slice(0, None), feature=feature, scale=2.0)]
    want = patched(edits, mode="additive")
    assert out["kl"] == pytest.approx(want.kl)
    assert out["targets"] == want.targets
    assert len(out["generated"]["tokens_after"]) == 2
    assert len(out["curve"]["kl"]) == len(out["curve"]["scale"])
    assert "plot" not in out
    assert run("patch", PROMPT, *NAMES, *what) == 0
    said = capsys.readouterr().out
    assert "top tokens" in said
    assert "plot" not in said
    assert list(tmp_path.iterdir()) == []
    assert run("patch", PROMPT, *NAMES, *what, "--plot", "p.png", "--sweep-end") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_a_prompt_may_be_a_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    template = "{% for m in messages %}w9 {{ m.content }} {% endfor %}w8"
    (folder / "chat_template.jinja").write_text(template)
    names = ("--model", folder, *NAMES[2:], "--feature", "1:2:39", "--set", 3, "--json")
    assert run("patch", "w31 w7", *names, "--chat") == 0
    chat = json.loads(capsys.readouterr().out)
    assert run("patch", "w9 w31 w7 w8", *names) == 0
    assert chat == json.loads(capsys.readouterr().out)
    assert chat["kl"] > 0


def test_a_prompt_is_told_from_a_mistyped_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for args, why in (
        ((PROMPT,), "is not a directory; if it is a prompt, give --model and --dict"),
        (("out/eifel",), "'out/eifel' is not a directory; if it is a prompt"),
        (("out/eifel", *NAMES), "looks like a directory but is not one"),
        (("eifel", *NAMES[:2]), "'eifel' is not a directory"),
        (("w7 " * 3000,), "is not a directory"),
        (("out",), "no graph in out"),
        (("out", *NAMES), "no graph in out"),
        (("", *NAMES), "the prompt is empty"),
        ((" \n", *NAMES), "the prompt is empty"),
        ((PROMPT, *NAMES, "--group", "g"), "--group takes supernodes of a graph"),
        ((PROMPT, *NAMES, "--supernodes", "g.json"), "--group takes supernodes"),
        (("out", "--bos", "never"), "--bos goes with a prompt"),
        (("out", "--chat"), "--chat goes with a prompt"),
    ):
        assert run("patch", *args, "--feature", node()) == 2
        said = capsys.readouterr().err
        assert why in said
        assert said.count("\n") == 1
        assert len(said) < 320
    for text in ("0:-..:8", "0:..-:8"):
        assert run("patch", PROMPT, *NAMES, "--feature", text) == 2
        assert "write LAYER:POS:FEATURE" in capsys.readouterr().err


def small(graph: Graph) -> Graph:
    """As if traced with so little memory that patterns were not kept."""
    config = graph.meta.config | {"memory_gb": 1e-5}
    return dataclasses.replace(
        graph, meta=dataclasses.replace(graph.meta, config=config)
    )


@functools.cache
def recomputed() -> Subject:
    model, clt, graph = parts()
    return Subject.of(model, clt, small(graph))


@pytest.mark.parametrize(
    ("mode", "norm"),
    [
        ("constrained", False),
        pytest.param("constrained", True, marks=pytest.mark.slow),
        pytest.param("iterative", False, marks=pytest.mark.slow),
        pytest.param("iterative", True, marks=pytest.mark.slow),
        pytest.param("additive", False, marks=pytest.mark.slow),
        pytest.param("additive", True, marks=pytest.mark.slow),
    ],
)
def test_a_prompt_is_recorded_again_in_the_memory_of_its_trace(mode: Mode, norm: bool):
    """Patterns that did not fit are computed again in every kind of patch."""
    assert recomputed().patchable.recording.frozen.pattern_LHTS is None
    assert subject().patchable.recording.frozen.pattern_LHTS is not None
    edits = [edit(n, scale=-1.0) for n in strongest(2)]
    want, found = (
        patched(edits, s, freeze_norm=norm, mode=mode)
        for s in (subject(), recomputed())
    )
    assert found.kl == pytest.approx(want.kl, rel=1e-4)
    for a, b in zip(found.features, want.features, strict=True):
        assert a["after"] == pytest.approx(b["after"], abs=1e-4)


def test_text_follows_where_patterns_are_computed_again():
    edits = [edit(strongest()[0], scale=-4.0)]
    want, found = (generated(s, edits, 3) for s in (subject(), recomputed()))
    assert found == want


def test_an_edge_is_explained_in_the_memory_of_its_trace():
    model, clt, graph = parts()
    recording = recorded(small(graph), model, clt).recording
    assert recording.frozen.pattern_LHTS is None
    A = graph.n_features
    row, col = np.unravel_index(np.argmax(np.abs(graph.edge_RN[:A, :A])), (A, A))
    names = (jaxclt.node_name(graph, int(col)), jaxclt.node_name(graph, int(row)))
    want, found = (
        again.edge_parts_with_model(g, *names, model=model, dictionary=clt)
        for g in (graph, small(graph))
    )
    np.testing.assert_allclose(found.hops, want.hops, atol=1e-5)
    np.testing.assert_allclose(
        [load for *_, load in found.heads or ()],
        [load for *_, load in want.heads or ()],
        atol=1e-5,
    )
    assert abs(found.hops[1]) > 1e-4  # pyright: ignore[reportOptionalSubscript]


def test_nothing_records_a_prompt_past_the_memory_plan():
    """Windows of text are short: training, evaluation and means record those."""
    root = Path(jaxclt.__file__).parent
    recording = re.compile(r"\brecord_prompt\(|from jaxclt.lm.run import .*\brecord\b")
    calls = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if recording.search(path.read_text("utf-8"))
    }
    windows = ("train/", "evaluation/", "testing/", "circuits/references.py")
    assert {c for c in calls if not c.startswith(windows)} == {"trace/record.py"}
