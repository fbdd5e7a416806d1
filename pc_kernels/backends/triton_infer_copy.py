# SPDX-License-Identifier: MIT
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# (Triton's compiler reads the kernels, not Python: constexprs have attributes, tensors are overloaded)
"""Into the workspace before the steps and out of it after them: one launch each (two from 64 tensors on).

Addresses travel as kernel arguments, not in a table: they change from call to call, and a table would have to be copied
to the device every time, from memory that a captured graph would go on reading.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pc_kernels.backends.triton_infer import locate
from pc_kernels.backends.triton_infer_nodes import round_to_tf32
from pc_kernels.backends.triton_infer_table import FIRST, NO_END
from pc_kernels.backends.triton_math import round_to_bfloat16

SLOTS = 64  # addresses a launch: they and the rest must fit into 4 KiB of kernel arguments

# what a job does
FLOAT = tl.constexpr(0)  # float32
TO_BF16 = tl.constexpr(1)  # float32, rounded
TO_TF32 = tl.constexpr(2)
BYTES = tl.constexpr(3)  # bool
INDICES = tl.constexpr(4)  # int64 to int32
ZERO = tl.constexpr(5)

# a job: slot of its address, kind, columns, entries, offset in the workspace, entries from row to row there
JOB = tl.constexpr(6)
_NONE = tl.constexpr(NO_END)


@triton.jit
def address_of(addresses, slot):
    """addresses[slot], slot known at run time only."""
    address = tl.full((), 0, tl.int64)
    for i in tl.static_range(len(addresses)):
        if i == slot:
            address = addresses[i].to(tl.int64)
    return address


@triton.jit
def chunk_of(jobs, ends, item, JOBS: tl.constexpr, BLOCK: tl.constexpr):
    """The job that program `item` works on, and which of its entries: place here, place in the workspace."""
    number, chunk = locate(ends, item, JOBS)
    job = jobs + number * JOB
    columns = tl.load(job + 2)
    entry = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = (entry // columns) * tl.load(job + 5) + entry % columns
    return job, entry, there, entry < tl.load(job + 3)


@triton.jit(do_not_specialize=["lr", "momentum", "layers"])
def pack_kernel(
    work, signals, jobs, ends, scales, rates, addresses, lr, momentum, layers,
    FIRST_LAUNCH: tl.constexpr, JOBS: tl.constexpr, NODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the call's tensors into the padded workspace, cast as the products want them; reset what a run leaves."""
    item = tl.program_id(0)
    if FIRST_LAUNCH and item == 0:
        tl.store(signals + tl.arange(0, 2), tl.where(tl.arange(0, 2) == FIRST, _NONE, 0))
        layer = tl.arange(0, NODES)
        tl.store(rates + 2 * layer, lr * tl.load(scales + layer), mask=layer < layers)
        tl.store(rates + 2 * layer + 1, momentum + 0.0 * tl.load(scales + layer), mask=layer < layers)
    job, entry, there, inside = chunk_of(jobs, ends, item, JOBS, BLOCK)
    kind = tl.load(job + 1)
    address = address_of(addresses, tl.load(job))
    to = work + tl.load(job + 4)
    if kind <= TO_TF32:
        x = tl.load(address.to(tl.pointer_type(tl.float32)) + entry, mask=inside, other=0.0)
        if kind == TO_BF16:
            low = round_to_bfloat16(x).to(tl.bfloat16)
            tl.store(to.to(tl.pointer_type(tl.bfloat16)) + there, low, mask=inside)
        elif kind == TO_TF32:
            tl.store(to + there, round_to_tf32(x), mask=inside)
        else:
            tl.store(to + there, x, mask=inside)
    elif kind == BYTES:
        flag = tl.load(address.to(tl.pointer_type(tl.int8)) + entry, mask=inside, other=0)
        tl.store(to.to(tl.pointer_type(tl.int8)) + there, flag, mask=inside)
    elif kind == INDICES:
        index = tl.load(address.to(tl.pointer_type(tl.int64)) + entry, mask=inside, other=0)
        tl.store(to.to(tl.pointer_type(tl.int32)) + there, index.to(tl.int32), mask=inside)
    else:
        tl.store(to + there, tl.zeros((BLOCK,), tl.float32), mask=inside)


@triton.jit(do_not_specialize=["layers", "steps", "products", "code", "parts", "copies"])
def collect_kernel(
    work, signals, jobs, ends, addresses, energies, recorded, trace, status,
    batch, layers, steps, products, code, parts, copies,
    FIRST_LAUNCH: tl.constexpr, TRACE: tl.constexpr, JOBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy states and deltas out, and write status and trace: program `copies + i` cell i of the trace.

    recorded: per cell of the trace (steps + 1, layers), the step that last changed
    this energy (a node that did not move keeps it).
    """
    item = tl.program_id(0)
    if FIRST_LAUNCH and item == 0:
        first = tl.load(signals + FIRST)
        found = first != _NONE
        tl.store(status, steps.to(tl.int64))
        tl.store(status + 1, products.to(tl.int64))
        tl.store(status + 2, code.to(tl.int64))
        tl.store(status + 3, tl.where(found, first % (layers + 1), 0).to(tl.int64))
        tl.store(status + 4, tl.where(found, first // (layers + 1) if TRACE else -1, -1).to(tl.int64))
    if item < copies:
        job, entry, there, inside = chunk_of(jobs, ends, item, JOBS, BLOCK)
        to = address_of(addresses, tl.load(job)).to(tl.pointer_type(tl.float32))
        tl.store(to + entry, tl.load(work + tl.load(job + 4) + there, mask=inside, other=0.0), mask=inside)
    elif TRACE:
        cell = item - copies
        row = tl.load(recorded + cell).to(tl.int64) * layers + cell % layers
        total = tl.zeros((BLOCK,), tl.float64)
        for part in range(0, parts, BLOCK):
            place = part + tl.arange(0, BLOCK)
            total += tl.load(energies + row * parts + place, mask=place < parts, other=0.0).to(tl.float64)
        tl.store(trace + cell, (tl.sum(total) / batch).to(tl.float32))


WORDS = 128  # int32 words an upload
_MARK = 1 << 40


def encoded(words: list[int]) -> tuple[int, ...]:
    """int32 words as int64 numbers that are neither 1 nor divisible by 16: Triton compiles anew for those."""
    return tuple(_MARK | (word & 0xFFFFFFFF) << 5 | 1 for word in words)


@triton.jit
def upload_kernel(to, words, SIZE: tl.constexpr):
    """Write `encoded` words that are kernel arguments: tables without a copy from the host, which a captured graph
    would repeat from memory that may be gone by then. to: int32."""
    for i in tl.static_range(SIZE):
        tl.store(to + i, ((words[i] >> 5) & 0xFFFFFFFF).to(tl.int32))
