# SPDX-License-Identifier: MIT
"""`pc-run`: what it prints, its exit codes, and one line for whatever is wrong with its arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pc_runner.cli import main
from pc_runner.config import METHODS, MODELS
from safetensors import safe_open
from safetensors.torch import save_file

import pc_kernels as pck

ROOTS = [str(Path(pck.__file__).parents[1]), str(Path(sys.modules["pc_runner"].__file__ or "").parents[1])]
TINY = ["--data", "digits", "--limit", "100", "--hidden", "8", "--steps", "2", "--epochs", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, with one thread."""
    before = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def trained(tmp_path) -> Path:
    assert main(["train", *TINY, "--out", "run"]) == 0
    return tmp_path / "run"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_refused(arguments: list[str], capsys, *wanted: str, code: int = 2) -> None:
    """Exit code, one line on stderr with all of `wanted`, nothing on stdout, nothing written."""
    capsys.readouterr()
    before = files(Path())
    assert main(arguments) == code
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1), error
    assert error.startswith("pc-run")
    for text in (*wanted, ";"):
        assert text in error, error
    assert files(Path()) == before


# ---------------------------------------------------------------------------------------------------------- bad input

COUNTS = ("0", "-2", "x", "1.5", "")
RATES = ("-1", "nan", "inf", "fast", "")
SETTINGS = {
    "--epochs": COUNTS,
    "--hidden": ("0", "8,8", "8,8,8,8", "8,x,8", "-8", ""),
    "--batch-size": COUNTS,
    "--steps": ("-1", "x", "2.5"),
    "--phi-lr": RATES,
    "--phi-momentum": ("-0.1", "1.5", "nan", "x"),
    "--theta-lr": RATES,
    "--seed": ("-1", "x", "0.5", "99999999999999999999"),
}
MORE = {
    "--lr-scale": RATES,
    "--limit": COUNTS,
    "--optimizer": ("adam", "LBFGS", "", "torch"),
    "--weight-updates": COUNTS,
    "--threads": COUNTS,
    "--out": ("a-file", "a-file/below", "", "/proc/none/x", "a" * 300, "~nobody-here/x"),
}
MORE_OF_VAES = {
    "--epochs": COUNTS,
    "--phi-lr": RATES,
    "--prior": RATES,
    "--latent": COUNTS,
    "--output": ("laplace", ""),
    "--methods": ("pc_f", "bp,x", "bp,bp", ""),
    "--out": MORE["--out"],
}
BAD = {
    "demo": {**SETTINGS, "--threads": COUNTS, "--out": MORE["--out"], "--json": ("1", "x", "")},
    "train": {
        **SETTINGS,
        **MORE,
        "--model": ("m4", "M1", "m1,m2", ""),
        "--method": ("pcf", "PC_FKL", "pc_probs", ""),
        "--checkpoint-every": COUNTS,
        "--resume": ("1", "no", ""),
        "--tensorboard": ("1", "no", ""),
    },
    "reproduce fig3": {
        **{name: values for name, values in SETTINGS.items() if name != "--seed"},
        **MORE,
        "--models": ("m4", "m1,,m2", "m1,m1", ""),
        "--methods": ("pcf", "bp,x", "bp,bp", ""),
        "--seeds": ("-1", "0,x", "1,1", "", "0,18446744073709551616"),
        "--sweep-lrs": ("-0.1", "0.1,x", "0.1,0.1", ""),
        "--sweep": ("1", "yes", ""),
        "--sweep-epochs": COUNTS,
    },
    "reproduce fig5": {
        **MORE_OF_VAES,
        "--models": ("m1", "vae,,vae_wide", "vae,vae", ""),
        "--seeds": ("-1", "0,x", "1,1", "", "0,18446744073709551616"),
        "--sweep-lrs": ("-0.1", "0.1,x", "0.1,0.1", ""),
        "--sweep-epochs": COUNTS,
    },
    "reproduce fig6": {
        **MORE_OF_VAES,
        "--model": ("m1", "vae,vae_wide", ""),
        "--seed": ("-1", "x", "0,1", "18446744073709551616"),
    },
    "eval run": {"--threads": COUNTS, "--json": ("1", "x", "")},
    "info": {"--threads": COUNTS, "--json": ("1", "x", "")},
}
CASES = [(c, option, value) for c, options in BAD.items() for option, values in options.items() for value in values]


@pytest.mark.parametrize(("command", "option", "value"), CASES)
def test_a_bad_option_is_one_line(command, option, value, capsys):
    Path("a-file").write_text("")
    check_refused([*command.split(), f"{option}={value}"], capsys, option)


