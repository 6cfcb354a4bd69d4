"""Models with a circuit put in by hand: what a graph should say of them is known.

Each is a small decoder of our own format whose weights are written down, not trained.
Three tricks make the format (RMSNorm, rotary attention, gated MLP) say what is meant:

- one channel, the ballast, holds 16384 in every token's embedding and nothing else
  reads or writes it: the norm's denominator is constant to 1e-7 and the gains undo it,
  so that every layer reads the stream as it is;
- a lookup unit reads z (1 where it applies, at most 1/2 elsewhere) in both of its
  factors, ``silu(160 (z - 3/4)) * z / 40``: z at z = 1, 0 to within 1e-16 up to 1/2;
- a ReLU unit reads in its gate only, ``silu(256 z) / 256``: ReLU to within 0.0011.

| member | circuit | the temptation |
|---|---|---|
| `two_hop` | token -> first hop -> second hop -> answer | a cross-layer feature that writes both hops leaves the second out (maths 19.15) |
| `absolute` | every coordinate: token -> its sign's unit -> its absolute value | one feature for a point that occurs often (*A Toy Model of Mechanistic (Un)Faithfulness*, 2025) |
| `induction` | value: token -> copy -> answer; why there: key, query | frozen patterns: by value the second half has no edges (Circuit Tracing 2025, section 7.1) |
"""  # noqa: E501  a table

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.clt.config import CLTConfig
from jaxclt.clt.store import ParamsStore
from jaxclt.clt.transcoder import StoreDictionary
from jaxclt.lm.config import LMConfig
from jaxclt.types import Block, CLTParams, LMParams

__all__ = [
    "Case",
    "Planted",
    "Unit",
    "absolute",
    "induction",
    "true_dictionary",
    "two_hop",
]

BALLAST = 16384.0
GATE, SHARP = 40.0, 256.0
LOGIT = 8.0  # of an answer, others are 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """One true variable: ``a = z 1[z > theta]`` with z = read · stream, writes a times.

    Units of one `node` are values of the same variable of the circuit (for example the
    first hop of different tokens).
    """

    node: str
    layer: int
    read_D: np.ndarray  # of the stream after attention
    write_D: np.ndarray  # to the output of the layer's MLP
    theta: float = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One prompt and the truth about it."""

    token_T: np.ndarray  # int32
    kind: str  # of prompt, where a member has several
    source: int  # position of the token whose value the answer comes from
    place: dict[str, tuple[int, int]]  # node -> (layer, position)
    answer: dict[str, int]  # name of a target -> its token
    swap_layer: int  # the swap: `swap_D` is added to the stream after attention there,
    swap_pos: int  # which replaces one value of a variable by another
    swap_D: np.ndarray
    # The same for what is asked for: in layer 0, at the last position.
    query_D: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planted:
    """A model, its circuit, and prompts.

    Edges are pairs (source, target) of node names; ``token`` is the embedding at
    `Case.source`, and the answers of a case are its targets.
    """

    name: str
    cfg: LMConfig
    params: LMParams
    units: tuple[Unit, ...]  # the model's own, one per neuron
    aliases: tuple[Unit, ...]  # other ways to state a node, counted as finding it
    edges: frozenset[tuple[str, str]]
    shortcuts: frozenset[tuple[str, str]]  # features write what a later node writes
    early: frozenset[tuple[str, str]]  # features read what an earlier node reads
    hidden: frozenset[tuple[str, str]]  # causal, but through an attention pattern
    train_PT: np.ndarray  # prompts as they occur, repetitions included
    cases: tuple[Case, ...]
    readout_K: np.ndarray  # tokens that can be answers


