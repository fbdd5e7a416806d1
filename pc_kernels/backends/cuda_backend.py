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
    if op in INFER and tensor.dtype != torch.float32:
        return f"infer takes float32, and a tensor is {str(tensor.dtype).removeprefix('torch.')}"
    return device_reason(tensor.device)


@cache
def device_reason(device: torch.device) -> str | None:
    """None if the build holds code that this GPU runs, otherwise why not."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"it needs compute capability {_dotted(OLDEST)}, and {device} has {_dotted(capability)}"
    if code_for(device) is not None:
        return None
    built = ", ".join(native.build_info()["cuda_architectures"])
    return (
        f"it was built for {built}, and {device} has compute capability {_dotted(capability)}; "
        f"build it with TORCH_CUDA_ARCH_LIST={_dotted(capability)}"
    )


@cache
def code_for(device: torch.device) -> tuple[int, int] | None:
    """The architecture whose code the driver takes on this GPU; None: the build holds none for it."""
    return taken(native.build_info()["cuda_architectures"], torch.cuda.get_device_capability(device))


def taken(architectures: Sequence[str], capability: tuple[int, int]) -> tuple[int, int] | None:
    """Of a build for these, as "9.0a" or "10.0+PTX": machine code of the same major version before PTX of an older one;
    what ends in a letter holds features of one chip (f: of one family)."""
    machine, virtual = [], []
    for name in architectures:
        number, plus, _ = name.partition("+")
        arch = (int(number.rstrip("af").split(".")[0]), int(number.rstrip("af").split(".")[1]))
        same_family = arch[0] == capability[0] and arch[1] <= capability[1]
        fits = arch == capability if number.endswith("a") else same_family
        machine += [arch] if fits else []
        virtual += [arch] if plus and (fits or (not number[-1].isalpha() and arch <= capability)) else []
    return max(machine or virtual, default=None)


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
