# SPDX-License-Identifier: MIT
"""Pictures of images, clouds of points and distributions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def grid(path: Path, rows: Mapping[str, Tensor], shape: tuple[int, int, int], title: str) -> None:
    """Write a PNG: a line of images per entry of `rows` (its label: images (N, C * H * W) in [0, 1]).

    shape: (C, H, W) of one image, C 1 or 3.
    """
    from matplotlib.figure import Figure  # not at import: matplotlib takes a second

    channels, height, width = shape
    lines = []
    for images in rows.values():
        planes = images.detach().clamp(0, 1).view(len(images), channels, height, width)
        padded = torch.nn.functional.pad(planes, (0, 1, 0, 1), value=0.5)
        lines.append(padded.permute(2, 0, 3, 1).flatten(1, 2))
    whole = torch.cat(lines).squeeze(-1).numpy()
    high, wide = whole.shape[:2]
    size = 10.0 / max(len(images) for images in rows.values())
    figure = Figure(figsize=(1.4 + size * wide / (width + 1), 0.7 + size * high / (height + 1)), layout="constrained")
    ax = figure.subplots()
    ax.imshow(whole, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_yticks([(i + 0.5) * (height + 1) for i in range(len(rows))], list(rows))
    ax.set_xticks([])
    ax.set_title(title)
    _save(figure, path)


def scatter(path: Path, panels: Mapping[str, Tensor], labels: Tensor, title: str) -> None:
    """Write a PNG: a panel of points (N, 2) per entry of `panels`, coloured by labels (N,), 0 to 9."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.8 + 5.2 * len(panels), 5.0), layout="constrained")
    scale = ScalarMappable(Normalize(-0.5, 9.5), "tab10")
    for ax, (name, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        ax.scatter(points[:, 0], points[:, 1], c=scale.to_rgba(labels.numpy()), s=5)
        ax.set(title=name, xticks=[], yticks=[])
    figure.colorbar(scale, ax=figure.axes, ticks=range(10), label="class", boundaries=[i - 0.5 for i in range(11)])
    figure.suptitle(title)
    _save(figure, path)


def histograms(path: Path, values: Mapping[str, Tensor], label: str) -> None:
    """Write a PNG: the distributions of positive numbers, one above the other, on a logarithmic axis."""
    from matplotlib.figure import Figure

    flat = {name: entries.flatten().numpy() for name, entries in values.items()}
    low, high = min(v.min() for v in flat.values()), max(v.max() for v in flat.values())
    bins = np.geomspace(low, high, 81)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    ax = figure.subplots()
    for (name, entries), colour in zip(flat.items(), ("black", "tab:blue", "tab:red"), strict=False):
        ax.hist(entries, bins=bins, histtype="step", color=colour, label=name, density=False)
    ax.set(xscale="log", xlabel=label, ylabel="entries")
    ax.legend()
    _save(figure, path)


def _save(figure: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)  # type: ignore[attr-defined]
