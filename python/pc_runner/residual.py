# SPDX-License-Identifier: MIT
"""Deep residual MLPs with nodes on their stream, plain or in the muPC parametrisation (Innocenti et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pc_runner.network import PCNetwork
from pc_runner.node import PCNode, fail


class ScaledLinear(nn.Linear):
    """scale * W x, no bias; W starts as N(0, 1). The scale, not the initialisation, carries the width and depth."""

    def __init__(self, in_features: int, out_features: int, scale: float):
        super().__init__(in_features, out_features, bias=False)
        nn.init.normal_(self.weight)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * super().forward(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:.4g}"


def mupc_scales(in_features: int, width: int, depth: int) -> list[float]:
    """muPC's factors of `depth` layers: 1/sqrt(in_features), then 1/sqrt(width depth) for each residual layer, then
    1/width for the last. With them the energies neither vanish nor explode with depth. Raises ValueError for depth < 2.
    """
    if depth < 2:
        fail("depth", "at least 2 layers", depth, "the first and the last have scales of their own")
    return [in_features**-0.5, *[(width * depth) ** -0.5] * (depth - 2), 1 / width]


class ResidualMLP(nn.Module):
    """h_1 = W_1 x; h_l = h_{l-1} + W_l act(h_{l-1}); out = W_L act(h_{L-1}): a Gaussian node on every h_l.

    depth: L, the number of linear layers. scaled: muPC's parametrisation; otherwise plain nn.Linear without bias.
    """

    def __init__(
        self, in_features: int, width: int, depth: int, out_features: int,
        act: Callable[[Tensor], Tensor] = torch.relu, scaled: bool = False,
    ):  # fmt: skip
        super().__init__()
        scales = mupc_scales(in_features, width, depth)
        sizes = [(in_features, width), *[(width, width)] * (depth - 2), (width, out_features)]
        self.layers = nn.ModuleList(
            ScaledLinear(i, o, scale) if scaled else nn.Linear(i, o, bias=False)
            for (i, o), scale in zip(sizes, scales, strict=True)
        )
        self.nodes = nn.ModuleList(PCNode("gaussian") for _ in range(depth - 1))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        h = self.nodes[0](self.layers[0](x.flatten(1)))
        for layer, node in zip(self.layers[1:-1], self.nodes[1:], strict=True):  # type: ignore[arg-type]
            h = node(h + layer(self.act(h)))
        return self.layers[-1](self.act(h))


def residual_mlp(
    in_features: int, width: int, depth: int, out_features: int, *, mupc: bool = False, output: str = "gaussian"
) -> PCNetwork:
    """A `ResidualMLP` as a network with an output node of the given energy."""
    return PCNetwork(ResidualMLP(in_features, width, depth, out_features, scaled=mupc), output=output)
