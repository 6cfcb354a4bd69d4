import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from io_models import CFG, assert_same, random_params
from safetensors.numpy import load_file, save_file

from jaxclt.errors import InputError
from jaxclt.io.config_hf import describe_hf
from jaxclt.io.names import find_part, from_leaf, to_leaf
from jaxclt.io.rows import LLAMA
from jaxclt.io.weights_hf import config_to_hf, load_hf, save_hf

GOLDENS = Path(__file__).parents[1] / "goldens"


def config_from_hf(hf):
    return describe_hf(hf)[0]


@pytest.fixture
def saved(tmp_path):
    save_hf(random_params(), CFG, tmp_path)
    return tmp_path


def edit(folder, change):
    """Rewrite the tensors of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder):
    """Split a saved model into two shards and an index, as transformers does."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    where = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip(tmp_path, tied, bias):
    params = random_params(tied=tied, bias=bias)
    save_hf(params, CFG, tmp_path)
    loaded, cfg = load_hf(tmp_path)
    assert cfg == CFG
    assert_same(loaded, params)
    assert (loaded.unembed_DV is None) == tied
    assert (loaded.blocks.q_bias_LHC is None) != bias


def test_sharded_is_the_same(saved):
    shard(saved)
    assert_same(load_hf(saved)[0], random_params())


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_upcast(saved, kind):
    edit(saved, lambda ts: ts.update({n: t.astype(kind) for n, t in ts.items()}))
    loaded, _ = load_hf(saved)
    rounded = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x).astype(kind).astype(np.float32)),
        random_params(),
    )
    assert_same(loaded, rounded)


def test_orientation_against_the_definition(saved):
    """y = W x on HF's matrices is x @ W on ours, heads apart."""
    raw = load_file(saved / "model.safetensors")
    blocks = load_hf(saved)[0].blocks
    x_D = np.linspace(-1, 1, CFG.d_model).astype(np.float32)
    q = raw["model.layers.1.self_attn.q_proj.weight"] @ x_D
    q_HC = np.einsum("D,DHC->HC", x_D, blocks.q_LDHC[1])
    np.testing.assert_allclose(q.reshape(CFG.n_heads, CFG.d_head), q_HC, rtol=1e-4)
    o = raw["model.layers.0.self_attn.o_proj.weight"] @ q
    o_D = np.einsum("HC,HCD->D", q_HC, blocks.o_LHCD[0])
    np.testing.assert_allclose(o, o_D, rtol=1e-3, atol=1e-3)
    gate = raw["model.layers.0.mlp.gate_proj.weight"] @ x_D
    np.testing.assert_allclose(gate, x_D @ blocks.gate_LDI[0], rtol=1e-4, atol=1e-5)
    down = raw["model.layers.0.mlp.down_proj.weight"] @ gate
    np.testing.assert_allclose(down, gate @ blocks.down_LID[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("row", LLAMA, ids=lambda row: row.leaf)
def test_rows_invert(row):
    params = random_params(tied=False, bias=True)
    leaf = np.asarray(getattr(params.blocks if row.per_layer else params, row.leaf))
    leaf = leaf[0] if row.per_layer else leaf
    there, part = from_leaf(leaf, row, CFG), find_part(row, CFG, "hf", {})
    np.testing.assert_array_equal(to_leaf(there[part.stored], row, "hf", part), leaf)


@pytest.mark.parametrize("variant", ["gqa_tied", "mha_bias", "wide_head"])
def test_reads_what_transformers_wrote(variant, tmp_path):
    params, cfg = load_hf(GOLDENS / f"llama_{variant}")
    with np.load(GOLDENS / f"llama_{variant}" / "taps.npz") as taps:
        np.testing.assert_array_equal(
            params.embed_VD[taps["token_T"]], taps["embed_TD"]
        )
        unembed = params.embed_VD.T if params.unembed_DV is None else params.unembed_DV
        np.testing.assert_allclose(
            taps["out_TD"] @ unembed, taps["logits_TV"], atol=1e-5
        )
        # what an MLP writes, from its input: orientation, biases, gains, activation
        act = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}[cfg.act]
        b, x = params.blocks, taps["mid_LTD"][0]
        x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + cfg.norm_eps)
        x = x * np.asarray(b.norm_mlp_LD[0])
        gate, up = x @ b.gate_LDI[0], x @ b.up_LDI[0]
        if b.gate_bias_LI is not None:
            gate, up = gate + b.gate_bias_LI[:1], up + b.up_bias_LI[:1]
        write = (act(gate) * up) @ b.down_LID[0]
        if b.down_bias_LD is not None:
            write = write + b.down_bias_LD[:1]
        np.testing.assert_allclose(write, taps["write_LTD"][0], atol=1e-5)
    save_hf(params, cfg, tmp_path)
    again, cfg_again = load_hf(tmp_path)
    assert cfg_again == cfg
    assert_same(again, params)