def true_dictionary(planted: Planted, *, span: int = 1) -> StoreDictionary:
    """The units as a transcoder: with `span` > 1 a CLT whose later writes are zero."""
    cfg, params = planted.cfg, planted.params
    L, D = cfg.n_layers, cfg.d_model
    dtype = params.embed_VD.dtype
    of_layer = [[u for u in planted.units if u.layer == l] for l in range(L)]
    F = max(map(len, of_layer))
    W_enc_LFD, theta_LF = np.zeros((L, F, D)), np.full((L, F), 0.75)
    W_dec = [np.zeros((F, min(span, L - l), D)) for l in range(L)]
    for l, units in enumerate(of_layer):
        for f, unit in enumerate(units):
            W_enc_LFD[l, f], theta_LF[l, f] = unit.read_D, unit.theta
            W_dec[l][f, 0] = unit.write_D
    clt = CLTParams(
        W_enc_LFD=jnp.asarray(W_enc_LFD, dtype),
        b_enc_LF=jnp.zeros((L, F), dtype),
        W_dec=tuple(jnp.asarray(W, dtype) for W in W_dec),
        b_dec_LD=jnp.zeros((L, D), dtype),
        theta_LF=jnp.asarray(theta_LF, dtype),
    )
    clt_cfg = CLTConfig(n_layers=L, d_model=D, n_features=F, span=span)
    return StoreDictionary(ParamsStore(clt, clt_cfg), name=f"true, span {span}")


# -- weights ---------------------------------------------------------------------------


class _Channels:
    """Named ranges of the residual stream; the ballast is channel 0."""

    def __init__(self, **sizes: int) -> None:
        self.start, at = {}, 1
        for name, size in sizes.items():
            self.start[name], at = at, at + size
        self.D = at

    def one(self, name: str, i: int) -> np.ndarray:
        """Unit vector of channel i of a range."""
        out_D = np.zeros(self.D)
        out_D[self.start[name] + i] = 1
        return out_D


def _weights(cfg: LMConfig) -> dict[str, np.ndarray]:
    """Leaves of a block that does nothing: attention moves and MLPs write zeros."""
    L, D, C, I = cfg.n_layers, cfg.d_model, cfg.d_head, cfg.d_mlp
    return {
        "norm_attn_LD": np.full((L, D), BALLAST / D**0.5),
        "q_LDHC": np.zeros((L, D, 1, C)),
        "k_LDGC": np.zeros((L, D, 1, C)),
        "v_LDGC": np.zeros((L, D, 1, C)),
        "o_LHCD": np.zeros((L, 1, C, D)),
        "norm_mlp_LD": np.full((L, D), BALLAST / D**0.5),
        "gate_LDI": np.zeros((L, D, I)),
        "up_LDI": np.zeros((L, D, I)),
        "down_LID": np.zeros((L, I, D)),
        "q_bias_LHC": np.zeros((L, 1, C)),
        "k_bias_LGC": np.zeros((L, 1, C)),
        "gate_bias_LI": np.zeros((L, I)),
        "up_bias_LI": np.zeros((L, I)),
    }


def _write_units(w: dict[str, np.ndarray], units: list[Unit], *, relu: bool) -> None:
    """Put units into the MLPs, one neuron each, in their order."""
    used: dict[int, int] = {}
    for unit in units:
        l = unit.layer
        i = used[l] = used.get(l, -1) + 1
        w["down_LID"][l, i] = unit.write_D
        if relu:
            w["gate_LDI"][l, :, i] = SHARP * unit.read_D
            w["up_bias_LI"][l, i] = 1 / SHARP
        else:
            w["gate_LDI"][l, :, i] = 4 * GATE * unit.read_D
            w["gate_bias_LI"][l, i] = -3 * GATE
            w["up_LDI"][l, :, i] = unit.read_D / GATE


def _model(
    w: dict[str, np.ndarray], embed_VD: np.ndarray, unembed_DV: np.ndarray, dtype: Any
) -> LMParams:
    embed_VD[:, 0] = BALLAST
    D = embed_VD.shape[1]
    return LMParams(
        embed_VD=jnp.asarray(embed_VD, dtype),
        blocks=Block(**{name: jnp.asarray(x, dtype) for name, x in w.items()}),
        norm_out_D=jnp.full((D,), BALLAST / D**0.5, dtype),
        unembed_DV=jnp.asarray(unembed_DV, dtype),
    )


