"""Text, windows, activations, normalisation and chunks."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny_config, tiny_model, write_text
from transcoder import decode, encode

from jaxclt.errors import InputError
from jaxclt.io.model import load_model
from jaxclt.lm.run import record
from jaxclt.text.corpus import (
    Windows,
    cut_windows,
    pack_windows,
    read_documents,
    split_documents,
)
from jaxclt.train import chunks as chunking
from jaxclt.train.chunks import ChunkConfig, Chunks, Position, window_order
from jaxclt.train.dryrun import estimate
from jaxclt.train.export import calibrate, threshold_form
from jaxclt.train.harvest import harvest, mlp_response
from jaxclt.train.normalise import (
    Moments,
    Scales,
    between,
    fold,
    merge_moments,
    normalise,
    scales_of,
)
from jaxclt.train.params import Spec, init, to_clt
from jaxclt.train.prepare import fitted
from jaxclt.train.trainer import train


def test_documents_of_every_kind(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}\n')
    (tmp_path / "c.pdf").write_text("not text")
    assert list(read_documents(tmp_path)) == ["one", "two", "three", "four"]
    long = ("x" * 90 + "\n") * 500
    (tmp_path / "a.txt").write_text(long)
    pieces = list(read_documents(tmp_path / "a.txt"))
    assert len(pieces) > 2
    assert "\n".join(pieces) == long.strip()
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"body": 1}\n')
    with pytest.raises(InputError, match=r"b\.jsonl:2: each line must be"):
        list(read_documents(tmp_path))
    with pytest.raises(InputError, match="no file ends in"):
        list(read_documents(tmp_path / "c.pdf"))


def test_a_short_context_reads_short_texts(tmp_path: Path):
    """As the bundled model's, whose sums have eight tokens."""
    tokenizer = tiny_model().tokenizer
    sums = ["w3 w4 w5", "w6", "w7 w8 w9 w10"]
    token_WS = pack_windows(sums, tokenizer, size=16, n_tokens=99)
    first = tokenizer.encode("w3 w4 w5")
    assert token_WS[0].tolist() == first + [-1] * (16 - len(first))
    assert len(token_WS) == 2  # nothing of the other one would be trained on
    for size in (17, 64):
        with pytest.raises(InputError, match="no document of 16 tokens"):
            pack_windows(sums, tokenizer, size=size, n_tokens=99)


def test_a_run_that_does_not_fit_the_model_is_refused_at_once(tmp_path: Path):
    model, out = tiny_model(), tmp_path / "run"
    text, long_WS = write_text(tmp_path / "text", 2), np.full((9, 65), 5)
    for data, config, message in (
        (text, tiny_config(context=65), "--context 65: the model takes at most 64"),
        ("model", tiny_config(context=65), "--context 65: the model takes at most"),
        (text, tiny_config(context=1), "--context 1: windows need at least 2"),
        (Windows.of(long_WS, long_WS), tiny_config(), "has 65 tokens, the model"),
        (
            Windows.of(long_WS[:, :9] + 95, long_WS[:, :9]),
            tiny_config(),
            r"not in 0\.\.96",
        ),
        (
            text,
            tiny_config(graph_features=9, prompts=("w3", "w3 " * 65)),
            "--prompts 'w3 .*': the prompt has 65 tokens",
        ),
    ):
        with pytest.raises(InputError, match=message) as error:
            train(model, data, out, config)
        assert len(str(error.value)) <= 300
        assert not out.exists()
    with pytest.raises(InputError, match="--context 65: the model takes at most 64"):
        estimate(tiny_config(context=65), model.cfg, {"data": 1, "feature": 1}, peak=1)
    # prompts that come with the recipe are left out where they do not fit
    short = dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, n_ctx=7))
    config = tiny_config(context=7, graph_features=9)
    assert len(config.prompts) == 3
    kept = fitted(config, short, None).prompts
    assert kept == tuple(p for p in config.prompts if len(p.split()) <= 7)
    assert 0 < len(kept) < 3


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # orbax's threads
def test_the_bundled_model_can_be_trained_on(tmp_path: Path):
    """At the flags' own prompts, none of which it has room for."""
    sums = [f"calc: {a}+{b}={a + b}" for a in range(40) for b in range(40)]
    (tmp_path / "sums.txt").write_text("<|endoftext|>".join(sums))
    config = tiny_config(context=16, graph_features=64, checkpoint_every=99)
    card = train(load_model("addition"), tmp_path / "sums.txt", tmp_path / "r", config)
    assert card["metrics"]["fvu"] < 1
    assert "graphs" not in card["metrics"]


