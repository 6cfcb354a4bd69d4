"""The decoder against transformers on torch, every recorded tap.

Goldens (made by tests/goldens/make_llama.py) run by default; the live comparisons need
torch and carry the marker `parity`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclt.io.model import load_model
from jaxclt.io.weights_hf import load_hf
from jaxclt.lm.run import record, unembed

GOLDENS = Path(__file__).parents[1] / "goldens"
VARIANTS = ("llama_gqa_tied", "llama_mha_bias", "llama_wide_head")


def our_taps(params, cfg, token_T) -> dict[str, np.ndarray]:
    token_T = jnp.asarray(token_T, jnp.int32)
    recording = jax.jit(record, static_argnames="cfg")(params, token_T, cfg=cfg)
    return {
        "embed_TD": recording.embed_TD,
        "resid_LTD": recording.resid_LTD,
        "mid_LTD": recording.mid_LTD,
        "write_LTD": recording.write_LTD,
        "pattern_LHTS": recording.frozen.pattern_LHTS,
        "out_TD": recording.out_TD,
        "logits_TV": unembed(params, recording.out_TD),
    }


def assert_same_taps(ours, theirs) -> None:
    """Equal to float32 rounding, which is relative to a tensor's largest entry."""
    for name, x in ours.items():
        scale = np.abs(theirs[name]).max()
        np.testing.assert_allclose(
            x, theirs[name], rtol=0, atol=1e-5 * scale, err_msg=name
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tap_equals_the_golden_of_transformers(variant: str):
    params, cfg = load_hf(GOLDENS / variant)
    with np.load(GOLDENS / variant / "taps.npz", allow_pickle=False) as theirs:
        assert_same_taps(our_taps(params, cfg, theirs["token_T"]), theirs)


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tap_equals_transformers_live(variant: str, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(sys, "path", [str(GOLDENS), *sys.path])
    from make_llama import taps  # pyright: ignore[reportMissingImports]
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(
        GOLDENS / variant, attn_implementation="eager"
    )
    token_T = np.array([5, 3, 3, 9, 11, 2, 7, 1, 30])
    params, cfg = load_hf(GOLDENS / variant)
    theirs = taps(model, torch.tensor(token_T))
    assert_same_taps(our_taps(params, cfg, token_T), theirs)


@pytest.mark.parity
def test_smollm2_logits_equal_transformers(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    from jaxclt.io.weights_hf import save_hf

    ours = load_model("smollm2-135m")
    save_hf(ours.params, ours.cfg, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for prompt in ("The Eiffel Tower is in the city of", "def add(a, b):\n    return"):
        ids = ours.tokenizer.encode(prompt)
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0].numpy()
        got = our_taps(ours.params, ours.cfg, ids)["logits_TV"]
        np.testing.assert_allclose(got, expected, atol=1e-3)
