"""A synthetic dictionary of a chosen size and sparsity for any model.

Tracing cost depends on how many features are active, not on what they mean, so
benchmarks run on random dictionaries whose thresholds are calibrated on the model's own
activations. The sizes of shared measurements: 256 features per layer, about 31 active
per token and layer.

    python benchmarks/make_synthetic_dictionary.py --model smollm2-135m --kind clt \
        --features 256 --active 31 --out /tmp/clt
    python benchmarks/make_synthetic_dictionary.py --reads reads.npz --out /tmp/clt

`--reads` takes an npz with read_LTD and write_LTD instead of running a model (a
golden's graph.npz has them). The first position of a text is left out of the
calibration: models treat it apart, and tracers ignore it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.config import CLTConfig, ReadSite
from jaxclt.io.dictionary import save_dictionary
from jaxclt.io.model import load_model
from jaxclt.lm.run import record
from jaxclt.types import CLTParams

Kind = Literal["clt", "plt"]
TEXTS = (
    "The Eiffel Tower is in the city of",
    "The capital of the state containing Dallas is",
    "She opened the old wooden box and found a letter from her",
    "Water boils at one hundred degrees and freezes at",
)


def synthetic_dictionary(
    read_LTD: Array,
    write_LTD: Array,
    *,
    n_features: int,
    kind: Kind,
    active_per_token: float,
    seed: int,
    read: ReadSite = "resid_mid",
    first_LD: Array | None = None,
) -> tuple[CLTParams, CLTConfig]:
    """Random dictionary with a given mean of active features per token and layer.

    Encoder rows are random directions in units of the layer's spread, so activations
    are of order one; the bias removes the mean read. Decoder rows are random, of one
    norm per written layer, such that the reconstruction's mean square is that of the
    centred MLP output.

    Args:
      read_LTD: what the encoders read, first positions left out.
      write_LTD: true MLP outputs at the same positions.
      n_features: per layer.
      kind: "clt" writes all later layers, "plt" its own.
      active_per_token: wanted mean of active features per token and layer.
      seed: of the random directions.
      read: where the dictionary reads, for its config.
      first_LD: what is read at the first position, if features shall be blind to it:
        random ones are half of them active on its massive activations, trained ones
        are not.

    Returns:
      Weights in float32 and their config.
    """
    L, T, D = read_LTD.shape
    assert write_LTD.shape == (L, T, D)
    assert 0 < active_per_token < n_features
    cfg = CLTConfig(
        n_layers=L,
        d_model=D,
        n_features=n_features,
        span=L if kind == "clt" else 1,
        activation="jumprelu",
        read=read,
    )
    k_enc, k_dec = jax.random.split(jax.random.key(seed))
    read_LTD, write_LTD = jnp.float32(read_LTD), jnp.float32(write_LTD)
    W_enc_LFD, b_enc_LF = _encoder(k_enc, read_LTD, n_features, first_LD)
    pre_LTF = jnp.einsum("LTD,LFD->LTF", read_LTD, W_enc_LFD) + b_enc_LF[:, None]
    cut_L = jnp.quantile(
        pre_LTF.reshape(L, -1), 1 - active_per_token / n_features, axis=1
    )
    # thresholds are positive; a mean above half of the features cannot be reached
    theta_LF = jnp.broadcast_to(jnp.maximum(cut_L, 1e-3)[:, None], b_enc_LF.shape)
    a_LTF = jnp.where(pre_LTF > theta_LF[:, None], pre_LTF, 0.0)
    params = CLTParams(
        W_enc_LFD=W_enc_LFD,
        b_enc_LF=b_enc_LF,
        W_dec=_decoders(k_dec, cfg, a_LTF, write_LTD),
        b_dec_LD=write_LTD.mean(1),
        theta_LF=theta_LF,
    )
    return params, cfg


def _encoder(
    key: Array, read_LTD: Array, n_features: int, first_LD: Array | None
) -> tuple[Array, Array]:
    """Rows [L, F, D] and biases [L, F]: centred pre-activations of unit spread."""
    L, _, D = read_LTD.shape
    mean_LD = read_LTD.mean(1)
    unit_LFD = jax.random.normal(key, (L, n_features, D))
    if first_LD is not None:
        away_LD = first_LD - mean_LD
        away_LD /= jnp.linalg.norm(away_LD, axis=-1, keepdims=True)
        along_LF = jnp.einsum("LFD,LD->LF", unit_LFD, away_LD)
        unit_LFD -= along_LF[..., None] * away_LD[:, None]
    unit_LFD /= jnp.linalg.norm(unit_LFD, axis=-1, keepdims=True)
    pre_LTF = jnp.einsum("LTD,LFD->LTF", read_LTD - mean_LD[:, None], unit_LFD)
    W_enc_LFD = unit_LFD / pre_LTF.std((1, 2))[:, None, None]
    return W_enc_LFD, -jnp.einsum("LD,LFD->LF", mean_LD, W_enc_LFD)


def _decoders(
    key: Array, cfg: CLTConfig, a_LTF: Array, write_LTD: Array
) -> tuple[Array, ...]:
    """Random decoders [L][F, M, D], scaled by the layer that they write."""
    energy_L = (a_LTF**2).sum(-1).mean(-1)  # random rows add in squares
    centred_LTD = write_LTD - write_LTD.mean(1, keepdims=True)
    wanted_L = (centred_LTD**2).sum(-1).mean(-1)
    first = [max(0, m - cfg.span + 1) for m in range(cfg.n_layers)]
    sources_L = jnp.stack([energy_L[f : m + 1].sum() for m, f in enumerate(first)])
    norm_L = jnp.sqrt(wanted_L / sources_L)

    def decoder(layer: int) -> Array:
        M = cfg.n_writes(layer)
        shape = (cfg.n_features, M, cfg.d_model)
        unit_FMD = jax.random.normal(jax.random.fold_in(key, layer), shape)
        unit_FMD /= jnp.linalg.norm(unit_FMD, axis=-1, keepdims=True)
        return unit_FMD * norm_L[None, layer : layer + M, None]

    return tuple(decoder(layer) for layer in range(cfg.n_layers))


def record_reads(model_name: str, texts: tuple[str, ...]) -> tuple[Array, Array, Array]:
    """Reads and writes [L, T, D] of a model on some texts, first positions left out.

    The last is what is read at the first position, [L, D].
    """
    model = load_model(model_name)
    reads, writes = [], []
    for text in texts:
        token_T = jnp.asarray(model.tokenizer.encode(text), jnp.int32)
        done = record(model.params, token_T, cfg=model.cfg)
        reads.append(done.mid_LTD[:, 1:])
        writes.append(done.write_LTD[:, 1:])
        first_LD = done.mid_LTD[:, 0]
    return jnp.concatenate(reads, 1), jnp.concatenate(writes, 1), first_LD


def load_reads(path: Path) -> tuple[Array, Array, Array]:
    """The same of an npz with read_LTD and write_LTD."""
    with np.load(path, allow_pickle=False) as file:
        read_LTD, write_LTD = file["read_LTD"], file["write_LTD"]
    read_LTD, write_LTD = jnp.asarray(read_LTD), jnp.asarray(write_LTD)
    return read_LTD[:, 1:], write_LTD[:, 1:], read_LTD[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="name or directory, as for jaxclt.load_model")
    source.add_argument("--reads", type=Path, help="npz with read_LTD and write_LTD")
    parser.add_argument("--text", action="append", help="calibrate on this text")
    parser.add_argument("--kind", choices=("clt", "plt"), default="clt")
    parser.add_argument("--features", type=int, default=256, help="per layer")
    parser.add_argument(
        "--active", type=float, default=31.0, help="per token and layer"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--blind-first", action="store_true", help="no feature reads the first position"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    read_LTD, write_LTD, first_LD = (
        load_reads(args.reads)
        if args.reads
        else record_reads(args.model, tuple(args.text or TEXTS))
    )
    params, cfg = synthetic_dictionary(
        read_LTD,
        write_LTD,
        n_features=args.features,
        kind=args.kind,
        active_per_token=args.active,
        seed=args.seed,
        first_LD=first_LD if args.blind_first else None,
    )
    save_dictionary(params, cfg, args.out, model_name=str(args.model or args.reads))
    sys.stdout.write(
        f"{args.out}: {args.kind}, {cfg.n_layers} layers, {cfg.n_features} features, "
        f"calibrated on {read_LTD.shape[1]} positions\n"
    )


if __name__ == "__main__":
    main()
