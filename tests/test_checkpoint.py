# SPDX-License-Identifier: MIT
"""Checkpoints: the same bits back, one file, never half a one."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pc_runner import checkpoint
from pc_runner.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, write_atomically
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda params: torch.optim.Adam(params, lr=1e-3, betas=(0.9, 0.1 + 0.2)),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1 / 3, amsgrad=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "plain_sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "lr_tensor": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.01)),
    "two_groups": lambda params: torch.optim.SGD([{"params": [p], "lr": 10.0**-i} for i, p in enumerate(params)]),
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3),  # lists of tensors in its state
}


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, type for type, NaN included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(5))
    save_checkpoint(tmp_path / "run", model=model.state_dict(), optimizer=optimizer, progress={"step": 5})
    saved = optimizer.state_dict()

    found = load_checkpoint(tmp_path / "run")
    assert found.optimizer is not None
    assert same(found.optimizer, saved)
    assert same(found.model, dict(model.state_dict()))
    other = make_model()
    other.load_state_dict(found.model)
    resumed = OPTIMIZERS[name](other.parameters())
    resumed.load_state_dict(found.optimizer)
    train(model, optimizer, range(5, 9))
    train(other, resumed, range(5, 9))
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(resumed.state_dict(), optimizer.state_dict())


def test_betas_stay_a_tuple_and_steps_stay_tensors(tmp_path: Path) -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train(model, optimizer, range(2))
    save_checkpoint(tmp_path / "run", model={}, optimizer=optimizer, progress={})
    state = load_checkpoint(tmp_path / "run").optimizer
    assert state is not None
    assert state["param_groups"][0]["betas"] == (0.9, 0.30000000000000004)
    assert list(state["state"]) == [0, 1, 2, 3]
    assert torch.equal(state["state"][0]["step"], torch.tensor(2.0))


def test_tied_strided_empty_and_scalar_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    model = {
        "a": base,
        "tied": base,
        "slice": base[:, 1:3],
        "transposed": base.T,
        "expanded": torch.ones(1, 3).expand(2, 3),
        "images": images,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    save_checkpoint(tmp_path / "run", model=model, optimizer=None, progress={})
    found = load_checkpoint(tmp_path / "run")
    assert found.optimizer is None
    assert list(found.model) == list(model)
    for name, tensor in model.items():
        assert torch.equal(found.model[name], tensor), name
        assert found.model[name].is_contiguous()
    found.model["a"].zero_()
    assert torch.equal(found.model["tied"], base), "loaded tensors share no memory"


def test_the_file_is_plain_safetensors_with_readable_names(tmp_path: Path) -> None:
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer, range(1))
    save_checkpoint(tmp_path / "run", model=model.state_dict(), optimizer=optimizer, progress={"epoch": 3})
    with safetensors.safe_open(tmp_path / "run", "pt") as file:
        assert torch.equal(file.get_tensor("model.0.weight"), model.state_dict()["0.weight"])
        assert "optimizer.state.0.momentum_buffer" in file.keys()  # noqa: SIM118 not a dict
        document = json.loads(file.metadata()["pc_runner.checkpoint"])
    assert document["format_version"] == 1
    assert document["progress"] == {"epoch": 3}
    assert document["libraries"]["torch"] == torch.__version__
    assert os.listdir(tmp_path) == ["run"]


# hypothesis: any tree comes back, any cut is told

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
PLAIN = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(TEXT | st.sampled_from(["$tensor", "$tuple", "$items"]), inner, max_size=3)
        | st.dictionaries(st.integers() | st.tuples(st.integers(), TEXT), inner, max_size=3)
    ),
    max_leaves=8,
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits in any dtype, NaN payloads among them."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    data = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


@settings(max_examples=100, deadline=None)
@given(
    model=st.dictionaries(TEXT, tensors(), max_size=4), progress=st.dictionaries(TEXT, PLAIN | tensors(), max_size=4)
)
def test_round_trip(model: dict[str, Tensor], progress: dict[str, Any], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip"
    save_checkpoint(path, model=model, optimizer=None, progress=progress)
    found = load_checkpoint(path)
    assert same(found.model, model)
    assert same(found.progress, progress)


@settings(max_examples=100, deadline=None)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_cut_at_any_offset_is_a_checkpoint_error(cut: float, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "cut"
    save_checkpoint(path, model=make_model().state_dict(), optimizer=None, progress={})
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(CheckpointError, match=r"cut: is cut off or no safetensors file .*; restore it from a copy"):
        load_checkpoint(path)


def test_two_paths_that_read_the_same_are_two_tensors(tmp_path: Path) -> None:
    progress = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2), 1: torch.tensor(3), "1": torch.tensor(4)}}
    save_checkpoint(tmp_path / "run", model={}, optimizer=None, progress=progress)
    assert same(load_checkpoint(tmp_path / "run").progress, progress)


# what cannot be read


def _other_version(path: Path) -> None:
    document = {"format_version": 99, "libraries": {"pc-kernels": "7.0"}}
    save_file({}, path, {"pc_runner.checkpoint": json.dumps(document)})


def _tensor_missing(path: Path) -> None:
    document = {"format_version": 1, "libraries": {}, "model": {"w": {"$tensor": "model.w"}}}
    save_file({}, path, {"pc_runner.checkpoint": json.dumps(document)})


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "cannot be read (No such file or directory); check the path"),
    "folder": (lambda path: path.mkdir(), "cannot be read (Is a directory); check the path"),
    "empty": (lambda path: path.write_bytes(b""), "is cut off or no safetensors file"),
    "pickle": (lambda path: torch.save({"w": torch.ones(2)}, path), "is cut off or no safetensors file"),
    "weights only": (lambda path: save_file({"w": torch.ones(2)}, path), "is a safetensors file but no checkpoint"),
    "broken metadata": (lambda path: save_file({}, path, {"pc_runner.checkpoint": "{"}), "but no checkpoint"),
    "odd metadata": (lambda path: save_file({}, path, {"pc_runner.checkpoint": "[]"}), "but no checkpoint"),
    "other version": (
        _other_version,
        "has format version 99, this release reads 1; use the pc-kernels that wrote it (7.0)",
    ),
    "tensor missing": (_tensor_missing, "its metadata and its tensors do not fit"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_get_one_line_with_name_and_remedy(case: str, tmp_path: Path) -> None:
    make, message = BAD_FILES[case]
    path = tmp_path / "run.safetensors"
    make(path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text


# what cannot be written


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"w": [object()]}, r"^model\.w\.0 is a object; a checkpoint holds tensors and plain Python values only$"),
        ({"w": torch.ones(2).to_sparse()}, r"^model\.w is a sparse_coo tensor"),
        ({"w": torch.ones(2, device="meta")}, r"^model\.w is a meta tensor"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, r"^tensors of torch\.complex128 cannot be stored"),
    ],
)
def test_values_with_no_place_are_refused_before_anything_is_written(
    model: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=message):
        save_checkpoint(tmp_path / "run", model=model, optimizer=None, progress={})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    save_checkpoint(path, model={}, optimizer=None, progress={"step": 1})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, call, full)
    with pytest.raises(CheckpointError, match=r"run: cannot be written \(No space left on device\); see to its folder"):
        save_checkpoint(path, model={}, optimizer=None, progress={"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path).progress == {"step": 1}
    assert os.listdir(tmp_path) == ["run"]


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/run: cannot be written \(No such file or directory\)"):
        save_checkpoint(tmp_path / "nowhere" / "run", model={}, optimizer=None, progress={})


def test_an_interrupted_save_removes_its_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "run", b"new")
    assert os.listdir(tmp_path) == []


# killed


def _child(script: str, path: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "python"), str(ROOT)))}
    return subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, env=env)


SAVE_FOREVER = """
import itertools, sys, torch
from pc_runner.checkpoint import save_checkpoint
for step in itertools.count(1):
    model = {"w": torch.full((1 << 19,), float(step))}
    save_checkpoint(sys.argv[1], model=model, optimizer=None, progress={"step": step})
    print(step, flush=True)
