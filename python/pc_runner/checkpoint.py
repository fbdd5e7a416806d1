# SPDX-License-Identifier: MIT
"""One safetensors file holds a whole training run: the model's tensors, the optimiser's state, the progress.

The tensors of the tree {model, optimizer, progress} are stored under their paths ("model.fc1.weight",
"optimizer.state.0.exp_avg"), so any safetensors reader sees them; the rest of the tree is one JSON string in the
file's metadata. Random number generators need no place: the order of the batches derives from the seed.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FORMAT_VERSION = 1

_METADATA_KEY = "pc_runner.checkpoint"
_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"  # what JSON has no word for


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. `str()` is one line: the file, what is wrong, the remedy."""

    def __init__(self, path: str | Path, problem: object, remedy: str) -> None:
        super().__init__(" ".join(f"{path}: {problem}; {remedy}".splitlines()))


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What `load_checkpoint` found; all tensors are on the CPU.

    Attributes:
        model: state_dict of the model, for `model.load_state_dict`.
        optimizer: state_dict of the optimiser, for `optimizer.load_state_dict`; None if none was saved. An optimiser
            keeps and changes the tensors it is given: load the file again for a second one.
        progress: the dict given to `save_checkpoint` (epoch, batch, step, config, ...).
        libraries: versions that wrote the file, by name.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    progress: dict[str, Any]
    libraries: dict[str, str]


def save_checkpoint(
    path: str | Path,
    *,
    model: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    progress: Mapping[str, Any],
) -> None:
    """Write a checkpoint atomically: `path` holds the old file or the new one, whole, whenever the process dies.

    Args:
        path: file to write or replace; its folder must exist.
        model: state_dict of the model. Tied and non-contiguous tensors are stored as independent, contiguous ones.
        optimizer: any torch optimiser whose state is made of tensors and plain Python values; None: none is stored.
        progress: plain Python values (None, bool, int, float, str, list, tuple, dict) and tensors, nested at will.

    Raises:
        CheckpointError: the file cannot be written. `path` is untouched then and no temporary file is left.
        TypeError: a value that is none of the above, or a sparse, meta or complex128 tensor; nothing is written.
    """
    tensors: dict[str, Tensor] = {}
    state = None if optimizer is None else optimizer.state_dict()
    parts = {"model": dict(model), "optimizer": state, "progress": dict(progress)}
    tree = {name: _encode(part, name, tensors) for name, part in parts.items()}
    document = {"format_version": FORMAT_VERSION, "libraries": _library_versions(), **tree}
    try:
        data = safetensors.torch.save(tensors, metadata={_METADATA_KEY: json.dumps(document)})
    except KeyError as error:  # safetensors' table of dtypes
        raise TypeError(f"tensors of {error} cannot be stored in safetensors; convert them first") from None
    try:
        write_atomically(path, data)
    except OSError as error:
        remedy = "see to its folder, permissions and disk space, or choose another path"
        raise CheckpointError(path, f"cannot be written ({error.strerror or error})", remedy) from None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, whole, into memory of its own; `path` may be replaced afterwards.

    Raises:
        CheckpointError: no such file, not a safetensors file or cut off, not a checkpoint of `save_checkpoint`, or of
            another format version.
    """
    document, tensors = _read(path)
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        wrote = document.get("libraries", {}).get("pc-kernels", "unknown")
        problem = f"has format version {version}, this release reads {FORMAT_VERSION}"
        raise CheckpointError(path, problem, f"use the pc-kernels that wrote it ({wrote}), or train anew")
    try:
        model, optimizer, progress = (_decode(document[key], tensors) for key in ("model", "optimizer", "progress"))
        return Checkpoint(model, optimizer, progress, document["libraries"])
    except (KeyError, TypeError, ValueError) as error:
        problem = f"its metadata and its tensors do not fit ({error!r})"
        raise CheckpointError(path, problem, "restore it from a copy, or train anew") from None


def write_atomically(path: str | Path, data: bytes) -> None:
    """Put `data` at `path` such that at any moment, a power cut included, `path` is the old file or the new, whole.

    A process killed in here leaves at most a hidden `.NAME.PID.tmp` beside it, which nothing reads.

    Raises:
        OSError: as `open` and `os.replace`; the temporary file is removed then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: os.replace is atomic in a file system
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else the new name may reach the disk before the bytes do
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """The new name is in the folder, not in the file: it has to reach the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON document and the tensors of a checkpoint file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error.strerror or error})", "check the path") from None
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        remedy = "restore it from a copy, or train anew"
        raise CheckpointError(path, f"is cut off or no safetensors file ({error})", remedy) from None
    document = _document(data)
    if document is None:
        remedy = "give a file written by `pc-run train` or save_checkpoint"
        raise CheckpointError(path, "is a safetensors file but no checkpoint", remedy)
    return document, tensors


def _document(data: bytes) -> dict[str, Any] | None:
    """Our JSON in a valid safetensors file, None if it has none: 8 bytes give the length of the JSON header after them.

    `safe_open(path).metadata()` would read the file again, which may be another by then.
    """
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        document = json.loads(header["__metadata__"][_METADATA_KEY])
    except (KeyError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "safetensors": safetensors.__version__}
    with suppress(metadata.PackageNotFoundError):  # run from a source tree that was never installed
        versions["pc-kernels"] = metadata.version("pc-kernels")
    return versions


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors put into `tensors` under their paths. Floats survive: JSON writes repr(float)."""
    if isinstance(value, Tensor):
        key = _free_key(path, tensors)
        tensors[key] = _plain(value, path)
        return {_TENSOR: key}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(item, f"{path}.{key}", tensors) for key, item in value.items()}
        items = [[_encode(key, path, tensors), _encode(item, f"{path}.{key}", tensors)] for key, item in value.items()]
        return {_ITEMS: items}  # integer keys, as in an optimiser's state
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path} is a {type(value).__name__}; a checkpoint holds tensors and plain Python values only")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_encode`."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_decode(item, tensors) for item in value[_TUPLE])
    if _ITEMS in value:
        return {_decode(key, tensors): _decode(item, tensors) for key, item in value[_ITEMS]}
    return {key: _decode(item, tensors) for key, item in value.items()}


def _free_key(path: str, tensors: Mapping[str, Tensor]) -> str:
    """`path`, or a longer name where {"a.b": x, "a": {"b": y}} would give two tensors one."""
    while path in tensors:
        path += "'"
    return path


def _plain(tensor: Tensor, path: str) -> Tensor:
    """A contiguous copy on the CPU: safetensors refuses shared memory and strides."""
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{path} is a {kind} tensor; a checkpoint holds dense tensors: materialise it first")
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
