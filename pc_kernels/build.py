# SPDX-License-Identifier: MIT
"""What this installation was built with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pc_kernels.backends import native, triton_backend

UNPROVED = {  # what no GPU has run and compared with float64 yet; benchmarks.gpu_gate would
    "cuda": ("infer with gaussian_full nodes", "infer by two launches a step from a CUDA graph of its own"),
    "triton": ("linear_softmax_errors",),
}


def build_info() -> dict[str, Any]:
    """version, backends (compiled or pure Python, usable here or on a GPU), what of them no GPU has run yet,
    cuda_architectures, compiler, torch it was built for; when the compiled part or Triton cannot be used, why
    (`native_error`, `triton_error`)."""
    try:
        own = version("pc-kernels")
    except PackageNotFoundError:
        own = "unknown (not installed)"
    info: dict[str, Any] = {
        "version": own,
        "backends": ["reference"],
        "cuda_architectures": [],
        "compiler": None,
        "torch": None,
        "native_error": native.unavailable_reason(),
        "triton_error": triton_backend.unavailable_reason(),
    }
    if info["native_error"] is None:
        built = native.build_info()
        info |= {key: built[key] for key in ("cuda_architectures", "compiler", "torch")}
        info["backends"] = [*built["backends"], "reference"]
    if info["triton_error"] is None:
        info["backends"] = ["triton", *info["backends"]]
    info["not_yet_run_on_hardware"] = [
        f"{name}: {what}" for name in info["backends"] for what in UNPROVED.get(name, ())
    ]
    return info
