# SPDX-License-Identifier: MIT
"""The backend `cuda`: the kernels of csrc/cuda in the compiled module, for NVIDIA GPUs.

The ops take the positional arguments of torch.ops.pc_kernels' and are already checked by `functional`. They are those
of `cpp` under another dispatch key: torch.ops.pc_kernels_native runs them where the tensors are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pc_kernels import dispatch
from pc_kernels.backends import native
from pc_kernels.backends.native import layer_energies, layer_errors, update_phi_

__all__ = [
    "declines", "explain_infer", "infer", "layer_energies", "layer_errors", "supports", "unavailable_reason",
    "update_phi_", "weight_grads",
]  # fmt: skip

INFER = ("infer", "infer in tf32", "infer in bf16_delta", "infer in bf16")
OPS = ("layer_energies", "layer_errors", "update_phi_", "weight_grads", *INFER)
OLDEST = (8, 0)  # compute capability
_DTYPES = (torch.float32, torch.bfloat16)
_REMEDY = "install nvcc and a torch with CUDA, then PC_KERNELS_BUILD=cuda pip install --no-build-isolation ."


@cache
def unavailable_reason() -> str | None:
    """Why no call can run on this backend, with the remedy; None if some can."""
    why = native.unavailable_reason()
    if why is not None:
        return why
    if not native.build_info()["cuda_architectures"]:
        return f"the compiled extension was built without CUDA; {_REMEDY}"
    return None if torch.cuda.is_available() else "there is no CUDA device"


def supports(op: str, tensors: Sequence[Tensor | None]) -> str | None:
    """None if `op` runs on these tensors, otherwise why not. The first one tells dtype and device."""
    if op not in OPS:
        return f"{op} is not written in CUDA C++ yet"
    why = unavailable_reason()
    if why is not None:
        return why
    tensor = next(given for given in tensors if given is not None)
    if tensor.device.type != "cuda":
        return f"it runs on an NVIDIA GPU, and a tensor is on {tensor.device}"
    if tensor.dtype not in _DTYPES:
        name = str(tensor.dtype).removeprefix("torch.")
        return f"it computes in float32, from float32 or bfloat16, and a tensor is {name}"
    return _infer_reason(tensor) if op in INFER else _old_device(tensor.device, OLDEST)


def _infer_reason(x: Tensor) -> str | None:
    if x.dtype != torch.float32:
        return f"infer takes float32, and a tensor is {str(x.dtype).removeprefix('torch.')}"
    return _old_device(x.device, OLDEST)


@cache
def _old_device(device: torch.device, oldest: tuple[int, int]) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= oldest:
        return None
    return f"it needs compute capability {_dotted(oldest)}, and {device} has {_dotted(capability)}"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def infer(*args: Any) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """T steps of a chain: (phis, deltas, trace, status)."""
    return import_module("pc_kernels.backends.cuda_infer").infer(*args)


def declines(op: str, tensors: Sequence[Tensor], arguments: Sequence[Any]) -> str | None:
    """Why "auto" is to pass over this backend for a call of `infer` that it may be able to run; None: it is not."""
    triton_runs = dispatch.reason("triton", op, tensors) is None
    return import_module("pc_kernels.backends.cuda_infer").declines(arguments, triton_runs)


def weight_grads(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    """dW and db of every layer: torch's products, which on a GPU are the vendor's own and leave nothing to win."""
    return import_module("pc_kernels.backends.reference").weight_grads(*args)


def explain_infer(*args: Any) -> str:
    """One line about how `infer` would run with these arguments, or why it cannot."""
    return import_module("pc_kernels.backends.cuda_infer").explained(*args)
