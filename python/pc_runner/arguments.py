# SPDX-License-Identifier: MIT
"""What `PCNetwork.infer` is given, checked: an error names infer's own argument, whichever path the call takes."""

from __future__ import annotations

import torch
from torch import Tensor

from pc_runner.node import fail


def check_dtype(name: str, mu: Tensor) -> None:
    """Raise TypeError for a node's prediction in 16 bits: states differ from it by less than they resolve."""
    if mu.dtype not in (torch.float32, torch.float64):
        remedy = "keep the module and x in float32 (autocast stays outside of infer)"
        fail(f"node {name!r}", "a prediction in float32 or float64", mu.dtype, remedy, TypeError)
