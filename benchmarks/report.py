"""Markdown tables of benchmark results: python benchmarks/report.py RESULTS.json > RESULTS.md"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

TITLES = {
    "hessian": "Hessians of single layers, 64 images",
    "columns": "Pruning column by column, given the factor",
    "solve": "Factoring and pruning single layers",
    "network": "Factoring and pruning a network",
    "elimination": "Eliminating rows, against one inverse for each of them (exact solver)",
    "trace": "Whole traces",
    "evidence": "Forward passes and Hessians alone, of given views",
}

HEADER = """# Benchmarks

Command: `make bench`. Medians in milliseconds, all variants in one run after checking that they agree; ratio =
reference / native. GFLOP/s counts necessary work, not what the reference does: for Hessians the products of shifted
maps at stride 1, and one triangle of d x d above that, which shifts still undercut. MB are the inputs and results, once
each. "of sgemm" can exceed 100 %: torch's own product does not reach this processor's peak. "of copy" is those bytes'
share of the rate of a large copy. Hessians of 1x1 layers stay below sgemm since every number read is packed first
(those of few channels do little else), and since a sum of d x d goes through memory for every megabyte of inputs;
those of 3x3 layers of 512 channels at 7 x 7 since their sums (30 MB) and results (85 MB) do; depthwise layers have a
multiplication for each number loaded. The solver prunes column after column, each waiting for the one before. To
eliminate a row takes d^3 / 6 multiply-adds. Whole traces: the reference runs in batches of 64, and once more in batches
of 16, as the native variant does.
"""

RUN_HEADER = """# Many photographs

