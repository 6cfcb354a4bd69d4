"""A padded recording gives the graph of the prompt: one compilation per bucket."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxclt.clt.active import active_features
from jaxclt.clt.coder import Dictionary
from jaxclt.graph import bank, columns, influence, rows
from jaxclt.graph.attribute import AttributeConfig, attribute_recording
from jaxclt.graph.prompt import Prompt
from jaxclt.graph.targets import salient_targets
from jaxclt.io.dictionary import load_dictionary
from jaxclt.io.model import Model, load_model
from jaxclt.shapes import bucket
from jaxclt.trace.prompt import trace_prompt
from jaxclt.trace.record import record_prompt

GOLDEN = Path(__file__).parent / "goldens" / "circuit_tracer_clt"
PROMPT = "w7 w31 w7 w55 w12 w90"


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(GOLDEN / "model")


@pytest.fixture(scope="module", params=["neurons:3", str(GOLDEN / "dictionary")])
def dictionary(request: pytest.FixtureRequest, model: Model) -> Dictionary:
    return load_dictionary(request.param, model)


def test_padded_equals_unpadded(model: Model, dictionary: Dictionary):
    config = AttributeConfig(max_features=None, tolerance=0.0)
    padded = trace_prompt(model, dictionary, PROMPT, config=config).graph
    token_T = jnp.asarray(padded.token_T)
    assert bucket(len(token_T)) > len(token_T)
    recording = record_prompt(model.params, token_T, model.cfg)
    bare = attribute_recording(
        Prompt(
            model.params,
            recording,
            active_features(dictionary, model.params, recording, model.cfg),
            salient_targets(model.params, recording.out_TD[-1]),
            cfg=model.cfg,
            config=config,
        ),
        padded.meta,
    )
    for field in dataclasses.fields(bare):
        ours, theirs = getattr(padded, field.name), getattr(bare, field.name)
        if isinstance(ours, np.ndarray):
            scale = np.abs(theirs.astype(float)).max(initial=1.0)
            np.testing.assert_allclose(
                ours, theirs, rtol=0, atol=2e-6 * scale, err_msg=field.name
            )


def test_rows_of_padding_are_not_read(model: Model, dictionary: Dictionary):
    token_T = jnp.arange(3, 11, dtype=jnp.int32)
    recording = record_prompt(model.params, token_T, model.cfg)
    every = active_features(dictionary, model.params, recording, model.cfg)
    few = active_features(dictionary, model.params, recording, model.cfg, 3)
    keep_A = every.pos_A < 3
    assert keep_A.any()
    for name in ("layer_A", "pos_A", "feature_A", "value_A"):
        found, want = getattr(few, name), getattr(every, name)[keep_A]
        np.testing.assert_array_equal(found, want)
    for layer, rows_UMD in enumerate(few.decoder):
        here = (every.layer_A == layer) & keep_A
        assert len(rows_UMD) == len(np.unique(every.feature_A[here]))
    assert sum(map(len, few.decoder)) < sum(map(len, every.decoder))


@pytest.mark.parametrize("direction", ["pull", "push"])
def test_prompts_of_one_bucket_compile_once(
    model: Model, dictionary: Dictionary, direction: str
):
    config = AttributeConfig(direction=direction)  # pyright: ignore[reportArgumentType]
    edges = {"pull": rows._pull_chunk, "push": columns._push_chunk}[direction]
    programs = (record_prompt, edges, bank._write_out, influence._substitute)
    trace_prompt(model, dictionary, "w7 w31 w7 w55", config=config)
    before = [program._cache_size() for program in programs]
    assert all(before)
    trace_prompt(model, dictionary, "w12 w90 w3 w44 w7", config=config)
    assert [program._cache_size() for program in programs] == before


def test_buckets_are_close_and_monotone():
    sizes = [bucket(n) for n in range(1, 3000)]
    assert all(n <= size < max(2 * n, 9) for n, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 20
