"""The validation report of a graph: its predictions against patches of the model.

Seven measurements (the first, second, third and fifth after Circuit Tracing 2025,
sections G.1 to G.3 and 5.3), over the most influential features, a random control set
and supernodes:

1. the signed total effect on the targets against small and full patches in each mode;
2. influence against the divergence of an ablation, beside activation and direct edge;
3. influence between features against the change of downstream activations;
4. the same in the real model with attention patterns live, predicted by response, and
   how the patterns move;
5. how a perturbation spreads in the replacement model and in the model, and whether the
   dictionary has the MLPs' derivatives (Jacobian agreement);
6. how much of the answer's lead the shown graph makes: its necessity and sufficiency;
7. how the graph's shares of the prompt's tokens rank what the model loses without them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclt.errors import InputError
from jaxclt.files.atomic import write_text
from jaxclt.files.json_text import rounded, to_json
from jaxclt.lm.massive import massive_positions
from jaxclt.patching.subject import Subject
from jaxclt.runs.pace import logged
from jaxclt.types import Supernode
from jaxclt.validation import live, measures, plots
from jaxclt.validation.ablations import Bench, Counter
from jaxclt.validation.choice import Choice, ValidateOptions, choose
from jaxclt.validation.faithfulness import KINDS, VARIANTS, faithfulness
from jaxclt.validation.held_live import held_and_live
from jaxclt.validation.jacobian import jacobian_agreement
from jaxclt.validation.lines import token_agreement
from jaxclt.validation.rules import verdict
from jaxclt.validation.shown import Measure, shown
from jaxclt.validation.words import markdown

__all__ = ["ValidateOptions", "validate_graph", "write_validation"]


def validate_graph(
    subject: Subject,
    options: ValidateOptions | None = None,
    *,
    groups: Sequence[Supernode] | None = None,
    tokens: Sequence[Mapping[str, Any]] = (),
    reference: Subject | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure; the content of ``validation.json`` and what the plots need.

    Args:
      subject: the traced prompt, recorded again.
      options: how much to patch.
      groups: supernodes, of which the features that are nodes of the graph are ablated
        together; None or empty takes features that are active at several positions,
        each with all its positions.
      tokens: what the model loses without each, and the graph's shares of them, as a
        story has them.
      reference: a counterfactual prompt of as many tokens, at whose values what the
        graph does not show is held; None: at zero.
      on_done: progress, (patches done, patches planned); to the log if not given.

    Raises:
      InputError: if the graph has fewer than three features.
    """
    options = options or ValidateOptions()
    graph = subject.graph
    if graph.n_features < 3:
        raise InputError(
            f"the graph has {graph.n_features} features, validation needs at least 3: "
            "trace with more features"
        )
    key = jax.random.key(options.seed)
    choice = choose(graph, options, groups, key)
    planned = _planned(subject, options, choice)
    counter = Counter(on_done or partial(logged(), "validating"), planned)
    bench = Bench(
        subject=subject, options=options, choice=choice, key=key, counter=counter
    )
    effects, scatter, ablated = measures.total_effects(bench)
    influence, ranks = measures.influence_against_kl(bench, ablated)
    report: dict[str, Any] = {
        "prompt": graph.meta.prompt,
        "dictionary": graph.meta.dictionary,
        "model": graph.meta.model,
        "span": bench.span,
        "options": dataclasses.asdict(options),
        "n_top": int((~choice.control_B).sum()),
        "n_random": int(choice.control_B.sum()),
        **held_and_live(bench, ablated),
        "total_effect": effects,
        "influence_vs_kl": influence,
        "patterns_live": live.patterns_live(bench),
        "pairwise": measures.pairwise(bench, ablated),
        "supernodes": measures.supernodes(bench),
        "failures": measures.failures(bench, scatter["constrained"]),
        "shown": shown(
            subject, Measure(bench.ask(), bench.weight_K), key, reference=reference
        ),
    }
    massive = massive_positions(subject.patchable.recording, subject.n_tokens)
    if found := token_agreement(tokens, massive) if tokens else None:
        report["tokens"] = found
    report["faithfulness"], report["faithfulness_layers"] = faithfulness(
        subject,
        key,
        n_layers=options.n_layers,
        n_perturbed=options.n_perturbed,
        size=options.size,
        rise=options.rise,
        on_batch=counter.add,
    )
    report["patches"], report["diverged"] = counter.done, counter.diverged
    report["jacobian"] = _jacobian(subject, key)
    report["complete_replacement"] = subject.local.complete
    report["_scatter"], report["_ranks"] = scatter, ranks
    report["levels"], report["verdict"] = verdict(report)
    return report


def write_validation(report: dict[str, Any], directory: str | Path) -> None:
    """Write validation.json, validation.md and three plots; drops the plots' data."""
    folder = Path(directory)
    scatter, ranks = report.pop("_scatter"), report.pop("_ranks")
    plots.draw_effects(folder / "validation_effects.png", scatter)
    plots.draw_ranks(folder / "validation_influence.png", ranks)
    plots.draw_faithfulness(
        folder / "validation_faithfulness.png",
        report["faithfulness"],
        report["faithfulness_layers"],
    )
    for name, text in {
        "validation.json": to_json(report, ensure_ascii=False),
        "validation.md": markdown(report),
    }.items():
        write_text(folder / name, text)


def _planned(subject: Subject, options: ValidateOptions, choice: Choice) -> int:
    """Patches and perturbations that will be made."""
    B, small = len(choice.node_B), len(choice.small(options.n_small))
    n_modes = len(measures.MODES) - (subject.patchable.coder.shape.span == 1)
    n = n_modes * (B + small) + min(options.n_replacement, B) + len(choice.groups)
    n += 2 * B  # ablations with norms held, and in the local replacement model
    n += live.n_live_patches(subject, options, choice)
    n_spread = len(KINDS) * len(VARIANTS)
    return n + n_spread * options.n_layers * options.n_perturbed


def _jacobian(subject: Subject, key: jax.Array) -> dict[str, Any]:
    """Agreement of derivatives by layer, norms frozen and live."""
    out = {}
    for norms in ("frozen", "live"):
        how = VARIANTS[norms].of(subject.patchable.coder)
        found = jacobian_agreement(
            subject.patchable, subject.local.tables, key, how=how
        )
        out[norms] = {
            "cosine": [rounded(x) for x in np.asarray(found.cosine_L)],
            "nmse": [rounded(x) for x in np.asarray(found.nmse_L)],
        }
    return out
