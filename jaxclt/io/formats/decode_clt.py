"""decode-clt (crosslayer-coding): a config and the state of one module.

cfg.json                             num_features, activation_fn, decoder_tying, ...
clt_checkpoint_latest.safetensors    encoder_module.encoders.L.{weight [F, D],
                                     bias_param}, decoder_module.decoders.S->T.{weight
                                     [D, F], bias_param} (.S or .T where tied),
                                     [theta_manager.log_threshold [L, F]]

Every decoder has a bias, added whether features are active or not. Its JumpReLU lets
through what equals the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxclt.clt.config import CLTConfig
from jaxclt.clt.gates import GATES
from jaxclt.errors import InputError, shown
from jaxclt.files.json_file import read_json
from jaxclt.io.config_fields import whole
from jaxclt.io.formats.fields import READS, WRITES, check_fields, of_layer
from jaxclt.io.formats.pieces import FileStore, Fold, LayerFiles, Piece, check_tensors
from jaxclt.io.tensors import TensorFile, open_tensors

__all__ = ["CONFIG", "WEIGHTS", "is_decode_clt", "open_decode_clt"]

CONFIG, WEIGHTS = "cfg.json", "clt_checkpoint_latest.safetensors"
_ACTIVATIONS: dict[str, str] = {"relu": "relu", "jumprelu": "jumprelu"}
_TYING = ("none", "per_source", "per_target")
_HOOKS = ("tl_input_template", "tl_output_template")
_MODULES = ("mlp_input_template", "mlp_output_template")
_DOES_NOT_MATTER = (
    *("num_features", "num_layers", "d_model", "model_name", "jumprelu_threshold"),
    *("batchtopk_k", "batchtopk_straight_through", "topk_k", "topk_straight_through"),
    *("topk_mode", "clt_dtype", "expected_input_dtype", *_HOOKS, *_MODULES),
)
_FIELDS: dict[str, tuple[Any, ...] | None] = {
    "activation_fn": tuple(_ACTIVATIONS),
    "decoder_tying": _TYING,
    # the statistics lie elsewhere, with the activations it was trained on
    "normalization_method": ("none",),
    "enable_feature_offset": (False,),
    "enable_feature_scale": (False,),
    "skip_connection": (False,),  # from each layer to all above it
    **dict.fromkeys(_DOES_NOT_MATTER),
}
_THETA = "theta_manager.log_threshold"


def is_decode_clt(path: Path) -> bool:
    """Whether a cfg.json here counts features and layers."""
    file = path / CONFIG
    return file.is_file() and "num_features" in read_json(file)


def open_decode_clt(path: Path) -> FileStore:
    """Open a cross-layer transcoder of decode-clt without reading its weights.

    Raises:
      InputError: if it is incomplete or damaged, or has a part that is not linear.
    """
    where = path / CONFIG
    config = read_json(where)
    check_fields(where, config, _FIELDS)
    sizes = ("num_layers", "num_features", "d_model")
    L, F, D = (whole(config, x, where=where, least=1) for x in sizes)
    file = open_tensors(path / WEIGHTS)
    if len(file.tensors) < L:  # said before we count up to it
        raise InputError(f"{where}: num_layers is {L}, but {file.path} holds fewer")
    act = _ACTIVATIONS[config.get("activation_fn", "jumprelu")]
    tying = config.get("decoder_tying", "none")
    wanted: dict[str, tuple[int, ...]] = {}
    for i in range(L):
        wanted |= {f"{_encoder(i)}.weight": (F, D), f"{_encoder(i)}.bias_param": (F,)}
        for j in range(i, L):
            name = _decoder(tying, i, j)
            wanted |= {f"{name}.weight": (D, F), f"{name}.bias_param": (D,)}
    wanted |= {_THETA: (L, F)} if GATES[act].switch == "theta" else {}
    check_tensors(file, wanted)
    (read, write), model = _sites(where, config, L), config.get("model_name")
    return FileStore(
        path=path,
        cfg=CLTConfig(
            n_layers=L,
            d_model=D,
            n_features=F,
            span=L,
            activation=act,
            read=READS[read],
        ),
        format="decode-clt",
        layers=tuple(_layer(file, i, L, tying) for i in range(L)),
        files={CONFIG: where, WEIGHTS: path / WEIGHTS},
        write=WRITES[write],
        model_name=model if isinstance(model, str) else None,
    )


def _encoder(layer: int) -> str:
    return f"encoder_module.encoders.{layer}"


def _decoder(tying: str, source: int, target: int) -> str:
    key = {
        "none": f"{source}->{target}",
        "per_source": f"{source}",
        "per_target": f"{target}",
    }[tying]
    return f"decoder_module.decoders.{key}"


def _sites(where: Path, config: Mapping[str, Any], n_layers: int) -> tuple[str, str]:
    """Names of what it reads and what it writes, of layer 0 and of the last."""
    fields = _HOOKS if config.get(_HOOKS[0]) else _MODULES
    found = []
    for field, known in zip(fields, (READS, WRITES), strict=True):
        template = config.get(field)
        if not isinstance(template, str) or template.count("{}") != 1:
            raise InputError(
                f"{where}: {field} is {shown(template)}; write blocks.{{}}.HOOK"
            )
        for layer in (0, n_layers - 1):
            hook = template.replace("{}", str(layer))
            found.append(of_layer(where, field, hook, known)[1])
    return found[0], found[2]


def _layer(file: TensorFile, layer: int, n_layers: int, tying: str) -> LayerFiles:
    def bias(source: int) -> tuple[Piece, float]:
        return Piece(file, f"{_decoder(tying, source, layer)}.bias_param"), 1.0

    sources = [layer] if tying == "per_target" else range(layer + 1)
    return LayerFiles(
        W_enc=Piece(file, f"{_encoder(layer)}.weight"),
        b_enc=Piece(file, f"{_encoder(layer)}.bias_param"),
        decoder=tuple(
            Piece(file, f"{_decoder(tying, layer, target)}.weight", transposed=True)
            for target in range(layer, n_layers)
        ),
        b_dec=tuple(bias(source) for source in sources),
        theta=Piece.found(file, _THETA, layer),
        fold=Fold(log_theta=True, inclusive=True),
    )
