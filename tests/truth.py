# SPDX-License-Identifier: MIT
"""The README's mathematics in float64, brute force: no code of pc_kernels, no closed-form gradient, no light cone.

Energies are written from torch.distributions or plain logarithms; F is a plain sum of them; every gradient
(phi, delta, dW, db, dlog_var) comes from autograd. Only the natural step, which is not a gradient, is explicit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Laplace, Normal, Poisson, kl_divergence

WORK = torch.float64  # what everything is computed in; `working_in` turns this file into "plain torch" of another dtype
FLOOR = 1e-6  # of a free categorical_probs state
FEEDS = {"categorical": "softmax", "bernoulli": "sigmoid", "gaussian_full": "sample"}
NATURAL = {("categorical", "softmax"), ("bernoulli", "sigmoid")}
ACTIVATIONS = {
    "identity": lambda a: a,
    "tanh": torch.tanh,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardtanh": F.hardtanh,
    "softplus": F.softplus,
    "softmax": lambda a: F.softmax(a, dim=-1),
}
ENERGIES = (
    "gaussian",
    "gaussian_diag",
    "gaussian_full",
    "categorical",
    "categorical_probs",
    "bernoulli",
    "laplace",
    "poisson",
)


@contextmanager
def working_in(dtype: torch.dtype) -> Iterator[None]:
    """Inside, the truth is plain torch in `dtype`: the yardstick for rounding errors."""
    global WORK
    before, WORK = WORK, dtype
    try:
        yield
    finally:
        WORK = before


# ---------------------------------------------------------------- energies, per sample


def _visible(mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.expand_as(like)


def _safe(value: Tensor, mask: Tensor, stand_in: float = 0.0) -> Tensor:
    return torch.where(mask, value, torch.full_like(value, stand_in))


def _log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    total = torch.where(mask, logits, torch.full_like(logits, -math.inf)).logsumexp(-1, keepdim=True)
    return _safe(logits, mask) - total


def softmax(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the visible classes; a masked class gets 0."""
    visible = _visible(mask, logits)
    return _safe(_log_softmax(logits, visible).exp(), visible)


def _gaussian_full(phi: Tensor, mu: Tensor, mask: Tensor, clamped: bool) -> Tensor:
    uh, sh = mu.chunk(2, -1)
    if clamped:
        return _safe(0.5 * (sh + (phi - uh) ** 2 / sh.exp()), mask)
    (u, s), (mean, variance) = phi.chunk(2, -1), mask.chunk(2, -1)
    means = 0.5 * (u - uh) ** 2 / sh.exp()
    return _safe(means, mean) + _safe(kl_divergence(_normal(uh, s), _normal(uh, sh)), variance)


def _normal(mean: Tensor, log_var: Tensor) -> Normal:
    return Normal(mean, (0.5 * log_var).exp(), validate_args=False)


def _categorical(phi: Tensor, mu: Tensor, mask: Tensor, clamped: bool) -> Tensor:
    lq = _log_softmax(mu, mask)
    if clamped:
        return _safe(torch.xlogy(phi, phi) - phi * lq, mask)
    lp = _log_softmax(phi, mask)
    return _safe(lp.exp() * (lp - lq), mask)


def _bernoulli(phi: Tensor, mu: Tensor, clamped: bool) -> Tensor:
    if not clamped:  # torch's own KL is infinite beyond logit 37
        zero = torch.zeros_like(phi)
        return torch.sigmoid(phi) * (phi - mu) + torch.logaddexp(zero, mu) - torch.logaddexp(zero, phi)
    cross = F.binary_cross_entropy_with_logits(mu, phi.expand_as(mu), reduction="none")
    return cross + torch.xlogy(phi, phi) + torch.xlogy(1 - phi, 1 - phi)


def _poisson(phi: Tensor, mu: Tensor, clamped: bool) -> Tensor:
    if clamped:
        return torch.xlogy(phi, phi) - phi * mu - phi + mu.exp()
    return kl_divergence(Poisson(phi.exp(), validate_args=False), Poisson(mu.exp(), validate_args=False))


