# SPDX-License-Identifier: MIT
"""The backend `cuda` where there is no GPU: what it answers, how it is built, that its torch side compiles."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda_host
import pytest
import setuptools
import torch
from setuptools.command.build_ext import build_ext
from torch.utils import cpp_extension

import pc_kernels as pck
from pc_kernels import dispatch
from pc_kernels.backends import cuda_backend, cuda_infer, native


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As if the extension had been built with CUDA and a GPU were there."""
    _forget()
    monkeypatch.setattr(native, "unavailable_reason", lambda: None)
    monkeypatch.setattr(native, "build_info", lambda: {"cuda_architectures": ["8.0"]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield monkeypatch
    _forget()


def _forget() -> None:
    for known in (cuda_backend.unavailable_reason, cuda_backend.device_reason, cuda_backend.code_for):
        known.cache_clear()
    cuda_infer._cluster_device_refusal.cache_clear()


def test_what_is_missing_is_named(built: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(2, 2)
    assert "weather is not written in CUDA C++" in (cuda_backend.supports("weather", [tensor]) or "")
    assert "a tensor is on cpu" in (cuda_backend.supports("layer_errors", [tensor]) or "")
    for remove, says in (
        (lambda: built.setattr(torch.cuda, "is_available", lambda: False), "no CUDA device"),
        (lambda: built.setattr(native, "build_info", lambda: {"cuda_architectures": []}), "PC_KERNELS_BUILD=cuda"),
        (lambda: built.setattr(native, "unavailable_reason", lambda: "it is not built"), "it is not built"),
    ):
        remove()
        cuda_backend.unavailable_reason.cache_clear()
        assert says in (cuda_backend.supports("layer_errors", [tensor]) or "")


class OnDevice:
    """All that `supports` reads of a tensor."""

    device = torch.device("cuda:0")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def _gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], shared: int = 227) -> None:
    """A GPU of this compute capability, with so many KB of shared memory a block."""
    properties = SimpleNamespace(major=capability[0], minor=capability[1], shared_memory_per_block_optin=shared << 10)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize(
    ("capability", "dtype", "says"),
    [
        ((9, 0), torch.float32, "built for 8.0, and cuda:0 has compute capability 9.0; build it with TORCH_CUDA_ARCH"),
        ((8, 0), torch.bfloat16, None),
        ((8, 6), torch.float32, None),
        ((9, 0), torch.float64, "a tensor is float64"),
        ((7, 5), torch.float32, "compute capability 8.0, and cuda:0 has 7.5"),
    ],
)
def test_dtypes_and_devices(
    built: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, says: str | None
) -> None:
    _gpu(built, capability)
    why = cuda_backend.supports("update_phi_", [OnDevice(dtype)])  # type: ignore[list-item]
    assert (why is None) if says is None else (says in (why or ""))


def test_what_infer_needs(built: pytest.MonkeyPatch) -> None:
    _gpu(built, (7, 5))
    x = [OnDevice(torch.float32)]
    assert "needs compute capability 8.0" in (cuda_backend.supports("infer", x) or "")  # type: ignore[arg-type]
    assert "not written" in (cuda_backend.supports("infer with tol", x) or "")  # type: ignore[arg-type]
    assert "takes float32" in (cuda_backend.supports("infer", [OnDevice(torch.bfloat16)]) or "")  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("architectures", "capability", "takes"),
    [
        ("8.0 9.0a 10.0+PTX", (8, 0), (8, 0)),
        ("8.0 9.0a 10.0+PTX", (8, 9), (8, 0)),
        ("8.0 9.0a 10.0+PTX", (9, 0), (9, 0)),
        ("8.0 9.0a 10.0+PTX", (10, 3), (10, 0)),
        ("8.0 9.0a 10.0+PTX", (12, 0), (10, 0)),
        ("8.0+PTX", (9, 0), (8, 0)),  # compiled by the driver, from code without clusters
        ("9.0a", (10, 0), None),
        ("9.0a+PTX", (12, 0), None),
        ("8.6", (8, 0), None),
        ("8.0 8.6", (8, 9), (8, 6)),
        ("10.0f", (10, 3), (10, 0)),
        ("10.0f+PTX", (12, 0), None),
        ("12.0", (12, 1), (12, 0)),
    ],
)
def test_which_code_a_gpu_takes(architectures: str, capability: tuple[int, int], takes: tuple[int, int] | None) -> None:
    assert cuda_backend.taken(architectures.split(), capability) == takes


