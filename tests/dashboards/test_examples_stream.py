"""The streaming pass against dense activations and plain numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclt.clt.coder import Loaded, load
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.clt.subset import Subset
from jaxclt.dashboards import stream
from jaxclt.dashboards.examples import Examples, Excerpts
from jaxclt.dashboards.stream import ExampleOptions, gather_examples
from jaxclt.errors import InputError
from jaxclt.lm.run import record
from jaxclt.runs import kept
from jaxclt.testing.tiny import Tiny, tiny
from jaxclt.text.windows import TokenWindows

pytestmark = pytest.mark.usefixtures("x64")

W, S, C, BINS = 21, 12, 8, 10
NUMBERS: dict[str, Any] = {
    "top": 4,
    "drawn": 5,
    "excerpt": C,
    "bins": BINS,
    "batch_tokens": 4 * S,
    "histogram_every": 1,
}
KINDS = {
    "jumprelu": {},
    "relu": {"activation": "relu", "read": "mlp_in"},
    "topk": {"activation": "signed_topk", "read": "normalized"},
    "neurons": NeuronDictionary(),
    "neurons:3": NeuronDictionary(3),
    "neurons@2": NeuronDictionary(threshold=2.0),
}


@cache
def case(kind: str) -> tuple[Tiny, Loaded]:
    made = KINDS[kind]
    neurons = isinstance(made, NeuronDictionary)
    t = tiny(n_layers=3, dtype=jnp.float64, **({} if neurons else made))
    return t, load(made if neurons else t.dictionary, t.params, t.cfg)


@cache
def text() -> TokenWindows:
    """Windows of many lengths; first positions and some others do not count."""
    key_token, key_mask = jax.random.split(jax.random.key(5))
    token_WS = np.array(jax.random.randint(key_token, (W, S), 0, 40, "int32"))
    for window, length in ((3, 7), (8, 2), (9, 1), (20, 11)):
        token_WS[window, length:] = -1
    mask_WS = np.asarray(jax.random.bernoulli(key_mask, 0.9, (W, S))) & (token_WS >= 0)
    mask_WS[:, 0] = False
    return TokenWindows(token_WS, mask_WS)


@cache
def dense(kind: str) -> np.ndarray:
    """Activations [U, W, S] of all features, one window after the other."""
    t, encoder = case(kind)
    windows = text()

    @jax.jit
    def one(token_S: Any) -> Any:
        seen = record(t.params, token_S, cfg=t.cfg)
        layers = []
        for layer in range(t.cfg.n_layers):
            p = jax.tree.map(lambda x: x[layer], t.params.blocks)  # noqa: B023
            x = jax.tree.map(lambda x: x[layer], encoder.weights)  # noqa: B023
            scale_S = seen.frozen.mlp_scale_LT[layer]
            layers.append(encoder.layer(p, x, seen.mid_LTD[layer], scale_S))
        return jnp.stack(layers)

    a_WLSF = np.stack([one(np.maximum(row, 0)) for row in windows.token_WS])
    a_WLSF = np.where(windows.mask_WS[:, None, :, None], a_WLSF, 0)
    return a_WLSF.transpose(1, 3, 0, 2).reshape(-1, W, S)


@cache
def gathered(kind: str) -> Examples:
    t, encoder = case(kind)
    return gather_examples(t.params, encoder, text(), ExampleOptions(**NUMBERS))


def same(a: Any, b: Any, compare: Callable[..., None]) -> None:
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(x):
            same(x, y, compare)
        elif field.name == "sides":
            assert len(x) == len(y)
            for one, other in zip(x, y, strict=True):
                same(one, other, compare)
        else:
            compare(x, y, err_msg=field.name)


def bitwise(x: Any, y: Any, err_msg: str) -> None:
    assert np.asarray(x).dtype == np.asarray(y).dtype, err_msg
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), err_msg


def close(x: Any, y: Any, err_msg: str) -> None:
    np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12, err_msg=err_msg)


def check_excerpts(
    found: Excerpts, a_UWS: np.ndarray, peak_UWS: np.ndarray | None = None
) -> None:
    """Whatever the choice of windows: each is shown as it is, about its peak."""
    peak_UWS = a_UWS if peak_UWS is None else peak_UWS
    length_W = (text().token_WS >= 0).sum(1)
    for u in range(len(a_UWS)):
        windows = found.window_UE[u][found.window_UE[u] >= 0]
        assert len(set(windows.tolist())) == len(windows)
        for e, window in enumerate(found.window_UE[u].tolist()):
            if window < 0:
                assert found.value_UE[u, e] == 0
                assert not found.act_UEC[u, e].any()
                continue
            a_S = a_UWS[u, window]
            pos, start = int(found.pos_UE[u, e]), int(found.start_UE[u, e])
            assert pos == np.abs(peak_UWS[u, window]).argmax()
            assert start == np.clip(pos - C * 3 // 4, 0, max(length_W[window] - C, 0))
            close(found.value_UE[u, e], a_S[pos], "value")
            padded = np.pad(a_S, (0, C))[start : start + C]
            close(found.act_UEC[u, e], padded, "act")
        size = np.abs(found.value_UE[u])
        assert (np.diff(size) <= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_as_dense_activations_say(kind: str) -> None:
    found, a_UWS = gathered(kind), dense(kind)
    on_UWS = a_UWS != 0
    assert on_UWS.any()
    np.testing.assert_array_equal(found.count_U, on_UWS.sum((1, 2)))
    assert found.n_tokens == text().mask_WS.sum()
    low_U = np.where(on_UWS, a_UWS, np.inf).min((1, 2))
    high_U = np.where(on_UWS, a_UWS, -np.inf).max((1, 2))
    active_U = on_UWS.any((1, 2))
    close(found.min_U, np.where(active_U, low_U, 0), "min")
    close(found.max_U, np.where(active_U, high_U, 0), "max")
    fired_UW = np.unpackbits(found.fired_UW, axis=1, count=W, bitorder="little")
    np.testing.assert_array_equal(fired_UW, on_UWS.any(2))
    assert found.fired(0, 4) == on_UWS[0, 4].any()
    peak_UW = np.abs(a_UWS).max(2)
    for u, peak_W in enumerate(peak_UW):
        order = np.argsort(-peak_W, kind="stable")[:4]
        order = order[peak_W[order] > 0]
        top = found.top.window_UE[u]
        np.testing.assert_array_equal(top[top >= 0], order)
        drawn = found.drawn.window_UE[u][found.drawn.window_UE[u] >= 0]
        assert len(drawn) == min(5, (peak_W > 0).sum())
        assert (peak_W[drawn] > 0).all()
    check_excerpts(found.top, a_UWS)
    check_excerpts(found.drawn, a_UWS)


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_of_zero_have_their_best_windows(kind: str) -> None:
    """Each as if the other side were not; these top-k features have one in fact."""
    found, a_UWS = gathered(kind), dense(kind)
    signed = stream.is_signed(case(kind)[1])
    assert len(found.sides) == 2 * signed
    for sign, side in zip((1, -1), found.sides, strict=False):
        one_UWS = np.where(a_UWS * sign > 0, a_UWS, 0)
        for u, peak_W in enumerate(np.abs(one_UWS).max(2)):
            order = np.argsort(-peak_W, kind="stable")[:4]
            shown = side.window_UE[u][side.window_UE[u] >= 0]
            np.testing.assert_array_equal(shown, order[peak_W[order] > 0])
        assert (side.window_UE >= 0).any() or (kind, sign) == ("topk", -1)
        assert (side.value_UE * sign >= 0).all()
        check_excerpts(side, a_UWS, one_UWS)


@pytest.mark.parametrize("kind", KINDS)
def test_histograms_count_activations_in_ranges_that_doubled(kind: str) -> None:
    found, a_UWS = gathered(kind), dense(kind)
    for u, a_WS in enumerate(a_UWS):
        low, high = found.edge_U2[u]
        if not a_WS.any():
            assert low == high == 0
            assert not found.histogram_UB[u].any()
            continue
        assert high == 2.0 ** np.round(np.log2(high))
        assert high / 2 <= np.abs(a_WS).max() < high
        assert low == (-high if stream.is_signed(case(kind)[1]) else 0)
        count_B, _ = np.histogram(a_WS[a_WS != 0], BINS, (low, high))
        np.testing.assert_array_equal(found.histogram_UB[u], count_B)


def test_histograms_of_one_window_in_three() -> None:
    t, encoder = case("jumprelu")
    numbers = NUMBERS | {"histogram_every": 3}
    found = gather_examples(t.params, encoder, text(), ExampleOptions(**numbers))
    a_UWS = dense("jumprelu")
    np.testing.assert_array_equal(
        found.histogram_UB.sum(1), (a_UWS[:, ::3] != 0).sum((1, 2))
    )
    same(
        dataclasses.replace(
            found,
            histogram_every=1,
            histogram_UB=gathered("jumprelu").histogram_UB,
        ),
        gathered("jumprelu"),
        bitwise,
    )


@pytest.mark.parametrize(("kind", "windows"), [("jumprelu", 1), ("neurons", 40)])
def test_batches_do_not_matter(kind: str, windows: int) -> None:
    t, encoder = case(kind)
    numbers = NUMBERS | {"batch_tokens": windows * S}
    found = gather_examples(t.params, encoder, text(), ExampleOptions(**numbers))
    same(found, gathered(kind), close)


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "neurons:3"])
def test_a_subset_shows_what_all_features_show(kind: str) -> None:
    t, encoder = case(kind)
    whole = gathered(kind)
    F = encoder.n_features
    # Of layer 1 all, of layer 0 none.
    rows = [(1, f) for f in range(F)] + [(2, 3), (2, 19)]
    subset = Subset.of(np.asarray(rows), encoder)
    found = gather_examples(
        t.params, encoder, text(), ExampleOptions(**NUMBERS), subset=subset
    )
    of = np.asarray([layer * F + f for layer, f in rows])

    def part(x: Any) -> Any:
        if dataclasses.is_dataclass(x):
            values = {f.name: getattr(x, f.name)[of] for f in dataclasses.fields(x)}
            return Excerpts(**values)
        if isinstance(x, tuple):
            return tuple(map(part, x))
        return x[of] if isinstance(x, np.ndarray) else x

    wanted = {
        f.name: part(getattr(whole, f.name))
        for f in dataclasses.fields(whole)
        if f.name != "token_WS"
    }
    same(found, Examples(token_WS=whole.token_WS, **wanted), close)


def test_excerpts_longer_than_the_windows() -> None:
    t, encoder = case("jumprelu")
    found = gather_examples(
        t.params, encoder, text(), ExampleOptions(**NUMBERS | {"excerpt": 20})
    )
    a_UWS = dense("jumprelu")
    assert not found.top.start_UE.any()
    u, e = 7, 0
    window = found.top.window_UE[u, e]
    close(found.top.act_UEC[u, e], np.pad(a_UWS[u, window], (0, 8)), "act")


def test_shown_stops_where_the_text_stops() -> None:
    found = gathered("jumprelu")
    a_UWS = dense("jumprelu")
    u, e = next(
        (int(u), int(e))
        for u, e in zip(*np.nonzero(found.drawn.window_UE == 3), strict=True)
    )
    shown = found.shown(found.drawn, u, e, lambda ids: [f"t{i}" for i in ids])
    assert shown.window == 3
    assert shown.tokens == tuple(f"t{i}" for i in text().token_WS[3, :7])
    close(shown.acts, a_UWS[u, 3, :7], "acts")
    assert shown.peak == np.abs(a_UWS[u, 3]).argmax()


def test_the_sample_is_uniform_and_depends_on_the_seed_alone() -> None:
    """Neurons are active in every window: each is drawn with probability 5 / 20."""
    t, encoder = case("neurons")
    text_20 = text()
    usable = np.flatnonzero(text_20.mask_WS.any(1))
    drawn_W = np.zeros(W)
    n = 40
    for seed in range(n):
        found = gather_examples(
            t.params, encoder, text_20, ExampleOptions(seed=seed, **NUMBERS)
        )
        drawn_W += np.bincount(found.drawn.window_UE.ravel(), minlength=W)
    assert drawn_W[np.setdiff1d(np.arange(W), usable)].sum() == 0
    trials = n * len(found.layer_U)
    share = 5 / len(usable)
    # Draws without replacement: a chi-square with one degree less, shrunk by 1 - p.
    expected = trials * share
    chi2 = ((drawn_W[usable] - expected) ** 2).sum() / (expected * (1 - share))
    freedom = len(usable) - 1
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("kind", ["jumprelu", "neurons"])
def test_a_killed_pass_goes_on_bit_for_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "SAVE_S", 0.0)
    t, encoder = case(kind)
    calls: list[int] = []

    def die(done: int, total: int) -> None:
        calls.append(done)
        assert total == text().n_tokens
        if len(calls) in (2, 4):
            raise KilledError

    def go() -> Examples:
        return gather_examples(
            t.params,
            encoder,
            text(),
            ExampleOptions(**NUMBERS),
            state=tmp_path,
            on_tokens=die,
        )

    for _ in range(2):
        with pytest.raises(KilledError):
            go()
    same(go(), gathered(kind), bitwise)
    assert calls == sorted(calls)
    assert len(calls) == 9
    # Over: nothing is left to do.
    same(go(), gathered(kind), bitwise)
    assert calls[9:] == [text().n_tokens]


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    t, encoder = case("jumprelu")

    def go(identity: dict[str, Any], **changed: Any) -> Examples:
        options = ExampleOptions(**NUMBERS | changed)
        return gather_examples(
            t.params, encoder, text(), options, state=tmp_path, identity=identity
        )

    go({"model": "a"})
    with pytest.raises(InputError, match=r"differs in model \(a, not b\)"):
        go({"model": "b"})
    with pytest.raises(InputError, match=r"differs in n_top \(4, not 3\)"):
        go({"model": "a"}, top=3)
    (tmp_path / stream.STATE).write_bytes(b"x")
    with pytest.raises(InputError, match="cannot be read"):
        go({"model": "a"})


def test_memory_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    t, encoder = case("jumprelu")
    sizes = stream.Sizes(
        n_features=60,
        width=20,
        n_layers=3,
        n_windows=W,
        size=S,
        options=ExampleOptions(**NUMBERS),
        itemsize=8,
    )
    for sides in (2, 1):
        sizes = dataclasses.replace(sizes, sides=sides)
        seen = stream._nothing(sizes)
        held = sum(array.nbytes for array in seen.arrays().values())
        assert sizes.state_bytes == held
    monkeypatch.setattr(stream, "host_available_bytes", lambda: 10_000)
    with pytest.raises(InputError, match="lower --drawn, --top or --excerpt"):
        gather_examples(t.params, encoder, text(), ExampleOptions(**NUMBERS))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"top": 0}, "--top 0: give at least 1"),
        ({"excerpt": 0}, "--excerpt 0: give at least 1"),
        ({"bins": 7}, "--bins 7: give an even number"),
    ],
)
def test_numbers_out_of_range(changed: dict[str, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ExampleOptions(**NUMBERS | changed)
