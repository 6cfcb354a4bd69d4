"""Writing a dictionary that is held in memory, bit-exactly in float32."""

from __future__ import annotations

import os
from pathlib import Path

from jaxclt.clt import params as clt_params
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.store import ParamsStore
from jaxclt.errors import InputError, check_choice
from jaxclt.files.atomic import atomic_directory
from jaxclt.io.formats.circuit_tracer import CONFIG, FILES
from jaxclt.io.formats.pieces import WriteSite
from jaxclt.io.formats.targets import TARGETS
from jaxclt.io.formats.write import About, losses, write_files
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
    to: str = "circuit-tracer",
) -> None:
    """Write a dictionary, in float32, in circuit-tracer's format unless told otherwise.

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
    clt_params.check(params, cfg)
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