@pytest.mark.parametrize(
    ("architectures", "capability", "shared", "says"),
    [
        ("9.0a", (9, 0), 227, None),
        ("8.0 10.0+PTX", (10, 0), 227, None),
        ("8.0", (8, 6), 99, "a GPU has from compute capability 9.0 on"),
        ("8.0+PTX", (9, 0), 227, "no code with thread block clusters for this GPU"),
        ("10.0+PTX", (12, 0), 99, "227 KB of shared memory a block, and this GPU has 99 KB"),
    ],
)
def test_what_the_cluster_kernel_needs_of_a_gpu(
    built: pytest.MonkeyPatch, architectures: str, capability: tuple[int, int], shared: int, says: str | None
) -> None:
    _gpu(built, capability, shared)
    built.setattr(native, "build_info", lambda: {"cuda_architectures": architectures.split()})
    why = cuda_infer._cluster_device_refusal(OnDevice.device)
    assert (why is None) if says is None else (says in (why or ""))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asked_for_by_name_it_refuses() -> None:
    with pck.use_backend("cuda"), pytest.raises(pck.BackendUnavailable, match="cuda"):
        pck.layer_energies([torch.zeros(2, 2)], [torch.zeros(2, 2)], ["gaussian"])
    assert "cuda" not in pck.build_info()["backends"]
    assert dispatch.reason("cuda", "infer", [torch.zeros(2, 2)]) is not None


# ---------------------------------------------------------------- the build


TOOLKIT = next((path for path in map(Path, ("/usr/local/cuda/include",)) if (path / "cuda_runtime.h").exists()), None)


def _setup(monkeypatch: pytest.MonkeyPatch, cuda: str = "13.0", **environment: str) -> dict[str, Any]:
    """What setup.py asks for on a machine with nvcc and a torch with CUDA."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(TOOLKIT.parent if TOOLKIT else None))
    monkeypatch.setattr(setuptools, "setup", lambda **asked: found.update(asked))
    for name in ("TORCH_CUDA_ARCH_LIST", "PC_KERNELS_BUILD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(cuda_host.ROOT / "setup.py"), run_name="__main__")
    return found


def _extension(monkeypatch: pytest.MonkeyPatch, **environment: str) -> setuptools.Extension:
    return _setup(monkeypatch, **environment)["ext_modules"][0]


@pytest.mark.skipif(TOOLKIT is None, reason="the CUDA toolkit is not installed")
@pytest.mark.parametrize("mode", ["cuda", "auto"])
def test_a_cuda_build_takes_every_source(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = _extension(monkeypatch, PC_KERNELS_BUILD=mode)
    folder = cuda_host.ROOT / "csrc" / "cuda"
    assert {f"csrc/cuda/{path.name}" for path in folder.glob("*.c*") if path.suffix in (".cu", ".cpp")} <= {
        *extension.sources
    }
    assert ("PC_WITH_CUDA", None) in extension.define_macros
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0a;10.0+PTX"


@pytest.mark.skipif(TOOLKIT is None, reason="the CUDA toolkit is not installed")
@pytest.mark.parametrize(
    ("given", "listed"),
    [
        ("9.0a 12.0", "9.0a_12.0"),
        ("7.5 8.0;8.6+PTX", "8.0_8.6+PTX"),
        ("Ampere", "8.0_8.6+PTX"),
        ("", "8.0_9.0a_10.0+PTX"),
    ],
)
def test_architectures_of_the_environment(given: str, listed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch reads the list, but for what is too old; torch is told the same."""
    extension = _extension(monkeypatch, PC_KERNELS_BUILD="cuda", TORCH_CUDA_ARCH_LIST=given)
    assert dict(extension.define_macros)["PC_KERNELS_CUDA_ARCHITECTURES"] == listed
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == listed.replace("_", ";")


