"""The recipe of a run: one frozen dataclass, and presets as values of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from jaxclt.clt.config import ReadSite
from jaxclt.clt.gates import GATES
from jaxclt.errors import (
    InputError,
    check_at_least,
    check_finite,
    check_positive,
    check_share,
    did_you_mean,
)
from jaxclt.lm.config import LMConfig
from jaxclt.train.chunks import ChunkConfig
from jaxclt.train.objectives import Terms
from jaxclt.train.params import GateName, Spec
from jaxclt.train.schedules import Weights
from jaxclt.train.step import Recipe

__all__ = ["PRESETS", "PROMPTS", "TrainConfig", "preset"]

PROMPTS = (
    "The Eiffel Tower is in the city of",
    "The capital of France is",
    "The opposite of hot is",
)

_INT32 = 2**31 - 1  # steps and silent tokens are counted in 32 bits
# How fields are checked, by their names.
_RANGES: tuple[tuple[Callable[..., None], tuple[str, ...]], ...] = (
    (
        partial(check_at_least, 1),
        (
            *("features", "tokens", "batch_tokens", "accumulate", "context"),
            *("chunk_tokens", "reuse", "windows_per_call", "norm_tokens"),
            *("heldout_tokens", "log_every", "checkpoint_every", "kl_windows"),
        ),
    ),
    (partial(check_at_least, 1, _INT32), ("dead_tokens",)),
    (
        partial(check_at_least, 0),
        (
            *("span", "l0", "sparsity", "preactivation", "auxk", "auxk_features"),
            *("jacobian", "warmup", "clip", "outlier", "eval_every"),
            *("agreement_windows", "graph_features", "kl_steps"),
        ),
    ),
    (check_positive, ("c", "bandwidth", "lr", "kl_lr")),
    (partial(check_share, zero=True), ("ramp",)),
    (partial(check_share, one=False), ("heldout_share",)),
    (check_finite, ("seed", "theta")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Recipe of a run; every field is a flag of `jaxclt train`."""

    features: int = 4096
    """Features per layer."""
    span: int = 0
    """MLP outputs a feature writes, its own layer included; 0: all later layers (a full
    CLT), 1: a per-layer transcoder."""
    activation: GateName = "jumprelu"
    """Gate. topk and batch_topk are exported as one threshold per layer."""
    objective: str = "tanh"
    """Sparsity term: tanh, l1, l0 or none; or file.py:function of your own."""
    l0: float = 0.0
    """Features active per token and layer: k of topk and batch_topk; for other gates
    the sparsity weight is steered to hold it (0: the weight stays as given)."""
    sparsity: float = 5e-3
    """Final weight of the sparsity term, in units of one layer's variance."""
    ramp: float = 1.0
    """Share of the run over which the sparsity weight rises from 0."""
    c: float = 4.0
    """Of tanh(c |W_dec| a)."""
    preactivation: float = 0.0
    """Weight of the pre-activation loss that revives silent features."""
    preactivation_on: Literal["dead", "all"] = "dead"
    """Which features the pre-activation loss pulls up."""
    auxk: float = 0.0
    """Weight of AuxK: dead features reconstruct the error through all decoders."""
    auxk_features: int = 0
    """Dead features per layer and token in AuxK; 0: half the model's width, at most
    512."""
    jacobian: float = 0.0
    """Weight of Jacobian matching: learn the MLPs' derivatives too (maths 19.5)."""
    matryoshka: tuple[int, ...] = ()
    """Prefixes of features that must reconstruct by themselves too."""
    skip: bool = False
    """Add a linear path from what a layer reads to its MLP output (PLT only: the
    exported format has no place for it in a CLT)."""
    bandwidth: float = 1.0
    """Of the straight-through estimator."""
    theta: float = 0.03
    """Initial JumpReLU threshold."""
    read: ReadSite = "resid_mid"
    """What encoders read: the stream before the MLP, that divided by its norm, or
    what the MLP reads."""

    tokens: int = 100_000_000
    """Tokens to train on; repeats of a chunk count."""
    batch_tokens: int = 4096
    """Tokens of a step."""
    lr: float = 2e-4
    """Peak learning rate of Adam."""
    warmup: int = 1000
    """Steps of linear warm-up, at most a tenth of the run."""
    clip: float = 1.0
    """Largest norm of the gradient, thresholds left out; 0: none."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after the other, to save memory."""
    memory: Literal["full", "remat", "per_source"] = "full"
    """full: keep everything; remat: recompute layers backwards (on a CPU XLA drops the
    recomputation, and nothing is saved); per_source: one source layer's gradient at a
    time."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """What matmuls multiply; weights, moments, thresholds and sums are float32."""
    seed: int = 0
    """Of everything random."""

    context: int = 256
    """Tokens of a window of text."""
    chunk_tokens: int = 131_072
    """Tokens that are harvested and shuffled together."""
    reuse: int = 1
    """Passes over a chunk before the next is harvested."""
    windows_per_call: int = 8
    """Windows of one forward pass of the model."""
    buffer: Literal["float32", "bfloat16"] = "bfloat16"
    """What harvested activations are held in."""
    norm_tokens: int = 100_000
    """Tokens that the normalisation is measured on: the first chunks, as they are
    harvested."""
    outlier: float = 10.0
    """Tokens whose MLP output is so many times its layer's median anywhere are left
    out, like the first position: attention sinks in mid-text; 0: none."""
    heldout: str = ""
    """Text to evaluate on, never trained on (as --data); by default a share of that."""
    heldout_share: float = 0.02
    """Share of the documents that are held out if --heldout is not given."""
    heldout_tokens: int = 8192
    """Tokens to evaluate on."""

    dead_tokens: int = 1_000_000
    """A feature silent for so many tokens is dead."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 1000
    """Steps between evaluations on held-out text; 0: only at the end."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    agreement_windows: int = 16
    """Held-out windows on which the replacement model is compared."""
    graph_features: int = 1024
    """Most features of a graph that is scored in an evaluation; 0: no graphs."""
    prompts: tuple[str, ...] = PROMPTS
    """Prompts whose graphs are scored."""

    kl_steps: int = 0
    """Steps of fine-tuning a copy of the finished dictionary so that the replacement
    model predicts as the model does (KL, through all layers); written to
    finetuned/dictionary and evaluated beside the other: graphs may explain less."""
    kl_lr: float = 1e-5
    """Learning rate of fine-tuning."""
    kl_windows: int = 4
    """Windows of text of a step of fine-tuning."""

    def __post_init__(self) -> None:
        for check, names in _RANGES:
            check(**{name: getattr(self, name) for name in names})
        ends = (0, *self.matryoshka, self.features)
        if any(a >= b for a, b in pairwise(ends)):
            raise InputError(
                f"--matryoshka {' '.join(map(str, self.matryoshka))}: give numbers "
                f"below --features {self.features}, the smallest first"
            )
        if self.batch_tokens % self.accumulate:
            raise InputError(
                f"--accumulate {self.accumulate} must divide --batch-tokens "
                f"{self.batch_tokens}"
            )
        if self.tokens < self.batch_tokens:
            raise InputError(
                f"--tokens {self.tokens} is less than one step of --batch-tokens "
                f"{self.batch_tokens}"
            )
        if self.n_steps > _INT32:
            raise InputError(
                f"--tokens {self.tokens} are more than {_INT32:,} steps: raise "
                f"--batch-tokens {self.batch_tokens}"
            )
        if self.chunk_tokens + self.context < self.batch_tokens:
            raise InputError(
                f"--batch-tokens {self.batch_tokens} is more than the tokens of a "
                f"chunk: raise --chunk-tokens {self.chunk_tokens}"
            )
        if self.skip and self.span != 1:
            raise InputError("--skip needs --span 1: a CLT's format has no skip")

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return self.tokens // self.batch_tokens

    def spec(self, lm: LMConfig) -> Spec:
        """What is trained, for a model."""
        return Spec(
            n_layers=lm.n_layers,
            d_model=lm.d_model,
            n_features=self.features,
            span=min(self.span, lm.n_layers) or lm.n_layers,
            activation=self.activation,
            k=round(self.l0) if GATES[self.activation].competes else None,
            bandwidth=self.bandwidth,
            read=self.read,
            compute=self.compute,
        )

    def terms(self, lm: LMConfig) -> Terms:
        """Terms of the standard objective; its sparsity comes from the name."""
        auxk = self.auxk_features or min(512, lm.d_model // 2)
        return Terms(
            c=self.c,
            target_l0=self.l0,
            preactivation=self.preactivation_on if self.preactivation else "none",
            auxk=min(auxk, self.features) if self.auxk else 0,
            matryoshka=self.matryoshka,
            jacobian=self.jacobian > 0,
        )

    def recipe(self, lm: LMConfig) -> Recipe:
        """Weights and bookkeeping of a step."""
        steered = self.l0 > 0 and not GATES[self.activation].competes
        steered = steered and self.objective not in ("l0", "none")
        return Recipe(
            n_steps=self.n_steps,
            weights=Weights(
                sparsity=self.sparsity,
                preactivation=self.preactivation,
                auxk=self.auxk,
                jacobian=self.jacobian,
                ramp=self.ramp,
            ),
            l0=self.l0 * lm.n_layers if steered else None,
            clip=self.clip,
            accumulate=self.accumulate,
            memory=self.memory,
            dead_tokens=self.dead_tokens,
            half_life=float(self.dead_tokens),
        )

    def chunk_config(self) -> ChunkConfig:
        """How activations are gathered."""
        return ChunkConfig(
            site=self.read,
            chunk_tokens=self.chunk_tokens,
            reuse=self.reuse,
            windows_per_call=self.windows_per_call,
            dtype=self.buffer,
            outlier=self.outlier,
            seed=self.seed,
        )


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Half an hour of two cores: experiments/smollm2_cpu.
    "cpu-small": {
        "features": 1024,
        "span": 1,
        "activation": "batch_topk",
        "objective": "none",
        "l0": 32.0,
        "read": "mlp_in",
        "tokens": 600_000,
        "batch_tokens": 512,
        "lr": 4e-3,
        "warmup": 20,
        "context": 128,
        "chunk_tokens": 16_384,
        "reuse": 2,
        "norm_tokens": 100_000,
        "dead_tokens": 100_000,
        "log_every": 5,
        "eval_every": 400,
        "checkpoint_every": 50,
        "graph_features": 512,
    },
    # One accelerator, about 30 minutes: not measured yet.
    "gpu-clt": {
        "features": 8192,
        "tokens": 60_000_000,
        "batch_tokens": 8192,
        "compute": "bfloat16",
        "lr": 3e-4,
        "l0": 8.0,
        "preactivation": 1e-6,
        "chunk_tokens": 262_144,
        "windows_per_call": 32,
    },
}


def preset(name: str) -> TrainConfig:
    """A preset by name.

    Raises:
      InputError: if there is none of that name.
    """
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS)
        raise InputError(f"--preset {name!r}: there are {', '.join(PRESETS)}{hint}")
    return TrainConfig(**PRESETS[name])
