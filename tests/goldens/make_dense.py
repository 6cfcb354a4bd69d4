"""Tiny random models of dense families, as transformers on torch writes and runs them.

Run with an environment that has torch and transformers; writes dense/<name>/ beside
this file: config.json, model.safetensors and logits.npz (float32, no pickles; with the
versions that it was made by).

    python tests/goldens/make_dense.py [name ...]
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from dense_models import DENSE, build, dense_taps, tokens

HERE = Path(__file__).parent / "dense"


def main() -> None:
    torch.set_num_threads(1)
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__}"
    for name in DENSE:
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        model, token_T = build(name), tokens(name)
        found = dense_taps(name, model, token_T)
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, safe_serialization=True)
        (folder / "generation_config.json").unlink(missing_ok=True)
        kept = {k: found[k] for k in ("token_T", "logits_TV")}
        np.savez(folder / "logits.npz", allow_pickle=False, made_by=made_by, **kept)
        size = sum(p.stat().st_size for p in folder.iterdir())
        top = found["pattern_LHTS"].max(-1).mean()
        print(f"{name}: {size} bytes, largest attention {top:.2f}")  # noqa: T201


if __name__ == "__main__":
    main()
