# SPDX-License-Identifier: MIT
"""`pc-run reproduce fig3`: runs in pieces against runs in one, the sweep, and what the summary says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pc_runner import reproduce
from pc_runner.classifier import ClassifierRun
from pc_runner.cli import main
from pc_runner.config import ConfigError, TrainConfig
from pc_runner.data import load_images
from pc_runner.metrics import append_json, read_rows
from pc_runner.reproduce import Fig3, phi_lrs, run_fig3, show, sweep_images
from pc_runner.train import CHECKPOINT, Interrupted, epochs

BASE = TrainConfig(data="digits", limit=120, hidden=(8, 8, 8), steps=3, batch_size=16, theta_lr=1e-3, epochs=2)
OPTIONS = [
    "--data", "digits", "--limit", "120", "--hidden", "8", "--steps", "3", "--batch-size", "16", "--theta-lr", "1e-3",
    "--models", "m2,m3", "--methods", "bp,pc_fkl", "--seeds", "0,1", "--threads", "1",
]  # fmt: skip
TIMELESS = ("data", "model", "method", "seed", "epoch", "step", "accuracy", "energy", "phi_lr", "config", "backend")


@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images():
    return load_images("digits", limit=120)


def timeless(path: Path) -> list[dict]:
    """The rows without what the clock says, in the order of the runs."""
    rows = [{name: row[name] for name in TIMELESS} for row in read_rows(path)]
    return sorted(rows, key=lambda row: [str(row[name]) for name in ("model", "method", "seed", "epoch")])


def test_more_epochs_later_equal_one_run(tmp_path, capsys):
    assert main(["reproduce", "fig3", *OPTIONS, "--epochs", "1", "--out", "pieces"]) == 0
    first = (tmp_path / "pieces" / "fig3.jsonl").read_text()
    assert main(["reproduce", "fig3", *OPTIONS, "--epochs", "2", "--out", "pieces"]) == 0
    assert (tmp_path / "pieces" / "fig3.jsonl").read_text().startswith(first)
    assert main(["reproduce", "fig3", *OPTIONS, "--epochs", "2", "--out", "whole"]) == 0
    assert len(first.splitlines()) == 8
    assert timeless(tmp_path / "pieces" / "fig3.jsonl") == timeless(tmp_path / "whole" / "fig3.jsonl")
    assert len(timeless(tmp_path / "whole" / "fig3.jsonl")) == 16
    before = (tmp_path / "whole" / "fig3.jsonl").read_bytes()
    assert main(["reproduce", "fig3", *OPTIONS, "--epochs", "1", "--out", "whole"]) == 0
    assert (tmp_path / "whole" / "fig3.jsonl").read_bytes() == before


def test_every_row_says_where_it_comes_from(tmp_path, capsys):
    arguments = ["reproduce", "fig3", *OPTIONS, "--epochs", "1", "--phi-lr", "0.05", "--out", "out"]
    assert main(arguments) == 0
    rows = read_rows(tmp_path / "out" / "fig3.jsonl")
    for row in rows:
        assert row["command"] == "pc-run " + " ".join(arguments)
        assert set(row["machine"]) == {"cpu", "threads", "torch", "python"}
        assert row["note"] == "first 120 of 1,437 training images"
        assert row["config"] == replace(BASE, **{n: row[n] for n in ("model", "method", "seed", "phi_lr")}).identity()
        assert row["seconds"] > 0
        assert row["phi_lr"] == (0.1 if row["method"] == "bp" else 0.05)
    assert (tmp_path / "out" / "fig3.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "out" / "fig3.json").read_text())
    text = capsys.readouterr().out
    for entry in document["summary"]:
        found = [r["accuracy"] for r in rows if (r["model"], r["method"]) == (entry["model"], entry["method"])]
        assert entry["accuracy"] == pytest.approx(sum(found) / 2)
        assert (entry["lowest"], entry["highest"], entry["seeds"], entry["epochs"]) == (min(found), max(found), 2, 1)
        assert f"{100 * entry['accuracy']:.2f}" in text
    for bp, pc in zip(document["summary"][::2], document["summary"][1::2], strict=True):
        assert pc["points_from_bp"] == pytest.approx(100 * (pc["accuracy"] - bp["accuracy"]))
    assert "digits (first 120 of 1,437 training images)" in text


@pytest.mark.parametrize("batch", [3, 8, 11])
def test_stopped_anywhere_and_run_again(images, tmp_path, batch):
    wanted = Fig3(BASE, ("m3",), ("pc_fkl",), (0,))
    asked = iter(range(1000))
    with pytest.raises(Interrupted):
        run_fig3(wanted, images, tmp_path / "pieces", stop=lambda: next(asked) == batch - 1, progress=False)
    run_fig3(wanted, images, tmp_path / "pieces", progress=False)
    run_fig3(wanted, images, tmp_path / "whole", progress=False)
    assert timeless(tmp_path / "pieces" / "fig3.jsonl") == timeless(tmp_path / "whole" / "fig3.jsonl")


def test_rows_lost_between_checkpoint_and_file_are_written_again(images, tmp_path):
    wanted = Fig3(BASE, ("m2",), ("bp",), (0,))
    run_fig3(wanted, images, tmp_path, progress=False)
    lines = (tmp_path / "fig3.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fig3.jsonl").write_text(lines[0])
    run_fig3(wanted, images, tmp_path, progress=False)
    assert (tmp_path / "fig3.jsonl").read_text() == "".join(lines)


def test_a_lost_checkpoint_does_not_repeat_rows(images, tmp_path):
    run_fig3(Fig3(replace(BASE, epochs=1), ("m2",), ("bp",), (0,)), images, tmp_path, progress=False)
    next((tmp_path / "runs").rglob(CHECKPOINT)).unlink()
    run_fig3(Fig3(BASE, ("m2",), ("bp",), (0,)), images, tmp_path, progress=False)
    assert [row["epoch"] for row in read_rows(tmp_path / "fig3.jsonl")] == [1, 2]


def test_other_settings_are_refused_before_any_work(images, tmp_path, capsys):
    assert main(["reproduce", "fig3", *OPTIONS, "--epochs", "1", "--out", "out"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    for more in (["--theta-lr", "0.1"], ["--phi-lr", "0.7"], ["--steps", "4", "--sweep"]):
        assert main(["reproduce", "fig3", *OPTIONS, *more, "--epochs", "1", "--out", "out"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "--out: wanted the settings of the m" in error
        assert "another --out" in error
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_the_sweep_chooses_by_held_out_training_images(images, tmp_path):
    wanted = Fig3(BASE, ("m2",), ("bp", "pc_fkl"), (0,), sweep=True, sweep_lrs=(0.0, 0.1, 0.2))
    part, chosen_on = sweep_images(images)
    assert chosen_on == "training images 108 to 120, trained on those before"
    assert torch.equal(part.x_test, images.x_train[108:])
    document = run_fig3(wanted, images, tmp_path, progress=False)
    rows = read_rows(tmp_path / "sweep.jsonl")
    assert [(row["method"], row["phi_lr"], row["epoch"]) for row in rows] == [("pc_fkl", lr, 2) for lr in (0, 0.1, 0.2)]
    run = ClassifierRun(replace(BASE, method="pc_fkl", phi_lr=0.1), part)
    *_, last = epochs(run)
    assert rows[1]["accuracy"] == last["accuracy"]
    best = max(rows, key=lambda row: row["accuracy"])["phi_lr"]
    assert [entry["phi_lr"] for entry in document["summary"]] == [None, best]
    before = (tmp_path / "sweep.jsonl").read_bytes()
    run_fig3(wanted, images, tmp_path, progress=False)
    assert (tmp_path / "sweep.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="out"):  # a longer sweep chooses anew; rows trained at the first's rate stay
        run_fig3(
            replace(wanted, sweep_epochs=1, sweep_lrs=(0.2 if best == 0.1 else 0.1,)), images, tmp_path, progress=False
        )


@pytest.mark.parametrize(
    ("n", "first", "last"), [(60_000, 10_000, 15_000), (10_000, 9_000, 10_000), (10_999, 9_000, 10_000)]
)
def test_the_sweep_trains_on_the_first_ten_thousand(images, n, first, last):
    many = replace(images, x_train=torch.arange(n).reshape(n, 1).float(), y_train=torch.arange(n))
    part, _ = sweep_images(many)
    assert torch.equal(part.y_train, torch.arange(first))
    assert torch.equal(part.y_test, torch.arange(first, last))
    assert torch.equal(part.x_test[:, 0].long(), part.y_test)


def test_the_phi_lr_given_beats_the_sweep_beats_the_default():
    wanted = Fig3(BASE, ("m3",), ("bp", "pc_f", "pc_fkl"), (0,))
    assert set(phi_lrs(wanted, []).values()) == {0.1}

    def row(method: str, lr: float, accuracy: float | None, **other) -> dict:
        config = replace(wanted.config("m3", method, 0, lr), **other)
        return {"phi_lr": lr, "accuracy": accuracy, "epoch": 2, "config": config.identity()}

    sweep = [row("pc_f", 0.01, 0.6), row("pc_f", 0.3, 0.7), row("pc_f", 1.0, None), row("pc_f", 0.03, 0.9, steps=1)]
    sweep.append({**row("pc_f", 0.1, 0.8), "epoch": 5})  # of a longer sweep
    assert phi_lrs(wanted, sweep) == {("m3", "bp"): 0.1, ("m3", "pc_f"): 0.3, ("m3", "pc_fkl"): 0.1}
    given = replace(wanted, phi_lr=0.02)
    assert phi_lrs(given, sweep) == {("m3", "bp"): 0.1, ("m3", "pc_f"): 0.02, ("m3", "pc_fkl"): 0.02}


def test_a_run_that_diverges_is_a_result(images, tmp_path):
    wanted = Fig3(replace(BASE, steps=40), ("m1",), ("bp", "pc_fkl"), (0,), phi_lr=1e30)
    document = run_fig3(wanted, images, tmp_path, progress=False)
    rows = read_rows(tmp_path / "fig3.jsonl")
    assert [(row["method"], row["accuracy"] is None) for row in rows] == [
        ("bp", False),
        ("bp", False),
        ("pc_fkl", True),
    ]
    assert "Lower lr" in rows[-1]["diverged"]
    assert "diverged" in show(document)
    run_fig3(wanted, images, tmp_path, progress=False)
    assert len(read_rows(tmp_path / "fig3.jsonl")) == 3


def test_the_summary_covers_rows_of_earlier_commands(images, tmp_path):
    run_fig3(Fig3(BASE, ("m1",), seeds=(0,)), images, tmp_path, progress=False)
    document = run_fig3(Fig3(BASE, ("m2",), ("bp",), seeds=(0,)), images, tmp_path, progress=False)
    assert [(e["model"], e["method"]) for e in document["summary"]] == [("m1", "bp"), ("m1", "pc_fkl"), ("m2", "bp")]
    append_json(tmp_path / "fig3.jsonl", {**read_rows(tmp_path / "fig3.jsonl")[0], "data": "mnist"})
    assert len(run_fig3(Fig3(BASE, ("m2",), ("bp",), seeds=(0,)), images, tmp_path, progress=False)["summary"]) == 3


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"models": ("m1", "m9")}, "models"),
        ({"methods": ("bp", "pcf")}, "methods"),
        ({"models": ("m1",), "methods": ("pc_probs",)}, "methods"),
        ({"seeds": (0, -1)}, "seeds"),
        ({"sweep_lrs": (0.1, -0.1)}, "sweep_lrs"),
        ({"sweep_epochs": 0}, "sweep_epochs"),
        ({"phi_lr": float("nan")}, "phi_lr"),
    ],
)
def test_settings_out_of_bounds(settings, field):
    with pytest.raises(ConfigError) as caught:
        Fig3(BASE, **settings)
    assert caught.value.field == field


def test_the_figures_own_methods():
    assert Fig3(BASE).pairs() == [
        ("m1", "bp"), ("m1", "pc_fkl"),
        *(("m2", method) for method in ("bp", "pc_f", "pc_fkl")),
        *(("m3", method) for method in ("bp", "pc_f", "pc_fkl")),
    ]  # fmt: skip
    asked = Fig3(BASE, methods=("pc_probs", "pc_f")).pairs()
    assert asked == [("m1", "pc_f"), ("m2", "pc_f"), ("m3", "pc_probs"), ("m3", "pc_f")]
    assert reproduce.SWEEP_LRS == (0.003, 0.01, 0.03, 0.1, 0.3)
