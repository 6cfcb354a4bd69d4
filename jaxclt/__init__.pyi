from . import tasks
from .api import Page, attribute, explain, influence, prune, show
from .attending.cells import HeadEffects
from .attending.result import Attention
from .circuits.find import CircuitOptions, circuit
from .circuits.result import Circuit
from .clt.subset import Subset
from .errors import InputError
from .global_weights.circuit import (
    Inhibitors,
    global_inhibition,
    global_weights,
    head_inputs,
    strongest_virtual,
    virtual_weights,
)
from .global_weights.files import (
    SavedGlobals,
    load_globals,
    load_statistics,
    save_statistics,
)
from .global_weights.gather import coactivation
from .global_weights.ranking import GlobalWeights, Links
from .global_weights.statistics import Coactivation, merge_coactivation
from .global_weights.views import neighbourhood, write_globals
from .graph.attribute import AttributeConfig
from .graph.certificate import Certificate, certificate
from .graph.effects import solve_total_effect
from .graph.explain import EdgeParts, edge_parts
from .graph.graph import Graph, GraphMeta, Pruning
from .graph.inhibition import Inhibition, find_inhibition
from .graph.nodes import find_node, node_name
from .graph.paths import Path, describe_paths, strongest_paths
from .graph.response import by_response
from .graph.scores import Scores, path_length_curve, scores
from .graph.supernodes import (
    SupernodeGraph,
    describe_supernodes,
    suggest_supernodes,
    supernode_graph,
)
from .graph.tables import save_graphml
from .io.convert import convert_dictionary
from .io.dictionary import load_dictionary, save_dictionary
from .io.graph_file import load_graph, save_graph
from .io.model import Model, load_model
from .patching.edits import Edit
from .patching.patch import PatchResult, patch, patch_qk
from .precision import at_precision
from .replacement.local import local_replacement, run_local
from .story.tell import Story, story, token_effects
from .text.windows import TokenWindows, read_windows
from .trace.again import edge_parts_with_model, inhibition
from .trace.attended import attention, head_effects
from .trace.files import write_trace
from .trace.prompt import Traced, trace_prompt
from .trace.sweep import sweep_prompts
from .types import Supernode
from .version import __version__

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
__all__ += ["Story", "at_precision", "save_graphml", "story", "token_effects"]
__all__ += ["Circuit", "CircuitOptions", "circuit", "tasks"]
