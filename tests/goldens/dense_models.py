"""Tiny random models of dense families, made by transformers, and every tap of a pass.

What make_dense.py writes and what the parity tests make anew: one table, a few sizes
that all share, so that little compiles.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from golden_models import randomise
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

T = 7
COMMON = dict(
    vocab_size=19,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A model, and where it keeps what is compared."""

    kind: str  # model_type
    options: dict[str, Any] = field(default_factory=dict)  # of its config
    wrapped: bool = False  # the options are its text_config's
    layers: str = "model.layers"
    write: str = "mlp"  # what a layer adds at the MLP's place, as one module's output
    out: str = "model.norm"
    parallel: bool = False
    write_times: float = 1.0  # what is added is times this
    out_times: float = 1.0  # what jaxclt folds into the last norm
    gain_offset: float = 0.0


_VISION = dict(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
VISIONS = {
    "gemma3": _VISION,
    "mistral3": _VISION | dict(model_type="pixtral", head_dim=4),
}
_TEXT = dict(layers="model.language_model.layers", out="model.language_model.norm")
_GEMMA = dict(write="post_feedforward_layernorm", gain_offset=1.0)
_GEMMA3 = dict(head_dim=4, sliding_window=3, layer_types=[SLIDING, FULL])
_ROPE = dict(rope_type="default", rope_theta=500.0)
_PARTIAL = dict(partial_rotary_factor=0.5)
_AFTER = dict(write="post_feedforward_layernorm")
_GLM = dict(head_dim=4, attention_bias=True, **_PARTIAL)
DENSE = {
    "gemma3_untied": Dense(
        kind="gemma3_text",
        options=_GEMMA3 | dict(tie_word_embeddings=False),
        **_GEMMA,
    ),
    "gemma3_wrapped": Dense(
        kind="gemma3", wrapped=True, options=_GEMMA3, **_GEMMA, **_TEXT
    ),
    "gemma3_wrapped_untied": Dense(
        kind="gemma3",
        wrapped=True,
        options=_GEMMA3 | dict(tie_word_embeddings=False),
        **_GEMMA,
        **_TEXT,
    ),
    "vaultgemma": Dense(
        kind="vaultgemma",
        options=dict(
            head_dim=4,
            query_pre_attn_scalar=9,
            sliding_window=3,
            layer_types=[SLIDING, FULL],
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
        gain_offset=1.0,
    ),
    "smollm3": Dense(
        kind="smollm3",
        options=dict(no_rope_layer_interval=2, tie_word_embeddings=True),
    ),
    "ministral3": Dense(
        kind="ministral3",
        options=dict(
            head_dim=6,
            sliding_window=None,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=10_000.0,
                factor=4.0,
                original_max_position_embeddings=16,
                beta_fast=2.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.1,
            ),
        ),
    ),
    "ministral3_wrapped": Dense(
        kind="mistral3",
        wrapped=True,
        options=dict(
            model_type="ministral3",
            head_dim=6,
            tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=500.0)
            | dict(llama_4_scaling_beta=0.1, original_max_position_embeddings=16),
        ),
        **_TEXT,
    ),
    "helium": Dense(
        kind="helium",
        options=dict(head_dim=4, attention_bias=True, rope_parameters=_ROPE),
    ),
    "seed_oss": Dense(
        kind="seed_oss",
        options=dict(head_dim=4, attention_bias=True, attention_out_bias=False),
    ),
    "arcee": Dense(kind="arcee", options=dict(mlp_bias=True)),
    "apertus": Dense(
        kind="apertus",
        options=dict(
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=500.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=40,
            )
        ),
    ),
    "hunyuan": Dense(
        kind="hunyuan_v1_dense",
        options=dict(
            head_dim=4,
            rope_parameters=dict(
                rope_type="dynamic", rope_theta=100.0, factor=1.0, alpha=3.0
            ),
        ),
    ),
    "stablelm": Dense(kind="stablelm", options=_PARTIAL | dict(use_qkv_bias=True)),
    "stablelm_parallel": Dense(
        kind="stablelm",
        options=_PARTIAL | dict(use_parallel_residual=True),
        parallel=True,
    ),
    "olmo": Dense(kind="olmo", options=dict(clip_qkv=None)),
    "olmo2": Dense(kind="olmo2", options=dict(rope_parameters=_ROPE), **_AFTER),
    "olmo3": Dense(
        kind="olmo3",
        options=dict(
            sliding_window=3,
            layer_types=[SLIDING, FULL],
            rope_parameters={
                FULL: dict(
                    rope_type="yarn",
                    rope_theta=10_000.0,
                    factor=4.0,
                    original_max_position_embeddings=16,
                    beta_fast=2.0,
                    beta_slow=1.0,
                ),
                SLIDING: dict(rope_type="default", rope_theta=10_000.0),
            },
        ),
        **_AFTER,
    ),
    "exaone4": Dense(
        kind="exaone4",
        options=dict(sliding_window=3, layer_types=[SLIDING, FULL]),
        **_AFTER,
    ),
    "exaone4_all": Dense(
        kind="exaone4",
        options=dict(sliding_window=None, layer_types=[FULL, FULL]),
        **_AFTER,
    ),
    "phi3": Dense(
        kind="phi3",
        options=dict(
            tie_word_embeddings=True,
            original_max_position_embeddings=16,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=500.0,
                partial_rotary_factor=1.0,
                short_factor=[1.5, 2.0],
                long_factor=[3.0, 4.0],
                original_max_position_embeddings=16,
            ),
        ),
    ),
    "phi3_partial": Dense(
        kind="phi3",
        options=dict(
            sliding_window=3,
            rope_parameters=_ROPE | dict(partial_rotary_factor=0.5),
        ),
    ),
    "glm": Dense(kind="glm", options=_GLM),
    "glm4": Dense(kind="glm4", options=_GLM, write="post_mlp_layernorm"),
    "granite": Dense(
        kind="granite",
        options=dict(
            embedding_multiplier=3.0,
            residual_multiplier=0.3,
            attention_multiplier=0.4,
            logits_scaling=2.0,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
        ),
        write_times=0.3,
        out_times=0.5,
    ),
    "cohere": Dense(
        kind="cohere",
        options=dict(logit_scale=0.25, attention_bias=True),
        out_times=0.25,
        parallel=True,
    ),
    "cohere2": Dense(
        kind="cohere2",
        options=dict(
            logit_scale=0.25,
            sliding_window=3,
            layer_types=[SLIDING, FULL],
            rope_parameters=_ROPE,
        ),
        out_times=0.25,
        parallel=True,
    ),
    "nemotron": Dense(
        kind="nemotron",
        options=dict(head_dim=4, rope_parameters=_ROPE | _PARTIAL),
        gain_offset=1.0,
    ),
    "nanochat": Dense(kind="nanochat", options=dict(final_logit_softcapping=3.0)),
    "phi": Dense(
        kind="phi",
        options=dict(rope_parameters=_ROPE | _PARTIAL),
        parallel=True,
        out="model.final_layernorm",
    ),
    "gptj": Dense(
        kind="gptj",
        options=dict(rotary_dim=2, n_inner=12, num_key_value_heads=None),
        layers="transformer.h",
        out="transformer.ln_f",
        parallel=True,
    ),
    "gpt_neo": Dense(
        kind="gpt_neo",
        options=dict(
            attention_types=[[["global", "local"], 1]],
            window_size=3,
            num_key_value_heads=None,
        ),
        layers="transformer.h",
        out="transformer.ln_f",
    ),
    "opt": Dense(
        kind="opt",
        options=dict(ffn_dim=12, word_embed_proj_dim=16, num_key_value_heads=None),
        layers="model.decoder.layers",
        write="fc2",
        out="model.decoder.final_layer_norm",
    ),
    "falcon": Dense(
        kind="falcon",
        options=dict(ffn_hidden_size=12, bias=True, num_key_value_heads=None),
        layers="transformer.h",
        out="transformer.ln_f",
        parallel=True,
    ),
    "starcoder2": Dense(kind="starcoder2", options=dict(sliding_window=3)),
}


