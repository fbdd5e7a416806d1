# SPDX-License-Identifier: MIT
"""A PC training step on a GPU beside an eager backpropagation step: inference, weight gradients, fused Adam."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pc_kernels as pck
from benchmarks.accuracy import relative, truth_of
from benchmarks.cases import M1, Case, Inputs, make
from benchmarks.gpu_infer import Variant, infer, timer_of, variants
from benchmarks.training_step import BP, adam, with_own_weights

TOLERANCE = {"bf16_delta": 0.1, "fp32": 1e-3}  # of dW, against float64: the rule per layer is the inference gate's


class PCStep:
    """infer, weight gradients, Adam by the public functions; the layers see the parameters that Adam moves."""

    def __init__(self, case: Case, inputs: Inputs, variant: Variant):
        own = with_own_weights(inputs)
        modules = own.modules
        pairs = zip(own.layers, modules, strict=True)
        layers = [replace(layer, weight=module.weight, bias=module.bias) for layer, module in pairs]
        self.case, self.inputs, self.variant = case, replace(own, layers=layers), variant
        self.optimizer = adam([p for module in modules for p in module.parameters()])

    def gradients(self) -> None:
        """Fill .grad with the batch mean's."""
        with self.variant.chosen():
            result = infer(self.case, self.inputs, self.variant.precision)
            grads = pck.weight_grads(self.inputs.x, self.inputs.layers, result)
        for module, grad in zip(self.inputs.modules, grads, strict=True):
            module.weight.grad, module.bias.grad = grad.weight, grad.bias

    def __call__(self) -> None:
        self.gradients()
        self.optimizer.step()


def training_cases(dry: bool) -> list[Case]:
    """M1 at T = 8."""
    if dry:
        return [Case("dry M1 B=5 T=2", (12, 20, 9, 5), 5, steps=2)]
    return [Case(f"M1 B={batch} T=8", M1, batch, steps=8) for batch in (64, 128, 256, 1024)]


def training_row(case: Case, dry: bool, rounds: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step, by each method."""
    device = "cpu" if dry else "cuda"
    inputs = make(case, device=device)
    wanted = [grad / case.batch for grad in truth_of(case, device).grads]
    timers = {"BP": timer_of(BP(case, inputs), device)}
    accuracy = {}
    for variant in variants(device):
        step = PCStep(case, make(case, device=device), variant)
        step.gradients()
        accuracy[variant.name] = [
            relative(module.weight.grad, truth)  # type: ignore[arg-type]
            for module, truth in zip(step.inputs.modules, wanted, strict=True)
        ]
        if max(accuracy[variant.name]) <= TOLERANCE[variant.precision]:
            timers[f"PC {variant.name}"] = timer_of(step, device)
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name] += timer(repeats)
    return {"case": asdict(case), "accuracy": accuracy, "seconds": seconds}
