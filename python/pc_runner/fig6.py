# SPDX-License-Identifier: MIT
"""`pc-run reproduce fig6`: what the autoencoders of Fig. 5 have learned, in pictures, BP's beside PC's.

Reconstructions, decodings of samples from the posterior N(u, e^s), the way from one image's code to another's, and the
codes in two dimensions; and the distribution of the posterior variances. The numbers behind them go to `fig6.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.decomposition import PCA
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from pc_runner.config import ConfigError, machine
from pc_runner.data import Images
from pc_runner.fig5 import TITLES, Fig5, phi_lrs
from pc_runner.jobs import checkpoint_of, missing, run_jobs
from pc_runner.metrics import read_rows
from pc_runner.models.vae import VAE, vae_of
from pc_runner.pictures import grid, histograms, scatter
from pc_runner.plots import table
from pc_runner.vae_run import QUANTILES, TEST_SEED, VaeRun, drawn

SHOWN, SAMPLES, STOPS, EMBEDDED = 10, 6, 9, 2000  # images, samples of each, codes on the way, images in two dimensions
PICTURES = ("reconstructions", "samples", "traversal", "latent", "variances")

Row = dict[str, Any]


class Trained(NamedTuple):
    """One network to draw."""

    title: str
    module: VAE
    about: Row  # what it is, and its figures on the test images


def run_fig6(
    wanted: Fig5,
    images: Images,
    out: Path,
    *,
    command: str = "",
    stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> Row:
    """Draw one model of one seed by every method, of the runs in `out`, as `reproduce fig5` left them; those that are
    not there are trained first. Writes `fig6_*.png` and `fig6.json`, and returns what that holds.

    Raises ConfigError for several models or seeds, for a run that diverged, and as `run_fig5` does.
    """
    for field, values in (("models", wanted.models), ("seeds", wanted.seeds)):
        if len(values) != 1:
            raise ConfigError(field, "one for a figure of pictures", len(values), "call it once for each")
    networks = _networks(wanted, images, out, command, stop=stop, progress=progress, report=report)
    document: Row = {
        "data": images.name, "note": images.note, "command": command, "machine": machine(), "model": wanted.models[0],
        "seed": wanted.seeds[0],
    }  # fmt: skip
    with torch.no_grad():
        document |= _draw(networks, images, out)
    (out / "fig6.json").write_text(json.dumps(document, indent=1) + "\n")
    return document


def _networks(
    wanted: Fig5, images: Images, out: Path, command: str, report: Callable[[str], None], **how: Any
) -> list[Trained]:
    done, rates = read_rows(out / "fig5.jsonl"), phi_lrs(wanted, read_rows(out / "sweep.jsonl"))
    jobs = [wanted.config(*pair, wanted.seeds[0], rates[pair]) for pair in wanted.pairs()]
    if any(missing(job, done) for job in jobs):
        origin = {"command": command, "machine": machine(), "note": images.note}
        run_jobs(VaeRun, jobs, images, out / "fig5.jsonl", done, origin, report=lambda row: report(_line(row)), **how)
    found = []
    for job in jobs:
        path = checkpoint_of(job, out)
        if not path.exists():
            raise ConfigError("out", f"the checkpoint of {job.name}", f"none at {path}", "choose another --out")
        run = VaeRun.resume(path, job, images)
        if not run.rows:
            raise ConfigError("phi_lr", "a rate that trains", f"{job.phi_lr:g}, which diverged", "choose a smaller one")
        about = {"phi_lr": None if job.method == "bp" else job.phi_lr, "step": run.step} | run.evaluate()
        found.append(Trained(TITLES[job.method], vae_of(run.net), about))
    return found


def _line(row: Row) -> str:
    figure = row.get("diverged") or f"test loss {row['test_loss']:.3f}"
    return f"{row['model']} {row['method']} seed {row['seed']} epoch {row['epoch']}: {figure}"


# --------------------------------------------------------------------------------------------------------- the pictures


def _draw(networks: list[Trained], images: Images, out: Path) -> Row:
    """All five pictures; the numbers, by method."""
    figures: dict[str, Row] = {}
    for net in networks:
        figures[net.title] = dict(net.about)
    chosen = one_of_each(images)
    _draw_reconstructions(networks, chosen, images, out, figures)
    _draw_samples(networks, chosen[: SHOWN // 2], images, out, figures)
    _draw_traversals(networks, chosen[[min(3, len(chosen) - 1), -1]], images, out, figures)
    _draw_codes(networks, images, out, figures)
    return {"quantiles_of_variances": list(QUANTILES), "methods": figures}


def one_of_each(images: Images) -> Tensor:
    """The first test image of every class, at most `SHOWN`."""
    first = [int((images.y_test == label).nonzero()[0]) for label in images.y_test.unique()[:SHOWN]]
    return images.x_test[first]


def _draw_reconstructions(networks: list[Trained], x: Tensor, images: Images, out: Path, figures: Row) -> None:
    rows = {"original": x}
    for net in networks:
        rows[net.title] = net.module.decode(net.module.posterior(x)[0])
        figures[net.title]["squared_errors_shown"] = _rounded(((rows[net.title] - x) ** 2).sum(1))
    grid(out / "fig6_reconstructions.png", rows, images.shape, "Decodings of the posterior's mean")


def _draw_samples(networks: list[Trained], x: Tensor, images: Images, out: Path, figures: Row) -> None:
    rows: dict[str, Tensor] = {}
    for net in networks:
        noise = drawn(SAMPLES, net.module.latent, TEST_SEED, 1)
        found = samples(net.module, x, noise)
        figures[net.title]["pixel_deviation_of_samples"] = round(float(found.std(1).mean()), 5)
        means = net.module.decode(net.module.posterior(x)[0])
        for i in range(len(x)):
            rows[f"{net.title} {i}"] = torch.cat([x[i : i + 1], means[i : i + 1], found[i]])
    grid(out / "fig6_samples.png", rows, images.shape, f"Image, posterior's mean, {SAMPLES} samples of the posterior")


def samples(module: VAE, x: Tensor, noise: Tensor) -> Tensor:
    """(B, S, P): decodings of z = u + e^(s/2) n for images (B, P) and every row of noise (S, latent)."""
    u, s = module.posterior(x)
    z = u[:, None] + (0.5 * s).exp()[:, None] * noise
    return module.decode(z.flatten(0, 1)).unflatten(0, (len(x), len(noise)))


def _draw_traversals(networks: list[Trained], ends: Tensor, images: Images, out: Path, figures: Row) -> None:
    rows = {}
    for net in networks:
        rows[net.title] = way = traversal(net.module, ends, STOPS)
        figures[net.title]["lengths_of_traversal_steps"] = _rounded((way[1:] - way[:-1]).square().sum(1).sqrt())
    grid(out / "fig6_traversal.png", rows, images.shape, "Decodings on the line between two images' codes")


def traversal(module: VAE, ends: Tensor, stops: int) -> Tensor:
    """(stops, P): decodings on the straight line between the codes' means of two images (2, P)."""
    u = module.posterior(ends)[0]
    along = torch.linspace(0, 1, stops, dtype=u.dtype)[:, None]
    return module.decode((1 - along) * u[:1] + along * u[1:])


