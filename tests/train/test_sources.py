"""Text from the hub and from the model, metrics elsewhere, fine-tuning, processes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import MODEL, as_flags, tiny_config, tiny_model, write_text

import jaxclt
from jaxclt.errors import InputError
from jaxclt.lm.run import forward
from jaxclt.text.corpus import read_documents
from jaxclt.text.hub import HubText, parse_hub_text
from jaxclt.train.processes import parse_processes
from jaxclt.train.sample import sample, sample_windows, start_token
from jaxclt.train.tracking import flat
from jaxclt.train.trainer import Listener, train

# orbax and datasets start threads of their own, and warn about it
pytestmark = pytest.mark.filterwarnings("default")

SHORT = {"tokens": 64 * 4, "norm_tokens": 200, "chunk_tokens": 256, "log_every": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


# -- the hub --------------------------------------------------------------------------


def test_names_of_datasets():
    found = parse_hub_text("hub:org/name@v2?config=en&split=validation&text=body")
    assert found == HubText(
        name="org/name", revision="v2", config="en", split="validation", text="body"
    )
    assert parse_hub_text("hub:org/name") == HubText(name="org/name")
    for wrong in ("hub:", "hub:org/name?column=x", "hub:org/name?split"):
        with pytest.raises(InputError, match="write hub:NAME"):
            parse_hub_text(wrong)


def test_datasets_stream_what_is_needed(tmp_path: Path):
    """A folder of parquet files is what a dataset on the hub is."""
    datasets = pytest.importorskip("datasets")
    texts = [f"document {i} " + "x" * 90 for i in range(50)]
    (tmp_path / "data").mkdir()
    for part in range(2):
        rows = {"body": texts[part * 25 : part * 25 + 25], "id": list(range(25))}
        file = tmp_path / "data" / f"train-{part:05d}-of-00002.parquet"
        datasets.Dataset.from_dict(rows).to_parquet(str(file))
    name = f"hub:{tmp_path}"
    assert list(read_documents(f"{name}?text=body")) == texts
    few = list(read_documents(f"{name}?text=body", tokens=500))
    assert few == texts[: len(few)]
    assert 500 * 6 <= sum(map(len, few)) < 500 * 6 + 200
    with pytest.raises(InputError, match="its columns are body, id"):
        list(read_documents(name))
    with pytest.raises(InputError, match="cannot be read"):
        list(read_documents(f"{name}?text=body&split=other"))


def test_rows_of_a_dataset_without_text_are_passed_over(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    rows = {"text": [None, "one", "", None, "two"], "id": [1, 2, 3, 4, 5]}
    file = tmp_path / "train-00000-of-00001.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(str(file))
    assert list(read_documents(f"hub:{tmp_path}")) == ["one", "two"]
    with pytest.raises(InputError, match="row 1: `id` is int, not text"):
        list(read_documents(f"hub:{tmp_path}?text=id"))


def test_datasets_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'jaxclt\[hub\]'"):
        list(read_documents("hub:org/name"))


# -- the model's own text -------------------------------------------------------------


def test_samples_follow_the_models_probabilities():
    """What is drawn is as probable as what the model expects to draw."""
    model, size, W = tiny_model(), 6, 600
    first = start_token(model.tokenizer)
    start = jnp.full((W,), first, jnp.int32)
    token_WS = sample(model.params, start, jax.random.key(0), cfg=model.cfg, size=size)
    assert token_WS.shape == (W, size)
    assert (np.asarray(token_WS[:, 0]) == first).all()
    logit_WSV = jax.vmap(lambda t: forward(model.params, t, cfg=model.cfg))(token_WS)
    log_p_WSV = np.asarray(jax.nn.log_softmax(logit_WSV), np.float64)[:, :-1]
    drawn_WS = np.take_along_axis(log_p_WSV, np.asarray(token_WS)[:, 1:, None], 2)[
        ..., 0
    ]
    expected_WS = (np.exp(log_p_WSV) * log_p_WSV).sum(-1)
    excess_S = (drawn_WS - expected_WS).mean(0)
    error_S = (drawn_WS - expected_WS).std(0) / W**0.5
    assert (np.abs(excess_S) < 5 * error_S).all()
    # A uniform draw or the most probable token would be far off.
    assert (np.abs(log_p_WSV.mean((0, 2)) - expected_WS.mean(0)) > 10 * error_S).all()
    p_V = np.exp(log_p_WSV[0, 0])
    share_V = np.bincount(np.asarray(token_WS[:, 1]), minlength=len(p_V)) / W
    assert (np.abs(share_V - p_V) < 5 * np.sqrt(p_V * (1 - p_V) / W) + 1 / W).all()


def test_sampled_windows_go_on_and_hold_out(tmp_path: Path):

    model = tiny_model()
    settings = {
        "size": 20,
        "train_tokens": 600,
        "held_tokens": 100,
        "per_call": 8,
        "seed": 3,
    }
    whole = sample_windows(model, **settings)
    assert len(whole.held_WS) == 6
    assert len(whole.train_WS) == 32
    held = {row.tobytes() for row in whole.held_WS}
    assert not held & {row.tobytes() for row in whole.train_WS}
    file = tmp_path / "samples.npz"
    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_windows(model, **settings, partial_file=file, on_tokens=stop)
    assert file.is_file()
    calls.clear()
    again = sample_windows(
        model,
        **settings,
        partial_file=file,
        on_tokens=lambda done, total: calls.append(done),
    )
    assert len(calls) == 2  # of 5 draws, 3 were there
    assert again.digest == whole.digest
    assert not file.exists()


@pytest.mark.slow
def test_a_run_on_the_models_own_text(tmp_path: Path):
    card = train(tiny_model(), "model", tmp_path / "run", tiny_config(**SHORT))
    assert card["data"]["path"] == "model"
    assert 0 < card["metrics"]["fvu"] < 2
    with pytest.raises(InputError, match="leave out --heldout"):
        train(tiny_model(), "model", tmp_path / "b", tiny_config(heldout="x", **SHORT))


# -- metrics elsewhere ----------------------------------------------------------------


@pytest.mark.slow
def test_metrics_reach_wandb(text: Path, tmp_path: Path, monkeypatch):
    """A stand-in with the calls of the real package."""
    started, logged = [], []

    class Run:
        id = "abc"

        def log(self, numbers: dict, step: int) -> None:
            logged.append((step, numbers))

        def finish(self) -> None:
            logged.append("finished")

    def init(**settings) -> Run:
        started.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    out = tmp_path / "run"
    train(
        tiny_model(),
        text,
        out,
        tiny_config(**SHORT),
        wandb="clts",
        listener=Listener(stop_at=2),
    )
    train(tiny_model(), text, out, tiny_config(**SHORT), wandb="clts")
    assert [s["project"] for s in started] == ["clts", "clts"]
    assert [s["id"] for s in started] == [None, "abc"]
    assert started[0]["config"]["features"] == 32
    assert logged.count("finished") == 2
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in logged if x != "finished"]
    assert [s for s, _ in steps] == [x["step"] for x in lines] == [2, 4, 4]
    assert steps[0][1]["fvu"] == lines[0]["fvu"]
    assert steps[0][1]["fvu_L/03"] == lines[0]["fvu_L"][3]
    assert steps[2][1]["eval/top1"] == lines[2]["top1"]


def test_numbers_of_a_record():
    record = {"a": 1, "l_L": [2.0, 3.0], "graphs": {"x": 4.0, "prompts": [{"y": 1}]}}
    assert flat(record) == {"a": 1, "l_L/00": 2.0, "l_L/01": 3.0, "graphs/x": 4.0}


def test_wandb_that_is_not_installed_is_named(text: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'jaxclt\[wandb\]'"):
        train(tiny_model(), text, tmp_path / "a", tiny_config(**SHORT), wandb="clts")


# -- fine-tuning ----------------------------------------------------------------------


def test_a_finished_run_is_fine_tuned(text: Path, tmp_path: Path):
    """A copy is; what was trained stays, and both can be traced."""
    out = tmp_path / "run"
    before = train(tiny_model(), text, out, tiny_config(**SHORT))
    files = {f.name: f.read_bytes() for f in (out / "dictionary").iterdir()}
    config = tiny_config(**SHORT, kl_steps=12, kl_lr=3e-3, kl_windows=2)
    after = train(tiny_model(), text, out, config)
    assert {f.name: f.read_bytes() for f in (out / "dictionary").iterdir()} == files
    assert after["metrics"]["kl"] == pytest.approx(before["metrics"]["kl"])
    tuned = after["metrics"]["finetuned"]
    assert len(tuned["train_kl"]) == 12
    assert tuned["kl"] < 0.97 * before["metrics"]["kl"]
    assert tuned["fvu"] != pytest.approx(before["metrics"]["fvu"], rel=1e-4)
    model = tiny_model()
    old, new = (
        jaxclt.load_dictionary(p, model).params for p in (out, out / "finetuned")
    )
    assert np.abs(np.asarray(old.W_enc_LFD - new.W_enc_LFD)).max() > 1e-3


# -- processes ------------------------------------------------------------------------


def test_where_processes_meet():
    assert parse_processes("auto") == {}
    assert parse_processes("10.0.0.1:1234,4,3") == {
        "coordinator_address": "10.0.0.1:1234",
        "num_processes": 4,
        "process_id": 3,
    }
    for wrong in ("host,2,0", "host:1,2", "host:1,2,2"):
        with pytest.raises(InputError, match="write auto, or HOST:PORT,N,I"):
            parse_processes(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_several_processes_train_what_one_does(n: int, text: Path, tmp_path: Path):
    """`--processes` on this machine's CPU."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    base = [sys.executable, "-m", "jaxclt", "train", "--model", str(MODEL),
            "--data", str(text), *as_flags(tiny_config(**SHORT))]  # fmt: skip
    root = Path(__file__).parents[2]
    # Compiled as the others are: this process leaves out most optimisations, and
    # their rounding grows over the steps.
    subprocess.run([*base, "--out", str(tmp_path / "one")], cwd=root, check=True)
    base += ["--out", str(tmp_path / "many")]
    base += ["--mesh", f"feature={n}"] if n > 1 else []
    running = [
        subprocess.Popen(
            [*base, "--processes", f"127.0.0.1:{port},{n},{i}"],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(n)
    ]
    for process in running:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    model = tiny_model()
    a, b = (
        jaxclt.load_dictionary(tmp_path / name, model).params
        for name in ("one", "many")
    )
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
    logs = [(tmp_path / name / "metrics.jsonl") for name in ("one", "many")]
    losses = [
        [
            r["loss"]
            for r in map(json.loads, log.read_text().splitlines())
            if "loss" in r
        ]
        for log in logs
    ]
    assert len(losses[0]) == 2
    np.testing.assert_allclose(*losses, rtol=1e-5)
