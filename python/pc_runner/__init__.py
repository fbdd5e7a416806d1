# SPDX-License-Identifier: MIT
"""pc_runner: predictive-coding networks, training and the `pc-run` command line, on top of `pc_kernels`."""

from pc_runner.inference import Result
from pc_runner.network import PCNetwork, PCNode

__all__ = ["PCNetwork", "PCNode", "Result"]
