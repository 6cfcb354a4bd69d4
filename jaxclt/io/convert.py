"""From one format of dictionaries to another, one layer in memory at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from jaxclt.errors import InputError, did_you_mean
from jaxclt.files.atomic import atomic_directory
from jaxclt.io.dictionary import LABELS, open_dictionary, read_labels
from jaxclt.io.formats.targets import TARGETS
from jaxclt.io.formats.write import About, losses, write_files
from jaxclt.runs.lock import held

__all__ = ["convert_dictionary"]


def convert_dictionary(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    lossy: Collection[str] = (),
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write a dictionary in another format.

    `out` appears whole or not at all. Weights keep the dtype they are stored in, unless
    the format lacks it or something had to be folded into them.

    Args:
      source: a dictionary, as for `jaxclt.load_dictionary`, but not neurons.
      out: directory to create.
      to: a key of `jaxclt.io.formats.targets.TARGETS`.
      lossy: names of what may be lost.
      on_layer: called with layers done and their number.

    Returns:
      A report: `from`, `to`, `out`, sizes, and `lost`, why by name; `made_of` where
      the name of the source left a choice.

    Raises:
      InputError: for an unknown format, a dictionary that it cannot express, something
        that would be lost and is not in `lossy`, or an `out` that exists.
    """
    if to not in TARGETS:
        hint = did_you_mean(to, TARGETS)
        raise InputError(f"--to {to}: the formats are {', '.join(TARGETS)}{hint}")
    target, store, place = TARGETS[to], open_dictionary(source), Path(out)
    if os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir())):
        raise InputError(f"{place} exists; choose another output directory")
    about = About(
        write=store.write,
        skip=store.layers[0].skip is not None,
        model_name=store.model_name,
        scan=store.scan,
    )
    lost = losses(to, target, store.cfg, about)
    unknown = sorted(set(lossy) - set(lost))
    if unknown:
        possible = ", ".join(lost) or "nothing"
        hint = did_you_mean(unknown[0], lost)
        raise InputError(f"--lossy {unknown[0]}: {possible} is lost in {to}{hint}")
    for name, why in lost.items():
        if name not in lossy:
            raise InputError(
                f"{store.path} cannot be written as {to} without loss: {name} ({why}); "
                f"accept that with --lossy {name}"
            )
    read_labels(store.path)  # said before anything is written
    with held(place, beside=True), atomic_directory(place) as folder:
        kept = about._replace(skip=about.skip and "skip" not in lost)
        write_files(target, store, kept, folder, on_layer=on_layer)
        if (store.path / LABELS).is_file():
            shutil.copyfile(store.path / LABELS, folder / LABELS)
        size = sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())
    cfg = store.cfg
    return {
        "from": store.format,
        "to": to,
        "out": str(place),
        "layers": cfg.n_layers,
        "features": cfg.n_features,
        "span": cfg.span,
        "activation": cfg.activation,
        "bytes": size,
        "lost": lost,
        **({"made_of": dict(store.provenance)} if store.provenance else {}),
    }
