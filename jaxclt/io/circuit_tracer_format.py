"""circuit-tracer's directory format as tables: files, tensors, hooks.

config.yaml                  model_kind, hooks, optional transcoders, activation, k
W_enc_{i}.safetensors        CLT: W_enc_i [F, D], b_enc_i, b_dec_i, [threshold_i]
W_dec_{i}.safetensors        CLT: W_dec_i [F, min(span, L - i), D]
layer_{i}.safetensors        PLT: W_enc, W_dec [F, D], b_enc, b_dec, [W_skip],
                             [activation_function.threshold]
"""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxclt.clt.config import ReadSite

__all__ = [
    "CLT",
    "HOOKS_OF_READ",
    "LAYOUTS",
    "OWN_FILE",
    "PICKLES",
    "PLT",
    "READ_OF_HOOK",
    "WRITE_HOOKS",
    "Layout",
]

READ_OF_HOOK: dict[str, ReadSite] = {
    "hook_resid_mid": "resid_mid",
    "ln2.hook_normalized": "normalized",
    "mlp.hook_in": "mlp_in",
}
WRITE_HOOKS = ("hook_mlp_out", "mlp.hook_out")
# What is written for each read site: the pairs that circuit-tracer's backends know.
HOOKS_OF_READ: dict[ReadSite, tuple[str, str]] = {
    "resid_mid": ("hook_resid_mid", "hook_mlp_out"),
    "normalized": ("ln2.hook_normalized", "hook_mlp_out"),
    "mlp_in": ("mlp.hook_in", "mlp.hook_out"),
}


class Layout(NamedTuple):
    """File and tensor names of one model kind; ``{}`` is the layer."""

    encoder_file: str
    decoder_file: str
    W_enc: str
    b_enc: str
    b_dec: str
    theta: str
    W_dec: str
    W_skip: str | None  # stored as [out, in], the transpose of ours


CLT, PLT = "cross_layer_transcoder", "transcoder_set"
LAYOUTS = {
    CLT: Layout(
        "W_enc_{}.safetensors", "W_dec_{}.safetensors",
        "W_enc_{}", "b_enc_{}", "b_dec_{}", "threshold_{}", "W_dec_{}", None,
    ),
    PLT: Layout(
        "layer_{}.safetensors", "layer_{}.safetensors",
        "W_enc", "b_enc", "b_dec", "activation_function.threshold", "W_dec", "W_skip",
    ),
}  # fmt: skip
OWN_FILE = re.compile(r"config\.yaml|(W_enc|W_dec|layer)_\d+\.safetensors")
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}
