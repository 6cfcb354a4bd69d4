"""GGUF files of other architectures than llama, from models that transformers wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxclt.errors import InputError
from jaxclt.io import tokenizer_gguf
from jaxclt.io.names import tensor_name
from jaxclt.io.rows import (
    ARCEE,
    COHERE,
    GEMMA,
    GPT2,
    GPT_NEOX,
    LLAMA,
    NEMOTRON,
    OLMO2,
    QWEN,
    STARCODER2,
)
from jaxclt.io.tokenizer import load_tokenizer
from jaxclt.io.weights_gguf import load_gguf
from jaxclt.io.weights_hf import load_hf
from jaxclt.lm.config import LMConfig, RopeScaling
from jaxclt.lm.rotary import rotary_frequencies
from jaxclt.lm.run import forward

GOLDENS = Path(__file__).parents[1] / "goldens"
ROWS = {
    "qwen2": QWEN,
    "qwen3": QWEN,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gpt2": GPT2,
    "gptneox": GPT_NEOX,
}
DENSE = {
    "arcee": ARCEE,
    "smollm3": LLAMA,
    "granite": LLAMA,
    "starcoder2": STARCODER2,
    "nemotron": NEMOTRON,
    "olmo2": OLMO2,
    "command-r": COHERE,
    "cohere2": COHERE,
}
ROWS |= DENSE
FOLDERS = {x: f"dense/{x}" for x in DENSE}
FOLDERS |= {"gptneox": "family_neox", "command-r": "dense/cohere"}
LAYER_NORMS = ("gpt2", "gptneox", "starcoder2", "nemotron", "command-r", "cohere2")
NEIGHBOURS = ("arcee", "smollm3", "granite")  # put beside each other when converted
SCALES = {
    "granite": {
        "attention.scale": 0.4,
        "embedding_scale": 3.0,
        "residual_scale": 0.3,
        "logit_scale": 2.0,
    },
    "command-r": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
}
ONE_LESS = ("gemma2", "gemma3", "nemotron")  # than the gains, in Hugging Face's files


def folder(name: str) -> Path:
    return GOLDENS / FOLDERS.get(name, f"family_{name}")


def as_llama_cpp_has_it(
    architecture: str, name: str, w: np.ndarray, cfg: LMConfig
) -> np.ndarray:
    """GPT-2's projections turned, NeoX's queries, keys and values apart.

    Channels that it turns as neighbours lie beside each other.
    """
    if architecture in NEIGHBOURS and any(f"{x}_proj" in name for x in "qk"):
        pairs = w.reshape(-1, 2, cfg.d_head // 2, *w.shape[1:])
        return pairs.swapaxes(1, 2).reshape(w.shape)
    if architecture == "gpt2" and any(
        f".c_{x}.weight" in name for x in ("attn", "proj", "fc")
    ):
        return w.T
    if ".query_key_value." in name:
        heads = w.reshape(cfg.n_heads, 3, cfg.d_head, *w.shape[1:])
        return heads.swapaxes(0, 1).reshape(w.shape)
    return w


def convert(  # noqa: C901, PLR0912  a file has many parts
    name: str,
    path: Path,
    left_out: tuple[str, ...] = (),
    rope_factors: np.ndarray | None = None,
    scaling: Mapping[str, str | float] | None = None,
) -> Path:
    """As llama.cpp converts it: rows of heads as they are, Gemma's gains plus one."""
    _, cfg = load_hf(folder(name))
    architecture = name.partition("_")[0]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(cfg.n_layers)
    writer.add_context_length(cfg.n_ctx)
    writer.add_embedding_length(cfg.d_model)
    writer.add_feed_forward_length(cfg.d_mlp)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(cfg.n_kv_heads)
    writer.add_key_length(cfg.d_head)
    writer.add_value_length(cfg.d_head)
    writer.add_rope_freq_base(cfg.rope_theta)
    if name in LAYER_NORMS:
        writer.add_layer_norm_eps(cfg.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(cfg.norm_eps)
    if name in ("gptneox", "nemotron"):
        writer.add_rope_dimension_count(cfg.n_turning)
    if name == "gptneox":
        writer.add_parallel_residual(cfg.parallel)
    if "window" not in left_out and cfg.window is not None:
        writer.add_sliding_window(cfg.window)
    if scaling is None and cfg.rope_scaling is not None:
        scaling = {"type": "linear", "factor": cfg.rope_scaling.factor}
    for key, value in (scaling or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32}
        add.get(type(value), writer.add_float32)(
            f"{architecture}.rope.scaling.{key}", value
        )
    if name == "gemma2":
        writer.add_attn_logit_softcapping(2.0)
        writer.add_final_logit_softcapping(3.0)
    for key, value in SCALES.get(name, {}).items():
        writer.add_float32(f"{name}.{key}", value)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    stored = load_file(folder(name) / "model.safetensors")
    written = set()
    for row in ROWS[architecture]:
        for i in range(cfg.n_layers if row.per_layer else 1):
            theirs, ours = tensor_name(row, "hf", i), tensor_name(row, "gguf", i)
            found = [w for x, w in stored.items() if x.partition(".")[2] == theirs]
            w = stored.get(theirs, *found)
            if w is not None and ours not in written:
                w = w + np.float32(row.is_gain and name in ONE_LESS)
                w = as_llama_cpp_has_it(architecture, theirs, w, cfg)
                writer.add_tensor(ours, np.ascontiguousarray(w))
                written.add(ours)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ROWS)