def _terms(name: str, phi: Tensor, mu: Tensor, log_var: Tensor | None, mask: Tensor, clamped: bool) -> Tensor:
    if name == "gaussian":
        return kl_divergence(Normal(phi, 1.0, validate_args=False), Normal(mu, 1.0, validate_args=False))
    if name == "gaussian_diag":
        assert log_var is not None
        return -_normal(mu, log_var.expand_as(mu)).log_prob(phi) - 0.5 * math.log(2 * math.pi)
    if name == "categorical_probs":
        return torch.xlogy(phi, phi) - torch.xlogy(phi, mu) - phi + mu
    if name == "bernoulli":
        return _bernoulli(phi, mu, clamped)
    if name == "laplace":
        return kl_divergence(Laplace(phi, 1.0, validate_args=False), Laplace(mu, 1.0, validate_args=False))
    return _poisson(phi, mu, clamped)


def energy(
    name: str, phi: Tensor, mu: Tensor, log_var: Tensor | None = None, mask: Tensor | None = None, clamped: bool = False
) -> Tensor:
    """E_l of the README's section 2, one float64 number per sample."""
    if name == "categorical" and not phi.is_floating_point():
        phi = F.one_hot(phi, mu.shape[-1])
    phi, mu = phi.to(WORK), mu.to(WORK)
    visible = _visible(mask, phi)
    if name == "gaussian_full":
        terms = _gaussian_full(phi, mu, visible, clamped)
    elif name == "categorical":
        terms = _categorical(phi, mu, visible, clamped)
    else:
        stand_in = 1.0 if name == "categorical_probs" else 0.0
        lv = None if log_var is None else log_var.to(WORK)
        terms = _terms(name, _safe(phi, visible, stand_in), _safe(mu, visible, stand_in), lv, visible, clamped)
        terms = _safe(terms, visible)
    return terms.flatten(1).sum(1)


@dataclass
class Errors:
    """Energy per sample and its gradients; a held or masked entry has grad_phi 0."""

    energy: Tensor
    grad_phi: Tensor
    grad_mu: Tensor
    grad_log_var: Tensor | None


def errors(
    name: str,
    phi: Tensor,
    mu: Tensor,
    log_var: Tensor | None = None,
    mask: Tensor | None = None,
    hold: Tensor | None = None,
    clamped: bool = False,
) -> Errors:
    """layer_errors of one node, by autograd in float64."""
    free = phi.is_floating_point() and not clamped
    phi = phi.detach().to(WORK).requires_grad_() if free else phi.detach()
    mu = mu.detach().to(WORK).requires_grad_()
    lv = None if log_var is None else log_var.detach().to(WORK).requires_grad_()
    value = energy(name, phi, mu, lv, mask, clamped)
    leaves = [mu] + ([phi] if free else []) + ([lv] if lv is not None else [])
    found = iter(torch.autograd.grad(value.sum(), leaves))
    grad_mu = next(found)
    grad_phi = next(found) if free else torch.zeros(phi.shape, dtype=WORK)
    if hold is not None:
        grad_phi = grad_phi.masked_fill(hold.expand_as(grad_phi), 0.0)
    return Errors(value.detach(), grad_phi, grad_mu, next(found, None))


# ---------------------------------------------------------------- a chain of nodes


@dataclass
class Node:
    """One layer and the value node behind it, in the words of the README's section 1."""

    weight: Tensor
    bias: Tensor | None = None
    activation: str = "identity"
    energy: str = "gaussian"
    feed: str | None = None
    log_var: Tensor | None = None
    step: str | None = None
    lr_scale: float = 1.0
    prior: float = 0.0  # of KL(phi || N(0, 1)) of a free gaussian_full node

    @property
    def fed(self) -> str:
        return self.feed or FEEDS.get(self.energy, "identity")

    @property
    def natural(self) -> bool:
        return (self.step or ("natural" if (self.energy, self.fed) in NATURAL else "euclidean")) == "natural"

    def passes(self, phi: Tensor, mask: Tensor | None, noise: Tensor | None, clamped: bool) -> Tensor:
        """v_l = feed_l(phi_l); a target is passed on as it is."""
        if clamped:
            return phi
        if self.fed == "sample":
            assert noise is not None
            u, s = phi.chunk(2, -1)
            return u + (0.5 * s).exp() * noise
        if self.fed == "softmax":
            return softmax(phi, mask)
        return ACTIVATIONS[self.fed](phi)


