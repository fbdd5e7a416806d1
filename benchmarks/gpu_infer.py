# SPDX-License-Identifier: MIT
"""Rows of the GPU benchmark: inference of one case by all methods, side by side in one process.

Every kernel of ours is compared with float64 first, per layer on delta and dW, and run twice for equal bits; what fails
is not timed. A dry run does the same on the CPU, Triton in its interpreter, at sizes that mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

import torch

import pc_kernels as pck
from benchmarks.accuracy import Truth, errors, truth_of, within_rule
from benchmarks.baselines import ClosedForm, eager_autograd
from benchmarks.cases import CIFAR, M1, Case, Inputs, make
from pc_kernels import dispatch
from pc_kernels.library import infer_task

BATCHES = (64, 256, 512, 1024, 4096, 128, 32, 2048, 8192)  # the first ones matter most, should time run out
PRECISIONS = ("bf16_delta", "fp32")
ALL_PRECISIONS = (*PRECISIONS, "tf32", "bf16")
COMPILED = (256, 1024)  # compiling takes the time: torch.compile, and all precisions, at two sizes of the first network
Timer = Callable[[int], list[float]]


def cases(dry: bool) -> list[Case]:
    """M1, M2 and M3 over the batch sizes; the CIFAR10 network at two of them. In the order of their importance."""
    if dry:
        return [Case("dry M3 B=3", (7, 12, 9, 5), 3, "categorical", 2, softmax=2)]
    first = [Case(f"M1 B={b}", M1, b) for b in BATCHES]
    others = [Case(f"M{n} B={b}", M1, b, "categorical", softmax=at) for b in BATCHES for n, at in ((2, 0), (3, 2))]
    return first + others + [Case(f"M2 3072 B={b}", CIFAR, b, "categorical") for b in (64, 256)]


SCHEDULED = {"triton": "pc_kernels.backends.triton_launches", "cuda": "pc_kernels.backends.cuda_infer"}


@dataclass(frozen=True)
class Variant:
    """One way for our kernels to run a case."""

    backend: str
    precision: str
    schedule: str = ""  # of the backend

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.backend, self.precision, self.schedule) if part)

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """`pck.infer` inside takes this way."""
        with ExitStack() as stack:
            stack.enter_context(pck.use_backend(self.backend))
            if self.schedule:
                module = import_module(SCHEDULED[self.backend])
                stack.enter_context(module.use_schedule(self.schedule))
            yield


def variants(device: str, precisions: Sequence[str] = PRECISIONS) -> list[Variant]:
    """All that can run here."""
    found = []
    for precision in precisions:
        found += [Variant("triton", precision, schedule) for schedule in ("two launches a step", "persistent")]
        found.append(Variant("cuda", precision, "two launches a step"))
        if precision in ("bf16", "bf16_delta"):
            found.append(Variant("cuda", precision, "cluster-resident"))
    probe = torch.zeros(1, 1, device=device)
    able = []
    for variant in found:
        with pck.use_backend(variant.backend):
            if dispatch.reason(variant.backend, infer_task(variant.precision, -1.0), [probe]) is None:
                able.append(variant)
    return able


# ---------------------------------------------------------------------------------------------------------------------
# correctness


def infer(case: Case, inputs: Inputs, precision: str) -> pck.Inference:
    """The call that is measured."""
    return pck.infer(
        inputs.x, inputs.layers, target=inputs.target, steps=case.steps, lr=case.lr, precision=precision
    )  # fmt: skip


def gate(case: Case, inputs: Inputs, variant: Variant, truth: Truth, plain: dict[str, Any]) -> dict[str, Any]:
    """Errors per layer, whether they are within the rule, whether two runs give the same bits."""
    with variant.chosen():
        found: dict[str, Any] = errors(case, inputs, variant.precision, truth)
        runs = [infer(case, inputs, variant.precision) for _ in range(2)]  # by now they replay a CUDA graph
    found["passes"] = within_rule(found, plain[variant.precision], truth)
    one, other = (torch.cat([delta.flatten() for delta in run.deltas]) for run in runs)
    found["bitwise_equal"] = torch.equal(one, other)
    found["products"], found["lower_bound"] = runs[0].work
    return found


def plain_errors(case: Case, inputs: Inputs, truth: Truth, precisions: Sequence[str]) -> dict[str, Any]:
    """What plain torch makes of the case in each precision (the reference rounds the operands)."""
    found: dict[str, Any] = {"fp32": {"delta": truth.torch_deltas, "dW": truth.torch_grads}}
    with pck.use_backend("reference"):
        for precision in set(precisions) - {"fp32"}:
            found[precision] = errors(case, inputs, precision, truth)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# timing


def timer_of(run: Callable[[], Any], device: str) -> Timer:
    """Seconds of single calls after one to warm up: by CUDA events on a GPU."""
    run()

    def by_clock(n: int) -> list[float]:
        times = [time.perf_counter()]
        for _ in range(n):
            run()
            times.append(time.perf_counter())
        return [b - a for a, b in pairwise(times)]

    def by_events(n: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in pairwise(events)]

    return by_events if device == "cuda" else by_clock


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Whether torch's own float32 products may use tensor cores."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def captured(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """`run` as the replay of a CUDA graph; as it is without a GPU."""
    if device != "cuda":
        return run
    # torch keeps a cuBLAS workspace per stream: without this a graph would work in the memory of an earlier one
    torch._C._cuda_clearCublasWorkspaces()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        run()
    torch._C._cuda_clearCublasWorkspaces()
    return Replay(graph, run)


class Replay(NamedTuple):
    """A graph and what it was captured from: the graph holds addresses alone, and what `run` made before the capture
    must live as long as the graph does."""

    graph: torch.cuda.CUDAGraph
    run: Callable[[], Any]

    def __call__(self) -> None:
        self.graph.replay()


def closed_form(case: Case, inputs: Inputs, operands: torch.dtype, allow_tf32: bool, device: str) -> Callable[[], Any]:
    """All T moves from torch's ops, captured in one CUDA graph on a GPU."""
    with tf32(allow_tf32):
        return captured(ClosedForm(case, inputs, operands).run, device)


