"""Models whose weights are split over devices: read by slices, and the same model."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from io_models import write_word_tokenizer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_weights_gguf import write_gguf

import jaxclt
from jaxclt.errors import InputError
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.io import names, read_params, rows
from jaxclt.io.model import load_model, save_hf
from jaxclt.io.weights_gguf import load_gguf
from jaxclt.io.weights_hf import load_hf
from jaxclt.lm.config import LMConfig
from jaxclt.lm.sharding import SPLIT, kept_whole, leaf_shapes, leaf_sharding, model_mesh
from jaxclt.testing import tiny
from jaxclt.trace.record import record_prompt
from jaxclt.types import Block, LMParams

GOLDENS = Path(__file__).parents[1] / "goldens"
CFG = LMConfig(
    n_layers=4,
    d_model=64,
    n_heads=8,
    n_kv_heads=8,
    d_head=16,
    d_mlp=256,
    d_vocab=800,
    n_ctx=64,
)
TABLES = {
    "llama": rows.LLAMA,
    "gemma": rows.GEMMA,
    "gpt2": rows.GPT2,
    "neox": rows.GPT_NEOX,
}


def same_leaves(got: LMParams, want: LMParams) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def made(cfg: LMConfig) -> LMParams:
    """Random weights; a pool of them again and again, which has no shape's period."""
    pool = np.asarray(jax.random.normal(jax.random.key(0), (100_003,))) / 8
    size = names.leaf_sizes(cfg) | {"L": cfg.n_layers}
    leaves = {
        row.leaf: np.resize(pool, [size[x] for x in row.leaf.rpartition("_")[2]])
        for row in rows.LLAMA
        if row.option in (None, "untied")
    }
    blocks: dict[str, Any] = {k: leaves.pop(k) for k in list(leaves) if "_L" in k}
    rest: dict[str, Any] = leaves
    return LMParams(blocks=Block(**blocks), **rest)


def bytes_of(params: LMParams, device: Any) -> int:
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(params)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


