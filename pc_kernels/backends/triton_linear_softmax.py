# SPDX-License-Identifier: MIT
# pyright: reportAttributeAccessIssue=false
"""linear_softmax_errors in Triton: the product, the softmax, the energy and both products with delta, and never a logit
in memory.

Each kernel computes the logits of its tiles anew, so that the whole is two products (three with weight gradients) more
than with stored logits, and no traffic of (rows, D):

1. `partition_kernel`: (row tile, part of the classes) -> the part's greatest logit and sum of exponentials;
   `whole_rows_kernel` combines the parts.
2. `delta_kernel`: the same programs; q, energy, delta, and delta W of the part.
3. `weight_kernel`: (tile of classes) -> delta^T v and the sum of delta, over all rows in order.

Parts exist to fill the device when there are few rows; torch adds them up. No atomics: two runs give the same bits.
Rows of v wider than WIDEST are cut: programs of 2 and 3 own a block of the columns of their result. Float32 or bfloat16
in memory, float32 arithmetic between the products. No GPU has measured the launch constants yet.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pc_kernels.backends.triton_numerics import exp, log, round_to_bfloat16

FP32 = tl.constexpr(0)
TF32 = tl.constexpr(1)
BF16 = tl.constexpr(2)
PRECISION_CODES = {"fp32": 0, "tf32": 1, "bf16": 2}


class Form(NamedTuple):
    """What the kernels are specialised on."""

    BIAS: bool
    MASK: bool
    SOFT: bool  # the target is probabilities, not indices
    PRECISION: int
    INTERPRETED: bool


class Launch(NamedTuple):
    """Tiles of block_m rows x block_n classes, logits advancing by block_k; programs of `warps` warps, `stages` tiles
    in flight."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# By precision. `ieee` products spill with longer tiles.
LAUNCHES: dict[str, Launch] = {
    "fp32": Launch(32, 32, 32, 8, 2),
    "tf32": Launch(64, 64, 32, 8, 2),
    "bf16": Launch(64, 64, 64, 8, 2),
}
HIP = Launch(16, 32, 32, 4, 1)  # AMD's, in every precision
WIDEST = 128
INTERPRETED = Launch(16, 256, 64, 4, 1)  # every operation there takes as long as a large tile's
PROGRAMS = 264  # wanted in flight: two for each of an H200's processors
MOST_PARTS = 64
ROWS = 128  # a program of `whole_rows_kernel`


# ---------------------------------------------------------------------------------------------------------------------
# tiles


@triton.jit
def wide(x):
    """x in 64 bits (the interpreter's loops count in Python's int, which has no `.to`)."""
    return tl.zeros((), dtype=tl.int64) + x


@triton.jit
def operand(x, FORM: tl.constexpr):
    """A factor of a product, rounded as the precision says (tensor cores round to tf32 themselves)."""
    if FORM.PRECISION == BF16:
        # the interpreter's bfloat16 product is wrong; of rounded operands the float32 product is the same
        x = round_to_bfloat16(x.to(tl.float32)) if FORM.INTERPRETED else x.to(tl.bfloat16)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def multiply(x, w, total, FORM: tl.constexpr):
    """total + x w, accumulated in float32."""
    if FORM.PRECISION == TF32 and not FORM.INTERPRETED:
        total = tl.dot(x, w, total, input_precision="tf32")
    else:
        total = tl.dot(x, w, total, input_precision="ieee")
    return total


@triton.jit
def taking_part(mask, first, lane, rows, FORM: tl.constexpr):
    """Which of the rows first + lane exist and are not masked."""
    takes = lane < rows - first
    if FORM.MASK:
        takes = takes & (tl.load(mask + first + lane, mask=takes, other=0) != 0)
    return takes