def compiled(case: Case, inputs: Inputs) -> Callable[[], Any]:
    """The closed form's step by torch.compile, in its own CUDA graphs."""
    form = ClosedForm(case, inputs)
    step = torch.compile(form.step, mode="reduce-overhead")

    def run() -> None:
        form.start()
        for _ in range(case.steps):
            torch.compiler.cudagraph_mark_step_begin()
            step()

    return run


def thorough(case: Case) -> bool:
    """Whether what takes long to compile is part of the case's row."""
    return case.widths == M1 and case.output == "gaussian" and case.batch in COMPILED


def baselines(case: Case, inputs: Inputs, device: str) -> dict[str, Callable[[], Any]]:
    """What there is to beat."""
    found: dict[str, Callable[[], Any]] = {
        "eager autograd": lambda: eager_autograd(case, inputs, weight_gradients=False),
        "closed form fp32, graph": closed_form(case, inputs, torch.float32, False, device),
        "closed form tf32, graph": closed_form(case, inputs, torch.float32, True, device),
        "closed form bf16, graph": closed_form(case, inputs, torch.bfloat16, False, device),
    }
    if device == "cuda" and thorough(case):
        found["torch.compile"] = compiled(case, inputs)
    return found


def measure(case: Case, device: str, rounds: int, repeats: int) -> dict[str, Any]:
    """One case's row: accuracy of each variant, seconds of each method in interleaved rounds."""
    inputs, truth = make(case, device=device), truth_of(case, device)
    precisions = ALL_PRECISIONS if thorough(case) else PRECISIONS
    plain = plain_errors(case, inputs, truth, precisions)
    accuracy: dict[str, Any] = {}
    timers = {name: timer_of(run, device) for name, run in baselines(case, inputs, device).items()}
    for variant in variants(device, precisions):
        try:
            accuracy[variant.name] = gate(case, inputs, variant, truth, plain)
        except (RuntimeError, ValueError) as error:  # a kernel that does not run is a finding, not the end of the gate
            accuracy[variant.name] = {"passes": False, "error": str(error)[:500]}
        if accuracy[variant.name]["passes"]:
            run = partial(_run, case, inputs, variant)
            timers[variant.name] = timer_of(run, device)
            timers[f"{variant.name}, in a graph"] = timer_of(captured(run, device), device)
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name] += timer(repeats)
    return {"case": asdict(case), "flops": case.flops, "accuracy": accuracy, "seconds": seconds}


def _run(case: Case, inputs: Inputs, variant: Variant) -> None:
    with variant.chosen():
        infer(case, inputs, variant.precision)
