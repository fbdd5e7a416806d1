# SPDX-License-Identifier: MIT
"""`python -m benchmarks.transformer`: a training step of the language model, PC (T = 5) beside backpropagation and
beside PC as one writes it with autograd; a table, and JSON under benchmarks/results.

A step is everything from a batch to new weights (AdamW). Every method has weights of its own; the PC methods' gradients
are compared before anything is timed. Rounds: each method in turn, on the same batch.
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
import torch.nn.functional as F
from pc_runner import PCNode
from pc_runner.models.transformer import Transformer, build
from torch import Tensor, nn

from benchmarks.run import RESULTS, machine, repeat

VOCABULARY, TOKENS, T, LR = 8001, 32, 5, 0.1
BATCHES = (16, 64)


class State(nn.Module):
    """The marker module of an autograd loop: holds phi, notes its energy, passes on its value."""

    def __init__(self, node: PCNode):
        super().__init__()
        self.categorical, self.mask = node.energy == "categorical", node.mask
        self.phi: Tensor | None = None
        self.energy: Tensor | None = None

    def _hide(self, logits: Tensor) -> Tensor:
        return logits if self.mask is None else logits.masked_fill(~self.mask, -1e9)

    def forward(self, mu: Tensor) -> Tensor:
        if self.phi is None:
            self.phi = mu.detach().clone().requires_grad_()
        if not self.categorical:
            self.energy = 0.5 * (self.phi - mu).square().sum()
            return self.phi
        log_p, log_q = self._hide(self.phi).log_softmax(-1), self._hide(mu).log_softmax(-1)
        p = log_p.exp()
        self.energy = (p * (log_p - log_q)).sum()
        return p


class Autograd:
    """PC training as one writes it: F by autograd, torch.optim.SGD on the states.

    weight_gradients: leave the weights' requires_grad on in the loop, as most libraries do.
    """

    def __init__(self, batch: tuple[Tensor, ...], weight_gradients: bool):
        self.module, self.batch, self.weight_gradients = _module(), batch, weight_gradients
        self.states = [_replace(self.module, name, State(node)) for name, node in _nodes(self.module)]
        self.optimizer = _adamw(self.module)

    def _energy(self) -> Tensor:
        x, y, rows = self.batch
        loss = F.cross_entropy(self.module(x)[rows], y[rows], reduction="sum")
        return loss + sum(state.energy for state in self.states if state.energy is not None)

    def gradients(self) -> list[Tensor]:
        for state in self.states:
            state.phi = None
        with torch.no_grad():
            self.module(self.batch[0])
        self.module.requires_grad_(self.weight_gradients)
        phis = [state.phi for state in self.states if state.phi is not None]
        moves = torch.optim.SGD(phis, lr=LR)
        for _ in range(T):
            moves.zero_grad()
            self._energy().backward()
            moves.step()
        self.module.requires_grad_(True)
        self.optimizer.zero_grad()
        (self._energy() / len(self.batch[0])).backward()
        return _gradients(self.module)

    def __call__(self) -> None:
        self.gradients()
        self.optimizer.step()


class Ours:
    """`PCNetwork`: infer, backward, AdamW."""

    def __init__(self, batch: tuple[Tensor, ...], method: str, algorithm: str):
        self.net, self.algorithm = build(method, VOCABULARY, tokens=TOKENS), algorithm
        self.x, self.y, rows = batch
        self.masks = {"output": rows.unsqueeze(-1)}
        self.optimizer = _adamw(self.net)

    def gradients(self) -> list[Tensor]:
        self.optimizer.zero_grad()
        how: dict[str, Any] = {"algorithm": self.algorithm, "masks": self.masks, "trace": False}
        self.net.backward(self.net.infer(self.x, self.y, steps=T, lr=LR, **how))
        return _gradients(self.net.module)

    def __call__(self) -> None:
        self.gradients()
        self.optimizer.step()


class Backprop:
    """The plain module, F.cross_entropy, loss.backward()."""

    def __init__(self, batch: tuple[Tensor, ...]):
        self.module, self.batch = _module(), batch
        self.optimizer = _adamw(self.module)

    def gradients(self) -> list[Tensor]:
        x, y, rows = self.batch
        self.optimizer.zero_grad()
        (F.cross_entropy(self.module(x)[rows], y[rows], reduction="sum") / len(x)).backward()
        return _gradients(self.module)

    def __call__(self) -> None:
        self.gradients()
        self.optimizer.step()


def _module() -> Transformer:
    module = build("pc_fkl_euclidean", VOCABULARY, tokens=TOKENS).module
    assert isinstance(module, Transformer)  # what `build` makes
    return module


def _nodes(module: nn.Module) -> list[tuple[str, PCNode]]:
    return [(name, node) for name, node in module.named_modules() if isinstance(node, PCNode)]


def _replace(module: nn.Module, name: str, state: State) -> State:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, state)
    return state


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)


def _gradients(module: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def batch_of(size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Tokens, targets, rows that count: sentences of 8 to 32 tokens, most of them cut at 32."""
    x, y = (torch.randint(VOCABULARY, (size, TOKENS), generator=generator) for _ in range(2))
    lengths = torch.randint(8, 3 * TOKENS, (size, 1), generator=generator)
    return x, y, torch.arange(TOKENS) < lengths


