# SPDX-License-Identifier: MIT
"""The closed form under JAX's jit, layer 1 hoisted, in a process of its own that is asked for one timing at a time.

Reads lines {"case": ...} and {"time": n} on stdin, answers a JSON line each. Needs `pip install jax`.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from typing import Any


def compiled(spec: dict[str, Any]) -> Any:
    """A function of no arguments that runs the T steps and waits for them."""
    jax, jnp = import_module("jax"), import_module("jax.numpy")
    keys = jax.random.split(jax.random.PRNGKey(0), len(spec["widths"]))
    pairs = list(zip(spec["widths"], spec["widths"][1:], strict=False))
    weights = [jax.random.normal(k, (a, b)) / a**0.5 for k, (a, b) in zip(keys, pairs, strict=False)]
    biases = [jnp.zeros(b) for _, b in pairs]
    x = jax.random.uniform(keys[-1], (spec["batch"], spec["widths"][0]))
    target = jax.nn.one_hot(jnp.arange(spec["batch"]) % spec["widths"][-1], spec["widths"][-1])
    categorical, lr, steps, top = spec["output"] == "categorical", spec["lr"], spec["steps"], len(pairs) - 1

    def delta(l: int, mu: Any, phi: Any) -> Any:
        if l == top and categorical:
            return jax.nn.softmax(mu) - target
        return (mu - (target if l == top else phi)) * (1 - mu * mu)

    def infer(weights: Any, biases: Any, x: Any) -> Any:
        mu1 = jnp.tanh(x @ weights[0] + biases[0])

        def predict(phis: Any) -> list[Any]:
            mus = [mu1]
            for l in range(1, top + 1):
                a = phis[l - 1] @ weights[l] + biases[l]
                mus.append(a if l == top and categorical else jnp.tanh(a))
            return mus

        def move(_: int, phis: Any) -> Any:
            mus = predict(phis)
            deltas = [delta(l, mus[l], phis[l] if l < top else None) for l in range(top + 1)]
            return [phis[l] - lr * (phis[l] - mus[l] + deltas[l + 1] @ weights[l + 1].T) for l in range(top)]

        start = [mu1]
        for l in range(1, top):
            start.append(jnp.tanh(start[-1] @ weights[l] + biases[l]))
        phis = jax.lax.fori_loop(0, steps, move, start)
        mus = predict(phis)
        return phis, [delta(l, mus[l], phis[l] if l < top else None) for l in range(top + 1)]

    run = jax.jit(infer)
    jax.block_until_ready(run(weights, biases, x))
    return lambda: jax.block_until_ready(run(weights, biases, x))


def main() -> None:
    """Serve until stdin ends."""
    run: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if "case" in request:
            run = compiled(request["case"])
            answer: Any = {"ready": True}
        else:
            seconds = []
            for _ in range(request["time"]):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            answer = {"seconds": seconds}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
