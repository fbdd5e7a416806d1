# SPDX-License-Identifier: MIT
"""Modules with nodes, and the truth about them: T moves by autograd of F, written without any code of pc_runner.

Each network's computation is one function `body(x, node)`; `node(name, mu)` gives what the node passes on. The package
sees it through PCNodes, the truth through a function of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from pc_runner import PCNetwork, PCNode
from torch import Tensor, nn

from tests import truth

Node = Callable[[str, Tensor], Tensor]


class Body(nn.Module):
    """A module whose nodes stand in `pc`; `families` are their energies."""

    families: dict[str, str] = {}  # noqa: RUF012 - overridden, never changed
    output = "gaussian"

    def finish(self) -> None:
        self.pc = nn.ModuleDict({name: PCNode(energy) for name, energy in self.families.items()})

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, lambda name, mu: self.pc[name](mu))

    def body(self, x: Tensor, node: Node) -> Tensor:
        raise NotImplementedError


class Mlp(Body):
    families = {"a": "gaussian", "b": "gaussian", "c": "gaussian"}  # noqa: RUF012
    output = "categorical"

    def __init__(self):
        super().__init__()
        self.fc = nn.ModuleList([nn.Linear(i, o) for i, o in [(7, 6), (6, 5), (5, 6), (6, 4)]])
        self.finish()

    def body(self, x, node):
        for name, fc in zip("abc", self.fc, strict=False):
            x = node(name, torch.tanh(fc(x)))
        return self.fc[3](x)


class LeNet(Body):
    """Convolutions, batch norm, pooling, in-place activations; Gaussian nodes of four dimensions."""

    families = {"c1": "gaussian", "c2": "gaussian", "f1": "gaussian"}  # noqa: RUF012
    output = "categorical"

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3)
        self.norm, self.relu = nn.BatchNorm2d(3), nn.LeakyReLU(0.3, inplace=True)
        self.f1, self.f2 = nn.Linear(16, 6), nn.Linear(6, 4)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)
        self.finish()

    def body(self, x, node):
        h = node("c1", F.max_pool2d(self.relu(self.norm(self.c1(x))), 2))
        h = node("c2", self.relu(self.c2(h)))
        h = node("f1", torch.tanh(self.f1(h.flatten(1))))
        return self.f2(h)


class Residual(Body):
    """Pre-norm residual stream: a node on every branch, one on the sum."""

    families = {"h": "gaussian", "branch": "gaussian", "sum": "gaussian"}  # noqa: RUF012
    output = "gaussian"

    def __init__(self):
        super().__init__()
        self.inp, self.up, self.down, self.out = nn.Linear(5, 6), nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 3)
        self.norm = nn.LayerNorm(6)
        self.finish()

    def body(self, x, node):
        h = node("h", self.inp(x))
        branch = node("branch", F.gelu(self.up(self.norm(h))))
        h = node("sum", h + self.down(branch))
        return self.out(h)


class Dag(Body):
    """One node feeds two others, which join; one skips to the output."""

    families = {"root": "gaussian", "left": "gaussian", "right": "gaussian", "join": "gaussian"}  # noqa: RUF012
    output = "categorical"

    def __init__(self):
        super().__init__()
        self.root, self.left, self.right = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 5)
        self.bil, self.out = nn.Bilinear(4, 5, 6), nn.Linear(10, 3)
        self.finish()

    def body(self, x, node):
        root = node("root", torch.tanh(self.root(x)))
        left, right = node("left", torch.sigmoid(self.left(root))), node("right", torch.tanh(self.right(root)))
        join = node("join", torch.tanh(self.bil(left, right)))
        return self.out(torch.cat([join, left], 1))


class Attention(Body):
    """A pre-norm block: attention scores are categorical nodes under a causal mask, as is the output."""

    families = {"scores": "categorical", "mid": "gaussian", "ffn": "gaussian"}  # noqa: RUF012
    output = "categorical"

    def __init__(self, width: int = 6, tokens: int = 4):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, 8), nn.Linear(8, width), nn.Linear(width, 5)
        self.finish()
        self.pc["scores"] = PCNode("categorical", mask=torch.ones(tokens, tokens, dtype=torch.bool).tril())

    def body(self, x, node):
        h = self.n1(x)
        scores = self.q(h) @ self.k(h).transpose(1, 2) / h.shape[-1] ** 0.5
        h = node("mid", x + self.o(node("scores", scores) @ self.v(h)))
        return self.head(h + self.down(node("ffn", F.gelu(self.up(self.n2(h))))))


INPUTS = {"Mlp": (5, 7), "LeNet": (5, 1, 8, 8), "Residual": (5, 5), "Dag": (11, 5), "Attention": (3, 4, 6)}
BODIES = {body.__name__: body for body in (Mlp, LeNet, Residual, Dag, Attention)}
EXACT = ("Mlp", "LeNet", "Residual", "Dag")  # Gaussian hidden nodes: zil and fixed prediction equal backpropagation


def make(name: str, step: str | None = None) -> tuple[PCNetwork, Tensor, Tensor]:
    """(network, x, y), float64, seeded."""
    torch.manual_seed(3)
    module = BODIES[name]().double().eval()
    for node in module.pc.values():
        if step is not None and node.energy == "categorical":
            node.step = step
    net = PCNetwork(module, output=PCNode(module.output))
    x = torch.randn(*INPUTS[name], dtype=torch.float64)
    out = net(x)
    y = torch.randn_like(out) if module.output == "gaussian" else torch.randint(0, out.shape[-1], out.shape[:-1])
    return net, x, y.detach()


WAYS = ("dag", "chain", "sequential")  # through `infer`: a module's step, a module that is a chain, a Sequential


def make_way(kind: str, dtype: torch.dtype = torch.float64) -> tuple[PCNetwork, Tensor, Tensor]:
    """(network, x, y) with a categorical output, seeded."""
    net, x, y = make("Dag" if kind == "dag" else "Mlp")
    if kind == "sequential":
        layers = [layer for fc in net.module.fc for layer in (fc, nn.Tanh())][:-1]
        net = PCNetwork.from_sequential(nn.Sequential(*layers), output="categorical")
    return net.to(dtype), x.to(dtype), y


# ------------------------------------------------------------------------------------------------------- the truth


@dataclass
class Look:
    """One evaluation of F: what each node is, and what it was predicted to be."""

    phis: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    mus: dict[str, Tensor] = field(default_factory=dict)
    energy: dict[str, Tensor] = field(default_factory=dict)  # per sample

    @property
    def total(self) -> Tensor:
        return torch.stack([e.sum() for e in self.energy.values()]).sum()


def mask_of(module: Body, name: str) -> Tensor | None:
    return None if name == "output" else module.pc[name].mask


def look(
    module: Body, x: Tensor, y: Tensor | None, phis: dict[str, Tensor], errors: dict[str, Tensor] | None = None
) -> Look:
    """F at the given states; a state that is not given is its prediction, or, with errors e, mu + e (0 to begin)."""
    found = Look()

    def meet(name: str, mu: Tensor) -> Tensor:
        family = module.output if name == "output" else module.families[name]
        held = name == "output" and y is not None
        phi = y if held else phis.get(name, mu.detach().clone().requires_grad_())
        if errors is not None and not held:
            phi = mu + errors.setdefault(name, torch.zeros_like(mu).detach().requires_grad_())
        target = F.one_hot(phi, mu.shape[-1]).to(mu) if held and not phi.is_floating_point() else phi
        mask = mask_of(module, name)
        found.mus[name], found.phis[name] = mu, phi
        found.energy[name] = truth.energy(family, target, mu, None, mask, held)
        value = truth.softmax(phi, mask) if family == "categorical" and not held else phi
        found.values[name] = value
        return value

    meet("output", module.body(x, meet))
    return found


def moves(module: Body, now: Look, y: Tensor | None, natural: bool = True) -> dict[str, Tensor]:
    """The direction of every free node's move, by autograd of F."""
    found = {}
    for name, phi in now.phis.items():
        if name == "output" and y is not None:
            continue
        mask = mask_of(module, name)
        if natural and module.families.get(name) == "categorical":
            (back,) = torch.autograd.grad(now.total, now.values[name], retain_graph=True, allow_unused=True)
            step = (phi - now.mus[name] + back).detach()
            found[name] = step if mask is None else step.masked_fill(~mask, 0.0)
        else:
            found[name] = torch.autograd.grad(now.total, phi, retain_graph=True)[0]
    return found


