# SPDX-License-Identifier: MIT
"""pc_runner: predictive-coding networks, training and the `pc-run` command line, on top of `pc_kernels`."""

from pc_runner.distributions import Pair
from pc_runner.inference import Result
from pc_runner.moves import Adam
from pc_runner.network import PCNetwork
from pc_runner.node import PCNode

__all__ = ["Adam", "PCNetwork", "PCNode", "Pair", "Result"]
