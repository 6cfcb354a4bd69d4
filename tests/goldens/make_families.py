"""Tiny random models of every other family, computed by transformers on torch.

Run with an environment that has torch and transformers; writes family_<variant>/ beside
this file: config.json, model.safetensors and taps.npz (float32, no pickles).

    python tests/goldens/make_families.py

taps.npz as in make_llama.py, with write_LTD what the MLP adds to the stream: behind a
norm where the model has one there.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
}


def build(variant: str, seed: int) -> torch.nn.Module:
    """A model whose patterns are far from uniform and whose gains are not one."""
    torch.manual_seed(seed)
    kind, options = VARIANTS[variant]
    config = AutoConfig.for_model(kind, **{**COMMON, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    offset = 1.0 if kind.startswith("gemma") else 0.0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5 - offset, 1.8 - offset)
            else:
                p.normal_(0.0, 0.3)
    return model


@torch.no_grad()
def taps(model: torch.nn.Module, token_T: torch.Tensor) -> dict[str, np.ndarray]:
    resid, mid, write, final, entering = [], [], [], [], []

    def before(found: list) -> object:
        return lambda _, args: found.append(args[0][0])

    def after(found: list) -> object:
        return lambda _, args, out: found.append(out[0])

    handles = []
    for layer in model.model.layers:
        sandwich = hasattr(layer, "pre_feedforward_layernorm")
        ahead = (
            layer.pre_feedforward_layernorm
            if sandwich
            else layer.post_attention_layernorm
        )
        behind = layer.post_feedforward_layernorm if sandwich else layer.mlp
        handles += [
            layer.input_layernorm.register_forward_pre_hook(before(resid)),
            ahead.register_forward_pre_hook(before(mid)),
            behind.register_forward_hook(after(write)),
        ]
    handles += [
        model.model.embed_tokens.register_forward_hook(after(entering)),
        model.model.norm.register_forward_hook(after(final)),
    ]
    out = model(token_T[None], output_attentions=True, use_cache=False)
    for handle in handles:
        handle.remove()
    found = {
        "embed_TD": entering[0],
        "resid_LTD": torch.stack(resid),
        "mid_LTD": torch.stack(mid),
        "write_LTD": torch.stack(write),
        "pattern_LHTS": torch.stack([a[0] for a in out.attentions]),
        "out_TD": final[0],
        "logits_TV": out.logits[0],
    }
    arrays = {name: x.numpy().astype(np.float32) for name, x in found.items()}
    return {"token_T": token_T.numpy().astype(np.int32), **arrays}


def main() -> None:
    torch.set_num_threads(1)
    for seed, variant in enumerate(VARIANTS):
        folder = HERE / f"family_{variant}"
        model = build(variant, seed)
        token_T = torch.randint(0, COMMON["vocab_size"], (T,))
        found = taps(model, token_T)
        model.save_pretrained(folder, safe_serialization=True)
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez(folder / "taps.npz", allow_pickle=False, **found)
        sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
        top = found["pattern_LHTS"].max(-1).mean()
        print(variant, json.dumps(sizes), f"mean of the largest attention {top:.2f}")  # noqa: T201


if __name__ == "__main__":
    main()