def _config(
    D: int, *, n_layers: int, d_mlp: int, d_vocab: int, d_head: int = 2
) -> LMConfig:
    return LMConfig(
        n_layers=n_layers,
        d_model=D,
        n_heads=1,
        n_kv_heads=1,
        d_head=d_head,
        d_mlp=d_mlp,
        d_vocab=d_vocab,
        n_ctx=16,
    )


# -- members ---------------------------------------------------------------------------


def two_hop(
    n_first: int = 24, n_second: int = 6, *, dtype: jnp.dtype | type = jnp.float32
) -> Planted:
    """A fact of a fact: layer 0 looks up b of token a, layer 1 looks up c of b.

    Token i < n_first has ``b = i mod n_second``, and ``c = b + 1 mod n_second``. There
    is a unit for every token in layer 0, for every b in layer 1. Prompts are one token,
    all equally often, so a second hop is never seen without its first: on them a
    dictionary cannot tell A -> C from A -> B -> C, but a change of b can.

    Args:
      n_first: tokens a.
      n_second: values of b, and answers.
      dtype: float64 needs jax's x64 mode.
    """
    ch = _Channels(a=n_first, b=n_second, c=n_second)
    V = n_first + n_second
    cfg = _config(ch.D, n_layers=2, d_mlp=n_first, d_vocab=V)
    a, b, c = ([ch.one(x, i) for i in range(V) if i < n] for x, n in (
        ("a", n_first), ("b", n_second), ("c", n_second)))  # fmt: skip
    units = [
        Unit(node="first", layer=0, read_D=a[i], write_D=b[i % n_second])
        for i in range(n_first)
    ]
    units += [
        Unit(node="second", layer=1, read_D=b[j], write_D=c[(j + 1) % n_second])
        for j in range(n_second)
    ]
    classes = [
        Unit(
            node="first",
            layer=0,
            read_D=np.sum(a[j::n_second], axis=0),
            write_D=b[j],
        )
        for j in range(n_second)
    ]
    w = _weights(cfg)
    _write_units(w, units, relu=False)
    embed_VD, unembed_DV = np.zeros((V, ch.D)), np.zeros((ch.D, V))
    embed_VD[:n_first] = a
    unembed_DV[:, n_first:] = LOGIT * np.stack(c, axis=1)
    cases = tuple(
        Case(
            token_T=np.array([i], np.int32),
            kind="",
            source=0,
            place={"first": (0, 0), "second": (1, 0)},
            answer={"answer": n_first + (i + 1) % n_second},
            swap_layer=1,
            swap_pos=0,
            swap_D=b[(i + 1) % n_second] - b[i % n_second],
        )
        for i in range(n_first)
    )
    return Planted(
        name="two hops",
        cfg=cfg,
        params=_model(w, embed_VD, unembed_DV, dtype),
        units=tuple(units),
        aliases=tuple(classes),
        edges=frozenset(
            {("token", "first"), ("first", "second"), ("second", "answer")}
        ),
        shortcuts=frozenset({("first", "answer")}),
        early=frozenset({("token", "second")}),
        hidden=frozenset(),
        train_PT=np.arange(n_first, dtype=np.int32)[:, None],
        cases=cases,
        readout_K=np.arange(n_first, V),
    )


