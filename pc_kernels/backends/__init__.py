# SPDX-License-Identifier: MIT
"""One module per backend. Each has `supports(op, tensors)` and functions named as the ops, with the ops' arguments."""
