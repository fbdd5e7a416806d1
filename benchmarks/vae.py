# SPDX-License-Identifier: MIT
"""`python -m benchmarks.vae`: T = 32 inference of the autoencoders, the engine's one call beside the loop that one
writes with autograd; a table, and JSON under benchmarks/results.

The states that both reach are compared before anything is timed. Rounds: each method in turn, on the same batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pc_runner import PCNetwork
from pc_runner.config import VAES
from pc_runner.models.vae import build
from torch import Tensor, nn

from benchmarks.run import RESULTS, machine, repeat

T, LR, BATCH, PIXELS, LATENT, PRIOR = 32, 0.01, 128, 784, 16, 0.01


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


def measure(model: str, rounds: int, repeats: int) -> dict[str, Any]:
    """Seconds of every method for one autoencoder."""
    generator = torch.Generator().manual_seed(0)
    net = build(PIXELS, VAES[model].hidden, LATENT, PRIOR)
    x = torch.rand(BATCH, PIXELS, generator=generator)
    noise = torch.randn(BATCH, LATENT, generator=generator)
    frozen = Autograd(net, x, noise, False)

    def engine() -> list[Tensor]:
        return net.infer(x, x, steps=T, lr=LR, noise=noise, trace=False).phis[:-1]

    moved = [phi - start for phi, start in zip(engine(), net.infer(x, x, steps=0, noise=noise).phis, strict=False)]
    away = [a - b for a, b in zip(engine(), frozen(), strict=True)]
    errors = [(a.norm() / m.norm()).item() for a, m in zip(away, moved, strict=True)]
    if max(errors) > 1e-3:
        raise SystemExit(f"states differ, relative to how far they moved: {errors}; not timed")
    methods: dict[str, Callable[[], Any]] = {
        "engine, one call": engine,
        "autograd, weights frozen": frozen,
        "autograd with weight gradients": Autograd(net, x, noise, True),
    }
    timers = {name: repeat(run) for name, run in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name] += timer(repeats)
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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_vae.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for model in VAES:
        rows.append(measure(model, args.rounds, args.repeats))
        print(table(rows[-1]), flush=True)
        command = " ".join(["python -m benchmarks.vae", *sys.argv[1:]])
        args.out.write_text(json.dumps({"command": command, "machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
