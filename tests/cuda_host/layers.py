# SPDX-License-Identifier: MIT
"""Schedule (a) of the backend `cuda` on the CPU: its own plan and body, the launches' blocks one after the other."""

from __future__ import annotations

import ctypes
from contextvars import ContextVar

import torch
from torch import Tensor

from cuda_host import library, pointer
from cuda_host.clusters import ChainNode, Emulated
from pc_kernels import pc_math
from pc_kernels.backends.cuda_infer import NEVER

PRECISIONS = ("fp32", "tf32", "bf16", "bf16_delta")
MAX_LAYERS = 16
REVERSE: ContextVar[bool] = ContextVar("reverse", default=False)  # a launch's blocks in reverse order


class LayersNode(ChainNode):
    """csrc/cuda/layers_plan.h's."""

    _fields_ = (("noise", ctypes.c_void_p),)


class NodePlan(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("width", "passes", "ld", "passes_ld")),
        ("rows_predict", ctypes.c_bool),
        ("rows_update", ctypes.c_bool),
        *(
            (name, ctypes.c_int64)
            for name in [
                "phi",
                "a",
                "mu",
                "back",
                "velocity",
                "fed",
                "grad",
                "v",
                "delta",
                "weight",
                "inputs",
                "inputs_ld",
                "exact",
            ]
        ),
    )


class LayersRun(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "batch", "steps", "bytes")),
        ("x", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("products", ctypes.c_int),
        ("momentum_on", ctypes.c_bool),
        ("momentum", ctypes.c_float),
        ("plan", NodePlan * MAX_LAYERS),
        ("nodes", LayersNode * MAX_LAYERS),
        *((name, ctypes.c_void_p) for name in ("work", "energy", "diverged")),
    )


def node(**given: object) -> LayersNode:
    """A node by the names of its activation, energy and feed."""
    feed = given.pop("feed")
    return LayersNode(
        activation=pc_math.ACTIVATIONS.index(given.pop("activation")),
        energy=pc_math.ENERGIES.index(given.pop("energy")),
        feed=-1 if feed == "sample" else pc_math.ACTIVATIONS.index(feed),
        **given,
    )


def _array(values: list[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def plan(nodes: list[LayersNode], inputs: int, widths: list[int], batch: int, momentum: float, precision: str):
    """(the plan, why there is none)."""
    host, run, why = library("layers"), LayersRun(), ctypes.create_string_buffer(400)
    assert host.size_of_layers_run() == ctypes.sizeof(LayersRun)
    assert host.size_of_layers_node() == ctypes.sizeof(LayersNode)
    described = (LayersNode * len(nodes))(*nodes)
    sizes = (ctypes.c_int64(len(nodes)), ctypes.c_int64(batch), ctypes.c_double(momentum))
    products = ctypes.c_int(PRECISIONS.index(precision))
    room = ctypes.c_int64(400)
    host.plan_layers(described, ctypes.c_int64(inputs), _array(widths), *sizes, products, ctypes.byref(run), why, room)
    return run, why.value.decode()


class EmulatedLayers(Emulated):
    """The native ops of a CUDA build, on CPU tensors."""

    @staticmethod
    def infer_layers(
        weights, biases, activations, energies, feeds, rules, lrs, log_vars, x, starts, masks, holds, noise, clamped,
        moves_from, steps, momentum, precision, trace,
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:  # fmt: skip
        count, batch, kept = len(weights), len(x), list[Tensor]()

        def keep(tensor: Tensor | None, *shape: int) -> int | None:
            if tensor is None:
                return None
            kept.append(tensor.detach().expand(*shape).contiguous() if shape else tensor.detach().contiguous())
            return pointer(kept[-1])

        widths = [weight.shape[0] for weight in weights]
        deltas = [torch.full((batch, width), float("nan")) for width in widths]
        phis = [
            torch.full((0,) if c else (batch, width), float("nan")) for c, width in zip(clamped, widths, strict=True)
        ]
        nodes = []
        for l, width in enumerate(widths):
            by_class = starts[l] is not None and not starts[l].is_floating_point()
            states = width // 2 if clamped[l] and energies[l] == "gaussian_full" else width
            nodes.append(
                node(
                    activation=activations[l], energy=energies[l], feed=feeds[l], natural=rules[l] == "natural",
                    clamped=clamped[l], lr=lrs[l], moves_from=min(moves_from[l], NEVER), weight=keep(weights[l]),
                    bias=keep(biases[l]), start=None if by_class else keep(starts[l]),
                    index=keep(starts[l]) if by_class else None, log_var=keep(log_vars[l]),
                    mask=keep(masks[l], batch, states), hold=keep(holds[l], batch, states), mask_sample=states,
                    hold_sample=states, phi=pointer(phis[l]), delta=pointer(deltas[l]), noise=keep(noise[l]),
                )
            )  # fmt: skip
        energy = torch.full((steps + 1 if trace else 0, count, batch), float("nan"))
        diverged, why = ctypes.c_int64(0), ctypes.create_string_buffer(400)
        pixels = x.detach().contiguous()
        failed = library("layers").run_layers(
            (LayersNode * count)(*nodes), ctypes.c_void_p(pointer(pixels)), ctypes.c_int64(x.shape[1]),
            _array(widths), ctypes.c_int64(count), ctypes.c_int64(batch), ctypes.c_int64(steps),
            ctypes.c_double(momentum), ctypes.c_int(PRECISIONS.index(precision)), ctypes.c_bool(REVERSE.get()),
            ctypes.c_void_p(pointer(energy) if trace else None), ctypes.byref(diverged),
            why, ctypes.c_int64(400),
        )  # fmt: skip
        assert not failed, why.value
        return phis, deltas, energy, torch.tensor(diverged.value)