@pytest.mark.parametrize("source", ["hf", "gguf"])
@pytest.mark.parametrize("table", TABLES)
def test_a_slice_of_a_stored_tensor_is_that_part_of_the_leaf(table: str, source):
    """Fused queries, keys and values and turned matrices too; nothing else is read."""
    for row in TABLES[table]:
        stored = np.arange(
            np.prod(names.stored_shape(row, CFG, source)), dtype=np.float32
        ).reshape(names.stored_shape(row, CFG, source))
        everything = names.find_part(row, CFG, source, {})
        whole = names.to_leaf(stored[everything.stored], row, source, everything)
        size = names.leaf_sizes(CFG)
        assert whole.shape == tuple(size[x] for x in row.axes)
        axis = next((i for i, x in enumerate(row.axes) if x in SPLIT), None)
        if axis is None:
            continue
        n = whole.shape[axis]
        for wanted in (slice(0, n // 4), slice(n // 2, n), slice(n - 1, n)):
            part = names.find_part(row, CFG, source, {row.axes[axis]: wanted})
            read = stored[part.stored]
            got = names.to_leaf(read, row, source, part)
            np.testing.assert_array_equal(
                got, whole.take(range(wanted.start, wanted.stop), axis)
            )
            # queries, keys and values of a head lie beside each other in NeoX
            beside = any(x[1:] == "3C" for x in row.axes_in(source).split())
            assert read.size <= got.size * (3 if beside else 1)


@pytest.mark.parametrize(
    "name",
    ["llama_mha_bias", "family_gpt2", "family_neox", "family_gemma2", "family_qwen3"],
)
def test_leaves_are_the_same_and_lie_where_the_table_says(name: str):
    mesh = model_mesh(2)
    want, cfg = load_hf(GOLDENS / name)
    got, _ = load_hf(GOLDENS / name, mesh=mesh)
    same_leaves(got, want)
    for part in (got, got.blocks):
        for leaf, x in vars(part).items():
            if leaf != "blocks" and x is not None:
                assert x.sharding == leaf_sharding(leaf, x.shape, mesh)
    for x, spec in (
        (got.blocks.q_LDHC, PartitionSpec(None, None, "model", None)),
        (got.blocks.down_LID, PartitionSpec(None, "model", None)),
    ):
        assert x.sharding == NamedSharding(mesh, spec)
    # an odd number of tokens is whole on either
    assert cfg.d_vocab % 2 == 1
    assert got.embed_VD.sharding.is_fully_replicated
    (line,) = kept_whole(leaf_shapes(got), mesh)
    assert line.startswith(f"vocabulary: {cfg.d_vocab} over 2 devices leave a rest")
    assert "embed_VD" in line


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_a_quantised_file_is_read_by_slices_too(tmp_path: Path, kind: Kind):
    """Blocks of 32 numbers: o and down are cut inside of a row."""
    path = write_gguf(tmp_path / "m.gguf", made(CFG), CFG, kind=kind)
    want, _ = load_gguf(path)
    for n in (2, 8):  # a head of 16 channels is half a block
        got, _ = load_gguf(path, mesh=model_mesh(n))
        same_leaves(got, want)
        assert got.blocks.o_LHCD.addressable_shards[0].data.shape[1] == 8 // n


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 17 MB in float32."""
    folder = tmp_path_factory.mktemp("split") / "m"
    cfg = dataclasses.replace(CFG, d_model=128, d_mlp=1024, d_vocab=2048, n_layers=8)
    save_hf(jax.tree.map(lambda x: x.astype(jnp.bfloat16), made(cfg)), cfg, folder)
    write_word_tokenizer(folder)
    return folder


def test_a_device_has_its_share_and_the_host_no_more_than_a_part(
    on_disk: Path, monkeypatch: pytest.MonkeyPatch
):
    """Bytes of each device, and what the host held at the worst moment."""
    put = jax.device_put

    def to_other_memory(x: np.ndarray, device: Any) -> jax.Array:
        """As to an accelerator: numpy's memory is used as it is only where aligned."""
        room = np.empty(x.nbytes + 128, np.uint8)
        start = 4 - room.ctypes.data % 64 + 64
        odd = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
        odd[...] = x
        return jax.block_until_ready(put(odd, device))

    monkeypatch.setattr(read_params.jax, "device_put", to_other_memory)
    whole = bytes_of(load_model(on_disk).params, jax.devices()[0])
    mesh = model_mesh(8)
    load_hf(on_disk, mesh=mesh)  # what is imported on first use
    tracemalloc.start()
    params, _ = load_hf(on_disk, mesh=mesh)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shares = [bytes_of(params, device) for device in jax.devices()]
    assert len(set(shares)) == 1
    assert whole / 8 <= shares[0] < 1.01 * whole / 8  # norms are on each
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert largest > whole / 5
    # a device's part of one leaf, its copy made above, and what four threads read
    assert peak < largest / 2 < shares[0] * 1.01


def test_half_precision_on_disk_is_read_as_asked(on_disk: Path):
    one = load_model(on_disk, dtype="bfloat16", mesh=4)
    assert one.params.embed_VD.dtype == jnp.bfloat16
    same_leaves(one.params, load_model(on_disk, dtype="bfloat16").params)
    assert one.mesh is not None
    assert one.mesh.size == 4
    assert one.hash == load_model(on_disk).hash
    told: list[str] = []
    load_model(on_disk, mesh=3, progress=told.append)
    axes = {x.partition(":")[0] for x in told}
    assert axes == {"vocabulary", "heads", "key/value heads", "MLP neurons"}
    (heads,) = (x for x in told if x.startswith("heads"))
    assert heads.startswith("heads: 8 over 3 devices leave a rest, so each holds all")
    assert "q_LDHC, o_LHCD" in heads


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("llama_gqa_tied", 4),
        ("family_neox", 2),
        ("family_gemma2", 2),
        pytest.param("family_gpt2", 4, marks=pytest.mark.slow),
        pytest.param("family_gemma3", 2, marks=pytest.mark.slow),
        pytest.param("family_qwen3", 2, marks=pytest.mark.slow),
    ],
)
def test_every_tap_of_a_split_model_is_the_same(name: str, n: int):
    params, cfg = load_hf(GOLDENS / name)
    split, _ = load_hf(GOLDENS / name, mesh=model_mesh(n))
    token_T = jnp.asarray([5, 3, 3, 9, 11, 2, 7, 1, 30], jnp.int32)
    want, got = (record_prompt(p, token_T, cfg) for p in (params, split))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize(("direction", "devices"), [("pull", 2), ("push", 1)])
