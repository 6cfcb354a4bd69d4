"""Goldens of circuit-tracer 0.5.0 on tiny random Llamas; run with its own environment.

    pip install torch==2.13.0 nnsight==0.6.1 circuit-tracer==0.5.0
    python tests/goldens/make_circuit_tracer.py [circuit_tracer_clt circuit_tracer_plt]

Each golden directory holds what circuit-tracer read and what it answered:

    model/             a LlamaForCausalLM directory, a word-level tokenizer included
    dictionary/        the dictionary, files written by circuit-tracer itself
    graph.npz          the answer, arrays below (numpy only)
    dictionary_skip/   PLT only: JumpReLU with a linear skip, and graph_skip.npz

The adjacency is checked against an explicit float64 backward pass in numpy before it is
written, so a golden that is here is right in both senses.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from circuit_tracer import Graph, ReplacementModel, attribute
from circuit_tracer.graph import (
    compute_graph_scores,
    compute_node_influence,
    prune_graph,
)
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import (
    CrossLayerTranscoder,
    load_clt,
)
from circuit_tracer.transcoder.single_layer_transcoder import (
    SingleLayerTranscoder,
    TranscoderSet,
    load_transcoder_set,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
N_FEATURES, N_LAYERS, D_MODEL, N_VOCAB = 40, 4, 32, 97
PROMPT = "w7 w31 w7 w55 w12 w90"
BATCH, UPDATE = 8, 2  # small, so that the reduced run ranks several times
GAP = 1e-4  # no pre-activation closer to its threshold: the active set is unambiguous


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden: which model, which dictionary, where it goes."""

    directory: str
    suffix: str
    kind: str
    read_hook: str
    write_hook: str
    jumprelu: bool
    skip: bool
    tied: bool
    embed_std: float
    seed: int

    @property
    def root(self) -> Path:
        return HERE / self.directory

    @property
    def dictionary(self) -> Path:
        return self.root / f"dictionary{self.suffix}"


CLT = Case(
    "circuit_tracer_clt", "", "clt", "hook_resid_mid", "hook_mlp_out", True, False,
    True, 0.45, 1,
)  # fmt: skip
PLT = Case(
    "circuit_tracer_plt", "", "plt", "mlp.hook_in", "mlp.hook_out", False, False,
    False, 0.8, 2,
)  # fmt: skip
PLT_SKIP = dataclasses.replace(PLT, suffix="_skip", jumprelu=True, skip=True)


# -- the model ------------------------------------------------------------------------


def make_model(case: Case) -> LlamaForCausalLM:
    """A random Llama whose attention, gates and norm gains all matter."""
    config = LlamaConfig(
        vocab_size=N_VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_word_embeddings=case.tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        torch_dtype="float32",
    )
    torch.manual_seed(case.seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5)
            elif "embed_tokens" in name:
                p.normal_(0.0, case.embed_std)
            elif "lm_head" in name:  # peaked: fewer than ten logits reach 95 percent
                p.normal_(0.0, 0.6)
            else:
                p.normal_(0.0, p.shape[1] ** -0.5)
    return model


def save_model(case: Case, model: LlamaForCausalLM) -> Path:
    """Write `model/`: weights, config and a word-level tokenizer."""
    path = case.root / "model"
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"w{i}": i for i in range(3, N_VOCAB)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    model.save_pretrained(path, safe_serialization=True)
    (path / "generation_config.json").unlink(missing_ok=True)
    return path


# -- the dictionary -------------------------------------------------------------------


class Clean(NamedTuple):
    """What the model really did, from transformers' own hooks."""

    read_LTD: torch.Tensor
    write_LTD: torch.Tensor
    logit_TV: torch.Tensor


def run_model(model: LlamaForCausalLM, token_T: torch.Tensor, read_hook: str) -> Clean:
    reads, writes, handles = [], [], []
    for layer in model.model.layers:
        norm = layer.post_attention_layernorm
        handles += [
            norm.register_forward_hook(
                lambda _m, i, o: reads.append(
                    (i[0] if read_hook == "hook_resid_mid" else o)[0]
                )
            ),
            layer.mlp.register_forward_hook(lambda _m, _i, o: writes.append(o[0])),
        ]
    with torch.no_grad():
        logits = model(token_T[None]).logits[0]
    for h in handles:
        h.remove()
    return Clean(torch.stack(reads), torch.stack(writes), logits)