@triton.jit
def read(base, first, lane, column, width, valid, FORM: tl.constexpr):
    """Rows first + lane of a matrix of `width` columns as a product's factor; zeros where not valid.

    Only `first` is as long as memory: offsets of 64 bits for every entry take twice the registers.
    """
    inside = valid[:, None] & (column < width)[None, :]
    tile = base + wide(first) * width
    return operand(tl.load(tile + lane[:, None] * width + column[None, :], mask=inside, other=0.0), FORM)


@triton.jit
def tile_logits(
    v, weight, bias, row, takes, start, end, width,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """a = v W^T + b (BM, BN) of the rows from `row` and the classes from `start` on, -inf from class `end` on."""
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BN)
    inside = columns < end - start
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, width, BK):
        k = first + tl.arange(0, BK)
        x = read(v, row, rows, k, width, takes, FORM)
        w = read(weight, start, columns, k, width, inside, FORM)
        total = multiply(x, tl.trans(w), total, FORM)
    if FORM.BIAS:
        total += tl.load(bias + start + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.where(inside[None, :], total, float("-inf"))


@triton.jit
def tile_target(target, row, takes, start, end, classes, BM: tl.constexpr, BN: tl.constexpr, FORM: tl.constexpr):
    """o of the tile; zeros where not valid. target: probabilities, or the indices."""
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BN)
    if FORM.SOFT:
        valid = takes[:, None] & (columns < end - start)[None, :]
        tile = target + wide(row) * classes + start
        o = tl.load(tile + rows[:, None] * classes + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    else:
        index = tl.load(target + row + rows, mask=takes, other=-1).to(tl.int32) - start
        o = (columns[None, :] == index[:, None]).to(tl.float32)
    return o


@triton.jit
def tile_delta(a, o, most, log_total, mass, row, takes, BM: tl.constexpr, FORM: tl.constexpr):
    """delta = q sum(o) - o of the tile, and ln q. most, log_total, mass (rows,): of whole rows."""
    at = row + tl.arange(0, BM)
    log_q = (a - tl.load(most + at, mask=takes, other=0.0)[:, None]) - tl.load(log_total + at, mask=takes, other=0.0)[
        :, None
    ]
    q = exp(log_q)
    if FORM.SOFT:
        q = q * tl.load(mass + at, mask=takes, other=0.0)[:, None]
    return tl.where(takes[:, None], q - o, 0.0), log_q


# ---------------------------------------------------------------------------------------------------------------------
# kernels


@triton.jit
def partition_kernel(
    v, weight, bias, target, mask, most, total, mass, rows, classes, width, part_size,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """most, total, mass (parts, rows): of a part's classes the greatest logit, the sum of e^(a - most), sum(o)."""
    row = tl.program_id(0) * BM
    lane = tl.arange(0, BM)
    takes = taking_part(mask, row, lane, rows, FORM)
    first = tl.program_id(1) * part_size
    end = tl.minimum(first + part_size, classes)
    greatest = tl.full((BM,), float("-inf"), dtype=tl.float32)
    sums = tl.zeros((BM,), dtype=tl.float32)
    masses = tl.zeros((BM,), dtype=tl.float32)
    for start in range(first, end, BN):
        a = tile_logits(v, weight, bias, row, takes, start, end, width, BM, BN, BK, FORM)
        greater = tl.maximum(greatest, tl.max(a, axis=1))
        shift = tl.where(greater == float("-inf"), 0.0, greater)  # a bias of -inf may hide all classes so far
        sums = sums * exp(greatest - shift) + tl.sum(exp(a - shift[:, None]), axis=1)
        greatest = greater
        if FORM.SOFT:
            masses += tl.sum(tile_target(target, row, takes, start, end, classes, BM, BN, FORM), axis=1)
    at = tl.program_id(1).to(tl.int64) * rows + row + lane
    inside = lane < rows - row
    tl.store(most + at, greatest, mask=inside)
    tl.store(total + at, sums, mask=inside)
    if FORM.SOFT:
        tl.store(mass + at, masses, mask=inside)


@triton.jit
def whole_rows_kernel(most, total, mass, rows, parts, BLOCK: tl.constexpr, SOFT: tl.constexpr):
    """Adds the parts up, into the first one: the greatest logit, ln of the sum of exponentials, sum(o)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    greatest = tl.load(most + row, mask=inside, other=0.0)
    for part in range(1, parts):
        greatest = tl.maximum(greatest, tl.load(most + wide(part) * rows + row, mask=inside, other=0.0))
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    masses = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(parts):
        at = wide(part) * rows + row
        share = exp(tl.load(most + at, mask=inside, other=0.0) - greatest)
        sums += share * tl.load(total + at, mask=inside, other=1.0)
        if SOFT:
            masses += tl.load(mass + at, mask=inside, other=0.0)
    tl.store(most + row, greatest, mask=inside)
    tl.store(total + row, log(sums), mask=inside)
    if SOFT:
        tl.store(mass + row, masses, mask=inside)


@triton.jit
def delta_kernel(
    v, weight, bias, target, mask, most, log_total, mass, energy, grad_v, rows, classes, width, part_size,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """energy (parts, rows), grad_v (parts, rows, width): of a part's classes; of BV columns of grad_v."""
    row = tl.program_id(0) * BM
    lane = tl.arange(0, BM)
    takes = taking_part(mask, row, lane, rows, FORM)
    first = tl.program_id(1) * part_size
    end = tl.minimum(first + part_size, classes)
    entry = tl.program_id(2) * BV + tl.arange(0, BV)
    energies = tl.zeros((BM,), dtype=tl.float32)
    grad = tl.zeros((BM, BV), dtype=tl.float32)
    for start in range(first, end, BN):
        a = tile_logits(v, weight, bias, row, takes, start, end, width, BM, BN, BK, FORM)
        o = tile_target(target, row, takes, start, end, classes, BM, BN, FORM)
        delta, log_q = tile_delta(a, o, most, log_total, mass, row, takes, BM, FORM)
        log_o = 0.0
        if FORM.SOFT:
            log_o = log(o)
        energies += tl.sum(tl.where(o == 0.0, 0.0, o * (log_o - log_q)), axis=1)
        column = tl.arange(0, BN)
        w = read(weight, start, column, entry, width, column < end - start, FORM)
        grad = multiply(operand(delta, FORM), w, grad, FORM)
    at = tl.program_id(1).to(tl.int64) * rows + row
    inside = lane < rows - row
    if tl.program_id(2) == 0:
        tl.store(energy + at + lane, energies, mask=inside)
    valid = inside[:, None] & (entry < width)[None, :]
    tl.store(grad_v + at * width + lane[:, None] * width + entry[None, :], grad, mask=valid)


@triton.jit
def weight_kernel(
    v, weight, bias, target, mask, most, log_total, mass, grad_weight, grad_bias, rows, classes, width,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """grad_weight (classes, width), grad_bias (classes,): of BN classes, and BV columns."""
    start = tl.program_id(0) * BN
    column = tl.arange(0, BN)
    entry = tl.program_id(1) * BV + tl.arange(0, BV)
    grad = tl.zeros((BN, BV), dtype=tl.float32)
    sums = tl.zeros((BN,), dtype=tl.float32)
    lane = tl.arange(0, BM)
    for row in range(0, rows, BM):
        takes = taking_part(mask, row, lane, rows, FORM)
        a = tile_logits(v, weight, bias, row, takes, start, classes, width, BM, BN, BK, FORM)
        o = tile_target(target, row, takes, start, classes, classes, BM, BN, FORM)
        delta, _ = tile_delta(a, o, most, log_total, mass, row, takes, BM, FORM)
        sums += tl.sum(delta, axis=0)
        x = read(v, row, lane, entry, width, takes, FORM)
        grad = multiply(tl.trans(operand(delta, FORM)), x, grad, FORM)
    inside = column < classes - start
    tile = grad_weight + wide(start) * width
    valid = inside[:, None] & (entry < width)[None, :]
    tl.store(tile + column[:, None] * width + entry[None, :], grad, mask=valid)
    if FORM.BIAS and tl.program_id(1) == 0:
        tl.store(grad_bias + start + column, sums, mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# launches


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return not isinstance(partition_kernel, triton.JITFunction)


def block_of_columns(width: int) -> int:
    """How many columns of its result a program owns; a product wants 16 at least."""
    return min(WIDEST, max(16, triton.next_power_of_2(width)))


def launch_for(precision: str) -> Launch:
    """The launch constants."""
    if interpreted():
        return INTERPRETED
    return HIP if torch.version.hip else LAUNCHES[precision]


def split(rows: int, classes: int, width: int, launch: Launch) -> tuple[int, int]:
    """How many parts the classes are cut into, and the classes of a part, whole tiles.

    As many as fill the device, but what the parts write, (parts, rows, width), stays below a quarter of the logits.
    """
    tiles = triton.cdiv(classes, launch.block_n)
    wanted = triton.cdiv(PROGRAMS, triton.cdiv(rows, launch.block_m))
    parts = max(1, min(wanted, tiles, classes // (4 * width), MOST_PARTS))
    size = triton.cdiv(tiles, parts) * launch.block_n
    return triton.cdiv(classes, size), size


def linear_softmax_errors(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    weight_grads: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Energy (R,), grad_v (R, V), grad_weight (D, V), grad_bias (D,) of rows v (R, V); see the public function."""
    (rows, width), classes = v.shape, weight.shape[0]
    grads = [weight.shape if weight_grads else 0, classes if weight_grads and bias is not None else 0]
    if rows == 0:
        empty = v.new_empty(0, dtype=torch.float32)
        return empty, v.new_empty(v.shape), *(v.new_zeros(size) for size in grads)  # type: ignore[return-value]
    form = Form(
        bias is not None, mask is not None, target.is_floating_point(), PRECISION_CODES[precision], interpreted()
    )
    v, weight, target = v.contiguous(), weight.contiguous(), target.contiguous()
    given = (
        v, weight, v if bias is None else bias.contiguous(), target,
        v if mask is None else mask.contiguous().view(torch.uint8),
    )  # fmt: skip
    launch, block = launch_for(precision), block_of_columns(width)
    parts, size = split(rows, classes, width, launch)
    row_tiles, column_tiles = triton.cdiv(rows, launch.block_m), triton.cdiv(width, block)
    tile: dict[str, Any] = {"BM": launch.block_m, "BN": launch.block_n, "BK": launch.block_k, "FORM": form}
    tile_v: dict[str, Any] = tile | {"BV": block}
    options: dict[str, Any] = {"num_warps": launch.warps, "num_stages": launch.stages}
    most, total, mass = (v.new_empty(parts, rows, dtype=torch.float32) for _ in range(3))
    partition_kernel[(row_tiles, parts)](
        *given, most, total, mass, rows, classes, width, size, **tile, **options,
    )  # fmt: skip
    of_rows: dict[str, Any] = {"BLOCK": ROWS, "SOFT": form.SOFT}
    whole_rows_kernel[(triton.cdiv(rows, ROWS),)](most, total, mass, rows, parts, **of_rows)
    energy = v.new_empty(parts, rows, dtype=torch.float32)
    grad_v = v.new_empty(parts, rows, width, dtype=torch.float32)
    delta_kernel[(row_tiles, parts, column_tiles)](
        *given, most, total, mass, energy, grad_v, rows, classes, width, size, **tile_v, **options,
    )  # fmt: skip
    grad_w, grad_b = (v.new_empty(shape, dtype=torch.float32) for shape in grads)
    if weight_grads:
        weight_kernel[(triton.cdiv(classes, launch.block_n), column_tiles)](
            *given, most, total, mass, grad_w, grad_b, rows, classes, width, **tile_v, **options,
        )  # fmt: skip
    return energy.sum(0), grad_v.sum(0).to(v.dtype), grad_w.to(v.dtype), grad_b.to(v.dtype)
