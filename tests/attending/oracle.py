"""The frozen model of a tiny case in plain numpy, float64: every pair by brute force.

Weights, the clean pass's patterns and denominators, and the rows of active features are
taken from the case; how they act together is written out again here.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np

from jaxclt.clt.active import Active
from jaxclt.graph.graph import Graph
from jaxclt.lm.rotary import rotary_frequencies
from jaxclt.replacement.errors import error_nodes
from jaxclt.testing import Tiny


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A case's model with patterns, denominators and gates held."""

    t: Tiny
    active: Active

    def weight(self, name: str, layer: int) -> np.ndarray | None:
        leaf = getattr(self.t.params.blocks, name)
        return None if leaf is None else np.asarray(leaf[layer])

    @cached_property
    def patterns(self) -> np.ndarray:
        return np.asarray(self.t.recording.frozen.pattern_LHTS)

    def normed(self, layer: int, x_xTD: np.ndarray, *, biases: bool) -> np.ndarray:
        """What attention reads."""
        scale_T = np.asarray(self.t.recording.frozen.attn_scale_LT[layer])
        gain_D, bias_D = (
            self.weight(f"norm_attn{name}_LD", layer) for name in ("", "_bias")
        )
        if gain_D is None:
            return x_xTD
        if bias_D is not None:
            x_xTD = x_xTD - x_xTD.mean(-1, keepdims=True)
        out_xTD = x_xTD * scale_T[:, None] * gain_D
        return out_xTD + bias_D if biases and bias_D is not None else out_xTD

    def moved(
        self, layer: int, x_xTD: np.ndarray, pattern_HTS: np.ndarray, *, biases: bool
    ) -> np.ndarray:
        """What attention adds."""
        cfg = self.t.cfg
        normed_xTD = self.normed(layer, x_xTD, biases=biases)
        value = np.einsum("...sd,dgc->...sgc", normed_xTD, self.weight("v_LDGC", layer))
        bias = self.weight("v_bias_LGC", layer)
        if biases and bias is not None:
            value = value + bias
        value = np.repeat(value, cfg.n_queries_per_kv, axis=-2)
        mixed = np.einsum("hts,...shc->...thc", pattern_HTS, value)
        out = np.einsum("...thc,hcd->...td", mixed, self.weight("o_LHCD", layer))
        bias = self.weight("o_bias_LD", layer)
        if biases and bias is not None:
            out = out + bias
        gain_D = self.weight("post_attn_LD", layer)
        if gain_D is not None:
            scale_T = np.asarray(self.t.recording.frozen.post_attn_scale_LT[layer])
            out = out * scale_T[:, None] * gain_D
        return out

    def skip(self, layer: int, mid_xTD: np.ndarray) -> np.ndarray | float:
        a = self.active
        if a.skip_LDD is None:
            return 0.0
        return (mid_xTD * a.scale_LT[layer][:, None]) @ a.skip_LDD[layer]

    def entering(
        self, embed_xTD: np.ndarray, write_xLTD: np.ndarray, *, biases: bool
    ) -> np.ndarray:
        """Streams that enter every layer, from what is written, [x, L, T, D]."""
        x_xTD, found = embed_xTD, []
        for layer in range(self.t.cfg.n_layers):
            found.append(x_xTD)
            pattern_HTS = self.patterns[layer]
            after_xTD = x_xTD + self.moved(layer, x_xTD, pattern_HTS, biases=biases)
            mid_xTD = x_xTD if self.t.cfg.parallel else after_xTD
            x_xTD = after_xTD + write_xLTD[:, layer] + self.skip(layer, mid_xTD)
        return np.stack(found, 1)

    # -- what nodes bring to queries and keys ------------------------------------------

    def sources(self, graph: Graph) -> np.ndarray:
        """What each column of a graph brings, then biases and the rest, [N+2, L, T, D].

        It enters every layer.
        """
        a, (L, T, D) = self.active, self.t.recording.resid_LTD.shape
        N, A = graph.edge_RN.shape[1], graph.n_features
        embed = np.zeros((N + 2, T, D))
        write = np.zeros((N + 2, L, T, D))
        at = {graph.feature(node): node for node in range(A)}
        for slot in range(len(a.layer_A)):
            layer, pos = int(a.layer_A[slot]), int(a.pos_A[slot])
            node = at.get((layer, pos, int(a.feature_A[slot])), N + 1)
            rows = a.decoder[layer][a.row_A[slot]]
            write[node, layer : layer + len(rows), pos] += a.value_A[slot] * rows
        error_LTD = error_nodes(a, self.t.recording)
        for layer in range(L):
            for pos in range(T):
                node = A + layer * T + pos
                write[node, layer, pos] = error_LTD[layer, pos]
        embed[A + L * T + np.arange(T), np.arange(T)] = self.t.recording.embed_TD
        found = self.entering(embed, write, biases=False)
        bias_LTD = np.repeat(a.write_bias_LD[:, None], T, 1)
        none = np.zeros((1, T, D))
        found[N] = self.entering(none, bias_LTD[None], biases=True)[0]
        return found

    def heads(
        self, layer: int, x_xTD: np.ndarray, *, biases: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Queries and keys [x, T, H, C] of streams, all denominators held."""
        clean_TD = np.asarray(self.t.recording.resid_LTD[layer])
        found = []
        for name, axes in (("q", "LHC"), ("k", "LGC")):
            weight = self.weight(f"{name}_LD{axes[1:]}", layer)
            bias = self.weight(f"{name}_bias_{axes}", layer)
            gain = self.weight(f"{name}_norm_LC", layer)
            over = (-1,)
            if gain is None:  # or over the channels of all heads
                gain, over = self.weight(f"{name}_norm_{axes}", layer), (-2, -1)

            def project(x, biases, weight=weight, bias=bias):
                normed = self.normed(layer, x, biases=biases)
                y = np.einsum("...td,dhc->...thc", normed, weight)
                return y + bias if biases and bias is not None else y

            y = project(x_xTD, biases)
            late = self.t.cfg.norm_turned
            if gain is not None:
                clean = project(clean_TD, True)
                mean = (clean**2).mean(over, keepdims=True)
                y = y / np.sqrt(mean + self.t.cfg.norm_eps) * (1 if late else gain)
            y = self._turned(layer, y)
            found.append(y * gain if late and gain is not None else y)
        query, key = found
        return query, np.repeat(key, self.t.cfg.n_queries_per_kv, axis=-2)

    def _turned(self, layer: int, x_xTHC: np.ndarray) -> np.ndarray:
        """Rotary embedding, by complex numbers."""
        cfg, local = self.t.cfg, self.weight("local_L", layer)
        if self.weight("turning_L", layer) == np.False_:
            return x_xTHC
        theta, scaling = cfg.rope_theta, cfg.rope_scaling
        if cfg.rope_local_theta is not None and local:
            theta, scaling = cfg.rope_local_theta, None
        freq_J = rotary_frequencies(cfg.n_turning, theta, scaling)
        J = len(freq_J)
        angle_TJ = np.arange(x_xTHC.shape[-3])[:, None] * freq_J
        number = x_xTHC[..., :J] + 1j * x_xTHC[..., J : 2 * J]
        number = number * np.exp(1j * angle_TJ)[:, None]
        parts = number.real, number.imag, x_xTHC[..., 2 * J :]
        return np.concatenate(parts, -1)

    @property
    def scale(self) -> float:
        cfg = self.t.cfg
        return cfg.d_head**-0.5 if cfg.query_scale is None else cfg.query_scale

    def scores(self, layer: int) -> np.ndarray:
        """Of the clean run, [H, T, S]."""
        clean_TD = np.asarray(self.t.recording.resid_LTD[layer])
        query, key = self.heads(layer, clean_TD, biases=True)
        return self.scale * np.einsum("thc,shc->hts", query, key)

    def pattern(self, layer: int, score_HTS: np.ndarray) -> np.ndarray:
        cfg, local = self.t.cfg, self.weight("local_L", layer)
        if cfg.attn_cap is not None:
            score_HTS = cfg.attn_cap * np.tanh(score_HTS / cfg.attn_cap)
        T = score_HTS.shape[-1]
        back_TS = np.arange(T)[:, None] - np.arange(T)
        seen_TS = back_TS >= 0
        if cfg.window is not None and (local is None or local):
            seen_TS &= back_TS < cfg.window
        weight = np.where(seen_TS, np.exp(score_HTS - score_HTS.max()), 0)
        return weight / weight.sum(-1, keepdims=True)

    # -- what the answer is ------------------------------------------------------------

    def answer(self, patterns: np.ndarray, weight_K: np.ndarray) -> float:
        """A sum of targets with features answering, gates held."""
        a, t = self.active, self.t
        L, T = t.recording.resid_LTD.shape[:2]
        read_AD = a.reads()
        write_LTD = np.repeat(a.write_bias_LD[:, None], T, 1)
        write_LTD = write_LTD + error_nodes(a, t.recording)
        names = ("layer_K", "pos_K", "vec_KD", "write_KD")
        targets = {name: np.asarray(getattr(t.targets, name)) for name in names}
        x_TD = np.asarray(t.recording.embed_TD)
        total = 0.0
        for layer in range(L):
            after_TD = x_TD + self.moved(layer, x_TD, patterns[layer], biases=True)
            mid_TD = x_TD if t.cfg.parallel else after_TD
            for slot in np.flatnonzero(a.layer_A == layer):
                pos, rows = a.pos_A[slot], a.decoder[layer][a.row_A[slot]]
                value = read_AD[slot] @ mid_TD[pos] + a.read_bias_A[slot]
                write_LTD[layer : layer + len(rows), pos] += value * rows
            out_TD = write_LTD[layer] + self.skip(layer, mid_TD)
            for k in np.flatnonzero(targets["layer_K"] == layer):
                pos = targets["pos_K"][k]
                read = targets["vec_KD"][k] @ mid_TD[pos]
                total += weight_K[k] * (read + targets["write_KD"][k] @ out_TD[pos])
            x_TD = after_TD + out_TD
        if t.params.norm_out_bias_D is not None:
            x_TD = x_TD - x_TD.mean(-1, keepdims=True)
        scale_T = np.asarray(t.recording.frozen.out_scale_T)
        out_TD = x_TD * scale_T[:, None] * np.asarray(t.params.norm_out_D)
        for k in np.flatnonzero(targets["layer_K"] == L):
            read = targets["vec_KD"][k] @ out_TD[targets["pos_K"][k]]
            total += weight_K[k] * read
        return float(total)
