"""Where every leaf of a dictionary lies in files, and one store that reads them lazily.

A format says, per layer, which `Piece` of which tensor each leaf is, and which affine
maps around the coder (`Fold`) have to be folded into its weights; the rest is common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxclt.clt.config import CLTConfig
from jaxclt.clt.store import EncoderLayer
from jaxclt.errors import InputError, shown
from jaxclt.files.digest import fingerprint
from jaxclt.io.tensors import TensorFile, check_finite

__all__ = ["FileStore", "Fold", "Gain", "LayerFiles", "Piece", "WriteSite"]
__all__ += ["check_tensors", "stored_shape"]

WriteSite = Literal["stream", "mlp"]


class Piece(NamedTuple):
    """A stored tensor or a part of it, its axes in our order; nothing is read yet."""

    file: TensorFile
    name: str
    pick: tuple[int | slice, ...] = ()  # of the stored axes
    transposed: bool = False  # the two axes that are left

    @classmethod
    def found(cls, file: TensorFile, name: str, *pick: int) -> Piece | None:
        """A part of a tensor, or None where the file lacks it."""
        return cls(file, name, pick) if name in file.tensors else None

    def read(self, rows: np.ndarray | None = None) -> np.ndarray:
        """A finite copy, or one of some rows only.

        Raises:
          InputError: if a value that was read is NaN or infinite.
        """
        view = self.file.map(self.name)[self.pick]
        view = view.T if self.transposed else view
        # rows are picked into a copy, which needs no other
        out = np.array(view) if rows is None else np.asarray(view[rows])
        check_finite(out, f"{self.file.path}: {self.name}")
        return out


Gain = float | Piece  # a number, or one for each residual dimension [D]


class Fold(NamedTuple):
    """What a tool does around its coder, folded into the weights when they are read.

    The coder reads ``(x - read_mean) * read_gain / read_std``. What it writes to its
    j-th layer is times ``write_gain[j]``, and a feature's row besides times
    ``row_gain[j]`` [F].
    Thresholds are stored as they are or as logarithms; what equals one passes with
    `inclusive`; with `theta_floor` activations are clipped there besides; with
    `by_norm` the gate looks at pre-activations times the norm of all that the feature
    writes, in the coder's own units.
    """

    read_gain: Gain = 1.0
    read_mean: Piece | None = None
    read_std: Piece | None = None
    write_gain: tuple[Gain, ...] = ()
    row_gain: tuple[Piece, ...] = ()
    log_theta: bool = False
    inclusive: bool = False
    theta_floor: float | None = None
    by_norm: bool = False


class LayerFiles(NamedTuple):
    """Where the leaves of one layer lie."""

    W_enc: Piece  # [F, D]
    b_enc: Piece | None  # [F]
    decoder: tuple[Piece, ...]  # one [F, M, D], or [F, D] for each layer written
    b_dec: tuple[tuple[Piece, Gain], ...]  # summed; each [D], times a gain
    theta: Piece | None = None  # [F]
    skip: tuple[Piece, Gain] | None = None  # [D, D] as read @ skip, times a gain
    fold: Fold = Fold()


@dataclasses.dataclass(frozen=True)
class FileStore:
    """A dictionary on disk, opened but not read: a `DictionaryStore`.

    Weights come in the dtype they are stored in unless something had to be folded into
    them. Every read raises InputError on values that are not finite.
    """

    path: Path
    cfg: CLTConfig
    format: str  # a key of `jaxclt.io.formats.table.FORMATS`
    layers: tuple[LayerFiles, ...]
    files: Mapping[str, Path]  # all that it is made of, by name
    write: WriteSite  # what the decoders reconstruct, see `check`
    model_name: str | None = None  # the model it was trained on, as its config says
    scan: str | None = None  # the name of its feature examples in other interfaces
    # what was chosen where its name left a choice, see `jaxclt.clt.active.Dictionary`
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def encoder(self, layer: int) -> EncoderLayer:
        """All encoder rows of one layer: [F, D], [F] and thresholds [F] or None."""
        with np.errstate(all="ignore"):  # what comes of it is looked at
            found = self._encoder(layer)
        for x in found:
            self._check(layer, x)
        return found

    def _encoder(self, layer: int) -> EncoderLayer:
        at, fold = self.layers[layer], self.layers[layer].fold
        W_FD = at.W_enc.read()
        b_F = np.zeros(len(W_FD), W_FD.dtype) if at.b_enc is None else at.b_enc.read()
        theta_F = None if at.theta is None else at.theta.read()
        W_FD = _times(W_FD, fold.read_gain)
        if fold.read_std is not None:
            W_FD = _wide(W_FD) / _above_zero(fold.read_std)
        if fold.read_mean is not None:
            W_FD = _wide(W_FD)
            mean_D = np.broadcast_to(_wide(fold.read_mean.read()), W_FD.shape[1:])
            b_F = _wide(b_F) - W_FD @ mean_D
        if theta_F is not None and fold.log_theta:
            theta_F = np.exp(_wide(theta_F))
        if fold.by_norm:
            norm_F = self._norms(layer)
            if theta_F is None:  # top k of activations times norms: units of the norm
                W_FD, b_F = _wide(W_FD) * norm_F[:, None], _wide(b_F) * norm_F
            else:
                theta_F = _wide(theta_F) / norm_F
        if theta_F is not None and fold.inclusive:
            theta_F = np.nextafter(theta_F, theta_F.dtype.type(-np.inf))
        if theta_F is not None and fold.theta_floor is not None:
            theta_F = np.maximum(theta_F, theta_F.dtype.type(fold.theta_floor))
        return EncoderLayer(W_FD, b_F, theta_F)

    def decoder(self, layer: int, feature_A: np.ndarray | None = None) -> np.ndarray:
        """Decoder rows [A, n_writes(layer), D] of some features, or of all."""
        rows = None if feature_A is None else np.asarray(feature_A)
        with np.errstate(all="ignore"):
            W_AMD = self._scaled_decoder(layer, rows)
        self._check(layer, W_AMD)
        return W_AMD

    def b_dec(self) -> np.ndarray:
        """Decoder biases [L, D]."""
        with np.errstate(all="ignore"):
            b_LD = np.stack([_sum(at.b_dec, self.cfg.d_model) for at in self.layers])
        check_finite(b_LD, f"{self.path}: the decoder's biases in the model's units")
        return b_LD

    def skip(self, layer: int) -> np.ndarray | None:
        """Linear path [D, D], used as ``read @ skip``, or None."""
        at = self.layers[layer]
        if at.skip is None:
            return None
        piece, gain = at.skip
        with np.errstate(all="ignore"):
            W_DD = _times(_times(piece.read(), gain).T, at.fold.read_gain).T
        self._check(layer, W_DD)
        return W_DD

    def _check(self, layer: int, x: np.ndarray | None) -> None:
        """Folding may leave the range of numbers, where reading did not."""
        if x is not None and self.layers[layer].fold != Fold():
            check_finite(x, f"{self.path}: layer {layer} in the units of the model")

    def _scaled_decoder(self, layer: int, rows: np.ndarray | None) -> np.ndarray:
        fold, W_AMD = self.layers[layer].fold, self._raw_decoder(layer, rows)
        if fold.by_norm and self.layers[layer].theta is None:
            norm_F = self._norms(layer)
            norm_A = norm_F if rows is None else norm_F[rows]
            W_AMD = _wide(W_AMD) / norm_A[:, None, None]
        if fold.row_gain:
            gain_AM = np.stack([_wide(p.read(rows)) for p in fold.row_gain], 1)
            W_AMD = _wide(W_AMD) * gain_AM[:, :, None]
        if not fold.write_gain or all(g == 1.0 for g in fold.write_gain):
            return W_AMD
        columns = [_times(W_AMD[:, j], g) for j, g in enumerate(fold.write_gain)]
        return np.stack([_wide(W_AD) for W_AD in columns], 1)

    def _raw_decoder(self, layer: int, rows: np.ndarray | None) -> np.ndarray:
        parts = [piece.read(rows) for piece in self.layers[layer].decoder]
        # one piece may hold all writes, else each holds one
        if parts[0].ndim == 3:
            return parts[0]
        return parts[0][:, None] if len(parts) == 1 else np.stack(parts, 1)

    def _norms(self, layer: int) -> np.ndarray:
        """Norms [F] of what features write, in the coder's own units, above zero."""
        W_FMD = _wide(self._raw_decoder(layer, None))
        norm_F = np.sqrt(np.square(W_FMD).sum((1, 2)))
        return np.maximum(norm_F, norm_F.dtype.type(1e-30))

    def digest(self) -> str:
        """Hex hash of the names and contents of all files (`files.digest`)."""
        return fingerprint(self.files)


