"""What the scripts beside this file share: random models, and every tap of a pass.

taps.npz of a golden: token_T, embed_TD, resid_LTD (entering each layer), mid_LTD (where
the MLP's norm reads), write_LTD (what the MLP adds to the stream: behind a norm where
the model has one there), pattern_LHTS, out_TD (after the final norm), logits_TV.
"""

import json
from pathlib import Path

import numpy as np
import torch

# Where a model keeps its layers and what is read off: the norms ahead of attention and
# of the MLP (their inputs), and what ends in the stream (outputs).
LLAMA = {
    "inner": "model",
    "layers": "layers",
    "attn": "input_layernorm",
    "mlp": "post_attention_layernorm",
    "write": "mlp",
    "embed": "embed_tokens",
    "out": "norm",
}
GEMMA = LLAMA | {
    "mlp": "pre_feedforward_layernorm",
    "write": "post_feedforward_layernorm",
}
PLACES = {
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gemma3": GEMMA | {"inner": "model.language_model"},
    "gpt2": {
        "inner": "transformer",
        "layers": "h",
        "attn": "ln_1",
        "mlp": "ln_2",
        "write": "mlp",
        "embed": "drop",
        "out": "ln_f",
    },
    "gpt_neox": LLAMA
    | {"inner": "gpt_neox", "embed": "embed_in", "out": "final_layer_norm"},
}


@torch.no_grad()
def randomise(model: torch.nn.Module, *, gain_offset: float = 0.0) -> torch.nn.Module:
    """Patterns far from uniform, gains that are not one; stored less the offset."""
    model = model.float().eval()
    for name, p in model.named_parameters():
        if name.endswith("weight") and p.ndim == 1:
            p.uniform_(0.5 - gain_offset, 1.8 - gain_offset)
        else:
            p.normal_(0.0, 0.3)
    return model


@torch.no_grad()
def taps(model: torch.nn.Module, token_T: torch.Tensor) -> dict[str, np.ndarray]:
    """Everything that a recording holds, of one prompt."""
    resid, mid, write, final, entering = [], [], [], [], []

    def before(found: list) -> object:
        return lambda _, args: found.append(args[0][0])

    def after(found: list) -> object:
        return lambda _, args, out: found.append(out[0])

    place = PLACES.get(model.config.model_type, LLAMA)
    inner = model.get_submodule(place["inner"])
    handles = []
    for layer in inner.get_submodule(place["layers"]):
        handles += [
            layer.get_submodule(place["attn"]).register_forward_pre_hook(before(resid)),
            layer.get_submodule(place["mlp"]).register_forward_pre_hook(before(mid)),
            layer.get_submodule(place["write"]).register_forward_hook(after(write)),
        ]
    handles += [
        inner.get_submodule(place["embed"]).register_forward_hook(after(entering)),
        inner.get_submodule(place["out"]).register_forward_hook(after(final)),
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


def write_golden(folder: Path, model: torch.nn.Module, token_T: torch.Tensor) -> None:
    """config.json, model.safetensors and taps.npz (float32, no pickles)."""
    found = taps(model, token_T)
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez(folder / "taps.npz", allow_pickle=False, **found)
    sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    top = found["pattern_LHTS"].max(-1).mean()
    print(folder.name, json.dumps(sizes), f"mean of the largest attention {top:.2f}")  # noqa: T201
