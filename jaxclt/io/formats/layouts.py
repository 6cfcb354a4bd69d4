"""Where tensors lie in formats that keep each layer apart, as one table.

A layer has one file, or one for its encoder and one for its decoder. The same rows are
read (`Opened`) and written (`jaxclt.io.formats.write`).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from jaxclt.clt.config import CLTConfig
from jaxclt.io.formats.pieces import (
    Fold,
    LayerFiles,
    Piece,
    check_tensors,
    stored_shape,
)
from jaxclt.io.tensors import TensorFile

__all__ = ["CLT", "LAYOUTS", "OWN", "PLT", "SAELENS", "SPARSIFY", "Layout", "Opened"]


class Layout(NamedTuple):
    """File and tensor names of one kind of directory; ``{}`` is the layer."""

    format: str  # its name in `jaxclt.io.formats.targets`
    model_kind: str  # as a config.yaml calls it
    encoder_file: str
    decoder_file: str
    W_enc: str
    b_enc: str
    b_dec: str
    theta: str | None
    W_dec: str
    W_skip: str | None
    enc_axes: Literal["FD", "DF"] = "FD"
    # layers a stored decoder has: its own, those from its own on, or all from 0 on
    writes: Literal["own", "later", "all"] = "own"
    skip_axes: Literal["io", "oi"] = "oi"  # [in, out] as ours, or [out, in]
    jumps: bool = False  # there are always thresholds: those of a ReLU are zero

    @property
    def suffix(self) -> str:
        """Of its files of weights."""
        return self.encoder_file[self.encoder_file.rindex(".") :]


CLT, PLT = "cross_layer_transcoder", "transcoder_set"
_SCOPE = ("b_enc", "b_dec", "threshold")
# fmt: off
LAYOUTS = (
    Layout(
        "circuit-tracer", CLT, "W_enc_{}.safetensors", "W_dec_{}.safetensors",
        "W_enc_{}", "b_enc_{}", "b_dec_{}", "threshold_{}", "W_dec_{}", "W_skip_{}",
        writes="later", skip_axes="io",
    ),
    Layout(
        "circuit-tracer", PLT, "layer_{}.safetensors", "layer_{}.safetensors",
        "W_enc", "b_enc", "b_dec", "activation_function.threshold", "W_dec", "W_skip",
    ),
    Layout(
        "gemma-scope", PLT, "layer_{}/params.npz", "layer_{}/params.npz",
        "W_enc", *_SCOPE, "W_dec", None, enc_axes="DF", jumps=True,
    ),
    Layout(
        "gemma-scope-2", PLT, "layer_{}/params.safetensors",
        "layer_{}/params.safetensors",
        "w_enc", *_SCOPE, "w_dec", "affine_skip_connection",
        enc_axes="DF", skip_axes="io", jumps=True,
    ),
    Layout(
        "gemma-scope-2", CLT, "params_layer_{}.safetensors",
        "params_layer_{}.safetensors",
        "w_enc", *_SCOPE, "w_dec", "affine_skip_connection",
        enc_axes="DF", skip_axes="io", writes="all", jumps=True,
    ),
)
# A kind of its own: no other tool takes it for what it is not.
OWN = LAYOUTS[0]._replace(format="jaxclt", model_kind="jaxclt")
SAELENS = Layout(
    "saelens", "", "layer_{}/sae_weights.safetensors",
    "layer_{}/sae_weights.safetensors",
    "W_enc", *_SCOPE, "W_dec", "W_skip", enc_axes="DF",
)
SPARSIFY = Layout(
    "sparsify", "", "layers.{}.mlp/sae.safetensors", "layers.{}.mlp/sae.safetensors",
    "encoder.weight", "encoder.bias", "b_dec", None, "W_dec", "W_skip",
)
# fmt: on


class Opened(NamedTuple):
    """The files of a directory of some layout, by layer."""

    layout: Layout
    encoder: tuple[TensorFile, ...]
    decoder: tuple[TensorFile, ...]
    theta: bool  # it has thresholds
    skip: bool  # it has a linear path

    @classmethod
    def of(
        cls,
        layout: Layout,
        encoder: tuple[TensorFile, ...],
        decoder: tuple[TensorFile, ...],
    ) -> Opened:
        """Files of which layer 0 says what all have."""

        def has(name: str | None) -> bool:
            return name is not None and name.format(0) in encoder[0].tensors

        return cls(layout, encoder, decoder, has(layout.theta), has(layout.W_skip))

    def sizes(self) -> tuple[int, int, int]:
        """Features, residual dimensions and span, as layer 0 has them."""
        at, many = self.layout, self.layout.writes != "own"
        sizes = stored_shape(self.encoder[0], at.W_enc.format(0), 2)
        decoder = stored_shape(self.decoder[0], at.W_dec.format(0), 3 if many else 2)
        F, D = sizes if at.enc_axes == "FD" else sizes[::-1]
        return F, D, decoder[1] if many else 1

    def layers(
        self, cfg: CLTConfig, fold: Fold | None = None
    ) -> tuple[LayerFiles, ...]:
        """Where every leaf lies.

        Raises:
          InputError: unless every layer has exactly the tensors of the format, in the
            config's shapes.
        """
        return tuple(self._layer(cfg, fold or Fold(), i) for i in range(cfg.n_layers))

    def _layer(self, cfg: CLTConfig, fold: Fold, i: int) -> LayerFiles:
        at, F, D = self.layout, cfg.n_features, cfg.d_model
        encoder, decoder = self.encoder[i], self.decoder[i]
        wanted = {
            at.W_enc: (F, D) if at.enc_axes == "FD" else (D, F),
            at.b_enc: (F,),
            at.b_dec: (D,),
            **({at.theta: (F,)} if self.theta else {}),
            **({at.W_skip: (D, D)} if self.skip else {}),
        }
        of_encoder = {str(name).format(i): shape for name, shape in wanted.items()}
        of_decoder = {
            at.W_dec.format(i): {
                "own": (F, D),
                "later": (F, cfg.n_writes(i), D),
                "all": (F, cfg.n_layers, D),
            }[at.writes]
        }
        if decoder is encoder:
            check_tensors(encoder, of_encoder | of_decoder)
        else:
            check_tensors(encoder, of_encoder)
            check_tensors(decoder, of_decoder)

        def piece(name: str | None, **how: Any) -> Piece:
            return Piece(encoder, str(name).format(i), **how)

        pick = (slice(None), slice(i, None)) if at.writes == "all" else ()
        skip = piece(at.W_skip, transposed=at.skip_axes == "oi"), 1.0
        return LayerFiles(
            W_enc=piece(at.W_enc, transposed=at.enc_axes == "DF"),
            b_enc=piece(at.b_enc),
            decoder=(Piece(decoder, at.W_dec.format(i), pick),),
            b_dec=((piece(at.b_dec), 1.0),),
            theta=piece(at.theta) if self.theta else None,
            skip=skip if self.skip else None,
            fold=fold,
        )