def absolute(
    n: int = 5,
    n_points: int = 400,
    *,
    often: float = 0.5,
    seed: int = 0,
    dtype: jnp.dtype | type = jnp.float32,
) -> Planted:
    """The absolute value of every coordinate, and a point that occurs often.

    Token i < n_points embeds a point x ~ N(0, 1)^n; answers y_0.. have logits
    ``8 |x_0|`` and so on. The MLP has ReLU(x_i) and ReLU(-x_i). Token 0 is `often` of
    the training prompts: one feature for it alone is cheaper than the n units that
    its coordinates use.

    Args:
      n: coordinates.
      n_points: tokens that embed points.
      often: share of prompts that are token 0.
      seed: of the points.
      dtype: float64 needs jax's x64 mode.
    """
    ch = _Channels(x=n, y=n)
    V = n_points + n
    cfg = _config(ch.D, n_layers=1, d_mlp=2 * n, d_vocab=V)
    point_PN = np.asarray(jax.random.normal(jax.random.key(seed), (n_points, n)))
    # No coordinate of the frequent point is nearly zero: each has its unit on.
    point_PN = np.array(point_PN, np.float64)
    point_PN[0] = np.sign(point_PN[0]) * (0.5 + np.abs(point_PN[0]))
    units = [
        Unit(
            node=f"x{i}",
            layer=0,
            read_D=sign * ch.one("x", i),
            write_D=ch.one("y", i),
            theta=0.0,
        )
        for i in range(n)
        for sign in (1, -1)
    ]
    w = _weights(cfg)
    _write_units(w, units, relu=True)
    embed_VD, unembed_DV = np.zeros((V, ch.D)), np.zeros((ch.D, V))
    embed_VD[:n_points, 1 : 1 + n] = point_PN
    for i in range(n):
        unembed_DV[:, n_points + i] = LOGIT * ch.one("y", i)
    largest = np.abs(point_PN).argmax(1)
    cases = tuple(
        Case(
            token_T=np.array([p], np.int32),
            kind="memorised" if p == 0 else "elsewhere",
            source=0,
            place={f"x{i}": (0, 0) for i in range(n)},
            answer={f"y{i}": n_points + i for i in range(n)},
            swap_layer=0,
            swap_pos=0,
            swap_D=-point_PN[p, largest[p]] * ch.one("x", largest[p]),
        )
        for p in range(n_points)
    )
    times = round(often / (1 - often) * (n_points - 1))
    return Planted(
        name="|x|",
        cfg=cfg,
        params=_model(w, embed_VD, unembed_DV, dtype),
        units=tuple(units),
        aliases=(),
        edges=frozenset(
            edge for i in range(n) for edge in (("token", f"x{i}"), (f"x{i}", f"y{i}"))
        ),
        shortcuts=frozenset(
            (f"x{i}", f"y{j}") for i in range(n) for j in range(n) if i != j
        ),
        early=frozenset(),
        hidden=frozenset(),
        train_PT=np.repeat(
            np.arange(n_points, dtype=np.int32), [times] + [1] * (n_points - 1)
        )[:, None],
        cases=cases,
        readout_K=np.arange(n_points, V),
    )


