# SPDX-License-Identifier: MIT
"""For scripts written for other predictive-coding libraries: a marker with a trainer, and one call that fills `.grad`.

    from pc_runner.compat import PCLayer, PCTrainer      # markers in a Sequential, a trainer with update lists
    from pc_runner.compat import pc_infer                # pc_infer(model, loss_fn, x, y, "Strict"|"FixedPred"|"Exact")

Both run on `PCNetwork.infer`: no optimiser is made per batch and no weight gradient inside the steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pc_runner.distributions import Pair
from pc_runner.inference import Result
from pc_runner.moves import Adam
from pc_runner.network import PCNetwork
from pc_runner.node import PCNode, fail

Times = str | Sequence[int]
LossFn = Callable[[Tensor, Tensor], Tensor]


class PCLayer(PCNode):
    """The marker: a Gaussian node where it stands. Its energy is 1/2 sum (x - mu)^2, x the value that it holds."""

    def __init__(self) -> None:
        super().__init__("gaussian")
        self._x: Tensor | None = None

    def get_x(self) -> Tensor | None:
        """The value of the last inference, (B, ...); None before the first."""
        return self._x


class _Loss(Pair):
    """The energy of an output whose loss is any function: loss_fn(mu, target), summed over the samples as it comes."""

    def __init__(self, loss_fn: LossFn):
        object.__setattr__(self, "loss_fn", loss_fn)
        object.__setattr__(self, "samples", None)

    def energy(self, phi: Tensor, mu: Tensor, held: bool = False, seed: int = 0) -> Tensor:
        if not held:
            fail("y", "a target for the loss", None, "pass one")
        loss = self.loss_fn(mu, phi)  # type: ignore[attr-defined]
        if loss.ndim == 0:  # a sum over the batch: shared out, since only its sum is used
            return loss.expand(mu.shape[0]) / mu.shape[0]
        return loss.flatten(1).sum(1) if loss.ndim > 1 else loss


class PCTrainer:
    """A trainer with the lists that say at which of the T steps values and weights move.

    model: a module with `PCLayer`s. T: steps per batch.
    update_x_at, update_p_at: "all", "last", "never", "last_half" (of T), or a list of steps 0..T-1. Values move at the
    steps of the first; weights only at the last step ("last") or at every step ("all": incremental predictive coding).
    optimizer_x_fn, optimizer_x_kwargs: torch.optim.SGD or torch.optim.Adam and its lr, momentum, betas, eps.
    optimizer_p_fn, optimizer_p_kwargs: any class of torch.optim for the weights.

    Raises ValueError for lists that have no counterpart here, naming them.
    """

    def __init__(
        self, model: nn.Module, T: int, *, optimizer_x_fn: Any = torch.optim.SGD,
        optimizer_x_kwargs: dict[str, Any] | None = None, update_x_at: Times = "all",
        optimizer_p_fn: Any = torch.optim.Adam, optimizer_p_kwargs: dict[str, Any] | None = None,
        update_p_at: Times = "all",
    ):  # fmt: skip
        if not any(isinstance(module, PCLayer) for module in model.modules()):
            fail("model", "at least one PCLayer inside", "none", "put one where a value belongs")
        self.model, self.T = model, T
        self._steps, self._incremental, self._learns = _schedule(T, update_x_at, update_p_at)
        self._moves = _moves(optimizer_x_fn, dict(optimizer_x_kwargs or {"lr": 0.1}))
        self.optimizer_p = optimizer_p_fn(model.parameters(), **(optimizer_p_kwargs or {"lr": 1e-3}))
        self._net: tuple[LossFn, PCNetwork] | None = None

    def train_on_batch(self, inputs: Tensor, loss_fn: LossFn, targets: Tensor) -> dict[str, Any]:
        """One batch: values settle on F + loss, then the weights step, as the lists say.

        loss_fn(outputs, targets): a sum over the batch, or one number per sample or entry; not a mean, which would make
        the values' learning rate depend on the batch size. The weights' gradient is summed over the batch.
        Returns {"loss": of the last step, "energy": (steps + 1,), F with the loss, batch sums}.
        """
        net = self._network(loss_fn)
        self.optimizer_p.zero_grad()
        settings: dict[str, Any] = {"steps": self._steps, **self._moves}
        if self._incremental:
            return self._report(net.infer(inputs, targets, algorithm="ipc", optimizer=self._summed(inputs), **settings))
        result = net.infer(inputs, targets, **settings)
        if self._learns:
            net.backward(result)
            _scale(self.model, len(inputs))
            self.optimizer_p.step()
        return self._report(result)

    def _network(self, loss_fn: LossFn) -> PCNetwork:
        if self._net is None or self._net[0] is not loss_fn:
            self._net = loss_fn, PCNetwork(self.model, output=PCNode(_Loss(loss_fn)))
        return self._net[1]

    def _summed(self, inputs: Tensor) -> Any:
        """The weights' optimiser on sums instead of means over the batch."""
        trainer, batch = self, len(inputs)

        class Summed:
            def zero_grad(self) -> None:
                trainer.optimizer_p.zero_grad()

            def step(self) -> None:
                _scale(trainer.model, batch)
                trainer.optimizer_p.step()

        return Summed()

    def _report(self, result: Result) -> dict[str, Any]:
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, PCLayer)}
        for name, phi in zip(result.names, result.phis, strict=True):
            if name in layers:
                layers[name]._x = phi
        assert result.energy is not None  # traced
        batch = len(result.phis[0])
        return {"loss": batch * result.energy[-1, -1], "energy": batch * result.energy.sum(1)}


