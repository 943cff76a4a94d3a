"""Compile every CUDA source for the architectures we ship, without linking it; fail where registers spill."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "90", "100")
# What ptxas says of each kernel: its name, then how many bytes it spills.
SPILLS = re.compile(r"Function properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads")


def find_toolkit() -> Path | None:
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    found: Path | None = setup.find_toolkit()
    return found


def compile_source(nvcc: Path, source: Path, architecture: str) -> tuple[int, list[str]]:
    """Number of kernels, and what is wrong with them."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, "-std=c++17", "-O3", target, "--ptxas-options=-v", "-c", source, "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return 0, [f"{source.name}, sm_{architecture}: {done.stderr}"]
    kernels = SPILLS.findall(done.stderr)
    spilling = [name for name, stores, loads in kernels if (stores, loads) != ("0", "0")]
    return len(kernels), [f"{source.name}, sm_{architecture}: {name} spills registers" for name in spilling]


def main() -> int:
    sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
    toolkit = find_toolkit()
    if toolkit is None:
        print("CUDA: there are sources, but no toolkit to compile them with", file=sys.stderr)
        return 1
    jobs = [(toolkit / "bin/nvcc", source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda job: compile_source(*job), jobs))
    problems = [problem for _, found in results for problem in found]
    for problem in problems:
        print(f"CUDA: {problem}", file=sys.stderr)
    kernels = sum(count for count, _ in results)
    targets = ", ".join(f"sm_{architecture}" for architecture in ARCHITECTURES)
    print(f"CUDA: {len(sources)} sources, {kernels} kernels for {targets}; {len(problems)} problems")
    return 1 if problems or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
