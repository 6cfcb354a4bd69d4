"""The decoder against transformers on torch, every recorded tap.

Goldens (made by make_llama.py and make_families.py in tests/goldens) run by default;
the live comparisons need torch and carry the marker `parity`.
"""

from __future__ import annotations

import dataclasses
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
LLAMA = ("llama_gqa_tied", "llama_mha_bias", "llama_wide_head")
# What each is there for: switched off, its logits must be others.
SWITCHES = {
    "llama3": ["rope_scaling"],
    "llama_linear": ["rope_scaling"],
    "mistral": ["window"],
    "qwen2": ["q_bias_LHC"],
    "qwen2_window": ["window", "local_L"],
    "qwen3": ["q_norm_LC", "k_norm_LC"],
    "gemma2": [
        "window",
        "local_L",
        "query_scale",
        "attn_cap",
        "logit_cap",
        "embed_scale",
        "post_attn_LD",
        "post_mlp_LD",
    ],
    "gemma3": ["rope_scaling", "rope_local_theta", "window", "q_norm_LC"],
    "gpt2": ["norm_mlp_bias_LD", "position_TD"],
    "neox": ["d_rotary", "parallel", "norm_out_bias_D"],
    "neox_serial": ["rope_scaling"],
    "qwen3_yarn": ["rope_scaling", "query_scale"],
    "gemma3_images": ["local_L"],
}
VARIANTS = (*LLAMA, *(f"family_{name}" for name in SWITCHES))


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


@pytest.mark.parametrize("name", SWITCHES)
def test_the_goldens_see_every_switch(name: str):
    """A model without one of its family's switches is another model."""
    folder = GOLDENS / f"family_{name}"
    params, cfg = load_hf(folder)
    with np.load(folder / "taps.npz", allow_pickle=False) as theirs:
        token_T, logits_TV = theirs["token_T"], theirs["logits_TV"]
    for switch in SWITCHES[name]:
        less = {"params": params, "cfg": cfg}
        if hasattr(cfg, switch):
            assert getattr(cfg, switch) is not None
            off = False if switch == "parallel" else None
            less["cfg"] = dataclasses.replace(cfg, **{switch: off})
        else:
            part = params if hasattr(params, switch) else params.blocks
            assert getattr(part, switch) is not None
            part = dataclasses.replace(part, **{switch: None})
            is_block = hasattr(part, "q_LDHC")
            less["params"] = (
                dataclasses.replace(params, blocks=part) if is_block else part
            )
        got = our_taps(less["params"], less["cfg"], token_T)["logits_TV"]
        assert np.abs(got - logits_TV).max() > 1e-2, switch


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tap_equals_transformers_live(variant: str, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(sys, "path", [str(GOLDENS), *sys.path])
    from golden_models import taps  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text = not variant.endswith("images")
    model_class = AutoModelForCausalLM if text else AutoModelForImageTextToText
    model = model_class.from_pretrained(
        GOLDENS / variant, attn_implementation="eager"
    ).eval()
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
