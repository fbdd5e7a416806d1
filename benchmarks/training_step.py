# SPDX-License-Identifier: MIT
"""`python -m benchmarks.training_step`: one whole training step, PC as pc_runner does it beside backpropagation and PC
by autograd; a table, and JSON under benchmarks/results.

A step is everything from a batch to new weights. Checked first: the PC step's and the BP step's gradients. Then rounds:
each method a few times in turn, on the same batch, each with weights of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pc_runner import PCNetwork
from torch import Tensor, nn

from benchmarks.accuracy import errors, relative, truth_of, within_rule
from benchmarks.baselines import eager_autograd, energy
from benchmarks.cases import M1, Case, Inputs, make
from benchmarks.run import RESULTS, machine

NETWORKS = (
    *(Case(f"M1 784-512x3-10 B={batch}", M1, batch) for batch in (64, 128, 256)),
    *(Case(f"M2 784-512x3-10 B={batch}", M1, batch, "categorical") for batch in (64, 128, 256)),
    Case("small 64-128-128-10 B=64", (64, 128, 128, 10), 64, "categorical"),
    Case("small 784-128x3-10 B=128", (784, 128, 128, 128, 10), 128, "categorical"),
)
CASES = tuple(replace(case, steps=steps) for case in NETWORKS for steps in (8, 32))
THETA_LR = 1e-4  # the paper's
PARTS = ("infer", "weight_grads", "Adam")


def adam(parameters: Any) -> torch.optim.Optimizer:
    """As pc_runner makes it."""
    return torch.optim.Adam(parameters, lr=THETA_LR, fused=True)


def with_own_weights(inputs: Inputs) -> Inputs:
    """The same numbers in other memory."""
    return replace(inputs, modules=[copy.deepcopy(module) for module in inputs.modules])


def sequential(case: Case, modules: list[nn.Linear]) -> nn.Sequential:
    """The modules with their activations."""
    last = nn.Softmax(dim=-1) if case.output == "categorical" else nn.Tanh()
    flat = [part for module in modules[:-1] for part in (module, nn.Tanh())]
    return nn.Sequential(*flat, modules[-1], last)


class PC:
    """infer, weight gradients, Adam; `parts` keeps the seconds of each."""

    def __init__(self, case: Case, inputs: Inputs):
        self.case, self.inputs = case, with_own_weights(inputs)
        self.net = PCNetwork.from_sequential(sequential(case, self.inputs.modules))
        self.optimizer = adam(self.net.parameters())
        self.parts: dict[str, list[float]] = {name: [] for name in PARTS}

    def gradients(self, algorithm: str = "pc") -> list[Tensor]:
        """dF/dW of the batch mean."""
        self.optimizer.zero_grad()
        self.net.backward(self._infer(algorithm))
        return [module.weight.grad for module in self.inputs.modules]  # type: ignore[misc]

    def _infer(self, algorithm: str = "pc") -> Any:
        case, inputs = self.case, self.inputs
        return self.net.infer(inputs.x, inputs.target, case.steps, case.lr, algorithm=algorithm, trace=False)

    def __call__(self) -> None:
        times = [time.perf_counter()]
        result = self._infer()
        times.append(time.perf_counter())
        self.optimizer.zero_grad()
        self.net.backward(result)
        times.append(time.perf_counter())
        self.optimizer.step()
        times.append(time.perf_counter())
        for name, start, end in zip(PARTS, times, times[1:], strict=False):
            self.parts[name].append(end - start)


class BP:
    """Forward, loss, backward, Adam, as torch users write it."""

    def __init__(self, case: Case, inputs: Inputs):
        self.categorical, self.inputs = case.output == "categorical", with_own_weights(inputs)
        whole = sequential(case, self.inputs.modules)
        self.net = whole[:-1] if self.categorical else whole  # cross_entropy takes logits
        self.optimizer = adam(self.net.parameters())

    def gradients(self) -> list[Tensor]:
        """dloss/dW."""
        self.optimizer.zero_grad()
        self._loss().backward()
        return [module.weight.grad for module in self.inputs.modules]  # type: ignore[misc]

    def _loss(self) -> Tensor:
        out, target = self.net(self.inputs.x), self.inputs.target
        if self.categorical:
            return nn.functional.cross_entropy(out, target)
        return 0.5 * (out - target).square().sum() / len(out)

    def __call__(self) -> None:
        self.gradients()
        self.optimizer.step()


class AutogradPC:
    """The states by autograd and SGD, then F's gradient in the weights, Adam."""

    def __init__(self, case: Case, inputs: Inputs, weight_gradients: bool):
        self.case, self.inputs, self.weight_gradients = case, with_own_weights(inputs), weight_gradients
        self.optimizer = adam([p for module in self.inputs.modules for p in module.parameters()])

    def gradients(self) -> list[Tensor]:
        """dF/dW of the batch mean."""
        phis = eager_autograd(self.case, self.inputs, self.weight_gradients)
        for module in self.inputs.modules:
            module.requires_grad_(True)
        self.optimizer.zero_grad()
        (energy(self.case, self.inputs, [phi.detach() for phi in phis]) / len(self.inputs.x)).backward()
        return [module.weight.grad for module in self.inputs.modules]  # type: ignore[misc]

    def __call__(self) -> None:
        self.gradients()
        self.optimizer.step()