"""

DIE_HALFWAY = """
import os, signal, sys
from pathlib import Path
from pc_runner import checkpoint

class Half:  # a file that dies when half of the bytes are in it
    def __init__(self, path, mode): self.file = open(path, mode)
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_checkpoint(sys.argv[1], model={}, optimizer=None, progress={"step": 1})
checkpoint.open = Half
checkpoint.save_checkpoint(sys.argv[1], model={}, optimizer=None, progress={"step": 2})
"""


def test_sigkill_while_saving_in_a_loop_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with _child(SAVE_FOREVER, path) as child:
        assert child.stdout is not None
        steps = [int(child.stdout.readline()) for _ in range(20)]  # it is writing the next one by now
        child.kill()
    found = load_checkpoint(path)
    assert found.progress["step"] >= steps[-1]
    assert torch.equal(found.model["w"], torch.full((1 << 19,), float(found.progress["step"])))


def test_sigkill_with_half_the_bytes_written_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with _child(DIE_HALFWAY, path) as child:
        assert child.wait(60) == -signal.SIGKILL
    assert load_checkpoint(path).progress == {"step": 1}
    assert len(os.listdir(tmp_path)) == 2, "it died in the middle: the half-written temporary file is there"
    save_checkpoint(path, model={}, optimizer=None, progress={"step": 3})
    assert load_checkpoint(path).progress == {"step": 3}
