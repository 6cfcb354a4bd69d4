"""Are induction heads named without hand work, and what do their pairs say?

    python experiments/attention/induction.py [--prompts 10] [--out DIR]

A prompt is N random tokens and the first CUT of them again; what follows in the first
copy is explained. A trace names the strongest cells of all heads by their effect on
it, and takes their scores apart. The oracle sees none of that: it is where heads look
on other random sequences, and how far. Its prompts, those that N and CUT were chosen
on, and the held-out ones are drawn from different seeds.
Writes DIR/results.json after every prompt, and DIR/table.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.stats import rankdata

import jaxclt
from jaxclt.attending.apart import take_one_apart
from jaxclt.attending.brought import make_nodes
from jaxclt.attending.cells import head_effects
from jaxclt.cli.common import use_compilation_cache
from jaxclt.graph.agreement import spearman
from jaxclt.graph.graph import Graph
from jaxclt.graph.target_reads import target_rows
from jaxclt.graph.targets import place_targets
from jaxclt.trace.explained import choose_targets
from jaxclt.trace.record import record_text, recorded
from jaxclt.validation.stats import mean_interval

N, CUT = 12, 6
SEEDS = {"oracle": 1, "choosing": 3, "held out": 7}
ORACLE_PROMPTS, ORACLE_TOKENS = 20, 25
LOOKS = 0.2, 0.4  # mean attention from which the oracle calls a head of a kind
CELLS, PAIRS = 20, 30
EARLY = 18  # of the layers with induction heads; on the first prompts they differed
PLACES = {
    "induction": "the token that followed the query's token before",
    "same token": "the query's token in the first copy",
    "previous": "the token before the query",
    "itself": "the query",
    "first": "position 0",
    "other": "anything else",
}


def sequence(vocabulary: int, use: str, number: int, n: int) -> np.ndarray:
    """Different random tokens; the model's 17 special ones are left out."""
    key = jax.random.fold_in(jax.random.key(SEEDS[use]), number)
    ids = np.arange(17, vocabulary)
    return np.asarray(jax.random.choice(key, ids, (n,), replace=False))


def place_of(query: int, key: int, n: int) -> str:
    """What stands at the key's position, seen from the query's; see `PLACES`."""
    named = {
        "induction": query - n + 1 if query >= n else None,
        "same token": query - n if query >= n else None,
        "previous": query - 1,
        "itself": query,
        "first": 0,
    }
    return next((name for name, at in named.items() if at == key), "other")


def oracle(model: Any) -> dict[str, np.ndarray]:
    """Mean attention [L, H] to some places, over queries of the second copy."""
    n, total = ORACLE_TOKENS, {}
    query = np.arange(n, 2 * n)
    for number in range(ORACLE_PROMPTS):
        token_N = sequence(model.cfg.d_vocab, "oracle", number, n)
        recording = record_text(model, np.tile(token_N, 2), 10**9, pad=False)
        pattern_LHTS = np.asarray(recording.frozen.pattern_LHTS)
        for place, back in (("induction", n - 1), ("same token", n), ("previous", 1)):
            found_LH = pattern_LHTS[:, :, query, query - back].mean(-1)
            total[place] = total.get(place, 0) + found_LH / ORACLE_PROMPTS
    return total


def named(effects: Any, look: dict[str, np.ndarray]) -> dict[str, Any]:
    """How the strongest cells of a prompt compare with the oracle."""
    found: dict[str, Any] = {}
    look_LH = look["induction"]
    for by in ("effect", "pattern_effect"):
        cells = sorted(effects.cells, key=lambda cell: -abs(getattr(cell, by)))
        heads = list(dict.fromkeys((cell.layer, cell.head) for cell in cells))[:5]
        said = [float(look_LH[head]) for head in heads]
        found[by] = {"heads": [f"L{layer}H{head}" for layer, head in heads]}
        found[by] |= {f"{least}": np.mean(np.array(said) >= least) for least in LOOKS}
    size_LH = np.abs(effects.effect_LH)
    found["spearman"] = spearman(size_LH, look_LH)
    found["auc"] = {f"{x}": ranked_above(size_LH, look_LH >= x) for x in LOOKS}
    found["cells"] = [
        {
            "cell": cell_name(cell),
            "head": [cell.layer, cell.head],
            "place": (place := place_of(cell.query, cell.key, N)),
            "effect": cell.effect,
            "oracle": float(look[place][cell.layer, cell.head])
            if place in look
            else None,
        }
        for cell in effects.cells[:CELLS]
    ]
    return found


