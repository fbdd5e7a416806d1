# SPDX-License-Identifier: MIT
"""From the user's `nn.Sequential` to the layers that `pc_kernels` infers, and what an inference returns.

A chain is a list of `Link`s, one per node: a linear layer and the activation behind it. A node's energy decides where
the activation goes: into the prediction (mu = act(a)), or, where the family holds the activation's argument (logits),
into the feed (mu = a, v = act(phi)). Either way the feed-forward pass stays exactly the module's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from torch import Tensor, nn

import pc_kernels as pck

if TYPE_CHECKING:
    from pc_runner.node import PCNode
    from pc_runner.settle import Settled

MEAN_MAPS = {"categorical": "softmax", "bernoulli": "sigmoid"}  # families that hold logits: what their nodes pass on


class Rule(NamedTuple):
    """How an activation module is named in `pc_kernels`, and which settings of it have that meaning."""

    name: str
    fits: Callable[[Any], bool] = lambda module: True
    wanted: str = ""


RULES: dict[type[nn.Module], Rule] = {
    nn.Tanh: Rule("tanh"),
    nn.ReLU: Rule("relu"),
    nn.LeakyReLU: Rule("leaky_relu", lambda m: m.negative_slope == 0.01, "negative_slope=0.01"),
    nn.GELU: Rule("gelu", lambda m: m.approximate == "none", "approximate='none'"),
    nn.SiLU: Rule("silu"),
    nn.Sigmoid: Rule("sigmoid"),
    nn.Hardtanh: Rule("hardtanh", lambda m: (m.min_val, m.max_val) == (-1, 1), "min_val=-1, max_val=1"),
    nn.Softplus: Rule("softplus", lambda m: m.beta == 1 and m.threshold >= 20, "beta=1, threshold=20"),
    nn.Softmax: Rule("softmax", lambda m: m.dim in (-1, 1), "dim=-1"),
}


class Link(NamedTuple):
    """One node's deterministic part: mu = act(W v + b), the modules being the user's own."""

    position: str  # of the linear layer in the module, as in its state_dict
    linear: nn.Linear
    activation: nn.Module | None

    @property
    def name(self) -> str:
        """The activation's name in `pc_kernels`."""
        return "identity" if self.activation is None else RULES[type(self.activation)].name


class Chain(NamedTuple):
    """What a Sequential comes down to."""

    flatten: bool  # a leading Flatten
    links: list[Link]


def read_chain(module: nn.Sequential) -> Chain:
    """The linear layers and activations of a Sequential. ValueError at the first module that does not fit."""
    flatten, links = False, []
    for position, child in _children(module, ""):
        kind = type(child)
        if kind is nn.Linear:
            _check_width(position, child, links)
            links.append(Link(position, child, None))
        elif kind is nn.Flatten:
            _check_flatten(position, child, links, flatten)
            flatten = True
        elif kind in RULES:
            _check_activation(position, child, links)
            links[-1] = links[-1]._replace(activation=child)
        elif kind is not nn.Identity:
            _refuse(position, child, *_reason(child))
    if not links:
        raise ValueError("module: wanted a Sequential with at least one nn.Linear, got none; add the linear layers")
    return Chain(flatten, links)


def is_plain(linear: nn.Linear) -> bool:
    """Whether weight and bias are parameters of its own, not made from others (weight norm, pruning)."""
    return linear._parameters.get("weight") is not None and "bias" in linear._parameters


