"""The formats that can be written, one row each: what they can say, and how."""

from __future__ import annotations

from typing import Any

import yaml

from jaxclt.clt.config import CLTConfig
from jaxclt.files.json_text import to_json
from jaxclt.io.formats import saelens, sparsify
from jaxclt.io.formats.fields import HOOK_OF_READ, HOOK_OF_WRITE
from jaxclt.io.formats.layouts import LAYOUTS, OWN, SAELENS, SPARSIFY, Layout
from jaxclt.io.formats.write import About, Target

__all__ = ["TARGETS"]


def _yaml(
    target: Target, layout: Layout, cfg: CLTConfig, about: About
) -> dict[str, str]:
    config: dict[str, Any] = {
        "model_kind": layout.model_kind,
        "model_name": about.model_name,
        "feature_input_hook": HOOK_OF_READ[cfg.read],
        "feature_output_hook": HOOK_OF_WRITE[about.write],
        "activation": target.word(cfg) or None,
        "k": cfg.k if cfg.gate.competes else None,
        "scan": about.scan,
    }
    if next(x for x in (*LAYOUTS, OWN) if x.model_kind == layout.model_kind) != layout:
        files = [layout.encoder_file.format(i) for i in range(cfg.n_layers)]
        config["transcoders"] = files
    config = {k: v for k, v in config.items() if v is not None}
    return {"config.yaml": yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}


def _saelens(
    target: Target, layout: Layout, cfg: CLTConfig, about: About
) -> dict[str, str]:
    del target
    kinds = {(x.theta, x.skip): name for name, x in saelens.ARCHITECTURES.items()}
    texts = {}
    for i in range(cfg.n_layers):
        config = {
            "architecture": kinds[cfg.gate.switch == "theta", about.skip],
            "d_in": cfg.d_model,
            "d_sae": cfg.n_features,
            "d_out": cfg.d_model,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {
                "model_name": about.model_name,
                "hook_name": f"blocks.{i}.{HOOK_OF_READ[cfg.read]}",
                "hook_name_out": f"blocks.{i}.{HOOK_OF_WRITE[about.write]}",
            },
        }
        texts[_beside(layout, i, saelens.CONFIG)] = to_json(config, indent=2) + "\n"
    return texts


def _sparsify(
    target: Target, layout: Layout, cfg: CLTConfig, about: About
) -> dict[str, str]:
    config = {
        "activation": target.word(cfg),
        "num_latents": cfg.n_features,
        "k": cfg.k if cfg.gate.competes else cfg.n_features,
        "multi_topk": False,
        "normalize_decoder": False,
        "skip_connection": about.skip,
        "transcode": True,
        "d_in": cfg.d_model,
    }
    text = to_json(config, indent=2) + "\n"
    return {_beside(layout, i, sparsify.CONFIG): text for i in range(cfg.n_layers)}


def _beside(layout: Layout, layer: int, name: str) -> str:
    return f"{layout.encoder_file.format(layer).rpartition('/')[0]}/{name}"


_CT_CLT, _CT_PLT, _SCOPE, _SCOPE_2, _SCOPE_2_CLT = LAYOUTS
_UNNAMED = {"relu": "", "jumprelu": ""}  # thresholds tell which
TARGETS: dict[str, Target] = {
    "circuit-tracer": Target(
        _yaml,
        _UNNAMED | {"signed_topk": "topk", "topk": "topk"},
        plt=_CT_PLT,
        clt=_CT_CLT,
        short={
            "relu": (
                lambda cfg, about: cfg.gate.competes and not cfg.gate.signed,
                "its TopK has no ReLU: where fewer than k features are positive, "
                "negative ones would be active",
            ),
            "skip": (
                lambda cfg, about: about.skip and cfg.span > 1,
                "it has no place for the linear skip of a CLT (gemma-scope-2 has)",
            ),
            "span": (
                lambda cfg, about: 1 < cfg.span < cfg.n_layers,
                "circuit-tracer itself reads only 1 or all layers, not {span}; jaxclt "
                "reads it (gemma-scope-2 fills up with zeros)",
            ),
        },
    ),
    "gemma-scope": Target(
        _yaml,
        _UNNAMED,
        plt=_SCOPE,
        short={
            "skip": (
                lambda cfg, about: about.skip,
                "gemma-scope has no place for a linear skip",
            ),
        },
        float32=True,  # numpy's files have no bfloat16
    ),
    "gemma-scope-2": Target(_yaml, _UNNAMED, plt=_SCOPE_2, clt=_SCOPE_2_CLT),
    "saelens": Target(
        _saelens,
        _UNNAMED,
        plt=SAELENS,
        unsaid=("scan",),
        float32=True,
        clips=True,
    ),
    "sparsify": Target(
        _sparsify,
        # a TopK of all features is a ReLU
        {"relu": "topk"} | {v: k for k, v in sparsify.ACTIVATIONS.items()},
        plt=SPARSIFY,
        reads=("mlp_in",),
        short={
            "write": (
                lambda cfg, about: about.write == "stream",
                "its coders write ahead of a norm after the MLP; in a model that has "
                "none nothing is lost",
            ),
        },
        unsaid=("model_name", "scan"),
    ),
    # all that a transcoder here can be
    "jaxclt": Target(_yaml, None, plt=OWN, clt=OWN),
}
