# SPDX-License-Identifier: MIT
"""Launch constants and the choice of the schedule, as data: measured on an H200 (benchmarks/results/gpu_h200.json),
but for tf32 and for phases of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

from pc_kernels import checks

TWO_LAUNCHES = "two launches a step"
PERSISTENT = "persistent"
MEASURED = "measured on an H200 with the paper's M1"


class Launch(NamedTuple):
    """Tiles of block_m samples x block_n entries, products advancing by block_k; programs of `warps` warps, `stages`
    tiles in flight."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# precision -> (largest batch, constants), the first that fits. Small tiles for small batches: at B = 64 a network of
# 512-wide layers has only 16 tiles of 32 x 64 a layer, for 132 processors. `ieee` products spill with longer tiles.
_HALVES = (
    (128, Launch(16, 32, 128, 4, 4)),
    (512, Launch(32, 32, 128, 4, 4)),
    (float("inf"), Launch(32, 64, 64, 4, 4)),  # 64 x 64 x 64 is 5 to 20 % faster there, but spills in Triton 3.9
)
LAUNCHES: dict[str, tuple[tuple[float, Launch], ...]] = {
    "fp32": ((512, Launch(32, 32, 32, 4, 3)), (float("inf"), Launch(64, 32, 32, 4, 3))),
    "tf32": ((1024, Launch(32, 64, 32, 4, 4)), (float("inf"), Launch(64, 64, 32, 8, 4))),
    "bf16": _HALVES,
    "bf16_delta": _HALVES,
}
HIP_STAGES = 2  # 64 KiB of shared memory
INTERPRETED = Launch(32, 32, 32, 4, 1)

# widest row of a phase of rows -> (rows a program, warps)
ROW_LAUNCHES: tuple[tuple[int, int, int], ...] = (
    (64, 16, 4),
    (256, 4, 4),
    (1024, 2, 8),
    (4096, 1, 8),
)  # twice as long spills on sm_100
WIDEST_ROW = ROW_LAUNCHES[-1][0]
PERSISTENT_ROW = 1024  # the persistent kernel has the products' few warps, which hold no longer row in registers


def registers(warps: int) -> int:
    """What a thread may take: all that there are. Left alone, the assembler stops a few short of what a kernel needs
    and spills."""
    return min(255, 65536 // (32 * warps))


class Rule(NamedTuple):
    """Up to this batch and widest layer: the schedule, and where the choice comes from."""

    batch: float
    width: float
    schedule: str
    source: str


SCHEDULES: tuple[Rule, ...] = (Rule(float("inf"), float("inf"), TWO_LAUNCHES, MEASURED),)


class Choice(NamedTuple):
    """How a call runs: schedule, why, launch constants."""

    schedule: str
    source: str
    launch: Launch
    reverse: bool


class _Override(NamedTuple):
    schedule: str | None
    launch: Launch | None
    reverse: bool


_override: ContextVar[_Override | None] = ContextVar("pc_kernels_triton_schedule", default=None)


@contextmanager
def use_schedule(schedule: str | None = None, launch: Launch | None = None, reverse: bool = False) -> Iterator[None]:
    """Run the Triton inferences inside by this schedule ("two launches a step" or "persistent") and launch constants.

    None leaves the choice to the tables. reverse: take a phase's tiles in reverse order, which must change nothing.
    Holds for this thread; nests.
    """
    if schedule is not None:
        checks.choice("schedule", schedule, (TWO_LAUNCHES, PERSISTENT))
    token = _override.set(_Override(schedule, launch, reverse))
    try:
        yield
    finally:
        _override.reset(token)


def choose(batch: int, widest: int, precision: str, interpreted: bool, hip: bool) -> Choice:
    """The schedule and constants for a call: the override, else the tables."""
    return _choose(_override.get() or _Override(None, None, False), batch, widest, precision, interpreted, hip)


@lru_cache(maxsize=256)
def _choose(wish: _Override, batch: int, widest: int, precision: str, interpreted: bool, hip: bool) -> Choice:
    launch = next(constants for limit, constants in LAUNCHES[precision] if batch <= limit)
    if interpreted:
        launch = INTERPRETED
    elif hip:
        launch = launch._replace(stages=HIP_STAGES)
    rule = next(rule for rule in SCHEDULES if batch <= rule.batch and widest <= rule.width)
    schedule, source = rule.schedule, rule.source
    if wish.schedule is not None:
        schedule, source = wish.schedule, "asked for by use_schedule"
    return Choice(schedule, source, wish.launch or launch, wish.reverse)


def row_launch(widest: int) -> tuple[int, int, int]:
    """(longest row, rows a program, warps) of the phases of rows."""
    return next(entry for entry in ROW_LAUNCHES if widest <= entry[0])
