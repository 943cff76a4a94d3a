"""What gpu_check.sh found, as tables: python benchmarks/gpu_report.py WORK RESULTS

Reads the logs, test reports and times in the folder WORK, writes RESULTS/<device>.json and .md, prints a summary.
Exits with 1 if a part failed. With `--environment` alone it prints what it would run on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

TITLES = {
    "trace": "Whole traces",
    "flight": "Images in flight",
    "views": "Views alone",
    "network": "Solving a network, its layers side by side",
    "hessian": "Hessians of single layers, 64 images",
    "factor": "Factoring single layers, one at a time",
    "columns": "Pruning single layers column by column, one at a time",
}
LEGEND = """Medians in milliseconds, of one image where several are in flight, by a clock that waits for the device.
Ratio: reference / this. "Floor" is what the work takes at the least: its operations at the rate of the card's own large
matrix product of the same kind, or its inputs and results, once each, at the rate of a large copy, whichever is longer.
Of Hessians the operations are the products of shifted maps at stride 1, and one triangle of d x d above that; of traces
those of the forward passes and, where all layers are pruned, of Hessians and solves. GiB: the most that torch allocated
for it, beside weights and inputs. The reference is the published procedure in plain PyTorch on the same card, its
products in float32 unless it says tf32.
"""
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
NOT_RUN, PASSED, FAILED, TIMED_OUT = "not run", "passed", "FAILED", "TIMED OUT"
_SHOWN = 20  # of the same kind, in the .md; the .json holds all


class Part(NamedTuple):
    """One part of the check. `findings` is what is wrong, one entry each."""

    name: str
    result: str
    details: str
    seconds: int
    findings: list[str]


def environment(device: str) -> dict[str, str]:
    """The device, and the versions of everything that may matter."""
    found = {
        "device": f"cpu ({platform.machine()})",
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "commit": os.environ.get("COMMIT") or _output("git", "describe", "--always", "--dirty") or "unknown",
    }
    if device != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        query = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        found |= {
            "device": str(properties.name),
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "multiprocessors": str(properties.multi_processor_count),
            "driver": query[0] if query else "unknown",
            "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        }
    return found


def _output(*command: str) -> str:
    """What a command prints, nothing where there is none such or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def read_part(work: Path, name: str, code: str, seconds: str, note: str) -> Part:
    """A part from its line in parts.tsv and from what it left in the folder."""
    if code == "-":
        return Part(name, NOT_RUN, note, 0, [])
    result = {"0": PASSED, "124": TIMED_OUT, "137": TIMED_OUT}.get(code, FAILED)
    report = work / f"{name}.xml"
    details, findings = read_tests(report) if report.exists() else ("", [])
    if name in SANITIZERS:
        log = work / f"{name}.txt"
        summary, ours = read_sanitizer(log.read_text(errors="replace") if log.exists() else "")
        details, findings = f"{summary or 'no summary'}; {details or 'no tests'}", ours + findings
        # Of torch's own kernels the tool may say what it likes: 9 is its exit code for findings.
        if result != TIMED_OUT:
            good = code in ("0", "9") and summary and "passed" in details
            result = PASSED if good and not findings else FAILED
    elif result == PASSED and report.exists() and not re.search(r"[1-9]\d* passed", details):
        result = FAILED  # all was skipped
    if result in (FAILED, TIMED_OUT) and not findings:
        logs = [log for log in (work / f"{name}.txt", work / f"{name}.log") if log.exists()]
        findings = ["\n".join(log.read_text(errors="replace").splitlines()[-30:]) for log in logs]
    return Part(name, result, details, int(seconds), findings)


