"""What Trojan AUC depends on: views, evidence, blocks, precision, damping, mask rule. See docs/experiments.md.

python benchmarks/ablations.py FOLDER_OF_PHOTOGRAPHS --out benchmarks/results/ablations
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import spade_fast as sf
from spade_fast.arms import Arm, dense_arm, trace_arm
from spade_fast.cli.measuring import unseen_files
from spade_fast.evaluation import attacked_cases, evaluate, first_cases
from spade_fast.implanting import load_demo
from spade_fast.tuning import Tuner

METHODS = ("saliency", "input_x_gradient", "guided_backprop")
BUDGET = "error budget 0.03"
CHANGES: dict[str, dict[str, Any]] = {
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


def main() -> None:
    """Measure every change on the same attacked photographs, none of which implanting or the plan has seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=40)
    arguments = parser.parse_args()

    network, trojans, report = load_demo()
    implanted = dict.fromkeys(report["settings"]["images"], "patches were implanted with it")
    held_out = unseen_files(arguments.photographs, implanted)
    everything = unseen_files(arguments.photographs, {})
    seen = {name: path for name, path in everything.items() if name not in held_out}
    # One plan for all: a budget of its own would let each change prune as far as it likes.
    calibration = first_cases(attacked_cases(network, seen, trojans), 8)
    tuner = Tuner(network, list(calibration.values()), "trojan")
    plan = tuner.plan(tuner.untuned_plans()["error budget"][BUDGET])
    arms: dict[str, Arm] = {"dense": dense_arm(network)}
    arms |= {name: trace_arm(network, plan, **change) for name, change in CHANGES.items()}
    cases = attacked_cases(network, held_out, trojans)
    settings: dict[str, Any] = {"metric": "trojan", "methods": METHODS, "limit": arguments.limit}
    found = evaluate(network, cases, arms, arguments.out, **settings, progress=True)
    found.save(arguments.out)
    print(found.tables())
    print(f"{' '.join(sys.argv)}; torch {torch.__version__}; spade_fast {sf.__version__}")


if __name__ == "__main__":
    main()
