"""What Trojan AUC depends on: plans and views; solvers; views, evidence, blocks, precision, damping, mask rule.

python benchmarks/ablations.py plans FOLDER_OF_PHOTOGRAPHS --out benchmarks/results/ablations/plans
python benchmarks/ablations.py settings FOLDER_OF_PHOTOGRAPHS --out benchmarks/results/ablations/settings
python benchmarks/ablations.py solvers FOLDER_OF_PHOTOGRAPHS --out benchmarks/results/ablations/solvers
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import spade_fast as sf
from spade_fast import presets
from spade_fast.arms import Arm, dense_arm, trace_arm
from spade_fast.cases import Case
from spade_fast.evaluation import attacked_cases, evaluate, first_cases, unseen_cases
from spade_fast.imagesets import named_files
from spade_fast.implanting import load_demo
from spade_fast.models import LoadedModel
from spade_fast.plans import SparsityPlan
from spade_fast.tracer import Sparsity
from spade_fast.tuning import Tuner

METHODS = ("saliency", "input_x_gradient", "lrp", "guided_backprop")
BUDGET = "error budget 0.03"
PLANS: dict[str, Sparsity] = {
    "all layers at 0.5": 0.5,
    "all layers at 0.8": 0.8,
    "last half at 0.8": presets.last_half,
    **{f"error budget {budget:g}": sf.ErrorBudget(budget) for budget in (0.01, 0.02, 0.03, 0.05, 0.1)},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "other views": {"seed": 1},
    "32 views": {"num_augmentations": 32},
    "128 views": {"num_augmentations": 128},
    "256 views": {"num_augmentations": 256},
    "1024 views": {"num_augmentations": 1024},
    "16 d positions": {"positions_per_column": 16},
    "4 d positions": {"positions_per_column": 4},
    "1 d positions": {"positions_per_column": 1},
    "8 columns a threshold": {"block_size": 8},
    "128 columns a threshold": {"block_size": 128},
    "bfloat16 inputs": {"hessian_dtype": torch.bfloat16},
    "float64 sums": {"hessian_dtype": torch.float64},
    "damping 0.001": {"damping": 0.001},
    "damping 0.1": {"damping": 0.1},
    "damping 1": {"damping": 1.0},
    "published mask rule": {"mask_rule": "published"},
    "refit": {"refit": True},
}


def solver_arms(network: LoadedModel) -> dict[str, Arm]:
    """Both solvers by the same plans, sparsities or budgets."""
    half = presets.last_half(network.module)
    plans: dict[str, Sparsity] = {
        f"last half at {share:g}": SparsityPlan(dict.fromkeys(half.targets, share)) for share in (0.8, 0.9, 0.95)
    }
    plans |= {f"error budget {budget:g}": sf.ErrorBudget(budget) for budget in (0.03, 0.1)}
    return {
        f"{name}, {solver}": trace_arm(network, plan, solver=solver)
        for name, plan in plans.items()
        for solver in ("fast", "exact")
    }


def plan_arms(network: LoadedModel) -> dict[str, Arm]:
    """Every plan on either kind of views."""
    preprocess = network.preprocess
    views = {"published": None, "partial": sf.Augmentation.partial(preprocess.input_size, preprocess.mean)}
    return {
        f"{name}, {kind} views": trace_arm(network, plan, augment=augment)
        for kind, augment in views.items()
        for name, plan in PLANS.items()
    }


def setting_arms(network: LoadedModel, calibration: Mapping[str, Case]) -> dict[str, Arm]:
    """Every setting, with one plan for all: a budget of its own would let each prune as far as it likes."""
    tuner = Tuner(network, list(calibration.values()), "trojan")
    plan = tuner.plan(tuner.untuned_plans()["error budget"][BUDGET])
    return {name: trace_arm(network, plan, **setting) for name, setting in SETTINGS.items()}


def main() -> None:
    """Measure every arm on the same attacked photographs, none of which implanting or a plan has seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plans", "settings", "solvers"])
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=30)
    arguments = parser.parse_args()

    network, trojans, report = load_demo()
    implanted = dict.fromkeys(report["settings"]["photographs"], "patches were implanted with it")
    files = named_files(arguments.photographs)
    seen = {name: path for name, path in files.items() if path.name in report["settings"]["images"]}
    arms = {"dense": dense_arm(network)}
    if arguments.what == "plans":
        arms |= plan_arms(network)
    elif arguments.what == "solvers":
        arms |= solver_arms(network)
    else:
        tuned_on = first_cases(attacked_cases(network, seen, trojans), 8)
        implanted |= {case.photograph: "the plan was made from it" for case in tuned_on.values()}
        arms |= setting_arms(network, tuned_on)
    cases = unseen_cases(attacked_cases(network, files, trojans), implanted)
    settings: dict[str, Any] = {"metric": "trojan", "methods": METHODS, "limit": arguments.limit}
    found = evaluate(network, cases, arms, arguments.out, **settings, progress=True)
    found.save(arguments.out)
    print(found.tables())
    print(f"{' '.join(sys.argv)}; torch {torch.__version__}; spade_fast {sf.__version__}")


if __name__ == "__main__":
    main()
