"""Tiny random models of every other family, computed by transformers on torch.

Run with an environment that has torch and transformers; writes family_<variant>/ beside
this file: config.json, model.safetensors and taps.npz (float32, no pickles).

    python tests/goldens/make_families.py [variant ...]
"""

import sys
from pathlib import Path

import torch
from golden_models import randomise, write_golden
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

HERE = Path(__file__).parent
T = 9
COMMON = dict(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=40,
)
VARIANTS = {
    "llama3": ("llama", dict(head_dim=12, rope_parameters=LLAMA3)),
    "llama_linear": (
        "llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=3.0)),
    ),
    "mistral": ("mistral", dict(sliding_window=4, head_dim=6)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2_window": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=3, max_window_layers=1),
    ),
    "qwen3": ("qwen3", dict(head_dim=6, tie_word_embeddings=True)),
    "gemma2": (
        "gemma2",
        # Caps that matter at the size of a random model's scores and logits.
        dict(
            head_dim=6,
            sliding_window=4,
            query_pre_attn_scalar=9,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3": (
        "gemma3_text",
        dict(
            head_dim=6,
            sliding_window=3,
            query_pre_attn_scalar=5,
            layer_types=[SLIDING, FULL, SLIDING],
            rope_parameters={
                FULL: dict(rope_type="linear", rope_theta=5e4, factor=2.0),
                SLIDING: dict(rope_type="default", rope_theta=100.0),
            },
        ),
    ),
    "gpt2": ("gpt2", dict(intermediate_size=None, num_key_value_heads=None)),
    "neox": (
        "gpt_neox",
        dict(
            num_attention_heads=2,
            rope_parameters=dict(
                rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5
            ),
        ),
    ),
    # Everything that the first leaves at its default.
    "neox_serial": (
        "gpt_neox",
        dict(
            num_attention_heads=2,
            use_parallel_residual=False,
            attention_bias=False,
            hidden_act="relu",
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="linear",
                rope_theta=500.0,
                factor=2.0,
                partial_rotary_factor=0.25,
            ),
        ),
    ),
    "qwen3_yarn": (
        "qwen3",
        dict(
            head_dim=16,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=10_000.0,
                factor=4.0,
                beta_fast=2.0,
                original_max_position_embeddings=16,
            ),
        ),
    ),
    # A model for images too, of which the text part is read.
    "gemma3_images": ("gemma3", dict(head_dim=6, sliding_window=3)),
}
VISION = dict(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)


def build(variant: str, seed: int) -> torch.nn.Module:
    """A random model of a family."""
    torch.manual_seed(seed)
    kind, options = VARIANTS[variant]
    if kind == "gemma3":
        options = {"text_config": {**COMMON, **options}, "vision_config": VISION}
        config = AutoConfig.for_model(kind, **options, mm_tokens_per_image=4)
        model_class = AutoModelForImageTextToText
    else:
        config = AutoConfig.for_model(kind, **{**COMMON, **options})
        model_class = AutoModelForCausalLM
    model = model_class.from_config(config, attn_implementation="eager")
    return randomise(model, gain_offset=1.0 if kind.startswith("gemma") else 0.0)


def main() -> None:
    torch.set_num_threads(1)
    for seed, variant in enumerate(VARIANTS):
        if sys.argv[1:] and variant not in sys.argv[1:]:
            continue
        model = build(variant, seed)
        token_T = torch.randint(0, COMMON["vocab_size"], (T,))
        write_golden(HERE / f"family_{variant}", model, token_T)


if __name__ == "__main__":
    main()
