"""SAELens transcoders: one directory for each layer, however it is called.

cfg.json                   architecture, d_in, d_out, d_sae, normalize_activations,
                           metadata with hook_name and hook_name_out
sae_weights.safetensors    W_enc [D, F], b_enc, W_dec [F, D], b_dec, [threshold],
                           [W_skip [out, in]]

Its JumpReLU comes after a ReLU: what is below zero is never active.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jaxclt.clt.config import CLTConfig
from jaxclt.errors import InputError
from jaxclt.files.json_file import read_json
from jaxclt.io.formats.fields import READS, WRITES, check_fields, contiguous, of_layer
from jaxclt.io.formats.layouts import SAELENS, Opened
from jaxclt.io.formats.pieces import FileStore, Fold
from jaxclt.io.tensors import open_tensors

__all__ = ["ARCHITECTURES", "CONFIG", "WEIGHTS", "is_saelens", "open_saelens"]

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


class _Architecture(NamedTuple):
    theta: bool
    skip: bool


ARCHITECTURES = {
    "transcoder": _Architecture(theta=False, skip=False),
    "skip_transcoder": _Architecture(theta=False, skip=True),
    "jumprelu_transcoder": _Architecture(theta=True, skip=False),
    "jumprelu_skip_transcoder": _Architecture(theta=True, skip=True),
}
_FIELDS: dict[str, tuple[Any, ...] | None] = {
    "architecture": tuple(ARCHITECTURES),
    # where the input is scaled by its own norm, no linear map of it does the same
    "normalize_activations": ("none",),
    "apply_b_dec_to_input": (False,),
    "reshape_activations": ("none",),
    **dict.fromkeys(("d_in", "d_sae", "d_out", "dtype", "device", "metadata")),
}


def is_saelens(path: Path) -> bool:
    """Whether directories with SAELens's pair of files are here."""
    return bool(_folders(path))


def _folders(path: Path) -> list[Path]:
    found = [path / CONFIG, *path.glob(f"*/{CONFIG}"), *path.glob(f"*/*/{CONFIG}")]
    return sorted(
        x.parent
        for x in found
        if x.is_file() and not (x.parent / "sae.safetensors").exists()
    )


def open_saelens(path: Path) -> FileStore:
    """Open a set of SAELens transcoders without reading their weights.

    Raises:
      InputError: if it is incomplete or damaged, or normalises what it reads.
    """
    folders = {}
    model, sites = None, set()
    for folder in _folders(path):
        config = read_json(folder / CONFIG)
        check_fields(folder / CONFIG, config, _FIELDS)
        meta = config.get("metadata")
        if not isinstance(meta, dict):
            raise InputError(f"{folder / CONFIG} has no metadata that names its hooks")
        layer, read = of_layer(
            folder / CONFIG, "metadata.hook_name", meta.get("hook_name"), READS
        )
        at, write = of_layer(
            folder / CONFIG, "metadata.hook_name_out", meta.get("hook_name_out"), WRITES
        )
        if at != layer:
            raise InputError(
                f"{folder / CONFIG}: it reads layer {layer} and writes layer {at}; "
                "only transcoders of one layer can be read"
            )
        if layer in folders:
            raise InputError(
                f"{path}: layer {layer} is twice ({folders[layer][0].name} and "
                f"{folder.name}); give a directory with one transcoder for each layer"
            )
        folders[layer] = folder, config.get("architecture")
        sites.add((READS[read], WRITES[write]))
        model = meta.get("model_name") or model
    contiguous(path, folders)
    kinds = {kind for _, kind in folders.values()}
    if len(kinds) > 1 or len(sites) > 1:
        raise InputError(
            f"{path}: its layers differ in architecture or hook points; give a "
            "directory with transcoders of one kind"
        )
    placed = [folders[i][0] for i in range(len(folders))]
    (kind,), ((read, write),) = kinds, sites
    files, has = tuple(open_tensors(x / WEIGHTS) for x in placed), ARCHITECTURES[kind]
    opened = Opened(SAELENS, files, files, theta=has.theta, skip=has.skip)
    n_features, d_model, span = opened.sizes()
    cfg = CLTConfig(
        n_layers=len(files),
        d_model=d_model,
        n_features=n_features,
        span=span,
        activation="jumprelu" if has.theta else "relu",
        read=read,
    )
    return FileStore(
        path=path,
        cfg=cfg,
        format="saelens",
        layers=opened.layers(cfg, Fold(theta_floor=0.0)),
        files={
            (x / name).relative_to(path).as_posix(): x / name
            for x in placed
            for name in (CONFIG, WEIGHTS)
        },
        write=write,
        model_name=model if isinstance(model, str) else None,
    )
