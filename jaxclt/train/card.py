"""What came out of a run, for people and programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxclt.files.atomic import atomic_path
from jaxclt.files.lines import read_lines
from jaxclt.precision import asked_precision
from jaxclt.text.corpus import Windows
from jaxclt.train.params import n_params
from jaxclt.train.prepare import Job
from jaxclt.version import __version__

__all__ = ["make_card", "one_line", "plot", "readme"]


def make_card(
    job: Job,
    windows: Windows,
    final: dict[str, Any],
    seconds: dict[str, float],
    steps_timed: int,
) -> dict[str, Any]:
    """Recipe, data and metrics of a finished run as JSON.

    Args:
      job: the run.
      windows: its tokens.
      final: the last evaluation.
      seconds: spent by the last process, by activity.
      steps_timed: steps that process made.
    """
    model, config = job.model, job.config
    spec = config.spec(model.cfg)
    device = jax.devices()[0]
    return {
        "model": model.name,
        "model_hash": model.hash,
        "kind": "PLT" if spec.span == 1 else "CLT",
        "parameters": n_params(spec, skip=config.skip),
        "dictionary": dataclasses.asdict(spec.clt_config()),
        "recipe": dataclasses.asdict(config),
        "data": {
            "path": job.data,
            "train_windows": len(windows.train_WS),
            "heldout_windows": len(windows.held_WS),
            "context": windows.train_WS.shape[1],
            "digest": windows.digest,
            "first_position": windows.first,
        },
        "metrics": {k: v for k, v in final.items() if k not in ("kind",)},
        "timing_s": seconds,
        "steps_timed": steps_timed,
        "environment": {
            "jaxclt": __version__,
            "jax": jax.__version__,
            "device": f"{device.platform}:{device.device_kind}",
            "n_devices": jax.device_count(),
            "precision": asked_precision(),
        },
    }


def one_line(record: dict[str, Any]) -> str:
    """An evaluation in a line."""
    parts = [
        f"step {record['step']}: held-out FVU {record['fvu']:.3f}",
        f"L0 {record['l0']:.1f} a layer",
        f"dead {record['dead']:.1%}",
    ]
    if "top1" in record:
        parts.append(f"replacement top-1 {record['top1']:.1%} KL {record['kl']:.2f}")
    if "graphs" in record:
        g = record["graphs"]
        parts.append(
            f"graphs: replacement {g['replacement']:.2f} completeness "
            f"{g['completeness']:.2f} path length {g['mean_path_length']:.2f}"
        )
    return ", ".join(parts)


_MEASURED = (
    ("unexplained variance (FVU), mean of layers", "fvu", ".4f"),
    ("features active per token and layer", "l0", ".2f"),
    ("features silent on the held-out text", "dead", ".1%"),
    ("features active on over 10% of tokens", "dense", ".2%"),
    ("replacement model, top-1 agreement", "top1", ".1%"),
    ("KL(model, replacement), nats", "kl", ".3f"),
)
_TUNED = (
    ("FVU", "fvu", ".4f"),
    ("top-1 agreement", "top1", ".1%"),
    ("KL", "kl", ".3f"),
)


def readme(card: dict[str, Any]) -> str:
    """The model card."""
    m, recipe = card["metrics"], card["recipe"]
    rows = [
        (text, format(m[key], digits)) for text, key, digits in _MEASURED if key in m
    ]
    if "graphs" in m:
        rows += [
            (f"graphs: {key.replace('_', ' ')}", f"{m['graphs'][key]:.3f}")
            for key in ("replacement", "completeness", "mean_path_length")
        ]
    if "finetuned" in m:
        tuned = m["finetuned"]
        head = f"`finetuned/`, after {tuned['kl_steps']} steps on the KL"
        rows += [(f"{head}: {x}", format(tuned[key], f)) for x, key, f in _TUNED]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    settings = "\n".join(f"| `{k}` | `{v}` |" for k, v in recipe.items())
    d = card["dictionary"]
    first = card["data"]["first_position"]
    left_out = "Special" if first else "The first position of a text and special"
    return (
        f"# {card['kind']} for {card['model']}\n\n"
        f"{d['n_features']} features a layer, span {d['span']} of {d['n_layers']} "
        f"layers, {card['parameters']:,} parameters, reads `{d['read']}`.\n"
        f"Trained by jaxclt {card['environment']['jaxclt']} on {recipe['tokens']:,} "
        f"tokens of `{card['data']['path']}`.\n\n"
        "`dictionary/` is in circuit-tracer's format:\n\n"
        "    jaxclt trace PROMPT --model "
        f"{card['model']} --dictionary THIS_DIRECTORY --out DIR\n\n"
        f"## Measured on held-out text ({m['heldout_tokens']:,} tokens)\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"{left_out} tokens were never trained on.\n\n"
        f"## Recipe\n\n| | |\n|---|---|\n{settings}\n"
    )


def plot(metrics: Path, out: Path) -> None:
    """Curves of a metrics.jsonl as a picture: FVU, L0, dead share, replacement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    records = read_lines(metrics)
    steps = [r for r in records if r.get("kind") == "step"]
    evals = [r for r in records if r.get("kind") == "eval"]
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2)
    shown = {
        "fvu": "unexplained variance",
        "l0": "active features a layer",
        "dead": "dead share",
        "top1": "replacement top-1",
    }
    for panel, (name, label) in zip(panels.flat, shown.items(), strict=True):
        for group, style, legend in ((steps, "-", "batch"), (evals, "o", "held-out")):
            if name == "dead" and group is evals:
                continue  # another definition: silent on the held-out text
            at = [(r["step"], r[name]) for r in group if name in r]
            if at:
                panel.plot(*zip(*at, strict=True), style, label=legend)
        panel.set(xlabel="step", ylabel=label)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    with atomic_path(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