def random_weights(case: Case, clean: Clean) -> dict[str, Any]:
    """Random rows; biases or thresholds set so that about one in six is active."""
    torch.manual_seed(100 + case.seed + case.skip)
    L, F, D = N_LAYERS, N_FEATURES, D_MODEL
    enc = torch.randn(L, F, D)
    enc /= enc.norm(dim=-1, keepdim=True)
    b_enc = 0.1 * torch.randn(L, F)
    pre = torch.einsum("ltd,lfd->ltf", clean.read_LTD[:, 1:], enc) + b_enc[:, None]
    cut = torch.quantile(pre, 0.8, dim=1).clamp(min=0.05)
    cut = cut * (0.8 + 0.4 * torch.rand(L, F))
    theta = cut if case.jumprelu else None
    if not case.jumprelu:  # ReLU: the cut goes into the bias
        b_enc = b_enc - cut
        pre = pre - cut[:, None]
    gap = (pre - (0.0 if theta is None else theta[:, None])).abs().min()
    if gap < GAP:
        raise ValueError(f"a pre-activation is {gap:.1e} from its threshold: new seed")
    scale = clean.write_LTD.std(dim=(1, 2))
    span = L if case.kind == "clt" else 1
    dec = [
        0.5 * torch.randn(F, min(span, L - l), D) * scale[l].item() for l in range(L)
    ]
    return {
        "enc": enc,
        "b_enc": b_enc,
        "theta": theta,
        "dec": dec,
        "b_dec": clean.write_LTD.mean(1) + 0.05 * torch.randn(L, D),
        "skip": 0.3 * torch.randn(L, D, D) / D**0.5 if case.skip else None,
    }


def save_dictionary(case: Case, w: dict[str, Any]) -> None:
    """Through circuit-tracer's own writers, so that the files are really its files."""
    param = torch.nn.Parameter
    if case.kind == "clt":
        clt = CrossLayerTranscoder(
            N_LAYERS, N_FEATURES, D_MODEL, "jump_relu", lazy_decoder=False,
            device=torch.device("cpu"), dtype=torch.float32,
        )  # fmt: skip
        clt.W_enc, clt.b_enc = param(w["enc"]), param(w["b_enc"])
        clt.b_dec = param(w["b_dec"])
        clt.W_dec = torch.nn.ParameterList([param(d) for d in w["dec"]])
        clt.activation_function = JumpReLU(w["theta"][:, None])
        clt.to_safetensors(str(case.dictionary))
    else:
        layers = {}
        for l in range(N_LAYERS):
            act = JumpReLU(w["theta"][l]) if case.jumprelu else torch.nn.functional.relu
            t = SingleLayerTranscoder(
                D_MODEL, N_FEATURES, act, l, skip_connection=case.skip,
                device=torch.device("cpu"), dtype=torch.float32,
            )  # fmt: skip
            t.W_enc, t.b_enc = param(w["enc"][l]), param(w["b_enc"][l])
            t.W_dec, t.b_dec = param(w["dec"][l][:, 0]), param(w["b_dec"][l])
            if case.skip:
                t.W_skip = param(w["skip"][l])
            layers[l] = t
        TranscoderSet(layers, case.read_hook, case.write_hook).to_safetensors(
            str(case.dictionary)
        )
    config = {
        "model_kind": {"clt": "cross_layer_transcoder", "plt": "transcoder_set"}[
            case.kind
        ],
        "model_name": f"tests/{case.directory}/model",
        "feature_input_hook": case.read_hook,
        "feature_output_hook": case.write_hook,
        "scan": f"golden/{case.directory}{case.suffix}",
    }
    text = yaml.safe_dump(config, sort_keys=False)
    (case.dictionary / "config.yaml").write_text(text)


def load_dictionary(case: Case) -> CrossLayerTranscoder | TranscoderSet:
    common: dict[str, Any] = {
        "feature_input_hook": case.read_hook,
        "feature_output_hook": case.write_hook,
        "scan": f"golden/{case.directory}{case.suffix}",
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "lazy_encoder": False,
        "lazy_decoder": True,
    }
    if case.kind == "clt":
        return load_clt(str(case.dictionary), **common)
    names = [f"layer_{l}.safetensors" for l in range(N_LAYERS)]
    paths = {l: str(case.dictionary / name) for l, name in enumerate(names)}
    return load_transcoder_set(paths, **common)


