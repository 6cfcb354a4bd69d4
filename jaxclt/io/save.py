"""Writing a dictionary that is held in memory, bit-exactly in float32."""

from __future__ import annotations

import os
from pathlib import Path

from jaxclt.clt.config import CLTConfig
from jaxclt.clt.store import ParamsStore
from jaxclt.errors import InputError, check_choice
from jaxclt.files.atomic import atomic_directory
from jaxclt.io.formats.circuit_tracer import CONFIG, FILES
from jaxclt.io.formats.pieces import WriteSite
from jaxclt.io.formats.targets import TARGETS
from jaxclt.io.formats.write import About, losses, write_files
from jaxclt.types import CLTParams

__all__ = ["check_params", "save_dictionary"]


def save_dictionary(
    params: CLTParams,
    cfg: CLTConfig,
    path: str | Path,
    *,
    model_name: str,
    scan: str | None = None,
    write: WriteSite | None = None,
    to: str = "circuit-tracer",
) -> None:
    """Write a dictionary, in float32, in circuit-tracer's format or another.

    There, span 1 is written as a PLT, anything else as a CLT. A span between 1 and L is
    written with the decoders it has; circuit-tracer itself reads only 1 and L. A
    dictionary that is already there is replaced at the end, or left as it was if
    anything fails.

    Args:
      params: weights.
      cfg: their shape.
      path: directory to create or replace.
      model_name: the model it was trained on, for config.yaml.
      scan: name of the feature examples in circuit-tracer's interface.
      write: what the decoders reconstruct where the model has a norm after its MLPs:
        "stream" (what comes after it) or "mlp"; elsewhere it is the same. If not given,
        what circuit-tracer's backends expect of models without such a norm.
      to: a key of `jaxclt.io.formats.targets.TARGETS`; "jaxclt" can say whatever a
        transcoder here can be.

    Raises:
      InputError: if the weights do not fit `cfg` or the format or are not finite, or if
        `path` holds anything else than a dictionary.
    """
    path = Path(path).resolve()
    check_choice("to", to, TARGETS)
    check_params(params, cfg)
    about = About(
        write=write or ("mlp" if cfg.read == "mlp_in" else "stream"),
        skip=params.W_skip_LDD is not None,
        model_name=model_name,
        scan=scan,
    )
    for name, why in losses(to, TARGETS[to], cfg, about).items():
        if name != "span":  # jaxclt reads it
            raise InputError(f"{to}'s format would lose the {name}: {why}")
    _check_replaceable(path)
    with atomic_directory(path) as folder:
        store = ParamsStore(params, cfg)
        write_files(TARGETS[to], store, about, folder, float32=True)


def check_params(params: CLTParams, cfg: CLTConfig) -> None:
    """Raise InputError unless every array has the shape that `cfg` states."""
    L, F, D = cfg.n_layers, cfg.n_features, cfg.d_model
    wanted = {
        "W_enc_LFD": (L, F, D),
        "b_enc_LF": (L, F),
        "b_dec_LD": (L, D),
        "theta_LF": (L, F),
        "W_skip_LDD": (L, D, D),
    }
    for name, shape in wanted.items():
        leaf = getattr(params, name)
        if leaf is not None and leaf.shape != shape:
            raise InputError(
                f"dictionary: {name} has shape {leaf.shape}, its config needs {shape}"
            )
    if (params.theta_LF is None) == (cfg.gate.switch == "theta"):
        raise InputError(
            f"dictionary: activation {cfg.activation} and "
            f"{'no ' if params.theta_LF is None else ''}thresholds do not go together"
        )
    if len(params.W_dec) != L:
        raise InputError(
            f"dictionary: {len(params.W_dec)} decoder layers, its config needs {L}"
        )
    for layer, W in enumerate(params.W_dec):
        if W.shape != (F, cfg.n_writes(layer), D):
            raise InputError(
                f"dictionary: W_dec[{layer}] has shape {W.shape}, its config needs "
                f"{(F, cfg.n_writes(layer), D)}"
            )


def _check_replaceable(path: Path) -> None:
    """Only a dictionary, and nothing else, may be overwritten."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise InputError(f"{path} exists and is not a directory; choose another output")
    names = sorted(p.name for p in path.iterdir())
    foreign = [name for name in names if not FILES.fullmatch(name)]
    if foreign or (names and CONFIG not in names):
        raise InputError(
            f"{path} exists and is not only a dictionary (it holds "
            f"{(foreign or names)[0]}); choose another output directory"
        )
