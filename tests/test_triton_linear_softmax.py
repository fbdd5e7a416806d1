# SPDX-License-Identifier: MIT
"""The Triton kernels of linear_softmax_errors: in the interpreter where there is no GPU, and compiled for GPUs."""

from __future__ import annotations

import math
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from linear_softmax_truth import Problem, distance, problem, truth
from triton_compile import Kernel, compiled, problems, table

import pc_kernels as pck

MODULE = "pc_kernels.backends.triton_linear_softmax"
EPS = torch.finfo(torch.float32).eps


def run(given: Problem, **options: Any) -> pck.LinearSoftmaxErrors:
    v, weight, bias, target, mask = (getattr(given, name) for name in ("v", "weight", "bias", "target", "mask"))
    return pck.linear_softmax_errors(v, weight, bias, target, mask=mask, **options)


def good(given: Problem, bound: float = 0.0, **options: Any) -> pck.LinearSoftmaxErrors:
    """Compared with the truth: twice plain torch's error in float32, or the bound on the gradients."""
    got, exact, plain = run(given, **options), truth(given), truth(given, torch.float32)
    for one, want, beside in zip(got, exact, plain, strict=True):
        assert (one is None) == (want is None)
        if one is not None and want is not None and beside is not None:
            assert distance(one, want) <= max(2 * distance(beside, want) + 8 * EPS, bound)
    return got


# ---------------------------------------------------------------- numbers

CASES = [  # rows, classes, width, kind, bias, mask
    ((1,), 1, 1, "index", True, False),
    ((1,), 7, 5, "mass", False, True),
    ((3, 2), 7, 128, "soft", True, True),
    ((17,), 129, 5, "index", False, True),
    ((5,), 129, 128, "mass", True, False),
    ((2,), 1031, 5, "soft", False, False),
    ((19,), 1031, 1, "index", True, True),
    ((3,), 1031, 128, "index", True, False),
    ((2,), 40, 200, "soft", True, False),
]


@pytest.mark.usefixtures("triton_interpreter", "poison")
@pytest.mark.parametrize(("rows", "classes", "width", "kind", "bias", "masked"), CASES)
def test_numbers(
    rows: tuple[int, ...], classes: int, width: int, kind: str, bias: bool, masked: bool, gen: torch.Generator
) -> None:
    good(problem(gen, rows, classes, width, kind, bias, masked, dtype=torch.float32))


