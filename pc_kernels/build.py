# SPDX-License-Identifier: MIT
"""What this installation was built with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pc_kernels.backends import native


def build_info() -> dict[str, Any]:
    """version, backends (compiled or pure Python, usable here), cuda_architectures, compiler, torch it was built
    for, and, when
    the compiled part cannot be used, why (`native_error`)."""
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
    }
    if info["native_error"] is None:
        built = native.build_info()
        info |= {key: built[key] for key in ("cuda_architectures", "compiler", "torch")}
        info["backends"] = [*built["backends"], "reference"]
    return info
