# SPDX-License-Identifier: MIT
"""Which backend runs a call: walk them from fastest to plainest, each answers yes or a reason.

The choice is made when an op runs, not when it is traced, so `use_backend` also governs compiled functions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from pc_kernels import checks
from pc_kernels.errors import BackendUnavailable

BACKENDS: tuple[str, ...] = ("cuda", "triton", "cpp", "reference")  # in the order in which "auto" tries them
ENVIRONMENT = "PC_KERNELS_BACKEND"

_MODULES = {
    "cuda": "pc_kernels.backends.cuda_backend",
    "triton": "pc_kernels.backends.triton_backend",
    "cpp": "pc_kernels.backends.native",
    "reference": "pc_kernels.backends.reference",
}
_requested: ContextVar[str | None] = ContextVar("pc_kernels_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the calls inside on one backend: "reference", "cpp", "triton", "cuda", or "auto" for the fastest that can.

    A backend named here runs or raises BackendUnavailable; it never falls back. Holds for this thread; nests. The
    environment
    variable PC_KERNELS_BACKEND sets the same for a whole process.
    """
    checks.choice("name", name, (*BACKENDS, "auto"))
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def requested() -> str:
    """The backend asked for here and now: `use_backend`, else the environment, else "auto"."""
    name = _requested.get()
    if name is not None:
        return name
    name = os.environ.get(ENVIRONMENT, "auto")
    checks.choice(ENVIRONMENT, name, (*BACKENDS, "auto"))
    return name


@cache
def module(name: str) -> ModuleType:
    """The module behind a backend."""
    return import_module(_MODULES[name])


def reason(name: str, op: str, tensors: Sequence[Tensor]) -> str | None:
    """None if the backend can run `op` on these tensors, otherwise why not."""
    if name not in _MODULES:
        return f"this version of pc-kernels has no {name} kernels yet"
    return module(name).supports(op, tensors)


def declined(name: str, op: str, tensors: Sequence[Tensor], arguments: Sequence[Any]) -> str | None:
    """None if "auto" may take the backend, otherwise why not: it cannot run `op`, or leaves a call with these arguments
    (of `infer`; none: nothing is known of them) to a faster one."""
    why = reason(name, op, tensors)
    if why is not None or not arguments or not hasattr(module(name), "declines"):
        return why
    return module(name).declines(op, tensors, arguments)


def choose(op: str, tensors: Sequence[Tensor], arguments: Sequence[Any] = ()) -> str:
    """Name of the backend that runs `op`. Raises BackendUnavailable if the one asked for by name cannot."""
    name = requested()
    if name != "auto":
        why = reason(name, op, tensors)
        if why is not None:
            raise BackendUnavailable(
                f"backend {name!r} cannot run {op}: {why}. Use use_backend('auto') to let one that can."
            )
        return name
    return next(candidate for candidate in BACKENDS if declined(candidate, op, tensors, arguments) is None)


def clear_plans() -> None:
    """Release what backends keep from call to call of `infer` on a GPU (workspaces and CUDA graphs).

    Later calls build them anew. Results already returned stay valid.
    """
    for name in ("triton_plan", "cuda_recordings"):
        loaded = sys.modules.get(f"pc_kernels.backends.{name}")  # where nothing is kept, nothing is imported for it
        if loaded is not None:
            loaded.clear_plans()


def chosen(op: str, tensors: Sequence[Tensor], arguments: Sequence[Any] = ()) -> str | None:
    """As `choose`, but None where it would raise."""
    wanted = requested()
    if wanted != "auto":
        return wanted if reason(wanted, op, tensors) is None else None
    return choose(op, tensors, arguments)


def account(op: str, tensors: Sequence[Tensor], arguments: Sequence[Any] = ()) -> str:
    """One line per backend: which one `choose` takes, and why the others would not run."""
    wanted = requested()
    lines, taken = [], None
    for name in BACKENDS:
        why = declined(name, op, tensors, arguments if wanted == "auto" else ())
        if why is None and taken is None and wanted in ("auto", name):
            taken, why = name, "runs" if name != "reference" else "runs (plain torch; reduced precisions are emulated)"
        elif why is None:
            why = f"could run; {wanted!r} was asked for" if wanted != "auto" else f"could run; {taken} comes first"
        lines.append(f"  {name}: {why}")
    head = f"{op}: backend {taken}" if taken else f"{op}: no backend; {wanted!r} was asked for and cannot run"
    return "\n".join([head, *lines])