def _draw_codes(networks: list[Trained], images: Images, out: Path, figures: Row) -> None:
    """The codes in two dimensions, and how well they tell the classes apart; the variances of all test images."""
    x, y = images.x_test[:EMBEDDED], images.y_test[:EMBEDDED]
    clouds, widths = {}, {}
    for net in networks:
        codes = net.module.posterior(x)[0]
        points, how = embed(codes)
        clouds[f"{net.title}, {how}"] = points
        every = net.module.posterior(images.x_test)[1].exp()
        widths[net.title] = every
        figures[net.title] |= {
            "embedding": how,
            "neighbours_accuracy": neighbours(codes, y),
            "variances_median_by_entry": _rounded(every.median(0).values),
            "points": [_rounded(point, 2) for point in points],
        }
    scatter(out / "fig6_latent.png", clouds, y, f"Posterior means of {len(x):,} test images")
    histograms(out / "fig6_variances.png", widths, "posterior variance of an entry of the code, all test images")


def embed(codes: Tensor, seed: int = 0) -> tuple[Tensor, str]:
    """Codes (N, D) in two dimensions (N, 2), and by what: UMAP, or PCA where umap-learn is not installed."""
    try:
        umap = import_module("umap")
    except ImportError:
        return torch.from_numpy(PCA(2, random_state=seed).fit_transform(codes.numpy())), "PCA (umap-learn is missing)"
    found = umap.UMAP(n_components=2, random_state=seed, n_jobs=1).fit_transform(codes.numpy())
    return torch.as_tensor(found), "UMAP"


def neighbours(codes: Tensor, y: Tensor) -> float:
    """How often the five nearest codes name the class, 0 to 1, in five-fold cross-validation."""
    return float(cross_val_score(KNeighborsClassifier(5), codes.numpy(), y.numpy(), cv=5).mean())


def _rounded(values: Tensor, digits: int = 4) -> list[float]:
    return [round(float(value), digits) for value in values]


def show(document: Row) -> str:
    """The numbers as a table."""
    return table(
        [
            {
                "method": title,
                "test loss": f"{row['test_loss']:.3f}",
                "variances, 5 %": f"{row['variances'][1]:.4f}",
                "median": f"{row['variances'][3]:.4f}",
                "95 %": f"{row['variances'][5]:.4f}",
                "5 neighbours": f"{100 * row['neighbours_accuracy']:.1f} %",
                "codes drawn by": row["embedding"],
            }
            for title, row in document["methods"].items()
        ]
    )