def _schedule(T: int, update_x_at: Times, update_p_at: Times) -> tuple[int, bool, bool]:
    """(moves of the values, whether the weights move at each of them, whether they move at all)."""
    xs, ps = _times("update_x_at", T, update_x_at), _times("update_p_at", T, update_p_at)
    if xs and xs != list(range(xs[0], T)) and xs != list(range(len(xs))):
        fail("update_x_at", "steps in a row", xs, "values at rest between two moves change nothing")
    if ps == xs and len(ps) > 1:
        return len(xs), True, True
    if ps in ([], [T - 1]):
        moves = len(xs) - 1 if ps and xs and xs[-1] == T - 1 else len(xs)
        return moves, False, bool(ps)
    return fail("update_p_at", "'never', 'last', or the steps of update_x_at", ps, "other schedules are not run here")


def _times(name: str, T: int, at: Times) -> list[int]:
    named = {"all": range(T), "last": range(T - 1, T), "never": range(0), "last_half": range(T // 2, T)}
    if isinstance(at, str):
        if at not in named:
            fail(name, f"one of {', '.join(named)}, or a list of steps", repr(at), "steps count from 0")
        return list(named[at])
    found = sorted(at)
    if any(not 0 <= t < T for t in found):
        fail(name, f"steps within 0..{T - 1}", found, "steps count from 0")
    return found


def _moves(kind: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """`infer`'s arguments for an optimiser of the values."""
    if kind not in (torch.optim.SGD, torch.optim.Adam):
        fail("optimizer_x_fn", "torch.optim.SGD or torch.optim.Adam", getattr(kind, "__name__", kind), "choose one")
    known = ("lr", "momentum") if kind is torch.optim.SGD else ("lr", "betas", "eps")
    unknown = [name for name in settings if name not in known]
    if unknown:
        fail("optimizer_x_kwargs", f"names out of {', '.join(known)}", unknown[0], "others do not move values here")
    lr = settings.pop("lr", 0.1)
    return {"lr": lr, **settings} if kind is torch.optim.SGD else {"lr": lr, "state_optimizer": Adam(**settings)}


def _scale(model: nn.Module, factor: float) -> None:
    torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], factor)  # type: ignore[attr-defined]


MODES = {"Strict": "pc", "FixedPred": "fixed_prediction", "Exact": "zil"}


def pc_infer(
    model: nn.Sequential, loss_fn: LossFn, x: Tensor, y: Tensor, mode: str = "Strict", eta: float = 0.1, n: int = 20
) -> Result:
    """Fill p.grad (add to it) with the gradient by predictive coding of a Sequential, one value per child module.

    loss_fn(outputs, y): a mean over the batch, as nn.CrossEntropyLoss(), or a sum (`reduction="sum"`); p.grad is the
    gradient of that loss's network. mode: "Strict" (plain predictive coding), "FixedPred" (fixed predictions), "Exact"
    (backpropagation's gradient by local moves). eta: learning rate of the values. n: steps ("Exact" needs neither).

    Returns the inference's `Result`. Raises ValueError for another mode.
    """
    if mode not in MODES:
        fail("mode", f"one of {', '.join(MODES)}", repr(mode), "'Strict' is plain predictive coding")
    if not isinstance(model, nn.Sequential) or len(model) < 2:
        fail(
            "model",
            "a Sequential of at least two modules",
            type(model).__name__,
            "a value stands between two",
            TypeError,
        )
    mean = _is_mean(loss_fn)
    batch = len(x)
    summed: LossFn = (lambda out, target: loss_fn(out, target) * batch) if mean else loss_fn
    children: list[nn.Module] = []
    for child in list(model)[:-1]:
        children += [child, PCNode("gaussian")]
    net = PCNetwork(nn.Sequential(*children, model[-1]), output=PCNode(_Loss(summed)))
    settings = {} if mode == "Exact" else {"lr": eta, "steps": n}
    result = net.infer(x, y, algorithm=MODES[mode], **settings)
    before = [p.grad for p in model.parameters()]
    net.zero_grad()
    net.backward(result)
    _add(model.parameters(), before, 1.0 if mean else float(batch))
    return result


def _is_mean(loss_fn: LossFn) -> bool:
    """Losses of torch say how they reduce; functions are taken to have torch's default, the mean."""
    reduction = getattr(loss_fn, "reduction", None)
    if reduction is None and "reduction" in inspect.signature(loss_fn).parameters:
        reduction = inspect.signature(loss_fn).parameters["reduction"].default
    return reduction in (None, "mean")


def _add(parameters: Iterable[nn.Parameter], before: Sequence[Tensor | None], factor: float) -> None:
    for parameter, old in zip(parameters, before, strict=True):
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
            if old is not None:
                parameter.grad.add_(old)
        else:
            parameter.grad = old
