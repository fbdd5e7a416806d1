# SPDX-License-Identifier: MIT
"""`PCNetwork`: a torch module with value nodes in it, as an energy to settle and to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

import pc_kernels as pck
from pc_runner.algorithms import Call, backward_chain, bad_choice, infer_chain, loss_chain
from pc_runner.arguments import chain_input, check_list, list_targets
from pc_runner.capture import Captures, obstacle
from pc_runner.chains import ModuleChain, is_bare, sequential_program
from pc_runner.engine import Traces
from pc_runner.inference import Result, make_layer, read_chain
from pc_runner.methods import KEEPS_TAPE, METHODS, UNIT_LR, Task, WeightSteps, find_step, start
from pc_runner.modes import ordinary, plain
from pc_runner.moves import read_moves
from pc_runner.node import PCNode, fail
from pc_runner.tracing import Step
from pc_runner.walk import Program, Request, make_program, name_nodes

Masks = Sequence[Tensor | None] | None


class PCNetwork(nn.Module):
    """A predictive-coding network around the user's module: any module with `PCNode`s where value nodes belong.

    module: calls each of its nodes once in a forward pass, on the node's prediction mu (B, ...).
    output: the node(s) that what the module returns predicts, a `PCNode` or an energy's name, one per returned tensor;
    None: the node reached last.

    `net(x)` is `net.module(x)`, the plain feed-forward pass. Learning takes two calls, then any torch optimiser:

        result = net.infer(x, y)      # the E-step: states phi that lower F = sum_l E_l, weights fixed
        net.backward(result)          # the M-step: p.grad += dF/dp, averaged over the batch

    `net.module` is the module given; `net.nodes` the output's nodes (all nodes where `from_sequential` made the
    network). Parameters are read at every call, as is all else that forward reads (`contents`). During both calls
    BatchNorm uses its running statistics, and dropout (of a module in training) the mask that the first pass drew;
    autocast and inference mode are off (states are of the module's own dtype, float32 or float64). What forward
    changes, buffers, attributes, containers in them, its inputs, is after both calls what it was before, and every pass
    starts from that: running averages, counts and kept activations move in a plain `net(x)` alone.
    """

    module: nn.Module
    nodes: nn.ModuleList

    def __init__(self, module: nn.Module, output: PCNode | str | Sequence[PCNode | str] | None = None):
        super().__init__()
        if not isinstance(module, nn.Module):
            fail("module", "a torch.nn.Module", type(module).__name__, "wrap the function in one", TypeError)
        given = [] if output is None else list(output) if isinstance(output, (list, tuple)) else [output]
        self.module = module
        self.nodes = nn.ModuleList([_make_node(entry) for entry in given])
        inside = [node for node in module.modules() if isinstance(node, PCNode)]
        if not inside and not given:
            remedy = "put PCNodes in, or for a chain of linear layers call PCNetwork.from_sequential(...)"
            fail("module", "at least one PCNode inside", type(module).__name__, remedy)
        if len({id(node) for node in [*inside, *self.nodes]}) < len(inside) + len(given):
            fail("output", "a PCNode of its own", "one that is in the module, or twice", "make another one")
        name_nodes(module, self._listed())
        self._sequential, self._traces, self._captures = False, Traces(), Captures()

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
        net._sequential, net._traces, net._captures = True, Traces(), Captures()
        for link, node in zip(links, net.nodes, strict=True):
            if node.energy == "gaussian_diag" and node.log_var is None:
                like = next(link.linear.parameters())
                node.log_var = nn.Parameter(like.detach().new_zeros(link.linear.out_features))
        if is_bare(module, links):
            net._read(links)  # raises for a node that does not fit its layer
        else:
            sequential_program(module, net._listed())
        return net

    def forward(self, *inputs: Any) -> Any:
        """What the module returns: the feed-forward prediction. The output nodes' feeds are not applied."""
        return self.module(*inputs)

    @ordinary
    def infer(
        self,
        x: Tensor | Sequence[Any],
        y: Any = None,
        steps: int = 32,
        lr: float | Sequence[float] | None = None,
        momentum: float = 0.0,
        tol: float | None = None,
        algorithm: str = "pc",
        clamp: Any = None,
        noise: Any = None,
        state_optimizer: Any = None,
        optimizer: WeightSteps | None = None,
        trace: bool = True,
        phis: Any = None,
        precision: str = "fp32",
        masks: Any = None,
    ) -> Result:
        """Settle the states: phi_l <- phi_l - lr dF/dphi_l, `steps` times, from the feed-forward values.

        x: what the module takes, a tensor (B, ...) or a tuple of arguments. No graph is recorded into x, or any other
        argument: a layer that is to learn, too, belongs in the module.
        y: the target that clamps the output: class indices (B, ...) or probabilities (B, ..., D) for a categorical
        output, values otherwise; a tuple with one entry per output; None leaves it free.
        lr: one for all moves, or a list with one per move; None is 0.1; 1 for "zil" (always) and "fixed_prediction".
        algorithm: "pc"; "ipc" (the weights step, too, by `optimizer`); "fixed_prediction" and "zil" (backpropagation's
        gradient by local moves); "epc" (errors move instead of states); "bp" (the feed-forward states and the output's
        energy alone; the settings of the moves are then without effect).
        state_optimizer: None or "sgd" (with `momentum`), "adam" or `pc_runner.Adam(...)`.
        clamp, phis, masks, noise: one entry per node in the order they are reached, the output last, or a dict by the
        modules' names ("output" for the output); meanings as in `pck.infer`. masks: instead of the nodes' own.
        trace: keep the energies of every step. tol, precision: as in `pck.infer`; precision is for chains, and "bf16"
        for the moves of a module whose output has `linear=`: of that layer's products alone, never of the learning.

        Raises ValueError or TypeError that names the argument, `pck.InferenceDiverged`, `pck.BackendUnavailable`.
        """
        bad_choice(algorithm, METHODS, optimizer)
        x, y, phis, clamp, masks, noise = map(plain, (x, y, phis, clamp, masks, noise))
        lr = lr if lr is not None else (1.0 if algorithm in UNIT_LR else 0.1)
        if algorithm == "zil" and (lr != 1.0 or momentum):
            fail("lr", "1 and no momentum with algorithm='zil'", f"{lr}, {momentum}", "leave both out")
        settings = {"steps": steps, "lr": lr, "momentum": momentum, "tol": tol, "clamp": clamp, "noise": noise}
        settings |= {"phis": phis, "precision": precision, "trace": trace}
        if state_optimizer in (None, "sgd") and not isinstance(lr, (list, tuple)):
            call = self._chain_call(x, y, masks, settings, algorithm)
            if call is not None:
                return self._dated(infer_chain(call, algorithm))
        if precision not in ("fp32", "bf16") or (precision == "bf16" and all(n.linear is None for n in self._listed())):
            wanted = "'fp32' outside pck.infer's chains, or 'bf16' for an output with linear="
            fail("precision", wanted, repr(precision), "the module computes as it likes")
        moves = read_moves(steps, lr, momentum, tol, state_optimizer, trace, precision)
        request = Request(_inputs(x), y, phis, clamp, masks, noise)
        task = start(self, self._program(y), request, moves, self._traces, self._captures, optimizer)
        return self._dated(METHODS[algorithm](task))

    @ordinary
    def backward(self, result: Result) -> None:
        """Add the gradient of F at `result`, averaged over the batch, to every p.grad, as loss.backward() does.

        For "bp" it is the gradient of the output's energy. Parameters that do not require grad are left alone. Each
        call adds it once more. Raises ValueError for another network's result, and for one of "bp", "zil" or
        "fixed_prediction" once the weights that it belongs to have changed; TypeError for anything else.
        """
        self._check_result(result)
        if result.learn is None:
            backward_chain(result)
            return
        loss = result.learn()
        if loss.requires_grad:
            loss.backward(retain_graph=True)  # the tape of "zil", "fixed_prediction" and "bp" is the result's own

    @ordinary
    def loss(self, result: Result) -> Tensor:
        """A scalar whose `backward()` does what `self.backward(result)` does: for DistributedDataParallel, whose hooks
        want one. Its value is F / B, or, for a chain's "pc", 0.

        DDP averages gradients only of what passes through its own forward: let it wrap a module whose forward calls
        `infer` and returns this (README, `pc_runner.distributed.Learner`), not the network.
        """
        self._check_result(result)
        return loss_chain(result) if result.learn is None else result.learn()

    def _check_result(self, result: Result) -> None:
        if not isinstance(result, Result):
            raise TypeError(f"result: wanted what infer returned, got {type(result).__name__}; call infer first")
        if result.owner is not self:
            raise ValueError("result: wanted one of this network, got another network's; call this network's infer")
        if result.versions is not None and result.versions != self._versions():
            remedy = f"algorithm={result.algorithm!r} learns from its own forward pass: infer again after a step"
            fail("result", "the weights that infer saw", "changed ones", remedy)

    def _versions(self) -> tuple[int, ...]:
        return tuple(parameter._version for parameter in self.parameters())

    def _dated(self, result: Result) -> Result:
        """The same, with the state of the weights where a tape of them was kept."""
        return replace(result, versions=self._versions()) if result.algorithm in KEEPS_TAPE else result

    @ordinary
    def explain(self, x: Any, y: Any = None) -> str:
        """What `infer(x, y)` would take: a chain's backend and schedule, or how a module's step was traced. A module
        with nodes is run forward once."""
        x, y = plain(x), plain(y)
        call = self._chain_call(x, y, None, {}, "pc")
        if call is not None:
            return pck.explain(call.x, call.layers, target=call.y, masks=call.masks)
        moves = read_moves(1, 0.1, 0.0, None, None, False)
        task = start(self, self._program(y), Request(_inputs(x), y), moves, self._traces, self._captures)
        return _account(task, self._find_chain().reason)

    def _program(self, targets: Any = True) -> Program:
        if self._sequential:
            return sequential_program(cast("nn.Sequential", self.module), self._listed())
        program = make_program(self.module, self._listed(), targets)
        program.looks = self._traces.looks
        return program

    def _find_chain(self) -> ModuleChain:
        if self._sequential:
            reason = "it has forward hooks, or weights that are made from others (weight norm, pruning)"
            return ModuleChain(False, [], [], reason)
        return self._traces.chain(self._program())

    def _chain_call(self, x: Any, y: Any, masks: Any, settings: dict[str, Any], algorithm: str) -> Call | None:
        """The call of `pck.infer` that this is, or None."""
        if self._sequential:
            if algorithm not in ("pc", "bp"):
                return None
            module = cast("nn.Sequential", self.module)
            flatten, links = read_chain(module)
            if not is_bare(module, links):
                return None
            settings, masks = _lists(settings, masks, [*(f"nodes.{l}" for l in range(len(links) - 1)), "output"])
            x, (y,) = chain_input(x, flatten, links[0].linear.weight), list_targets(y, 1)
            return Call(self, x, y, links, self._read(links), self._masks(masks), settings)
        if algorithm != "pc" or not isinstance(x, Tensor):
            return None
        program = self._program()
        chain = self._traces.chain(program)
        if not chain.stages or (x.ndim != 2 and not chain.flatten):
            return None
        settings, masks = _lists(settings, masks, chain.names)
        masks = self._masks(masks, [stage.node for stage in chain.stages])
        layers = [stage.layer() for stage in chain.stages]
        x, (y,) = chain_input(x, chain.flatten, layers[0].weight), list_targets(y, 1)
        return Call(self, x, y, [], layers, masks, settings, chain.names)

    def _masks(self, masks: Masks, nodes: Sequence[PCNode] | None = None) -> list[Tensor | None] | None:
        """The masks given, the nodes' own where there is none."""
        own = [node.mask for node in (self._listed() if nodes is None else nodes)]
        if masks is not None:
            check_list("masks", masks)
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
    if any(node.linear is not None for node in nodes):
        fail(
            "energy", "nodes without linear= for a Sequential", "one with it", "PCNetwork(module, output=...) takes it"
        )
    return nodes


def _make_node(entry: Any) -> PCNode:
    if isinstance(entry, PCNode):
        return entry
    if not isinstance(entry, str):
        got = type(entry).__name__
        raise TypeError(f"energy: wanted names and PCNodes, got {got}; one of {', '.join(pck.ENERGIES)}")
    return PCNode(entry)


def _inputs(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def _lists(settings: dict[str, Any], masks: Any, names: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """The settings and masks with lists, in the chain's order, instead of dicts by name. Raises for unknown names."""
    given = {what: settings.get(what) for what in ("phis", "clamp", "noise")} | {"masks": masks}
    Request((), **given).check_names(names)
    for what, entries in given.items():
        if isinstance(entries, Mapping):
            given[what] = [entries.get(name) for name in names]
    masks = given.pop("masks")
    return settings | given, masks


def _account(task: Task, reason: str) -> str:
    """The path of a module that is no chain, in words."""
    found = find_step(task)
    lines = [f"no chain of linear layers for pck.infer: {reason}", f"nodes: {', '.join(s.name for s in task.states)}"]
    if isinstance(found, Step):
        hoisted, forward, backward = found.products
        lines.append(f"traced: {hoisted} products once per inference, {forward} + {backward} per step (forward, VJP)")
    else:
        lines.append(f"taped by autograd at every step, nothing computed once: {found}")
    why = obstacle("traced" if isinstance(found, Step) else "taped", task.nodes, task.moves)
    lines.append("CUDA graph: captured (not yet run on hardware)" if why is None else f"no CUDA graph: {why}")
    return "\n".join(lines)
