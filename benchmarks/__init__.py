# SPDX-License-Identifier: MIT
"""Benchmarks: cases as data (cases.py), gated on correctness (accuracy.py), timed in interleaved rounds (run.py)."""