def ranked_above(x: np.ndarray, mine: np.ndarray) -> float:
    """Share of pairs in which x is larger where `mine` than where not."""
    rank, n = rankdata(x)[mine.ravel()], int(mine.sum())
    return float((rank.sum() - n * (n + 1) / 2) / (n * (mine.size - n)))


def cell_name(cell: Any) -> str:
    return f"L{cell.layer}H{cell.head} {cell.query} -> {cell.key}"


def by_position(graph: Graph, query_UC: np.ndarray, key_UC: np.ndarray) -> np.ndarray:
    """Pairs summed by the positions of their nodes [T + 2, T + 2]; then bias, rest."""
    T = graph.n_tokens
    pos_N = np.r_[positions(graph), T, T + 1]
    sums = np.zeros((2, T + 2, query_UC.shape[1]))
    for sum_TC, x_UC in zip(sums, (query_UC, key_UC), strict=True):
        np.add.at(sum_TC, pos_N, x_UC)
    return sums[0] @ sums[1].T


def positions(graph: Graph) -> np.ndarray:
    """Position of every column, [N]."""
    at_T = np.arange(graph.n_tokens)
    parts = {"feature": graph.pos_A, "error": np.tile(at_T, graph.n_layers)}
    parts["embed"] = at_T
    return np.concatenate([parts[kind] for kind in graph.layout.sources])


def what_pairs_say(graph: Graph, apart: Any, look_LH: np.ndarray) -> dict[str, Any]:
    """Of an induction cell: do the pairs join the query's token with its copy?

    The copy stands before the key. Pairs are summed by the positions of their nodes,
    those of the score and those of the competition.
    """
    cell, T = apart.cell, graph.n_tokens
    at = cell.query, cell.key - 1
    found = {"cell": cell_name(cell), "layer": cell.layer, "weight": cell.weight}
    found |= {"score": apart.score, "oracle": float(look_LH[cell.layer, cell.head])}
    found["error"] = max(apart.relative_error, apart.competition_error)
    against_UC = apart.key_UC - apart.mean_key_UC
    for name, key_UC in (("score", apart.key_UC), ("competition", against_UC)):
        block_QK = by_position(graph, apart.query_UC, key_UC)
        size = np.abs(block_QK).sum()
        key_K = block_QK.sum(0)
        found[f"by {name}"] = {
            "key_rank": 1 + int((key_K[:T] > key_K[at[1]]).sum()),
            "block_rank": 1 + int((block_QK[:T, :T] > block_QK[at]).sum()),
            "block_over_sum": float(block_QK[at] / block_QK.sum()),
            "block_of_sizes": float(np.abs(block_QK[at]) / size),
        }
    pos_N = np.r_[positions(graph), T, T + 1]
    joined = [(pos_N[p.query], pos_N[p.key]) == at for p in apart.pairs(PAIRS)]
    return found | {"first_pair": joined[0], "pairs": float(np.mean(joined))}