# -- the oracle: an explicit backward pass, float64, numpy -----------------------------


class Frozen64(NamedTuple):
    """The clean pass in float64: everything the local replacement model holds fixed."""

    token_T: np.ndarray
    embed_TD: np.ndarray
    pattern_LHTS: np.ndarray
    attn_scale_LT: np.ndarray
    mlp_scale_LT: np.ndarray
    out_scale_T: np.ndarray
    read_LTD: np.ndarray
    write_LTD: np.ndarray
    logit_TV: np.ndarray


def weights64(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    return {k: v.double().numpy() for k, v in model.state_dict().items()}


def inv_rms(x_TD: np.ndarray) -> np.ndarray:
    return 1.0 / np.sqrt((x_TD**2).mean(-1) + 1e-5)


def rotate(x_THC: np.ndarray) -> np.ndarray:
    T, _, C = x_THC.shape
    freq = 10_000.0 ** (-np.arange(0, C, 2) / C)
    angle = np.concatenate([np.outer(np.arange(T), freq)] * 2, -1)[:, None]
    half = np.concatenate([-x_THC[..., C // 2 :], x_THC[..., : C // 2]], -1)
    return x_THC * np.cos(angle) + half * np.sin(angle)


def attention_pattern(w: dict, p: str, x_TD: np.ndarray) -> np.ndarray:
    T = len(x_TD)
    q = rotate((x_TD @ w[p + "self_attn.q_proj.weight"].T).reshape(T, 4, -1))
    k = rotate((x_TD @ w[p + "self_attn.k_proj.weight"].T).reshape(T, 2, -1))
    score = np.einsum("thc,shc->hts", q, np.repeat(k, 2, 1)) / np.sqrt(q.shape[-1])
    score = np.where(np.tril(np.ones((T, T), bool)), score, -np.inf)
    e = np.exp(score - score.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def forward64(w: dict, token_T: np.ndarray, read_hook: str) -> Frozen64:
    x = embed = w["model.embed_tokens.weight"][token_T]
    T, cols = len(token_T), {k: [] for k in ("pattern", "s1", "s2", "read", "write")}
    for l in range(N_LAYERS):
        p = f"model.layers.{l}."
        s1 = inv_rms(x)
        n = x * s1[:, None] * w[p + "input_layernorm.weight"]
        pattern = attention_pattern(w, p, n)
        v = np.repeat((n @ w[p + "self_attn.v_proj.weight"].T).reshape(T, 2, -1), 2, 1)
        z = np.einsum("hts,shc->thc", pattern, v).reshape(T, -1)
        mid = x + z @ w[p + "self_attn.o_proj.weight"].T
        s2 = inv_rms(mid)
        m = mid * s2[:, None] * w[p + "post_attention_layernorm.weight"]
        gate = m @ w[p + "mlp.gate_proj.weight"].T
        up = m @ w[p + "mlp.up_proj.weight"].T
        write = (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T
        read = mid if read_hook == "hook_resid_mid" else m
        for k, a in zip(cols, (pattern, s1, s2, read, write), strict=True):
            cols[k].append(a)
        x = mid + write
    s = inv_rms(x)
    logits = (x * s[:, None] * w["model.norm.weight"]) @ w["lm_head.weight"].T
    stack = [np.stack(cols[k]) for k in ("pattern", "s1", "s2")]
    rw = [np.stack(cols[k]) for k in ("read", "write")]
    return Frozen64(token_T, embed, *stack, s, *rw, logits)


def attention_transpose(w: dict, f: Frozen64, l: int, G: np.ndarray) -> np.ndarray:
    """Pull a cotangent of attention's output back to its input, all else frozen."""
    p, T = f"model.layers.{l}.", len(G)
    z = (G @ w[p + "self_attn.o_proj.weight"]).reshape(T, 4, -1)
    v = np.einsum("hts,thc->shc", f.pattern_LHTS[l], z)
    v = v.reshape(T, 2, 2, -1).sum(2).reshape(T, -1)
    n = v @ w[p + "self_attn.v_proj.weight"]
    return n * w[p + "input_layernorm.weight"] * f.attn_scale_LT[l][:, None]


def through_mlp_norm(case: Case, w: dict, f: Frozen64, l: int, g: np.ndarray):
    """From a cotangent of what the encoder reads to one of the residual stream."""
    if case.read_hook == "hook_resid_mid":
        return g
    gain = w[f"model.layers.{l}.post_attention_layernorm.weight"]
    return g * gain * f.mlp_scale_LT[l][:, None]


def write_cotangents(case, w, d, f: Frozen64, layer: int, start_TD: np.ndarray):
    """Cotangents [L, T, D] at every MLP output, and [T, D] at the embeddings.

    `start_TD` is the cotangent at the encoder's read of `layer`, or at the final norm's
    output where layer is L.
    """
    out = np.zeros_like(f.write_LTD)
    if layer == N_LAYERS:
        G = start_TD * w["model.norm.weight"] * f.out_scale_T[:, None]
    else:
        G = through_mlp_norm(case, w, f, layer, start_TD)
        G = G + attention_transpose(w, f, layer, G)
    for l in range(layer - 1, -1, -1):
        out[l] = G
        if d["skip"] is not None:
            G = G + through_mlp_norm(case, w, f, l, G @ d["skip"][l])
        G = G + attention_transpose(w, f, l, G)
    return out, G


class Nodes(NamedTuple):
    layer_A: np.ndarray
    pos_A: np.ndarray
    feature_A: np.ndarray
    value_A: np.ndarray
    error_LTD: np.ndarray


def nodes64(case: Case, d: dict, f: Frozen64) -> Nodes:
    pre = np.einsum("ltd,lfd->ltf", f.read_LTD, d["enc"]) + d["b_enc"][:, None]
    theta = 0.0 if d["theta"] is None else d["theta"][:, None]
    a = np.where(pre > theta, pre, 0.0)
    a[:, 0] = 0  # circuit-tracer ignores the first position
    recon = np.repeat(d["b_dec"][:, None], len(f.token_T), 1)
    for l in range(N_LAYERS):
        for j in range(d["dec"][l].shape[1]):
            recon[l + j] += a[l] @ d["dec"][l][:, j]
    if d["skip"] is not None:
        recon += np.einsum("ltd,led->lte", f.read_LTD, d["skip"])
    error = f.write_LTD - recon
    error[:, 0] = 0
    layer, pos, feature = np.nonzero(a)
    return Nodes(layer, pos, feature, a[layer, pos, feature], error)


def adjacency64(case: Case, w: dict, d: dict, f: Frozen64, logit_token_K: np.ndarray):
    """The whole adjacency [N, N], one explicit backward pass per row."""
    nodes = nodes64(case, d, f)
    A, T, L = len(nodes.value_A), len(f.token_T), N_LAYERS
    N = A + (L + 1) * T + len(logit_token_K)
    unembed = w["lm_head.weight"] - w["lm_head.weight"].mean(0)
    edge = np.zeros((N, N))

    def row(layer: int, pos: int, vec: np.ndarray) -> np.ndarray:
        start = np.zeros_like(f.embed_TD)
        start[pos] = vec
        g_LTD, g_embed = write_cotangents(case, w, d, f, layer, start)
        r = np.zeros(N)
        for s in range(A):
            l, p, i = nodes.layer_A[s], nodes.pos_A[s], nodes.feature_A[s]
            dec = d["dec"][l][i]
            r[s] = nodes.value_A[s] * (g_LTD[l : l + len(dec), p] * dec).sum()
        r[A : A + L * T] = (g_LTD * nodes.error_LTD).sum(-1).ravel()
        r[A + L * T : A + (L + 1) * T] = (g_embed * f.embed_TD).sum(-1)
        return r

    for t in range(A):
        l, p, i = nodes.layer_A[t], nodes.pos_A[t], nodes.feature_A[t]
        edge[t] = row(l, p, d["enc"][l, i])
    for k, token in enumerate(logit_token_K):
        edge[N - len(logit_token_K) + k] = row(L, T - 1, unembed[token])
    return edge, nodes


# -- the golden ------------------------------------------------------------------------


def graph_arrays(graph: Graph, prefix: str) -> dict[str, np.ndarray]:
    """Everything circuit-tracer says about one graph, as numpy arrays."""
    K = len(graph.logit_targets)
    weight = torch.zeros(len(graph.adjacency_matrix))
    weight[-K:] = graph.logit_probabilities
    influence = compute_node_influence(graph.adjacency_matrix, weight)
    nodes, edges, cumulative = prune_graph(graph, 0.8, 0.98)
    replacement, completeness = compute_graph_scores(graph)
    return {
        prefix + "selected_A": graph.selected_features.numpy().astype(np.int32),
        prefix + "edge_NN": graph.adjacency_matrix.numpy(),
        prefix + "influence_N": influence.numpy(),
        prefix + "node_mask_N": nodes.numpy(),
        prefix + "edge_mask_NN": edges.numpy(),
        prefix + "cumulative_N": cumulative.numpy(),
        prefix + "replacement": np.float64(replacement),
        prefix + "completeness": np.float64(completeness),
    }


def check(case: Case, model, w: dict, graph: Graph) -> str:
    """Compare with the float64 oracle; raises if anything is off. Returns a summary."""
    token_T = graph.input_tokens.numpy()
    frozen = forward64(weights64(model), token_T, case.read_hook)
    keys = ("enc", "b_enc", "theta", "b_dec", "skip")
    d = {k: None if w[k] is None else w[k].double().numpy() for k in keys}
    d["dec"] = [x.double().numpy() for x in w["dec"]]
    targets = graph.logit_token_ids.numpy()
    edge, nodes = adjacency64(case, weights64(model), d, frozen, targets)
    want = np.stack([nodes.layer_A, nodes.pos_A, nodes.feature_A], 1)
    np.testing.assert_array_equal(graph.active_features.numpy(), want)
    value_diff = np.abs(graph.activation_values.numpy() - nodes.value_A).max()
    got = graph.adjacency_matrix.numpy()
    diff, size = np.abs(got - edge).max(), np.abs(edge).max()
    if not (diff < 2e-5 * size and value_diff < 1e-4):
        raise ValueError(f"circuit-tracer and the oracle differ by {diff} of {size}")
    return f"edges differ by {diff:.2e} of {size:.3f}, activations by {value_diff:.1e}"


def make(case: Case) -> None:
    model = make_model(case)
    path = save_model(case, model)
    token_T = torch.tensor([1, *(int(t[1:]) for t in PROMPT.split())])
    clean = run_model(model, token_T, case.read_hook)
    weights = random_weights(case, clean)
    save_dictionary(case, weights)
    traced = ReplacementModel.from_pretrained_and_transcoders(
        str(path), load_dictionary(case), backend="nnsight",
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    assert traced.ensure_tokenized(PROMPT).tolist() == token_T.tolist()
    graph = attribute(PROMPT, traced, batch_size=64)
    n_active = len(graph.active_features)
    reduced = attribute(
        PROMPT, traced, batch_size=BATCH, update_interval=UPDATE,
        max_feature_nodes=n_active // 2,
    )  # fmt: skip
    summary = check(case, model, weights, graph)
    for file in case.root.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes 0600
    arrays = {
        "prompt": np.array(PROMPT),
        "token_T": token_T.numpy().astype(np.int32),
        "read_LTD": clean.read_LTD.numpy(),
        "write_LTD": clean.write_LTD.numpy(),
        "logit_TV": clean.logit_TV.numpy(),
        "active_A3": graph.active_features.numpy().astype(np.int32),
        "value_A": graph.activation_values.detach().numpy(),
        "logit_token_K": graph.logit_token_ids.numpy().astype(np.int32),
        "logit_prob_K": graph.logit_probabilities.detach().numpy(),
        "reduced_batch_size": np.int32(BATCH),
        "reduced_update_interval": np.int32(UPDATE),
        **graph_arrays(graph, "full_"),
        **graph_arrays(reduced, "reduced_"),
    }
    np.savez_compressed(case.root / f"graph{case.suffix}.npz", **arrays)
    full = arrays["full_edge_NN"]
    sys.stdout.write(
        f"{case.directory}{case.suffix}: {n_active} active features, N={len(full)}, "
        f"K={len(graph.logit_targets)}, {np.count_nonzero(full)} edges, kept "
        f"{arrays['full_node_mask_N'].sum()} nodes {arrays['full_edge_mask_NN'].sum()} "
        f"edges, replacement {arrays['full_replacement']:.4f}, completeness "
        f"{arrays['full_completeness']:.4f}; reduced to {n_active // 2}: "
        f"{arrays['reduced_replacement']:.4f} {arrays['reduced_completeness']:.4f}; "
        f"{summary}\n"
    )


def main() -> None:
    wanted = sys.argv[1:] or [CLT.directory, PLT.directory]
    for case in (CLT, PLT, PLT_SKIP):
        if case.directory in wanted:
            make(case)


if __name__ == "__main__":
    main()