@pytest.mark.skipif(TOOLKIT is None, reason="the CUDA toolkit is not installed")
@pytest.mark.parametrize(("given", "says"), [("7.5", "has nothing from 8.0 on"), ("Vega", "is not understood")])
def test_architectures_that_cannot_be(given: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=says):
        _extension(monkeypatch, PC_KERNELS_BUILD="cuda", TORCH_CUDA_ARCH_LIST=given)
    assert not _takes_cuda(_extension(monkeypatch, PC_KERNELS_BUILD="auto", TORCH_CUDA_ARCH_LIST=given))


@pytest.mark.skipif(TOOLKIT is None, reason="the CUDA toolkit is not installed")
def test_an_older_toolkit_knows_fewer_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = _extension(monkeypatch, cuda="12.6")
    assert dict(extension.define_macros)["PC_KERNELS_CUDA_ARCHITECTURES"] == "8.0_9.0+PTX_9.0a"


def test_flags_of_another_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Microsoft's stops at gcc's warnings."""
    monkeypatch.setattr(sys, "platform", "win32")
    assert _extension(monkeypatch, PC_KERNELS_BUILD="cpu").extra_compile_args["cxx"] == ["/O2"]


@pytest.mark.skipif(TOOLKIT is None, reason="the CUDA toolkit is not installed")
def test_a_cpu_build_has_no_cuda_source(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _takes_cuda(_extension(monkeypatch, PC_KERNELS_BUILD="cpu"))


def test_auto_does_without_what_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("test_cuda_backend.TOOLKIT", tmp_path / "include")
    assert not _takes_cuda(_extension(monkeypatch))


@pytest.mark.skipif(TOOLKIT is None, reason="the CUDA toolkit is not installed")
@pytest.mark.parametrize("mode", ["cuda", "auto"])
def test_cuda_sources_that_do_not_build(
    mode: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`auto` goes on without them and says why; `cuda` is an error."""
    built = []

    def build(self: build_ext) -> None:
        built.append(_takes_cuda(self.extensions[0]))
        if built[-1]:
            raise RuntimeError("nvcc is too old")

    asked = _setup(monkeypatch, PC_KERNELS_BUILD=mode)
    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", build)
    command = asked["cmdclass"]["build_ext"](setuptools.Distribution())
    command.extensions = asked["ext_modules"]
    if mode == "cuda":
        with pytest.raises(RuntimeError, match="nvcc is too old"):
            command.build_extensions()
        return
    command.build_extensions()
    assert built == [True, False]
    assert "built without CUDA, which failed: nvcc is too old" in capfd.readouterr().err


def _takes_cuda(extension: setuptools.Extension) -> bool:
    return any("cuda" in source for source in extension.sources) or ("PC_WITH_CUDA", None) in extension.define_macros


TORCH = Path(torch.__file__).parent / "include"
HEADERS = (TORCH, TORCH / "torch" / "csrc" / "api" / "include", sysconfig.get_paths()["include"])
MACROS = ("PC_WITH_CUDA", "PC_KERNELS_VERSION=1", "PC_KERNELS_TORCH=2", "PC_KERNELS_CUDA_ARCHITECTURES=8.0_9.0a")


@pytest.mark.skipif(cuda_host.CXX is None or TOOLKIT is None, reason="no C++ compiler or no CUDA toolkit")
@pytest.mark.parametrize("source", ["ops.cpp", "cuda/launch.cpp", "cuda/cluster_op.cpp", "cuda/layers_op.cpp"])
def test_the_torch_side_compiles(source: str, tmp_path: Path) -> None:
    """A torch for the CPU has torch's CUDA headers but for one, which is generated: it gets a stand-in."""
    generated = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    folders = [*HEADERS, TOOLKIT, *([] if torch.version.cuda else [tmp_path])]
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    flags += [f"-D{macro}" for macro in MACROS] + [f"-isystem{folder}" for folder in folders]
    path = cuda_host.ROOT / "csrc" / source
    done = subprocess.run([str(cuda_host.CXX), *flags, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
