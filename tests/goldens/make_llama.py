"""Tiny random llama models with every tap, computed by transformers on torch.

Run with an environment that has torch and transformers; writes llama_<variant>/ beside
this file: config.json, model.safetensors and taps.npz (float32, no pickles).

    python tests/goldens/make_llama.py

taps.npz: token_T, embed_TD, resid_LTD (entering each layer), mid_LTD (after attention),
write_LTD (MLP outputs), pattern_LHTS, out_TD (after the final norm), logits_TV.
"""

import json
from pathlib import Path

import numpy as np
import torch
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


def build(variant: str, seed: int) -> LlamaForCausalLM:
    """A model whose patterns are far from uniform and whose gains are not one."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**COMMON, **VARIANTS[variant])).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.8)
            else:
                p.normal_(0.0, 0.3)
    return model


@torch.no_grad()
def taps(model: LlamaForCausalLM, token_T: torch.Tensor) -> dict[str, np.ndarray]:
    mid, write = [], []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: mid.append(args[0][0])
        )
        layer.mlp.register_forward_hook(lambda _, args, out: write.append(out[0]))
    resid = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(
            lambda _, args: resid.append(args[0][0])
        )
    final = []
    model.model.norm.register_forward_hook(lambda _, args, out: final.append(out[0]))
    out = model(token_T[None], output_attentions=True, use_cache=False)
    found = {
        "embed_TD": model.model.embed_tokens(token_T),
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
        folder = HERE / f"llama_{variant}"
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
