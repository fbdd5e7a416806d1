# SPDX-License-Identifier: MIT
"""linear_softmax_errors on the CPU: the numbers, the dtypes, the memory, the messages."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import astuple, replace
from typing import Any
from weakref import ref

import pytest
import torch
from inputs import ramp, visible
from linear_softmax_truth import Problem, distance, problem, truth
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pc_kernels as pck
from pc_kernels.backends import reference_linear_softmax as reference

OP = torch.ops.pc_kernels.linear_softmax_errors
KINDS = ("index", "soft", "mass")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on both backends of the CPU."""
    with pck.use_backend(request.param):
        yield request.param


def run(given: Problem, **options: Any) -> pck.LinearSoftmaxErrors:
    v, weight, bias, target, mask = (getattr(given, name) for name in ("v", "weight", "bias", "target", "mask"))
    return pck.linear_softmax_errors(v, weight, bias, target, mask=mask, **options)


def same(got: pck.LinearSoftmaxErrors, want: list[Tensor | None], rtol: float = 1e-11, atol: float = 1e-13) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


# ---------------------------------------------------------------- numbers


@pytest.mark.usefixtures("backend")
@pytest.mark.usefixtures("poison", "one_thread")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 7, 129, 1031])
@pytest.mark.parametrize("width", [1, 5, 128])
@pytest.mark.parametrize("energy", ["categorical", "gaussian"])
def test_float64_is_exact(kind: str, classes: int, width: int, energy: str, gen: torch.Generator) -> None:
    for rows, bias, masked in itertools.product([(1,), (2, 3, 4)], [False, True], [False, True]):
        given = problem(gen, rows, classes, width, kind, bias, masked)
        same(run(given, energy=energy), truth(given, family=energy))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [7, 1031])
def test_squared_errors_in_float32_are_as_good_as_plain_torch(kind: str, classes: int, gen: torch.Generator) -> None:
    given = problem(gen, (40,), classes, 128, kind, masked=True, dtype=torch.float32)
    exact, plain = truth(given, family="gaussian"), truth(given, torch.float32, "gaussian")
    for got, want, beside in zip(run(given, energy="gaussian"), exact, plain, strict=True):
        assert got is not None
        assert want is not None
        assert beside is not None
        assert distance(got, want) <= 2 * distance(beside, want) + 4 * EPS


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entries", [1, 400, 1000])
def test_chunks_of_rows(kind: str, entries: int, gen: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """13 rows in chunks of 1, 4 and 10."""
    monkeypatch.setattr(reference, "CHUNK_ENTRIES", entries)
    given = problem(gen, (13,), 100, 6, kind, masked=True)
    same(run(given), truth(given))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [7, 1031])
def test_float32_is_as_good_as_plain_torch(kind: str, classes: int, gen: torch.Generator) -> None:
    given = problem(gen, (40,), classes, 128, kind, dtype=torch.float32)
    exact, plain = truth(given), truth(given, torch.float32)
    for got, want, beside in zip(run(given), exact, plain, strict=True):
        assert got is not None
        assert want is not None
        assert beside is not None
        assert got.dtype == torch.float32
        assert distance(got, want) <= 2 * distance(beside, want) + 4 * EPS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_storage(kind: str, dtype: torch.dtype, gen: torch.Generator) -> None:
    given = problem(gen, (9,), 129, 20, kind, dtype=dtype)
    got, want = run(given), truth(given)
    assert [t.dtype for t in got if t is not None] == [torch.float32, dtype, dtype, dtype]
    for one, other, bound in zip(got, want, (1e-5, *[torch.finfo(dtype).eps] * 3), strict=True):
        assert one is not None
        assert other is not None
        assert distance(one, other) < bound


