"""The numbers of the held and live lines, computed again in numpy (maths 16.11).

Nothing of the product is on this side: the bundled adder and its transcoder are run in
float64 from their weights, as a plain Llama, a real MLP or a dictionary at each layer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jaxclt
from jaxclt.patching.effects import Ask
from jaxclt.patching.how import How
from jaxclt.patching.subject import Subject
from jaxclt.validation.ablations import Bench, Counter
from jaxclt.validation.choice import ValidateOptions, choose
from jaxclt.validation.held_live import held_and_live
from jaxclt.validation.shown import Measure, shown

Array = np.ndarray


class Adder:
    """The model and its cross-layer transcoder on one prompt, in float64."""

    def __init__(self, model: Any, clt: Any, token_T: Array) -> None:
        def f64(x: Any) -> Array:
            return np.asarray(x, np.float64)

        b, self.cfg = model.params.blocks, model.cfg
        self.embed_VD, self.gain_D = (
            f64(model.params.embed_VD),
            f64(model.params.norm_out_D),
        )
        self.g1, self.g2 = f64(b.norm_attn_LD), f64(b.norm_mlp_LD)
        self.q, self.k, self.v = f64(b.q_LDHC), f64(b.k_LDGC), f64(b.v_LDGC)
        self.o, self.up, self.gate = f64(b.o_LHCD), f64(b.up_LDI), f64(b.gate_LDI)
        self.down, p = f64(b.down_LID), clt.params
        self.enc, self.b_enc = f64(p.W_enc_LFD), f64(p.b_enc_LF)
        self.theta, self.dec = f64(p.theta_LF), [f64(w) for w in p.W_dec]
        self.token_T, self.held = token_T, {}
        self.clean: dict[str, Any] = {}
        self.clean = self.run(lambda layer, mid, real: real(mid))
        self.active = []
        for layer, mid_TD in enumerate(self.clean["mid"]):
            pre_TF = mid_TD @ self.enc[layer].T + self.b_enc[layer]
            self.active.append(pre_TF * (pre_TF > self.theta[layer]))

    def scale(self, name: Any, x_TD: Array, *, hold: bool) -> Array:
        if not hold:
            return 1 / np.sqrt((x_TD**2).mean(-1) + self.cfg.norm_eps)
        return self.clean["scale"][name]

    def turn(self, x_THC: Array) -> Array:
        half = self.cfg.d_head // 2
        rate = self.cfg.rope_theta ** (-np.arange(half) / half)
        angle = (np.arange(len(x_THC))[:, None] * rate)[:, None]
        a, b = x_THC[..., :half], x_THC[..., half:]
        c, s = np.cos(angle), np.sin(angle)
        return np.concatenate([a * c - b * s, b * c + a * s], -1)

    def run(self, write: Any, *, norms: bool = False, patterns: bool = False) -> dict:
        """One pass; `write(layer, mid, real)` is what a layer's MLP writes.

        `norms` and `patterns`: whether they are those of the clean run.
        """
        x, out = self.embed_VD[self.token_T], {"mid": [], "write": [], "pattern": []}
        out["scale"] = scales = {}
        mask = np.tril(np.ones((len(x), len(x)), bool))
        for layer in range(self.cfg.n_layers):
            s = scales[layer, 1] = self.scale((layer, 1), x, hold=norms)
            n = x * s[:, None] * self.g1[layer]
            q, k = (
                self.turn(np.einsum("td,dhc->thc", n, w[layer]))
                for w in (self.q, self.k)
            )
            score = np.einsum("thc,shc->hts", q, k) / np.sqrt(self.cfg.d_head)
            score = np.where(mask, score, -np.inf)
            pattern = np.exp(score - score.max(-1, keepdims=True))
            pattern /= pattern.sum(-1, keepdims=True)
            if patterns:
                pattern = self.clean["pattern"][layer]
            v = np.einsum("td,dhc->thc", n, self.v[layer])
            z = np.einsum("hts,shc->thc", pattern, v)
            mid = x + np.einsum("thc,hcd->td", z, self.o[layer])
            s = scales[layer, 2] = self.scale((layer, 2), mid, hold=norms)

            def real(mid: Array, layer: int = layer, s: Array = s) -> Array:
                n = mid * s[:, None] * self.g2[layer]
                g = n @ self.gate[layer]
                return (g / (1 + np.exp(-g)) * (n @ self.up[layer])) @ self.down[layer]

            y = write(layer, mid, real)
            for name, value in (("mid", mid), ("write", y), ("pattern", pattern)):
                out[name].append(value)
            x = mid + y
        scales["out"] = self.scale("out", x, hold=norms)
        out["end"] = x[-1]
        out["logit"] = self.logits(x[-1], scales["out"][-1])
        return out

    def logits(self, end_D: Array, scale: float | None = None) -> Array:
        """Minus their mean."""
        if scale is None:
            scale = 1 / np.sqrt((end_D**2).mean() + self.cfg.norm_eps)
        logit_V = (end_D * scale * self.gain_D) @ self.embed_VD.T
        return logit_V - logit_V.mean()

    def change(self, done: dict) -> Array:
        return done["logit"] - self.clean["logit"]

    # What ablating the feature f of layer l at position t does to the logits:

    def clamped(self, l: int, t: int, f: int, *, norms: bool) -> Array:
        """A constrained patch: to where it writes, the last MLP left to answer."""
        last = max(l, min(l + 2, self.cfg.n_layers - 2))

        def write(layer: int, mid: Array, real: Any) -> Array:
            if layer < l:
                return self.clean["write"][layer]
            if layer > last:
                return real(mid)
            y = self.clean["write"][layer].copy()
            y[t] -= self.active[l][t, f] * self.dec[l][f, layer - l]
            return y

        return self.change(self.run(write, norms=norms, patterns=True))

    def replaced(self, l: int, t: int, f: int, *, norms: bool) -> dict:
        """The same in the local replacement model, its gates held."""
        moved: list[Array] = []

        def write(layer: int, mid: Array, real: Any) -> Array:
            pre = mid @ self.enc[layer].T + self.b_enc[layer]
            now = pre * (self.active[layer] != 0)
            if layer == l:
                now[t, f] = 0
            moved.append(now - self.active[layer])
            return self.clean["write"][layer] + sum(
                moved[m] @ self.dec[m][:, layer - m] for m in range(layer + 1)
            )

        return self.run(write, norms=norms, patterns=True)

    def derived(self, l: int, t: int, f: int, h: float = 1e-5) -> Array:
        """To first order in the model itself, everything live."""

        def nudged(by: float) -> Array:
            def write(layer: int, mid: Array, real: Any) -> Array:
                y = real(mid)
                if layer >= l:
                    y[t] += by * self.active[l][t, f] * self.dec[l][f, layer - l]
                return y

            return self.run(write)["logit"]

        return -(nudged(h) - nudged(-h)) / (2 * h)

    def last_norm(self, l: int, t: int, f: int, h: float = 1e-5) -> Array:
        """Norms held, but for the last one, which answers to first order."""
        end, moved = self.clean["end"], self.replaced(l, t, f, norms=True)["end"]
        step = h * (moved - end)
        return (self.logits(end + step) - self.logits(end - step)) / (2 * h)


def numbers(x: Array, y: Array) -> dict[str, float]:
    """The numbers of a line, in numpy and scipy."""
    large = np.abs(x) >= np.median(np.abs(x))
    x1, y1 = x.ravel(), y.ravel()
    return {
        "spearman": scipy.stats.spearmanr(x1, y1).statistic,
        "pearson": np.corrcoef(x1, y1)[0, 1],
        "sign": (np.sign(x) == np.sign(y))[large].mean(),
        "slope": np.linalg.lstsq(x1[:, None], y1, rcond=None)[0][0],
        "n": len(x),
    }


def shares_within_2(x: Array, y: Array) -> tuple[float, float]:
    """The least and the largest there can be, float32 logits being what they are."""
    slack = np.array([-5e-6, 5e-6])
    ratio = (y.ravel() + slack[:, None, None]) / (x.ravel() + slack[:, None])
    near = ((ratio >= 0.5) & (ratio <= 2)).reshape(4, -1)
    return near.all(0).mean(), near.any(0).mean()


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    model = jaxclt.load_model("addition")
    return model, jaxclt.load_dictionary("addition-clt", model)


@pytest.mark.parametrize(
    ("prompt", "n"),
    [
        ("calc: 7+5=", 5),
        *(
            pytest.param(f"calc: {a}+{b}=", 20, marks=pytest.mark.slow)
            for a, b in ((36, 59), (8, 90), (77, 25))
        ),
    ],
)
def test_every_number_of_both_lines(parts: tuple[Any, Any], prompt: str, n: int):
    model, clt = parts
    graph = jaxclt.attribute(model, clt, prompt, tolerance=0.0)
    options, key = ValidateOptions(n_features=n), jax.random.key(0)
    choice = choose(graph, options, None, key)
    bench = Bench(
        subject=Subject.of(model, clt, graph),
        options=options,
        choice=choice,
        key=key,
        counter=Counter(lambda done, planned: None, 1),
    )
    found = held_and_live(bench, bench.patch(bench.single, How()))

    adder = Adder(model, clt, graph.token_T)
    answer, foil = np.argsort(-adder.clean["logit"])[:2]
    assert graph.target_token_K.tolist() == [answer]  # one target, all but certain
    assert found["held"]["on"] == found["live"]["on"] == "contrast"
    names = model.tokenizer.token_strings([int(answer), int(foil)])
    assert found["contrast"] == f"logit({names[0]}) - logit({names[1]})"
    places = [
        (int(graph.layer_A[a]), int(graph.pos_A[a]), int(graph.feature_A[a]))
        for a in choice.node_B
    ]
    effects = {
        "held": [adder.clamped(*x, norms=True) for x in places],
        "live": [adder.clamped(*x, norms=False) for x in places],
        "value": [adder.change(adder.replaced(*x, norms=True)) for x in places],
        "local": [adder.change(adder.replaced(*x, norms=False)) for x in places],
        "derivative": [adder.derived(*x) for x in places],
        "last_norm": [adder.last_norm(*x) for x in places],
    }

    def on(what: str, name: str) -> Array:
        x_BV = np.array(effects[name])
        x_B = x_BV[:, answer] - (x_BV[:, foil] if what == "contrast" else 0)
        return x_B[:, None]

    def check(got: dict, by: str, kind: str, what: str, of: Any = slice(None)):
        pair = on(what, by)[of], on(what, kind)[of]
        want, (low, high) = numbers(*pair), shares_within_2(*pair)
        assert low - 1e-6 <= got["within_2"] <= high + 1e-6, (kind, by, what)
        assert high - low < 0.1
        assert got["n"] == want["n"]
        for key, value in want.items():
            assert got[key] == pytest.approx(value, abs=2e-3), (kind, by, what, key)

    for kind, by in (("held", "value"), ("live", "local")):
        line = found[kind]
        assert line["predicted_by"] == by
        check(line, by, kind, "contrast")
        for what in ("contrast", "targets"):
            check(line[what], by, kind, what)
        check(line["top"], by, kind, "contrast", ~choice.control_B)
        check(line["random"], by, kind, "contrast", choice.control_B)
    for by in ("value", "derivative", "last_norm"):
        check(found["live"][by], by, "live", "contrast")
        slope = numbers(on("targets", by), on("targets", "live"))["slope"]
        assert found["live"][by]["slope_on_targets"] == pytest.approx(slope, abs=2e-3)


def test_the_shown_graph_kept_alone_and_dropped_alone(parts: tuple[Any, Any]):
    """Necessity and sufficiency, maths 16.14."""
    model, clt = parts
    graph = jaxclt.attribute(model, clt, "calc: 7+5=", tolerance=0.0)
    subject, adder = Subject.of(model, clt, graph), Adder(model, clt, graph.token_T)
    answer, foil = np.argsort(-adder.clean["logit"])[:2]
    token_K = jnp.asarray([answer, foil], jnp.int32)
    ask = Ask(token_K, jnp.asarray(subject.n_tokens - 1, jnp.int32))
    measure = Measure(ask, np.array([1.0, -1.0]))
    found = shown(subject, measure, jax.random.key(0), n_random=2)

    mine = np.zeros((adder.cfg.n_layers, *adder.active[0].shape), bool)
    for a in np.flatnonzero(graph.pruning.keep_N[graph.feature_cols]):
        mine[graph.layer_A[a], graph.pos_A[a], graph.feature_A[a]] = True

    def m(held: Array, *, live: bool) -> float:
        moved: list[Array] = []

        def write(layer: int, mid: Array, real: Any) -> Array:
            now = adder.active[layer]
            if live:
                pre = mid @ adder.enc[layer].T + adder.b_enc[layer]
                now = pre * (pre > adder.theta[layer])
            moved.append(np.where(held[layer], 0, now) - adder.active[layer])
            return adder.clean["write"][layer] + sum(
                moved[m] @ adder.dec[m][:, layer - m] for m in range(layer + 1)
            )

        logit_V = adder.run(write, norms=not live, patterns=True)["logit"]
        return logit_V[answer] - logit_V[foil]

    for name, live in (("clamped", False), ("live", True)):
        sets = {"all": mine & False, "none": mine | True, "keep": ~mine, "drop": mine}
        want = {x: m(held, live=live) for x, held in sets.items()}
        got, made = found[name], want["all"] - want["none"]
        for x, value in want.items():
            assert got["m"][x] == pytest.approx(value, abs=2e-3), (name, x)
        enough = (want["keep"] - want["none"]) / made
        needed = (want["all"] - want["drop"]) / made
        assert got["sufficiency"] == pytest.approx(enough, abs=2e-3)
        assert got["necessity"] == pytest.approx(needed, abs=2e-3)
        if not live:
            assert enough == pytest.approx(needed, abs=1e-9)
