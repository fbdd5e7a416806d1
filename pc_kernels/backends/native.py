# SPDX-License-Identifier: MIT
"""The compiled backend `cpp`: loads pc_kernels._C on first use and keeps the cause when it cannot.

The ops take the positional arguments of torch.ops.pc_kernels' and are already checked by `functional`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "build_info",
    "infer",
    "layer_deltas",
    "layer_energies",
    "layer_errors",
    "linear_softmax_errors",
    "names",
    "supports",
    "unavailable_reason",
    "update_phi_",
    "weight_grads",
]

OPS = (
    "layer_energies",
    "layer_errors",
    "update_phi_",
    "infer",
    "weight_grads",
    "linear_softmax_errors",
    "linear_softmax_errors of gaussian",
)
BF16 = ("infer in bf16_delta", *(f"{op} in bf16" for op in OPS if op.startswith("linear_softmax_errors")))
_DTYPES = (torch.float32, torch.float64)
_REMEDY = "build it against this torch: pip install --no-build-isolation ."


@cache
def _load() -> ModuleType | str:
    """The extension module, or why there is none."""
    try:
        module = import_module("pc_kernels._C")
    except ModuleNotFoundError:
        return f"the compiled extension pc_kernels._C is not built; {_REMEDY}"
    except ImportError as error:  # as a rule a symbol that this torch does not have
        cause = str(error).splitlines()[0]
        return f"the compiled extension does not load with torch {torch.__version__} ({cause}); {_REMEDY}"
    built = module.build_info()["torch"]
    if _release(built) != _release(torch.__version__):
        return f"the compiled extension was built for torch {built}, and this is torch {torch.__version__}; {_REMEDY}"
    return module


def _release(version: str) -> tuple[str, ...]:
    """(major, minor): within it torch keeps its C++ ABI."""
    return tuple(version.split(".")[:2])


def _module() -> ModuleType:
    module = _load()
    if isinstance(module, str):
        raise RuntimeError(module)
    return module


def _ops() -> Any:
    _module()
    return torch.ops.pc_kernels_native


def unavailable_reason() -> str | None:
    """Why the extension cannot be used here, with the remedy; None if it can."""
    module = _load()
    return module if isinstance(module, str) else None


def supports(op: str, tensors: Sequence[Tensor | None]) -> str | None:
    """None if `op` runs on these tensors (masks and class indices among them), otherwise why not."""
    why = unavailable_reason()
    if why is not None:
        return why
    op = op.removesuffix(" with a prior").removesuffix(" with tol")
    if op in BF16:
        if not torch.ops.pc_kernels_native.has_bf16():
            return "this CPU has no AVX512_BF16"
    elif op not in OPS:
        return f"{op} is not written for the CPU"
    given = [tensor for tensor in tensors if tensor is not None]
    first = given[0] if given else None
    if first is not None and first.dtype in _DTYPES and all(t.is_cpu and t.dtype == first.dtype for t in given):
        return None  # most calls
    away = next((tensor for tensor in given if tensor.device.type != "cpu"), None)
    if away is not None:
        return f"it runs on the CPU, and a tensor is on {away.device}"
    dtypes = {tensor.dtype for tensor in given if tensor.is_floating_point()}
    if not dtypes <= set(_DTYPES):
        return "it computes in float32 or float64, and a tensor is " + _name((dtypes - set(_DTYPES)).pop())
    if len(dtypes) > 1:
        return "it takes one dtype at a time, and the tensors are " + " and ".join(sorted(map(_name, dtypes)))
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def build_info() -> dict[str, Any]:
    """version, torch, compiler, cuda_architectures, backends of the extension; empty if it cannot be used."""
    return {} if unavailable_reason() else _module().build_info()


def names() -> dict[str, tuple[str, ...]]:
    """The "energies" and "activations" that the extension was compiled with."""
    return {"energies": _module().energies(), "activations": _module().activations()}


def layer_energies(*args: Any) -> Tensor:
    """(L, B): E_l per sample."""
    return _ops().layer_energies(*args)


def layer_errors(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Energies (L, B), dE/dphi and dE/dmu per node."""
    return _ops().layer_errors(*args)


def layer_deltas(*args: Any) -> tuple[Tensor, list[Tensor]]:
    """dE/dmu per node, and the energies (L, B) where they are wanted."""
    return _ops().layer_deltas(*args)


def update_phi_(*args: Any) -> None:
    """One move of every node, in place."""
    _ops().update_phi_(*args)


def infer(*args: Any) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """T steps of a chain in one call: (phis, deltas, trace, status)."""
    return _ops().infer(*args)


def linear_softmax_errors(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Energy (R,), grad_v (R, V), grad_weight (D, V), grad_bias (D,)."""
    return _ops().linear_softmax_errors(*args)


def weight_grads(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    """dW and db of every layer."""
    return _ops().weight_grads(*args)
