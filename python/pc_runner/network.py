# SPDX-License-Identifier: MIT
"""`PCNetwork`: a torch module whose linear layers predict value nodes; `PCNode`: what is to be known about one node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import pc_kernels as pck
from pc_runner.algorithms import ALGORITHMS, Call, choose
from pc_runner.inference import Result, make_layer, read_chain

Masks = Sequence[Tensor | None] | None


class PCNode(nn.Module):
    """A value node: its energy family and how it moves.

    energy: one of `pck.ENERGIES`.
    feed: what the node passes on; None: softmax for "categorical", sigmoid for "bernoulli", otherwise its own value.
    step: "natural", "euclidean" or None for the family's default. lr_scale: multiplies `infer`'s lr.
    log_var: (D,), the learnable log variances of "gaussian_diag" (None: zeros).
    mask: bool, broadcast to (B, D), True takes part.

    Raises ValueError or TypeError that names the bad argument.
    """

    log_var: nn.Parameter | None
    mask: Tensor | None

    def __init__(
        self,
        energy: str,
        feed: str | None = None,
        step: str | None = None,
        lr_scale: float = 1.0,
        log_var: Tensor | None = None,
        mask: Tensor | None = None,
    ):
        super().__init__()
        self.energy, self.feed, self.step, self.lr_scale = energy, feed, step, lr_scale
        probe = torch.zeros(2) if log_var is None and energy == "gaussian_diag" else log_var
        weight = torch.zeros(2, 1)
        if isinstance(probe, Tensor) and probe.is_floating_point():
            weight = probe.new_zeros(probe.numel(), 1)
        activation = "softmax" if energy == "categorical_probs" else "identity"
        pck.Layer(weight, None, activation, energy, feed, probe, step, lr_scale)  # raises now what it would raise later
        self.log_var = log_var if log_var is None or isinstance(log_var, nn.Parameter) else nn.Parameter(log_var)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            got = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: wanted a bool tensor, got {got}; call .bool()")
        self.register_buffer("mask", mask, persistent=False)

    def extra_repr(self) -> str:
        shown = {"feed": self.feed, "step": self.step, "lr_scale": None if self.lr_scale == 1 else self.lr_scale}
        return ", ".join([repr(self.energy), *(f"{k}={v!r}" for k, v in shown.items() if v is not None)])


class PCNetwork(nn.Module):
    """A predictive-coding network around the user's module, made by `PCNetwork.from_sequential`.

    `net(x)` is `net.module(x)`, the plain feed-forward pass. Learning takes two calls, then any torch optimiser:

        result = net.infer(x, y)      # the E-step: states phi that lower F = sum_l E_l, weights fixed
        net.backward(result)          # the M-step: p.grad += dF/dp, averaged over the batch

    `net.module` is the module given; `net.nodes` the `PCNode`s, the output last. Parameters are read at every call.
    """

    module: nn.Sequential
    nodes: nn.ModuleList

    def __init__(self, module: nn.Module, output: PCNode | str | None = None):
        remedy = "for a chain of linear layers call PCNetwork.from_sequential(torch.nn.Sequential(...))"
        raise ValueError(
            f"module: PCNetwork({type(module).__name__}) with nodes inside comes with a later version; {remedy}"
        )

    @classmethod
    def from_sequential(
        cls, module: nn.Sequential, energy: str | Sequence[str | PCNode] = "kl", output: str | PCNode | None = None
    ) -> PCNetwork:
        """A network whose nodes are the module's linear layers, each with the activation behind it.

        module: nn.Linear and activations in turn, after at most one nn.Flatten; it is kept, not copied.
        energy: "kl" (categorical where the activation is softmax, gaussian elsewhere), "gaussian" (the paper's PC_F:
        the squared error of whatever the activation gives), or a list of names and `PCNode`s, one per linear layer.
        output: the last node's energy instead, for example "categorical" for a module that ends in logits.

        Raises ValueError that names the module and the remedy where a module or an energy does not fit a chain.
        """
        if type(module) is not nn.Sequential:
            got = type(module).__name__
            raise TypeError(f"module: wanted a torch.nn.Sequential, got {got}; put its linear layers in a Sequential")
        if any(isinstance(child, PCNode) for child in module.modules()):
            raise ValueError("module: wanted no PCNode inside, got one; pass it in energy=[...], one per linear layer")
        links = read_chain(module).links
        names = [link.name for link in links]
        net = cls.__new__(cls)
        nn.Module.__init__(net)
        net.module = module
        net.nodes = nn.ModuleList(_make_nodes(names, energy, output))
        for link, node in zip(links, net.nodes, strict=True):
            if node.energy == "gaussian_diag" and node.log_var is None:
                node.log_var = nn.Parameter(torch.zeros_like(link.linear.weight[:, 0]))
        net._read(links)
        return net

    def forward(self, x: Tensor) -> Tensor:
        """What the module returns for x: the feed-forward prediction."""
        return self.module(x)

    def infer(
        self,
        x: Tensor,
        y: Tensor | None = None,
        steps: int = 32,
        lr: float = 0.1,
        momentum: float = 0.0,
        tol: float | None = None,
        algorithm: str = "pc",
        clamp: Sequence[bool | Tensor | None] | None = None,
        noise: Tensor | Sequence[Tensor | None] | None = None,
        state_optimizer: Any = None,
        optimizer: Any = None,
        trace: bool = True,
        phis: Sequence[Tensor | None] | None = None,
        precision: str = "fp32",
        masks: Masks = None,
    ) -> Result:
        """Settle the states: phi_l <- phi_l - lr dF/dphi_l, `steps` times, from the feed-forward values.

        x: (B, ...), flattened to (B, D_0) where the module begins with a Flatten.
        y: the target that clamps the output: class indices (B,) or probabilities (B, D) for a categorical output,
        values (B, D) otherwise; None leaves it free.
        algorithm: "pc", or "bp" for the feed-forward states and the output's energy alone (`steps`, `lr`, `momentum`
        and `tol` are then without effect).
        trace: keep the energies of every step. masks: one per node or None, instead of the nodes' own.
        steps, lr, momentum, tol, clamp, noise, phis, precision: as in `pck.infer`.

        Raises ValueError or TypeError that names the argument, `pck.InferenceDiverged`, `pck.BackendUnavailable`.
        """
        run = choose(algorithm, state_optimizer, optimizer)
        settings = {"steps": steps, "lr": lr, "momentum": momentum, "tol": tol, "clamp": clamp, "noise": noise}
        settings |= {"phis": phis, "precision": precision, "trace": trace}
        return run.infer(self._call(x, y, masks, settings))

    def backward(self, result: Result) -> None:
        """Add the gradient of F at `result`, averaged over the batch, to every p.grad, as loss.backward() does.

        For "bp" it is the gradient of the output's energy. Parameters that do not require grad are left alone.
        Raises ValueError for another network's result. TypeError for anything else.
        """
        if not isinstance(result, Result):
            raise TypeError(f"result: wanted what infer returned, got {type(result).__name__}; call infer first")
        if result.owner is not self:
            raise ValueError("result: wanted one of this network, got another network's; call this network's infer")
        ALGORITHMS[result.algorithm].backward(result)

    def explain(self, x: Tensor, y: Tensor | None = None) -> str:
        """Which backend and schedule `infer(x, y)` would take, and why the others would not run. Runs nothing."""
        call = self._call(x, y, None, {})
        return pck.explain(call.x, call.layers, target=call.y, masks=call.masks)

    def _call(self, x: Tensor, y: Tensor | None, masks: Masks, settings: dict[str, Any]) -> Call:
        flatten, links = read_chain(self.module)
        return Call(self, x.flatten(1) if flatten else x, y, links, self._read(links), self._masks(masks), settings)

    def _masks(self, masks: Masks) -> list[Tensor | None] | None:
        """The masks given, the nodes' own where there is none."""
        own = [node.mask for node in self._listed()]
        if masks is not None:
            if len(masks) != len(own):
                raise ValueError(
                    f"masks: wanted {len(own)} entries, one per node, got {len(masks)}; use None for no mask"
                )
            own = [mine if given is None else given for given, mine in zip(masks, own, strict=True)]
        return None if all(mask is None for mask in own) else own

    def _listed(self) -> list[PCNode]:
        return cast("list[PCNode]", list(self.nodes))

    def _read(self, links: Sequence[Any]) -> list[pck.Layer]:
        last = len(links) - 1
        return [
            make_layer(link, node, l == last) for l, (link, node) in enumerate(zip(links, self._listed(), strict=True))
        ]