@dataclass
class Case:
    """What is fixed during inference."""

    nodes: list[Node]
    x: Tensor
    clamped: list[bool]
    holds: list[Tensor | None]
    masks: list[Tensor | None]
    noise: list[Tensor | None]


@dataclass
class Result:
    phis: list[Tensor]
    deltas: list[Tensor]
    energy: Tensor  # (T+1, L), batch mean
    steps: int
    grads: list[dict[str, Tensor | None]] = field(default_factory=list)  # summed over the batch


@dataclass
class Pass:
    """One evaluation of F, with everything that autograd needs."""

    phis: list[Tensor]
    pre: list[Tensor]
    mus: list[Tensor]
    values: list[Tensor]
    energy: Tensor  # (B, L)


def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(WORK)


def _evaluate(case: Case, phis: list[Tensor | None]) -> Pass:
    v = case.x
    out: dict[str, list[Tensor]] = {"phis": [], "pre": [], "mus": [], "values": [], "energy": []}
    for node, given, clamped, mask, noise in zip(case.nodes, phis, case.clamped, case.masks, case.noise, strict=True):
        a = v @ node.weight.T + (0.0 if node.bias is None else node.bias)
        mu = ACTIVATIONS[node.activation](a)
        phi = mu.detach().requires_grad_(not clamped) if given is None else given
        v = node.passes(phi, mask, noise, clamped)
        local = energy(node.energy, phi, mu, node.log_var, mask, clamped)
        if node.prior and not clamped:
            local = local + node.prior * _prior(phi, mask)
        found = (phi, a, mu, v, local)
        for key, value in zip(out, found, strict=True):
            out[key].append(value)
    return Pass(out["phis"], out["pre"], out["mus"], out["values"], torch.stack(out["energy"], 1))


def _prior(phi: Tensor, mask: Tensor | None) -> Tensor:
    """KL(N(u, e^s) || N(0, 1)) per sample; a hidden entry stands at 0."""
    u, s = _safe(phi, _visible(mask, phi)).chunk(2, -1)
    return kl_divergence(_normal(u, s), Normal(torch.zeros_like(u), 1.0)).sum(1)


