"""The global circuit: weights between features that do not depend on a prompt.

Circuit Tracing (2025), section 4: virtual weights, and what text says of how much they
are used. Residual-direct paths only: source and target stand at the same position.

| module | what it holds |
|---|---|
| `weights` | virtual weights, by block and streamed to the strongest |
| `statistics` | co-activation sums, dense for a subset, mergeable |
| `sparse` | the same for all pairs that ever fire together |
| `attention` | the sums for paths through one attention head |
| `inhibition` | sources whose removal lets a target fire |
| `ranking` | ERA, TWERA and their exact forms; strongest links; interference |
| `build` | weights for everything that statistics hold |
| `gather` | statistics of text, kept while they grow |
| `circuit` | what a notebook calls |
| `files`, `views` | what is saved, and what is shown |
| `shortlist` | features of a prompt that links suggest |

Axes beside those of `jaxclt.types`: U features of a subset, layer-major; Y tracked
vocabulary; P links. Matrices between features are targets by sources, RN or UU, held
as one tile per target layer, with a column for each feature of the layers below.
"""
