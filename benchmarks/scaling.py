"""Time and peak memory of whole traces against views, image size and threads: python benchmarks/scaling.py [RESULTS]

Every measurement is a process of its own, the published procedure (published.py) beside spade_fast. Writes
RESULTS.json, RESULTS.md and RESULTS.png; default: benchmarks/results/scaling.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import published
import torch
from bench_trace import PHOTO, PREPROCESS, load, native_hessians
from matplotlib.figure import Figure

import spade_fast as sf
from spade_fast import ops

HEADER = """# Scaling of whole traces

Command: `make bench`. Each figure is from a process of its own, a median where there are several rounds. Ratio:
published / spade_fast. Memory is the most that the process of spade_fast had, with Python, torch and the photograph;
beside it what the weights and the Hessians of the pruned layers take. ResNet-50: all layers at 0.9, else the last half
at 0.8. "hessians": forward passes and Hessians alone.
"""
COLUMNS = [
    "| network | what | views | pixels | threads | published, s | spade_fast, s | ratio | GiB | weights, Hessians |",
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
]
COLOURS = {"spade_fast": "#1b6ca8", "published": "#c65d21"}
MARKS = {"EfficientNet-Lite0": "o", "ResNet-50": "s"}


@dataclass(frozen=True)
class Run:
    """One measurement: a trace, or with "hessians" the dense pass alone; all threads of the machine if 0."""

    network: str
    variant: str
    views: int = 64
    size: int = 224
    threads: int = 0
    what: str = "trace"
    rounds: int = 3


def plan() -> list[Run]:
    lite, resnet = "EfficientNet-Lite0", "ResNet-50"
    fewer = [1 << i for i in range(os.cpu_count().bit_length()) if 1 << i < os.cpu_count()]
    runs = []
    for variant in ("spade_fast", "published"):
        few = {"variant": variant, "rounds": 3 if variant == "spade_fast" else 1}
        runs += [Run(lite, views=views, **few) for views in (16, 64, 256, 1024)]
        runs += [Run(lite, size=size, **few) for size in (128, 320, 448)]
        runs += [Run(lite, threads=threads, **few) for threads in fewer]
        runs += [
            Run(resnet, views=views, **{**few, "rounds": few["rounds"] if views == 64 else 1}) for views in (64, 1024)
        ]
    runs += [Run(resnet, "spade_fast", threads=threads) for threads in fewer]
    runs += [Run(resnet, "spade_fast", threads=threads, what="hessians") for threads in (*fewer, 0)]
    return runs


def measure(run: Run) -> dict[str, float]:
    """Median seconds, and the most memory that the process had meanwhile, in bytes (Linux)."""
    if run.threads:
        torch.set_num_threads(run.threads)
    net = load("real" if run.network == "EfficientNet-Lite0" else run.network)
    preprocess = sf.Preprocess(
        mean=PREPROCESS.mean, std=PREPROCESS.std, input_size=run.size, resize_size=run.size * 8 // 7
    )
    sparsity: Any = 0.9 if run.network == "ResNet-50" else sf.presets.last_half
    targets = {
        name: layer.requested_sparsity
        for name, layer in sf.trace(net, PHOTO, sparsity, num_augmentations=1, preprocess=preprocess).layers.items()
    }
    views = published.draw_views(PHOTO, run.size, run.views) if run.what == "hessians" else None
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far: loading took more than tracing may
    times = []
    for _ in range(run.rounds):
        start = time.perf_counter()
        if views is not None:
            native_hessians(net, sparsity, views)
        elif run.variant == "spade_fast":
            sf.trace(net, PHOTO, targets, num_augmentations=run.views, preprocess=preprocess, backend="native")
        else:
            published.trace(net.module, targets, preprocess, lambda: published.draw_views(PHOTO, run.size, run.views))
        times.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(times),
        "peak_bytes": peak_bytes(),
        "weight_bytes": 4 * sum(parameter.numel() for parameter in net.module.parameters()),
        "hessian_bytes": sum(4 * hessian_numbers(net.module.get_submodule(name)) for name in targets),
        "threads": torch.get_num_threads(),
    }


def peak_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def hessian_numbers(layer: torch.nn.Module) -> int:
    return getattr(layer, "groups", 1) * layer.weight.shape[1:].numel() ** 2


def measure_apart(run: Run) -> dict[str, Any]:
    """Measure in a process of its own."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(run.threads)} if run.threads else {})}
    program = [sys.executable, __file__, "--run", json.dumps(asdict(run))]
    result = subprocess.run(program, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found = {**asdict(run), **json.loads(result.stdout)}
    print(f"{run.network}, {run.variant}, {run.views} views, {run.size} pixels, {found['threads']} threads, "
          f"{run.what}: {found['seconds']:.2f} s, {found['peak_bytes'] / 2**30:.2f} GiB", file=sys.stderr)  # fmt: skip
    return found


def machine() -> str:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return (
        f"{model}, {os.cpu_count()} cores, instruction set {ops._C.cpu_capability}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, float32; commit {commit}"
    )


def table(results: dict[str, Any]) -> str:
    lines = [HEADER, f"{results['machine']}.", "", *COLUMNS]
    published_seconds = {key(run): run["seconds"] for run in results["runs"] if run["variant"] == "published"}
    for run in results["runs"]:
        if run["variant"] != "spade_fast":
            continue
        plain = published_seconds.get(key(run))
        cells = [run["network"], run["what"], str(run["views"]), str(run["size"]), str(run["threads"])]
        cells += ["", f"{run['seconds']:.2f}", ""] if plain is None else [
            f"{plain:.1f}", f"{run['seconds']:.2f}", f"**{plain / run['seconds']:.1f}**"
        ]  # fmt: skip
        cells += [f"{run['peak_bytes'] / 2**30:.2f}", f"{(run['weight_bytes'] + run['hessian_bytes']) / 2**30:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![Time against views, image size and threads](scaling.png)", ""])


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["network"], run["what"], run["views"], run["size"], run["threads"]


def plot(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    most = max(run["threads"] for run in results["runs"])
    panels = {
        "views": (axes[0], lambda run: run["size"] == 224 and run["threads"] == most),
        "size": (axes[1], lambda run: run["views"] == 64 and run["threads"] == most),
        "threads": (axes[2], lambda run: run["views"] == 64 and run["size"] == 224),
    }
    titles = {"views": "views of the image", "size": "side of the views, pixels", "threads": "threads"}
    for field, (axis, belongs) in panels.items():
        for network, mark in MARKS.items():
            for variant, colour in COLOURS.items():
                points = {
                    run[field]: run["seconds"]
                    for run in results["runs"]
                    if belongs(run) and (run["network"], run["variant"], run["what"]) == (network, variant, "trace")
                }
                if len(points) > 1:
                    xs = sorted(points)
                    label = f"{network}, {variant}"
                    axis.plot(xs, [points[x] for x in xs], color=colour, marker=mark, label=label)
        axis.set(xscale="log", yscale="log", xlabel=titles[field], ylabel="seconds for a trace")
        ticks = sorted({run[field] for run in results["runs"] if belongs(run)})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=Path(__file__).parent / "results" / "scaling")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(measure(Run(**json.loads(arguments.run)))))
        return
    results = {"machine": machine(), "runs": [measure_apart(run) for run in plan()]}
    arguments.results.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    arguments.results.with_suffix(".md").write_text(table(results), encoding="utf-8")
    plot(results).savefig(arguments.results.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