def _grad(total: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def _still(case: Case, layer: int, like: Tensor) -> Tensor:
    """True where the entry must not move."""
    mask, hold = case.masks[layer], case.holds[layer]
    fixed = ~_visible(mask, like)
    return fixed if hold is None else fixed | hold.expand_as(like)


def _directions(case: Case, now: Pass) -> tuple[dict[int, Tensor], Tensor]:
    """The direction of each free node's move, and per sample the norm of the Euclidean gradient."""
    free = [i for i, clamped in enumerate(case.clamped) if not clamped]
    total = now.energy.sum()
    plain = dict(zip(free, _grad(total, [now.phis[i] for i in free]), strict=True))
    pushed = dict(zip(free, _grad(total, [now.values[i] for i in free]), strict=True))
    plain = {i: g.masked_fill(_still(case, i, g), 0.0) for i, g in plain.items()}
    norm = torch.cat([torch.zeros(len(case.x), 1, dtype=WORK)] + [g.flatten(1) for g in plain.values()], 1).norm(dim=1)
    moves = dict(plain)
    for i in free:
        if case.nodes[i].natural:
            feedback = pushed[i] if i + 1 < len(case.nodes) else torch.zeros_like(pushed[i])
            step = (now.phis[i] - now.mus[i] + feedback).detach()
            moves[i] = step.masked_fill(_still(case, i, step), 0.0)
    return moves, norm


def _floored(case: Case, phis: list[Tensor]) -> list[Tensor]:
    kept = []
    for node, phi, clamped in zip(case.nodes, phis, case.clamped, strict=True):
        low = node.energy == "categorical_probs" and not clamped
        kept.append((phi.detach().clamp_min(FLOOR) if low else phi.detach()).requires_grad_(not clamped))
    return kept


def _prepare(nodes, x, target, phis, clamp, masks, noise) -> tuple[Case, list[Tensor | None]]:
    count = len(nodes)
    states = [_wide(phi) if phi is None or phi.is_floating_point() else phi for phi in (phis or [None] * count)]
    clamps = list(clamp or [None] * count)
    if target is not None:
        states[-1], clamps[-1] = target, True
    for i, (node, state) in enumerate(zip(nodes, states, strict=True)):
        if state is not None:
            index = not state.is_floating_point() and node.energy == "categorical"
            states[i] = F.one_hot(state, len(node.weight)).to(WORK) if index else state.to(WORK)
    if noise is None or isinstance(noise, Tensor):
        noise = [noise if node.fed == "sample" else None for node in nodes]
    holds = [entry if isinstance(entry, Tensor) else None for entry in clamps]
    clamped, hidden = [entry is True for entry in clamps], list(masks or [None] * count)
    noises = [_wide(n) for n in noise]
    return Case([_trainable(n) for n in nodes], x.detach().to(WORK), clamped, holds, hidden, noises), states


def _trainable(node: Node) -> Node:
    """The node with float64 leaves for parameters."""
    wide = {key: _wide(getattr(node, key)) for key in ("weight", "bias", "log_var")}
    leaves = {key: None if value is None else value.requires_grad_() for key, value in wide.items()}
    return replace(node, **leaves)


def infer(
    nodes: list[Node],
    x: Tensor,
    *,
    target: Tensor | None = None,
    phis: list[Tensor | None] | None = None,
    steps: int = 32,
    lr: float = 0.1,
    momentum: float = 0.0,
    tol: float | None = None,
    clamp: list | None = None,
    masks: list | None = None,
    noise: Tensor | list | None = None,
) -> Result:
    """T Jacobi moves of the README's section 1 on every free node, then delta, dW, db and dlog_var at the final
    states."""
    case, given = _prepare(nodes, x, target, phis, clamp, masks, noise)
    states = _start(case, given)
    velocity = [torch.zeros_like(phi) for phi in states]
    active = torch.ones(len(x), dtype=torch.bool)
    now = _evaluate(case, list(states))
    trace, done = [now.energy.detach().mean(0)], 0
    for _ in range(steps):
        moves, norm = _directions(case, now)
        if tol is not None:
            active &= norm >= tol
        done += int(bool(active.any()) or tol is None)
        for i, g in moves.items():
            velocity[i] = momentum * velocity[i] + g
            change = lr * case.nodes[i].lr_scale * velocity[i]
            states[i] = states[i].detach() - change * active.view(-1, *[1] * (g.dim() - 1))
        states = _floored(case, states)
        now = _evaluate(case, list(states))
        trace.append(now.energy.detach().mean(0))
    return _finish(case, now, torch.stack(trace), done)


def _start(case: Case, given: list[Tensor | None]) -> list[Tensor]:
    """Forward initialisation of the entries that are not given; each passes its floored state on."""
    states = list(given)
    for i in range(len(states)):
        now = _evaluate(case, states)
        states = [_floored(case, now.phis)[j] if j <= i else states[j] for j in range(len(states))]
    return [state for state in states if state is not None]


def _finish(case: Case, now: Pass, trace: Tensor, done: int) -> Result:
    total = now.energy.sum()
    grads = []
    for node in case.nodes:
        names = [key for key in ("weight", "bias", "log_var") if getattr(node, key) is not None]
        found = dict(zip(names, _grad(total, [getattr(node, key) for key in names]), strict=True))
        grads.append({key: found.get(key) for key in ("weight", "bias", "log_var")})
    deltas = [d.detach() for d in _grad(total, now.pre)]
    return Result([phi.detach() for phi in now.phis], deltas, trace, done, grads)
