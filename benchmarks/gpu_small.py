# SPDX-License-Identifier: MIT
"""`python -m benchmarks.gpu_small`: every GPU kernel once at odd little sizes, for compute-sanitizer to watch."""

from __future__ import annotations

import torch

import pc_kernels as pck
from benchmarks.cases import Case, make
from benchmarks.gpu_infer import infer, variants
from pc_kernels.pc_math import ENERGIES

SIZES = ((3, 5), (3, 70), (3, 130))  # (B, D) of the layer ops' nodes


def layer_ops(device: str) -> None:
    """All families in one launch of each op, masked and held in part."""
    wide = [(size, name) for size in SIZES for name in ENERGIES]
    shapes = [(b, d + d % 2) for (b, d), _ in wide]
    names = [name for _, name in wide]
    phis = [torch.rand(shape, device=device) + 0.1 for shape in shapes]
    mus = [torch.rand(shape, device=device) + 0.1 for shape in shapes]
    log_vars = [
        torch.randn(mu.shape[1], device=device) if n == "gaussian_diag" else None
        for mu, n in zip(mus, names, strict=True)
    ]
    masks = [torch.rand(shape, device=device) < 0.8 for shape in shapes]
    for mask in masks:
        mask[:, 0] = True
    where = {"log_vars": log_vars, "masks": masks, "clamped": [~mask for mask in masks]}
    pck.layer_energies(phis, mus, names, **where)
    pck.layer_errors(phis, mus, names, **where)
    feedback = [torch.randn(shape, device=device) for shape in shapes]
    velocities = [torch.zeros(shape, device=device) for shape in shapes]
    pck.update_phi_(phis, mus, feedback, names, lr=0.1, momentum=0.5, velocities=velocities, **where)


def main() -> None:
    """All of it on the GPU; on a machine without one it says so."""
    if not torch.cuda.is_available():
        raise SystemExit("gpu_small: there is no CUDA device here")
    for backend in dict.fromkeys(variant.backend for variant in variants("cuda")):
        with pck.use_backend(backend):
            layer_ops("cuda")
    for softmax in (0, 2):
        case = Case("small", (33, 70, 65, 64, 10), 37, "categorical", 4, softmax=softmax)
        inputs = make(case, device="cuda")
        for variant in variants("cuda"):
            with variant.chosen():
                for _ in range(3):  # the later runs replay a CUDA graph
                    infer(case, inputs, variant.precision)
    torch.cuda.synchronize()
    print("ran", ", ".join(variant.name for variant in variants("cuda")))


if __name__ == "__main__":
    main()
