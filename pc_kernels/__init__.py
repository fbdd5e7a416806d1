# SPDX-License-Identifier: MIT
"""pc-kernels: fast exact predictive-coding inference for PyTorch. Tensors in, tensors out."""

from pc_kernels.build import build_info
from pc_kernels.dispatch import clear_plans, use_backend
from pc_kernels.errors import BackendUnavailable, InferenceDiverged
from pc_kernels.functional import layer_energies, layer_errors, update_phi_
from pc_kernels.inference import explain, infer, weight_grads
from pc_kernels.layer import Layer
from pc_kernels.linear_softmax import LinearSoftmaxErrors, linear_softmax_errors
from pc_kernels.pc_math import ACTIVATIONS, ENERGIES
from pc_kernels.results import Inference, LayerErrors, LayerGrads, WorkCount

__all__ = [
    "ACTIVATIONS",
    "ENERGIES",
    "BackendUnavailable",
    "Inference",
    "InferenceDiverged",
    "Layer",
    "LayerErrors",
    "LayerGrads",
    "LinearSoftmaxErrors",
    "WorkCount",
    "build_info",
    "clear_plans",
    "explain",
    "infer",
    "layer_energies",
    "layer_errors",
    "linear_softmax_errors",
    "update_phi_",
    "use_backend",
    "weight_grads",
]
