# SPDX-License-Identifier: MIT
"""The paper's models."""
