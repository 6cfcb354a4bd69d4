"""A whole run on a tiny model: what it writes, and that it can be stopped anywhere."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import MODEL, as_flags, tiny_config, tiny_model, write_text

import jaxclt
from jaxclt.cli import main as cli
from jaxclt.errors import InputError
from jaxclt.text.corpus import Windows
from jaxclt.train.trainer import DivergedError, Listener, train

# orbax starts threads and event loops of its own, and warns about both
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def weights_of(out: Path) -> dict[str, bytes]:
    files = sorted((out / "dictionary").glob("*.safetensors"))
    assert files
    return {f.name: f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny_model(), text, out, tiny_config())
    return out


def test_windows_of_ones_own_are_trained_on_first_position_and_all(tmp_path: Path):
    model = tiny_model()
    token_WS = np.array(jax.random.randint(jax.random.key(3), (64, 9), 3, 90))
    token_WS[::2, 7:] = -1  # padding
    held, rest = np.split(token_WS, [8])
    config = tiny_config(tokens=64 * 4, context=9, norm_tokens=100, heldout_tokens=999)
    out = tmp_path / "run"
    card = train(model, Windows.of(rest, held, first=True), out, config)
    real = (held != -1).sum()
    assert real - len(held) < card["metrics"]["heldout_tokens"] <= real  # no outliers
    assert card["metrics"]["l0"] > 0
    assert "first position" not in (out / "README.md").read_text()
    with pytest.raises(InputError, match="differs in data"):
        train(model, Windows.of(rest, held), out, config)


def records(out: Path, kind: str = "step") -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def test_a_run_learns_and_writes_what_the_contract_says(whole: Path):
    assert {"metrics.jsonl", "checkpoints", "dictionary", "card.json"} <= {
        p.name for p in whole.iterdir()
    }
    steps = records(whole)
    assert [r["step"] for r in steps] == [4, 8, 12, 16, 20, 24]
    assert {"fvu", "l0", "dead", "tokens_per_s", "eta_s", "fvu_L", "loss"} <= set(
        steps[0]
    )
    assert steps[-1]["fvu"] < 0.95 * steps[0]["fvu"]
    card = json.loads((whole / "card.json").read_text())
    (final,) = records(whole, "eval")
    assert card["metrics"]["fvu"] == final["fvu"]
    assert len(final["fvu_L"]) == len(final["l0_L"]) == 4
    assert 0 < final["top1"] <= 1
    assert card["recipe"]["seed"] == 0
    assert "| unexplained variance" in (whole / "README.md").read_text()
    assert "The first position" in (whole / "README.md").read_text()
    assert (whole / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_export_does_on_held_out_text_what_the_card_says(whole: Path):
    """The files alone, in raw units, against the model's own activations."""
    from transcoder import decode, encode

    from jaxclt.train.harvest import harvest

    model = tiny_model()
    dictionary = jaxclt.load_dictionary(whole, model)
    windows = np.load(whole / "windows.npz", allow_pickle=False)
    held = windows["held_WS"]
    read, write, norm = harvest(
        model.params, held, None, cfg=model.cfg, site=dictionary.cfg.read
    )
    bound_L = np.load(whole / "scales.npz")["bound_L"]
    fits = (np.asarray(norm) <= bound_L[:, None]).all(0)
    keep = Windows.of(held, held, special=model.tokenizer.special_ids).valid(held)
    keep = keep.ravel() & fits
    keep = np.flatnonzero(keep)[:300]
    read, write = read[:, keep], write[:, keep]
    clt = dictionary.params
    a = encode(clt, read, cfg=dictionary.cfg)
    error = np.asarray(decode(clt, a) - write, np.float64)
    centred = np.asarray(write - write.mean(1, keepdims=True), np.float64)
    fvu_L = (error**2).sum((1, 2)) / (centred**2).sum((1, 2))
    card = json.loads((whole / "card.json").read_text())
    np.testing.assert_allclose(fvu_L, card["metrics"]["fvu_L"], rtol=1e-3)
    l0_L = np.asarray(a > 0).sum(2).mean(1)
    np.testing.assert_allclose(l0_L, card["metrics"]["l0_L"], atol=0.02)
    # Calibrated on training text to 6 a token.
    assert abs(l0_L.mean() / 6 - 1) < 0.25