def settle(
    module: Body, x: Tensor, y: Tensor | None, steps: int, lr: float, natural: bool = True, momentum: float = 0.0
) -> tuple[Look, Tensor]:
    """T moves from the forward pass: the last look, and the energies (T + 1, nodes), batch means."""
    phis: dict[str, Tensor] = {}
    speeds: dict[str, Tensor] = {}
    rows = []
    for _ in range(steps):
        now = look(module, x, y, phis)
        rows.append(torch.stack([e.mean() for e in now.energy.values()]).detach())
        for name, g in moves(module, now, y, natural).items():
            speeds[name] = momentum * speeds.get(name, 0.0) + g
            phis[name] = (now.phis[name] - lr * speeds[name]).detach().requires_grad_()
    now = look(module, x, y, phis)
    rows.append(torch.stack([e.mean() for e in now.energy.values()]).detach())
    return now, torch.stack(rows)


def gradients(module: Body, total: Tensor, batch: int) -> dict[str, Tensor]:
    """dF/dp / B of every parameter."""
    names, values = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(total / batch, values, allow_unused=True)
    return {n: torch.zeros_like(v) if g is None else g for n, v, g in zip(names, values, found, strict=True)}


def backprop(net: PCNetwork, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The loss's gradient, by autograd of the plain module."""
    module = net.module
    out = module.body(x, lambda name, mu: value_of(module, name, mu))
    loss = 0.5 * (out - y).square().sum() if module.output == "gaussian" else cross_entropy(out, y)
    return gradients(module, loss, len(x))


def value_of(module: Body, name: str, mu: Tensor) -> Tensor:
    return truth.softmax(mu, mask_of(module, name)) if module.families[name] == "categorical" else mu


def cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, -2), y.flatten(), reduction="sum")


def collected(net: PCNetwork) -> dict[str, Tensor]:
    """p.grad of the module's parameters, zero where there is none; and they are cleared."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.module.named_parameters()}
    net.zero_grad()
    return found


def furthest(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative error over the parameters; one whose gradient vanishes (a bias of keys) against all."""
    least = 1e-4 * torch.stack([g.norm() for g in wanted.values()]).norm()
    return max(float((got[n] - wanted[n]).norm() / torch.maximum(wanted[n].norm(), least)) for n in wanted)


def cosine(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    a, b = (torch.cat([g[n].flatten() for n in wanted]) for g in (got, wanted))
    return float(F.cosine_similarity(a, b, dim=0))