@pytest.mark.usefixtures("triton_interpreter")
def test_parts_of_the_classes_add_up(gen: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    from pc_kernels.backends import triton_linear_softmax as module

    given = problem(gen, (5,), 300, 5, "soft", masked=True, dtype=torch.float32)
    for programs, parts in ((1, 1), (264, 5)):
        monkeypatch.setattr(module, "PROGRAMS", programs)
        monkeypatch.setattr(module, "INTERPRETED", module.Launch(16, 64, 16, 4, 1))
        assert module.split(5, 300, 5, module.INTERPRETED)[0] == parts
        good(given)


@pytest.mark.parametrize("rows", [1, 100, 4096])
@pytest.mark.parametrize("classes", [1, 7, 1031, 8001, 250_000])
@pytest.mark.parametrize("width", [1, 128, 2048])
@pytest.mark.usefixtures("triton_interpreter")
def test_parts_cover_the_classes_and_stay_small(rows: int, classes: int, width: int) -> None:
    from pc_kernels.backends import triton_linear_softmax as module

    for launch in (*module.LAUNCHES.values(), module.HIP):
        parts, size = module.split(rows, classes, width, launch)
        assert (parts - 1) * size < classes <= parts * size
        assert parts == 1 or 4 * parts * rows * width <= rows * classes


@pytest.mark.usefixtures("triton_interpreter")
def test_bfloat16_memory(gen: torch.Generator) -> None:
    got = good(problem(gen, (5,), 70, 20, "soft", dtype=torch.bfloat16), 2.0**-8)
    assert [t.dtype for t in got if t is not None] == [torch.float32, *[torch.bfloat16] * 3]


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("kind", ["index", "soft"])
def test_bf16_products(kind: str, gen: torch.Generator) -> None:
    """As the reference, which rounds the same operands."""
    given = problem(gen, (5,), 70, 20, kind, dtype=torch.float32)
    got = run(given, precision="bf16")
    with pck.use_backend("reference"):
        want = run(given, precision="bf16")
    for one, other, bound in zip(got, want, (4 * EPS, 1e-3, 1e-3, 8 * EPS), strict=True):
        assert one is not None
        assert other is not None
        assert distance(one, other) < bound  # a delta near the middle of two bfloat16s may round either way
    assert distance(got.energy, run(given).energy) > 4 * EPS


@pytest.mark.usefixtures("triton_interpreter")
def test_extreme_logits_padding_and_hidden_classes(gen: torch.Generator) -> None:
    good(problem(gen, (5,), 50, 8, "mass", scale=1e4, dtype=torch.float32), 1e-4)
    given = problem(gen, (6,), 300, 5, "index", dtype=torch.float32)
    assert given.bias is not None
    target, bias, v = given.target % 10 + 290, given.bias.clone(), given.v.clone()
    bias[:290] = -math.inf  # a whole tile of classes, the first one
    mask = torch.tensor([True, False, True, True, True, False])
    v[~mask] = math.nan
    got = run(Problem(v, given.weight, bias, target.masked_fill(~mask, -100), mask))
    seen = Problem(given.v[mask], given.weight[290:], bias[290:], target[mask] - 290)
    want = truth(seen)
    for one, other in zip((got.energy[mask], got.grad_v[mask], got.grad_weight[290:]), want, strict=False):  # type: ignore[index]
        assert other is not None
        assert distance(one, other) < 16 * EPS
    assert not got.energy[~mask].any()
    assert not got.grad_v[~mask].any()
    assert got.grad_weight is not None
    assert not got.grad_weight[:290].any()


@pytest.mark.usefixtures("triton_interpreter")
def test_shapes_and_two_runs(gen: torch.Generator) -> None:
    given = problem(gen, (3,), 9, 5, "soft", masked=True, dtype=torch.float32)
    spread = Problem(*(x.repeat_interleave(2, -1)[..., ::2] for x in astuple(given)))
    first, second = run(given), run(spread)
    for one, other in zip(first, second, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    bare = run(given, weight_grads=False)
    assert bare.grad_weight is None
    assert torch.equal(bare.grad_v, first.grad_v)
    empty = run(replace(given, v=given.v[:0], target=given.target[:0], mask=None))
    assert empty.energy.shape == (0,)
    assert empty.grad_weight is not None
    assert not empty.grad_weight.any()


@pytest.mark.usefixtures("triton_interpreter")
def test_float64_is_refused(gen: torch.Generator) -> None:
    with pytest.raises(pck.BackendUnavailable, match="float64"):
        run(problem(gen, (2,), 7, 5, "index"))


# ---------------------------------------------------------------- machine code


def _kernel(name: str, launch: Any, precision: int, pointer: str, soft: bool) -> Kernel:
    from pc_kernels.backends.triton_linear_softmax import WIDEST, Form

    own = {"partition_kernel": (), "delta_kernel": ("energy", "grad_v"), "weight_kernel": ("grad_weight", "grad_bias")}
    signature = dict.fromkeys(("v", "weight", "bias", "target"), pointer) | {"mask": "*u8"}
    signature |= {} if soft else {"target": "*i64"}
    signature |= dict.fromkeys(("most", "total" if name == "partition_kernel" else "log_total", "mass"), "*fp32")
    signature |= dict.fromkeys(own[name], "*fp32") | dict.fromkeys(("rows", "classes", "width"), "i32")
    signature |= {} if name == "weight_kernel" else {"part_size": "i32"}
    constants: dict[str, Any] = {"BM": launch.block_m, "BN": launch.block_n, "BK": launch.block_k}
    constants |= {} if name == "partition_kernel" else {"BV": WIDEST}
    constants |= {"FORM": Form(True, True, soft, precision, False)}
    aligned = (*(key for key, kind in signature.items() if kind.startswith("*")), "width")
    signature |= dict.fromkeys(constants, "constexpr")
    label = f"{name} {tuple(launch)} {precision} {pointer} {'soft' if soft else 'index'}"
    return Kernel(MODULE, name, signature, constants, launch.warps, launch.stages, aligned, label=label)


def kernels(hip: bool) -> list[Kernel]:
    """The kernels as launched, on the widest block: indices and probabilities, each precision once."""
    from pc_kernels.backends.triton_linear_softmax import HIP, LAUNCHES, PRECISION_CODES

    forms = [("fp32", "*fp32", True), ("tf32", "*fp32", False), ("bf16", "*bf16", True)]
    return [
        _kernel(name, HIP if hip else LAUNCHES[precision], PRECISION_CODES[precision], pointer, soft)
        for precision, pointer, soft in forms
        for name in ("partition_kernel", "delta_kernel", "weight_kernel")
    ]


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_without_spills(target: str) -> None:
    reports = compiled(kernels(target.startswith("gfx")), [target])
    assert not problems(reports), table(reports)
