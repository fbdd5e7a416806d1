# SPDX-License-Identifier: MIT
"""`python -m benchmarks.vae`: T = 32 inference of the autoencoders, the engine's one call beside the loop that one
writes with autograd; a table, and JSON under benchmarks/results.

The states that both reach are compared in float64 before anything is timed. Rounds: each method in turn, on the same
batch. On one thread; what is timed is the process's CPU time, in which other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pc_runner import PCNetwork
from pc_runner.config import VAES
from pc_runner.models.vae import build
from torch import Tensor, nn

import pc_kernels as pck
from benchmarks.run import RESULTS, machine

T, LR, BATCH, PIXELS, LATENT, PRIOR = 32, 0.01, 128, 784, 16, 0.001


class Autograd:
    """F by autograd, torch.optim.SGD on the states.

    weight_gradients: leave the weights' requires_grad on in the loop, as most libraries do.
    """

    def __init__(self, net: PCNetwork, x: Tensor, noise: Tensor, weight_gradients: bool):
        self.linears = [module for module in net.modules() if isinstance(module, nn.Linear)]
        self.bottleneck = next(l for l, linear in enumerate(self.linears) if linear.out_features == 2 * LATENT)
        self.x, self.noise, self.weight_gradients = x, noise, weight_gradients

    def _mu(self, l: int, v: Tensor) -> Tensor:
        a = self.linears[l](v)
        if l == self.bottleneck:
            return a
        return torch.sigmoid(a) if l + 1 == len(self.linears) else nn.functional.hardtanh(a)

    def _passes(self, l: int, phi: Tensor) -> Tensor:
        if l != self.bottleneck:
            return phi
        u, s = phi.chunk(2, -1)
        return u + (0.5 * s).exp() * self.noise

    def _energy(self, phis: list[Tensor]) -> Tensor:
        total, v = self.x.new_zeros(()), self.x
        for l in range(len(self.linears)):
            mu = self._mu(l, v)
            phi = phis[l] if l < len(phis) else self.x
            if l == self.bottleneck:
                (u, s), (uh, sh) = phi.chunk(2, -1), mu.chunk(2, -1)
                total = total + 0.5 * ((s - sh).exp() - 1 - (s - sh) + (u - uh).square() * (-sh).exp()).sum()
                total = total + PRIOR * 0.5 * (s.exp() - 1 - s + u.square()).sum()
            else:
                total = total + 0.5 * (phi - mu).square().sum()
            v = self._passes(l, phi)
        return total

    def __call__(self) -> list[Tensor]:
        """The states after T moves."""
        phis, v = [], self.x
        with torch.no_grad():
            for l in range(len(self.linears) - 1):
                phis.append(self._mu(l, v).clone().requires_grad_())
                v = self._passes(l, phis[-1])
        for linear in self.linears:
            linear.requires_grad_(self.weight_gradients)
        moves = torch.optim.SGD(phis, lr=LR)
        for _ in range(T):
            moves.zero_grad()
            self._energy(phis).backward()
            moves.step()
        for linear in self.linears:
            linear.requires_grad_(True)
            linear.zero_grad()
        return [phi.detach() for phi in phis]


def disagreement(net: PCNetwork, x: Tensor, noise: Tensor) -> list[float]:
    """How far the engine's states are from autograd's, by node, relative to how far they have moved."""
    ends, starts = (net.infer(x, x, steps=steps, lr=LR, noise=noise).phis[:-1] for steps in (T, 0))
    wanted = Autograd(net, x, noise, False)()
    nodes = zip(ends, starts, wanted, strict=True)
    return [((end - want).norm() / (end - start).norm()).item() for end, start, want in nodes]


def measure(model: str, rounds: int, repeats: int) -> dict[str, Any]:
    """Seconds of every method for one autoencoder."""
    generator = torch.Generator().manual_seed(0)
    net = build(PIXELS, VAES[model].hidden, LATENT, PRIOR)
    x = torch.rand(BATCH, PIXELS, generator=generator)
    noise = torch.randn(BATCH, LATENT, generator=generator)
    frozen = Autograd(net, x, noise, False)

    def engine(precision: str = "fp32") -> list[Tensor]:
        with pck.use_backend("cpp"):
            return net.infer(x, x, steps=T, lr=LR, noise=noise, trace=False, precision=precision).phis[:-1]

    errors = disagreement(copy.deepcopy(net).double(), x.double(), noise.double())
    if max(errors) > 1e-9:
        raise SystemExit(f"states differ, relative to how far they moved: {errors}; not timed")
    methods: dict[str, Callable[[], Any]] = {
        "engine, one call": engine,
        "autograd, weights frozen": frozen,
        "autograd with weight gradients": Autograd(net, x, noise, True),
    }
    with suppress(pck.BackendUnavailable):  # on a CPU without bfloat16 products
        engine("bf16_delta")
        methods["engine, bf16_delta"] = lambda: engine("bf16_delta")
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, run in methods.items():
            for _ in range(repeats):
                start = time.process_time()
                run()
                seconds[name].append(time.process_time() - start)
    case = {"model": model, "hidden": VAES[model].hidden, "batch": BATCH, "steps": T, "lr": LR, "prior": PRIOR}
    return {
        "case": case,
        "backend": net.infer(x, x, steps=1, noise=noise).backend,
        "errors": errors,
        "seconds": seconds,
    }


def table(row: dict[str, Any]) -> str:
    """A case as text."""
    ours = row["seconds"]["engine, one call"]
    lines = [f"{row['case']['model']}, batch {BATCH}, T = {T}, backend {row['backend']}"]
    for name, seconds in row["seconds"].items():
        median, least = statistics.median(seconds), min(seconds)
        ratio = f"{median / statistics.median(ours):.2f}x (least times: {least / min(ours):.2f}x)"
        lines.append(
            f"  {name:32s} min {least * 1e3:7.1f}  median {median * 1e3:7.1f} ms  the engine is {ratio} as fast"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vae", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_vae.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for model in VAES:
        rows.append(measure(model, args.rounds, args.repeats))
        print(table(rows[-1]), flush=True)
        command = " ".join(["python -m benchmarks.vae", *sys.argv[1:]])
        args.out.write_text(json.dumps({"command": command, "machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
