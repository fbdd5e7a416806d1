# SPDX-License-Identifier: MIT
"""Operators as loops call them: without the checks of the public functions, which look at values, and past torch's
dispatcher where nobody traces. Whoever calls them has called a public function on the same tensors before."""

from pc_kernels.library import layer_deltas, update_phi_

__all__ = ["layer_deltas", "update_phi_"]
