"""Dense families against transformers: kept logits, and every tap of new models.

The goldens are made by tests/goldens/make_dense.py and say the versions they are from;
what needs torch carries the marker `parity`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclt.clt.active import active_features
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.errors import InputError
from jaxclt.graph.certificate import certificate
from jaxclt.graph.targets import salient_targets
from jaxclt.io.config_hf import describe_hf
from jaxclt.io.weights_hf import load_hf
from jaxclt.lm.block import Past
from jaxclt.lm.run import embed, native_mlp, readout, record, run, unembed
from jaxclt.replacement.errors import error_nodes
from jaxclt.testing import Tiny
from jaxclt.testing.random_clt import random_clt

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = sorted(path.name for path in (GOLDENS / "dense").iterdir())


def our_taps(folder: Path, token_T) -> dict[str, np.ndarray]:
    """Op by op: the programs of tiny models compile longer than they run, and single
    operations are shared by all families.
    """
    params, cfg = load_hf(folder)
    with jax.disable_jit():
        recording = record(params, jnp.asarray(token_T, jnp.int32), cfg=cfg)
        logits_TV = unembed(params, recording.out_TD)
    return {
        "embed_TD": recording.embed_TD,
        "resid_LTD": recording.resid_LTD,
        "mid_LTD": recording.mid_LTD,
        "write_LTD": recording.write_LTD,
        "pattern_LHTS": recording.frozen.pattern_LHTS,
        "out_TD": recording.out_TD,
        "logits_TV": logits_TV,
    }


def few(*fast: str) -> list[Any]:
    """All names, but for these under `slow`."""
    slow = pytest.mark.slow
    return [name if name in fast else pytest.param(name, marks=slow) for name in NAMES]


# What a golden is there for: switched off, its logits must be others.
SWITCHES = {
    "smollm3": ["turning_L"],
    "hunyuan": ["norm_turned"],
    "olmo3": ["q_norm_LHC", "rope_local_theta", "rope_scaling"],
    "ministral3": ["rope_scaling"],
    "granite": ["query_scale", "embed_scale"],
    "cohere2": ["turning_L", "local_L", "norm_attn_bias_LD"],
    "gptj": ["unembed_bias_V", "d_rotary", "parallel"],
    "gpt_neo": ["query_scale", "window", "position_TD"],
    "nanochat": ["logit_cap"],
    "phi3": ["rope_scaling", "query_scale"],
}


@pytest.mark.parametrize("name", SWITCHES)
def test_the_goldens_see_every_switch(name: str) -> None:
    params, cfg = load_hf(GOLDENS / "dense" / name)
    with np.load(GOLDENS / "dense" / name / "logits.npz", allow_pickle=False) as kept:
        token_T, want_TV = jnp.asarray(kept["token_T"]), kept["logits_TV"]
    for switch in SWITCHES[name]:
        less, less_cfg = params, cfg
        if hasattr(cfg, switch):
            off = False if isinstance(getattr(cfg, switch), bool) else None
            assert getattr(cfg, switch) != off
            less_cfg = dataclasses.replace(cfg, **{switch: off})
        else:
            part = params if hasattr(params, switch) else params.blocks
            assert getattr(part, switch) is not None
            less = dataclasses.replace(part, **{switch: None})
            if part is params.blocks:
                less = dataclasses.replace(params, blocks=less)
        with jax.disable_jit():
            got_TV = unembed(less, record(less, token_T, cfg=less_cfg).out_TD)
        assert np.abs(got_TV - want_TV).max() > 1e-2, switch


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("falcon", {"new_decoder_architecture": True}, "new_decoder_architecture True"),
        ("falcon", {"alibi": True}, "alibi True is not supported"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm True is not supported"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm True is not supported"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported; supported: False"),
        ("apertus", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window True"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must list 2 layers"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "from 1"),
        ("cohere2", {"sliding_window": None}, "there is no sliding_window in use"),
        ("gpt_neo", {"attention_layers": None}, "is not listed"),
        ("granite", {"logits_scaling": 0}, "logits_scaling must be a positive number"),
        ("gptj", {"rotary_dim": 6}, "d_rotary=6 must lie in 0..4"),
        ("hunyuan", {"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic' are not"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_its_field(
    name: str, change: dict[str, Any], message: str
) -> None:
    hf = json.loads((GOLDENS / "dense" / name / "config.json").read_text())
    with pytest.raises(InputError, match=re.escape(message)):
        describe_hf(hf | change)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (
            "olmo3",
            {
                "rope_parameters": None,
                "rope_theta": 10_000.0,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                    "beta_fast": 2.0,
                },
            },
        ),
        (
            "phi3",
            {
                "rope_parameters": None,
                "rope_theta": 500.0,
                "rope_scaling": {
                    "type": "su",
                    "short_factor": [1.5, 2.0],
                    "long_factor": [3.0, 4.0],
                },
            },
        ),
        (
            "hunyuan",
            {
                "rope_parameters": None,
                "rope_theta": 100.0,
                "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 3.0},
            },
        ),
        ("glm4", {"rope_parameters": None, "partial_rotary_factor": 0.5}),
        ("cohere2", {"layer_types": None, "sliding_window_pattern": 2}),
        ("exaone4", {"layer_types": None, "sliding_window_pattern": 2}),
        ("exaone4_all", {"layer_types": None, "sliding_window_pattern": None}),
        ("smollm3", {"no_rope_layers": None}),
    ],
)
def test_configs_of_older_releases_say_the_same(
    name: str, change: dict[str, Any]
) -> None:
    hf = json.loads((GOLDENS / "dense" / name / "config.json").read_text())
    assert describe_hf(hf | change) == describe_hf(hf)


@pytest.mark.parametrize("name", ["gemma3_wrapped", "gemma3_wrapped_untied"])
def test_files_say_whether_a_wrapped_model_is_tied(name: str, tmp_path: Path) -> None:
    """Where its config does not."""
    shutil.copytree(GOLDENS / "dense" / name, tmp_path, dirs_exist_ok=True)
    hf = json.loads((tmp_path / "config.json").read_text())
    del hf["tie_word_embeddings"], hf["text_config"]["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert (load_hf(tmp_path)[0].unembed_DV is None) == (name == "gemma3_wrapped")


@pytest.mark.parametrize("name", ["ministral3", "ministral3_wrapped", "phi3"])
def test_prompts_end_where_attention_changes(name: str) -> None:
    """Later positions have warmer attention, or other frequencies."""
    hf = json.loads((GOLDENS / "dense" / name / "config.json").read_text())
    assert hf.get("text_config", hf)["max_position_embeddings"] == 64
    assert describe_hf(hf)[0].n_ctx == 16


@pytest.mark.parametrize("name", few("smollm3"))
def test_token_by_token_with_a_cache_equals_the_whole_pass(name: str) -> None:
    params, cfg = load_hf(GOLDENS / "dense" / name)
    with np.load(GOLDENS / "dense" / name / "logits.npz", allow_pickle=False) as kept:
        token_T, want_TV = jnp.asarray(kept["token_T"]), kept["logits_TV"]
    empty = jnp.zeros((cfg.n_layers, len(token_T), cfg.n_kv_heads, cfg.d_head))
    past, found = Past(empty, empty), []
    with jax.disable_jit():
        for i in range(len(token_T)):
            start = jnp.asarray(i, jnp.int32)
            done = run(
                params,
                embed(params, token_T[i : i + 1], start=start),
                native_mlp(cfg),
                cfg=cfg,
                past=past,
                start=start,
            )
            past = done.taps.past
            found.append(unembed(params, done.out_TD))
    close(np.concatenate(found), want_TV, name)


# What no family had before: no norms before, a norm over all heads, gains of turned
# channels.
NEW = ("olmo3", "hunyuan")


@pytest.mark.parametrize("name", few(*NEW))
def test_the_certificate_of_a_graph_is_small(name: str) -> None:
    """Maths 6.3 in float32, of a random dictionary over two layers."""
    params, cfg = load_hf(GOLDENS / "dense" / name)
    with np.load(GOLDENS / "dense" / name / "logits.npz", allow_pickle=False) as kept:
        token_T = jnp.asarray(kept["token_T"])
    clt_cfg = CLTConfig(n_layers=2, d_model=16, n_features=20, span=2, read="mlp_in")
    with jax.disable_jit():
        clt = random_clt(jax.random.key(0), clt_cfg)
        recording = record(params, token_T, cfg=cfg)
    t = Tiny(
        cfg=cfg,
        params=params,
        clt_cfg=clt_cfg,
        clt=clt,
        token_T=token_T,
        recording=recording,
        targets=salient_targets(params, recording.out_TD[-1]),
    )
    graph = t.graph()
    assert graph.n_features > 5
    assert certificate(graph).max_relative_row_error < 1e-4
    logit_V = np.asarray(readout(params, recording.out_TD[-1]))
    want_K = (logit_V - logit_V.mean())[graph.target_token_K]
    close(graph.readout_R[graph.target_rows], want_K, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_neurons_leave_no_error(name: str) -> None:
    """Every activation, with its gate, is exact."""
    params, cfg = load_hf(GOLDENS / "dense" / name)
    with np.load(GOLDENS / "dense" / name / "logits.npz", allow_pickle=False) as kept:
        token_T = jnp.asarray(kept["token_T"])
    recording = jax.jit(record, static_argnames="cfg")(params, token_T, cfg=cfg)
    every = active_features(NeuronDictionary(), params, recording, cfg)
    size = np.abs(np.asarray(recording.write_LTD)).max()
    assert np.abs(error_nodes(every, recording)).max() < 1e-5 * size


def close(got, want, name: str) -> None:
    """To float32 rounding, which is relative to a tensor's largest entry."""
    size = max(np.abs(want).max(), 1.0)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * size, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_golden_of_transformers(name: str) -> None:
    folder = GOLDENS / "dense" / name
    with np.load(folder / "logits.npz", allow_pickle=False) as theirs:
        assert str(theirs["made_by"]).startswith("transformers 5.")
        token_T, logits_TV = theirs["token_T"], theirs["logits_TV"]
    close(our_taps(folder, token_T)["logits_TV"], logits_TV, name)


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_every_tap_equals_transformers_live(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(sys, "path", [str(GOLDENS), *sys.path])
    import dense_models  # pyright: ignore[reportMissingImports]

    model = dense_models.build(name)
    model.save_pretrained(tmp_path, safe_serialization=True)
    token_T = dense_models.tokens(name)
    theirs = dense_models.dense_taps(name, model, token_T)
    for tap, got in our_taps(tmp_path, token_T.numpy()).items():
        close(got, theirs[tap], tap)
    assert set(NAMES) == set(dense_models.DENSE)
    del torch
    kept = json.loads((GOLDENS / "dense" / name / "config.json").read_text())
    assert kept["model_type"] == dense_models.DENSE[name].kind