def test_a_converted_model_is_the_same(name: str, tmp_path: Path):
    want, cfg = load_hf(folder(name))
    got, got_cfg = load_gguf(convert(name, tmp_path / "m.gguf"))
    # llama.cpp knows which layers are local, and how Gemma 3 turns them.
    local = {"gemma2": [True, False, True], "gemma3": [True] * 3}.get(name)
    local = [True, True] if name == "cohere2" else local
    turning = [True, True] if name in ("cohere2", "smollm3") else None
    found = got.blocks.turning_L
    assert (None if found is None else found.tolist()) == turning
    assert (None if local is None else got.blocks.local_L.tolist()) == local
    leaves = "act window attn_cap rope_theta rope_scaling d_head norm_eps d_rotary"
    for leaf in (*leaves.split(), "parallel"):
        assert getattr(got_cfg, leaf) == getattr(cfg, leaf), leaf
    assert got_cfg.rope_local_theta == (10_000.0 if name == "gemma3" else None)
    if name in DENSE:
        assert got_cfg.query_scale == pytest.approx(cfg.query_scale)
    wanted, found = (
        dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (want, got)
    )
    assert wanted.keys() == found.keys()
    for path, leaf in wanted.items():
        if leaf.dtype != bool:
            np.testing.assert_allclose(found[path], leaf, rtol=1e-6, err_msg=str(path))


