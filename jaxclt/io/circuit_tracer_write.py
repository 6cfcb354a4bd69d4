"""Writing a dictionary in circuit-tracer's format, bit-exactly in float32."""

from __future__ import annotations

import os
from pathlib import Path

from jaxclt.clt import params as clt_params
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.store import ParamsStore
from jaxclt.errors import InputError
from jaxclt.files.atomic import atomic_directory
from jaxclt.io.circuit_tracer_format import HOOKS_OF_READ, OWN_FILE
from jaxclt.io.formats.pieces import WriteSite
from jaxclt.io.formats.write import LAYOUT_TARGETS, About, write_files
from jaxclt.types import CLTParams

__all__ = ["save_dictionary"]


def save_dictionary(
    params: CLTParams,
    cfg: CLTConfig,
    path: str | Path,
    *,
    model_name: str,
    scan: str | None = None,
    write: WriteSite | None = None,
) -> None:
    """Write a dictionary in circuit-tracer's format, in float32.

    Span 1 is written as a PLT, anything else as a CLT. A span between 1 and L is
    written with the decoders it has; circuit-tracer itself reads only 1 and L. A
    dictionary that is already there is replaced at the end, or left as it was if
    anything fails.

    Args:
      params: weights.
      cfg: their shape.
      path: directory to create or replace.
      model_name: the model it was trained on, for config.yaml.
      scan: name of the feature examples in circuit-tracer's interface.
      write: what the decoders reconstruct where the model has a norm behind its MLPs:
        "stream" (what is behind it) or "mlp"; elsewhere it is the same. If not given,
        what circuit-tracer's backends expect of models without such a norm.

    Raises:
      InputError: if the weights do not fit `cfg` or the format or are not finite, or if
        `path` holds anything else than a dictionary.
    """
    path = Path(path).resolve()
    clt_params.check(params, cfg)
    about = About(
        write=write or HOOKS_OF_READ[cfg.read][1],
        skip=params.W_skip_LDD is not None,
        model_name=model_name,
        scan=scan,
    )
    _check_expressible(params, cfg, about)
    _check_replaceable(path)
    target = LAYOUT_TARGETS["circuit-tracer"]
    with atomic_directory(path) as folder:
        write_files(target, ParamsStore(params, cfg), about, folder, float32=True)


def _check_expressible(params: CLTParams, cfg: CLTConfig, about: About) -> None:
    for name, why in LAYOUT_TARGETS["circuit-tracer"].losses(cfg, about).items():
        if name != "span":  # jaxclt reads it
            raise InputError(f"circuit-tracer's format would lose the {name}: {why}")
    if (params.theta_LF is None) == (cfg.activation == "jumprelu"):
        raise InputError(
            f"dictionary: activation {cfg.activation} and "
            f"{'no ' if params.theta_LF is None else ''}thresholds do not go together"
        )


def _check_replaceable(path: Path) -> None:
    """Only a dictionary, and nothing else, may be overwritten."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise InputError(f"{path} exists and is not a directory; choose another output")
    names = sorted(p.name for p in path.iterdir())
    foreign = [name for name in names if not OWN_FILE.fullmatch(name)]
    if foreign or (names and "config.yaml" not in names):
        raise InputError(
            f"{path} exists and is not only a dictionary (it holds "
            f"{(foreign or names)[0]}); choose another output directory"
        )