@pytest.mark.parametrize("command", ["train", "reproduce fig3", "eval run"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--data", "svhn"], ["--data", ""], ["--data", "Digits"],
        ["--data", "mnist", "--data-dir", "nowhere"], ["--data", "mnist", "--data-dir", "a-file"],
        ["--data", "mnist", "--data-dir", "."], ["--data", "cifar10", "--data-dir", "."],
    ],
)  # fmt: skip
def test_bad_data_is_one_line(command, arguments, capsys, request):
    Path("a-file").write_text("")
    if command == "eval run":
        request.getfixturevalue("trained")
    check_refused([*command.split(), *arguments], capsys)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["train", "--epoch", "1"], "--epoch"),
        (["train", "digits"], "digits"),
        (["info", "--verbose"], "--verbose"),
        (["reproduce"], "TARGET"),
        (["reproduce", "fig4"], "fig4"),
        (["reproduce", "Fig3"], "Fig3"),
        (["reproduce", "fig3", "--models", "m1,m2", "--methods", "pc_probs"], "--methods"),
        (["eval"], "PATH"),
        (["eval", "nowhere"], "nowhere"),
        (["eval", "."], "checkpoint.safetensors"),
        (["eval", "a-file"], "a-file"),
        (["eval", "other.safetensors"], "no checkpoint"),
        (["train", "--out", "none", "--resume"], "leave --resume out"),
    ],
)
def test_other_bad_arguments_are_one_line(arguments, text, capsys):
    Path("a-file").write_text("")
    save_file({"a": torch.zeros(1)}, "other.safetensors")
    check_refused(arguments, capsys, text)


def test_a_run_that_is_in_the_way_is_left_alone(trained, capsys):
    check_refused(["train", *TINY, "--out", "run"], capsys, "add --resume")
    check_refused(["train", *TINY, "--out", "run", "--resume", "--theta-lr", "1"], capsys, "theta_lr 0.0001 there")
    (trained / "checkpoint.safetensors").write_bytes(b"no")
    check_refused(["train", *TINY, "--out", "run", "--resume"], capsys, "checkpoint.safetensors")
    check_refused(["eval", "run"], capsys, "checkpoint.safetensors")


def test_an_empty_folder_name_is_called_that(capsys):
    check_refused(["train", "--out", ""], capsys, "--out", "wanted a folder, got ''; name one")


def test_the_largest_seed_trains(capsys):
    assert main(["train", *TINY, "--seed", str(2**64 - 1)]) == 0


def test_weights_that_are_not_finite_are_not_evaluated(trained, capsys):
    path = trained / "checkpoint.safetensors"
    with safe_open(path, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = next(name for name in tensors if name.startswith("model.") and name.endswith("weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path, about)
    check_refused(["eval", "run"], capsys, "not finite", name.removeprefix("model."))


@pytest.mark.parametrize(("name", "text"), [("turbo", "cpp"), ("cuda", "cannot run"), ("", "cpp")])
def test_a_backend_that_cannot_run(name, text, monkeypatch, capsys):
    monkeypatch.setenv("PC_KERNELS_BACKEND", name)
    if torch.cuda.is_available() and name == "cuda":
        monkeypatch.setenv("PC_KERNELS_BACKEND", "rocm")
    capsys.readouterr()
    assert main(["train", *TINY, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert text in error
    assert not Path("run").exists()


def test_divergence_fails_with_the_remedy(capsys):
    assert main(["train", *TINY, "--model", "m1", "--phi-lr", "1e30", "--steps", "40", "--out", "run"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Lower lr" in error


# ------------------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    "command",
    [
        "",
        "demo",
        "train",
        "eval",
        "complete",
        "reproduce fig3",
        "reproduce fig5",
        "reproduce fig6",
        "reproduce memory",
        "info",
    ],
)
def test_help_shows_options_and_defaults(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: pc-run {command}".rstrip())
    if command in ("train", "reproduce fig3", "demo"):
        for fact in (
            "--phi-momentum M",
            "(default: 0.0)",
            "m1/m2/m3 32, vae/vae_wide 32, lm 5" if command == "train" else "(default: 32)",
        ):
            assert fact in " ".join(text.split())
    if command == "train":
        flat = " ".join(text.split())
        assert ", ".join(MODELS) in flat
        assert ", ".join(METHODS) in flat


def test_train_then_eval_agree(trained, capsys):
    capsys.readouterr()
    assert main(["eval", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = json.loads((trained / "metrics.jsonl").read_text())
    assert found["accuracy"] == row["accuracy"]
    assert (found["data"], found["test_images"], found["epoch"], found["config"]["hidden"]) == (
        "digits",
        360,
        1,
        [8] * 3,
    )
    assert main(["eval", "run/checkpoint.safetensors"]) == 0
    assert f"{100 * found['accuracy']:.2f} %" in capsys.readouterr().out


def test_train_prints_rows_or_json(capsys):
    assert main(["train", *TINY, "--method", "bp", "--seed", "7"]) == 0
    text = capsys.readouterr().out
    assert "epoch 1: test accuracy" in text
    assert "first 100 of 1,437 training images" in text
    assert Path("runs/m2-bp-digits-7/checkpoint.safetensors").exists()
    assert main(["train", *TINY, "--json", "--out", "other", "--optimizer", "SGD"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["epoch"] for row in document["rows"]] == [1]
    assert document["config"]["optimizer"] == "SGD"
    assert document["machine"]["torch"] == torch.__version__
    assert document["note"] == "first 100 of 1,437 training images"


def test_info_names_versions_backends_and_reasons(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for fact in (torch.__version__, "threads", "reference:", "cuda:", "784-512-512-512-10"):
        assert fact in text
    assert main(["info", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"build", "machine", "numpy", "explain"}
    assert "reference" in document["build"]["backends"]


def test_python_dash_m_and_progress_bars_off():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(ROOTS)}
    command = [sys.executable, "-W", "error", "-m", "pc_runner", "train", *TINY, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["rows"][0]["step"] == 1