def test_windows_of_olmo_3_are_refused(tmp_path: Path):
    """Which layers have them, its file does not say in words that are read here."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "olmo2")
    writer.add_sliding_window(4096)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"olmo2\.attention\.sliding_window is not"):
        load_gguf(path)


YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 16}


def test_yarn_is_that_of_transformers(tmp_path: Path):
    """The model whose taps transformers wrote, by the keys that llama.cpp has."""
    want, cfg = load_hf(folder("qwen3_yarn"))
    scaling = YARN | {"yarn_beta_fast": 2.0, "attn_factor": 1.0}
    params, got = load_gguf(convert("qwen3_yarn", tmp_path / "m.gguf", scaling=scaling))
    assert (got.rope_scaling, got.query_scale) == (cfg.rope_scaling, cfg.query_scale)
    assert got.rope_scaling is not None
    assert got.query_scale != got.d_head**-0.5
    with np.load(folder("qwen3_yarn") / "taps.npz", allow_pickle=False) as theirs:
        run = jax.jit(forward, static_argnames="cfg")
        logits_TV = run(params, theirs["token_T"].astype(np.int32), cfg=got)
        scale = np.abs(theirs["logits_TV"]).max()
        np.testing.assert_allclose(
            logits_TV, theirs["logits_TV"], rtol=0, atol=1e-5 * scale
        )
    np.testing.assert_array_equal(params.embed_VD, want.embed_VD)


def test_attention_is_as_warm_as_yarn_says(tmp_path: Path):
    """llama.cpp multiplies by attn_factor besides, and defaults as transformers."""
    plain, warm = (
        load_gguf(convert("qwen3", tmp_path / f"{x}.gguf", scaling=YARN | more))[1]
        for x, more in (("a", {}), ("b", {"attn_factor": 0.5}))
    )
    times = (0.1 * np.log(4.0) + 1) ** 2
    assert plain.query_scale == pytest.approx(plain.d_head**-0.5 * times)
    assert warm.query_scale == pytest.approx(plain.query_scale / 4)
    defaults = {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_ext_factor": -1.0}
    said = convert("qwen3", tmp_path / "c.gguf", scaling=YARN | defaults)
    assert load_gguf(said)[1] == plain


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"factor": 0.5}, "rope factor=0.5 is below 1"),
        ({"factor": 0.0}, "rope.scaling.factor must be one positive float"),
        ({"yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5, which is not supported"),
        ({"yarn_attn_factor": 2.0}, "yarn_attn_factor is 2.0, which is not"),
        ({"yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1, which is not"),
        ({"original_context_length": 0}, "must be one positive int"),
        ({"type": "longrope"}, "of type 'longrope' are not supported"),
    ],
)
def test_other_scalings_are_refused(tmp_path: Path, more: dict, match: str):
    with pytest.raises(InputError, match=match):
        load_gguf(convert("qwen3", tmp_path / "m.gguf", scaling=YARN | more))


def test_what_an_architecture_needs_is_asked_for(tmp_path: Path):
    with pytest.raises(InputError, match=r"gemma2.attention.sliding_window is missing"):
        load_gguf(convert("gemma2", tmp_path / "m.gguf", ("window",)))


def test_llama3_frequencies_written_out(tmp_path: Path):
    """llama.cpp writes a divisor for every pair of channels instead of the rule."""
    scaling = RopeScaling(kind="llama3", factor=4.0, n_ctx=40)
    plain_J = rotary_frequencies(12, 10_000.0)
    factor_J = plain_J / rotary_frequencies(12, 10_000.0, scaling)
    assert factor_J[0] == 1
    assert 1 < factor_J[1] < factor_J[-1] == pytest.approx(4)
    written = RopeScaling(kind="factors", factors=tuple(factor_J.tolist()))
    np.testing.assert_allclose(
        rotary_frequencies(12, 10_000.0, written),
        rotary_frequencies(12, 10_000.0, scaling),
    )
    factors = factor_J.astype(np.float32)
    path = convert("qwen3", tmp_path / "m.gguf", rope_factors=factors[:3])
    assert load_gguf(path)[1].rope_scaling == RopeScaling(
        kind="factors", factors=tuple(factors[:3].tolist())
    )
    with pytest.raises(InputError, match="6 rope factors for heads of d_head=6"):
        load_gguf(convert("qwen3", tmp_path / "n.gguf", rope_factors=factors))


# -- SentencePiece ---------------------------------------------------------------------

PIECES = ["a", "b", "▁", "ab", "▁a", "▁ab", "bb", "abb"]


def write_sentence_piece(path: Path, *, prefix: bool) -> Path:
    tokens = ["<unk>", "<bos>", "  ", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES))]
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 4] + [6] * 256 + [1] * len(PIECES))
    writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request) -> Path:
    if "parity" not in request.keywords:
        monkeypatch.setenv("JAXCLT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_built_tokenizer_is_kept(tmp_path: Path, own_cache: Path, monkeypatch):
    """By what it is built from; another file with the same pieces takes it as well."""
    file = write_sentence_piece(tmp_path / "m.gguf", prefix=False)
    want = load_tokenizer(file).encode("abb bé a")
    (kept,) = (own_cache / "tokenizers").iterdir()

    def build(*_: object) -> None:
        raise AssertionError("it is in the cache")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_gguf, "_sentence_piece", build)
        assert load_tokenizer(file).encode("abb bé a") == want
        with pytest.raises(InputError, match="it is in the cache"):  # another one
            load_tokenizer(write_sentence_piece(tmp_path / "n.gguf", prefix=True))
    kept.write_text("{")  # damaged: built and written again
    assert load_tokenizer(file).encode("abb bé a") == want
    assert len(kept.read_text()) > 1000


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, own_cache):
    own_cache.write_text("a file where the folder should be")
    file = write_sentence_piece(tmp_path / "m.gguf", prefix=False)
    assert load_tokenizer(file).encode("ab", "never")


@pytest.mark.parametrize("prefix", [False, True])
def test_pieces_merge_by_score(tmp_path: Path, prefix: bool):
    tok = load_tokenizer(write_sentence_piece(tmp_path / "m.gguf", prefix=prefix))
    assert tok.bos_id == 1
    assert tok.adds_bos

    def pieces(text: str) -> list[str]:
        return tok.backend.convert_ids_to_tokens(tok.encode(text, "never"))

    # "ab" is better than "bb", and what it leaves merges no further than it can.
    assert pieces("abb") == (["▁ab", "b"] if prefix else ["abb"])
    assert pieces("bb ab")[-1] == "▁ab"
    # Two spaces are found before anything is merged, what is no piece goes by bytes.
    assert "  " in pieces("a  b")
    assert pieces("bé")[-2:] == ["<0xC3>", "<0xA9>"]
    for text in ("abb a", "a  b", "naïve 日本", "a\n\tb"):
        assert tok.decode(tok.encode(text, "never")) == text


# -- the real thing --------------------------------------------------------------------


@pytest.mark.parity
def test_gemma_continues_as_its_makers_model_does():
    """Needs `jaxclt fetch gemma-3-270m --accept-terms` to have been run."""
    import jax.numpy as jnp

    from jaxclt.io.model import load_model

    model = load_model("gemma-3-270m")
    ids = model.tokenizer.encode("The capital of the state containing Dallas is")
    assert ids == [2, 818, 5279, 529, 506, 1883, 7906, 26057, 563]
    ids = model.tokenizer.encode("Fact: Michael Jordan plays the sport of")
    run = jax.jit(forward, static_argnames="cfg")
    logit_TV = run(model.params, jnp.asarray(ids, jnp.int32), cfg=model.cfg)
    prob_V = np.asarray(jax.nn.softmax(logit_TV[-1]))
    assert model.tokenizer.decode([int(prob_V.argmax())]) == " basketball"
    assert prob_V.max() == pytest.approx(0.611, abs=2e-3)


@pytest.mark.parity
def test_gemma_has_the_logits_of_transformers():
    """The weights of the file, given back in the layout of Hugging Face."""
    torch = pytest.importorskip("torch")
    import jax.numpy as jnp
    from transformers import AutoConfig, AutoModelForCausalLM

    from jaxclt.io.model import load_model
    from jaxclt.io.names import from_leaf

    ours = load_model("gemma-3-270m")
    cfg, local_L = ours.cfg, ours.params.blocks.local_L
    assert local_L is not None
    kinds = ["full_attention", "sliding_attention"]
    bases = [cfg.rope_theta, cfg.rope_local_theta]
    config = AutoConfig.for_model(
        "gemma3_text",
        vocab_size=cfg.d_vocab,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_mlp,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads,
        head_dim=cfg.d_head,
        sliding_window=cfg.window,
        rms_norm_eps=cfg.norm_eps,
        layer_types=[kinds[is_local] for is_local in local_L.tolist()],
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": base}
            for kind, base in zip(kinds, bases, strict=True)
        },
    )
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    weights = {}
    for row in GEMMA:
        leaf = getattr(ours.params.blocks if row.per_layer else ours.params, row.leaf)
        if leaf is None:
            continue
        whole = np.asarray(leaf)
        for i, one in enumerate(whole if row.per_layer else whole[None]):
            w = from_leaf(one, row, cfg) - np.float32(row.is_gain)
            weights[tensor_name(row, "hf", i)] = torch.tensor(np.ascontiguousarray(w))
    missing, unknown = theirs.load_state_dict(weights, strict=False)
    assert (missing, unknown) == (["lm_head.weight"], [])  # tied
    run = jax.jit(forward, static_argnames="cfg")
    ids = ours.tokenizer.encode("Fact: Michael Jordan plays the sport of")
    got_TV = run(ours.params, jnp.asarray(ids, jnp.int32), cfg=cfg)
    with torch.no_grad():
        want_TV = theirs.float().eval()(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(
        got_TV, want_TV, rtol=0, atol=1e-5 * np.abs(want_TV).max()
    )
