"""One call for a tiny model, a dictionary and its graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.clt.active import Active, active_features
from jaxclt.clt.coder import Dictionary
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.gates import GATES
from jaxclt.clt.store import ParamsStore
from jaxclt.clt.transcoder import StoreDictionary, loaded_params
from jaxclt.graph.attribute import AttributeConfig, attribute_recording
from jaxclt.graph.graph import Graph, GraphMeta
from jaxclt.graph.prompt import Prompt
from jaxclt.graph.targets import salient_targets
from jaxclt.lm.config import LMConfig, RopeScaling
from jaxclt.lm.run import record
from jaxclt.precision import jit
from jaxclt.replacement.local import LocalReplacement, local_replacement
from jaxclt.testing.random_clt import random_clt
from jaxclt.testing.random_lm import Parts, random_lm
from jaxclt.types import CLTParams, LMParams, Recording, Targets

__all__ = ["FAMILIES", "Tiny", "TinyFamily", "TinyOptions", "tiny"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny:
    """A random model with a random dictionary, recorded on a random prompt."""

    cfg: LMConfig
    params: LMParams
    clt_cfg: CLTConfig
    clt: CLTParams
    token_T: Array
    recording: Recording
    targets: Targets

    @property
    def dictionary(self) -> StoreDictionary:
        """The dictionary as tracing takes it."""
        return StoreDictionary(ParamsStore(self.clt, self.clt_cfg), name="tiny")

    @property
    def active(self) -> Active:
        """Its active features on the prompt."""
        return active_features(self.dictionary, self.params, self.recording, self.cfg)

    @property
    def lrm(self) -> LocalReplacement:
        """The local replacement model of the prompt."""
        loaded = loaded_params(self.clt, self.clt_cfg)
        return local_replacement(self.params, loaded, self.recording, cfg=self.cfg)

    @property
    def meta(self) -> GraphMeta:
        """Meta data with made-up token strings."""
        tokens = tuple(f" t{i}" for i in self.token_T)
        targets = tuple(
            label or f" t{i}"
            for label, i in zip(
                self.targets.labels, self.targets.token_K.tolist(), strict=True
            )
        )
        return GraphMeta(
            model="tiny",
            dictionary="tiny",
            prompt="".join(tokens),
            tokens=tokens,
            target_tokens=targets,
            n_layers=self.cfg.n_layers,
        )

    def graph(
        self,
        config: AttributeConfig | None = None,
        *,
        active: Active | None = None,
        dictionary: Dictionary | None = None,
        stop: Callable[[], bool] = lambda: False,
        **more: Any,
    ) -> Graph:
        """The attribution graph of the prompt; all features unless `config` says.

        Args:
          config: how much to compute.
          active: features of another dictionary, or those of this one at hand.
          dictionary: that other one, for edges by response.
          stop: see `jaxclt.graph.prompt.Prompt`.
          **more: arguments of `jaxclt.graph.attribute.attribute_recording`.
        """
        every = AttributeConfig(max_features=None, tolerance=0.0, devices=1)
        prompt = Prompt(
            self.params,
            self.recording,
            self.active if active is None else active,
            self.targets,
            cfg=self.cfg,
            config=config or every,
            dictionary=dictionary or self.dictionary,
            stop=stop,
        )
        return attribute_recording(prompt, self.meta, **more)


@dataclasses.dataclass(frozen=True)
class TinyFamily:
    """Switches of a family: of its config and of its weights."""

    cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)


_LLAMA3 = RopeScaling(kind="llama3", factor=4.0, n_ctx=40)
_LINEAR = RopeScaling(kind="linear", factor=2.0)
# Windows and caps at which the switches matter on prompts of a few random tokens.
FAMILIES: dict[str, TinyFamily] = {
    "llama": TinyFamily(),
    "llama3": TinyFamily({"rope_scaling": _LLAMA3}),
    "mistral": TinyFamily({"window": 3}),
    "qwen3": TinyFamily({}, {"qk_norm": True}),
    "gemma2": TinyFamily(
        {
            "act": "gelu_tanh",
            "window": 3,
            "query_scale": 0.4,
            "attn_cap": 2.0,
        },
        {
            "post_norms": True,
            "local": (True, False),
            "embed_scale": 4.0,
            "logit_cap": 3.0,
        },
    ),
    "gemma3": TinyFamily(
        {
            "act": "gelu_tanh",
            "window": 2,
            "rope_scaling": _LINEAR,
            "rope_local_theta": 100.0,
        },
        {
            "qk_norm": True,
            "post_norms": True,
            "local": (True, True, False),
            "embed_scale": 4.0,
        },
    ),
    # Norms only after what is written, queries and keys normalised over all heads.
    "olmo3": TinyFamily(
        {"window": 3, "rope_local_theta": 100.0},
        {"joint_qk_norm": True, "pre_norms": False, "post_norms": True}
        | {"local": (True, False)},
    ),
    # Layers without rotary embeddings, gains of turned channels.
    "turned": TinyFamily(
        {"act": "gelu", "norm_turned": True},
        {"qk_norm": True, "gated": False, "turning": (True, False)},
    ),
    "gpt2": TinyFamily(
        {"act": "gelu_tanh", "d_rotary": 0},
        {"layer_norm": True, "gated": False, "positions": True},
    ),
    "neox": TinyFamily(
        {"act": "gelu", "d_rotary": 2, "parallel": True},
        {"layer_norm": True, "gated": False},
    ),
}

_init_clt = jit(random_clt, static_argnames=("cfg", "dtype", "biases", "skip"))


@partial(jit, static_argnames="cfg")
def _record(params: LMParams, token_T: Array, cfg: LMConfig) -> Recording:
    return record(params, token_T, cfg=cfg)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyOptions:
    """What a tiny model and its dictionary are like."""

    n_layers: int = 4
    n_kv_heads: int = 2  # 4 for plain attention, fewer for grouped queries
    n_tokens: int = 6  # of the prompt
    n_features: int = 20  # per layer
    span: int | None = None  # of decoders, None for a full CLT
    activation: str = "jumprelu"  # of the dictionary
    read: Any = "resid_mid"  # where it reads
    biases: bool = True  # in the model and the dictionary
    tied: bool = False  # share embedding and unembedding
    skip: bool = False  # give the dictionary a linear path
    family: str = "llama"  # whose switches the model has, a key of `FAMILIES`
    dtype: jnp.dtype | type = jnp.float32  # float64 needs jax's x64 mode


def tiny(seed: int = 0, **options: Any) -> Tiny:
    """Make a random model and dictionary from a seed.

    Args:
      seed: of everything random.
      **options: fields of `TinyOptions`.
    """
    o = TinyOptions(**options)
    key_lm, key_clt, key_tokens = jax.random.split(jax.random.key(seed), 3)
    cfg = LMConfig(
        n_layers=o.n_layers,
        d_model=16,
        n_heads=4,
        n_kv_heads=o.n_kv_heads,
        d_head=4,
        d_mlp=24,
        d_vocab=40,
        n_ctx=64,
        **FAMILIES[o.family].cfg,
    )
    parts = Parts(tied=o.tied, biases=o.biases, **FAMILIES[o.family].parts)
    for name in ("local", "turning"):
        if some := getattr(parts, name):  # again and again
            cycled = tuple(some[i % len(some)] for i in range(o.n_layers))
            parts = dataclasses.replace(parts, **{name: cycled})
    clt_cfg = CLTConfig(
        n_layers=o.n_layers,
        d_model=16,
        n_features=o.n_features,
        span=o.span or o.n_layers,
        activation=o.activation,
        k=4 if GATES[o.activation].competes else None,
        read=o.read,
    )
    params = random_lm(key_lm, cfg, parts, dtype=o.dtype)
    clt = _init_clt(key_clt, cfg=clt_cfg, dtype=o.dtype, biases=o.biases, skip=o.skip)
    token_T = jax.random.randint(key_tokens, (o.n_tokens,), 0, cfg.d_vocab, jnp.int32)
    recording = _record(params, token_T, cfg)
    return Tiny(
        cfg=cfg,
        params=params,
        clt_cfg=clt_cfg,
        clt=clt,
        token_T=token_T,
        recording=recording,
        targets=salient_targets(params, recording.out_TD[-1]),
    )
