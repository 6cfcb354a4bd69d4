"""Tiny models and tokenizers on disk, shared by the tests of this folder."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.io.rows import LLAMA
from jaxclt.lm.config import LMConfig
from jaxclt.types import Block, LMParams

CFG = LMConfig(
    n_layers=2,
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    d_head=16,
    d_mlp=64,
    d_vocab=10,
    n_ctx=64,
    norm_eps=1e-5,
    rope_theta=500.0,
)
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "the", "cat", "sat", "on", "a", "mat"]


def random_params(cfg=CFG, *, tied=True, bias=False, seed=0):
    size = {
        "L": cfg.n_layers,
        "D": cfg.d_model,
        "H": cfg.n_heads,
        "G": cfg.n_kv_heads,
        "C": cfg.d_head,
        "I": cfg.d_mlp,
        "V": cfg.d_vocab,
    }
    skipped = {"untied"} if tied else set()
    skipped |= set() if bias else {"attention_bias", "mlp_bias"}
    # One draw for all leaves: each shape of jax.random.normal compiles on its own.
    pool = np.asarray(jax.random.normal(jax.random.key(seed), (100_000,)))
    block, rest, at = {}, {}, 0
    for row in LLAMA:
        if row.option in skipped:
            continue
        shape = [size[x] for x in row.leaf.rpartition("_")[2]]
        n = int(np.prod(shape))
        leaf = jnp.asarray(pool[at : at + n].reshape(shape))
        (block if row.per_layer else rest)[row.leaf] = leaf
        at += n
    return LMParams(blocks=Block(**block), **rest)


def assert_same(a, b, atol=0.0):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=atol, rtol=0)


CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system role') }}{% elif m.role in ['user', 'model'] %}"
    " <eos> {{ m.content | trim }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <eos> mat{% endif %}"
)


def write_word_tokenizer(folder, *, bos="<bos>", adds_bos=True, late=(), config=()):
    """A word-level tokenizer.json and its special tokens, as fast tokenizers save it.

    A decoder of its own keeps the space that a word begins with. `late` tokens are
    added behind the words; `config` goes into tokenizer_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    special = [w for w in WORDS if w.startswith("<")]
    numbered = [*enumerate(WORDS), *enumerate(late, len(WORDS))]
    content = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": w,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i, w in numbered
            if w in special or w in late
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {w: i for i, w in enumerate(WORDS)},
            "unk_token": "<unk>",
        },
    }
    if adds_bos and bos is not None:
        token = {"SpecialToken": {"id": bos, "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [token, text],
            "pair": [token, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                bos: {"id": bos, "ids": [WORDS.index(bos)], "tokens": [bos]}
            },
        }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = dict(config) | {"eos_token": {"content": "<eos>"}, "unk_token": "<unk>"}
    config |= {"pad_token": "<pad>"} if bos is None else {"bos_token": bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