def test_held_out_documents_are_never_trained_on():
    documents = [f"document {i}" for i in range(100)]
    train, held = split_documents(iter(documents + documents[:10]), None, 0.2)
    assert len(held) == 20
    assert sorted(train + held) == sorted(documents)  # and copies are dropped
    again = split_documents(iter(documents[::-1]), None, 0.2)
    assert again == (train, held)
    train, held = split_documents(iter(documents), iter([*documents[:3], "x"]), 0.2)
    assert set(held) == {*documents[:3], "x"}
    assert not set(held) & set(train)
    with pytest.raises(InputError, match="has 1 documents"):
        split_documents(iter(["one"]), None, 0.5)


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Windows:
    folder = write_text(tmp_path_factory.mktemp("text"))
    train, held = split_documents(read_documents(folder), None, 0.1)
    return cut_windows(
        train,
        held,
        tiny_model().tokenizer,
        size=32,
        train_tokens=3000,
        held_tokens=200,
    )


def test_windows_hold_the_text_and_leave_out_what_is_special(windows: Windows):
    W, S = windows.train_WS.shape
    assert S == 32
    assert 3000 / 31 <= W < 200
    token_WS = np.array([[5, 6, 1, 7, -1, -1], [0, 8, 9, 2, 3, 4]])
    valid = Windows.of(token_WS, token_WS, special={0, 1, 2}).valid(token_WS)
    np.testing.assert_array_equal(valid, [[0, 1, 0, 1, 0, 0], [0, 1, 1, 0, 1, 1]])


CONFIG = ChunkConfig(chunk_tokens=256, reuse=2, dtype="float32", site="mlp_in")


def make(
    windows: Windows, store: Path | None = None, spool: Path | None = None, **more
) -> Chunks:
    config = dataclasses.replace(CONFIG, **more)
    found = Chunks(tiny_model(), windows, config, store=store, spool=spool)
    found.normalisation(600)
    return found


@pytest.mark.parametrize("site", ["resid_mid", "normalized", "mlp_in"])
def test_harvest_is_what_record_says(windows: Windows, site):
    model = tiny_model()
    token_WS = windows.train_WS[:3].copy()
    token_WS[1, 20:] = -1
    read, write, norm = harvest(
        model.params, jnp.asarray(token_WS), None, cfg=model.cfg, site=site
    )
    rec = jax.jit(partial(record, cfg=model.cfg))
    for w in range(3):
        n = 20 if w == 1 else 32
        one = rec(model.params, jnp.asarray(np.maximum(token_WS[w], 0)))
        want = np.asarray(one.mid_LTD)
        if site != "resid_mid":
            want = want * np.asarray(one.frozen.mlp_scale_LT)[..., None]
        if site == "mlp_in":
            want = want * np.asarray(model.params.blocks.norm_mlp_LD)[:, None]
        here = slice(32 * w, 32 * w + n)
        np.testing.assert_allclose(read[:, here], want[:, :n], atol=1e-5)
        np.testing.assert_allclose(write[:, here], one.write_LTD[:, :n], atol=1e-5)
        size = np.linalg.norm(one.write_LTD[:, :n], axis=-1)
        np.testing.assert_allclose(norm[:, here], size, rtol=1e-4)


def test_moments_merge_to_those_of_everything():
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 90, 5))) * 3 + 100
    merged = None
    for part in np.split(x, [7, 40], axis=1):
        merged = merge_moments(merged, Moments.of(part))
    assert merged is not None
    np.testing.assert_allclose(merged.mean_LD, x.mean(1, dtype=np.float64))
    scales = scales_of(merged, merged, np.ones(2))
    np.testing.assert_allclose(
        scales.read_scale_L, np.sqrt(x.var(1, dtype=np.float64).mean(1)), rtol=1e-6
    )


