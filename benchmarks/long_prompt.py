"""One long prompt in little memory: what was planned, what it took.

    JAXCLT_CACHE=... python benchmarks/long_prompt.py --tokens 2048 --features 128 \
        --memory 12 --append benchmarks/RESULTS.md
    python benchmarks/long_prompt.py --smoke

The prompt is this repository's README, over and over, cut to so many tokens. It exits
with 1 if the process held more than it was allowed, or if a row does not sum to what it
explains.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

from _timing import command_line, hardware_line, peak_rss_gib, publish, title

HERE = Path(__file__).resolve().parent
SMOKE_MODEL = HERE.parent / "tests/goldens/circuit_tracer_clt/model"


def prompt_of(tokenizer: Any, n_tokens: int, text: str) -> str:
    """The start of a text that has so many tokens, or a few less."""
    words = text.split(" ")
    low, high = 1, len(words)
    while low < high:  # the most words that fit
        middle = (low + high + 1) // 2
        fits = len(tokenizer.encode(" ".join(words[:middle]), "auto")) <= n_tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    return " ".join(words[:low])


def section(traced: Any, error: float, args: argparse.Namespace, hardware: str) -> str:
    work, timing = traced.work, traced.timing
    memory = work["memory_gb"].items()
    parts = ", ".join(f"{name} {gb:.2f}" for name, gb in memory if gb >= 0.01)
    planned = sum(work["memory_gb"].values())
    lines = [
        title("long_prompt"),
        "",
        f"{hardware}.",
        "",
        f"{len(traced.graph.token_T):,} tokens, {Path(args.model).name}, "
        f"{args.dictionary}, float32, `--memory {args.memory:g}`: "
        f"{traced.n_active:,} active features, {traced.graph.n_features:,} attributed "
        f"in {timing['total']:.0f} s ({work['tflop']:.1f} TFLOP, {work['direction']}, "
        f"patterns {work['patterns']}, chunks of {work['chunk_size']}, a pool of "
        f"{work.get('pool', 0):,}).",
        "",
        f"Planned {planned:.2f} GB ({parts}); the process held at most "
        f"{peak_rss_gib() * 2**30 / 1e9:.2f} GB. Largest relative row error "
        f"{error:.1e}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dictionary", default="neurons:32")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--memory", type=float, default=12.0, help="GB")
    args = parser.parse_args()
    if args.smoke:
        args.model, args.dictionary = str(SMOKE_MODEL), "neurons"
        args.tokens, args.features, args.memory = 32, 16, 2.0

    import jaxclt
    from jaxclt.graph.attribute import AttributeConfig
    from jaxclt.trace.prompt import trace_prompt

    model = jaxclt.load_model(args.model)
    dictionary = jaxclt.load_dictionary(args.dictionary, model)
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    text = " ".join(itertools.repeat(readme, 1 + args.tokens // 400))
    config = AttributeConfig(
        max_features=args.features, memory_gb=args.memory, tolerance=0.0
    )
    hardware = hardware_line()

    begun = time.monotonic()

    def progress(done: int, total: int) -> None:
        minutes = (time.monotonic() - begun) / 60
        print(f"{minutes:6.1f} min: {done} of {total} rows", file=sys.stderr)

    prompt = prompt_of(model.tokenizer, min(args.tokens, model.cfg.n_ctx), text)
    traced = trace_prompt(model, dictionary, prompt, config=config, on_rows=progress)
    error = jaxclt.certificate(traced.graph).max_relative_row_error
    text = section(traced, error, args, hardware)
    good = peak_rss_gib() * 2**30 / 1e9 <= args.memory and error <= 1e-4
    publish(text, args.append if good else None)
    if not good:
        sys.exit("more memory than allowed, or rows that do not sum up")


if __name__ == "__main__":
    main()