def induction(
    n: int = 8,
    n_tokens: int = 8,
    *,
    soft: bool = False,
    n_prompts: int = 256,
    seed: int = 0,
    dtype: jnp.dtype | type = jnp.float32,
) -> Planted:
    """``a b ... a`` is answered by b, by a previous-token head and an induction head.

    Layer 0 attends to the token before, and its MLP turns that into a key and the token
    itself into a query; layer 1's queries find the key, its values bring the token
    found there, and its MLP copies that to the answer. Prompts: a first token that is
    nothing, distinct tokens, then one of them again.

    Args:
      n: tokens of the alphabet; token n is the first of every prompt.
      n_tokens: length of a prompt, n_tokens - 2 <= n and at most 16.
      soft: the induction head scores what it looks for 3 instead of 40, and units are
        ReLU: a small change of key or query then has a small effect, where 40 leaves a
        softmax without a derivative, and lookups copy a little of nothing.
      n_prompts: how many, different ones.
      seed: of the prompts.
      dtype: float64 needs jax's x64 mode.
    """
    ch = _Channels(token=n, previous=n, key=n, query=n, found=n, out=n)
    C = 4 * n  # half of the pairs turn too fast to carry what a token is
    cfg = _config(ch.D, n_layers=2, d_mlp=2 * n, d_vocab=n + 1, d_head=C)
    one = {x: [ch.one(x, i) for i in range(n)] for x in ch.start}
    units = [
        Unit(
            node=node,
            layer=layer,
            read_D=one[read][i],
            write_D=one[write][i],
            theta=0.0 if soft else 0.75,
        )
        for node, layer, read, write in (
            ("key", 0, "previous", "key"),
            ("query", 0, "token", "query"),
            ("copy", 1, "found", "out"),
        )
        for i in range(n)
    ]
    w = _weights(cfg)
    _write_units(w, units, relu=soft)
    for i in range(n):
        token = ch.start["token"] + i
        w["v_LDGC"][:, token, 0, i] = 1
        w["o_LHCD"][0, 0, i] = one["previous"][i]
        w["o_LHCD"][1, 0, i] = one["found"][i]
        # Content goes to the slow half of the rotary pairs.
        slow = C // 2 - n + i
        query = ch.start["query"] + i
        w["q_LDHC"][1, query, 0, slow] = (3 if soft else 40) * C**0.5
        w["k_LDGC"][1, ch.start["key"] + i, 0, slow] = 1
    # Position alone: a query turned back by one step matches the key one step before.
    rate = cfg.rope_theta ** (-2 * np.arange(C // 2) / C)
    for pair in (0, C // 16):
        k = np.array([1.0, 0.0])
        turn = -rate[pair]
        q = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]] @ k
        w["q_bias_LHC"][0, 0, [pair, pair + C // 2]] = 60 * C**0.5 * q
        w["k_bias_LGC"][0, 0, [pair, pair + C // 2]] = k
    embed_VD, unembed_DV = np.zeros((n + 1, ch.D)), np.zeros((ch.D, n + 1))
    embed_VD[:n] = one["token"]
    unembed_DV[:, :n] = LOGIT * np.stack(one["out"], axis=1)
    prompts = _induction_prompts(n, n_tokens, n_prompts, seed)
    last = n_tokens - 1
    cases = []
    for token_T in prompts:
        first = int(np.flatnonzero(token_T[:last] == token_T[last])[0])
        answer = int(token_T[first + 1])
        other = token_T[1 if first > 1 else 2]
        cases.append(
            Case(
                token_T=token_T,
                kind="",
                source=first + 1,
                place={"key": (0, first + 1), "query": (0, last), "copy": (1, last)},
                answer={"answer": answer},
                swap_layer=1,
                swap_pos=last,
                swap_D=one["found"][(answer + 1) % n] - one["found"][answer],
                query_D=one["token"][other] - one["token"][token_T[last]],
            )
        )
    return Planted(
        name="soft induction" if soft else "induction",
        cfg=cfg,
        params=_model(w, embed_VD, unembed_DV, dtype),
        units=tuple(units),
        aliases=(),
        edges=frozenset({("token", "copy"), ("copy", "answer")}),
        shortcuts=frozenset({("key", "answer")}),
        early=frozenset(),
        hidden=frozenset({("key", "copy"), ("query", "copy")}),
        train_PT=prompts,
        cases=tuple(cases),
        readout_K=np.arange(n),
    )


def _induction_prompts(n: int, T: int, n_prompts: int, seed: int) -> np.ndarray:
    """Different prompts [P, T]: token n, distinct tokens, one of them again."""
    # Drawn as numbers and sorted on the host: jax's permutation takes long to compile.
    drawn_PN = np.asarray(
        jax.random.uniform(jax.random.key(seed), (2 * n_prompts, n + 1))
    )
    order_PT = np.argsort(drawn_PN[:, :n], axis=1)[:, : T - 2]
    which_P = (drawn_PN[:, n] * (T - 3)).astype(int)
    last_P = order_PT[np.arange(len(which_P)), which_P]
    prompt_PT = np.column_stack([np.full(len(which_P), n), order_PT, last_P])
    _, first_P = np.unique(prompt_PT, axis=0, return_index=True)
    return prompt_PT[np.sort(first_P)[:n_prompts]].astype(np.int32)
