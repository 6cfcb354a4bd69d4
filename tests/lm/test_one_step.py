"""One step through the frozen stream, and back."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from cases import case, case_active, close

from jaxclt.lm.step import Skip, down, up

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("with_skip", [False, True])
def test_down_is_the_transpose_of_up(parallel: bool, with_skip: bool) -> None:
    """As JAX transposes it, whatever axes stand after positions; host arrays too."""
    cfg = dataclasses.replace(case("skip").cfg, parallel=parallel)
    active = case_active("skip")
    assert active.skip_LDD is not None
    skip = Skip(active.scale_LT[1], active.skip_LDD[1]) if with_skip else None
    shape = (4, active.scale_LT.shape[1], 3, cfg.d_model)
    x, moved, read, g = np.asarray(jax.random.normal(jax.random.key(0), shape))
    _, back = jax.vjp(lambda x, moved: up(x, moved, skip, cfg=cfg), x, moved)
    found = down(g, skip, lambda g: g + read, cfg=cfg)
    for got, want in zip(found, back((read, g)), strict=True):
        close(got, want, 1e-14)