def of_prompt(
    model: Any, dictionary: Any, number: int, look: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Trace a held-out prompt, and compare what it says with the oracle."""
    token_N = sequence(model.cfg.d_vocab, "held out", number, N)
    prompt = np.r_[token_N, token_N[:CUT]].tolist()
    target = f"id:{token_N[CUT]}"
    graph = jaxclt.attribute(model, dictionary, prompt, targets=(target,))
    p = recorded(graph, model, dictionary)
    chosen = choose_targets((target,), model, dictionary, p.recording, graph.n_tokens)
    targets = place_targets(chosen, cfg=model.cfg, n_tokens=graph.n_tokens)
    rows = target_rows(p.params, p.recording, p.active, targets)
    effects, nodes = head_effects(p, graph, rows), make_nodes(p, graph)
    said = [
        what_pairs_say(graph, take_one_apart(nodes, cell), look["induction"])
        for cell in effects.cells[:CELLS]
        if place_of(cell.query, cell.key, N) == "induction"
    ]
    found = {"prompt": number, "probability": float(graph.target_prob_K[0])}
    return found | {"pairs": said} | named(effects, look)


def mean(values: Any) -> str:
    """Mean and 95% interval over prompts."""
    x = np.array(list(values), float)
    low, high = mean_interval(x, jax.random.key(0))
    return f"{np.nanmean(x):.2f} ({low:.2f} to {high:.2f})"


def table(rows: list[dict[str, Any]], look: dict[str, np.ndarray]) -> str:
    look_LH = look["induction"]
    text = f"{len(rows)} held-out prompts\n\n| the oracle's heads | "
    text += " | ".join(f"{x} or more" for x in LOOKS) + " |\n|---|---|---|\n"
    text += "| heads, of " + f"{look_LH.size} | "
    text += " | ".join(f"{int((look_LH >= x).sum())}" for x in LOOKS) + " |\n"
    lines = {
        "precision at 5, by effect": lambda row, x: row["effect"][x],
        "the same by effect of the pattern": lambda row, x: row["pattern_effect"][x],
        "by effect, key not the query": lambda row, x: np.mean(
            elsewhere(row, look_LH) >= float(x)
        ),
        "ranked above another head, by effect": lambda row, x: row["auc"][x],
    }
    for name, of in lines.items():
        cells = [mean(of(row, f"{x}") for row in rows) for x in LOOKS]
        text += f"| {name} | " + " | ".join(cells) + " |\n"
    text += f"\nRank correlation over all heads: {mean(r['spearman'] for r in rows)}\n"
    return text + _cells(rows) + _pairs(rows)


def elsewhere(row: dict[str, Any], look_LH: np.ndarray) -> np.ndarray:
    """The oracle on the first five heads of cells that look beside their query."""
    heads = [tuple(c["head"]) for c in row["cells"] if c["place"] != "itself"]
    return np.array([look_LH[head] for head in list(dict.fromkeys(heads))[:5]])


def _cells(rows: list[dict[str, Any]]) -> str:
    """The strongest cells by what their key is to their query."""
    text = "\n| key | cells | of sizes of effects | head is one of the oracle's |\n"
    text += "|---|---|---|---|\n"
    for place, said in PLACES.items():
        share, size, is_one = [], [], []
        for row in rows:
            size_C = np.abs([cell["effect"] for cell in row["cells"]])
            here_C = np.array([cell["place"] == place for cell in row["cells"]])
            share.append(here_C.mean())
            size.append(size_C[here_C].sum() / size_C.sum())
            mine = [cell["oracle"] for cell in row["cells"] if cell["place"] == place]
            if mine and mine[0] is not None:
                is_one.append(np.mean(np.array(mine) >= LOOKS[0]))
        known = mean(is_one) if is_one else ""
        text += f"| {said} | {mean(share)} | {mean(size)} | {known} |\n"
    return text


def _pairs(rows: list[dict[str, Any]]) -> str:
    """What pairs of the induction cells say, by layers."""
    groups = {
        f"up to layer {EARLY}": lambda p: p["layer"] <= EARLY,
        "later": lambda p: p["layer"] > EARLY,
    }
    lines = {
        "what the oracle says of the head": lambda p: p["oracle"],
        "block is the first of all, score": lambda p: p["by score"]["block_rank"] == 1,
        "first of all, competition": lambda p: p["by competition"]["block_rank"] == 1,
        "key position is first, competition": lambda p: (
            p["by competition"]["key_rank"] == 1
        ),
        "block over the score": lambda p: p["by score"]["block_over_sum"],
        "block, of all blocks' sizes, score": lambda p: p["by score"]["block_of_sizes"],
        "strongest pair is of the block": lambda p: p["first_pair"],
        f"of the {PAIRS} strongest pairs": lambda p: p["pairs"],
    }
    text = "\n| induction cells | " + " | ".join(groups) + " |\n"
    text += "|---" * (1 + len(groups)) + "|\n"
    every = [pair for row in rows for pair in row["pairs"]]
    counts = [sum(map(test, every)) for test in groups.values()]
    text += "| cells | " + " | ".join(map(str, counts)) + " |\n"
    for name, of in lines.items():
        cells = []
        for test in groups.values():
            mine = [[of(p) for p in row["pairs"] if test(p)] for row in rows]
            cells.append(mean(np.mean(x) for x in mine if x) if any(mine) else "")
        text += f"| {name} | " + " | ".join(cells) + " |\n"
    worst = max(p["error"] for p in every)
    return text + f"\nPairs sum to scores within {worst:.1e} (relative).\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("out/induction"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    use_compilation_cache()
    model = jaxclt.load_model("smollm2-135m")
    dictionary = jaxclt.load_dictionary("neurons:32", model)
    look = oracle(model)
    path = args.out / "results.json"
    rows = json.loads(path.read_text("utf-8")) if path.exists() else []
    for number in range(len(rows), args.prompts):
        start = time.perf_counter()
        rows.append(of_prompt(model, dictionary, number, look))
        path.write_text(json.dumps(rows, indent=1, default=float))
        (args.out / "table.md").write_text(table(rows, look))
        print(f"{number + 1}/{args.prompts} {time.perf_counter() - start:.0f} s")
    print(table(rows, look))


if __name__ == "__main__":
    main()
