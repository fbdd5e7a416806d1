# SPDX-License-Identifier: MIT
"""The modes of torch around a call of `PCNetwork`, and tensors made in them: what a call computes depends on neither."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@contextmanager
def ordinary() -> Iterator[None]:
    """Inside, inference mode is off: an inference differentiates, and its result is learned from later."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        yield


def plain(value: Any) -> Any:
    """The same tensors, in whatever containers, as ordinary ones: those of inference mode cannot be differentiated."""
    if isinstance(value, Tensor):
        return _plain(value)
    return value if value is None else pytree.tree_map_only(Tensor, _plain, value)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
