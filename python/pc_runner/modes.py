# SPDX-License-Identifier: MIT
"""The modes of torch around a call of `PCNetwork`, and tensors made in them: they do not change what it computes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

M = TypeVar("M", bound=Callable[..., Any])
AUTOCASTS = ("cpu", "cuda")  # the kinds of device with a mode of their own


def ordinary(method: M) -> M:
    """The method with inference mode off (an inference differentiates, and its result is learned from later), and
    autocast (states, errors and products are of the module's own dtype)."""

    @wraps(method)
    def call(*args: Any, **settings: Any) -> Any:
        kinds = [kind for kind in AUTOCASTS if torch.is_autocast_enabled(kind)]
        if not kinds and not torch.is_inference_mode_enabled():
            return method(*args, **settings)
        with ExitStack() as modes:
            if torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(False))
            for kind in kinds:
                modes.enter_context(torch.autocast(kind, enabled=False))
            return method(*args, **settings)

    return cast("M", call)


def plain(value: Any) -> Any:
    """The same values, in whatever containers, without a history: no graph is recorded into what `infer` is given, and
    tensors of inference mode, which cannot be differentiated, are copied."""
    if isinstance(value, Tensor):
        return _plain(value)
    return value if value is None else pytree.tree_map_only(Tensor, _plain, value)


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return tensor.clone() if tensor.is_inference() else tensor
