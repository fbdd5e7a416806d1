# SPDX-License-Identifier: MIT
"""Rounding: float32 against plain torch, and the precision modes against an emulation by hand (the README, section
4)."""

from __future__ import annotations

from collections.abc import Callable

import inputs
import pytest
import torch
import truth
from torch import Tensor

import pc_kernels as pck

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

Layers = Callable[[list[truth.Node]], list[pck.Layer]]


def _float32(nodes: list[truth.Node]) -> list[truth.Node]:
    cast = {key: lambda n, k=key: getattr(n, k) for key in ("weight", "bias", "log_var")}
    return [
        truth.replace(n, **{k: None if get(n) is None else get(n).float() for k, get in cast.items()}) for n in nodes
    ]


@pytest.mark.parametrize("steps", [5, 32])
@pytest.mark.parametrize("model", inputs.PAPER)
def test_float32_is_as_good_as_plain_torch(
    model: str, steps: int, gen: torch.Generator, layers: Layers, infer_backend: str
) -> None:
    """the README, section 4: per layer, delta and dW at most twice as far from the truth as plain torch, plus 4 eps
    ||phi||."""
    nodes = _float32(inputs.paper(model, gen, (20, 32, 32, 32, 10)))
    if model == "M3-probs":
        nodes[1].lr_scale = 0.01
    x = inputs.normal(gen, 16, 20, dtype=torch.float32)
    target = inputs.target(nodes[-1].energy, gen, 16, 10, dtype=torch.float32)
    options = {"target": target, "steps": steps, "lr": 0.1}
    want, made = truth.infer(nodes, x, **options), layers(nodes)
    with truth.working_in(torch.float32):
        plain = truth.infer(nodes, x, **options)
    got = pck.infer(x, made, **options)
    grads = pck.weight_grads(x, made, got, reduction="sum")
    for i, phi in enumerate(want.phis):
        slack = 4 * torch.finfo(torch.float32).eps * phi.norm()
        for mine, theirs, right in (
            (got.deltas[i], plain.deltas[i], want.deltas[i]),
            (grads[i].weight, plain.grads[i]["weight"], want.grads[i]["weight"]),
        ):
            assert mine.dtype == torch.float32
            assert (mine.double() - right).norm() <= 2 * (theirs.double() - right).norm() + slack


def _tf32(tensor: Tensor) -> Tensor:
    """To 10 explicit mantissa bits, nearest: the 13 lowest bits of float32 are dropped."""
    mantissa, exponent = torch.frexp(tensor.double())
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def _bf16(tensor: Tensor) -> Tensor:
    return tensor.float().bfloat16().double()


def _emulated(nodes: list[truth.Node], x: Tensor, target: Tensor, steps: int, precision: str) -> list[Tensor]:
    """Deltas of a tanh chain (M1) with rounded operands, accumulated in float64; the README's sections 1 and 4 by
    hand."""
    cut = {"fp32": torch.Tensor.double, "tf32": _tf32}.get(precision, _bf16)
    weights, biases = [n.weight.double() for n in nodes], [n.bias.double() for n in nodes]
    exact = precision == "bf16_delta"
    values, pre = [x.double()], []
    for w, b in zip(weights, biases, strict=True):
        v = values[-1]
        pre.append((v @ w.T if exact else cut(v) @ cut(w).T) + b)
        values.append(pre[-1].tanh())
    values[-1] = target.double()

    def deltas() -> list[Tensor]:
        return [(a.tanh() - phi) * (1 - a.tanh() ** 2) for a, phi in zip(pre, values[1:], strict=True)]

    for _ in range(steps):
        d = deltas()
        old = list(values)
        for i in range(1, len(nodes)):
            g = old[i] - pre[i - 1].tanh() + cut(d[i]) @ cut(weights[i])
            values[i] = old[i] - 0.1 * g
        for i in range(1, len(nodes)):
            if exact:
                pre[i] = pre[i] + cut(values[i] - old[i]) @ cut(weights[i]).T
            else:
                pre[i] = cut(values[i]) @ cut(weights[i]).T + biases[i]
    return deltas()


def test_precision_modes(gen: torch.Generator, layers: Layers) -> None:
    """Errors of the deltas per layer: as large as the emulation's, and in the order of the README, section 4."""
    nodes = _float32(inputs.paper("M1", gen, (96, 64, 64, 64, 10)))
    x = inputs.normal(gen, 32, 96, dtype=torch.float32)
    target = inputs.normal(gen, 32, 10, dtype=torch.float32).tanh()
    exact = _emulated(nodes, x, target, 32, "fp32")
    errors: dict[str, list[float]] = {}
    for precision in ("fp32", "tf32", "bf16_delta", "bf16"):
        with pck.use_backend("reference"):
            got = pck.infer(x, layers(nodes), target=target, steps=32, lr=0.1, precision=precision)
        emulated = _emulated(nodes, x, target, 32, precision)
        errors[precision] = [
            ((a.double() - b).norm() / b.norm()).item() for a, b in zip(got.deltas, exact, strict=True)
        ]
        for mine, hand, right in zip(errors[precision], emulated, exact, strict=True):
            theirs = ((hand - right).norm() / right.norm()).item()
            assert mine <= 1e-5 if precision == "fp32" else 0.5 * theirs <= mine <= 2 * theirs, (
                precision,
                mine,
                theirs,
            )
    for layer in range(3):  # fp32 < tf32 < bf16, fp32 < bf16_delta < bf16, each by a clear factor
        fp32, tf32, delta, bf16 = (errors[p][layer] for p in ("fp32", "tf32", "bf16_delta", "bf16"))
        assert 10 * fp32 < tf32 < 0.5 * bf16
        assert 10 * fp32 < delta < 0.5 * bf16
