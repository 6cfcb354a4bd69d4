"""A patch whose numbers leave their range has no answer: null, a line, no rank."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
from jaxclt.cli import main as cli
from jaxclt.files.json_text import number, to_json
from jaxclt.graph.agreement import spearman
from jaxclt.patching import patch as intervene
from jaxclt.patching.effects import Ask, Effect
from jaxclt.patching.how import How
from jaxclt.patching.log import keep_patch, patch_record
from jaxclt.patching.plan import DOUBLE, plan_patch
from jaxclt.patching.subject import Subject
from jaxclt.validation import faithfulness
from jaxclt.validation import report as validate
from jaxclt.validation.perturb import Agreement, compare, perturb_many
from jaxclt.validation.report import ValidateOptions

HUGE = 1e36  # a factor; float32 ends at 3.4e38, its squares long before


def wild(*, pos: int | slice | None = None, **op: float) -> jaxclt.Edit:
    """An edit larger than `Edit` allows: what is allowed can add up to it."""
    layer, own, feature = strongest()[0]
    one = jaxclt.Edit(
        layer=layer,
        pos=own if pos is None else pos,
        feature=feature,
        **dict.fromkeys(op, 1.0),
    )
    for name, value in op.items():
        object.__setattr__(one, name, value)
    return one


def strict(text: str) -> Any:
    """Python reads NaN, which is no JSON."""

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("mode", "freeze_norm"),
    [
        ("constrained", True),
        ("constrained", False),
        pytest.param("iterative", False, marks=pytest.mark.slow),
        pytest.param("additive", True, marks=pytest.mark.slow),
    ],
)
def test_there_is_no_answer_and_one_line_says_why(mode: Any, freeze_norm: bool):
    """With live norms no NaN tells: what is too large to square is divided away."""
    result = patched([wild(scale=HUGE)], mode=mode, freeze_norm=freeze_norm)
    out = strict(json.dumps(result.to_json(), allow_nan=False))
    assert result.kl is out["kl"] is None
    for target in out["targets"]:
        assert target["p_after"] is target["logit_after"] is None
        assert target["p_before"] > 0
    assert out["logit_difference"]["after"] is None
    assert out["top_after"] == []
    assert out["top_before"]
    said = (result.warning or "").replace(DOUBLE + "; ", "")
    assert said.startswith("the patch diverged, its numbers left the range of float32")
    assert ("held norms do not damp" in said) == freeze_norm
    assert len(said) <= 300
    assert "\n" not in said
    # What it did not reach is known.
    fine = patched([edit(strongest()[0], scale=2.0)])
    assert fine.warning is None
    assert fine.kl is not None


def test_the_line_names_the_position_whose_writes_are_huge():
    s = subject()
    rec = s.patchable.recording
    write_LTD = rec.write_LTD.at[2, 0].multiply(500.0)
    rec = dataclasses.replace(rec, write_LTD=write_LTD)
    s = dataclasses.replace(
        s, patchable=dataclasses.replace(s.patchable, recording=rec)
    )
    size_T = np.linalg.norm(np.asarray(write_LTD[2]), axis=-1)
    times = size_T[0] / np.median(size_T)

    def said(pos: int, *, freeze_norm: bool) -> str:
        one = [jaxclt.Edit(layer=1, pos=pos, feature=39, scale=0.0)]
        return intervene._why_diverged(plan_patch(s, one, How(freeze_norm=freeze_norm)))

    why = said(0, freeze_norm=True)
    assert f"position 0's writes are huge ({times:,.0f} times the usual" in why
    assert "held norms do not damp them" in why
    # Not of a patch that does not touch it, or whose norms are live.
    assert "position 0" not in said(2, freeze_norm=True)
    assert "position 0" not in said(0, freeze_norm=False)


def test_series_have_gaps_and_choose_among_what_is_known():
    s, one = subject(), edit(strongest()[0])
    held = plan_patch(s, [one], How(freeze_norm=True), layers=(1, 1))
    curve = intervene.scale_curve(held, [0.0, 1e15, 2.0])
    assert [x is None for x in curve["kl"]] == [False, True, False]
    assert set(curve["probability"][1]) == {None}
    strict(to_json(curve))
    sweep = intervene.sweep_end(plan_patch(s, [wild(scale=HUGE)]))
    assert sweep["strongest"] is None
    assert set(sweep["kl"]) == {None}


def test_text_ends_where_a_patch_diverges():
    s = subject()
    out = generated(s, [wild(scale=HUGE)], 3)
    assert out["after"] is None
    assert out["tokens_after"] == []
    assert len(out["tokens_before"]) == 3
    assert "diverged" in out["warning"]
    # On the second token only: the first is what the clean prompt says.
    later = [wild(pos=slice(6, None), set=HUGE)]
    out = generated(s, later, 4)
    assert out["tokens_after"] == out["tokens_before"][:1]
    assert out["after"]
    assert "diverged" in out["warning"]


def test_the_command_warns_exits_0_and_keeps_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    node = ":".join(map(str, strongest()[0]))
    names = ("--model", str(MODEL), "--dictionary", str(DICTIONARY))
    # As far as a flag goes; MLPs after the range square it, and square that.
    most = (
        "--feature",
        node,
        "--scale",
        "1e15",
        "--norms",
        "frozen",
        "--layers",
        "1:1",
    )
    cli.main(["patch", PROMPT, *names, *most, "--json", "--generate", "2"])
    said = capsys.readouterr()
    out = strict(said.out)
    assert out["kl"] is None
    assert out["generated"]["after"] is None
    assert said.err.count("the patch diverged") == 1
    cli.main(["patch", PROMPT, *names, *most, "--plot", str(tmp_path / "p.png")])
    said = capsys.readouterr()
    assert "KL - nats" in said.out
    assert "nan" not in said.out
    assert (tmp_path / "p.png").stat().st_size
    result = jaxclt.patch(*parts(), [wild(scale=HUGE)])
    keep_patch(tmp_path, patch_record(result, ["x"], {"scale": HUGE}), parts()[2].meta)
    (kept,) = strict((tmp_path / "patches.json").read_text())["patches"]
    assert kept["kl"] is None
    assert "diverged" in kept["warning"]


def test_validation_counts_what_diverged_and_ranks_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every third patch is given no answer; the figures are those of the others."""
    options = ValidateOptions(
        n_features=8, n_small=4, n_patterns=0, n_replacement=4, n_groups=3
    )
    rng, lost = random.Random(0), []

    def uniform(*shape: int) -> np.ndarray:
        return np.array([rng.random() for _ in range(math.prod(shape))]).reshape(shape)

    def made_up(self: Subject, many: Any, layers: Any, how: How, ask: Ask, **more: Any):
        B, K = len(many.factor_E), len(ask.token_K)
        bad_B = np.arange(B) % 3 == 1
        lost.append(int(bad_B.sum()))
        W = 0 if ask.watch is None else len(ask.watch.value_E)
        parts = (uniform(*shape) for shape in ((B,), *[(B, K)] * 3, (B, W)))
        kl_B, *three, watch_BW = (
            np.where(bad_B.reshape(B, *[1] * (x.ndim - 1)), np.nan, x) for x in parts
        )
        none_B0 = np.zeros((B, 0))
        return Effect(kl_B, *three, none_B0, none_B0, watch_BW)  # pyright: ignore

    def spread(*args: Any, on_batch: Any, **how: Any) -> Any:
        on_batch(6, 2)
        table: dict[str, Any] = {
            "cosine": [[1.0, 0.5, None, None]],
            "nmse": [[0.0, 0.3, None, None]],
        }
        table["next_layer"] = {"mean": 0.5, "interval": [0.4, 0.6], "n": 4}
        table["flipped"] = {"mean": None, "interval": [None, None], "n": 0}
        return {"encoder": table}, [0]

    monkeypatch.setattr(Subject, "effects", made_up)
    monkeypatch.setattr(validate, "faithfulness", spread)
    monkeypatch.setattr(validate, "_jacobian", lambda *args: {})
    report = validate.validate_graph(subject(), options)
    total = report["total_effect"]
    assert report["diverged"] == sum(lost) + 2
    assert f"{sum(lost) + 2} of {report['patches']} patches div" in report["verdict"]
    for mode in ("constrained", "iterative", "additive"):
        points = report["_scatter"][mode]
        assert total[mode]["n"] == len(points["measured"]) == 16 - 5
        assert np.isfinite(points["measured"]).all()
        own = spearman(np.array(points["predicted"]), np.array(points["measured"]))
        assert total[mode]["spearman"] == pytest.approx(own, abs=1e-6)
        assert total[mode]["small"]["n"] == 8 - 3
    assert total["replacement"]["n"] == 4 - 1
    assert report["influence_vs_kl"]["n"] == 16 - 5
    assert np.isfinite(report["_ranks"]["kl"]).all()
    assert report["pairwise"]["spearman"] is not None
    assert report["supernodes"]["n"] == 2
    known = [g["kl"] is not None for g in report["supernodes"]["groups"]]
    assert known == [True, False, True]
    assert len(report["failures"]) == 5
    assert all(f["measured"] is not None for f in report["failures"])
    validate.write_validation(report, tmp_path)
    assert strict((tmp_path / "validation.json").read_text())["diverged"] > 0


