# SPDX-License-Identifier: MIT
"""The layer ops' Triton kernels become machine code for every GPU they are meant for: no spill, shared memory fits."""

from __future__ import annotations

from typing import Any

import pytest
import triton_compile
from triton_compile import Kernel

pytest.importorskip("triton", minversion="3.6")

from pc_kernels.backends.triton_launches import registers
from pc_kernels.backends.triton_layer_ops import LAUNCHES
from pc_kernels.backends.triton_math import ENERGY_CODES, HAS_OWN_TARGET, ROW_ENERGIES, present
from pc_kernels.backends.triton_tables import WIDE_ROWS, Form

MODULE = "pc_kernels.backends.triton_layer_kernels"
ENTRIES = {name: code for name, code in ENERGY_CODES.items() if name not in ROW_ENERGIES}
NARROW, WIDE = LAUNCHES
FORMS = present(Form)  # all of them
ROWS = present([Form.ROW, Form.ROW_TARGET, Form.ROW_INDEX])
FREE, TARGETS = present(ENTRIES.values()), present(ENTRIES[name] for name in HAS_OWN_TARGET)


def _kernel(name: str, label: str, tile: int, **constants: Any) -> Kernel:
    errors = name == "errors_kernel"
    pointers = {"table": "*i64", **({"energies": "*fp32"} if errors else {})}
    scalars = {"batch": "i32", "nodes": "i32", **({} if errors else {"lr": "fp32", "momentum": "fp32"})}
    constexprs = {"FREE": 0, "NODES": 4, "BFLOAT16": False, "ALIGNED": True, "TILE": tile, **constants}
    if errors:
        constexprs = {"TARGETS": 0, "GRADS": True, **constexprs}
    order = ["FORMS", "FREE", "TARGETS", "WIDTHS", "NODES", "GRADS", "BFLOAT16", "ALIGNED", "TILE"]
    signature = {**pointers, **scalars, **{key: "constexpr" for key in order if key in constexprs}}
    aligned = tuple(pointers)
    warps, label = LAUNCHES[tile], f"{name} {label}"
    options = {"maxnreg": registers(warps)}
    return Kernel(MODULE, name, signature, constexprs, warps, aligned=aligned, options=options, label=label)


def _both(label: str, tile: int, **constants: Any) -> list[Kernel]:
    return [_kernel(name, label, tile, **constants) for name in ("errors_kernel", "update_kernel")]


def _single() -> list[Kernel]:
    """One family at a time, in its own tile width."""
    kernels = [
        _kernel("errors_kernel", name, NARROW, FORMS=present([Form.ENTRIES]), FREE=1 << code, WIDTHS=1 << 9)
        for name, code in ENTRIES.items()
    ]
    kernels += [
        _kernel("errors_kernel", "targets", NARROW, FORMS=present([Form.OWN_TARGET]), TARGETS=TARGETS, WIDTHS=1 << 9),
        _kernel("errors_kernel", "pairs", NARROW, FORMS=present([Form.PAIR, Form.PAIR_TARGET]), WIDTHS=1 << 9),
        _kernel("errors_kernel", "bfloat16", NARROW, FORMS=1, FREE=1, WIDTHS=1 << 9, BFLOAT16=True),
    ]
    kernels += _both("rows", NARROW, FORMS=present([Form.ROW]), WIDTHS=1 << 10)
    return [*kernels, *_both("wide rows", WIDE, FORMS=ROWS & present([Form.ROW]), WIDTHS=1 << WIDE_ROWS)]


def _all() -> list[Kernel]:
    """Every family in one launch; the launch table's other entry is there for long rows."""
    narrow = _both("all families", NARROW, FORMS=FORMS, FREE=FREE, WIDTHS=1 << 9, ALIGNED=False)
    return [*map(_with_targets, narrow), *_both("rows of 2048", WIDE, FORMS=present([Form.ROW]), WIDTHS=1 << 11)]


def _with_targets(kernel: Kernel) -> Kernel:
    if "TARGETS" in kernel.constexprs:
        kernel.constexprs["TARGETS"] = TARGETS
    return kernel


def test_one_family_at_a_time() -> None:
    """On one chip: together they are compiled for all."""
    reports = triton_compile.compiled(_single(), ["sm_90"])
    assert not triton_compile.problems(reports), "\n" + triton_compile.table(reports)


def test_all_families_together() -> None:
    reports = triton_compile.compiled(_all())
    assert not triton_compile.problems(reports), "\n" + triton_compile.table(reports)
