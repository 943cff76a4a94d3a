"""Compile every CUDA source for the architectures we ship, without linking or running it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "90", "100")


def main() -> int:
    sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
    if not sources:
        print("CUDA: csrc/cuda holds no sources yet, nothing to compile")
        return 0
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    toolkit = setup.find_toolkit()
    if toolkit is None:
        print("CUDA: there are sources, but no toolkit to compile them with", file=sys.stderr)
        return 1
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    for source in sources:
        print(f"CUDA: compiling {source.relative_to(ROOT)} for sm_{', sm_'.join(ARCHITECTURES)}")
        command = [toolkit / "bin/nvcc", "-std=c++17", "-O3", *targets, "-c", source, "-o", "/dev/null"]
        subprocess.run(command, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