def check(case: Case, inputs: Inputs) -> dict[str, list[float]]:
    """Raises RuntimeError unless the gradients are what they should be; returns their relative errors per layer.

    PC: by the rule of `accuracy` against float64. BP: what the network's own "bp" gives, to 1e-4.
    """
    truth, network = truth_of(case), PC(case, inputs)
    wanted = [grad / case.batch for grad in truth.grads]
    found = {
        "PC": [relative(a, b) for a, b in zip(network.gradients(), wanted, strict=True)],
        "autograd PC": [
            relative(a, b) for a, b in zip(AutogradPC(case, inputs, False).gradients(), wanted, strict=True)
        ],
    }
    bp = [grad.double() for grad in network.gradients("bp")]
    found["BP beside algorithm='bp'"] = [relative(a, b) for a, b in zip(BP(case, inputs).gradients(), bp, strict=True)]
    kernels = errors(case, inputs, "fp32", truth)
    plain = {"delta": truth.torch_deltas, "dW": truth.torch_grads}
    good = within_rule(kernels, plain, truth) and within_rule({**kernels, "dW": found["PC"]}, plain, truth)
    if not good or max(found["BP beside algorithm='bp'"]) > 1e-4:
        raise RuntimeError(f"{case.name}: wrong gradients, nothing is timed: {found}")
    return found


def seconds_of(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call."""
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        out.append(time.perf_counter() - start)
    return out


def measure(case: Case, rounds: int, repeats: int) -> dict[str, Any]:
    """One case's row: seconds of every method, interleaved."""
    inputs = make(case)
    accuracy = check(case, inputs)
    ours = PC(case, inputs)
    methods: dict[str, Callable[[], None]] = {
        "PC": ours,
        "BP": BP(case, inputs),
        "autograd PC, weights frozen": AutogradPC(case, inputs, False),
        "autograd PC with weight gradients": AutogradPC(case, inputs, True),
    }
    for method in methods.values():
        method()
    ours.parts = {name: [] for name in PARTS}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            seconds[name] += seconds_of(method, repeats)
    backend = ours._infer().backend
    return {"case": asdict(case), "backend": backend, "accuracy": accuracy, "seconds": seconds, "parts": ours.parts}


def table(row: dict[str, Any]) -> str:
    """A case as text."""
    medians = {name: statistics.median(seconds) for name, seconds in row["seconds"].items()}
    lines = [f"{row['case']['name']} T={row['case']['steps']} ({row['backend']})"]
    for name, median in medians.items():
        lines.append(
            f"  {name:34s} min {min(row['seconds'][name]) * 1e3:8.2f}  median {median * 1e3:8.2f} ms"
            f"  {median / medians['BP']:6.2f} x BP  {median / medians['PC']:6.2f} x PC"
        )
    shares = {name: statistics.median(seconds) for name, seconds in row["parts"].items()}
    total = sum(shares.values())
    lines.append("  of PC: " + ", ".join(f"{name} {share / total:.0%}" for name, share in shares.items()))
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="of each method in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_training_step.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if args.only in case.name:
            rows.append(measure(case, args.rounds, args.repeats))
            print(table(rows[-1]), flush=True)
            command = " ".join(["python -m benchmarks.training_step", *sys.argv[1:]])
            document = {"command": command, "machine": machine(), "rows": rows}
            args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
