# SPDX-License-Identifier: MIT
"""linear_softmax_errors in C++: every tile and group, threads, bf16, and what it leaves to the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_softmax_truth import distance, problem, truth

import pc_kernels as pck
from tests.test_linear_softmax import EPS, _bits_kept, run, same


@pytest.mark.parametrize("energy", ["categorical", "gaussian"])
def test_the_compiled_backend_has_a_form_for_every_size(energy: str, gen: torch.Generator) -> None:
    """Tiles that are cut off, groups of more than 256 rows, weight gradients over several groups."""
    for rows, classes, width in [((300,), 37, 9), ((520,), 2100, 70), ((2,), 5003, 3), ((65,), 64, 64)]:
        given = problem(gen, rows, classes, width, "index", masked=True, dtype=torch.float32)
        exact, plain = truth(given, family=energy), truth(given, torch.float32, energy)
        with pck.use_backend("cpp"):
            found = run(given, energy=energy)
        for got, want, beside in zip(found, exact, plain, strict=True):
            assert got is not None
            assert want is not None
            assert beside is not None
            assert distance(got, want) <= 2 * distance(beside, want) + 4 * EPS, (rows, classes, width)


@pytest.mark.parametrize("classes", [129, 2050])
@pytest.mark.parametrize("width", [33, 128])
@pytest.mark.parametrize("energy", ["categorical", "gaussian"])
def test_bf16_compiled(energy: str, width: int, classes: int, gen: torch.Generator) -> None:
    """The energy is that of rounded operands; grad_v is as far from the truth as plain torch with bfloat16 products."""
    given = problem(gen, (70,), classes, width, "index", dtype=torch.float32)
    rounded = replace(given, v=_bits_kept(given.v, 8), weight=_bits_kept(given.weight, 8))
    want, exact = truth(rounded, family=energy), truth(given, family=energy)
    with pck.use_backend("reference"):
        beside = run(given, precision="bf16", weight_grads=False, energy=energy)
    try:
        with pck.use_backend("cpp"):
            got = run(given, precision="bf16", weight_grads=False, energy=energy)
    except pck.BackendUnavailable as reason:
        pytest.skip(str(reason))
    assert distance(got.energy, want[0]) < 1e-5
    assert exact[1] is not None
    assert distance(got.grad_v, exact[1]) <= 2 * distance(beside.grad_v, exact[1])
    assert distance(got.grad_v, beside.grad_v) < 2.0**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_do_not_change_a_bit(dtype: torch.dtype, gen: torch.Generator) -> None:
    given = problem(gen, (300,), 1031, 40, "index", masked=True, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with pck.use_backend("cpp"):
                results.append(run(given))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one is not None
            assert torch.equal(one, two)


def test_what_the_compiled_backend_leaves_to_the_reference(gen: torch.Generator) -> None:
    given = problem(gen, (2,), 7, 5, "index", dtype=torch.float32)
    with pck.use_backend("cpp"):
        for other, options in [(given, {"precision": "bf16"}), (given.to(torch.bfloat16), {})]:
            with pytest.raises(pck.BackendUnavailable, match="linear_softmax_errors"):
                run(other, **options)
    same(run(given, precision="bf16"), run(given, precision="bf16"))
