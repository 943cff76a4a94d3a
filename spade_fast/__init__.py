"""SPADE: prune a trained network for one image, then explain the sparse trace that is left.

>>> import spade_fast as sf
>>> net = sf.load_model("efficientnet_lite0")
>>> trace = sf.trace(net, photo)  # a PIL image
>>> with trace.applied(net):
...     ...  # any interpretability method
>>> sf.explain(net, photo, trace=trace).save("out")
"""

from importlib.metadata import version

from spade_fast import metrics, overlap, presets, reference
from spade_fast.attribution import attribute
from spade_fast.augmentation import Augmentation
from spade_fast.checkpoints import load_checkpoint
from spade_fast.errors import InvalidInputError, MissingDependencyError, SpadeError
from spade_fast.evaluation import evaluate
from spade_fast.explanation import Explanation, Prediction, explain
from spade_fast.figures import gallery
from spade_fast.images import load_image
from spade_fast.layers import hessian
from spade_fast.methods import METHODS, register_method
from spade_fast.models import LoadedModel, load_model
from spade_fast.plans import ErrorBudget, SparsityPlan
from spade_fast.preparation import Prepared, prepare
from spade_fast.preprocessing import Preprocess
from spade_fast.reports import write_report
from spade_fast.running import run
from spade_fast.solver import Solution, solve
from spade_fast.sparse_classifier import SparseFC, penultimate_features, sparse_fc
from spade_fast.store import Store
from spade_fast.trace_comparison import TraceComparison, compare
from spade_fast.tracer import trace, trace_many
from spade_fast.traces import LayerTrace, Trace
from spade_fast.tuning import Tuning, tune
from spade_fast.visualization import Visualization, visualize

__version__ = version("spade-fast")

__all__ = [
    "METHODS",
    "Augmentation",
    "ErrorBudget",
    "Explanation",
    "InvalidInputError",
    "LayerTrace",
    "LoadedModel",
    "MissingDependencyError",
    "Prediction",
    "Prepared",
    "Preprocess",
    "Solution",
    "SpadeError",
    "SparseFC",
    "SparsityPlan",
    "Store",
    "Trace",
    "TraceComparison",
    "Tuning",
    "Visualization",
    "attribute",
    "compare",
    "evaluate",
    "explain",
    "gallery",
    "hessian",
    "load_checkpoint",
    "load_image",
    "load_model",
    "metrics",
    "overlap",
    "penultimate_features",
    "prepare",
    "presets",
    "reference",
    "register_method",
    "run",
    "solve",
    "sparse_fc",
    "trace",
    "trace_many",
    "tune",
    "visualize",
    "write_report",
]
