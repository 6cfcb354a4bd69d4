"""A judge without an API: how likely a language model finds a text after excerpts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.dashboards.examples import Shown
from jaxclt.evaluation.judges import Answer, better
from jaxclt.evaluation.trials import Trial
from jaxclt.io.model import Model
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import embed, native_mlp, run, unembed
from jaxclt.precision import jit
from jaxclt.shapes import bucket
from jaxclt.text.windows import BATCH_TOKENS
from jaxclt.types import LMParams

__all__ = ["LocalJudge"]

_TOGETHER = 32  # trials whose texts are sorted by length together
_SHORTEST = 64


class _Job(NamedTuple):
    """A text whose log-probability after a prefix is wanted."""

    prefix: tuple[int, ...]
    text: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LocalJudge:
    """Compares log-probabilities under a causal language model.

    Sort: ``log p(query | excerpts of feature i)`` for both features. Contrastive:
    ``log p(sentence | excerpts) - log p(sentence)`` for both sentences, so that neither
    wins by being likely anyway. Excerpts come weakest first, each with the tokens on
    which the feature was active after it; what the model has no room for is cut from
    the front, where the weakest are.

    Attributes:
      model: any model that `load_model` reads; it need not be the one that is traced.
    """

    model: Model

    @property
    def name(self) -> str:
        """With the weights' hash."""
        return f"local:{self.model.name}:{self.model.hash[:12]}"

    def judge(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Answer]]:
        """The answer with the larger score."""
        for start in range(0, len(trials), _TOGETHER):
            part = trials[start : start + _TOGETHER]
            jobs = [self._jobs(trial) for trial in part]
            found = self.log_probs([job for each in jobs for job in each])
            for i, (trial, each) in enumerate(zip(part, jobs, strict=True), start):
                value = [found[job] for job in each]
                scores = (value[0], value[1])
                if trial.kind == "contrastive":
                    scores = (value[0] - value[2], value[1] - value[3])
                yield i, Answer(choice=better(scores, trial), scores=scores)

    def _jobs(self, trial: Trial) -> list[_Job]:
        prefixes = [self._encode(_prefix(shown)) for shown in trial.shown]
        texts = [self._encode(f" {''.join(tokens).strip()}") for tokens in trial.query]
        if trial.kind == "sort":
            return [self._fit(prefix, texts[0]) for prefix in prefixes]
        alone = self._encode("Text:")
        return [self._fit(p, t) for p in (prefixes[0], alone) for t in texts]

    def _encode(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text, "never")

    def _fit(self, prefix: Sequence[int], text: Sequence[int]) -> _Job:
        """A job no longer than the model's context."""
        opening, room = self.model.tokenizer.opening, self.model.cfg.n_ctx
        # Something must stand before the first token of the text.
        text = text[: room - len(opening) - 1]
        left = room - len(opening) - len(text)
        prefix = prefix[max(0, len(prefix) - left) :]
        return _Job(tuple(opening) + tuple(prefix), tuple(text))

    def log_probs(self, jobs: Sequence[_Job]) -> dict[_Job, float]:
        """Log-probability of each text after its prefix, each job run once.

        A job's batch depends on which jobs there are and not on their order, so that
        the numbers are the same to the last bit in either order of a trial.
        """
        by_size: dict[int, list[_Job]] = {}
        for job in sorted(set(jobs)):
            n = len(job.prefix) + len(job.text)
            size = min(bucket(n, _SHORTEST), self.model.cfg.n_ctx)
            by_size.setdefault(size, []).append(job)
        found: dict[_Job, float] = {}
        for size, members in by_size.items():
            rows = max(1, BATCH_TOKENS // size)
            for start in range(0, len(members), rows):
                part = members[start : start + rows]
                token_BT = np.zeros((rows, size), np.int32)
                text_BT = np.zeros((rows, size), bool)
                for b, job in enumerate(part):
                    n, end = len(job.prefix), len(job.prefix) + len(job.text)
                    token_BT[b, :end] = (*job.prefix, *job.text)
                    text_BT[b, n:end] = True
                log_p_B = _log_probs(
                    self.model.params,
                    jnp.asarray(token_BT),
                    jnp.asarray(text_BT),
                    self.model.cfg,
                )
                values = np.asarray(log_p_B, np.float64).tolist()
                found |= dict(zip(part, values, strict=False))
        return found


def _prefix(shown: Sequence[Shown]) -> str:
    lines = []
    for excerpt in shown[::-1]:
        largest = max(map(abs, excerpt.acts), default=0.0)
        pairs = zip(excerpt.tokens, excerpt.acts, strict=True)
        words = [t.strip() for t, a in pairs if abs(a) >= largest / 2 > 0]
        lines.append(f"Text: {''.join(excerpt.tokens).strip()}")
        lines.append(f"Words: {', '.join(dict.fromkeys(words))}\n")
    return "\n".join([*lines, "Text:"])


@partial(jit, static_argnames="cfg")
def _log_probs(
    params: LMParams, token_BT: Array, text_BT: Array, cfg: LMConfig
) -> Array:
    """Sum over the marked tokens of their log-probability, float32 [B]."""

    def stream(token_T: Array) -> Array:
        start_TD = embed(params, token_T)
        policy = native_mlp(cfg)
        return run(params, start_TD, policy, cfg=cfg, keep_patterns=False).out_TD

    def total(row: tuple[Array, Array, Array]) -> Array:
        out_TD, token_T, text_T = row
        logit_TV = unembed(params, out_TD[:-1]).astype(jnp.float32)
        log_p_TV = jax.nn.log_softmax(logit_TV, axis=-1)
        log_p_T = jnp.take_along_axis(log_p_TV, token_T[1:, None], axis=1)[:, 0]
        return jnp.sum(jnp.where(text_T[1:], log_p_T, jnp.zeros((), jnp.float32)))

    out_BTD = jax.vmap(stream)(token_BT)
    # One row's vocabulary at a time.
    return jax.lax.map(total, (out_BTD, token_BT, text_BT))
