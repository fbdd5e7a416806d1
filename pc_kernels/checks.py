# SPDX-License-Identifier: MIT
"""One way to fail: a message that names the argument, what was wanted, what came, and the remedy, on one line.

Shape and type checks cost nothing on the device. Checks of values (`in_range`, `visible_rows`, ...) read the data,
so they are left
out while a graph is compiled or captured.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

LARGEST = sys.float_info.max


def fail(argument: str, wanted: str, got: str, remedy: str = "", error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` with the one message format there is."""
    raise error(f"{argument}: wanted {wanted}, got {got}" + (f"; {remedy}" if remedy else ""))


def describe(value: Any) -> str:
    """A short account of a value for messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)} on {value.device}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def choice(argument: str, value: Any, valid: Sequence[str]) -> None:
    """`value` is one of the names."""
    if not isinstance(value, str):
        fail(argument, "a name (str)", describe(value), f"one of {', '.join(valid)}", TypeError)
    if value not in valid:
        fail(argument, "a known name", repr(value), f"one of {', '.join(valid)}")


def number(argument: str, value: Any, least: float = -math.inf, below: float = math.inf) -> float:
    """A finite real number, least <= value < below."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(argument, "a number", describe(value), "pass a Python float", TypeError)
    if not (-LARGEST <= value <= LARGEST and least <= value < below):  # torch.compile cannot trace math.isfinite
        bounds = f" >= {least:g}" if least > -math.inf else ""
        bounds += f" and < {below:g}" if below < math.inf else ""
        fail(argument, f"a finite number{bounds}", describe(value), "check the configuration")
    return float(value)


def count(argument: str, value: Any, least: int = 0) -> int:
    """A whole number >= least."""
    if isinstance(value, bool) or not isinstance(value, int):
        fail(argument, "a whole number (int)", describe(value), "pass a Python int", TypeError)
    if value < least:
        fail(argument, f"a whole number >= {least}", repr(value), "check the configuration")
    return value


def flag(argument: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        fail(argument, "True or False", describe(value), "pass a bool", TypeError)


def per_node(argument: str, value: Any, n: int) -> list[Any]:
    """A list with one entry per node; None stands for a list of Nones."""
    if value is None:
        return [None] * n
    if not isinstance(value, (list, tuple)):
        fail(argument, f"a list of {n}, one entry per node", describe(value), "wrap it in a list", TypeError)
    if len(value) != n:
        fail(argument, f"a list of {n}, one entry per node", describe(value), "use None for nodes without one")
    return list(value)


def tensor(argument: str, value: Any) -> None:
    """A dense tensor."""
    if not isinstance(value, Tensor):
        fail(argument, "a tensor", describe(value), "convert it with torch.as_tensor", TypeError)
    if value.layout != torch.strided:
        fail(argument, "a dense tensor", f"layout {value.layout}", "call .to_dense()")


def floating(
    argument: str,
    value: Any,
    *,
    shape: Sequence[int] | None = None,
    ndim: int | None = None,
    like: Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    """A dense floating-point tensor, of the given shape or number of dimensions, with the dtype and device of
    `like`."""
    tensor(argument, value)
    if not value.is_floating_point():
        fail(argument, "a floating-point tensor", describe(value), "convert it with .float()", TypeError)
    if dtypes is not None and value.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        fail(argument, names, describe(value), "convert it with .float() or .double()", TypeError)
    if ndim is not None and value.ndim != ndim:
        fail(argument, f"{ndim} dimensions", describe(value), "reshape it (dim 0 is the sample)")
    if shape is not None and tuple(value.shape) != tuple(shape):
        fail(argument, f"shape {tuple(shape)}", describe(value), "check the layer widths and the batch size")
    if like is not None and value.dtype != like.dtype:
        wanted = str(like.dtype).removeprefix("torch.")
        fail(argument, f"{wanted} as the other tensors", describe(value), f"call .to(torch.{wanted})", TypeError)
    if like is not None and value.device != like.device:
        fail(argument, f"a tensor on {like.device}", describe(value), f"call .to({str(like.device)!r})")


def alike(value: Tensor, like: Tensor) -> bool:
    """Whether two tensors have one dtype, device and layout: the quick form of `floating(..., like=like)` where `like`
    has passed."""
    return value.dtype == like.dtype and value.device == like.device and value.layout == like.layout


def mask(argument: str, value: Any, shape: Sequence[int], device: torch.device) -> None:
    """A bool tensor that broadcasts to `shape`."""
    tensor(argument, value)
    if value.dtype != torch.bool:
        fail(argument, "a bool tensor", describe(value), "compare, as in `m != 0`, or call .bool()", TypeError)
    if value.device != device:
        fail(argument, f"a tensor on {device}", describe(value), f"call .to({str(device)!r})")
    ours, theirs = list(value.shape), list(shape)
    fits = len(ours) <= len(theirs) and all(o in (1, t) for o, t in zip(reversed(ours), reversed(theirs), strict=False))
    if not fits:
        fail(argument, f"a mask that broadcasts to {tuple(shape)}", describe(value), "check the node's shape")


def reads_values(*tensors: Tensor) -> bool:
    """Whether data may be looked at now: not while compiling, nor of fake tensors, nor while a CUDA graph is being
    captured."""
    if torch.compiler.is_compiling() or any(hasattr(t, "fake_mode") for t in tensors):
        return False
    return not (any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing())


def visible_rows(argument: str, value: Tensor) -> None:
    """No row of the mask hides everything."""
    if reads_values(value) and not bool(value.any(-1).all()):
        fail(
            argument,
            "at least one True in every row",
            "a row that is all False",
            "drop the row, or give it a zero target",
        )


def class_indices(argument: str, value: Tensor, classes: int, visible: Tensor | None) -> None:
    """Class indices within [0, classes), none of a class that the mask hides."""
    if not reads_values(value) or value.numel() == 0:
        return
    low, high = (int(v) for v in value.aminmax())
    if low < 0 or high >= classes:
        fail(argument, f"class indices within 0..{classes - 1}", f"{low if low < 0 else high}", "check the labels")
    if visible is not None and not bool(visible.expand(*value.shape, classes).gather(-1, value.unsqueeze(-1)).all()):
        fail(argument, "classes that the mask leaves visible", "the index of a masked class", "check the mask")


def in_range(argument: str, value: Tensor, least: float, most: float, visible: Tensor | None = None) -> None:
    """All entries that take part are within [least, most]; NaN is left to the divergence check."""
    if not reads_values(value) or value.numel() == 0:
        return
    outside = (value < least) | (value > most)
    if visible is not None:
        outside = outside & visible
    if bool(outside.any()):
        got = float(value[outside][0])
        bound = f">= {least:g}" if math.isinf(most) else f"within [{least:g}, {most:g}]"
        fail(argument, f"values {bound}", f"{got:g}", "check the target's scale")
