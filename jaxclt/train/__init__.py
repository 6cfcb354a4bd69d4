"""Training of transcoders: objectives, data, the step, checkpoints, export.

Where things are, in the order a token passes through them:

| module | what it holds |
|---|---|
| `sample` | text of the model -> windows; other text comes from `jaxclt.text` |
| `harvest` | windows -> what encoders read and MLPs write |
| `normalise`, `chunks`, `store` | per-layer scales; shuffled chunks, kept on disk |
| `params`, `matmul` | weights by source layer; the one matrix product |
| `penalties`, `objectives`, `schedules` | losses as pure functions, and their weights |
| `step` | one update: autodiff, or two passes with one layer's gradient at a time |
| `outcome` | held-out numbers, the replacement model, graph scores |
| `checkpoint`, `trainer`, `dryrun` | the shell: resumable runs, predictions of cost |
| `finetune` | the replacement model's KL, through all layers |
| `processes`, `tracking` | several machines; metrics to Weights & Biases |
| `export`, `card` | the dictionary and its card |
"""
