"""jaxclt: circuit tracing in JAX.

Explains one prediction of a language model as a graph of interpretable features
(Ameisen et al. 2025, *Circuit Tracing*), exactly, and checks it against the model.

The names here are what a notebook needs. The rooms below are mapped in README.md; each
says in its module docstrings what it computes and for which part of the paper.

Importing this package touches no device and does not import transformers.
"""

from jaxclt.api import Page, attribute, explain, influence, prune, show
from jaxclt.attending.cells import HeadEffects
from jaxclt.attending.result import Attention
from jaxclt.clt.subset import Subset
from jaxclt.errors import InputError
from jaxclt.global_weights.circuit import (
    Inhibitors,
    global_inhibition,
    global_weights,
    head_inputs,
    strongest_virtual,
    virtual_weights,
)
from jaxclt.global_weights.files import (
    SavedGlobals,
    load_globals,
    load_statistics,
    save_statistics,
)
from jaxclt.global_weights.gather import coactivation
from jaxclt.global_weights.ranking import GlobalWeights, Links
from jaxclt.global_weights.statistics import Coactivation
from jaxclt.global_weights.statistics import merge as merge_coactivation
from jaxclt.global_weights.views import neighbourhood, write_globals
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.certificate import Certificate, certificate
from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.explain import EdgeParts, edge_parts
from jaxclt.graph.graph import Graph, GraphMeta, Pruning
from jaxclt.graph.inhibition import Inhibition, find_inhibition
from jaxclt.graph.nodes import find_node, node_name
from jaxclt.graph.paths import Path, describe_paths, strongest_paths
from jaxclt.graph.response import by_response
from jaxclt.graph.scores import Scores, path_length_curve, scores
from jaxclt.graph.supernodes import (
    SupernodeGraph,
    describe_supernodes,
    suggest_supernodes,
    supernode_graph,
)
from jaxclt.io.convert import convert as convert_dictionary
from jaxclt.io.dictionary import load_dictionary, save_dictionary
from jaxclt.io.graph_file import load_graph, save_graph
from jaxclt.io.model import Model, load_model
from jaxclt.patching.edits import Edit
from jaxclt.patching.patch import PatchResult, patch, patch_qk
from jaxclt.replacement.local import local_replacement, run_local
from jaxclt.text.windows import TokenWindows, read_windows
from jaxclt.trace.again import edge_parts_with_model, inhibition
from jaxclt.trace.attended import attention, head_effects
from jaxclt.trace.files import write_trace
from jaxclt.trace.prompt import Traced, trace_prompt
from jaxclt.trace.sweep import sweep_prompts
from jaxclt.types import Supernode
from jaxclt.version import __version__

__all__ = ["AttributeConfig", "Certificate", "Coactivation", "EdgeParts", "Edit"]
__all__ += ["GlobalWeights", "Graph", "GraphMeta", "Inhibition", "Inhibitors"]
__all__ += ["InputError", "Links", "Model", "Page", "PatchResult", "Path", "Pruning"]
__all__ += ["SavedGlobals", "Scores", "Subset", "Supernode", "SupernodeGraph"]
__all__ += ["TokenWindows", "Traced", "__version__", "attribute", "by_response"]
__all__ += ["certificate", "coactivation", "convert_dictionary", "describe_paths"]
__all__ += ["describe_supernodes", "edge_parts", "edge_parts_with_model", "explain"]
__all__ += ["find_inhibition", "find_node", "global_inhibition", "global_weights"]
__all__ += ["head_inputs", "influence", "inhibition", "load_dictionary", "load_globals"]
__all__ += ["load_graph", "load_model", "load_statistics", "local_replacement"]
__all__ += ["merge_coactivation", "neighbourhood", "node_name", "patch"]
__all__ += ["patch_qk", "path_length_curve", "prune", "read_windows", "run_local"]
__all__ += ["save_dictionary", "save_graph", "save_statistics", "scores", "show"]
__all__ += ["solve_total_effect", "strongest_paths", "strongest_virtual"]
__all__ += ["suggest_supernodes", "supernode_graph", "sweep_prompts", "trace_prompt"]
__all__ += ["virtual_weights", "write_globals", "write_trace"]
__all__ += ["Attention", "HeadEffects", "attention", "head_effects"]
