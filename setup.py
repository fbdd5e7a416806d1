# SPDX-License-Identifier: MIT
"""The compiled part of the build; everything else is in pyproject.toml.

PC_KERNELS_BUILD=auto|cpu|cuda (default auto): whether the CUDA sources are joined in. `cuda` wants nvcc and a torch
with CUDA, never a GPU, which a build machine need not have; `auto` takes them where there are both, and goes on without
them, with a warning, where they do not build.
"""

import os
import sys
import tomllib
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
MODES = ("auto", "cpu", "cuda")

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as missing:
    sys.exit(
        f"pc-kernels is built against the torch it will run with, and importing torch failed here ({missing}). "
        "Install torch, then run: pip install --no-build-isolation ."
    )


ARCHITECTURES = "8.0;9.0a;10.0+PTX"  # where TORCH_CUDA_ARCH_LIST does not say otherwise


def cuda_sources() -> list[str]:
    """Kernels and their torch side, relative to the root."""
    folder = ROOT / "csrc" / "cuda"
    return sorted(str(path.relative_to(ROOT)) for kind in ("*.cu", "*.cpp") for path in folder.glob(kind))


def cuda_macros() -> list[tuple[str, str | None]]:
    """Tells the sources that CUDA is there, and for which architectures: those that torch will compile for."""
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    listed = architectures.replace(" ", "_").replace(";", "_")
    return [("PC_WITH_CUDA", None), ("PC_KERNELS_CUDA_ARCHITECTURES", listed)]


def why_no_cuda() -> str | None:
    """What is missing for a CUDA build; None: nothing."""
    if torch.version.cuda is None:
        return f"the installed torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return "nvcc was not found (install the CUDA toolkit or set CUDA_HOME)"
    if not (Path(CUDA_HOME) / "include" / "cuda_runtime.h").exists():  # a wrapper of nvcc on the PATH misleads torch
        return f"{CUDA_HOME}/include has no cuda_runtime.h (set CUDA_HOME to the toolkit's folder)"
    return None


def mode() -> str:
    """PC_KERNELS_BUILD."""
    found = os.environ.get("PC_KERNELS_BUILD", "auto")
    if found not in MODES:
        sys.exit(f"PC_KERNELS_BUILD: wanted one of {', '.join(MODES)}, got {found!r}")
    return found


def with_cuda() -> bool:
    """Whether to build the CUDA sources."""
    missing = why_no_cuda()
    if mode() == "cuda" and missing is not None:
        sys.exit(f"PC_KERNELS_BUILD=cuda: wanted a CUDA build, but {missing}")
    return mode() != "cpu" and missing is None


def extension(cuda: bool) -> Extension:
    """The one extension module, pc_kernels._C."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    macros: list[tuple[str, str | None]] = [("PC_KERNELS_VERSION", version), ("PC_KERNELS_TORCH", torch.__version__)]
    # Nobody reads errno or traps; without the second flag no loop with a select vectorises. Unlike -ffast-math they
    # change no result. No -march: one binary for every machine of its kind.
    flags = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
    flags.append("-Wno-unused-parameter")  # as torch itself: its headers would drown ours
    if sys.platform == "linux":
        flags.append("-fopenmp")  # the OpenMP runtime is torch's own: same soname, loaded first
    compile_args = {"cxx": flags, "nvcc": ["-O3", "--threads=4"]}  # architectures side by side
    link_args = ["-fopenmp"] if sys.platform == "linux" else []
    here = ("csrc", "csrc/cpu")
    sources = sorted(str(path.relative_to(ROOT)) for folder in here for path in (ROOT / folder).glob("*.cpp"))
    sources += cuda_sources() if cuda else []
    return (CUDAExtension if cuda else CppExtension)(
        "pc_kernels._C",
        sources,
        define_macros=macros + (cuda_macros() if cuda else []),
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")],
    )


class Build(BuildExtension):
    """torch's, which in `auto` goes on without CUDA sources that do not build."""

    def build_extensions(self) -> None:
        """As setuptools has it."""
        try:
            super().build_extensions()
        except Exception as error:  # of nvcc, its host compiler, versions that do not go together
            if mode() != "auto" or not any(path.endswith(".cu") for path in self.extensions[0].sources):
                raise
            print(f"pc-kernels: warning: built without CUDA, which failed: {error}", file=sys.stderr)
            vars(self.extensions[0]).update(vars(extension(cuda=False)))  # setuptools has marks of its own on it
            super().build_extensions()


setup(ext_modules=[extension(with_cuda())], cmdclass={"build_ext": Build})