def test_chunks_are_normalised_training_rows(windows: Windows):
    made = make(windows)
    assert made.scales is not None
    read = np.asarray(made.rows(0, 0)[0])
    order = window_order(0, len(windows.train_WS), 0, made.windows_per_chunk)
    token_WS = windows.train_WS[order]
    assert read.shape[1] == windows.valid(token_WS).sum()
    raw, *_ = harvest(
        made.params, jnp.asarray(token_WS), None, cfg=made.cfg, site="mlp_in"
    )
    s = made.scales
    scaled = (raw - s.read_mean_LD[:, None]) / s.read_scale_L[:, None, None]
    keep = np.flatnonzero(windows.valid(token_WS))
    # the same rows in another order, the same order in every layer
    rows = np.asarray(scaled)[:, keep]
    place = [np.abs(rows[0] - row).sum(1).argmin() for row in read[0]]
    assert sorted(place) == list(range(len(keep)))
    assert place != sorted(place)
    np.testing.assert_allclose(read, rows[:, place], atol=1e-5)


def test_the_normalisation_is_of_the_first_chunks(windows: Windows):
    """Float64 statistics of the model's activations, whatever chunks are held in."""
    made = make(windows)
    W = made.windows_per_chunk
    order = window_order(0, len(windows.train_WS), 0, 3 * W)  # 3 chunks hold 600 tokens
    token_WS = windows.train_WS[order]
    raw = harvest(made.params, jnp.asarray(token_WS), None, cfg=made.cfg, site="mlp_in")
    s, units = made.scales, made.units
    assert s is not None
    assert units is not None
    fits = (np.asarray(raw[2]) <= np.asarray(s.bound_L)[:, None]).all(0)
    keep = np.flatnonzero(windows.valid(token_WS).ravel() & fits)
    assert 600 <= len(keep) < 3 * 256
    for x, mean_LD, scale_L in (
        (raw[0], s.read_mean_LD, s.read_scale_L),
        (raw[1], s.write_mean_LD, s.write_scale_L),
    ):
        x = np.asarray(x, np.float64)[:, keep]
        np.testing.assert_allclose(mean_LD, x.mean(1), atol=1e-5)
        np.testing.assert_allclose(scale_L, np.sqrt(x.var(1).mean(1)), rtol=1e-5)
    assert np.abs(np.asarray(s.write_scale_L / units.write_scale_L) - 1).max() > 0.005


