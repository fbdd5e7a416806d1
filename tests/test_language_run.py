# SPDX-License-Identifier: MIT
"""Training runs of the language model on the command line: what a killed run resumes to, what the commands print, the
figure's runs in pieces."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pc_runner import fig7
from pc_runner.checkpoint import load_checkpoint
from pc_runner.cli import main
from pc_runner.config import LANGUAGE_METHODS, ConfigError, LanguageConfig
from pc_runner.data import batches
from pc_runner.experiments import LANGUAGE, config_from, settings
from pc_runner.fig7 import Fig7, run_fig7
from pc_runner.language_run import LanguageRun
from pc_runner.metrics import read_rows
from pc_runner.tokens import Tokens
from pc_runner.train import CHECKPOINT, METRICS, epochs

SMALL = LanguageConfig(limit=96, vocabulary=500, tokens=8, width=8, intermediate=8, batch_size=16, epochs=2, steps=3)
OPTIONS = [
    "--model", "lm", "--limit", "96", "--vocabulary", "500", "--tokens", "8", "--width", "8", "--intermediate", "8",
    "--batch-size", "16", "--epochs", "2", "--steps", "3", "--threads", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> Path:
    """A folder for tokenisers, for this file's processes."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path))
        yield path


@pytest.fixture(scope="module")
def tokens(cache) -> Tokens:
    return LANGUAGE.load(SMALL, None)


def finished(config: LanguageConfig, tokens: Tokens) -> LanguageRun:
    run = LanguageRun(config, tokens)
    list(epochs(run))
    return run


def test_a_bp_run_is_plain_torch(tokens: Tokens) -> None:
    """AdamW on F.cross_entropy of the same batches, written out, in float64."""
    config = replace(SMALL, method="bp", epochs=1)
    run, twin = LanguageRun(config, tokens), LanguageRun(config, tokens).net.module.double()
    run.net.double()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=config.theta_lr, weight_decay=config.weight_decay)
    for index in batches(96, 16, seed=0, epoch=0):
        x, y, rows = (getattr(tokens.train, name)[index] for name in ("inputs", "targets", "mask"))
        optimizer.zero_grad()
        (F.cross_entropy(twin(x)[rows], y[rows], reduction="sum") / len(x)).backward()
        optimizer.step()
    list(epochs(run))
    for got, wanted in zip(run.net.module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["bp", "pc_f", "pc_fkl"])
def test_every_method_learns(method: str, tokens: Tokens) -> None:
    rows = finished(replace(SMALL, method=method, theta_lr=1e-2), tokens).rows
    assert rows[-1]["dev_perplexity"] < 0.8 * tokens.vocabulary
    assert rows[-1]["dev_perplexity"] < rows[0]["dev_perplexity"]