def build(name: str) -> torch.nn.Module:
    """A random model: none of its weights is what it starts with."""
    torch.manual_seed(sorted(DENSE).index(name))
    it = DENSE[name]
    options = {**COMMON, **it.options}
    if it.wrapped:
        tied = options.get("tie_word_embeddings", True)
        config = AutoConfig.for_model(
            it.kind,
            text_config=options,
            vision_config=VISIONS[it.kind],
            tie_word_embeddings=tied,
        )
        model_class = AutoModelForImageTextToText
    else:
        config = AutoConfig.for_model(it.kind, **options)
        model_class = AutoModelForCausalLM
    model = model_class.from_config(config, attn_implementation="eager")
    return randomise(model, gain_offset=it.gain_offset)


def tokens(name: str) -> torch.Tensor:
    """A prompt of its own."""
    make = torch.Generator().manual_seed(len(name))
    return torch.randint(0, COMMON["vocab_size"], (T,), generator=make)


@torch.no_grad()
def dense_taps(
    name: str, model: torch.nn.Module, token_T: torch.Tensor
) -> dict[str, np.ndarray]:
    """Everything that a recording holds, of one prompt.

    Where the MLP reads follows from what the layer adds: no module of some families
    sees it.
    """
    it = DENSE[name]
    resid, after, write, final = [], [], [], []

    def before(_: object, args: tuple, kwargs: dict) -> None:
        resid.append((args[0] if args else kwargs["hidden_states"])[0])

    def leaving(_: object, args: tuple, out: object) -> None:
        after.append((out[0] if isinstance(out, tuple) else out)[0])

    handles = []
    for layer in model.get_submodule(it.layers):
        handles += [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(leaving),
            layer.get_submodule(it.write).register_forward_hook(
                lambda _, args, out: write.append(it.write_times * out.view(T, -1))
            ),
        ]
    norm = model.get_submodule(it.out)
    handles.append(
        norm.register_forward_hook(lambda _, args, out: final.append(out[0]))
    )
    out = model(token_T[None], output_attentions=True, use_cache=False)
    for handle in handles:
        handle.remove()
    resid_LTD, write_LTD = torch.stack(resid), torch.stack(write)
    found = {
        "embed_TD": resid[0],
        "resid_LTD": resid_LTD,
        "mid_LTD": resid_LTD if it.parallel else torch.stack(after) - write_LTD,
        "write_LTD": write_LTD,
        "pattern_LHTS": torch.stack([a[0] for a in out.attentions]),
        "out_TD": it.out_times * final[-1],
        "logits_TV": out.logits[0],
    }
    arrays = {name: x.numpy().astype(np.float32) for name, x in found.items()}
    return {"token_T": token_T.numpy().astype(np.int32), **arrays}
