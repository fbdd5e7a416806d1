# SPDX-License-Identifier: MIT
"""csrc/cuda/cluster_plan.h for Python."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from cuda_host import library

CLUSTER, TILE, UNIT, MAX_LAYERS, NARROW = 8, 8, 16, 16, 32
_FIELDS = (
    "slice", "weight", "pitch", "phi", "velocity", "a", "mu", "fed", "delta", "moved", "stats", "round", "gather",
    "receive", "part", "shares",
)  # fmt: skip


class LayerPlan(ctypes.Structure):
    _fields_ = (
        ("width", ctypes.c_int),
        ("padded", ctypes.c_int),
        ("narrow", ctypes.c_bool),
        ("first", ctypes.c_int * (CLUSTER + 1)),
        *((name, ctypes.c_int) for name in _FIELDS),
    )


class ClusterPlan(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("count", "rounds", "parts", "bytes", "lists", "forward")),
        ("momentum", ctypes.c_bool),
        ("layers", LayerPlan * MAX_LAYERS),
    )


@dataclass(frozen=True)
class Shape:
    width: int
    state: bool = True
    softmax: bool = False
    keeps_fed: bool = False


def plan_cluster(shapes: Sequence[Shape], momentum: bool = False) -> tuple[ClusterPlan, str]:
    """The plan, and why it cannot be had (empty: it can)."""
    host, count, plan, why = library("cluster_plan"), len(shapes), ClusterPlan(), ctypes.create_string_buffer(400)
    assert host.size_of_plan() == ctypes.sizeof(ClusterPlan)
    widths = (ctypes.c_int64 * count)(*[shape.width for shape in shapes])
    states = (ctypes.c_bool * count)(*[shape.state for shape in shapes])
    softmaxes = (ctypes.c_bool * count)(*[shape.softmax for shape in shapes])
    keeps = (ctypes.c_bool * count)(*[shape.keeps_fed for shape in shapes])
    asked = (widths, states, softmaxes, keeps, ctypes.c_int64(count), ctypes.c_bool(momentum))
    failed = host.plan_cluster(*asked, ctypes.byref(plan), why, ctypes.c_int64(400))
    said = why.value.decode()
    assert bool(failed) == bool(said)
    return plan, said
