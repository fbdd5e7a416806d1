# SPDX-License-Identifier: MIT
"""linear_softmax_errors in plain torch, a chunk of rows at a time, so that the logits never exist whole."""

from __future__ import annotations

import torch
from torch import Tensor

from pc_kernels.backends.reference_infer import round_bf16, round_tf32

# Logits that exist at a time. Fewer rows waste more on rewriting grad_weight once a chunk than the cache saves:
# benchmarks/linear_softmax.py on a 2-core CPU takes 1.5 to 1.9 times as long with 2^21.
CHUNK_ENTRIES = 2**23
_ROUNDING = {"fp32": lambda x: x, "tf32": round_tf32, "bf16": round_bf16}


def linear_softmax_errors(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    weight_grads: bool,
    precision: str,
    family: str = "categorical",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Energy (R,), grad_v (R, V), grad_weight (D, V), grad_bias (D,) of rows v (R, V); see the public function."""
    dtype, rounded = v.dtype, _ROUNDING[precision]
    working = dtype if dtype == torch.float64 else torch.float32
    x, w = rounded(v.to(working)), rounded(weight.to(working))
    b = weight.new_zeros((), dtype=working) if bias is None else bias.to(working)
    if mask is not None:
        x = x.masked_fill(~mask[:, None], 0.0)  # 0 * NaN is NaN: what stands in a padding row must not matter
    rows, classes = x.shape[0], w.shape[0]
    energy, grad_v = x.new_empty(rows), torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_w = x.new_zeros(w.shape if weight_grads else 0)
    grad_b = x.new_zeros(classes if weight_grads and bias is not None else 0)
    errors_ = _errors_ if family == "categorical" else _squared_errors_
    step = max(1, CHUNK_ENTRIES // classes)
    logits = x.new_empty(min(step, rows), classes)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        a = torch.addmm(b, x[part], w.T, out=logits[: x[part].shape[0]])
        energy[part] = errors_(a, target[part], None if mask is None else mask[part])
        delta = rounded(a)
        torch.mm(delta, w, out=grad_v[part])
        if weight_grads:
            grad_w.addmm_(delta.T, x[part])
        if grad_b.numel():
            grad_b += a.sum(0)
    return energy, grad_v.to(dtype), grad_w.to(dtype), grad_b.to(dtype)


def _errors_(a: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Energies of the rows of logits a (R, D), which become delta = q sum(o) - o in place."""
    hidden = None if mask is None else ~mask
    log_q = torch.log_softmax(a, -1, out=a)
    if target.is_floating_point():
        o = target.to(a.dtype) if hidden is None else target.to(a.dtype).masked_fill(hidden[:, None], 0.0)
        # o (ln o - ln q), and not o ln o - o ln q, which cancels where q is near o
        energy = o.log().sub_(log_q).mul_(o).masked_fill_(o == 0, 0.0).sum(-1)
        log_q.exp_().mul_(o.sum(-1, keepdim=True)).sub_(o)
        return energy
    index = (target if hidden is None else target.masked_fill(hidden, 0)).unsqueeze(-1)
    energy = log_q.gather(-1, index).neg_().squeeze(-1)
    log_q.exp_().scatter_add_(-1, index, log_q.new_full((), -1.0).expand(index.shape))
    if hidden is not None:
        energy.masked_fill_(hidden, 0.0)
        log_q.masked_fill_(hidden[:, None], 0.0)
    return energy


def _squared_errors_(a: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """1/2 sum (q - o)^2 of the rows of logits a (R, D), which become delta = q (r - <q, r>), r = q - o, in place."""
    q = torch.softmax(a, -1)
    if target.is_floating_point():
        o = target.to(a.dtype) if mask is None else target.to(a.dtype).masked_fill(~mask[:, None], 0.0)
        torch.sub(q, o, out=a)
    else:
        index = (target if mask is None else target.masked_fill(~mask, 0)).unsqueeze(-1)
        a.copy_(q).scatter_add_(-1, index, a.new_full((), -1.0).expand(index.shape))
    energy = 0.5 * a.square().sum(-1)
    a.sub_((q * a).sum(-1, keepdim=True)).mul_(q)
    if mask is not None:
        energy.masked_fill_(~mask, 0.0)
        a.masked_fill_(~mask[:, None], 0.0)
    return energy
