# SPDX-License-Identifier: MIT
"""Random numbers, states, targets and networks for the tests, the same on every device."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from truth import Node

import pc_kernels as pck


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def normal(gen: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=gen, dtype=torch.float64, device="cpu").to(torch.get_default_device(), dtype)


def ramp(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """-1 to 1 in equal steps: for tests that need any numbers at all."""
    return torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape).to(dtype)


def visible(*shape: int) -> Tensor:
    """The mask that hides nothing."""
    return torch.ones(shape, dtype=torch.bool)


def two_layers(dtype: torch.dtype = torch.float32) -> list[pck.Layer]:
    """3 inputs, a sampled node of width 4, a categorical output of width 5."""
    first = pck.Layer(ramp(4, 3, dtype=dtype), energy="gaussian_full")
    return [first, pck.Layer(ramp(5, 2, dtype=dtype), ramp(5, dtype=dtype), energy="categorical")]


def state(name: str, gen: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A free phi, or a mu, of the family: probabilities for categorical_probs, unbounded numbers elsewhere."""
    value = normal(gen, *shape)
    return (value.softmax(-1) if name == "categorical_probs" else value).to(dtype)


def target(name: str, gen: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A clamped phi of the family for a mu of the given shape, with the hard values (0, 1) among the soft ones."""
    value = normal(gen, *shape)
    if name in ("categorical", "categorical_probs"):
        kept = value.relu() + (value == value.amax(-1, keepdim=True))
        return (kept / kept.sum(-1, keepdim=True)).to(dtype)
    if name == "bernoulli":
        return (0.5 + value).clamp(0, 1).to(dtype)
    if name == "poisson":
        return (2 * value).round().clamp_min(0).to(dtype)
    return (value.chunk(2, -1)[0] if name == "gaussian_full" else value).to(dtype)


def log_var(name: str, gen: torch.Generator, width: int, dtype: torch.dtype = torch.float64) -> Tensor | None:
    return 0.4 * normal(gen, width, dtype=dtype) if name == "gaussian_diag" else None


def node(
    energy: str,
    gen: torch.Generator,
    into: int,
    width: int,
    activation: str | None = None,
    gain: float = 1.0,
    dtype: torch.dtype = torch.float64,
    **extra,
) -> Node:
    """A node with random weight, bias and (where the family has one) log_var."""
    act = activation or ("softmax" if energy == "categorical_probs" else "identity")
    weight = normal(gen, width, into, dtype=dtype) * (gain / math.sqrt(into))
    bias = 0.1 * normal(gen, width, dtype=dtype)
    return Node(weight, bias, act, energy, log_var=log_var(energy, gen, width, dtype), **extra)


PAPER = {  # name -> (activation, energy) of the three hidden nodes and the output, paper 4.1
    "M1": [("tanh", "gaussian")] * 4,
    "M2": [("tanh", "gaussian")] * 3 + [("identity", "categorical")],
    "M2-PC_F": [("tanh", "gaussian")] * 3 + [("softmax", "gaussian")],
    "M3": [("tanh", "gaussian"), ("identity", "categorical"), ("tanh", "gaussian"), ("identity", "categorical")],
    "M3-PC_F": [("tanh", "gaussian"), ("softmax", "gaussian"), ("tanh", "gaussian"), ("softmax", "gaussian")],
    "M3-probs": [
        ("tanh", "gaussian"),
        ("softmax", "categorical_probs"),
        ("tanh", "gaussian"),
        ("identity", "categorical"),
    ],
}


def paper(model: str, gen: torch.Generator, dims: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Node]:
    """M1, M2 or M3 with the given widths: dims[0] inputs, then one per node."""
    kinds = zip(dims, dims[1:], PAPER[model], strict=False)
    return [node(energy, gen, into, width, act, dtype=dtype) for into, width, (act, energy) in kinds]
