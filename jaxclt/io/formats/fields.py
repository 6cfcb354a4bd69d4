"""What the configs of other tools say: hook names, and fields that must have a value.

Other tools' options are data here. A field that a table does not know may change what a
dictionary means, so it is refused unless it is switched off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxclt.clt.config import ReadSite
from jaxclt.errors import InputError, shown
from jaxclt.io.formats.pieces import WriteSite

__all__ = ["HOOK_OF_READ", "HOOK_OF_WRITE", "READS", "READ_OF_HOOK", "WRITES"]
__all__ += ["WRITE_OF_HOOK", "check_fields", "contiguous", "of_layer"]

# Names of TransformerLens after blocks.N, and of modules after model.layers.N.
HOOK_OF_READ: dict[ReadSite, str] = {
    "resid_mid": "hook_resid_mid",
    "normalized": "ln2.hook_normalized",
    "mlp_in": "mlp.hook_in",
}
# They differ where a model has a norm after its MLPs: only the first is after it.
HOOK_OF_WRITE: dict[WriteSite, str] = {"stream": "hook_mlp_out", "mlp": "mlp.hook_out"}
READ_OF_HOOK: dict[str, ReadSite] = {hook: site for site, hook in HOOK_OF_READ.items()}
WRITE_OF_HOOK: dict[str, WriteSite] = {
    hook: site for site, hook in HOOK_OF_WRITE.items()
}
READS: dict[str, ReadSite] = {
    **READ_OF_HOOK,
    "mlp.input": "mlp_in",
    "pre_feedforward_layernorm.input": "resid_mid",
    "pre_feedforward_layernorm.output": "mlp_in",
}
WRITES: dict[str, WriteSite] = {
    **WRITE_OF_HOOK,
    "mlp.output": "mlp",
    "post_feedforward_layernorm.output": "stream",
}
_HOOK = re.compile(r"(?:blocks|model\.layers)\.(\d{1,4})\.(.+)")
_OFF = (None, False, 0, "", "none", [], {})


def of_layer(
    where: Path, field: str, hook: Any, known: Iterable[str]
) -> tuple[int, str]:
    """Layer and name of a hook point such as ``blocks.3.hook_mlp_out``.

    Raises:
      InputError: if it is none of the known ones.
    """
    found = _HOOK.fullmatch(hook) if isinstance(hook, str) else None
    if found is None or found[2] not in known:
        raise InputError(
            f"{where}: {field} is {shown(hook)}, but dictionaries of MLPs read and "
            f"write blocks.N.HOOK with HOOK one of {', '.join(known)}"
        )
    return int(found[1]), found[2]


def check_fields(
    where: Path,
    config: Mapping[str, Any],
    allowed: Mapping[str, tuple[Any, ...] | None],
) -> None:
    """Every field of a config has a value that can be represented.

    Args:
      where: file, for the message.
      config: what it holds.
      allowed: values by field; None for a field that does not matter here.

    Raises:
      InputError: naming the field.
    """
    for name, value in config.items():
        values = allowed.get(name, _OFF)
        if values is None or any(
            value == x and isinstance(value, bool) == isinstance(x, bool)
            for x in values
        ):
            continue
        if name in allowed:
            names = ", ".join(map(repr, values))
            raise InputError(
                f"{where}: {name} is {shown(value)}, which cannot be represented here; "
                f"it must be one of {names}"
            )
        raise InputError(
            f"{where}: {name} is {shown(value)}, a field that this format is not known "
            "to have; switch it off or convert the dictionary"
        )


def contiguous(path: Path, layers: Iterable[int]) -> None:
    """Layers 0, 1, ... are all there, once each.

    Raises:
      InputError: naming one that is missing or there twice.
    """
    found = sorted(layers)
    for i, layer in enumerate(found):
        if layer != i:
            what = f"layer {i} is missing" if layer > i else f"layer {layer} is twice"
            raise InputError(f"{path}: {what}; a dictionary covers every layer once")
