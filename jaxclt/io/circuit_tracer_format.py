"""circuit-tracer's directory format as tables: files, tensors, hooks.

config.yaml                  model_kind, hooks, optional transcoders, activation, k
W_enc_{i}.safetensors        CLT: W_enc_i [F, D], b_enc_i, b_dec_i, [threshold_i],
                             [W_skip_i [in, out]]
W_dec_{i}.safetensors        CLT: W_dec_i [F, min(span, L - i), D]
layer_{i}.safetensors        PLT: W_enc, W_dec [F, D], b_enc, b_dec, [W_skip [out, in]],
                             [activation_function.threshold]

With `transcoders`, a list of one file for each layer, the files may also be those that
GemmaScope (params.npz, PLT) and Gemma Scope 2 (safetensors, PLT and CLT) publish.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from jaxclt.clt.config import ReadSite
from jaxclt.io.formats.pieces import WriteSite

__all__ = [
    "CLT",
    "HOOKS_OF_READ",
    "LAYOUTS",
    "OWN_FILE",
    "PLT",
    "READ_OF_HOOK",
    "WRITE_OF_HOOK",
    "Layout",
]

READ_OF_HOOK: dict[str, ReadSite] = {
    "hook_resid_mid": "resid_mid",
    "ln2.hook_normalized": "normalized",
    "mlp.hook_in": "mlp_in",
}
# They differ where a model has a norm behind its MLPs: only the first is behind it.
WRITE_OF_HOOK: dict[str, WriteSite] = {"hook_mlp_out": "stream", "mlp.hook_out": "mlp"}
# What is written for each read site: the pairs that circuit-tracer's backends know.
HOOKS_OF_READ: dict[ReadSite, tuple[str, WriteSite]] = {
    "resid_mid": ("hook_resid_mid", "stream"),
    "normalized": ("ln2.hook_normalized", "stream"),
    "mlp_in": ("mlp.hook_in", "mlp"),
}


class Layout(NamedTuple):
    """File and tensor names of one kind of directory; ``{}`` is the layer."""

    format: str  # its name in `jaxclt.io.formats.table`
    model_kind: str
    encoder_file: str
    decoder_file: str
    W_enc: str
    b_enc: str
    b_dec: str
    theta: str
    W_dec: str
    W_skip: str | None
    enc_axes: Literal["FD", "DF"] = "FD"
    # layers a stored decoder has: its own, those from its own on, or all from 0 on
    writes: Literal["own", "later", "all"] = "own"
    skip_axes: Literal["io", "oi"] = "oi"  # [in, out] as ours, or [out, in]

    @property
    def suffix(self) -> str:
        """Of its files of weights."""
        return self.encoder_file[self.encoder_file.rindex(".") :]


CLT, PLT = "cross_layer_transcoder", "transcoder_set"
_SCOPE = ("b_enc", "b_dec", "threshold")
# fmt: off
LAYOUTS = (
    Layout(
        "circuit-tracer", CLT, "W_enc_{}.safetensors", "W_dec_{}.safetensors",
        "W_enc_{}", "b_enc_{}", "b_dec_{}", "threshold_{}", "W_dec_{}", "W_skip_{}",
        writes="later", skip_axes="io",
    ),
    Layout(
        "circuit-tracer", PLT, "layer_{}.safetensors", "layer_{}.safetensors",
        "W_enc", "b_enc", "b_dec", "activation_function.threshold", "W_dec", "W_skip",
    ),
    Layout(
        "gemma-scope", PLT, "layer_{}/params.npz", "layer_{}/params.npz",
        "W_enc", *_SCOPE, "W_dec", None, enc_axes="DF",
    ),
    Layout(
        "gemma-scope-2", PLT, "layer_{}/params.safetensors",
        "layer_{}/params.safetensors",
        "w_enc", *_SCOPE, "w_dec", "affine_skip_connection",
        enc_axes="DF", skip_axes="io",
    ),
    Layout(
        "gemma-scope-2", CLT, "params_layer_{}.safetensors",
        "params_layer_{}.safetensors",
        "w_enc", *_SCOPE, "w_dec", "affine_skip_connection",
        enc_axes="DF", skip_axes="io", writes="all",
    ),
)
# fmt: on
OWN_FILE = re.compile(r"config\.yaml|(W_enc|W_dec|layer)_\d+\.safetensors")
