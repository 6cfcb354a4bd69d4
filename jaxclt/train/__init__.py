"""Training of transcoders: objectives, data, the step, checkpoints, export.

Where things are, in the order a token passes through them:

| module | what it holds |
|---|---|
| `text`, `harvest` | text -> windows of tokens -> what encoders read and MLPs write |
| `normalise`, `chunks` | per-layer scales; shuffled chunks by their position |
| `params`, `activations`, `matmul` | weights by source layer; gates and their STEs |
| `penalties`, `objectives`, `schedules` | losses as pure functions, and their weights |
| `step` | one update: autodiff, or two passes with one layer's gradient at a time |
| `evaluate`, `replacement` | held-out numbers, the replacement model, graph scores |
| `checkpoint`, `trainer`, `dryrun` | the shell: resumable runs, predictions of cost |
| `export`, `card`, `command` | the dictionary, its card, the command line |
"""
