"""jaxclt: circuit tracing in JAX.

Explains one prediction of a language model as a graph of interpretable features
(Ameisen et al. 2025, *Circuit Tracing*), exactly, and checks it against the model.

Where things are, in the order a prompt passes through them:

| room | what it holds |
|---|---|
| `jaxclt.trace`, `jaxclt.trace_files` | a prompt becomes a graph, then a directory |
| `jaxclt.provenance` | hops, heads and suppressed features of a traced prompt |
| `jaxclt.sweep` | the same for many prompts, resumable |
| `jaxclt.prompts` | what a prompt may be: text, token ids, a chat; files of them |
| `jaxclt.io` | files and names: models, dictionaries, tokenizers, graphs |
| `jaxclt.lm` | the decoder: forward, record, and the frozen linear stream |
| `jaxclt.clt` | dictionaries: encode, decode, what is active on a prompt |
| `jaxclt.replacement` | replacement models and error nodes |
| `jaxclt.graph` | targets, edges, influence, pruning, scores, certificate |
| `jaxclt.windows` | windows of tokens that passes over text run on |
| `jaxclt.global_text`, `jaxclt.global_gather` | co-activation over text |
| `jaxclt.global_circuit` | the shell of global weights |
| `jaxclt.global_views` | their files, page and neighbourhoods |
| `jaxclt.global_weights` | virtual weights, co-activation, ERA, TWERA |
| `jaxclt.subject`, `jaxclt.intervene` | the shell of patching a prompt |
| `jaxclt.patching` | edits, the three modes, batches, generation |
| `jaxclt.validate`, `jaxclt.validation` | a graph's predictions against patches |
| `jaxclt.viewer` | graph JSON and the page |
| `jaxclt.testing` | tiny models for tests and examples; planted circuits |

Importing this package touches no device and does not import transformers.
"""

__version__ = "0.1.0"

from jaxclt.api import Page, attribute, explain, influence, prune, show
from jaxclt.errors import InputError
from jaxclt.global_circuit import (
    Inhibitors,
    global_inhibition,
    global_weights,
    head_inputs,
    strongest_virtual,
    virtual_weights,
)
from jaxclt.global_gather import coactivation
from jaxclt.global_views import neighbourhood, write_globals
from jaxclt.global_weights.ranking import GlobalWeights, Links
from jaxclt.global_weights.statistics import Coactivation
from jaxclt.global_weights.statistics import merge as merge_coactivation
from jaxclt.global_weights.subset import Subset
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.certificate import Certificate, certificate
from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.explain import EdgeParts, edge_parts
from jaxclt.graph.graph import Graph, GraphMeta, Pruning
from jaxclt.graph.inhibition import Inhibition, find_inhibition
from jaxclt.graph.nodes import find_node
from jaxclt.graph.paths import Path, describe_paths, node_name, strongest_paths
from jaxclt.graph.scores import Scores, path_length_curve, scores
from jaxclt.graph.supernodes import (
    SupernodeGraph,
    describe_supernodes,
    suggest_supernodes,
    supernode_graph,
)
from jaxclt.intervene import PatchResult, patch
from jaxclt.io.convert import convert as convert_dictionary
from jaxclt.io.dictionary import load_dictionary, save_dictionary
from jaxclt.io.global_file import (
    SavedGlobals,
    load_globals,
    load_statistics,
    save_statistics,
)
from jaxclt.io.graph_file import load_graph, save_graph
from jaxclt.io.model import Model, load_model
from jaxclt.patching.edits import Edit
from jaxclt.provenance import edge_parts_with_model, inhibition
from jaxclt.replacement.local import local_replacement, run_local
from jaxclt.sweep import sweep_prompts
from jaxclt.trace import Traced, trace_prompt
from jaxclt.trace_files import write_trace
from jaxclt.types import Supernode
from jaxclt.windows import TokenWindows, read_windows

__all__ = [
    "AttributeConfig",
    "Certificate",
    "Coactivation",
    "EdgeParts",
    "Edit",
    "GlobalWeights",
    "Graph",
    "GraphMeta",
    "Inhibition",
    "Inhibitors",
    "InputError",
    "Links",
    "Model",
    "Page",
    "PatchResult",
    "Path",
    "Pruning",
    "SavedGlobals",
    "Scores",
    "Subset",
    "Supernode",
    "SupernodeGraph",
    "TokenWindows",
    "Traced",
    "__version__",
    "attribute",
    "certificate",
    "coactivation",
    "convert_dictionary",
    "describe_paths",
    "describe_supernodes",
    "edge_parts",
    "edge_parts_with_model",
    "explain",
    "find_inhibition",
    "find_node",
    "global_inhibition",
    "global_weights",
    "head_inputs",
    "influence",
    "inhibition",
    "load_dictionary",
    "load_globals",
    "load_graph",
    "load_model",
    "load_statistics",
    "local_replacement",
    "merge_coactivation",
    "neighbourhood",
    "node_name",
    "patch",
    "path_length_curve",
    "prune",
    "read_windows",
    "run_local",
    "save_dictionary",
    "save_graph",
    "save_statistics",
    "scores",
    "show",
    "solve_total_effect",
    "strongest_paths",
    "strongest_virtual",
    "suggest_supernodes",
    "supernode_graph",
    "sweep_prompts",
    "trace_prompt",
    "virtual_weights",
    "write_globals",
    "write_trace",
]