def difference(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative error of a parameter's gradient; one that vanishes (the keys' bias) against all."""
    least = 1e-4 * torch.stack([b.norm() for b in wanted]).norm()
    return max(float((a - b).norm() / torch.maximum(b.norm(), least)) for a, b in zip(got, wanted, strict=True))


def measure(size: int, rounds: int, repeats: int) -> dict[str, Any]:
    """Seconds of every method at one batch size."""
    batch = batch_of(size, torch.Generator().manual_seed(size))
    euclidean, autograd, bp, plain = (
        Ours(batch, "pc_fkl_euclidean", "pc"), Autograd(batch, False), Ours(batch, "bp", "bp"), Backprop(batch),
    )  # fmt: skip
    errors = {
        "PC and autograd": difference(euclidean.gradients(), autograd.gradients()),
        "BP and autograd": difference(bp.gradients(), plain.gradients()),
    }
    if max(errors.values()) > 1e-3:
        raise SystemExit(f"gradients differ: {errors}; not timed")
    steps: dict[str, Callable[[], None]] = {
        "PC_FKL": Ours(batch, "pc_fkl", "pc"),
        "PC_F": Ours(batch, "pc_f", "pc"),
        "BP by PCNetwork": bp,
        "BP, plain module": plain,
        "PC by autograd, weights frozen": autograd,
        "PC by autograd with weight gradients": Autograd(batch, True),
    }
    timers = {name: repeat(step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name] += timer(repeats)
    return {"batch": size, "rows": int(batch[2].sum()), "steps": T, "errors": errors, "seconds": seconds}


def table(row: dict[str, Any]) -> str:
    """A case as text."""
    ours = statistics.median(row["seconds"]["PC_FKL"])
    lines = [f"batch {row['batch']} ({row['rows']} targets), T = {row['steps']}, one training step"]
    for name, seconds in row["seconds"].items():
        median = statistics.median(seconds)
        spread = f"min {min(seconds) * 1e3:8.1f}  median {median * 1e3:8.1f}  max {max(seconds) * 1e3:8.1f} ms"
        lines.append(f"  {name:38s} {spread}  PC_FKL is {median / ours:5.2f}x as fast")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transformer", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_transformer.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for size in BATCHES:
        rows.append(measure(size, args.rounds, args.repeats))
        print(table(rows[-1]), flush=True)
        command = " ".join(["python -m benchmarks.transformer", *sys.argv[1:]])
        args.out.write_text(json.dumps({"command": command, "machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
