# SPDX-License-Identifier: MIT
"""The device code of csrc/cuda, compiled for the host: every CUDA thread is a thread, or a turn of a loop."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
FLAGS = ("-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", f"-I{ROOT / 'csrc'}")


@cache
def library(name: str) -> ctypes.CDLL:
    """tests/cuda_host/<name>.cpp as a library."""
    out = Path(mkdtemp(prefix="pc_kernels_host_")) / f"{name}.so"
    subprocess.run([str(CXX), *FLAGS, str(HERE / f"{name}.cpp"), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


def pointer(tensor: Tensor | None) -> int | None:
    """Where a contiguous tensor's data lie; None for none."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


class Node(ctypes.Structure):
    """csrc/ops.h's NodeDesc."""

    _fields_ = (
        ("energy", ctypes.c_int),
        ("clamped", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in ("rows", "width", "phi_sample", "mu_sample")),
        *((name, ctypes.c_void_p) for name in ("phi", "mu", "index", "log_var", "mask")),
        ("mask_sample", ctypes.c_int64),
        ("hold", ctypes.c_void_p),
        ("hold_sample", ctypes.c_int64),
        ("grad_phi", ctypes.c_void_p),
        ("grad_mu", ctypes.c_void_p),
        ("natural", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("state", "velocity", "feedback")),
        ("lr", ctypes.c_double),
    )
