"""Killed at random moments, by any signal, a command ends as if nothing had been."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from killing import Count, Forks, outputs, run_to_the_end
from tiny_run import GOLDEN, MODEL, as_flags, tiny_config, write_text

DICTIONARY = ["--dictionary", str(GOLDEN / "dictionary")]
PROMPTS = ["w7 w31 w7 w55 w12 w90", "w12 w90", "w7 w7 w44 w31 w2"]


def line(name: str, folder: Path, perturbed: int) -> list[str]:
    """A command line without its --out."""
    text = str(write_text(folder / "text"))
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    words = ["--data", text, "--context", "32", "--tokens", "4000"]
    evaluated = ["--data", text, "--context", "32", "--tokens", "400", "--filter"]
    evaluated += ["none", "--agreement-tokens", "100", "--layer-tokens", "0"]
    evaluated += ["--graphs", "2", "--max-features", "40"]
    evaluated += ["--perturbed", str(perturbed)]
    evaluated += ["--sort", "10", "--contrastive", "0", "--baselines"]
    config = tiny_config(eval_every=12, checkpoint_every=6, tokens=64 * 18)
    more = {
        "trace": [PROMPTS[0], *DICTIONARY, "--attention", "0"],
        "sweep": [str(prompts), *DICTIONARY],
        "features": [*words, *DICTIONARY],
        "globals": [*words, *DICTIONARY],
        "eval": [*DICTIONARY, *evaluated],
        "train": ["--data", text, *as_flags(config)],
    }
    return [name, "--model", str(MODEL), *more[name]]


@pytest.mark.parametrize("n_kills", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        *("sweep", "features", "globals", "train"),
        # What they keep is kept as by a sweep; they compile for half a minute.
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("trace", "eval")),
    ],
)
def test_killed_anywhere_the_outputs_are_the_same(
    name: str, n_kills: int, forks: Forks, tmp_path: Path
):
    # Following perturbations is most of an evaluation's compiling.
    argv, whole = line(name, tmp_path, int(n_kills > 2)), tmp_path / "whole" / "out"
    started = time.monotonic()
    assert forks.run([*argv, "--out", str(whole)]) == 0, forks.log.read_text()
    seconds = time.monotonic() - started
    expected = outputs(whole)
    draw, count, run = random.Random(f"{name} {n_kills}"), Count(), 0
    while sum(count.kills.values()) < n_kills and count.runs < 5 * n_kills:
        run, out = run + 1, tmp_path / f"killed{run}" / "out"
        left = n_kills - sum(count.kills.values())
        took = run_to_the_end(forks, argv, out, seconds, draw, min(left, 4), count)
        seconds = min(seconds, took)  # the first one had to compile
        found = outputs(out)
        assert list(found) == list(expected)
        differ = [file for file in expected if found[file] != expected[file]]
        assert not differ, f"{differ} differ after {count.kills}"
    print(f"{name}: {count.runs} runs, {count.kills}")  # noqa: T201
    assert count.kills