Command: `make bench`. EfficientNet-Lite0, the default trace from 64 views. A run by each variant, from the files of the
photographs to those of the store, after checking that all of one thread an image make the same bytes. Each run starts
workers of Ray anew, which takes as long for ten thousand photographs: the second column is without it, and so is the
third, the ratio to the first variant.
"""


def variants(results: dict[str, Any]) -> dict[str, list[dict[str, dict[str, Any]]]]:
    """Results of each case by backend, by kind of benchmark."""
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for result in results["benchmarks"]:
        info = result["extra_info"]
        cases[info["kind"], info["layer"]][info["backend"]] = result
    found = defaultdict(list)
    for (kind, _), case in cases.items():
        if {"reference", "native"} <= case.keys():
            found[kind].append(case)
    return found


def row(case: dict[str, dict[str, Any]]) -> str:
    """One case: times, ratios of medians, rates of the native variant."""
    native, times = case["native"], {backend: result["stats"]["median"] for backend, result in case.items()}
    info, plain, ours = native["extra_info"], times["reference"], times["native"]
    cells = [info["layer"], f"{1e3 * plain:.1f}", f"{1e3 * ours:.1f}", f"**{plain / ours:.1f}**"]
    if "reference16" in times:
        cells += [f"{1e3 * times['reference16']:.1f}", f"**{times['reference16'] / ours:.1f}**"]
    if "flops" in info:
        rate = info["flops"] / ours / 1e9
        cells += [f"{rate:.0f}", f"{100 * rate / info['peak_gflops']:.0f} %", f"{info['bytes'] / 1e6:.1f}"]
        cells.append(f"{100 * info['bytes'] / ours / 1e9 / info['bandwidth']:.0f} %")
    return f"| {' | '.join([*cells, str(native['stats']['rounds'])])} |"


def table(kind: str, found: list[dict[str, dict[str, Any]]]) -> list[str]:
    """All cases of one kind, then the sums over whole networks."""
    rates = ["GFLOP/s", "of sgemm", "MB", "of copy"] if kind not in ("trace", "evidence") else []
    smaller = ["reference in batches of 16, ms", "ratio"] if "reference16" in found[0] else []
    head = ["case", "reference, ms", "native, ms", "ratio", *smaller, *rates, "rounds"]
    lines = [f"## {TITLES[kind]}", "", f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    lines += [row(case) for case in found]
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    for case in found:
        for network, count in case["native"]["extra_info"]["networks"].items():
            totals[network][0] += count * case["reference"]["stats"]["median"]
            totals[network][1] += count * case["native"]["stats"]["median"]
            totals[network][2] += count
    for network, (plain, ours, layers) in totals.items():
        sums = [
            f"all {layers:.0f} layers of {network}",
            f"{1e3 * plain:.0f}",
            f"{1e3 * ours:.0f}",
            f"**{plain / ours:.1f}**",
        ]
        lines.append(f"| {' | '.join([*sums, *['' for _ in rates], ''])} |")
    return [*lines, ""]


def solvers(results: dict[str, Any]) -> list[str]:
    """Traces by both solvers, and what memory eliminations take."""
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    lines = []
    for result in results["benchmarks"]:
        info = result["extra_info"]
        if info["kind"] == "solvers":
            found[info["layer"]][info["backend"]] = result
        elif info["kind"] == "memory":
            lines.append(
                f"Peak of memory beside weights and inverse, {info['layer']}: {info['peak_bytes'] / 2**20:.0f} MiB."
            )
    if not found:
        return lines
    head = ["case", "fast, s", "exact, s", "exact / fast", "loss, exact / fast", "rounds"]
    table = ["## Traces by both solvers", "", f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for name, case in found.items():
        fast, exact = (case[solver]["stats"]["median"] for solver in ("fast", "exact"))
        losses = [case[solver]["extra_info"]["loss"] for solver in ("fast", "exact")]
        cells = [name, f"{fast:.1f}", f"{exact:.1f}", f"**{exact / fast:.1f}**", f"{losses[1] / losses[0]:.2f}"]
        table.append(f"| {' | '.join([*cells, str(case['exact']['stats']['rounds'])])} |")
    return [*table, "", *lines]


def runs(results: dict[str, Any]) -> list[str]:
    """Many photographs: seconds an image by each variant, and how much faster it is than the first."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results["benchmarks"]:
        if result["extra_info"]["kind"] == "run":
            found[result["extra_info"]["layer"]].append(result)
    lines = []
    for case, of_case in found.items():
        images = of_case[0]["extra_info"]["images"]
        lines += [f"## {case}, {images} photographs", ""]
        lines += ["| variant | s an image | without the start of workers | times as fast |", "|---|--:|--:|--:|"]
        times = [result["extra_info"]["working"] or result["stats"]["median"] for result in of_case]
        for result, working in zip(of_case, times, strict=True):
            whole = result["stats"]["median"] / images
            cells = [result["extra_info"]["backend"], f"{whole:.2f}", f"{working / images:.2f}"]
            lines.append(f"| {' | '.join([*cells, f'**{times[0] / working:.2f}**'])} |")
        taken = {result["extra_info"]["backend"]: working for result, working in zip(of_case, times, strict=True)}
        in_flight = taken["one by one, one thread"] / taken["one in flight for each thread"]
        by_ray = taken["Ray, one worker of one thread"] / taken["Ray, a worker for each thread"]
        threads = of_case[0]["extra_info"]["threads"]
        lines += [
            "",
            f"At one thread each: {threads} in flight do {in_flight:.2f} times the work of one, {threads} workers of ",
        ]
        lines[-1] += f"Ray {by_ray:.2f} times that of one."
        lines.append("")
    return lines


def main(path: str) -> None:
    results = json.loads(Path(path).read_text(encoding="utf-8"))
    machine, commit = results["machine_info"], results["commit_info"]
    info = results["benchmarks"][0]["extra_info"]
    print(RUN_HEADER if info["kind"] == "run" else HEADER)
    print(
        f"{machine['cpu'].get('brand_raw', machine['processor'])}, {machine['cpu'].get('count')} cores, "
        f"{info['threads']} threads, instruction set {info['cpu_capability']}; "
        f"its own sgemm {info['peak_gflops']:.0f} GFLOP/s, its copy {info['bandwidth']:.0f} GB/s; "
        f"Python {machine['python_version']}, torch {info['torch']}, float32; commit {commit['id'][:7]}"
        f"{' with changes' if commit['dirty'] else ''}.\n"
    )
    for kind, found in variants(results).items():
        print("\n".join(table(kind, found)))
    for lines in (solvers(results), runs(results)):
        if lines:
            print("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