def test_between_leads_from_one_normalisation_to_the_other():
    L, D = 2, 5
    a, b = random_scales(L, D), random_scales(L, D, seed=9)
    x, y = jax.random.normal(jax.random.key(1), (2, L, 7, D)) * 3
    got = normalise(between(a, b), *normalise(a, x, y))
    for one, other in zip(got, normalise(b, x, y), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_nothing_is_harvested_twice(
    windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The spool keeps what the normalisation looked at until it is trained on."""
    harvested, real = [], chunking.harvest

    def counting(params, token_WS, scales, **kw):
        harvested.extend(bytes(row) for row in np.asarray(token_WS) if row[0] >= 0)
        return real(params, token_WS, scales, **kw)

    monkeypatch.setattr(chunking, "harvest", counting)
    spool = tmp_path / "spool"
    made = make(windows, spool=spool, dtype="bfloat16")
    names = {f.stem for f in spool.glob("*.safetensors")}
    assert names == {"chunk_000000", "chunk_000001", "chunk_000002"}
    harvested = harvested[CONFIG.windows_per_call :]  # of these the units are
    seen = [made.rows(c, t)[0] for c in range(4) for t in (0, 1)]
    monkeypatch.undo()
    assert len(set(harvested)) == len(harvested)
    assert {f.stem for f in spool.glob("*.safetensors")} == {"chunk_000000"}
    file = spool / "chunk_000000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)  # damaged: harvested again, to the same bits
    np.testing.assert_array_equal(made.rows(0, 0)[0], seen[0])
    plain = make(windows, dtype="bfloat16")
    for c in range(4):
        np.testing.assert_array_equal(plain.rows(c, 1)[0], seen[2 * c + 1])
    made.close()
    assert not spool.exists()


def test_the_place_in_the_data_is_exact(windows: Windows):
    """Any batch again from its position alone; a pass covers every row at most once."""
    made = make(windows)
    at, seen = Position(), []
    for _ in range(20):
        read, write, after = made.batch(at, 64)
        seen.append((at, np.asarray(read), np.asarray(write)))
        at = after
    assert {p.chunk for p, *_ in seen} >= {0, 1, 2}
    assert {p.turn for p, *_ in seen} == {0, 1}
    fresh = make(windows)
    for at, read, write in (seen[13], seen[5]):
        got = fresh.batch(at, 64)
        np.testing.assert_array_equal(got[0], read)
        np.testing.assert_array_equal(got[1], write)
    # A batch that did not fit into the pass was taken from the next one.
    first = [r for p, r, _ in seen if (p.chunk, p.turn, p.offset % 64) == (0, 0, 0)]
    rows = np.concatenate(first[:3], 1)[-1]
    assert len(np.unique(rows, axis=0)) == len(rows)
    turns = [made.rows(0, t)[0] for t in (0, 1)]
    assert not np.array_equal(*turns)
    np.testing.assert_array_equal(*(np.sort(t, axis=1) for t in turns))


def test_tokens_with_enormous_writes_are_left_out(windows: Windows):
    """One of them would be most of a layer's variance."""
    every, some = make(windows, outlier=0.0), make(windows, outlier=1.3)
    norms = [np.linalg.norm(c.rows(0, 0)[1], axis=-1) for c in (every, some)]
    assert every.scales is not None
    assert some.scales is not None
    assert np.isinf(np.asarray(every.scales.bound_L)).all()
    raw, write, norm_LT = harvest(
        every.params,
        jnp.asarray(windows.train_WS[window_order(0, len(windows.train_WS), 0, 8)]),
        None,
        cfg=every.cfg,
        site="mlp_in",
    )
    del raw, write
    keep = (np.asarray(norm_LT) <= np.asarray(some.scales.bound_L)[:, None]).all(0)
    valid = windows.valid(
        windows.train_WS[window_order(0, len(windows.train_WS), 0, 8)]
    ).ravel()
    assert norms[1].shape[1] == (keep & valid).sum() < valid.sum() == norms[0].shape[1]


def test_every_window_comes_once_an_epoch():
    order = np.concatenate([window_order(3, 50, s, 25) for s in range(0, 150, 25)])
    for epoch in order.reshape(3, 50):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(50))
    assert not np.array_equal(order[:50], order[50:100])


def test_a_batch_larger_than_a_chunk_is_refused(windows: Windows):
    with pytest.raises(InputError, match="is more than the"):
        make(windows).batch(Position(), 1000)


def test_a_store_gives_the_same_chunks_without_the_model(
    windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = tmp_path / "store"
    first = make(windows, store, dtype="bfloat16").rows(1, 0)
    monkeypatch.setattr(Chunks, "harvested", None)  # harvesting would fail
    again = make(windows, store, dtype="bfloat16", reuse=1)
    np.testing.assert_array_equal(first[0], again.rows(1, 0)[0])
    manifest = json.loads((store / "manifest.json").read_text())
    chunks = {f"chunk_{i:06d}.safetensors" for i in range(3)}
    assert set(manifest["files"]) == {"units.safetensors"} | chunks
    file = store / "chunk_000001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="is damaged"):
        make(windows, store, dtype="bfloat16")
    with pytest.raises(InputError, match="differs in dtype"):
        make(windows, store, dtype="float32")


def random_scales(L: int, D: int, seed: int = 5) -> Scales:
    a, b, c, d = jax.random.split(jax.random.key(seed), 4)
    return Scales(
        read_mean_LD=jax.random.normal(a, (L, D)),
        read_scale_L=jnp.exp(jax.random.normal(b, (L,))),
        write_mean_LD=jax.random.normal(c, (L, D)),
        write_scale_L=jnp.exp(jax.random.normal(d, (L,))),
        bound_L=jnp.ones(L),
    )


@pytest.mark.parametrize(
    ("span", "activation"),
    [pytest.param(1, "jumprelu", marks=pytest.mark.slow), (3, "jumprelu"), (2, "relu")],
)
def test_folding_the_normalisation_changes_nothing(span: int, activation):
    """Maths 19.8, with a skip and thresholds, in float64."""
    L, T, D = 3, 9, 6
    with jax.enable_x64(True):
        spec = Spec(
            n_layers=L, d_model=D, n_features=10, span=span, activation=activation
        )
        params = init(jax.random.key(0), spec, skip=True, dtype=jnp.float64, theta=0.1)
        params = jax.tree.map(
            lambda x: (
                x + 0.2 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
            ),
            params,
        )
        clt, cfg, s = to_clt(params), spec.clt_config(), random_scales(L, D)
        s = jax.tree.map(lambda x: x.astype(jnp.float64), s)
        raw = jax.random.normal(jax.random.key(1), (L, T, D), jnp.float64) * 3
        scaled = (raw - s.read_mean_LD[:, None]) / s.read_scale_L[:, None, None]
        folded = fold(clt, s)
        a = encode(clt, scaled, cfg=cfg)
        assert 0 < float((a > 0).mean()) < 1
        np.testing.assert_allclose(encode(folded, raw, cfg=cfg), a, atol=1e-12)
        inner = decode(clt, a, scaled)
        want = inner * s.write_scale_L[:, None, None] + s.write_mean_LD[:, None]
        got = decode(folded, encode(folded, raw, cfg=cfg), raw)
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def test_the_calibrated_threshold_keeps_k_a_token_in_every_layer():
    spec = Spec(
        n_layers=3, d_model=6, n_features=40, span=3, activation="batch_topk", k=5
    )
    params = init(jax.random.key(0), spec)
    read = jax.random.normal(jax.random.key(1), (3, 200, 6))
    theta_L = calibrate(params, read, 5)
    assert (np.asarray(theta_L) > 0).all()
    clt, cfg = threshold_form(params, spec, theta_L)
    assert cfg.activation == "jumprelu"
    l0_L = (encode(clt, read, cfg=cfg) > 0).sum(2).mean(1)
    np.testing.assert_allclose(l0_L, 5, atol=1e-6)
    # and on the batch that BatchTopK sees, it keeps exactly the same features
    from jaxclt.train.objectives import encode_layer

    for l, p in enumerate(params):
        _, a = encode_layer(p, read[l], spec)
        np.testing.assert_array_equal(encode(clt, read, cfg=cfg)[l] > 0, a > 0)


@pytest.mark.parametrize(
    "site",
    [
        "normalized",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("resid_mid", "mlp_in")),
    ],
)
def test_the_mlps_response_is_its_derivative(windows: Windows, site):
    """Central differences of the model's own reads and writes, in normalised units."""
    model = tiny_model()
    scales = random_scales(model.cfg.n_layers, model.cfg.d_model)
    read, *_ = harvest(
        model.params, jnp.asarray(windows.train_WS[:1]), None, cfg=model.cfg, site=site
    )
    x = (read - scales.read_mean_LD[:, None]) / scales.read_scale_L[:, None, None]
    v = jax.random.normal(jax.random.key(2), x.shape)
    call = partial(mlp_response, model.params, scales, cfg=model.cfg, site=site)
    got = np.asarray(call(x, v))
    assert np.abs(got).max() > 0.1
    np.testing.assert_allclose(call(x, 2.0 * v), 2 * got, rtol=1e-4, atol=1e-5)
    # At layer 2, the true MLP in raw units.
    from jaxclt.lm import layers

    l = 2
    p = jax.tree.map(lambda leaf: leaf[l], model.params.blocks)
    norm = layers.mlp_norm(p)

    def mlp(raw):
        if site == "resid_mid":
            scale = layers.norm_scale(raw, norm, eps=model.cfg.norm_eps)
            raw = layers.normalise(raw, scale, norm)
        elif site == "normalized":
            raw = raw * norm.gain[None]
        return layers.mlp(p, raw, cfg=model.cfg)

    h = 1e-2
    step = h * v[l] * scales.read_scale_L[l]
    want = (
        (mlp(read[l] + step) - mlp(read[l] - step)) / (2 * h) / scales.write_scale_L[l]
    )
    np.testing.assert_allclose(got[l], want, atol=2e-2 * float(np.abs(want).max()))
