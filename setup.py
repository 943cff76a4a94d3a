"""Builds the one extension, spade_fast._C. Metadata is in pyproject.toml.

Switches (environment): SPADE_FAST_WITH_CUDA=0 leaves CUDA out, FORCE_CUDA=1 fails instead of leaving it out,
DEBUG=1 builds without optimisation, TORCH_CUDA_ARCH_LIST chooses the GPU architectures.
"""

import os
import shutil
from pathlib import Path

import torch
from setuptools import setup

ROOT = Path(__file__).parent
# sm_80: A100; 9.0: H100 and H200; 10.0+PTX: B200, and whatever comes after it by just-in-time compilation.
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def find_toolkit() -> Path | None:
    """The first CUDA toolkit folder that really holds the compiler, the headers and the runtime library."""
    nvcc = shutil.which("nvcc")
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1]]
    usual = ["/usr/local/cuda", *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for folder in (Path(name) for name in (*named, *usual) if name):
        libraries = [library for lib in ("lib64", "lib") for library in (folder / lib).glob("libcudart.so*")]
        if (folder / "bin/nvcc").is_file() and (folder / "include/cuda_runtime.h").is_file() and libraries:
            return folder
    return None


def decide_cuda(cuda_sources: list[str]) -> tuple[Path | None, str]:
    """The toolkit to build with, or None, and the reason in words."""
    forced = os.environ.get("FORCE_CUDA") == "1"
    toolkit = find_toolkit()
    if os.environ.get("SPADE_FAST_WITH_CUDA") == "0":
        if forced:
            raise SystemExit("FORCE_CUDA=1 and SPADE_FAST_WITH_CUDA=0 contradict each other: unset one of them")
        return None, "SPADE_FAST_WITH_CUDA=0"
    obstacles = {
        "csrc/cuda holds no CUDA sources": not cuda_sources,
        "this torch was built without CUDA": torch.version.cuda is None,
        "no CUDA toolkit found (set CUDA_HOME to a folder with bin/nvcc, include and lib64)": toolkit is None,
    }
    obstacle = next((text for text, stands in obstacles.items() if stands), None)
    if obstacle and forced:
        raise SystemExit(f"FORCE_CUDA=1, but {obstacle}")
    return (None, obstacle) if obstacle else (toolkit, str(toolkit))


def main() -> None:
    cuda_sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))
    toolkit, reason = decide_cuda(cuda_sources)
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit)  # read when cpp_extension is imported, hence the late import
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    debug = os.environ.get("DEBUG") == "1"
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "the GPU that is visible")
    print(f"spade_fast: {'debug' if debug else 'release'} build against torch {torch.__version__}")
    print(f"spade_fast: CUDA {'on' if toolkit else 'off'}: {reason}" + (f", for {architectures}" if toolkit else ""))

    sources = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    flags = ["-O0", "-g", "-UNDEBUG"] if debug else ["-O3", "-DNDEBUG"]
    extension = (CUDAExtension if toolkit else CppExtension)(
        "spade_fast._C",
        sources + (cuda_sources if toolkit else []),
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020b000000000000"),  # torch 2.11: one build serves it and all later ones
            ("SPADE_FAST_TORCH_VERSION", torch.__version__),
            *([("SPADE_FAST_WITH_CUDA", None)] if toolkit else []),
        ],
        extra_compile_args={"cxx": [*flags, "-Wall", "-fvisibility=hidden"], "nvcc": flags[:1]},
        py_limited_api=True,
    )
    setup(
        ext_modules=[extension],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
