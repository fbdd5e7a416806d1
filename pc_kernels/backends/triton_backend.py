# SPDX-License-Identifier: MIT
"""The backend `triton` (NVIDIA and AMD GPUs), as dispatch.py sees it. Triton is imported when an op runs, not before.

Under TRITON_INTERPRET=1, and asked for by name, the same kernels run on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pc_kernels import dispatch

__all__ = [
    "explain_infer",
    "infer",
    "layer_energies",
    "layer_errors",
    "linear_softmax_errors",
    "supports",
    "update_phi_",
    "weight_grads",
]

INFER = ("infer", "infer in tf32", "infer in bf16", "infer in bf16_delta")
OPS = ("layer_energies", "layer_errors", "linear_softmax_errors", "update_phi_", "weight_grads", *INFER)
WIDEST_ROW = 4096  # of a softmax in `infer`, in one program; twice as long spills
OLDEST = (3, 6)
_DTYPES = (torch.float32, torch.bfloat16)
_REMEDY = "pip install 'triton>=3.6'"


@cache
def unavailable_reason() -> str | None:
    """Why Triton cannot be used here, with the remedy; None if it can."""
    try:
        version = import_module("triton").__version__
    except ImportError as error:
        return f"Triton cannot be imported ({error}); {_REMEDY}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"this is Triton {version}, and 3.6 is the oldest that will do; {_REMEDY}"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def supports(op: str, tensors: Sequence[Tensor]) -> str | None:
    """None if `op` runs, otherwise why not. The first tensor tells dtype and device; for `infer` see
    library.telling_of."""
    if op.partition(" in ")[0] not in OPS:  # every precision
        return f"{op} is not written in Triton"
    width = _width_reason(tensors[1:]) if op in INFER else None
    return _device_reason(tensors[0]) or _dtype_reason(tensors[0]) or width or unavailable_reason()


def _device_reason(tensor: Tensor) -> str | None:
    kind = tensor.device.type
    if kind == "cuda":  # AMD's GPUs too
        return "TRITON_INTERPRET is set: unset it to run on the GPU" if interpreted() else None
    if kind == "cpu" and interpreted() and dispatch.requested() == "triton":
        return None
    there = "" if torch.cuda.is_available() else ", and there is no CUDA device"
    return f"it runs on a GPU, and a tensor is on {tensor.device}{there}"


def _dtype_reason(tensor: Tensor) -> str | None:
    if tensor.dtype in _DTYPES:
        return None
    name = str(tensor.dtype).removeprefix("torch.")
    return f"it computes in float32, from float32 or bfloat16, and a tensor is {name}"


def _width_reason(rows: Sequence[Tensor]) -> str | None:
    widest = max((row.shape[-1] for row in rows), default=0)
    return f"a softmax over {widest} entries is wider than its {WIDEST_ROW}" if widest > WIDEST_ROW else None


@cache
def _launcher(name: str) -> Any:
    """The module that launches an op's kernels. It imports Triton."""
    return import_module(f"pc_kernels.backends.triton_{name}")


def layer_energies(*args: Any) -> Tensor:
    """(L, B): E_l per sample."""
    return _launcher("layer_ops").layer_energies(*args)


def layer_errors(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Energies (L, B), dE/dphi and dE/dmu per node."""
    return _launcher("layer_ops").layer_errors(*args)


def update_phi_(*args: Any) -> None:
    """One move of every node, in place."""
    _launcher("layer_ops").update_phi_(*args)


def infer(*args: Any) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """T steps of a chain: (phis, deltas, trace, status)."""
    return _launcher("plan").infer(*args)


def explain_infer(*args: Any) -> str:
    """One line about how `infer` would run with these arguments: schedule, tiles, memory."""
    return _launcher("plan").explained(*args)


def weight_grads(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    """dW and db of every layer: torch's products, which on a GPU are the vendor's own and leave nothing to win."""
    return import_module("pc_kernels.backends.reference").weight_grads(*args)


def linear_softmax_errors(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Energy (R,), grad_v (R, V), grad_weight (D, V), grad_bias (D,), of the family that `supports` takes."""
    return _launcher("linear_softmax").linear_softmax_errors(*args[:-1])