# -- config.json


def good():
    return config_to_hf(CFG, random_params())


def test_config_defaults_of_old_files():
    hf = good()
    for key in ("num_key_value_heads", "head_dim", "rope_parameters", "rope_theta"):
        del hf[key]
    cfg = config_from_hf(hf)
    assert (cfg.n_kv_heads, cfg.d_head, cfg.rope_theta) == (4, 8, 10_000.0)


def test_rope_of_both_generations():
    new = good()
    del new["rope_theta"]
    assert config_from_hf(new).rope_theta == 500.0
    old = good() | {"rope_scaling": None}
    del old["rope_parameters"]
    assert config_from_hf(old).rope_theta == 500.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported; supported: llam"),
        ({"model_type": "olmo4"}, 'is not supported; did you mean "olmo2?"?'),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; supported: silu"),
        ({"hidden_size": None}, "hidden_size must be a whole number, not None"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number, not '32'"),
        ({"num_attention_heads": 0}, "n_heads must be at least 1"),
        ({"num_key_value_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps must be a positive number"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic' are not suppo"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "short_factor must be a list"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor must be a positive"),
        ({"rope_parameters": {"full": {"rope_theta": 1}}}, "one per kind of layer"),
        ({"rope_parameters": 7}, "must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(InputError, match=message):
        config_from_hf(good() | change)


def family(name):
    return json.loads((GOLDENS / f"family_{name}" / "config.json").read_text())


def test_windows_of_old_files():
    """Without layer_types: which layers are local by each family's own rule."""
    from jaxclt.io.config_hf import describe_hf

    def local(name, **change):
        hf = family(name) | {"num_hidden_layers": 7} | change
        hf.pop("layer_types", None)
        cfg, layout = describe_hf(hf)
        return cfg.window, layout.local

    assert local("mistral") == (4, None)
    assert local("mistral", sliding_window=None) == (None, None)
    assert local("gemma2") == (4, (True, False) * 3 + (True,))
    assert local("gemma3") == (3, (True,) * 5 + (False, True))
    assert local("qwen2_window") == (3, (False,) + (True,) * 6)
    assert local("qwen2_window", use_sliding_window=False) == (None, None)


def test_rope_of_old_gemma_files():
    hf = family("gemma3")
    del hf["rope_parameters"]
    cfg = config_from_hf(hf)
    assert (cfg.rope_theta, cfg.rope_local_theta) == (1e6, 1e4)
    hf |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e5}
    cfg = config_from_hf(hf | {"rope_local_base_freq": 500})
    assert (cfg.rope_theta, cfg.rope_local_theta) == (1e5, 500.0)
    assert cfg.rope_scaling is not None
    assert cfg.rope_scaling.factor == 8


def test_caps_may_be_off():
    hf = family("gemma2") | {"attn_logit_softcapping": None}
    assert config_from_hf(hf).attn_cap is None
    del hf["attn_logit_softcapping"]  # the default of transformers
    assert config_from_hf(hf).attn_cap == 50.0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attentio"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 3}, "layer_types must list"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types must list 3"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types is not supp"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "no sliding_window in"),
        ("gemma3", {"layer_types": 3}, "layer_types must be a list"),
        ("gemma2", {"sliding_window": "4"}, "sliding_window must be a whole number"),
        ("gemma2", {"sliding_window": 0}, "window=0 must be above 0"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping must"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a pos"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
            "sliding_attention must be of type 'default'",
        ),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "llama3", "factor": 0.5}},
            "rope factor=0.5 is below 1",
        ),
        (
            "llama3",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 4.0,
                }
            },
            "low_freq_factor must be above 0 and below",
        ),
    ],
)
def test_config_errors_of_families(name, change, message):
    with pytest.raises(InputError, match=message):
        config_from_hf(family(name) | change)