def test_a_split_model_has_the_same_edges(direction, devices: int):
    """Whatever the devices that the rows are split over: two of the four, or one."""
    t, mesh = tiny(0), model_mesh(4)  # 2 key/value heads stay whole
    place = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(x, leaf_sharding(path[-1].name, x.shape, mesh)),
        t.params,
    )
    split = dataclasses.replace(
        t, params=place, recording=record_prompt(place, t.token_T, t.cfg)
    )
    config = AttributeConfig(
        max_features=None, tolerance=0.0, devices=devices, direction=direction
    )
    want, got = t.graph(dataclasses.replace(config, devices=1)), split.graph(config)
    for name in ("edge_RN", "bias_R", "influence_N"):
        x, y = (np.asarray(getattr(g, name)) for g in (got, want))
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


@pytest.mark.slow
def test_a_split_model_is_traced_and_patched_like_any_other(on_disk: Path):
    """The front door: recording, neurons, rows, heads, explanations and patches."""
    found = []
    for mesh in (None, 2):
        model = load_model(on_disk, mesh=mesh)
        dictionary = jaxclt.load_dictionary("neurons:4", model)
        graph = jaxclt.attribute(
            model, dictionary, "the cat sat on a", heads=20, tolerance=0.0
        )
        assert jaxclt.certificate(graph).max_relative_row_error < 1e-4
        # one that matters: a small change of the logits would be rounding
        best = int(graph.influence_N[: graph.n_features].argmax())
        layer, pos, feature = (
            int(x[best]) for x in (graph.layer_A, graph.pos_A, graph.feature_A)
        )
        edit = jaxclt.Edit(layer=layer, pos=pos, feature=feature, scale=-10)
        patched = jaxclt.patch(model, dictionary, graph, [edit])
        found.append((graph, patched))
    (one, patched_one), (two, patched_two) = found
    scale = np.abs(one.edge_RN).max()
    np.testing.assert_allclose(two.edge_RN, one.edge_RN, rtol=0, atol=1e-5 * scale)
    assert patched_one.kl > 1e-3  # thousands of times the rounding of a KL
    assert patched_two.kl == pytest.approx(patched_one.kl, rel=1e-3)
    assert [x["p_after"] for x in patched_two.targets] == pytest.approx(
        [x["p_after"] for x in patched_one.targets], rel=1e-4
    )


@pytest.mark.parametrize(
    ("mesh", "match"),
    [
        (9, "cannot be split over 9 devices: this machine has 8"),
        (0, "cannot be split over 0 devices"),
        (
            Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor")),
            "the mesh has the axes data, tensor: call the one .* 'model'",
        ),
    ],
)
def test_meshes_that_do_not_fit(mesh, match: str):
    with pytest.raises(InputError, match=match):
        load_model("nowhere", mesh=mesh)


def test_other_axes_of_a_mesh_hold_copies():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    assert model_mesh(mesh) == mesh
    named = model_mesh(Mesh(np.array(jax.devices()[:2]), ("x",)))
    assert named.axis_names == ("model",)
    got, _ = load_hf(GOLDENS / "family_gpt2", mesh=mesh)
    same_leaves(got, load_hf(GOLDENS / "family_gpt2")[0])
    assert got.blocks.up_LDI.addressable_shards[0].data.shape == (3, 16, 16)