def _bits_kept(x: Tensor, bits: int) -> Tensor:
    """x rounded to so many bits of mantissa."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


@pytest.mark.parametrize(("precision", "bits"), [("tf32", 11), ("bf16", 8)])
def test_precision_rounds_the_operands(precision: str, bits: int, gen: torch.Generator) -> None:
    """The energy is exactly that of rounded v and W; the gradients have rounded deltas too."""
    given = problem(gen, (9,), 129, 128, "soft", dtype=torch.float32)
    rounded = replace(given, v=_bits_kept(given.v, bits), weight=_bits_kept(given.weight, bits))
    got, want = run(given, precision=precision), truth(rounded)
    for one, other, bound in zip(got, want, (1e-5, 2.0**-bits, 2.0**-bits, 1e-5), strict=True):
        assert one is not None
        assert other is not None
        assert distance(one, other) < bound  # 1e-5: of 16,000 numbers two lie in the middle, and may go either way
    assert distance(got.energy, run(given).energy) > 2e-5


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(kind: str, gen: torch.Generator) -> None:
    given = problem(gen, (11,), 50, 8, kind, scale=1e4)
    same(run(given), truth(given), atol=1e-9)
    for got, want in zip(run(given.to(torch.float32)), truth(given.to(torch.float32)), strict=True):
        assert got is not None
        assert want is not None
        assert distance(got, want) < 1e-4  # float32 logits of 1e4 are known to 1e-3


@pytest.mark.usefixtures("backend")
def test_a_bias_of_minus_infinity_hides_a_class(gen: torch.Generator) -> None:
    given = problem(gen, (6,), 9, 4, "index")
    assert given.bias is not None
    target = given.target.clamp_max(7)
    shorter = Problem(given.v, given.weight[:8], given.bias[:8], target)
    hidden = torch.cat([given.bias[:8], torch.tensor([-math.inf], dtype=torch.float64)])
    got, want = run(Problem(given.v, given.weight, hidden, target)), truth(shorter)
    assert got.grad_weight is not None
    assert got.grad_bias is not None
    same(got._replace(grad_weight=got.grad_weight[:8], grad_bias=got.grad_bias[:8]), want)
    assert not got.grad_weight[8].any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_target_everything_is_zero(kind: str) -> None:
    """q = o: uniform probabilities, and a single class."""
    classes = 1 if kind == "index" else 4
    target = torch.zeros(3, dtype=torch.long) if kind == "index" else torch.full((3, 4), 0.25)
    got = run(Problem(torch.ones(3, 5), torch.ones(classes, 5), None, target))
    assert all(float(t.abs().max()) < 1e-6 for t in got if t is not None)
    assert float(got.energy.abs().max()) < 1e-7


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_padding_rows_does_not_matter(kind: str, gen: torch.Generator) -> None:
    given = problem(gen, (4, 6), 9, 5, kind)
    mask = torch.ones(6, dtype=torch.bool)
    mask[[1, 5]] = False
    v, target = given.v.clone(), given.target.clone()
    v[:, ~mask] = math.nan
    target[:, ~mask] = -100 if kind == "index" else math.nan
    got = run(Problem(v, given.weight, given.bias, target, mask))
    want = truth(Problem(given.v[:, mask], given.weight, given.bias, given.target[:, mask]))
    same(got._replace(energy=got.energy[:, mask], grad_v=got.grad_v[:, mask]), want)
    assert not got.energy[:, ~mask].any()
    assert not got.grad_v[:, ~mask].any()


# ---------------------------------------------------------------- shapes


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_non_contiguous_input(kind: str, gen: torch.Generator) -> None:
    given = problem(gen, (3, 4), 9, 5, kind, masked=True)
    spread = [x.repeat_interleave(2, -1)[..., ::2] for x in astuple(given)]
    assert not any(x.is_contiguous() for x in spread)
    same(run(Problem(*spread)), truth(given))
    same(run(replace(given, weight=given.weight.T.contiguous().T)), truth(given))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rows", [(0,), (2, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(rows: tuple[int, ...], kind: str) -> None:
    target = torch.zeros(rows, dtype=torch.long) if kind == "index" else torch.zeros(*rows, 7)
    got = run(Problem(torch.zeros(*rows, 5), torch.ones(7, 5), torch.ones(7), target))
    assert got.grad_weight is not None
    assert got.grad_bias is not None
    assert (got.energy.shape, got.grad_v.shape) == (rows, (*rows, 5))
    assert torch.equal(got.grad_weight, torch.zeros(7, 5))
    assert torch.equal(got.grad_bias, torch.zeros(7))


@pytest.mark.usefixtures("backend")
def test_a_single_row_without_a_batch(gen: torch.Generator) -> None:
    given = problem(gen, (), 7, 5, "index")
    same(run(given), truth(given))


@pytest.mark.usefixtures("backend")
def test_without_weight_gradients(gen: torch.Generator) -> None:
    given = problem(gen, (5,), 7, 4, "index")
    want = truth(given)
    same(run(given, weight_grads=False), [*want[:2], None, None])


# ---------------------------------------------------------------- memory


class _Alive(TorchDispatchMode):
    """The most bytes that tensors made inside, views of the inputs apart, held at any time."""

    def __init__(self, given: Problem) -> None:
        super().__init__()
        self.inputs = {
            x.untyped_storage().data_ptr()
            for x in (given.v, given.weight, given.bias, given.target, given.mask)
            if x is not None
        }
        self.tensors: list[ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor):
                self.tensors.append(ref(tensor))
        alive = [tensor for one in self.tensors if (tensor := one()) is not None]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        self.peak = max(self.peak, sum(size for place, size in held.items() if place not in self.inputs))
        return out


@pytest.mark.parametrize("kind", ["index", "soft"])
def test_the_logits_never_exist_whole(kind: str, gen: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, classes, width, entries = 256, 4001, 6, 2**17
    monkeypatch.setattr(reference, "CHUNK_ENTRIES", entries)
    given = problem(gen, (rows,), classes, width, kind, masked=True, dtype=torch.float32)
    with _Alive(given) as alive:
        reference.linear_softmax_errors(given.v, given.weight, given.bias, given.target, given.mask, True, "fp32")
    results = 4 * (2 * rows * (width + 1) + 3 * classes * (width + 1))
    chunks = 1 if kind == "index" else 3.5  # soft: the logits, the masked target, the energy's terms, a mask of them
    assert alive.peak < 4 * chunks * entries + results
    assert alive.peak < 4 * rows * classes / 2


@pytest.mark.usefixtures("backend")
def test_a_large_vocabulary_at_the_default_chunk(gen: torch.Generator) -> None:
    given = problem(gen, (2100,), 8001, 4, "index", dtype=torch.float32)
    with _Alive(given) as alive:
        reference.linear_softmax_errors(given.v, given.weight, given.bias, given.target, given.mask, True, "fp32")
    assert alive.peak < 0.6 * 4 * 2100 * 8001


# ---------------------------------------------------------------- a citizen of torch


def _op_arguments(gen: torch.Generator, kind: str, weight_grads: bool, grad: bool = False) -> tuple[Any, ...]:
    given = problem(gen, (4,), 7, 5, kind, bias=weight_grads, masked=weight_grads)
    v, weight = given.v.requires_grad_(grad), given.weight.requires_grad_(grad)
    return v, weight, given.bias, given.target, given.mask, weight_grads, "fp32"


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["index", "soft"])
@pytest.mark.parametrize("weight_grads", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(kind: str, weight_grads: bool, grad: bool, gen: torch.Generator) -> None:
    torch.library.opcheck(OP.default, _op_arguments(gen, kind, weight_grads, grad))


@pytest.mark.usefixtures("backend")
def test_it_is_not_differentiable(gen: torch.Generator) -> None:
    given = problem(gen, (4,), 7, 5, "index")
    given.v.requires_grad_()
    given.weight.requires_grad_()
    got = run(given)
    assert not any(t.requires_grad for t in got if t is not None)
    same(got, truth(given))


@pytest.mark.usefixtures("backend")
def test_compiles_whole_and_exports(gen: torch.Generator) -> None:
    given = problem(gen, (2, 3), 7, 5, "index")

    class Output(torch.nn.Module):
        def forward(self, v: Tensor, weight: Tensor, target: Tensor) -> list[Tensor | None]:
            return [2 * pck.linear_softmax_errors(v, weight, None, target).energy]

    arguments = (given.v, given.weight, given.target)
    want = [2 * truth(replace(given, bias=None))[0]]  # type: ignore[operator]
    torch._dynamo.reset()
    compiled = torch.compile(Output(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), want)
    torch.testing.assert_close(torch.export.export(Output(), arguments).module()(*arguments), want)
    torch._dynamo.reset()


# ---------------------------------------------------------------- bad input


def _good() -> dict[str, Any]:
    return {
        "v": ramp(2, 3, 5), "weight": ramp(7, 5), "bias": ramp(7), "target": torch.arange(6).view(2, 3),
        "mask": visible(2, 3), "weight_grads": True, "precision": "fp32",
    }  # fmt: skip


def _probabilities(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    target = torch.full((2, 3, 7), 1 / 7, dtype=dtype)
    target[1, 2, 3] = value
    return target


BAD = [
    ("v", None, TypeError),
    ("v", torch.tensor(1.0), ValueError),
    ("v", ramp(2, 3, 5).long(), TypeError),
    ("v", ramp(2, 3, 4), ValueError),
    ("v", ramp(2, 3, 5, dtype=torch.float64), TypeError),
    ("v", ramp(6, 5), ValueError),
    ("weight", None, TypeError),
    ("weight", ramp(5), ValueError),
    ("weight", ramp(5, 7), ValueError),
    ("weight", ramp(7, 5, dtype=torch.float64), TypeError),
    ("weight", torch.zeros(0, 5), ValueError),
    ("bias", 0.5, TypeError),
    ("bias", ramp(5), ValueError),
    ("bias", ramp(7, dtype=torch.float64), TypeError),
    ("target", [1, 2], TypeError),
    ("target", torch.full((2, 3), 7), ValueError),
    ("target", torch.full((2, 3), -100), ValueError),
    ("target", torch.zeros(6, dtype=torch.int64), ValueError),
    ("target", torch.zeros(2, 3, dtype=torch.int32), TypeError),
    ("target", _probabilities(-0.1), ValueError),
    ("target", _probabilities(0.1)[..., :6], ValueError),
    ("target", _probabilities(0.1, torch.float64), TypeError),
    ("mask", 1, TypeError),
    ("mask", torch.ones(2, 3), TypeError),
    ("mask", visible(3, 2), ValueError),
    ("mask", visible(2, 3, 7), ValueError),
    ("weight_grads", None, TypeError),
    ("weight_grads", 1, TypeError),
    ("weight_grads", "yes", TypeError),
    ("precision", "fp16", ValueError),
    ("precision", None, TypeError),
    ("precision", "bf16_delta", ValueError),
]
PARTNERS = {"v": ("weight", "target", "mask")}  # shapes or dtypes that disagree are the fault of either


@pytest.mark.parametrize(("name", "value", "kind"), BAD)
def test_bad_input_is_refused(name: str, value: Any, kind: type[Exception]) -> None:
    pck.linear_softmax_errors(**_good())
    with pytest.raises(kind) as caught:
        pck.linear_softmax_errors(**_good() | {name: value})
    message = str(caught.value)
    assert any(message.startswith(f"{argument}:") for argument in (name, *PARTNERS.get(name, ()))), message
    assert re.search("wanted .+, got .+", message)
    assert "\n" not in message


def test_reduced_precision_of_float64_is_refused(gen: torch.Generator) -> None:
    with pytest.raises(ValueError, match="precision"):
        run(problem(gen, (2,), 7, 5, "index"), precision="bf16")


def test_bad_values_in_padding_rows_are_allowed() -> None:
    mask = visible(2, 3).clone()
    mask[1, 2] = False
    for target in (torch.tensor([[0, 1, 2], [3, 4, -100]]), _probabilities(-1.0)):
        given: dict[str, Any] = _good() | {"target": target, "mask": mask}
        pck.linear_softmax_errors(**given)


def test_energy_of_probabilities_that_agree_with_a_class(gen: torch.Generator) -> None:
    """One-hot probabilities are class indices."""
    given = problem(gen, (5,), 9, 4, "index")
    soft = replace(given, target=torch.nn.functional.one_hot(given.target, 9).double())
    for one, other in zip(run(given), run(soft), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)