def read_tests(report: Path) -> tuple[str, list[str]]:
    """How many tests passed and so on, what they measured, and the failures of a JUnit report."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except ElementTree.ParseError:
        return "no report", []
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failures: list[str] = []
    measured: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        wrong = [child for child in case if child.tag in ("failure", "error")]
        skipped = case.find("skipped")
        counts["failed" if wrong else "passed" if skipped is None else "skipped"] += 1
        if wrong:
            failures.append(f"{case.get('classname')}::{case.get('name')}: {wrong[0].get('message', '').strip()}")
        elif skipped is not None:
            reasons[skipped.get("message", "")] += 1
        for record in case.iter("property"):
            measured[record.get("name", "")].append(float(record.get("value", "nan")))
    details = ", ".join(f"{counts[key]} {key}" for key in ("passed", "failed", "skipped") if counts[key])
    details += "".join(f" ({count}: {reason})" for reason, count in reasons.most_common(5))
    return details + "".join(f"; {name} {min(v):.3f} to {max(v):.3f}" for name, v in measured.items()), failures


def read_sanitizer(log: str) -> tuple[str, list[str]]:
    """The summary of compute-sanitizer, and what it found in kernels of spade_fast."""
    lines = [line.removeprefix("=========") for line in log.splitlines() if line.startswith("=========")]
    summary = next((line.strip() for line in reversed(lines) if "SUMMARY:" in line), "")
    records: list[list[str]] = []
    for line in lines:
        if line.startswith("  ") and records:  # what belongs to the record before is indented
            records[-1].append(line.strip())
        elif line.strip():
            records.append([line.strip()])
    on_device = [[line for line in record if not line.startswith("Host Frame")] for record in records]
    found = Counter("\n".join(record[:6]) for record in on_device if any("spade_fast" in line for line in record))
    return summary, [f"{count} times: {record}" if count > 1 else record for record, count in found.items()]


def read_benchmarks(report: Path) -> list[dict[str, Any]]:
    """One entry for each benchmark, its figures beside its times."""
    if not report.exists() or not report.stat().st_size:
        return []
    entries = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    keys = ("median", "min", "iqr", "rounds", "iterations")
    return [
        entry["extra_info"] | {key: entry["stats"][key] for key in keys} for entry in entries if entry["extra_info"]
    ]


def milliseconds(entry: dict[str, Any]) -> float:
    """Of one image."""
    return 1e3 * float(entry["median"]) / int(entry.get("images", 1))


def floor(entry: dict[str, Any]) -> float | None:
    """Milliseconds that one image takes at the least."""
    ceilings = entry["ceilings"]
    floors = [entry["flops"] / ceilings[entry["unit"]]] if "flops" in entry else []
    floors += [entry["bytes"] / ceilings["copy"]] if "bytes" in entry else []
    return 1e3 * max(floors) / int(entry.get("images", 1)) if floors else None


def table(kind: str, entries: list[dict[str, Any]]) -> list[str]:
    """A row for each case, columns for each variant, and the sums over networks."""
    cases: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for entry in entries:
        cases[entry["case"]][entry["variant"]] = entry
    variants = sorted(
        {entry["variant"]: None for entry in entries}, key=lambda variant: variant.startswith("reference")
    )
    heads = ["case"]
    for variant in variants:
        heads += [f"{variant}, ms", *columns_of(kind, variant, variants)]
    lines = [f"## {TITLES[kind]}", "", f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for case, found in cases.items():
        cells = [case]
        for variant in variants:
            columns = ["ms", *columns_of(kind, variant, variants)]
            cells += [figure(column, found[variant], found) if variant in found else "" for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *sums(cases, variants)]


def columns_of(kind: str, variant: str, variants: list[str]) -> list[str]:
    """What is said of a variant beside its time."""
    columns = [] if variant.startswith("reference") else ["floor"]
    if columns:
        columns.append("ratio" if "reference" in variants else "images/s")
    return [*columns, "GiB"] if kind in ("trace", "flight", "views") else columns


def figure(column: str, entry: dict[str, Any], variants: dict[str, dict[str, Any]]) -> str:
    """One figure of one variant of a case, nothing where there is none."""
    time, plain = milliseconds(entry), variants.get("reference")
    figures = {
        "ms": time,
        "floor": floor(entry),
        "ratio": milliseconds(plain) / time if plain else None,
        "images/s": 1e3 / time,
        "GiB": entry["peak_bytes"] / 2**30 if "peak_bytes" in entry else None,
    }
    value = figures[column]
    return "" if value is None else f"**{number(value)}**" if column == "ratio" else number(value)


def sums(cases: dict[str, dict[str, dict[str, Any]]], variants: list[str]) -> list[str]:
    """Sentences on the layers of a network together, each as often as it occurs."""
    networks = sorted(
        {name for found in cases.values() for entry in found.values() for name in entry.get("networks", ())}
    )
    lines = []
    for network in networks:
        of_network = [found for found in cases.values() if network in next(iter(found.values()))["networks"]]
        layers = sum(next(iter(found.values()))["networks"][network] for found in of_network)
        listed = []
        for variant in variants:
            if all(variant in found for found in of_network):
                counted = [(found[variant]["networks"][network], found[variant]) for found in of_network]
                time = sum(count * milliseconds(entry) for count, entry in counted)
                least = sum(count * (floor(entry) or 0) for count, entry in counted)
                about = "" if variant.startswith("reference") else f", floor {number(least)} ms"
                listed.append(f"{variant} {number(time)} ms{about}")
        lines += [f"Together {layers} layers of {network}: {'; '.join(listed)}.", ""]
    return lines


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ceilings_table(ceilings: dict[str, float]) -> list[str]:
    lines = ["## What the card reaches", "", "| | rate |", "|---|--:|"]
    lines += [f"| copy, bytes read and written | {number(ceilings['copy'] / 1e9)} GB/s |"]
    products = {unit: rate for unit, rate in ceilings.items() if unit != "copy"}
    return (
        lines
        + [f"| matrix product, {unit} | {number(rate / 1e12)} TFLOP/s |" for unit, rate in products.items()]
        + [""]
    )


def parts_table(parts: list[Part]) -> list[str]:
    lines = ["| part | result | details | s |", "|---|---|---|--:|"]
    for part in parts:
        details = part.details.replace("\n", " ").replace("|", "\\|")
        lines.append(f"| {part.name} | {part.result} | {details} | {part.seconds} |")
    return [*lines, ""]


def findings_of(parts: list[Part]) -> list[str]:
    lines = []
    for part in parts:
        if part.findings:
            lines += [f"## Wrong in {part.name}", ""]
            for finding in part.findings[:_SHOWN]:
                lines += ["```text", "\n".join(finding.splitlines()[:30]), "```", ""]
            if len(part.findings) > _SHOWN:
                lines += [f"And {len(part.findings) - _SHOWN} more.", ""]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", nargs="?", type=Path)
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("--environment", action="store_true")
    arguments = parser.parse_args()
    machine = environment(os.environ.get("SPADE_FAST_BENCH_DEVICE", "cuda"))
    described = "; ".join(f"{key} {value}" for key, value in machine.items())
    if arguments.environment:
        print(described)
        return 0
    work, results = arguments.work, arguments.results
    rows = (work / "parts.tsv").read_text(encoding="utf-8").splitlines()
    parts = [read_part(work, *row.split("\t")) for row in rows]
    benchmarks = read_benchmarks(work / "benchmarks.json")
    ceilings = benchmarks[0]["ceilings"] if benchmarks else {}
    settings = [
        f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(("SPADE_FAST_", "TORCH_CUDA_"))
    ]
    command = " ".join([*settings, "benchmarks/gpu_check.sh"])

    kinds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in TITLES}
    for entry in benchmarks:
        kinds[entry["kind"]].append(entry)
    tables = {kind: table(kind, entries) for kind, entries in kinds.items() if entries}
    lines = [f"# {machine['device']}", "", f"Command: `{command}`. {described[0].upper()}{described[1:]}.", ""]
    lines += [*parts_table(parts), *findings_of(parts)]
    if benchmarks:
        lines += [*ceilings_table(ceilings), LEGEND, *(line for found in tables.values() for line in found)]
    results.mkdir(parents=True, exist_ok=True)
    stem = results / re.sub(r"\W+", "_", machine["device"].lower()).strip("_")
    stem.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    whole = {"environment": machine, "command": command, "parts": [part._asdict() for part in parts]}
    whole |= {"ceilings": ceilings, "benchmarks": [without_ceilings(entry) for entry in benchmarks]}
    stem.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    print("\n".join([*parts_table(parts), *tables.get("trace", [])]))
    print(f"{stem}.md, {stem}.json")
    return int(any(part.result in (FAILED, TIMED_OUT) for part in parts))


def without_ceilings(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "ceilings"}


if __name__ == "__main__":
    sys.exit(main())
