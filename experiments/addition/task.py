"""The task: `calc: a+b=` for a, b in 0..99, and its vocabulary.

Operands are digits (`3`, `6`), the sum is one token (`95`). Digits, because nothing
else tells a model that trains on sums alone about the decimal system: with a token for
each number it learned to add as well, but by periods of its own, and not one of 862
features of its transcoder had to do with last digits. The sum as one token, because so
the whole of it is said at the `=`: the last digit and the magnitude meet in one
prediction, as in the paper's case study.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np

N = 100  # operands are 0..N-1
NUMBERS = 2 * N - 1  # sums are 0..2N-2; the token id of a number is the number
CALC, PLUS, EQUALS, UNKNOWN = range(NUMBERS, NUMBERS + 4)
D_VOCAB = NUMBERS + 4
LONGEST = 7  # tokens of `calc: 36+59=`; shorter ones are padded behind
PAD = -1
RULE = r"calc: |(?<==)\d+|\d|\D"  # a number behind `=` is one token
HELD = 2_000  # pairs that are never trained on


def all_pairs() -> tuple[np.ndarray, np.ndarray]:
    """Operands a and b of all N² sums, a by rows."""
    a, b = np.divmod(np.arange(N * N), N)
    return a, b


def tokens(a: int, b: int) -> list[int]:
    """Token ids of `calc: a+b=`."""
    return [CALC, *map(int, str(a)), PLUS, *map(int, str(b)), EQUALS]


def all_tokens() -> tuple[np.ndarray, np.ndarray]:
    """Prompts of all sums [N², 7], padded behind, and where their `=` is [N²]."""
    rows = [tokens(int(a), int(b)) for a, b in zip(*all_pairs(), strict=True)]
    last_N = np.array([len(row) - 1 for row in rows], np.int32)
    padded = [row + [PAD] * (LONGEST - len(row)) for row in rows]
    return np.array(padded, np.int32), last_N


def prompt(a: int, b: int) -> str:
    return f"calc: {a}+{b}="


def split(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the pairs (a N + b) to train on, and of those held out."""
    order = np.asarray(jax.random.permutation(jax.random.key(seed), N * N))
    return np.sort(order[HELD:]), np.sort(order[:HELD])


def held_out_lines(seed: int = 0) -> str:
    """Sums that were never trained on, in random order, as a .jsonl with answers."""
    _, held = split(seed)
    order = np.asarray(jax.random.permutation(jax.random.key(seed + 1), len(held)))
    rows = [divmod(int(i), N) for i in held[order]]
    return "".join(
        json.dumps({"prompt": prompt(a, b), "answer": str(a + b)}) + "\n"
        for a, b in rows
    )


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    names = [*map(str, range(NUMBERS)), "calc: ", "+", "=", "<unk>"]
    vocab = {name: i for i, name in enumerate(names)}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(RULE), "isolated")
    fast.decoder = decoders.Fuse()
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
