# SPDX-License-Identifier: MIT
"""The compiled part of the build; everything else is in pyproject.toml.

PC_KERNELS_BUILD=auto|cpu|cuda (default auto): whether the CUDA sources are joined in. `cuda` wants nvcc and a torch
with CUDA, never a GPU, which a build machine need not have; `auto` takes them where there are both, and goes on without
them, with a warning, where they do not build.
"""

import os
import re
import sys
import tomllib
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
MODES = ("auto", "cpu", "cuda")

try:
    import torch
    from torch.utils.cpp_extension import (
        CUDA_HOME,
        BuildExtension,
        CppExtension,
        CUDAExtension,
        _get_cuda_arch_flags,
    )
except ImportError as missing:
    sys.exit(
        f"pc-kernels is built against the torch it will run with, and importing torch failed here ({missing}). "
        "Install torch, then run: pip install --no-build-isolation ."
    )


# where TORCH_CUDA_ARCH_LIST does not say otherwise, by the CUDA version of torch
ARCHITECTURES, BEFORE_12_8 = "8.0;9.0a;10.0+PTX", "8.0;9.0a;9.0+PTX"
OLDEST = 8  # the compute capability that the kernels are written for


def cuda_sources() -> list[str]:
    """Kernels and their torch side, relative to the root."""
    folder = ROOT / "csrc" / "cuda"
    return sorted(str(path.relative_to(ROOT)) for kind in ("*.cu", "*.cpp") for path in folder.glob(kind))


def architectures() -> list[str]:
    """Those to compile for, as "9.0a" or "10.0+PTX": TORCH_CUDA_ARCH_LIST as torch reads it, without too old ones."""
    version = tuple(map(int, str(torch.version.cuda).split(".")[:2]))
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):  # torch takes an empty one for none, too
        os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES if version >= (12, 8) else BEFORE_12_8
    found: dict[tuple[int, int, str], str] = {}
    for flag in _get_cuda_arch_flags():
        kind, digits, suffix = re.findall(r"code=(sm|compute)_(\d+)([af]?)", flag)[0]
        chip = int(digits[:-1]), int(digits[-1]), suffix
        found[chip] = "+PTX" if kind == "compute" else found.get(chip, "")
    return [f"{major}.{minor}{of}{found[major, minor, of]}" for major, minor, of in sorted(found) if major >= OLDEST]


def cuda_macros() -> list[tuple[str, str | None]]:
    """Tells the sources that CUDA is there, and for which architectures; torch, too."""
    listed = architectures()
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(listed)
    return [("PC_WITH_CUDA", None), ("PC_KERNELS_CUDA_ARCHITECTURES", "_".join(listed))]


def why_no_cuda() -> str | None:
    """What is missing for a CUDA build; None: nothing."""
    if torch.version.cuda is None:
        return f"the installed torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None or not any((Path(CUDA_HOME) / "bin" / name).exists() for name in ("nvcc", "nvcc.exe")):
        return "nvcc was not found (install the CUDA toolkit or set CUDA_HOME)"
    if not (Path(CUDA_HOME) / "include" / "cuda_runtime.h").exists():  # a wrapper of nvcc on the PATH misleads torch
        return f"{CUDA_HOME}/include has no cuda_runtime.h (set CUDA_HOME to the toolkit's folder)"
    try:
        return None if architectures() else f"TORCH_CUDA_ARCH_LIST has nothing from {OLDEST}.0 on"
    except ValueError as error:
        return f"TORCH_CUDA_ARCH_LIST is not understood: {error}"


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


def host_flags() -> list[str]:
    """For the C++ compiler."""
    if sys.platform == "win32":
        return ["/O2"]
    # Nobody reads errno or traps; without the second flag no loop with a select vectorises. Unlike -ffast-math they
    # change no result. No -march: one binary for every machine of its kind.
    flags = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
    flags.append("-Wno-unused-parameter")  # as torch itself: its headers would drown ours
    if sys.platform == "linux":
        flags.append("-fopenmp")  # the OpenMP runtime is torch's own: same soname, loaded first
    return flags


def extension(cuda: bool) -> Extension:
    """The one extension module, pc_kernels._C."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    macros: list[tuple[str, str | None]] = [("PC_KERNELS_VERSION", version), ("PC_KERNELS_TORCH", torch.__version__)]
    compile_args = {"cxx": host_flags(), "nvcc": ["-O3", "--threads=4"]}  # architectures side by side
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