def is_hooked(module: nn.Module) -> bool:
    """Whether more runs when the module is called than its class's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _children(module: nn.Sequential, prefix: str) -> Iterator[tuple[str, Any]]:
    """The modules of nested Sequentials in order; shared ones as often as they stand there."""
    for name, child in module._modules.items():
        if type(child) is nn.Sequential:
            yield from _children(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _refuse(position: str, child: Any, problem: str, remedy: str) -> NoReturn:
    shown = repr(child)
    shown = shown if "\n" not in shown else type(child).__name__
    raise ValueError(f"module[{position}]: {shown} {problem}; {remedy}")


def _reason(child: Any) -> tuple[str, str]:
    """Why a module of an unknown kind has no place in a chain, and what to do."""
    if isinstance(child, nn.modules.dropout._DropoutNd):
        return "would change the energy at every step", "remove it: predictive coding here runs without dropout"
    if isinstance(child, nn.Linear):
        remedy = "run lazy layers once; for parametrizations put PCNodes into a module and pass that to PCNetwork(...)"
        return "is no plain nn.Linear", remedy
    known = ", ".join(kind.__name__ for kind in RULES)
    return "is not part of a chain", f"wanted nn.Linear, nn.Identity, one leading nn.Flatten and activations: {known}"


def _check_width(position: str, child: nn.Linear, links: Sequence[Link]) -> None:
    if links and child.in_features != links[-1].linear.out_features:
        width = links[-1].linear.out_features
        _refuse(position, child, f"does not fit the {width} features before it", f"wanted in_features={width}")


def _check_flatten(position: str, child: nn.Flatten, links: Sequence[Link], seen: bool) -> None:
    if links or seen:
        _refuse(position, child, "stands after the first position", "remove it: a chain's values are flat already")
    if (child.start_dim, child.end_dim) != (1, -1):
        _refuse(position, child, "keeps other dimensions", "wanted start_dim=1, end_dim=-1: dim 0 is the sample")


def _check_activation(position: str, child: nn.Module, links: Sequence[Link]) -> None:
    rule = RULES[type(child)]
    if not rule.fits(child):
        _refuse(position, child, "has no closed form here", f"wanted {rule.wanted}")
    if not links:
        _refuse(position, child, "stands before the first nn.Linear", "apply it to x yourself")
    if links[-1].activation is not None:
        first = type(links[-1].activation).__name__
        _refuse(position, child, f"follows another activation ({first})", "put an nn.Linear between the two")


def place_activation(link: Link, node: PCNode, output: bool) -> tuple[str, str | None]:
    """(activation, feed) of the node's `pck.Layer`, such that feed(act(a)) is the module's activation.

    Raises ValueError where no such pair exists.
    """
    if not isinstance(node.energy, str):
        remedy = "put the nodes into a module and pass that to PCNetwork(...)"
        raise ValueError(f"node at module[{link.position}]: wanted a family's name, got {node.energy!r}; {remedy}")
    act, mean_map = link.name, MEAN_MAPS.get(node.energy)
    feed = node.feed if node.feed is not None else ("identity" if mean_map is None else mean_map)
    if node.energy == "gaussian_full" and not output:
        remedy = "a Sequential passes both halves on; only its output can be 'gaussian_full'"
        raise ValueError(f"node at module[{link.position}]: 'gaussian_full' feeds on a sample; {remedy}")
    if feed == act != "identity":
        return "identity", feed
    if output or feed == "identity":
        return act, node.feed
    wanted = f"nn.{feed.capitalize()} behind the linear layer, since a {node.energy!r} node here feeds on {feed}"
    remedy = "add it, choose another energy, or PCNode(energy, feed='identity')"
    raise ValueError(f"node at module[{link.position}]: wanted {wanted}, got {act}; {remedy}")


def make_layer(link: Link, node: PCNode, output: bool) -> pck.Layer:
    """The layer of `pc_kernels` that predicts the node, on the user's own parameters as they are now."""
    activation, feed = place_activation(link, node, output)
    assert isinstance(node.energy, str)  # or place_activation has raised
    return pck.Layer(
        link.linear.weight, link.linear.bias, activation, node.energy, feed, node.log_var, node.step, node.lr_scale,
        node.prior,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Result:
    """What `PCNetwork.infer` returns; hand it to `PCNetwork.backward`.

    phis: L tensors (B, ...), the final states (a clamped node: the target as given), in the order of `names`.
    energy: (steps + 1, L), the batch mean of every E_l in nats before each move and after the last; (1, L) for "bp";
    None with trace=False.
    """

    phis: list[Tensor]
    energy: Tensor | None
    algorithm: str
    owner: nn.Module = field(repr=False)
    x: Tensor | None = field(default=None, repr=False)  # (B, D_0), flattened, of a chain
    layers: list[pck.Layer] = field(default_factory=list, repr=False)  # of a chain
    inference: pck.Inference | None = field(default=None, repr=False)  # of a chain's "pc"
    loss: Tensor | None = field(default=None, repr=False)  # of "bp": batch mean of the output's energy, with its graph
    names: list[str] = field(default_factory=list)  # of the nodes, as in `phis`
    settled: Settled | None = field(default=None, repr=False)  # of a module with nodes
    learn: Callable[[], Tensor] | None = field(default=None, repr=False)  # the loss that `backward` takes there
    path: str = field(default="autograd", repr=False)
    versions: tuple[int, ...] | None = field(default=None, repr=False)  # of the parameters, where `learn` keeps a tape

    @property
    def steps(self) -> int:
        """Moves done."""
        if self.settled is not None:
            return self.settled.steps
        return 0 if self.inference is None else self.inference.steps

    @property
    def work(self) -> pck.WorkCount | None:
        """Matrix products done, and the least possible; for a chain's "bp" those of the forward pass.

        None where autograd's tape ran, which nobody counts here.
        """
        if self.settled is not None:
            return self.settled.work
        return pck.WorkCount(len(self.layers), len(self.layers)) if self.inference is None else self.inference.work

    @property
    def backend(self) -> str:
        """The backend of `pc_kernels` that ran a chain; "traced" or "taped" elsewhere, "autograd" for "bp"."""
        return self.path if self.inference is None else self.inference.backend

    def check(self) -> None:
        """Raise InferenceDiverged if a state became non-finite (`infer` did so itself, except while compiling)."""
        if self.inference is not None:
            self.inference.check()
