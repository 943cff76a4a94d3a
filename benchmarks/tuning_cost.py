"""What tuning costs, in evaluations of the same images at one plan. See docs/experiments.md.

python benchmarks/tuning_cost.py FOLDER_OF_PHOTOGRAPHS
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import spade_fast as sf
from spade_fast.arms import trace_arm
from spade_fast.evaluation import clean_cases, evaluate, first_cases
from spade_fast.imagesets import named_files
from spade_fast.tuning import tune

IMAGES = 20


def main() -> None:
    """Time an evaluation and a tuning, each of insertion, on the same images, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--method", default="saliency")
    arguments = parser.parse_args()
    network = sf.load_model("efficientnet_lite0")
    cases = list(first_cases(clean_cases(network, named_files(arguments.photographs)), IMAGES).values())
    arms = {"fast": trace_arm(network, sf.ErrorBudget(0.03))}
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for part in ("first", "second"):  # the first pays for imports
            start = time.perf_counter()
            evaluate(network, cases, arms, Path(folder) / part, methods=[arguments.method])
            seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    tuning = tune(network, cases, "insertion", arguments.method, progress=True)
    tuned = time.perf_counter() - start
    print(f"evaluation of {IMAGES} images at one plan: {seconds[1]:.1f} s")
    print(f"tuning on them: {tuned:.1f} s, {tuned / seconds[1]:.1f} times that; {tuning.evaluations} maps")


if __name__ == "__main__":
    main()
