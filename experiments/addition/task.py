"""The task: `calc: a+b=` for a, b in 0..99, and its vocabulary.

Every number is one token (`36`, `95`), so the model must say the whole sum at the `=`:
the last digit and the magnitude meet in one prediction, as in the paper's case study.
With digit tokens the first digit alone would be said there, and the graph of a prompt
would show half of the sum.
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
FIRST, SECOND, ANSWER = 1, 3, 4  # positions of a, of b, and where the sum is said
HELD = 2_000  # pairs that are never trained on


def all_pairs() -> tuple[np.ndarray, np.ndarray]:
    """Operands a and b of all N² sums, a by rows."""
    a, b = np.divmod(np.arange(N * N), N)
    return a, b


def tokens(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Token ids [n, 5] of `calc: a+b=`."""
    fixed = [np.full_like(a, token) for token in (CALC, PLUS, EQUALS)]
    return np.stack([fixed[0], a, fixed[1], b, fixed[2]], 1).astype(np.int32)


def prompt(a: int, b: int) -> str:
    return f"calc: {a}+{b}="


def split(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the pairs (a N + b) to train on, and of those held out."""
    order = np.asarray(jax.random.permutation(jax.random.key(seed), N * N))
    return np.sort(order[HELD:]), np.sort(order[:HELD])


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    names = [*map(str, range(NUMBERS)), "calc: ", "+", "=", "<unk>"]
    vocab = {name: i for i, name in enumerate(names)}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"calc: |\d+|\D"), "isolated")
    fast.decoder = decoders.Fuse()
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
