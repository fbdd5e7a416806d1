# SPDX-License-Identifier: MIT
"""`pc-run reproduce fig5` and `fig6`: pieces against the whole, the sweep, what the summary and the pictures say."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pc_runner.cli import main
from pc_runner.config import VAES, ConfigError, VaeConfig
from pc_runner.data import Images, load_images
from pc_runner.fig5 import Fig5, phi_lrs, run_fig5
from pc_runner.fig6 import PICTURES, embed, neighbours, one_of_each, run_fig6, samples, traversal
from pc_runner.metrics import read_rows
from pc_runner.models.vae import build, vae_of
from pc_runner.pictures import grid
from pc_runner.train import Interrupted
from pc_runner.vae_run import QUANTILES

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = VaeConfig(limit=100, steps=3, theta_lr=1e-3, epochs=2)
OPTIONS = ["--limit", "100", "--steps", "3", "--theta-lr", "1e-3", "--threads", "1"]
TIMES = ("ms_per_step", "seconds", "command", "machine")


@pytest.fixture(scope="module")
def images() -> Images:
    return load_images("digits", limit=100)


def _timeless(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(path)]


def test_pieces_equal_the_whole(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    several = ["reproduce", "fig5", *OPTIONS, "--seeds", "0,1"]
    assert main([*several, "--epochs", "1", "--out", "pieces"]) == 0
    asked = iter(range(1000))
    with pytest.raises(Interrupted):
        run_fig5(Fig5(BASE, seeds=(0, 1)), images, tmp_path / "pieces", stop=lambda: next(asked) == 6, progress=False)
    assert main([*several, "--epochs", "2", "--out", "pieces"]) == 0
    assert main([*several, "--epochs", "2", "--out", "whole"]) == 0
    rows = [sorted(_timeless(tmp_path / name / "fig5.jsonl"), key=str) for name in ("pieces", "whole")]
    assert rows[0] == rows[1]
    assert len(rows[1]) == len(VAES) * 2 * 2 * 2
    before = (tmp_path / "whole" / "fig5.jsonl").read_bytes()
    assert main([*several, "--epochs", "2", "--out", "whole"]) == 0
    assert (tmp_path / "whole" / "fig5.jsonl").read_bytes() == before
    assert (tmp_path / "whole" / "fig5.png").read_bytes().startswith(b"\x89PNG")
    _check_summary(rows[1], json.loads((tmp_path / "whole" / "fig5.json").read_text()), capsys.readouterr().out)


def _check_summary(rows: list[dict[str, Any]], document: dict[str, Any], said: str) -> None:
    last = [row for row in rows if row["epoch"] == 2]
    for entry in document["summary"]:
        mine = [r for r in last if (r["model"], r["method"]) == (entry["model"], entry["method"])]
        losses = [row["test_loss"] for row in mine]
        assert entry["test_loss"] == pytest.approx(np.mean(losses))
        assert (entry["lowest"], entry["highest"]) == (min(losses), max(losses))
        assert entry["variances"] == pytest.approx(np.mean([row["variances"] for row in mine], 0))
        assert len(entry["variances"]) == len(QUANTILES)
        assert f"{entry['test_loss']:.3f}" in said
    for bp, pc in zip(document["summary"][::2], document["summary"][1::2], strict=True):
        assert (bp["method"], pc["method"], bp["phi_lr"]) == ("bp", "pc_fkl", None)
        assert pc["percent_from_bp"] == pytest.approx(100 * (pc["test_loss"] - bp["test_loss"]) / bp["test_loss"])


def test_the_sweep_chooses_the_least_loss(images: Images, tmp_path: Path) -> None:
    wanted = Fig5(BASE, ("vae",), seeds=(0,), sweep=True, sweep_lrs=(0.0, 0.05, 1e9), sweep_epochs=1)
    document = run_fig5(wanted, images, tmp_path, progress=False)
    swept = read_rows(tmp_path / "sweep.jsonl")
    assert [(row["method"], row["phi_lr"]) for row in swept] == [
        ("bp", 0.01), ("pc_fkl", 0.0), ("pc_fkl", 0.05), ("pc_fkl", 1e9)
    ]  # fmt: skip
    assert swept[-1]["test_loss"] is None
    assert "diverged" in swept[-1]
    best = min(swept[1:3], key=lambda row: row["test_loss"])["phi_lr"]
    assert phi_lrs(wanted, swept) == {("vae", "bp"): 0.01, ("vae", "pc_fkl"): best}
    assert {row["phi_lr"] for row in read_rows(tmp_path / "fig5.jsonl") if row["method"] == "pc_fkl"} == {best}
    assert [row["phi_lr"] for row in document["sweep"]] == [row["phi_lr"] for row in swept]
    before = (tmp_path / "sweep.jsonl").read_bytes()
    run_fig5(wanted, images, tmp_path, progress=False)
    assert (tmp_path / "sweep.jsonl").read_bytes() == before
    other = replace(wanted, base=replace(BASE, prior=0.5))
    assert phi_lrs(other, swept)["vae", "pc_fkl"] == BASE.phi_lr  # a sweep with other settings does not count


def test_other_settings_are_refused_before_any_work(images: Images, tmp_path: Path) -> None:
    run_fig5(Fig5(replace(BASE, epochs=1), ("vae",), ("bp",), (0,)), images, tmp_path, progress=False)
    with pytest.raises(ConfigError, match="prior"):
        run_fig5(Fig5(replace(BASE, prior=0.5), ("vae",), seeds=(0,)), images, tmp_path, progress=False)
    assert len(read_rows(tmp_path / "fig5.jsonl")) == 1


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"models": ("m1",)}, "models"), ({"methods": ("pc_f",)}, "methods"), ({"seeds": (-1,)}, "seed"),
     ({"sweep_lrs": (-0.1,)}, "phi_lr"), ({"phi_lr": float("nan")}, "phi_lr"), ({"sweep_epochs": 0}, "sweep_epochs")],
)  # fmt: skip
def test_bad_settings_are_named(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        Fig5(BASE, **settings)


# ----------------------------------------------------------------------------------------------------------------- fig6


def test_pictures_of_runs_that_are_there(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """`fig6` draws the networks of `fig5` and trains none of them again; without umap it says PCA."""
    monkeypatch.setitem(sys.modules, "umap", None)  # as if it were not installed
    wanted = Fig5(BASE, ("vae",), seeds=(0,))
    run_fig5(wanted, images, tmp_path, progress=False)
    rows = (tmp_path / "fig5.jsonl").read_bytes()
    assert main(["reproduce", "fig6", *OPTIONS, "--epochs", "2", "--out", str(tmp_path)]) == 0
    assert "PCA (umap-learn is missing)" in capsys.readouterr().out
    assert (tmp_path / "fig5.jsonl").read_bytes() == rows
    for name in PICTURES:
        assert (tmp_path / f"fig6_{name}.png").read_bytes().startswith(b"\x89PNG")
    methods = json.loads((tmp_path / "fig6.json").read_text())["methods"]
    last = {row["method"]: row for row in read_rows(tmp_path / "fig5.jsonl") if row["epoch"] == 2}
    for title, method in (("BP", "bp"), ("PC", "pc_fkl")):
        found = methods[title]
        assert found["test_loss"] == last[method]["test_loss"]
        assert found["variances"] == pytest.approx(last[method]["variances"], rel=1e-5)
        assert len(found["points"]) == len(images.x_test)
        assert 0 < found["neighbours_accuracy"] <= 1
        assert len(found["lengths_of_traversal_steps"]) == 8


def test_one_model_and_one_seed(images: Images, tmp_path: Path) -> None:
    for wanted, field in ((Fig5(BASE, seeds=(0,)), "models"), (Fig5(BASE, ("vae",)), "seeds")):
        with pytest.raises(ConfigError, match=f"^{field}: "):
            run_fig6(wanted, images, tmp_path)


def test_what_is_drawn(images: Images) -> None:
    module = vae_of(build(64, (8,), 3, seed=1))
    x = one_of_each(images)
    with torch.no_grad():
        u, s = module.posterior(x)
        noise = torch.randn(4, 3)
        found = samples(module, x, noise)
        torch.testing.assert_close(found[2, 3], module.decode(u[2] + (0.5 * s[2]).exp() * noise[3]))
        way = traversal(module, x[:2], 5)
        torch.testing.assert_close(way[[0, 4]], module.decode(u[:2]))
        torch.testing.assert_close(way[1], module.decode(0.75 * u[0] + 0.25 * u[1]))
    labels = [int(images.y_test[(images.x_test == image).all(1)][0]) for image in x]
    assert labels == list(range(10))


def test_neighbours_know_classes_that_lie_apart() -> None:
    y = torch.arange(10).repeat(20)
    apart = torch.nn.functional.one_hot(y, 10) + 0.01 * torch.randn(200, 10)
    assert neighbours(apart, y) == 1.0
    assert neighbours(torch.randn(200, 10), y) < 0.5


def test_umap_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for umap-learn, which compiles for half a minute: two dimensions, a seed, one process."""

    class UMAP:
        def __init__(self, n_components: int, random_state: int, n_jobs: int):
            assert (n_components, random_state, n_jobs) == (2, 0, 1)

        def fit_transform(self, codes: np.ndarray) -> np.ndarray:
            return 2 * codes[:, :2]

    module = types.ModuleType("umap")
    monkeypatch.setattr(module, "UMAP", UMAP, raising=False)
    monkeypatch.setitem(sys.modules, "umap", module)
    codes = torch.randn(8, 5)
    points, how = embed(codes)
    assert how == "UMAP"
    torch.testing.assert_close(points, 2 * codes[:, :2])


def test_a_grid_takes_grey_and_colour(tmp_path: Path) -> None:

    grid(tmp_path / "grey.png", {"a": torch.rand(3, 12), "b": torch.rand(3, 12)}, (1, 3, 4), "grey")
    grid(tmp_path / "colour.png", {"a": torch.rand(2, 36)}, (3, 3, 4), "colour")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("grey.png", "colour.png"))
