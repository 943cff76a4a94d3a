"""Builds the one extension, spade_fast._C. Metadata is in pyproject.toml.

Switches (environment): SPADE_FAST_WITH_CUDA=0 leaves CUDA out, FORCE_CUDA=1 fails instead of leaving it out,
DEBUG=1 builds without optimisation, TORCH_CUDA_ARCH_LIST chooses the GPU architectures.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from setuptools import setup

ROOT = Path(__file__).parent
# A100; H100 and H200; B200, and whatever comes after it by just-in-time compilation.
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


def decide_cuda(has_sources: bool) -> tuple[Path | None, str]:
    """The toolkit to build with, or None, and the reason in words."""
    toolkit = find_toolkit()
    obstacles = {
        "SPADE_FAST_WITH_CUDA=0": os.environ.get("SPADE_FAST_WITH_CUDA") == "0",
        "csrc/cuda holds no CUDA sources": not has_sources,
        "this torch was built without CUDA": torch.version.cuda is None,
        "no CUDA toolkit found (CUDA_HOME: a folder with bin/nvcc, include and lib64)": toolkit is None,
    }
    obstacle = next((text for text, stands in obstacles.items() if stands), None)
    if obstacle and os.environ.get("FORCE_CUDA") == "1":
        raise SystemExit(f"spade_fast: FORCE_CUDA=1 cannot be met: {obstacle}")
    return (None, obstacle) if obstacle else (toolkit, str(toolkit))


def check_library(extension: Path) -> None:
    """Refuse an extension with a libstdc++ of its own: what it throws, torch cannot catch."""
    if sys.platform == "linux" and b"libstdc++.so" not in extension.read_bytes():
        extension.unlink()
        raise SystemExit(
            "spade_fast: the compiler linked libstdc++ statically, so errors would crash the interpreter: install its "
            "shared library for the linker, or set LDFLAGS='-Wl,--no-as-needed -l:libstdc++.so.6'"
        )


def main() -> None:
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
    cuda_sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))
    toolkit, reason = decide_cuda(bool(cuda_sources))
    if toolkit:
        sources += cuda_sources
        os.environ["CUDA_HOME"] = str(toolkit)  # read when cpp_extension is imported, hence the late import
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
        reason += f", for {os.environ.get('TORCH_CUDA_ARCH_LIST', 'the GPU that is visible')}"
    else:
        sources = [source for source in sources if not source.startswith("csrc/cuda/")]
    debug = os.environ.get("DEBUG") == "1"
    print(f"spade_fast: {'debug' if debug else 'release'} build against torch {torch.__version__}")
    print(f"spade_fast: CUDA {'on' if toolkit else 'off'}: {reason}")

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class CheckedBuild(BuildExtension):
        def build_extension(self, extension):
            super().build_extension(extension)
            check_library(Path(self.get_ext_fullpath(extension.name)))

    flags = ["-O0", "-g", "-UNDEBUG"] if debug else ["-O3", "-DNDEBUG"]
    macros = [("TORCH_TARGET_VERSION", "0x020b000000000000"), ("SPADE_FAST_TORCH_VERSION", torch.__version__)]
    extension = (CUDAExtension if toolkit else CppExtension)(
        "spade_fast._C",
        sources,
        define_macros=[*macros, *([("SPADE_FAST_WITH_CUDA", None), ("USE_CUDA", None)] if toolkit else [])],
        extra_compile_args={"cxx": [*flags, "-Wall", "-fvisibility=hidden"], "nvcc": [*flags[:1], "-std=c++17"]},
        py_limited_api=True,  # with the stable ABI of torch 2.11: one build serves all later Pythons and torches
    )
    wheel = {"bdist_wheel": {"py_limited_api": "cp310"}}
    setup(ext_modules=[extension], cmdclass={"build_ext": CheckedBuild}, options=wheel)


if __name__ == "__main__":
    main()
