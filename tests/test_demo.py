# SPDX-License-Identifier: MIT
"""`pc-run demo`: its files, and that its sentences follow from its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pc_runner.cli import main
from pc_runner.data import load_images
from pc_runner.demo import findings
from pc_runner.plots import Line, accuracy_curves, table

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_demo_writes_a_figure_and_numbers_and_says_what_they_show(tmp_path, capsys):
    arguments = [
        "demo",
        "--epochs",
        "2",
        "--hidden",
        "8",
        "--steps",
        "2",
        "--batch-size",
        "256",
        "--out",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    document = json.loads((tmp_path / "demo.json").read_text())
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    pairs = [(model, method) for model in ("m2", "m3") for method in ("bp", "pc_f", "pc_fkl")]
    assert [(run["model"], run["method"]) for run in document["runs"]] == pairs
    assert [len(run["rows"]) for run in document["runs"]] == [2] * 6
    for run, row in zip(document["runs"], document["summary"], strict=True):
        assert row["accuracy"] == run["rows"][-1]["accuracy"]
        assert f"{100 * row['accuracy']:.1f}" in text
    assert document["images"] == {"name": "digits", "train": 1437, "test": 360, "note": ""}
    assert document["command"].startswith("pc-run demo --epochs 2")
    assert document["machine"]["threads"] == 1
    assert " ".join(document["findings"]).split() == " ".join(text.split("\n\n")[1:-1]).split()


def test_the_demo_as_json(tmp_path, capsys):
    arguments = ["demo", "--epochs", "1", "--hidden", "4", "--steps", "1", "--batch-size", "500", "--json"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "demo.json").read_text())


def made_up(**accuracies: list[float]) -> list[dict]:
    """Runs of both models with these accuracies; a step of BP takes 2 ms, one of the others 5."""
    return [
        {
            "model": model,
            "method": method,
            "rows": [
                {"epoch": epoch, "accuracy": a, "ms_per_step": 2.0 if method == "bp" else 5.0, "backend": "cpp"}
                for epoch, a in enumerate(values, 1)
            ],
        }
        for model in ("m2", "m3")
        for method, values in accuracies.items()
    ]


@pytest.mark.parametrize(
    ("accuracies", "said", "unsaid"),
    [
        (
            {"bp": [0.5, 0.95], "pc_f": [0.3, 0.6], "pc_fkl": [0.91, 0.96]},
            [
                "BP ends at 95.0 %",
                "PC_F 60.0 %, 35.0 points below it;",
                "PC_FKL 96.0 %, 1.0 points above it (less than 360",
                "90 % was first reached by PC_FKL in epoch 1, BP in epoch 2; not by PC_F.",
            ],
            [],
        ),
        (
            {"bp": [0.5, 0.5], "pc_f": [0.7, 0.8], "pc_fkl": [0.2, 0.5]},
            ["PC_F 80.0 %, 30.0 points above it;", "PC_FKL 50.0 %, level with it (less", "None of them reached 90 %."],
            ["below"],
        ),
    ],
)  # fmt: skip
def test_findings_follow_the_numbers(accuracies, said, unsaid):
    sentences = findings(made_up(**accuracies), load_images("digits"))
    text = " ".join(sentences)
    for part in said:
        assert part in text
    for part in unsaid:
        assert part not in text
    assert "2.5 to 2.5 times as long as one of BP (backend cpp)" in text
    assert sentences[0].startswith("M2")
    assert sentences[1].startswith("M3")


def test_tables_line_up():
    text = table([{"method": "BP", "points": "9.5", "n": 3}, {"method": "PC_FKL", "points": "10.25", "n": 12}])
    assert text.splitlines() == [
        "method  points   n",
        "------  ------  --",
        "BP         9.5   3",
        "PC_FKL   10.25  12",
    ]
    assert table([]) == "(no rows)"


def test_figures_take_any_method_and_a_single_epoch(tmp_path):
    lines = [Line(name, name, [1], [50.0], [45.0], [55.0]) for name in ("bp", "pc_f", "pc_probs", "a", "b")]
    accuracy_curves(tmp_path / "new" / "one.png", {"one": lines, "none": []}, "title")
    assert Path(tmp_path / "new" / "one.png").read_bytes().startswith(PNG)
