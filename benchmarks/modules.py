# SPDX-License-Identifier: MIT
"""`python -m benchmarks.modules`: inference of modules with nodes against the loop that a user would write; JSON and a
table.

In one process, in turns: `PCNetwork.infer`, then the same moves by autograd with the weights frozen, then by autograd
with the weights' gradients computed at every step, as most libraries do. States are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pc_runner import PCNetwork, PCNode
from torch import Tensor, nn

from benchmarks.run import RESULTS, machine, repeat

Node = Callable[[str, Tensor], Tensor]
T, LR = 32, 0.1


class Bench(nn.Module):
    """A computation with nodes in `pc`; `body(x, node)` is what both sides run."""

    shape: tuple[int, ...] = ()
    batch = 64
    categorical: tuple[str, ...] = ()

    def __init__(self, names: str):
        super().__init__()
        kinds = {name: "categorical" if name in self.categorical else "gaussian" for name in names.split()}
        self.pc = nn.ModuleDict({name: PCNode(kind) for name, kind in kinds.items()})

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, lambda name, mu: self.pc[name](mu))

    def body(self, x: Tensor, node: Node) -> Tensor:
        raise NotImplementedError


class Mlp(Bench):
    """64-128-128-10, tanh: a chain, which goes to `pck.infer`."""

    shape = (64,)
    widths = (128, 128)

    def __init__(self):
        super().__init__(" ".join("abc"[: len(self.widths)]))
        sizes = [*self.shape, *self.widths, 10]
        self.fc = nn.ModuleList([nn.Linear(i, o) for i, o in pairwise(sizes)])

    def body(self, x: Tensor, node: Node) -> Tensor:
        for name, fc in zip("abc", self.fc[:-1], strict=False):
            x = node(name, torch.tanh(fc(x)))
        return self.fc[-1](x)


class WideInput(Mlp):
    """784-128-128-128-10, tanh."""

    shape = (784,)
    widths = (128, 128, 128)


class LeNet(Bench):
    """LeNet-5 on 28 x 28 images: a node behind each pooled convolution and each hidden linear layer."""

    shape = (1, 28, 28)

    def __init__(self):
        super().__init__("c1 c2 f1 f2")
        self.c1, self.c2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.f1, self.f2, self.out = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def body(self, x: Tensor, node: Node) -> Tensor:
        h = node("c1", F.max_pool2d(torch.relu(self.c1(x)), 2))
        h = node("c2", F.max_pool2d(torch.relu(self.c2(h)), 2))
        h = node("f1", torch.tanh(self.f1(h.flatten(1))))
        return self.out(node("f2", torch.tanh(self.f2(h))))


class Residual(Bench):
    """Two pre-norm residual blocks of width 256."""

    shape = (256,)

    def __init__(self):
        super().__init__("b0 s0 b1 s1")
        self.norm = nn.ModuleList([nn.LayerNorm(256) for _ in range(2)])
        self.up = nn.ModuleList([nn.Linear(256, 256) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(256, 256) for _ in range(2)])
        self.out = nn.Linear(256, 10)

    def body(self, x: Tensor, node: Node) -> Tensor:
        for l in range(2):
            x = node(f"s{l}", x + self.down[l](node(f"b{l}", F.gelu(self.up[l](self.norm[l](x))))))
        return self.out(x)


class Dag(Bench):
    """One node feeds two branches, which join; one branch skips to the output."""

    shape = (256,)

    def __init__(self):
        super().__init__("root left right join")
        self.root, self.left, self.right = nn.Linear(256, 256), nn.Linear(256, 128), nn.Linear(256, 128)
        self.join, self.out = nn.Linear(256, 128), nn.Linear(256, 10)

    def body(self, x: Tensor, node: Node) -> Tensor:
        root = node("root", torch.tanh(self.root(x)))
        left, right = node("left", torch.tanh(self.left(root))), node("right", torch.tanh(self.right(root)))
        join = node("join", torch.tanh(self.join(torch.cat([left, right], 1))))
        return self.out(torch.cat([join, left], 1))


class Attention(Bench):
    """A pre-norm block, width 128, 32 tokens: categorical scores (Euclidean step here), Gaussian elsewhere."""

    shape = (32, 128)
    batch = 16
    categorical = ("scores",)

    def __init__(self):
        super().__init__("scores mid ffn")
        self.pc["scores"] = PCNode("categorical", step="euclidean")
        self.q, self.k, self.v, self.o = (nn.Linear(128, 128) for _ in range(4))
        self.n1, self.n2 = nn.LayerNorm(128), nn.LayerNorm(128)
        self.up, self.down, self.head = nn.Linear(128, 256), nn.Linear(256, 128), nn.Linear(128, 64)

    def body(self, x: Tensor, node: Node) -> Tensor:
        h = self.n1(x)
        scores = self.q(h) @ self.k(h).transpose(1, 2) / 128**0.5
        mid = node("mid", x + self.o(node("scores", scores) @ self.v(h)))
        return self.head(mid + self.down(node("ffn", F.gelu(self.up(self.n2(mid))))))


class AttentionFew(Attention):
    """The same block on a quarter of the batch."""

    batch = 4


BENCHES = (Mlp, WideInput, LeNet, Residual, Dag, Attention, AttentionFew)


def users_loop(module: Bench, x: Tensor, y: Tensor, weight_gradients: bool) -> dict[str, Tensor]:
    """What one writes with autograd and torch.optim.SGD on the states."""
    module.requires_grad_(weight_gradients)
    phis: dict[str, Tensor] = {}

    def start(name: str, mu: Tensor) -> Tensor:
        phis[name] = mu.clone().requires_grad_()
        return phis[name].softmax(-1) if name in module.categorical else phis[name]

    with torch.no_grad():
        module.body(x, start)
    optimizer = torch.optim.SGD(phis.values(), lr=LR)
    for _ in range(T):
        energies: list[Tensor] = []

        def meet(name: str, mu: Tensor) -> Tensor:
            if name not in module.categorical:
                energies.append(0.5 * (phis[name] - mu).square().sum())  # noqa: B023 - called within the step
                return phis[name]
            p, log_p = phis[name].softmax(-1), phis[name].log_softmax(-1)
            energies.append((p * (log_p - mu.log_softmax(-1))).sum())  # noqa: B023
            return p

        optimizer.zero_grad()
        out = module.body(x, meet)
        energies.append(F.cross_entropy(out.flatten(0, -2), y.flatten(), reduction="sum"))
        torch.stack(energies).sum().backward()
        optimizer.step()
    return {name: phi.detach() for name, phi in phis.items()}


def measure(kind: type[Bench], rounds: int, repeats: int) -> dict[str, Any]:
    """One module's row: seconds of every method, taken in turns, after the states have been found alike."""
    torch.manual_seed(0)
    module = kind()  # type: ignore[call-arg]
    net = PCNetwork(module, output="categorical")
    x = torch.randn(module.batch, *module.shape)
    y = torch.randint(0, 10, net(x).shape[:-1])

    def ours() -> Any:
        return net.infer(x, y, steps=T, lr=LR, trace=False)

    result, wanted = ours(), users_loop(module, x, y, False)
    worst = 0.0
    for name, phi in zip(result.names, result.phis, strict=True):
        if name != "output":
            other = wanted[name.removeprefix("pc.")]
            worst = max(worst, float((phi - other).norm() / other.norm()))
    if worst > 1e-4:
        raise SystemExit(f"{kind.__name__}: states differ by {worst:.1e}; not timed")
    methods = {
        "infer": repeat(ours),
        "autograd, weights frozen": repeat(lambda: users_loop(module, x, y, False)),
        "autograd with weight gradients": repeat(lambda: users_loop(module, x, y, True)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, timer in methods.items():
            seconds[name] += timer(repeats)
    work = result.work
    return {
        "case": kind.__name__, "about": kind.__doc__, "batch": module.batch, "steps": T, "path": result.backend,
        "products": None if work is None else list(work), "state_difference": worst, "explain": net.explain(x, y),
        "seconds": seconds,
    }  # fmt: skip


def table(row: dict[str, Any]) -> str:
    """A case as text."""
    ours = statistics.median(row["seconds"]["infer"])
    lines = [f"{row['case']} (batch {row['batch']}, {row['path']}): {row['about']}"]
    for name, seconds in row["seconds"].items():
        median = statistics.median(seconds)
        spread = f"min {min(seconds) * 1e3:8.2f}  median {median * 1e3:8.2f}  max {max(seconds) * 1e3:8.2f} ms"
        lines.append(f"  {name:32s} {spread}  infer is {median / ours:5.2f}x")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modules", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_modules.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for kind in BENCHES:
        if args.only in kind.__name__:
            rows.append(measure(kind, args.rounds, args.repeats))
            print(table(rows[-1]), flush=True)
            command = " ".join(["python -m benchmarks.modules", *sys.argv[1:]])
            args.out.write_text(json.dumps({"command": command, "machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
