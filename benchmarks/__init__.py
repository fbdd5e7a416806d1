# SPDX-License-Identifier: MIT
"""Benchmarks: cases as data (cases.py), gated on correctness (accuracy.py), timed in interleaved rounds (run.py)."""

import sys
from importlib.util import find_spec
from pathlib import Path

# On a bare machine (the GPU gate's) nothing is installed: the runner is then the working tree's.
if find_spec("pc_runner") is None:
    sys.path.append(str(Path(__file__).parents[1] / "python"))