def _make_nodes(names: Sequence[str], energy: Any, output: Any) -> list[PCNode]:
    """One node per linear layer; `names` are the activations."""
    if isinstance(energy, str):
        if energy not in ("kl", "gaussian"):
            remedy = "for other families pass a list, or output= for the last node"
            raise ValueError(f"energy: wanted 'kl', 'gaussian' or a list, one entry per node, got {energy!r}; {remedy}")
        kl = ["categorical" if name == "softmax" else "gaussian" for name in names]
        entries: list[Any] = kl if energy == "kl" else ["gaussian"] * len(names)
        entries[-1] = entries[-1] if output is None else output
    else:
        if output is not None:
            raise ValueError("output: wanted None beside a list of energies, got both; the last entry is the output's")
        entries = list(energy)
    if len(entries) != len(names):
        got = f"{len(entries)}; the output's is the last"
        raise ValueError(f"energy: wanted {len(names)} entries, one per nn.Linear, got {got}")
    nodes = [_make_node(entry) for entry in entries]
    if len({id(node) for node in nodes}) < len(nodes):
        raise ValueError("energy: wanted a PCNode of its own for every node, got one twice; make a second one")
    return nodes


def _make_node(entry: Any) -> PCNode:
    if isinstance(entry, PCNode):
        return entry
    if not isinstance(entry, str):
        got = type(entry).__name__
        raise TypeError(f"energy: wanted names and PCNodes, got {got}; one of {', '.join(pck.ENERGIES)}")
    return PCNode(entry)