def test_killed_with_sigkill_and_resumed_to_the_same_bits(tmp_path, cache, tokens, capsys) -> None:
    long = [*OPTIONS, "--epochs", "3", "--limit", "400", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "pc_runner", "train", *long, "--checkpoint-every", "1"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    file, deadline = tmp_path / "run" / CHECKPOINT, time.monotonic() + 60
    while time.monotonic() < deadline and not (file.exists() and load_checkpoint(file).progress["step"] >= 30):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert load_checkpoint(file).progress["step"] < 75
    assert main(["train", *long, "--resume"]) == 0
    whole, found = finished(replace(SMALL, epochs=3, limit=400), tokens), load_checkpoint(file)
    for name, value in whole.net.state_dict().items():
        assert torch.equal(found.model[name], value), name
    figures = [(row["dev_perplexity"], row["test_perplexity"]) for row in read_rows(tmp_path / "run" / METRICS)]
    assert figures == [(row["dev_perplexity"], row["test_perplexity"]) for row in whole.rows]


def test_train_eval_complete(tmp_path, capsys) -> None:
    assert main(["train", *OPTIONS, "--first-lr", "1", "--clip", "1", "--weight-updates", "2"]) == 0
    assert "perplexity" in capsys.readouterr().out
    run = Path("runs/lm-pc_fkl-pydoc-0")
    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = read_rows(run / METRICS)[-1]
    assert found["dev_perplexity"] == pytest.approx(row["dev_perplexity"])
    assert found["test_perplexity"] == pytest.approx(row["test_perplexity"])
    assert config_from(found["config"]) == replace(SMALL, epochs=1, first_lr=1.0, clip=1.0, weight_updates=2)
    assert main(["complete", "the value of", "--top", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"].startswith("the value of")
    assert len(answer["next"]) == 3
    assert main(["complete", "the value of", "--checkpoint", str(run / CHECKPOINT)]) == 0
    shown = capsys.readouterr().out
    assert answer["text"] in shown
    assert f"{answer['next'][0][1]:.4f}" in shown


def test_bad_input_is_one_line(tmp_path, capsys) -> None:
    for arguments, says in [
        (
            ["train", "--model", "lm", "--hidden", "8"],
            "argument --hidden: wanted a setting of lm, got one of m1, m2, m3",
        ),
        (["train", "--model", "m2", "--tokens", "8"], "argument --tokens: wanted a setting of m2, got one of lm"),
        (["train", "--model", "lm", "--method", "pc_probs"], "argument --method: wanted one of bp, pc_f"),
        (["train", "--model", "lm", "--heads", "3"], "argument --heads: wanted a divisor of the width, 128, got 3"),
        (["train", "--model", "lm", "--data", "digits"], "data 'digits': unknown name; use one of pydoc"),
        (["complete", "x"], "cannot be read"),
        (["reproduce", "fig7", "--methods", "bp,zil"], "argument --methods: wanted names out of"),
    ]:
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    assert main(["train", "--data", "digits", "--limit", "16", "--hidden", "4", "--epochs", "1", "--out", "m2"]) == 0
    assert main(["complete", "x", "--checkpoint", "m2"]) == 2
    assert "is a run of m2" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_every_method_has_as_many_tries() -> None:
    assert {len(Fig7(SMALL).tries(method)) for method in LANGUAGE_METHODS} == {6}


def test_settings_name_who_has_them() -> None:
    assert settings("lm", {"tokens": 8}) == LanguageConfig(tokens=8)
    with pytest.raises(ConfigError, match="hidden: wanted a setting of lm"):
        settings("lm", {"hidden": (8, 8, 8)})
    assert LanguageConfig(first_lr=1.0, steps=5).rates == [1.0, 1.0, 1.0, 0.003, 0.003]
    assert LanguageConfig(first_lr=1.0, steps=2, blocks=2).rates == [1.0, 1.0]


def test_the_figure_in_pieces_is_the_figure_in_one(tmp_path, tokens, capsys, monkeypatch) -> None:
    """Search, runs, summary; a second call adds what is missing and repeats nothing."""
    monkeypatch.setattr(fig7, "BP_RATES", (1e-3, 1e-2))
    monkeypatch.setattr(fig7, "THETA_RATES", (1e-2,))
    monkeypatch.setattr(fig7, "OTHER_PHI_RATES", (0.1, 0.01))
    base = replace(SMALL, limit=40, epochs=1)
    one = run_fig7(Fig7(base, ("bp", "pc_fkl"), (0, 1), True), tokens, tmp_path / "one", progress=False)
    searched = read_rows(tmp_path / "one" / "search.jsonl")
    assert len(searched) == 4
    for entry in one["summary"]:
        tried = [row for row in searched if row["method"] == entry["method"]]
        best = min(tried, key=lambda row: row["dev_perplexity"])
        assert (best["config"]["theta_lr"], best["config"]["limit"]) == (entry["theta_lr"], 4)
        rows = [r for r in read_rows(tmp_path / "one" / "fig7.jsonl") if r["method"] == entry["method"]]
        assert entry["test"] == pytest.approx(sum(r["test_perplexity"] for r in rows) / 2)
    assert one["summary"][1]["test_over_bp"] == pytest.approx(one["summary"][1]["test"] / one["summary"][0]["test"])
    assert {c["method"] for c in one["completions"]} == {"bp", "pc_fkl"}
    for methods, seeds in [(("bp",), (0,)), (("pc_fkl",), (0, 1)), (("bp", "pc_fkl"), (0, 1))]:
        two = run_fig7(Fig7(base, methods, seeds, True), tokens, tmp_path / "two", progress=False)
    keys = ("test", "lowest", "highest", "theta_lr", "phi_lr")
    assert [[e[k] for k in keys] for e in two["summary"]] == [[e[k] for k in keys] for e in one["summary"]]
    assert len(read_rows(tmp_path / "two" / "search.jsonl")) == len(searched)
    assert (tmp_path / "two" / "fig7.png").read_bytes().startswith(b"\x89PNG")
    assert (
        main(["reproduce", "fig7", *OPTIONS[2:], "--limit", "40", "--methods", "bp", "--steps", "4", "--out", "one"])
        == 2
    )
    assert "argument --out: wanted the settings of the lm bp rows in it" in capsys.readouterr().err