def _wide(x: np.ndarray) -> np.ndarray:
    """In float32 at least: nothing is folded in half precision."""
    return x if x.dtype == np.float64 else x.astype(np.float32, copy=False)


def _above_zero(piece: Piece) -> np.ndarray:
    x = _wide(piece.read())
    if not (x > 0).all():
        raise InputError(
            f"{piece.file.path}: {piece.name} is not above 0; write it again"
        )
    return x


def _times(x: np.ndarray, gain: Gain) -> np.ndarray:
    """``x * gain`` along the last axis; x itself if the gain is 1."""
    if isinstance(gain, Piece):
        return _wide(x) * _wide(gain.read())
    if gain == 1.0:
        return x
    x = _wide(x)
    return x * x.dtype.type(gain)


def _sum(terms: Sequence[tuple[Piece, Gain]], d_model: int) -> np.ndarray:
    if not terms:
        return np.zeros(d_model, np.float32)
    parts = [_times(piece.read(), gain) for piece, gain in terms]
    if len(parts) > 1:  # a term may be one number for all dimensions
        parts = [np.sum([np.broadcast_to(_wide(p), d_model) for p in parts], 0)]
    return np.broadcast_to(parts[0], d_model)


def stored_shape(file: TensorFile, name: str, ndim: int) -> tuple[int, ...]:
    """Shape of a tensor that must be there.

    Raises:
      InputError: if it is missing, or has another number of axes.
    """
    if name not in file.tensors:
        raise InputError(f"{file.path} has no tensor {name}; convert or replace it")
    shape = file.tensors[name].shape
    if len(shape) != ndim:
        raise InputError(
            f"{file.path}: {name} has shape {shape}, but {ndim} axes are needed; "
            "convert or replace it"
        )
    return shape


def check_tensors(
    file: TensorFile,
    wanted: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """A file holds exactly the tensors of its format, in the shapes of the rest.

    Raises:
      InputError: for a tensor that is missing, unknown or of another shape.
    """
    known: dict[str, Any] = {**(optional or {}), **wanted}
    for name in wanted:
        if name not in file.tensors:
            raise InputError(
                f"{file.path} has no tensor {name}; copy or fetch the dictionary again"
            )
    # a tensor we do not know may change what the dictionary means: never ignore it
    for name, tensor in sorted(file.tensors.items()):
        if name not in known:
            raise InputError(
                f"{file.path} holds {shown(name)}, which this format does not have or "
                "layer 0 lacks; remove or convert it"
            )
        if tensor.shape != known[name]:
            raise InputError(
                f"{file.path}: {name} has shape {tensor.shape}, the rest of the "
                f"dictionary needs {known[name]}; fetch or convert it again"
            )
