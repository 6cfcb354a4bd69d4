"""Writing dictionaries, layer by layer, in the formats that can be written.

A format is a row of data (`jaxclt.io.formats.targets`): an allow-list of what it can
say. What is not in it is refused, or lost where the user accepts that, by name and
before anything is written.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from jaxclt.clt.config import CLTConfig, ReadSite
from jaxclt.clt.store import DictionaryStore, EncoderLayer
from jaxclt.errors import InputError
from jaxclt.io.formats.fields import HOOK_OF_READ
from jaxclt.io.formats.layouts import Layout
from jaxclt.io.formats.pieces import WriteSite
from jaxclt.io.tensors import check_finite

__all__ = ["About", "Target", "losses", "write_files"]


class About(NamedTuple):
    """What a dictionary's files say besides its weights and its config."""

    write: WriteSite
    skip: bool  # it has a linear path
    model_name: str | None = None
    scan: str | None = None


class Layer(NamedTuple):
    """One layer's weights, and its place."""

    place: int
    encoder: EncoderLayer
    W_dec_FMD: np.ndarray
    b_dec_D: np.ndarray
    W_skip_DD: np.ndarray | None


Texts = Callable[["Target", Layout, CLTConfig, About], dict[str, str]]


class Target(NamedTuple):
    """A format that can be written.

    Attributes:
      texts: its small files, by name.
      gates: its words for the gates that it has, by our names; None: it has every one,
        under ours.
      plt: where its tensors lie for dictionaries of span 1, None: it has none such.
      clt: the same for those of a larger span.
      reads: what its encoders may read.
      unsaid: fields of `About` that it has no place for.
      short: what else may be lost: when it is, and why.
      float32: half precision is widened.
      clips: activations are clipped at zero ahead of their thresholds.
    """

    texts: Texts
    gates: Mapping[str, str] | None
    plt: Layout | None
    clt: Layout | None = None
    reads: tuple[ReadSite, ...] = tuple(HOOK_OF_READ)
    unsaid: tuple[str, ...] = ()
    short: Mapping[str, tuple[Callable[[CLTConfig, About], bool], str]] = {}
    float32: bool = False
    clips: bool = False

    def word(self, cfg: CLTConfig) -> str:
        """What it calls a gate."""
        return cfg.activation if self.gates is None else self.gates[cfg.activation]

    def layout(self, cfg: CLTConfig) -> Layout | None:
        """Where its tensors lie."""
        return self.plt if cfg.span == 1 else self.clt


def losses(name: str, target: Target, cfg: CLTConfig, about: About) -> dict[str, str]:
    """What would be lost of a dictionary in a format, why by name.

    Args:
      name: of the format, for the message.
      target: the format.
      cfg: the dictionary.
      about: what else is known of it.

    Raises:
      InputError: if the format cannot express it at all.
    """
    gates = target.gates
    if gates is not None and cfg.activation not in gates:
        raise InputError(
            f"{name} has no {cfg.activation}, only {', '.join(gates)}; choose another "
            "format (jaxclt has every gate)"
        )
    if target.layout(cfg) is None:
        raise InputError(
            f"{name} has only per-layer transcoders, but features here write "
            f"{cfg.span} layers; choose another format"
        )
    if cfg.read not in target.reads:
        raise InputError(
            f"{name} has only coders that read {', '.join(target.reads)}, but this one "
            f"reads {cfg.read}; choose another format"
        )
    lost = {
        what: why.format(span=cfg.span)
        for what, (is_so, why) in target.short.items()
        if is_so(cfg, about)
    }
    return lost | {
        field: f"{name} has no place for `{field}`"
        for field in target.unsaid
        if getattr(about, field) is not None
    }


def write_files(
    target: Target,
    store: DictionaryStore,
    about: About,
    folder: Path,
    *,
    float32: bool = False,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write all files of a dictionary; holds one layer at a time.

    Args:
      target: the format; `losses` has been asked.
      store: where the weights come from.
      about: what else the files say.
      folder: an empty directory.
      float32: in place of the dtype that the store gives.
      on_layer: called with layers done and their number.

    Raises:
      InputError: if a value is not finite.
    """
    cfg, layout = store.cfg, target.layout(store.cfg)
    assert layout is not None
    for name, text in target.texts(target, layout, cfg, about).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    some = next(x for x in folder.rglob("*") if x.is_file())
    mode = stat.S_IMODE(some.stat().st_mode)
    b_dec_LD = np.asarray(store.b_dec())
    for i in range(cfg.n_layers):
        layer = Layer(
            i,
            store.encoder(i),
            np.asarray(store.decoder(i)),
            b_dec_LD[i],
            store.skip(i) if about.skip else None,
        )
        theta_F = layer.encoder.theta_F
        if target.clips and theta_F is not None and (np.asarray(theta_F) < 0).any():
            raise InputError(
                f"layer {i} has thresholds below 0, but {layout.format} has a ReLU "
                "before them; choose another format"
            )
        for name, tensors in _tensors(layout, layer, cfg).items():
            kept = {}
            for key, x in tensors.items():
                check_finite(x, f"dictionary: {key} of layer {i}")
                wide = float32 or (target.float32 and x.dtype.itemsize < 4)
                # contiguous: safetensors writes the memory, whatever the strides say
                kept[key] = np.ascontiguousarray(x, np.float32 if wide else x.dtype)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".npz"):
                np.savez(folder / name, **kept)
            else:
                safetensors.numpy.save_file(kept, folder / name)
            (folder / name).chmod(mode)  # safetensors leaves it to the owner alone
        on_layer(i + 1, cfg.n_layers)


def _tensors(
    layout: Layout, layer: Layer, cfg: CLTConfig
) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of one layer, by file and name."""
    enc, W_dec, i = layer.encoder, layer.W_dec_FMD, layer.place
    theta_F = np.zeros_like(enc.b_enc_F) if layout.jumps else None
    theta_F = theta_F if enc.theta_F is None else enc.theta_F
    encoder = {
        layout.W_enc: enc.W_enc_FD if layout.enc_axes == "FD" else enc.W_enc_FD.T,
        layout.b_enc: enc.b_enc_F,
        layout.b_dec: layer.b_dec_D,
    }
    if theta_F is not None:
        assert layout.theta is not None
        encoder[layout.theta] = theta_F
    if layer.W_skip_DD is not None and layout.W_skip is not None:
        W = layer.W_skip_DD
        encoder[layout.W_skip] = W if layout.skip_axes == "io" else W.T
    if layout.writes == "own":
        W_dec = W_dec[:, 0]
    elif layout.writes == "all":
        W_dec = np.zeros((len(W_dec), cfg.n_layers, cfg.d_model), W_dec.dtype)
        W_dec[:, i : i + cfg.n_writes(i)] = layer.W_dec_FMD
    files = {
        layout.encoder_file.format(i): {k.format(i): x for k, x in encoder.items()}
    }
    files.setdefault(layout.decoder_file.format(i), {})[layout.W_dec.format(i)] = W_dec
    return files