@pytest.mark.slow
def test_a_paused_and_damaged_run_ends_with_the_same_bits(
    whole: Path, text: Path, tmp_path: Path
):
    """Stopped twice; the second checkpoint is damaged, a third was never finished."""
    out, heard = tmp_path / "run", []
    for stop in (9, 14):
        train(tiny_model(), text, out, tiny_config(), listener=Listener(stop_at=stop))
    newest = out / "checkpoints" / "00000014"
    files = [f for f in newest.rglob("*") if f.is_file()]
    largest = max(files, key=lambda f: f.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    (out / "checkpoints" / "00000016").mkdir()  # killed while it was written
    train(tiny_model(), text, out, tiny_config(), listener=Listener(line=heard.append))
    assert any("00000016 is damaged (it was not finished)" in line for line in heard)
    assert any("00000014 is damaged" in line and "checksum" in line for line in heard)
    assert any("going on after step 9" in line for line in heard)
    assert weights_of(out) == weights_of(whole)
    kept = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert kept == ["00000016", "00000024"]
    steps = {r["step"]: r["loss"] for r in records(whole)}
    again = {r["step"]: r["loss"] for r in records(out)}
    assert {k: v for k, v in again.items() if k in steps} == steps


def test_a_stop_is_a_checkpoint(text: Path, tmp_path: Path):
    """As Ctrl-C asks for: after the step that it came in, wherever that is."""
    asked = iter([False, False, True])
    listener = Listener(stoppable=lambda: nullcontext(lambda: next(asked)))
    out, config = tmp_path / "run", tiny_config(tokens=64 * 8, log_every=99)
    found = train(tiny_model(), text, out, config, listener=listener)
    assert found["step"] == 3
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["00000003"]
    assert not (out / "card.json").exists()


def test_another_recipe_does_not_resume(whole: Path, text: Path):
    with pytest.raises(InputError, match=r"differs in lr \(0\.003, not 0\.1\)"):
        train(tiny_model(), text, whole, tiny_config(lr=0.1))
    with pytest.raises(InputError, match="is not empty and holds no run"):
        train(tiny_model(), text, text, tiny_config())


def test_a_run_that_diverges_stops_and_names_the_checkpoint(text: Path, tmp_path: Path):
    out = tmp_path / "run"
    config = tiny_config(lr=3e-3, checkpoint_every=2, log_every=1, tokens=64 * 12)
    train(tiny_model(), text, out, config, listener=Listener(stop_at=4))
    run = json.loads((out / "run.json").read_text())
    run["config"]["lr"] = 1e6
    run["config"]["clip"] = 0.0
    (out / "run.json").write_text(json.dumps(run))
    config = dataclasses.replace(config, lr=1e6, clip=0.0)
    with pytest.raises(DivergedError, match=r"last good checkpoint is .*00000004"):
        train(tiny_model(), text, out, config)
    assert not (out / "dictionary").exists()


OBJECTIVE = """
from jaxclt.train.objectives import Standard, Terms

def penalty(p, pre_TF, a_TF, values, spec):
    return values["sparsity"] * (a_TF / (1 + a_TF)).sum(-1).mean()

objective = Standard(Terms(sparsity="none"), extra=penalty)

def plain(params, batch, values, spec):
    loss, metrics = Standard(Terms(sparsity="none"))(params, batch, values, spec)
    return loss, metrics | {"mine": loss}
"""


@pytest.mark.parametrize(
    "name", ["plain", pytest.param("objective", marks=pytest.mark.slow)]
)
def test_an_objective_from_a_file(name: str, text: Path, tmp_path: Path):
    (tmp_path / "mine.py").write_text(OBJECTIVE)
    config = tiny_config(
        objective=f"{tmp_path}/mine.py:{name}",
        activation="jumprelu",
        sparsity=0.05,
        l0=0.0,
        tokens=64 * 4,
        memory="per_source" if name == "objective" else "full",
        jacobian=0.1 if name == "plain" else 0.0,
    )
    train(tiny_model(), text, tmp_path / "run", config)
    (record,) = records(tmp_path / "run")
    assert math.isfinite(record["loss"])
    assert (record.get("mine") == record["loss"]) == (name == "plain")


def command(text: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", "--model", str(MODEL), "--data", str(text), "--out", str(out),
        *as_flags(tiny_config()), *more,
    ]  # fmt: skip


def status_of(args: list[str]) -> int:
    try:
        cli.main(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_trains_and_its_output_traces(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    flags = ["--graph-features", "100", "--tokens", "512", "--json"]
    assert status_of(command(text, out, *flags)) == 0
    card = json.loads(capsys.readouterr().out)
    assert card == json.loads((out / "card.json").read_text())
    graphs = card["metrics"]["graphs"]
    assert 0 < graphs["replacement"] <= 1
    assert 0 < graphs["completeness"] <= 1
    trace = ["trace", "w5 w6 w7", "--model", str(MODEL), "--dictionary", str(out)]
    assert status_of([*trace, "--out", str(tmp_path / "graph")]) == 0
    assert (tmp_path / "graph" / "index.html").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "nothing"], "there are default, cpu-small"),
        (["--features", "0"], "give at least 1"),
        (["--objective", "best"], "give tanh, l1, l0, none, or file.py:function"),
        (["--mesh", "model=3"], "write it like data=1,feature=8"),
        (["--l0", "0"], "must lie in 1.."),
        (["--tokens", "10"], "less than one step"),
    ],
)
def test_bad_flags_are_one_line(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags, message
):
    assert status_of(command(text, tmp_path / "run", *flags)) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_dry_run_of_a_mesh_that_does_not_exist(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["--dry-run", "--json", "--mesh", "data=2,feature=16"]
    assert status_of(command(text, tmp_path / "run", *flags)) == 0
    found = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "run").exists()
    L, F, D, W = 4, 32, 32, 7  # span 2: 2 + 2 + 2 + 1 decoders
    assert found["parameters"] == L * F * (D + 1) + W * F * D + L * D
    assert found["flop_per_token"] == 4 * L * D * F + 6 * W * D * F
    assert found["devices"] == 32
    assert found["bytes_per_device"]["adam"] == 8 * (found["parameters"] // 16)


def test_sharded_equals_unsharded_on_two_devices(
    whole: Path, text: Path, tmp_path: Path
):
    assert jax.device_count() >= 2
    train(tiny_model(), text, tmp_path / "two", tiny_config(), mesh="feature=2")
    compare(whole, tmp_path / "two")


def compare(one: Path, two: Path) -> None:
    model = tiny_model()
    a, b = (jaxclt.load_dictionary(p, model).params for p in (one, two))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
    losses = [[r["loss"] for r in records(p)] for p in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


EIGHT = """
import sys
sys.path[:0] = sys.argv[1:2]
import jax
jax.config.update("jax_num_cpu_devices", 8)
from pathlib import Path
from jaxclt.train.trainer import train
from tiny_run import tiny_config, tiny_model
assert jax.device_count() == 8
text, out = map(Path, sys.argv[2:])
for activation, l0 in (("jumprelu", 0.0), ("batch_topk", 6.0)):
    config = tiny_config(tokens=64 * 10, activation=activation, objective="tanh", l0=l0)
    for name, mesh in (("one", ""), ("many", "data=2,feature=4")):
        train(tiny_model(), text, out / activation / name, config, mesh=mesh)
"""


@pytest.mark.slow
def test_sharded_equals_unsharded_on_eight_devices(text: Path, tmp_path: Path):
    here = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", EIGHT, here, str(text), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    for activation in ("jumprelu", "batch_topk"):
        compare(tmp_path / activation / "one", tmp_path / activation / "many")


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(text: Path, tmp_path: Path):
    """Killed twice at whatever moment, the run ends with the same bits."""
    root = Path(__file__).parents[2]
    flags = ("--checkpoint-every", "2", "--tokens", str(64 * 60))
    base = [sys.executable, "-m", "jaxclt"]
    subprocess.run(
        [*base, *command(text, tmp_path / "whole", *flags)],
        cwd=root, check=True, capture_output=True,
    )  # fmt: skip
    out, killed = tmp_path / "run", 0
    for wanted in (3, 30):
        process = subprocess.Popen(
            [*base, *command(text, out, *flags)],
            cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None:
            steps = [int(p.name) for p in (out / "checkpoints").glob("[0-9]*")]
            if max(steps, default=0) >= wanted:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        killed += process.wait() == -signal.SIGKILL
    assert killed == 2
    assert not (out / "card.json").exists()
    done = subprocess.run(
        [*base, *command(text, out, *flags)],
        cwd=root, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "going on after step" in done.stderr
    assert weights_of(out) == weights_of(tmp_path / "whole")
    shutil.rmtree(out)
