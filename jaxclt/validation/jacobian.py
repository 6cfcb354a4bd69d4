"""Does a layer of the dictionary have the derivative of the MLP it stands for?

With v ~ N(0, 1) added to the stream that the MLP reads,

    nmse = E |J_dict v - J_mlp v|^2 / E |J_mlp v|^2

estimates the squared Frobenius distance of the two Jacobians as a share of the MLP's
own (maths 16.9; 1 is what a dictionary without any response gets). Of a cross-layer
transcoder, the decoders into the same layer only: the others read other layers. The
reconstruction can be good and this bad, for it asks about directions, not values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array

from jaxclt.lm import layers
from jaxclt.patching.how import How
from jaxclt.patching.local import Tables, encode
from jaxclt.patching.patchable import Patchable, read
from jaxclt.precision import jit
from jaxclt.validation.perturb import Agreement, compare

__all__ = ["jacobian_agreement"]


@partial(jit, static_argnames=("how", "n_probes"))
def jacobian_agreement(
    model: Patchable,
    tables: Tables,
    key: Array,
    *,
    how: How,
    n_probes: int = 8,
) -> Agreement:
    """Cosine, nmse and size ratio [L] of the two responses, over all positions.

    Args:
      model: the recording.
      tables: of the replacement model; features that are silent do not respond.
      key: of the probes.
      how: whether the norm's denominator is held in both derivatives, and a neuron's
        gate in the dictionary's.
      n_probes: directions at each position; layers share them.
    """
    rec, cfg, gates = model.recording, model.cfg, how.of(model.coder).gates
    probe_PTD = jax.random.normal(key, (n_probes, *rec.embed_TD.shape))

    def one(x: Any) -> Agreement:
        p, table, skip_DD, clean_TD, clean_T, post_T = x

        norm = layers.mlp_norm(p)

        def scale(mid_TD: Array) -> Array:
            if how.norms == "frozen":
                return clean_T
            return layers.norm_scale(mid_TD, norm, eps=cfg.norm_eps)

        def replaced(mid_TD: Array) -> Array:
            read_TD = read(model, mid_TD, scale(mid_TD), p)
            a_TU = encode(model, table, read_TD, p, post_T, gates=gates)
            out_TD = model.coder.write(p, table.dec, a_TU)[0]
            return out_TD if skip_DD is None else out_TD + read_TD @ skip_DD

        def real(mid_TD: Array) -> Array:
            normed_TD = layers.normalise(mid_TD, scale(mid_TD), norm)
            held_T = post_T if how.norms == "frozen" else None
            return layers.mlp(p, normed_TD, cfg=cfg, scale_T=held_T)

        def response(f: Any) -> Array:
            moved = jax.vmap(lambda v_TD: jax.jvp(f, (clean_TD,), (v_TD,))[1])
            return moved(probe_PTD.astype(clean_TD.dtype))[None]

        found = compare(
            *(response(f).reshape(1, n_probes, -1) for f in (replaced, real))
        )
        return Agreement(
            found.cosine_L[0], found.nmse_L[0], found.ratio_L[0], found.finite
        )

    xs = (
        model.params.blocks, tables, model.skip_LDD, rec.mid_LTD,
        rec.frozen.mlp_scale_LT, rec.frozen.post_mlp_scale_LT,
    )  # fmt: skip
    return jax.lax.map(one, xs)
