"""Two commands on one directory: the second ends before it has cost anything."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import Forks
from tiny_run import GOLDEN, MODEL, as_flags, tiny_config, write_text

from jaxclt.cli import main as cli
from jaxclt.errors import InputError
from jaxclt.io.convert import convert_dictionary
from jaxclt.runs import lock
from jaxclt.runs.lock import LOCK, held

DICTIONARY = ["--dictionary", str(GOLDEN / "dictionary")]
HOLD = """
import sys
from jaxclt.runs.lock import held
with held(sys.argv[1], beside=len(sys.argv) > 2):
    print("ready", flush=True)
    sys.stdin.read()
"""


def holder(*argv: object) -> subprocess.Popen[str]:
    """A process that holds a directory until it is killed."""
    found = subprocess.Popen(
        [sys.executable, "-c", HOLD, *map(str, argv)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert found.stdout is not None
    assert found.stdout.readline() == "ready\n"
    return found


def test_a_killed_process_leaves_no_lock(tmp_path: Path):
    out = tmp_path / "out"
    with holder(out) as other:
        with pytest.raises(InputError) as refused, held(out):
            pass
        text = str(refused.value)
        assert f"process {other.pid} on " in text
        assert "jaxclt" in text
        assert len(text) < 300 + len(str(out))
        assert "\n" not in text
        with pytest.raises(InputError), held(tmp_path / "link" / ".." / "out"):
            pass
        other.kill()
    assert (out / LOCK).is_file()
    with held(out), held(out):  # one process may enter again
        assert (out / LOCK).is_file()
    assert not (out / LOCK).exists()
    assert out.is_dir()  # it was there before


def test_a_directory_that_stays_empty_goes(tmp_path: Path):
    out = tmp_path / "a" / "b"
    with held(out):
        assert out.is_dir()
    assert not (tmp_path / "a").exists()
    with held(out):
        (out / "kept").write_text("")
    assert [p.name for p in out.iterdir()] == ["kept"]


def test_without_locks_the_named_process_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a file system that has none."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with holder(tmp_path) as other:
        with pytest.raises(InputError, match=f"process {other.pid} .* delete "):
            held(tmp_path).__enter__()
        other.kill()
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def lines(folder: Path) -> dict[str, list[str]]:
    text = str(write_text(folder / "text"))
    (folder / "prompts.txt").write_text("w7 w31 w7 w55\n")
    data = ["--data", text, "--context", "32", "--tokens", "4000", *DICTIONARY]
    return {
        "trace": ["trace", "w7 w31 w7 w55 w12 w90", *DICTIONARY],
        "sweep": ["sweep", str(folder / "prompts.txt"), *DICTIONARY],
        "features": ["features", *data],
        "globals": ["globals", *data],
        "eval": ["eval", "--data", text, *DICTIONARY],
        "train": ["train", "--data", text, *as_flags(tiny_config())],
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("trace", "trace"),
        ("sweep", "sweep"),
        ("features", "globals"),
        ("train", "train"),
        ("eval", "trace"),
    ],
)
def test_the_second_command_ends_with_a_line(
    first: str,
    second: str,
    forks: Forks,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    known, out = lines(tmp_path), tmp_path / "out"
    model = ["--model", str(MODEL), "--out", str(out)]
    pid = forks.start([*known[first], *model])
    end = time.monotonic() + 60
    file = out / LOCK
    while not (file.is_file() and file.read_text()) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)  # it cannot get done meanwhile
    before = sorted(out.rglob("*"))
    started = time.monotonic()
    try:
        with pytest.raises(SystemExit) as refused:
            cli.main([*known[second], *model])
    finally:
        os.kill(pid, signal.SIGKILL)
        assert forks.finish() == -9
    assert refused.value.code == 2
    assert time.monotonic() - started < 5
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"is being written to by process {pid} on " in said[0]
    assert sorted(out.rglob("*")) == before


def test_patch_and_convert_refuse_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "graph.npz").write_bytes(b"")
    with holder(tmp_path) as other:
        for name, *more in (["patch", "--feature", "0:0:0"], ["validate"]):
            with pytest.raises(SystemExit) as refused:
                cli.main([name, str(tmp_path), *more])
            assert refused.value.code == 2
            assert f"by process {other.pid} on " in capsys.readouterr().err
        other.kill()
    with holder(tmp_path / "new", "beside") as other:
        with pytest.raises(InputError, match=f"by process {other.pid} on "):
            convert_dictionary(
                GOLDEN / "dictionary", tmp_path / "new", "circuit-tracer"
            )
        other.kill()
