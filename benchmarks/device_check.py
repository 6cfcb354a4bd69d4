"""One accelerator in ten minutes: is it exact there, does it fit as planned, how fast.

    python benchmarks/device_check.py --minutes 9 --append benchmarks/RESULTS.md
    python benchmarks/device_check.py --smoke

For a rented GPU or TPU; offline. Five parts (`--parts`), each in its own table:

- matmul: TFLOP/s of square matmuls by precision, the yardstick of all that follows.
- exact: the bundled model with its cross-layer dictionary, by precision: row error,
  features that are other ones than at the highest, what a patch of scale 1 (no change)
  does to logits, seconds.
- graphs: a model of Gemma-2-2B's shape with random weights and random dictionaries of
  16,384 features a layer, about 100 active (CLT and PLT), at several lengths, in
  float32 and by three passes of TF32 (six of bfloat16 on TPUs): seconds, row error,
  memory planned and held.
- train: tokens per second of a step, in float32 and bfloat16.

What fails says so in its row and the next one is begun; so does what there is no memory
or time for (`--minutes`).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A plan is of what JAX may use of a card: by default three quarters.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
import numpy as np
from _timing import (
    command_line,
    hardware_line,
    peak_rss_gib,
    publish,
    repeat,
    reset_peak_rss,
    timed,
    title,
)
from train_step import batch_of, objective, recipe_of, spec_of

import jaxclt
from jaxclt.clt.active import active_features
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.store import EncoderLayer
from jaxclt.clt.transcoder import StoreDictionary
from jaxclt.errors import InputError
from jaxclt.graph.attribute import AttributeConfig, Timing, attribute_recording
from jaxclt.graph.certificate import certificate
from jaxclt.graph.compute import memory_budget, plan_attribution
from jaxclt.graph.graph import Graph, GraphMeta
from jaxclt.graph.memory import host_available_bytes
from jaxclt.graph.prompt import Prompt
from jaxclt.graph.targets import salient_targets
from jaxclt.lm.config import LMConfig
from jaxclt.precision import at_precision, jit
from jaxclt.trace.assume import Assumed, plan_assumed
from jaxclt.trace.record import record_prompt
from jaxclt.train.params import init
from jaxclt.train.step import init_state, make_step, optimiser
from jaxclt.types import Block, LMParams

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "tests/goldens/circuit_tracer_clt"
SHAPE = HERE / "shapes/gemma-2-2b.json"
PARTS = ("matmul", "exact", "graphs", "train")
_RESERVED = 90  # seconds that graphs leave to training
Row = dict[str, Any]


def presets() -> list[str]:
    """Precisions of this machine, the highest first."""
    several = {"cpu": [], "tpu": ["BF16_BF16_F32_X6"]}
    both = ["TF32_TF32_F32_X3", "BF16_BF16_F32_X6"]
    return ["highest", *several.get(jax.default_backend(), both), "default"]


class Clock:
    """Time that is left, and rows of tables that say what became of each try."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def row(self, named: Row, needs_s: float, run: Callable[[], Row]) -> Row:
        """What a try found beside its name, or why it did not."""
        if self.left < needs_s:
            return named | {"": f"no time left (about {needs_s:.0f} s)"}
        print(f"{self.left:5.0f} s left: {named}", flush=True)
        begun = time.monotonic()
        try:
            found = run()
        except InputError as error:
            found = {"": str(error)}
        except KeyboardInterrupt:  # also what a graph that was stopped too early raises
            if self.left > _RESERVED:
                raise
            found = {"": "stopped: no time left"}
        except Exception as error:
            first = str(error).strip().partition("\n")[0][:150]
            found = {"": f"failed: {type(error).__name__}: {first}"}
        gc.collect()
        print(f"        {time.monotonic() - begun:.1f} s: {found}", flush=True)
        return named | found


