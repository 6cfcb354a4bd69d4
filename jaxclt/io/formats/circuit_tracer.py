"""circuit-tracer's directories, and jaxclt's own of the same form, read lazily.

config.yaml                  model_kind, hooks, optional transcoders, activation, k
W_enc_{i}.safetensors        CLT: W_enc_i [F, D], b_enc_i, b_dec_i, [threshold_i],
                             [W_skip_i [in, out]]
W_dec_{i}.safetensors        CLT: W_dec_i [F, min(span, L - i), D]
layer_{i}.safetensors        PLT: W_enc, W_dec [F, D], b_enc, b_dec, [W_skip [out, in]],
                             [activation_function.threshold]

With `transcoders`, a list of one file for each layer, the files may also be those that
GemmaScope (params.npz, PLT) and Gemma Scope 2 (safetensors, PLT and CLT) publish. Where
model_kind is jaxclt, the files are those of a CLT whatever its span, and `activation`
is any row of `jaxclt.clt.gates.GATES`.

Opening reads headers only; weights are mapped and copied out layer by layer or decoder
row by decoder row, so a dictionary larger than memory can be traced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxclt.clt.config import CLTConfig
from jaxclt.clt.gates import GATES
from jaxclt.errors import InputError, shown
from jaxclt.files.yaml_file import read_yaml
from jaxclt.io.formats.fields import READ_OF_HOOK, WRITE_OF_HOOK
from jaxclt.io.formats.layouts import LAYOUTS, OWN, Layout, Opened
from jaxclt.io.formats.pieces import FileStore
from jaxclt.io.hub import fetch_listed
from jaxclt.io.tensors import TensorFile, open_tensors, refuse_pickles

__all__ = ["CONFIG", "FILES", "is_circuit_tracer", "open_circuit_tracer"]
__all__ += ["open_described"]

CONFIG = "config.yaml"
FILES = re.compile(r"config\.yaml|(W_enc|W_dec|layer)_\d+\.safetensors")
# Only what competes is said by name: a threshold makes a JumpReLU, whatever is said.
_WORDS = ("relu", "jump_relu", "jumprelu", "topk", None)
_COMPETING = {"topk": "signed_topk"}


def is_circuit_tracer(path: Path) -> bool:
    """Whether a directory has a config.yaml that is not of another format."""
    return (path / CONFIG).is_file()


def open_circuit_tracer(
    path: Path, supplement: Mapping[str, Any] | None = None
) -> FileStore:
    """Open a dictionary that a config.yaml describes without reading its weights.

    Args:
      path: the directory that holds config.yaml.
      supplement: what config.yaml should say but does not.

    Returns:
      A lazy store; its span is what the decoder shapes say.

    Raises:
      InputError: if a file is missing, truncated, a pickle, or of the wrong shape.
    """
    config = {**(supplement or {}), **read_yaml(path / CONFIG)}
    return open_described(path, config, described={CONFIG: path / CONFIG})


def open_described(
    path: Path,
    config: Mapping[str, Any],
    *,
    described: Mapping[str, Path],
    provenance: Mapping[str, Any] | None = None,
) -> FileStore:
    """Open a dictionary that is described in the words of a config.yaml.

    Args:
      path: the directory.
      config: what a config.yaml in it says, or would say.
      described: files that it comes from, by name.
      provenance: what was chosen where the dictionary's name left a choice.

    Raises:
      InputError: as `open_circuit_tracer`.
    """
    _check_config(path, config)
    opened = _open_layers(path, config)
    cfg = _infer_config(path, config, opened)
    return FileStore(
        path=path,
        cfg=cfg,
        format=opened.layout.format,
        layers=opened.layers(cfg),
        files={**described, **_named(path, (*opened.encoder, *opened.decoder))},
        write=WRITE_OF_HOOK[config["feature_output_hook"]],
        model_name=_text(path, config, "model_name"),
        scan=_text(path, config, "scan"),
        provenance=provenance or {},
    )


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """The kind, the hooks and the gate are known ones."""
    file = path / CONFIG
    gates = tuple(name for name, gate in GATES.items() if gate.on is not None)
    for key, known in (
        ("model_kind", tuple(dict.fromkeys(x.model_kind for x in (*LAYOUTS, OWN)))),
        ("feature_input_hook", tuple(READ_OF_HOOK)),
        ("feature_output_hook", tuple(WRITE_OF_HOOK)),
        ("activation", gates if _is_own(config) else _WORDS),
    ):
        if config.get(key) not in known:
            names = ", ".join(filter(None, known))
            value = shown(config.get(key))
            raise InputError(f"{file}: {key} is {value}, it must be one of {names}")


def _is_own(config: Mapping[str, Any]) -> bool:
    return config.get("model_kind") == OWN.model_kind


def _text(path: Path, config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{path / CONFIG}: {key} must be a text, not {shown(value)}")
    return value


def _open_layers(path: Path, config: Mapping[str, Any]) -> Opened:
    """The encoder and decoder file of every layer, and their layout."""
    candidates = [x for x in (*LAYOUTS, OWN) if x.model_kind == config["model_kind"]]
    if config.get("transcoders") is not None:
        entries = config["transcoders"]
        if not isinstance(entries, list) or not entries:
            raise InputError(f"{path / CONFIG}: transcoders must be a list of files")
        files = tuple(open_tensors(_entry(path, entry)) for entry in entries)
        return Opened.of(_recognise(candidates, files[0]), files, files)
    native = candidates[0]
    n_layers = _count_layers(path, native.encoder_file)

    def opened(template: str) -> tuple[TensorFile, ...]:
        return tuple(open_tensors(path / template.format(i)) for i in range(n_layers))

    encoder = decoder = opened(native.encoder_file)
    if native.decoder_file != native.encoder_file:
        decoder = opened(native.decoder_file)
    return Opened.of(native, encoder, decoder)


def _recognise(candidates: list[Layout], file: TensorFile) -> Layout:
    """The layout by what the first file is: its kind, and the name of its encoder.

    A CLT whose layers are in two files each cannot be listed.
    """
    for layout in candidates:
        one_file = layout.encoder_file == layout.decoder_file
        fits = file.path.suffix == layout.suffix and layout.W_enc in file.tensors
        if one_file and fits:
            return layout
    names = dict.fromkeys(x.W_enc.format(0) for x in candidates)
    raise InputError(
        f"{file.path} has no tensor {' or '.join(names)}; convert or replace it"
    )


def _entry(path: Path, entry: Any) -> Path:
    """The file of an entry of `transcoders`: inside the directory, or on the hub."""
    if not isinstance(entry, str):
        raise InputError(
            f"{path / CONFIG}: transcoders must be a list of files, not {shown(entry)}"
        )
    text = entry
    if text.startswith("hf://"):
        return fetch_listed(text)
    file = Path(text)
    if "://" in text or file.is_absolute() or ".." in file.parts or "\0" in text:
        raise InputError(
            f"{path / CONFIG}: transcoders entry {shown(text)} must be a file "
            "inside the directory or hf://organisation/name/file; download it there "
            "and name it by its relative path"
        )
    return path / file


def _named(path: Path, files: tuple[TensorFile, ...]) -> dict[str, Path]:
    """Files by their names inside the directory; of others, by all that names them."""
    return {
        f.path.relative_to(path).as_posix()
        if f.path.is_relative_to(path)
        else "/".join(f.path.parts[-4:]): f.path
        for f in files
    }


def _count_layers(path: Path, template: str) -> int:
    """One more than the highest layer that has a file; missing ones fail on opening."""
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))
    found = [int(m[1]) for p in path.iterdir() if (m := pattern.fullmatch(p.name))]
    if not found:
        refuse_pickles(path)
        raise InputError(f"{path} holds no {template.format('*')}; is it complete?")
    missing = sorted(set(range(len(found))) - set(found))
    if missing:  # said before a stray large number makes us count up to it
        raise InputError(
            f"{path / template.format(missing[0])} is missing; copy or fetch the "
            "dictionary again"
        )
    return len(found)


def _infer_config(path: Path, config: Mapping[str, Any], opened: Opened) -> CLTConfig:
    """The shape and conventions, from the first layer's tensors."""
    n_features, d_model, span = opened.sizes()
    n_layers = len(opened.encoder)
    if span > n_layers:
        raise InputError(
            f"{path}: features of layer 0 write {span} layers but only {n_layers} are "
            "here; copy or fetch the dictionary again"
        )
    said: Any = config.get("activation")
    by_theta = "jumprelu" if opened.theta else "relu"
    name = said if _is_own(config) else _COMPETING.get(said, by_theta)
    gate = GATES[name]
    k = config.get("k") if gate.competes else None
    if k is not None and (not isinstance(k, int) or isinstance(k, bool)):
        raise InputError(f"{path / CONFIG}: k must be a whole number, not {shown(k)}")
    if opened.theta != (gate.switch == "theta"):
        raise InputError(
            f"{path / CONFIG}: activation is {said} but the files hold "
            f"{'' if opened.theta else 'no '}thresholds; remove or add one of them"
        )
    return CLTConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_features=n_features,
        span=span,
        activation=name,
        k=k,
        read=READ_OF_HOOK[config["feature_input_hook"]],
    )