def test_perturbations_that_diverge_are_in_no_mean(monkeypatch: pytest.MonkeyPatch):
    """Two of a layer, one of which has no answer: the mean is the other's."""
    real_LTD = jnp.ones((4, 3, 2), jnp.float32)
    assert bool(compare(real_LTD, 2 * real_LTD).finite)
    assert not bool(compare(real_LTD, 1e30 * real_LTD).finite)
    found, counted = [], []

    def spoilt(*args: Any, **how: Any) -> tuple[Agreement]:
        (done,) = perturb_many(*args, **how)
        found.append(np.asarray(done.cosine_L).copy())
        lost_B = np.arange(len(done.finite)) % 2 == 1
        worse = (
            np.where(lost_B[:, None], 0.5, x) for x in (done.cosine_L, done.nmse_L)
        )
        return (Agreement(*worse, done.ratio_L, ~lost_B, done.flipped),)

    monkeypatch.setattr(faithfulness, "perturb_many", spoilt)
    tables, layers = faithfulness.faithfulness(
        subject(),
        jax.random.key(0),
        n_layers=1,
        n_perturbed=2,
        variants=("frozen",),
        on_batch=lambda n, lost: counted.append((n, lost)),
    )
    assert counted[:2] == [(2, 1), (2, 1)]
    assert layers == [0]
    np.testing.assert_allclose(tables["encoder"]["cosine"][0], found[0][0], atol=1e-6)


def test_json_has_null_for_what_is_not_finite():
    value = {"a": [float("nan"), np.float32("inf"), 1.5], "b": (None, "x")}
    assert strict(to_json(value)) == {"a": [None, None, 1.5], "b": [None, "x"]}
    assert to_json({"a": 1}, indent=1) == json.dumps({"a": 1}, indent=1)
    assert number(float("-inf")) is None
    assert number(np.float32(2)) == 2.0
