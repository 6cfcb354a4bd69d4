"""The whole evaluation on a tiny model: rows, raw rows, claims, files, resuming."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import GOLDEN, tiny_model, write_text

import jaxclt
from jaxclt.errors import InputError
from jaxclt.evaluation import measures
from jaxclt.evaluation.claims import check_claims
from jaxclt.evaluation.evaluate import EvalOptions, choose_prompts, evaluate
from jaxclt.evaluation.judges import Answer
from jaxclt.evaluation.prompts import read_eval_text
from jaxclt.evaluation.report import cells, markdown, write_evaluation

OPTIONS = EvalOptions(
    tokens=120,
    agreement_tokens=60,
    layer_tokens=20,
    graphs=3,
    filter="none",
    lengths=(4, 6),
    max_features=40,
    perturbed=1,
    baselines=(2.0,),
)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def dictionary(model):
    return jaxclt.load_dictionary(GOLDEN / "dictionary", model)


@pytest.fixture(scope="module")
def text(model, tmp_path_factory: pytest.TempPathFactory):
    folder = write_text(tmp_path_factory.mktemp("text"), 8)
    return read_eval_text(model, folder, tokens=120, context=17)


@pytest.fixture(scope="module")
def done(model, dictionary, text, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("eval")
    stages = []
    rows, raw = evaluate(
        model,
        [dictionary, jaxclt.load_dictionary("neurons@1e-30", model)],
        text,
        options=OPTIONS,
        out=out,
        on_stage=lambda what, done, total: stages.append((what, done, total)),
    )
    return out, rows, raw, stages


def test_rows_hold_every_measure(done, dictionary):
    _, rows, raw, stages = done
    clt, neurons, few = rows
    assert clt["dictionary"] == dictionary.name
    assert (clt["kind"], neurons["kind"], few["kind"]) == ("clt", "neurons", "neurons")
    assert sum(clt["decoder_reach"]) == pytest.approx(1)
    # All neurons are the model: maths 3.2, 12.7. (A threshold: one program for both.)
    assert neurons["fvu"] < 1e-9
    assert neurons["top1_strict"] == 1.0
    assert abs(neurons["kl_strict"]) < 1e-5
    assert max(map(abs, neurons["layer_kl_L"])) < 1e-5
    assert few["dictionary"].startswith("neurons@")
    assert few["l0"] == pytest.approx(2 * clt["l0"], rel=0.1)
    for row in rows:
        assert 0 <= row["replacement"] <= row["completeness"] <= 1
        assert row["completeness_ct"] >= row["completeness"]
        assert row["path_length"] >= 1
        assert 0 <= row["attention"] <= 1
        assert len(row["curve"]) == 5
        assert row["graphs"] == 3
        for key, (low, high) in row["intervals"].items():
            if low is not None and not key.endswith("filtered"):
                assert low - 1e-9 <= row[key] <= high + 1e-9, key
        for kind in ("encoder", "random", "upstream"):
            assert row["faithfulness"][kind]["cosine"]["0"] == pytest.approx(
                1, abs=1e-3
            )
    names = {line["measure"] for line in raw}
    assert names == {"reconstruction", "agreement", "graphs", "faithfulness"}
    mine = [x for x in raw if x["dictionary"] == clt["dictionary"]]
    fvu = [x["fvu"] for x in mine if x["measure"] == "reconstruction"]
    assert np.mean(fvu) == pytest.approx(clt["fvu"])
    kl, n = (
        sum(x[key] for x in mine if x["measure"] == "agreement") for key in ("kl", "n")
    )
    assert kl / n == pytest.approx(clt["kl"])
    assert all(done <= total for _, done, total in stages)


def test_what_is_there_is_not_measured_again(
    done, model, dictionary, text, monkeypatch: pytest.MonkeyPatch
):
    out, rows, raw, _ = done
    every = [dictionary, jaxclt.load_dictionary("neurons@1e-30", model)]

    def never(*args: object, **more: object):
        raise AssertionError("measured again")

    for name in ("compare", "compare_layers", "harvest", "trace_prompt"):
        monkeypatch.setattr(measures, name, never)
    again, lines = evaluate(model, every, text, options=OPTIONS, out=out)
    assert again == rows
    assert lines == raw
    # A damaged part is measured again, and only that.
    part = sorted((out / "parts").iterdir())[0]
    part.write_text(part.read_text()[:-20])
    with pytest.raises(AssertionError, match="measured again"):
        evaluate(model, every, text, options=OPTIONS, out=out)


def test_an_interrupted_evaluation_goes_on(
    done, model, dictionary, text, tmp_path: Path
):
    _, rows, *_ = done

    def stop(what: str, done: int, total: int) -> None:
        if "graphs" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(
            model, [dictionary], text, options=OPTIONS, out=tmp_path, on_stage=stop
        )
    assert len(list((tmp_path / "parts").iterdir())) == 3
    again, _ = evaluate(model, [dictionary], text, options=OPTIONS, out=tmp_path)
    drop = ("seconds", "intervals")
    one, other = (
        {k: v for k, v in row.items() if k not in drop} for row in (again[0], rows[0])
    )
    assert one == other


class HalfJudge:
    """Answers so many trials, then its budget is spent."""

    name = "half"

    def __init__(self, budget: int) -> None:
        self.budget, self.asked = budget, 0

    def judge(self, trials):
        for i, trial in enumerate(trials):
            if self.asked == self.budget:
                yield i, Answer(choice=None, not_asked="the budget is spent")
                continue
            self.asked += 1
            yield i, Answer(choice=trial.answer)


def test_a_spent_budget_is_gone_on_from(model, dictionary, text, tmp_path: Path):
    options = dataclasses.replace(
        OPTIONS, graphs=0, layer_tokens=0, baselines=(), sort=20, contrastive=0
    )

    def run(judge: HalfJudge):
        rows, _ = evaluate(
            model, [dictionary], text, options=options, judge=judge, out=tmp_path
        )
        return rows[0]["judged"]["sort"]

    first, second = HalfJudge(5), HalfJudge(1000)
    found = run(first)
    assert (found["n"], found["not_asked"]) == (5, 15)
    found = run(second)
    assert (found["n"], found["not_asked"], found["accuracy"]) == (20, 0, 1.0)
    every = HalfJudge(1000)
    assert run(every)["n"] == 20
    assert every.asked == 0
    logged = list((tmp_path / "judged").rglob("sort.jsonl"))
    assert len(logged) == 1


def test_claims_are_about_paired_differences(done):
    _, rows, raw, _ = done
    found = check_claims(rows, raw, jax.random.key(0))
    assert found
    for claim in found:
        low, high = claim.interval
        assert low <= claim.difference <= high
        want = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
        assert claim.verdict == want
    # The same dictionary under another name: no difference, undecided.
    twin = [row | {"dictionary": "twin", "kind": "plt"} for row in rows[:1]]
    lines = [
        x | {"dictionary": "twin"}
        for x in raw
        if x["dictionary"] == rows[0]["dictionary"]
    ]
    same = check_claims([rows[0], *twin], [*raw, *lines], jax.random.key(0))
    assert {claim.verdict for claim in same} == {"undecided"}
    assert all(claim.difference == 0 for claim in same)
    assert any("shorter paths" in claim.text for claim in same)


def test_files_and_table(done, tmp_path: Path):
    _, rows, raw, _ = done
    claims = check_claims(rows, raw, jax.random.key(0))
    write_evaluation(rows, raw, claims, tmp_path, meta={"model": "tiny"})
    document = json.loads((tmp_path / "eval.json").read_text())
    assert document["rows"] == rows
    assert len(document["claims"]) == len(claims)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == raw
    table = (tmp_path / "table.md").read_text()
    assert table == markdown(rows, claims)
    heads, body = cells(rows)
    assert len(table.splitlines()[0].split("|")) == len(heads) + 2
    assert all(len(line) == len(heads) for line in body)
    for name in ("layers", "graphs", "faithfulness"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000


def test_too_few_prompts_say_what_to_do(model, text):
    strict = EvalOptions(filter="paper", lengths=(4, 6), graphs=3)
    with pytest.raises(InputError, match="--filter none"):
        choose_prompts(model, text.take(1), strict)
