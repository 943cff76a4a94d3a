"""What setup.py decides about CUDA, on made-up machines."""

import importlib.util
from pathlib import Path

import pytest
import torch

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module, on a machine that has no toolkit."""
    spec = importlib.util.spec_from_file_location("spade_fast_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "SPADE_FAST_WITH_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda _: None)

    class NowhereElse(type(Path())):
        """A path whose /usr/local is empty."""

        def glob(self, pattern):
            return iter(()) if str(self) == "/usr/local" else super().glob(pattern)

        def is_file(self):
            return not str(self).startswith("/usr/local") and super().is_file()

    monkeypatch.setattr(module, "Path", NowhereElse)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return module


def make_toolkit(folder: Path, *, leave_out: str = "", lib: str = "lib64") -> Path:
    for name in ("bin/nvcc", "include/cuda_runtime.h", f"{lib}/libcudart.so.13"):
        if name != leave_out:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    return folder


@pytest.mark.parametrize("lib", ["lib64", "lib"])
def test_cuda_home_wins(setup, tmp_path, monkeypatch, lib):
    toolkit = make_toolkit(tmp_path / "toolkit", lib=lib)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert setup.find_toolkit() == toolkit
    assert setup.decide_cuda(True) == (toolkit, str(toolkit))


@pytest.mark.parametrize("missing", ["bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so.13"])
def test_an_incomplete_folder_is_passed_over(setup, tmp_path, monkeypatch, missing):
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "broken", leave_out=missing)))
    assert setup.find_toolkit() is None
    whole = make_toolkit(tmp_path / "whole")
    monkeypatch.setenv("CUDA_PATH", str(whole))
    assert setup.find_toolkit() == whole


def test_nvcc_on_the_path_leads_to_its_toolkit_through_links(setup, tmp_path, monkeypatch):
    toolkit = make_toolkit(tmp_path / "toolkit")
    link = tmp_path / "nvcc"
    link.symlink_to(toolkit / "bin/nvcc")
    monkeypatch.setattr(setup.shutil, "which", lambda _: str(link))
    assert setup.find_toolkit() == toolkit


def test_reasons_to_leave_cuda_out(setup, tmp_path, monkeypatch):
    assert setup.decide_cuda(True)[0] is None
    assert "no CUDA toolkit found" in setup.decide_cuda(True)[1]
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path)))
    assert setup.decide_cuda(False) == (None, "csrc/cuda holds no CUDA sources")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert setup.decide_cuda(True) == (None, "this torch was built without CUDA")
    monkeypatch.setenv("SPADE_FAST_WITH_CUDA", "0")
    assert setup.decide_cuda(True) == (None, "SPADE_FAST_WITH_CUDA=0")


def test_force_cuda_fails_instead_of_leaving_it_out(setup, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="no CUDA toolkit found"):
        setup.decide_cuda(True)
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path)))
    assert setup.decide_cuda(True)[0] == tmp_path
    monkeypatch.setenv("SPADE_FAST_WITH_CUDA", "0")
    with pytest.raises(SystemExit, match="SPADE_FAST_WITH_CUDA=0"):
        setup.decide_cuda(True)


def test_an_extension_with_a_libstdcxx_of_its_own_is_refused(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(setup.sys, "platform", "linux")
    shared, static = tmp_path / "shared.so", tmp_path / "static.so"
    shared.write_bytes(b"\x7fELF\0libtorch_cpu.so\0libstdc++.so.6\0")
    static.write_bytes(b"\x7fELF\0libtorch_cpu.so\0libgcc_s.so.1\0")
    setup.check_library(shared)
    with pytest.raises(SystemExit, match="linked libstdc\\+\\+ statically"):
        setup.check_library(static)
    assert shared.exists()
    assert not static.exists()


def test_setup_stays_short():
    assert len(SETUP.read_text().splitlines()) < 100
