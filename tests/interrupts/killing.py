"""Commands that are killed and started again, and what they leave.

`Forks` runs command lines in processes of their own, `outputs` reads what lies in a
directory with everything taken out that a clock or the memory at hand decides.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# How a command ends that heard one, or had not begun to listen.
STATUS = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15}, signal.SIGINT: {130}}

TIMES = ("seconds", "timing_s", "tokens_per_s", "tokens_per_second", "eta_s")
TIMES += ("peak_memory_gb", "steps_timed")


class Forks:
    """Processes of one that has imported jaxclt, see `fork_server`."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.txt"
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # What the first run compiles, however small, the others find.
            env=os.environ
            | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()
        assert self.server.stdout is not None
        self.server.stdout.close()

    def run(
        self, argv: list[str], *, kill: tuple[float, signal.Signals] | None = None
    ) -> int:
        """The exit status of a command line, killed after so many seconds."""
        pid = self.start(argv)
        if kill is not None:
            time.sleep(kill[0])
            # One that has ended is not waited for yet, or its number is free.
            if os.path.exists(f"/proc/{pid}"):
                os.kill(pid, kill[1])
        return self.finish()

    def start(self, argv: list[str]) -> int:
        """Start a command line; the number of its process."""
        assert self.server.stdin is not None
        self.log.write_text("")
        self.server.stdin.write(json.dumps({"argv": argv, "log": str(self.log)}) + "\n")
        self.server.stdin.flush()
        return self._number()

    def finish(self) -> int:
        """The exit status of what was started, at its end."""
        return self._number()

    def _number(self) -> int:
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())


@dataclasses.dataclass
class Count:
    """Kills that came while a command ran, by signal."""

    kills: dict[str, int] = dataclasses.field(default_factory=dict)
    runs: int = 0

    def add(self, number: signal.Signals) -> None:
        self.kills[number.name] = self.kills.get(number.name, 0) + 1


def run_to_the_end(
    forks: Forks,
    argv: list[str],
    out: Path,
    seconds: float,
    draw: random.Random,
    n_kills: int,
    count: Count,
) -> float:
    """Start a command until it is done, killed up to so many times.

    Returns the seconds that the last of its processes took.
    """
    for _ in range(n_kills):
        number, started = draw.choice(SIGNALS), time.monotonic()
        at = draw.uniform(0, seconds)
        status = forks.run([*argv, "--out", str(out)], kill=(at, number))
        count.runs += 1
        if status == 0:
            return time.monotonic() - started
        said = forks.log.read_text()
        assert status in STATUS[number], f"{status} after {number.name}: {said}"
        assert "Traceback" not in said, said
        count.add(number)
    status = forks.run([*argv, "--out", str(out)])
    assert status == 0, forks.log.read_text()
    return seconds


def outputs(out: Path) -> dict[str, Any]:
    """What every file of a directory says, but for times."""
    return {
        path.relative_to(out).as_posix(): _content(path)
        for path in sorted(out.rglob("*"))
        if path.is_file() and "state" not in path.relative_to(out).parts
    } | {f"checkpoint {path.name}": _state(path) for path in _checkpoints(out)}


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("*"))


def _state(path: Path) -> dict[str, Any]:
    """The arrays of a checkpoint: its files have names and times of their own."""
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(path / "state")
    leaves, _ = _flat(state)
    return {name: np.asarray(x).tobytes() for name, x in leaves.items()}


def _flat(tree: Any) -> tuple[dict[str, Any], Any]:
    import jax

    leaves, shape = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): x for path, x in leaves}, shape


def _content(path: Path) -> Any:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {
                name: _timeless(json.loads(str(file[name])))
                if name == "meta"
                else (file[name].dtype.str, file[name].shape, file[name].tobytes())
                for name in file
            }
    if path.suffix == ".json":
        found = json.loads(path.read_text("utf-8"))
        if path.name == "manifest.json":
            found.pop("files")  # checksums of what `_state` compares
        return _timeless(found)
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(x)) for x in path.read_text("utf-8").splitlines()]
    if path.suffix == ".html":
        text = path.read_text("utf-8")
        names = "|".join(TIMES)
        return re.sub(rf'"({names})": ?(\{{[^{{}}]*\}}|[0-9.e+-]+)', r'"\1":0', text)
    return path.read_bytes()


def _timeless(x: Any) -> Any:
    if isinstance(x, dict):
        # As pairs: the order counts.
        return [(k, _timeless(v)) for k, v in x.items() if k not in TIMES]
    if isinstance(x, list):
        return [_timeless(v) for v in x]
    return x
