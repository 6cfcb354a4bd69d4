"""The bundled model adds, its transcoder too, and its training can be begun again."""

from __future__ import annotations

import json
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import task
import train_model

import jaxclt
from jaxclt.clt.coder import load
from jaxclt.io.bundled import DICTIONARIES, bundled
from jaxclt.lm.run import forward
from jaxclt.replacement.model import replacement_logits


@pytest.fixture(scope="module")
def model() -> jaxclt.Model:
    return jaxclt.load_model("addition")


def some_sums(n: int) -> tuple[jnp.ndarray, np.ndarray, np.ndarray]:
    """Held-out prompts, where they end, and their sums."""
    _, held = task.split()
    rows = held[:: len(held) // n]
    token_NT, last_N = task.all_tokens()
    a, b = task.all_pairs()
    return jnp.maximum(token_NT[rows], 0), last_N[rows], (a + b)[rows]


def share_right(logits, n: int = 250) -> float:
    token_NT, last_N, sum_N = some_sums(n)
    import jax

    logit_NTV = jax.jit(jax.vmap(logits))(token_NT)
    said_N = np.asarray(logit_NTV[np.arange(len(last_N)), last_N].argmax(-1))
    return float((said_N == sum_N).mean())


def test_it_adds_pairs_that_it_never_saw(model):
    assert share_right(partial(forward, model.params, cfg=model.cfg)) >= 0.99


@pytest.mark.parametrize("name", DICTIONARIES)
def test_its_transcoders_add_without_error_nodes(model, name: str):
    dictionary = jaxclt.load_dictionary(name, model)
    logits = partial(
        replacement_logits,
        model.params,
        load(dictionary, model.params, model.cfg),
        cfg=model.cfg,
        keep_first=False,
    )
    assert share_right(lambda token_T: logits(token_T)) >= 0.98


def test_operands_are_digits_and_the_sum_is_one_token(model):
    ids = model.tokenizer.encode("calc: 36+59=95")
    assert ids == [*task.tokens(36, 59), 95]
    assert model.tokenizer.decode(ids) == "calc: 36+59=95"
    padded, last_N = task.all_tokens()
    assert padded[3659].tolist() == task.tokens(36, 59)
    assert padded[105, last_N[105]] == task.EQUALS
    assert padded[105].tolist() == [*task.tokens(1, 5), -1, -1]


def test_what_is_said_of_it_is_in_its_files(model):
    folder = bundled("addition")
    assert folder is not None
    said = json.loads((folder / "curve.json").read_text("utf-8"))
    assert said["curve"][-1]["step"] == train_model.STEPS
    held_out = said["accuracy"]["held_out"]
    assert held_out == pytest.approx(said["curve"][-1]["held_accuracy"], abs=1e-6)
    assert held_out >= 0.99
    assert f"{held_out:.2%}" in (folder / "README.md").read_text()
    size = sum(
        file.stat().st_size
        for name in ("addition", *DICTIONARIES)
        for file in bundled(name).rglob("*")  # pyright: ignore
    )
    assert size < 10e6


@pytest.mark.slow
def test_training_begun_again_follows_the_curve():
    said = json.loads((bundled("addition") / "curve.json").read_text())  # pyright: ignore
    _, curve = train_model.train(100, say=lambda line: None)
    for now, then in zip(curve, said["curve"], strict=False):
        assert now["step"] == then["step"]
        assert now["held_nats"] == pytest.approx(then["held_nats"], rel=0.02)