@pytest.mark.parametrize(
    "name", ["family_llama3", "family_qwen3", "family_gemma2", "dense/olmo2"]
)
def test_what_the_llama_layout_cannot_say_is_not_saved(name, tmp_path):
    params, cfg = load_hf(GOLDENS / name)
    with pytest.raises(InputError, match="the llama layout cannot say"):
        save_hf(params, cfg, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[1]", "{", "\udcff"])
def test_config_that_is_no_json(saved, text):
    (saved / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"config.json"):
        load_hf(saved)


# -- damaged weights


def test_pickled_weights_are_refused(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no model.safetensors"):
        load_hf(saved)
    (saved / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(InputError, match=r"pytorch_model.bin.*convert .* safetensors"):
        load_hf(saved)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_anywhere(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("cut")
    save_hf(random_params(), CFG, folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="truncated") as error:
        load_hf(folder)
    assert "\n" not in str(error.value)
    shutil.rmtree(folder)


def test_missing_tensor(saved):
    edit(saved, lambda ts: ts.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight is missing"):
        load_hf(saved)


def test_unknown_tensor(saved):
    extra = {"model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)}
    edit(saved, lambda ts: ts.update(extra))
    with pytest.raises(InputError, match=r"q_norm.weight does not belong"):
        load_hf(saved)


def test_harmless_tensors_are_ignored(saved):
    tensors = load_file(saved / "model.safetensors")
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    edit(saved, lambda ts: ts.update(extra))
    assert_same(load_hf(saved)[0], random_params())


@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "head_dim"])
def test_config_that_asks_for_too_much(saved, key):
    config = json.loads((saved / "config.json").read_text())
    config[key] = 2**40
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"which the config asks for|the config has"):
        load_hf(saved)


def test_wrong_shape(saved):
    edit(saved, lambda ts: ts.update({"model.norm.weight": np.ones(31, np.float32)}))
    with pytest.raises(InputError, match=r"norm.weight has shape \(31,\) instead of"):
        load_hf(saved)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(saved, bad):
    def spoil(tensors):
        tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = bad

    edit(saved, spoil)
    with pytest.raises(InputError, match=r"layers.1.self_attn.k_proj.weight contains"):
        load_hf(saved)


def test_integers_are_no_weights(saved):
    edit(saved, lambda ts: ts.update({"model.norm.weight": np.ones(32, np.int8)}))
    with pytest.raises(InputError, match=r"model.norm.weight .*its type is I8"):
        load_hf(saved)


def test_damaged_shards(saved):
    where = shard(saved)
    index = saved / "model.safetensors.index.json"
    first = saved / sorted(where.values())[0]

    kept = first.read_bytes()
    first.unlink()
    with pytest.raises(InputError, match=r"shard .* is missing"):
        load_hf(saved)
    first.write_bytes(kept)

    index.write_text(json.dumps({"weight_map": where | {"extra": first.name}}))
    with pytest.raises(InputError, match="tensor extra is missing although"):
        load_hf(saved)
    index.write_text(json.dumps({"weight_map": where | {"x": "../x.safetensors"}}))
    with pytest.raises(InputError, match="outside its directory"):
        load_hf(saved)
    index.write_text("{}")
    with pytest.raises(InputError, match="no weight_map"):
        load_hf(saved)


def test_some_biases_only_cannot_be_saved(tmp_path):
    import dataclasses

    params = random_params(bias=True)
    blocks = dataclasses.replace(params.blocks, o_bias_LD=None)
    with pytest.raises(InputError, match=r"attention_bias: .* all of these biases"):
        save_hf(dataclasses.replace(params, blocks=blocks), CFG, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_old_files_of_gpt2_and_neox():
    """What they leave out, null, or call otherwise."""
    cfg = config_from_hf(
        {
            "model_type": "gpt2",
            "n_embd": 12,
            "n_head": 2,
            "n_layer": 3,
            "n_positions": 20,
            "n_inner": None,
            "vocab_size": 9,
        }
    )
    assert (cfg.d_mlp, cfg.n_ctx, cfg.act, cfg.d_rotary) == (48, 20, "gelu_tanh", 0)
    assert (cfg.norm_eps, cfg.parallel) == (1e-5, False)
    old = {
        "model_type": "gpt_neox",
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 40,
        "vocab_size": 9,
        "layer_norm_eps": 1e-6,
        "rotary_emb_base": 500,
        "rotary_pct": 0.5,
    }
    cfg = config_from_hf(old)
    assert (cfg.d_rotary, cfg.rope_theta, cfg.norm_eps) == (8, 500.0, 1e-6)
    assert (cfg.parallel, cfg.act) == (True, "gelu")
    cfg = config_from_hf(old | {"use_parallel_residual": False, "rotary_pct": 1.0})
    assert (cfg.d_rotary, cfg.parallel) == (16, False)


def test_gpt2_without_a_prefix_and_with_its_masks(tmp_path):
    """As the first files of GPT-2 on the hub are."""
    from safetensors.numpy import load_file, save_file

    want, cfg = load_hf(GOLDENS / "family_gpt2")
    stored = load_file(GOLDENS / "family_gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): w for name, w in stored.items()}
    bare |= {f"h.{i}.attn.bias": np.ones((1, 1, 4, 4), np.uint8) for i in range(3)}
    bare["lm_head.weight"] = bare["wte.weight"].copy()
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(family("gpt2")))
    got, got_cfg = load_hf(tmp_path)
    assert got_cfg == cfg
    assert_same(got, want)
    twice = bare | {"transformer.wte.weight": bare["wte.weight"].copy()}
    save_file(twice, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="there twice, under two names"):
        load_hf(tmp_path)
    with pytest.raises(InputError, match=r"llama layout cannot say .*without a gate"):
        save_hf(want, cfg, tmp_path)


def test_a_text_config_may_be_nearly_empty():
    """That of gemma-3-4b-it says only what differs from transformers' defaults."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    cfg = config_from_hf({"model_type": "gemma3", "text_config": text})
    assert (cfg.n_heads, cfg.n_kv_heads, cfg.d_head) == (8, 4, 256)
    assert (cfg.d_vocab, cfg.window, cfg.act) == (262_208, 1024, "gelu_tanh")
    assert (cfg.rope_theta, cfg.rope_local_theta) == (1e6, 1e4)
    with pytest.raises(InputError, match="text_config must be an object"):
        config_from_hf({"model_type": "gemma3"})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False is not"),
        ("gpt2", {"activation_function": "mish"}, "'mish' is not supported"),
        ("neox", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "must be even"),
        ("neox", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "is above 1"),
        (
            "qwen3_yarn",
            {"rope_parameters": {"rope_type": "yarn", "factor": 0.5}},
            "rope factor=0.5 is below 1",
        ),
        ("gpt2", {"model_type": "gpt_oss"}, "'gpt_oss' is not supported: its MLPs are"),
    ],
)
def test_config_errors_of_more_families(name, change, message):
    with pytest.raises(InputError, match=message):
        config_from_hf(family(name) | change)
