# SPDX-License-Identifier: MIT
"""`python -m benchmarks.experiments NAME --data-dir DIR`: runs on MNIST behind the README's section on modules.

conv        a LeNet trained by `pc` and by `bp`, same start, same batches
deep        a 32-layer residual MLP: plain `pc` falls behind, `epc` trains
memory      half-occluded digits completed by clamping the visible half
variances   a classifier whose log variances are learned

Each writes modules_NAME.json (command, machine, all figures) and, where there is something to see, modules_NAME.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from pc_runner import PCNetwork, PCNode
from pc_runner.config import machine
from pc_runner.data import Images, batches, load_images
from pc_runner.residual import residual_mlp
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Of the feed-forward prediction, on at most the given images."""
    with torch.no_grad():
        right = sum(int((net(a).argmax(1) == b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))
    return right / len(y)


def train(
    net: PCNetwork, images: Images, args: argparse.Namespace, infer: dict[str, Any], lr: float,
    target: Callable[[Tensor], Tensor] = lambda y: y, every: int = 0, label: str = "",
) -> list[Row]:  # fmt: skip
    """One inference and one Adam step per batch; a row per epoch, or `every` so many batches."""
    spreads = [p for name, p in net.named_parameters() if name.endswith("log_var")]
    weights = [p for name, p in net.named_parameters() if not name.endswith("log_var")]
    optimizer = torch.optim.Adam([{"params": weights}, {"params": spreads, "lr": 10 * lr}], lr=lr)
    rows: list[Row] = []
    began, step = time.perf_counter(), 0
    for epoch in range(args.epochs):
        order = list(batches(len(images.x_train), args.batch_size, seed=args.seed, epoch=epoch))
        for index in order:
            x, y = images.x_train[index], images.y_train[index]
            result = net.infer(x.view(-1, *images.shape), target(y), trace=False, **infer)
            optimizer.zero_grad()
            net.backward(result)
            optimizer.step()
            step += 1
            if step % (every or len(order)) == 0:
                shaped = images.x_test.view(-1, *images.shape)
                found = accuracy(net, shaped[: args.test], images.y_test[: args.test])
                rows.append({"step": step, "accuracy": found, "seconds": round(time.perf_counter() - began, 1)})
                print(f"{label} step {step}: {100 * found:.2f} %, {rows[-1]['seconds']} s", flush=True)
    return rows


class LeNet(nn.Module):
    """LeNet-5 on 28 x 28: a Gaussian node behind each pooled convolution and hidden linear layer."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.f1, self.f2, self.out = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)
        self.n = nn.ModuleList(PCNode("gaussian") for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.n[0](F.max_pool2d(torch.relu(self.c1(x)), 2))
        h = self.n[1](F.max_pool2d(torch.relu(self.c2(h)), 2))
        h = self.n[2](torch.relu(self.f1(h.flatten(1))))
        return self.out(self.n[3](torch.relu(self.f2(h))))


def conv(images: Images, args: argparse.Namespace) -> Row:
    """Test accuracy after every epoch, `pc` (T = 8, phi lr 0.1) beside `bp`."""
    runs = {}
    for algorithm in ("bp", "pc"):
        torch.manual_seed(args.seed)
        net = PCNetwork(LeNet(), output="categorical")
        settings = {"algorithm": algorithm, "steps": args.steps or 8, "lr": args.phi_lr or 0.1}
        runs[algorithm] = train(net, images, args, settings, 1e-3, label=f"conv {algorithm}")
    last = {name: rows[-1]["accuracy"] for name, rows in runs.items()}
    return {"runs": runs, "last": last, "difference_points": 100 * (last["pc"] - last["bp"])}


DEEP = {  # name: (muPC, algorithm, steps, phi lr, weight lr)
    "BP": (False, "bp", 0, 0.1, 1e-3),
    "ePC": (False, "epc", 8, 0.001, 1e-3),
    "pc": (False, "pc", 32, 0.1, 1e-3),
}


def deep(images: Images, args: argparse.Namespace) -> Row:
    """Test accuracy along training of 32 layers of width 64."""
    runs = {}
    for name, (mupc, algorithm, steps, phi_lr, lr) in DEEP.items():
        if args.only and args.only != name:
            continue
        torch.manual_seed(args.seed)
        net = residual_mlp(784, 64, 32, 10, mupc=mupc)
        settings = {"algorithm": algorithm, "steps": args.steps or steps, "lr": args.phi_lr or phi_lr}
        one_hot = lambda y: F.one_hot(y, 10).float()  # noqa: E731
        try:
            runs[name] = train(net, images, args, settings, args.lr or lr, one_hot, every=25, label=f"deep {name}")
        except Exception as error:
            runs[name] = []
            print(f"deep {name}: {error}", flush=True)
    document = {"runs": runs, "settings": {name: list(value) for name, value in DEEP.items()}}
    if not args.only:
        curve(runs, args.out / "modules_deep.png")
    return document


def curve(runs: dict[str, list[Row]], path: Path) -> None:
    """Test accuracy over batches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2), dpi=90, layout="constrained")
    for name, rows in runs.items():
        axes.plot([r["step"] for r in rows], [100 * r["accuracy"] for r in rows], label=name)
    axes.set(xlabel="batches of 128", ylabel="test accuracy %", title="residual MLP, 32 layers of 64, MNIST")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def memory(images: Images, args: argparse.Namespace) -> Row:
    """A generative network stores images; the visible half of one then recalls the other half."""
    torch.manual_seed(args.seed)
    count = 32
    stored = images.x_train[:count]
    net = PCNetwork.from_sequential(
        nn.Sequential(nn.Linear(1, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 784), nn.Sigmoid()),
        energy=["gaussian"] * 3,
    )
    x = torch.zeros(count, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(args.epochs * 100):
        result = net.infer(x, stored, steps=args.steps or 32, lr=args.phi_lr or 0.2, trace=step % 100 == 0)
        optimizer.zero_grad()
        net.backward(result)
        optimizer.step()
        if result.energy is not None:
            print(f"memory step {step}: F {float(result.energy[-1].sum()):.3f}", flush=True)
    visible = torch.zeros(784, dtype=torch.bool)
    visible[:392] = True
    cue = torch.where(visible, stored, net(x).detach())
    recalled = net.infer(
        x, phis=[None, None, cue], clamp=[None, None, visible], steps=3000, lr=args.phi_lr or 0.2, trace=False
    ).phis[-1]
    before, after = ((image - stored)[:, 392:].square().mean(1) for image in (cue, recalled))
    picture(torch.where(visible, stored, 0.0)[:8], recalled[:8], stored[:8], args.out / "modules_memory.png")
    nearest = torch.cdist(recalled[:, 392:], stored[:, 392:]).argmin(1)
    return {
        "images": count, "hidden_half_mse_before": float(before.mean()), "hidden_half_mse_after": float(after.mean()),
        "recalled_nearest_to_its_own": float((nearest == torch.arange(count)).float().mean()),
    }  # fmt: skip


def picture(cue: Tensor, recalled: Tensor, stored: Tensor, path: Path) -> None:
    """Three rows: what was shown, what was recalled, what had been stored."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, len(cue), figsize=(len(cue) * 0.8, 2.6), dpi=80, layout="constrained")
    for row, (name, images) in enumerate({"shown": cue, "recalled": recalled, "stored": stored}.items()):
        for column, image in enumerate(images):
            axes[row, column].imshow(image.view(28, 28), cmap="gray", vmin=0, vmax=1)
            axes[row, column].set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(name, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def variances(images: Images, args: argparse.Namespace) -> Row:
    """784-128-128-10, tanh, the output `gaussian_diag` (Eq. 5): the variances that training arrives at.

    Hidden nodes stay at unit variance: theirs would follow their ever smaller errors, and the states' moves with them.
    """
    torch.manual_seed(args.seed)
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)
    )
    net = PCNetwork.from_sequential(module, energy=["gaussian", "gaussian", "gaussian_diag"])
    settings = {"steps": args.steps or 16, "lr": args.phi_lr or 0.02}
    rows = train(net, images, args, settings, 1e-3, lambda y: F.one_hot(y, 10).float(), label="variances")
    found = cast("Tensor", net.nodes[-1].log_var).detach().exp()
    with torch.no_grad():
        squared = (F.one_hot(images.y_test, 10).float() - net(images.x_test.view(-1, *images.shape))).square().mean(0)
    print("variance by digit:", [round(v, 4) for v in found.tolist()])
    print("test error squared:", [round(v, 4) for v in squared.tolist()])
    return {"rows": rows, "variances": found.tolist(), "test_squared_error": squared.tolist()}


EXPERIMENTS = {"conv": conv, "deep": deep, "memory": memory, "variances": variances}


def main() -> None:
    """Run one, write its JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--limit", type=int, help="the first N training images")
    parser.add_argument("--test", type=int, default=10_000, help="the first N test images")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=0, help="T, if not the experiment's own")
    parser.add_argument("--phi-lr", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=0.0)
    parser.add_argument("--only", default="", help="deep: one of its runs, for trying")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    images = load_images("mnist", args.data_dir, args.limit)
    found = EXPERIMENTS[args.name](images, args)
    shown = [entry if entry != args.data_dir else "DIR" for entry in sys.argv[1:]]
    command = " ".join(["python -m benchmarks.experiments", *shown])
    document = {"experiment": args.name, "command": command, "machine": machine(), **found}
    (args.out / f"modules_{args.name}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