def table(rows: list[Row]) -> str:
    """Rows under all names that any of them has; what has none is what went wrong."""
    names = dict.fromkeys(name for row in rows for name in row if name)
    columns = [*names, *([""] if any(row.get("") for row in rows) else [])]
    cells = [columns, ["---"] * len(columns)]
    cells += [[str(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


# -- matmul ----------------------------------------------------------------------------


def matmuls(clock: Clock, smoke: bool) -> list[Row]:
    n = 256 if smoke else 8192

    def speed(precision: str, dtype: str) -> Row:
        a, b = jax.random.normal(jax.random.key(0), (2, n, n), dtype)
        exact = np.asarray(a[:8], np.float64) @ np.asarray(b, np.float64)
        with at_precision(precision):
            product = jit(jnp.matmul)
            error = np.abs(np.asarray(product(a, b)[:8], np.float64) - exact).max()
            best = min(repeat(lambda: product(a, b), n=5).wall_s)
        return {
            "TFLOP/s": f"{2 * n**3 / best / 1e12:.2f}",
            "error": f"{error / np.abs(exact).max():.1e}",
        }

    tries = [*((name, "float32") for name in presets()), ("default", "bfloat16")]
    return [
        clock.row({"matmul": f"{dtype}, {p}"}, 10, lambda p=p, d=dtype: speed(p, d))
        for p, dtype in tries
    ]


# -- exact -----------------------------------------------------------------------------


def exact(clock: Clock, smoke: bool) -> list[Row]:
    """The bundled model; a golden one in small."""
    name, dictionary_name = "addition", "addition-clt"
    if smoke:
        name, dictionary_name = str(GOLDEN / "model"), str(GOLDEN / "dictionary")
        prompt = "w7 w31 w7 w55 w12 w90"
    else:
        from jaxclt.cli.demo import load_case

        prompt = load_case().prompt
    model = jaxclt.load_model(name)
    dictionary = jaxclt.load_dictionary(dictionary_name, model)
    kept: list[Graph] = []

    def features(graph: Graph) -> set[tuple[int, int, int]]:
        places = graph.layer_A, graph.pos_A, graph.feature_A
        return set(zip(*(x.tolist() for x in places), strict=True))

    def traced(precision: str) -> Row:
        with at_precision(precision):
            graph, first, _ = timed(
                lambda: jaxclt.attribute(model, dictionary, prompt, tolerance=0.0)
            )
            _, again, _ = timed(
                lambda: jaxclt.attribute(model, dictionary, prompt, tolerance=0.0)
            )
            a = int(graph.influence_N[graph.feature_cols].argmax())
            layer, pos, feature = (int(x) for x in graph.feature(a))
            moved = 0.0
            for mode in ("constrained", "iterative"):
                edit = jaxclt.Edit(layer=layer, pos=pos, feature=feature, scale=1.0)
                done = jaxclt.patch(model, dictionary, graph, [edit], mode=mode)
                for row in done.targets:
                    change = abs(row["logit_after"] - row["logit_before"])
                    moved = max(moved, change)
        kept.append(graph)
        return {
            "row error": f"{certificate(graph).max_relative_row_error:.1e}",
            "other features": f"{len(features(graph) ^ features(kept[0]))} of "
            f"{graph.n_features:,}",
            "patch of scale 1": f"{moved:.1e}",
            "first, s": f"{first:.1f}",
            "again, s": f"{again:.2f}",
        }

    return [
        clock.row({"precision": name}, 10 if smoke else 40, lambda n=name: traced(n))
        for name in (presets()[:1] if smoke else presets())
    ]


# -- graphs ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, and dictionaries for it."""

    cfg: LMConfig
    n_features: int
    threshold: float  # of pre-activations of variance 1
    active: int  # about as many pass it
    rows: int  # features attributed


GEMMA = Size(
    LMConfig(
        n_layers=26,
        d_model=2304,
        n_heads=8,
        n_kv_heads=4,
        d_head=256,
        d_mlp=9216,
        d_vocab=256_000,
        n_ctx=8192,
    ),
    n_features=16_384,
    threshold=2.51,
    active=100,
    rows=8192,
)
SMALL = Size(
    LMConfig(
        n_layers=3,
        d_model=64,
        n_heads=4,
        n_kv_heads=2,
        d_head=16,
        d_mlp=128,
        d_vocab=300,
        n_ctx=64,
    ),
    n_features=128,
    threshold=1.0,
    active=20,
    rows=64,
)


def random_params(cfg: LMConfig) -> LMParams:
    """Weights of variance 1 / fan-in, made leaf by leaf: no array is held twice."""
    L, D, H, G, C = cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape: int, fan_in: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * fan_in**-0.5

    blocks = Block(
        norm_attn_LD=jnp.ones((L, D)),
        q_LDHC=normal(L, D, H, C, fan_in=D),
        k_LDGC=normal(L, D, G, C, fan_in=D),
        v_LDGC=normal(L, D, G, C, fan_in=D),
        o_LHCD=normal(L, H, C, D, fan_in=H * C),
        norm_mlp_LD=jnp.ones((L, D)),
        gate_LDI=normal(L, D, cfg.d_mlp, fan_in=D),
        up_LDI=normal(L, D, cfg.d_mlp, fan_in=D),
        down_LID=normal(L, cfg.d_mlp, D, fan_in=cfg.d_mlp),
    )
    embed_VD = normal(cfg.d_vocab, D, fan_in=D)  # or one token would be certain
    return LMParams(embed_VD=embed_VD, blocks=blocks, norm_out_D=jnp.ones(D))


class RandomStore:
    """A dictionary of any size in little memory: its rows come from one small table.

    Encoders read the normed stream, whose pre-activations then have variance 1 whatever
    the model.
    """

    def __init__(self, size: Size, span: int) -> None:
        L, D, F = size.cfg.n_layers, size.cfg.d_model, size.n_features
        self.cfg = CLTConfig(
            n_layers=L,
            d_model=D,
            n_features=F,
            span=span,
            activation="jumprelu",
            read="normalized",
        )
        draw = jax.random.normal(jax.random.key(1), (F, D)) * D**-0.5
        self._table_FD = np.asarray(draw)
        self._theta_F = np.full(F, size.threshold, np.float32)

    def encoder(self, layer: int) -> EncoderLayer:
        W_FD = np.roll(self._table_FD, layer * 7, axis=1)
        return EncoderLayer(W_FD, np.zeros(len(W_FD), np.float32), self._theta_F)

    def decoder(self, layer: int, feature_A: np.ndarray | None = None) -> np.ndarray:
        F = len(self._table_FD)
        feature_A = np.arange(F) if feature_A is None else feature_A
        sites = np.arange(self.cfg.n_writes(layer))
        return self._table_FD[(feature_A[:, None] * 31 + 101 * sites + layer) % F]

    def b_dec(self) -> np.ndarray:
        return np.zeros((self.cfg.n_layers, self.cfg.d_model), np.float32)

    def skip(self, layer: int) -> None:
        del layer


def held_gb() -> float:
    """Most memory of the device so far; of a CPU, since it was last asked to forget."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is None:
        return peak_rss_gib() * 2**30 / 1e9
    return stats.get("peak_bytes_in_use", 0) / 1e9


def graphs(clock: Clock, smoke: bool) -> list[Row]:
    size = SMALL if smoke else GEMMA
    # What is likely to fit and quick comes first.
    tries = [("CLT", 10), ("PLT", 10), ("CLT", 50), ("PLT", 200), ("PLT", 1000)]
    tries += [("PLT", 50), ("CLT", 200), ("CLT", 1000)]
    tries = [("CLT", 6), ("PLT", 12)] if smoke else tries
    model: list[LMParams] = []
    rows = []

    def params() -> LMParams:
        if not model:
            model.append(random_params(size.cfg))
        return model[0]

    for kind, tokens in tries:
        span = size.cfg.n_layers if kind == "CLT" else 1
        named = {"dictionary": kind, "tokens": f"{tokens:,}"}
        prompts: list[Prompt] = []

        def of(precision: str, span=span, tokens=tokens, prompts=prompts) -> Row:
            if not prompts:
                if not smoke:
                    check_fits(size, span, tokens)
                prompts.append(recorded(params(), size, span, tokens, clock))
            return graph_row(prompts[0], precision)

        for precision in presets()[:2] if len(presets()) > 2 else presets()[:1]:
            name = named | {"precision": precision}
            rows.append(clock.row(name, _RESERVED + 45, lambda p=precision: of(p)))
    return rows


def check_fits(size: Size, span: int, tokens: int) -> None:
    """Raise InputError before gigabytes of rows are read for what has no room."""
    apart = jax.default_backend() != "cpu"
    host = int(host_available_bytes() / 1e9) if apart else None
    config = AttributeConfig(max_features=size.rows)
    plan_assumed(
        SHAPE,
        Assumed(
            tokens=tokens,
            active=size.active,
            features=size.n_features,
            span=span,
            host=host,
        ),
        config=config,
        budget=memory_budget(config),
    )


def recorded(
    params: LMParams, size: Size, span: int, tokens: int, clock: Clock
) -> Prompt:
    """A random prompt with its active features."""
    dictionary = StoreDictionary(RandomStore(size, span))  # pyright: ignore
    draw = jax.random.randint(jax.random.key(2), (tokens,), 0, size.cfg.d_vocab)
    recording = record_prompt(params, draw.astype(jnp.int32), size.cfg)
    active = active_features(dictionary, params, recording, size.cfg)
    return Prompt(
        params,
        recording,
        active,
        salient_targets(params, recording.out_TD[-1]),
        cfg=size.cfg,
        config=AttributeConfig(max_features=size.rows, tolerance=0.0),
        dictionary=dictionary,
        stop=lambda: clock.left < _RESERVED,
    )


def graph_row(p: Prompt, precision: str) -> Row:
    config = dataclasses.replace(p.config, precision=precision)
    p = dataclasses.replace(p, config=config)
    K, tokens = p.n_targets, tuple(f" t{i}" for i in p.recording.token_T.tolist())
    plan = plan_attribution(
        p.active, K, cfg=p.cfg, params=p.params, config=config, n_tokens=len(tokens)
    )
    meta = GraphMeta(
        model="random",
        dictionary="random",
        prompt="".join(tokens),
        tokens=tokens,
        target_tokens=tuple(f" o{k}" for k in range(K)),
        n_layers=p.cfg.n_layers,
    )
    timing = Timing()
    if jax.default_backend() == "cpu":
        reset_peak_rss()
    graph, first, _ = timed(lambda: attribute_recording(p, meta, timing=timing))
    attribute = timing.seconds["attribute"]
    return {
        "active": f"{len(p.active.layer_A):,}",
        "rows": f"{graph.attributed_R.sum():,}",
        "TFLOP": f"{timing.work.get('tflop', 0):.2f}",
        "edges, s": f"{attribute:.1f}",
        "whole graph, s": f"{first:.1f}",
        "row error": f"{certificate(graph).max_relative_row_error:.1e}",
        "sources": timing.work.get("sources", timing.work.get("direction")),
        "planned, GB": f"{plan.total / 1e9:.2f}",
        "held so far, GB": f"{held_gb():.2f}",
        **({"": "stopped early"} if "stopped" in timing.work else {}),
    }


# -- train -----------------------------------------------------------------------------


def train(clock: Clock, smoke: bool) -> list[Row]:
    sizes = [(1, 16_384, 4096), (8, 8192, 4096), (26, 2048, 4096)]
    d_model, sizes = (32, [(2, 64, 128)]) if smoke else (2304, sizes)
    rows = []
    for L, F, T in sizes:
        for compute in ("bfloat16", "float32"):

            def step_of(L=L, F=F, T=T, compute=compute) -> Row:
                job = {"L": L, "D": d_model, "F": F, "activation": "jumprelu"}
                spec = spec_of(job | {"compute": compute})
                shape = (2, L, T, d_model)
                read_LTD, write_LTD = jax.random.normal(jax.random.key(1), shape)
                batch = batch_of(read_LTD, write_LTD, F)
                tx = optimiser(1e-4)
                state = init_state(init(jax.random.key(0), spec), tx, jax.random.key(0))
                step = make_step(objective(), spec, tx, recipe_of("per_source"))

                def one() -> Any:
                    nonlocal state
                    state, metrics = step(state, batch)
                    return metrics["loss"]

                _, first, _ = timed(one)
                best = min(repeat(one, n=5, at_most_s=15).wall_s)
                return {
                    "first, s": f"{first:.1f}",
                    "step, s": f"{best:.3f}",
                    "tokens/s": f"{T / best:,.0f}",
                    "held so far, GB": f"{held_gb():.2f}",
                }

            named = {"layers": L, "features": f"{F:,}", "tokens": f"{T:,}"}
            needs = 1 if smoke else 30
            rows.append(clock.row(named | {"compute": compute}, needs, step_of))
    return rows


# -- all -------------------------------------------------------------------------------

_ABOUT = {
    "matmul": "Square matmuls of 8,192, the best of 5, and their largest error "
    "relative to the largest entry:",
    "exact": "The bundled model with its cross-layer dictionary:",
    "graphs": "Gemma-2-2B's shape, random float32 weights, 16,384 features a layer, "
    "at most 8,192 rows; programs that a row is the first to need are compiled in it. "
    "Planned and held are the device's, held is the most so far:",
    "train": "A training step of a dictionary of width 2,304 (cross-layer, JumpReLU, "
    "`--memory per_source`), the best of 5:",
}


def section(
    found: dict[str, list[Row]], args: argparse.Namespace, seconds: float
) -> str:
    lines = [title("device_check"), "", f"{hardware_line()}.", ""]
    if args.smoke:
        lines += ["Tiny sizes (`--smoke`), which say nothing of speed.", ""]
    for name, rows in found.items():
        lines += [_ABOUT[name], "", table(rows), ""]
    lines += [f"{seconds:.0f} s in all (`--minutes {args.minutes:g}`)."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="none begins after")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    args = parser.parse_args()
    begun = time.monotonic()
    clock = Clock(args.minutes)
    parts = {"matmul": matmuls, "exact": exact, "graphs": graphs, "train": train}
    found: dict[str, list[Row]] = {}
    for name in args.parts:
        try:
            found[name] = parts[name](clock, args.smoke)
        except Exception as error:
            found[name] = [{"": f"failed: {type(error).__name__}: {error}"}]
    publish(section(found, args, time.monotonic() - begun), args.append)
    if args.smoke:
        wrong = [row[""] for rows in found.values() for row in rows if row.get("")]
        if wrong:
            raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
