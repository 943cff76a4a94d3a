"""Run tests/test_fuzz.py under sanitizers and write what was tried: python benchmarks/fuzz.py LIBRARY RESULTS [CASES]

LIBRARY holds the operators, built by CMake with -DSPADE_FAST_SANITIZE=address,undefined; `make fuzz` builds it. Loaders
run in the same process, with the libraries of others as they come.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import hypothesis
import PIL
import safetensors
import torch

ROOT = Path(__file__).parents[1]
CODE = ["csrc", "spade_fast", "tests"]


def output(*command: str) -> str:
    return subprocess.check_output(command, cwd=ROOT, text=True).strip()


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def sanitized(library: str, cases: int) -> dict[str, str]:
    """Environment of a Python that takes its operators from there, and has the sanitizers' runtimes come first."""
    runtimes = [output("g++", f"-print-file-name=lib{name}.so") for name in ("asan", "ubsan")]
    return os.environ | {
        "LD_PRELOAD": ":".join(runtimes),
        # What Python leaks is not ours. A file that lies about its size finds memory short, as without sanitizers.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "halt_on_error=1",
        "OMP_NUM_THREADS": "2",
        "SPADE_FAST_LIBRARY": str(Path(library).resolve()),
        "SPADE_FAST_FUZZ_CASES": str(cases),
    }


def row(test: ElementTree.Element) -> tuple[str, int, float, str]:
    """Target, cases, seconds and outcome of one test."""
    name = test.get("name", "").removeprefix("test_")
    cases = sum(int(found.get("value", 0)) for found in test.iter("property") if found.get("name") == "cases")
    faults = [*test.iter("failure"), *test.iter("error"), *test.iter("skipped")]
    outcome = faults[0].get("message", "").splitlines()[0] if faults else "passed"
    return name, cases, float(test.get("time", 0)), outcome


def main(library: str, results: str, cases: str = "10000") -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
        done = subprocess.run(
            [*command, f"--junitxml={report}", "tests/test_fuzz.py"],
            cwd=ROOT,
            env=sanitized(library, int(cases)),
            check=False,
        )
        if not report.exists():
            print(f"pytest ended by itself, with status {done.returncode}: see above", file=sys.stderr)
            return 1
        rows = [row(test) for test in ElementTree.parse(report).getroot().iter("testcase")]
    changed = output("git", "status", "--porcelain", "--", *CODE)
    failed = sum(outcome != "passed" for *_, outcome in rows)
    outcome = f"{failed} failed" if failed else "no crash, no hang, no report of a sanitizer"
    rows.append(("**all**", sum(each[1] for each in rows), sum(each[2] for each in rows), outcome))
    commit = output("git", "rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    compiler = output("g++", "--version").splitlines()[0]
    packages = ", ".join(f"{each.__name__} {each.__version__}" for each in (torch, PIL, safetensors, hypothesis))
    lines = [
        "# Operators and loaders under abuse",
        "",
        f"Command: `make fuzz`: {int(cases):,} cases of tests/test_fuzz.py, shared by its targets, operators under the",
        "address and undefined behaviour sanitizers. A case passes that ends in a right-looking result or an ordinary",
        "exception.",
        "",
        f"{date.today()}, commit {commit}; {processor()}, 2 threads; {compiler};",
        f"Python {platform.python_version()}, {packages}.",
        "",
        "| target | cases | seconds | outcome |",
        "|---|--:|--:|---|",
        *(f"| {name} | {count} | {seconds:.1f} | {outcome} |" for name, count, seconds, outcome in rows),
    ]
    Path(results).parent.mkdir(parents=True, exist_ok=True)
    Path(results).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
