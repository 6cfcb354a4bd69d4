"""Tiny random llama models with every tap, computed by transformers on torch.

Run with an environment that has torch and transformers; writes llama_<variant>/ beside
this file: config.json, model.safetensors and taps.npz (float32, no pickles).

    python tests/goldens/make_llama.py
"""

from pathlib import Path

import torch
from golden_models import randomise, write_golden
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
T = 7
COMMON = dict(
    vocab_size=61,
    num_hidden_layers=3,
    max_position_embeddings=32,
    attn_implementation="eager",
    bos_token_id=None,
    eos_token_id=None,
)
VARIANTS = {
    "gqa_tied": dict(
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
    ),
    "mha_bias": dict(
        hidden_size=16,
        intermediate_size=36,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        rope_theta=100_000.0,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    ),
    # heads wider than d_model / n_heads, the other activation, one kv head
    "wide_head": dict(
        hidden_size=21,
        intermediate_size=32,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=10,
        rms_norm_eps=1e-5,
        rope_theta=500.0,
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=False,
    ),
}


def main() -> None:
    torch.set_num_threads(1)
    for seed, variant in enumerate(VARIANTS):
        torch.manual_seed(seed)
        config = LlamaConfig(**COMMON, **VARIANTS[variant])
        model = randomise(LlamaForCausalLM(config))
        token_T = torch.randint(0, COMMON["vocab_size"], (T,))
        write_golden(HERE / f"llama_{variant}", model, token_T)


if __name__ == "__main__":
    main()
