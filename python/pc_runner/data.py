# SPDX-License-Identifier: MIT
"""Labelled images behind one door: `load_images` gives the same tensors whatever files they came from.

Every way a file can be missing, cut off or malformed ends in one `DataError`: one line that names the file, the byte
where it is known, and the remedy. Nothing is unpacked to disk.
"""

from __future__ import annotations

import math
import re
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pc_runner.sources import DAMAGE, DataError, check_int, data_folders, load_hf, unpack

NAMES = ("digits", "mnist", "cifar10", "hf:NAME")

_CIFAR_BATCH = re.compile(r"(?:^|/)(data_batch_\d+|test_batch)\.bin$")
_CIFAR_FOLDER = "cifar-10-batches-bin"
_CIFAR_RECORD = 1 + 3 * 32 * 32  # one label byte, then the R, G and B planes
_HF_LABELS = ("label", "labels", "fine_label")
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz")


@dataclass(frozen=True, eq=False)
class Images:
    """A labelled image set in memory, split in two.

    Attributes:
        name: what `load_images` was asked for.
        x_train, x_test: (N, D) float32 in [0, 1], D = C * H * W, channel planes one after the other.
        y_train, y_test: (N,) int64 class indices in 0..classes-1.
        classes: number of classes.
        shape: (C, H, W) of one image.
        note: what must be said beside every accuracy ("10k-image subset"); empty for a whole set.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    shape: tuple[int, int, int]
    note: str


class _Raw(NamedTuple):
    """Images (N, C, H, W) of bytes 0..white, labels (N,). `y_train` is whole even where `x_train` ends at `limit`."""

    x_train: NDArray[np.uint8]
    y_train: NDArray[np.integer[Any]]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.integer[Any]]
    classes: int
    white: int = 255
    note: str = ""


def load_images(name: str, data_dir: str | Path | None = None, limit: int | None = None) -> Images:
    """Load a labelled image set.

    Args:
        name: `digits` (embedded in scikit-learn: 1,437 train, 360 test, always the same split); `mnist` (the four IDX
            files, raw or .gz, in `data_dir` or `data_dir/mnist`); `cifar10` (binary version: a tar or the unpacked
            folder, in `data_dir` or `data_dir/cifar10`); or `hf:NAME`, a Hugging Face `datasets` name or a local
            folder, for which `data_dir` is the cache (None: the one of `datasets`).
        data_dir: where the files are; `digits` needs none.
        limit: keep the first `limit` training images (None: all). Test images are always all kept.

    Raises:
        DataError: a name that is not one of `NAMES`, or files that are missing, cut off or malformed.
        ValueError: `limit` below 1. TypeError: `limit` not an int.
    """
    if limit is not None:
        check_int("limit", limit, least=1)
    try:
        raw = _load_raw(name, None if data_dir is None else Path(data_dir).expanduser(), limit)
    except OSError as error:  # a folder that may not be read, a disk that fails
        where, problem = error.filename or data_dir, error.strerror or str(error)
        raise DataError(where, problem, "check the path and its permissions") from None
    notes = [raw.note] if raw.note else []
    if limit is not None and limit < len(raw.y_train):
        notes.append(f"first {limit:,} of {len(raw.y_train):,} training images")
    channels, height, width = raw.x_train.shape[1:]
    return Images(
        name=name,
        x_train=_unit_rows(raw.x_train[:limit], raw.white),
        y_train=torch.from_numpy(raw.y_train[:limit].astype(np.int64)),
        x_test=_unit_rows(raw.x_test, raw.white),
        y_test=torch.from_numpy(raw.y_test.astype(np.int64)),
        classes=raw.classes,
        shape=(channels, height, width),
        note=", ".join(notes),
    )


def count_batches(n: int, batch_size: int) -> int:
    """How many batches `batches` makes of `n` samples: n / batch_size, rounded up."""
    check_int("n", n, least=0)
    check_int("batch_size", batch_size, least=1)
    return -(-n // batch_size)


def batches(n: int, batch_size: int, *, seed: int, epoch: int, skip: int = 0) -> Iterator[Tensor]:
    """The batches of one epoch: (batch_size,) int64 index tensors, each of 0..n-1 once, the last one maybe shorter.

    The order depends on `(seed, epoch)` alone, so a run resumed in mid-epoch with `skip` = batches already done sees
    exactly the batches the unbroken run would have seen; the global generator is neither read nor moved.

    Raises:
        ValueError, TypeError: an argument that is negative (`batch_size`: below 1) or not an int; at the call.
    """
    count = count_batches(n, batch_size)
    for name, value in (("seed", seed), ("epoch", epoch), ("skip", skip)):
        check_int(name, value, least=0)
    # SeedSequence mixes the pair: with seed + epoch, run 0's epoch 1 would repeat run 1's epoch 0.
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(mixed))
    return (order[i * batch_size : (i + 1) * batch_size] for i in range(skip, count))


def _load_raw(name: str, data_dir: Path | None, limit: int | None) -> _Raw:
    if name == "digits":
        return _digits()
    if name == "mnist":
        return _mnist(data_folders(name, data_dir))
    if name == "cifar10":
        return _cifar10(data_folders(name, data_dir))
    if isinstance(name, str) and re.match("hf:.", name):
        return _hf(name, data_dir, limit)
    raise DataError(f"data {name!r}", "unknown name", f"use one of {', '.join(NAMES)}")


def _unit_rows(images: NDArray[np.uint8], white: int) -> Tensor:
    """(N, C, H, W) bytes -> (N, C*H*W) float32 in [0, 1], in memory of its own."""
    return torch.from_numpy(np.divide(images.reshape(len(images), -1), white, dtype=np.float32))


def _check_labels(labels: NDArray[Any], classes: int, where: object, first: int, stride: int) -> None:
    """Labels stand `stride` bytes apart in the file `where`, the first at byte `first`."""
    bad = np.flatnonzero(labels >= classes)
    if bad.size:
        i = int(bad[0])
        problem = f"label {labels[i]} of image {i} is not in 0..{classes - 1}"
        raise DataError(where, problem, "it is damaged or of another data set: fetch it again", first + stride * i)


# digits: scikit-learn's 8x8 images, 0..16
def _digits() -> _Raw:
    from sklearn.datasets import load_digits  # here: a second of imports that the other sets do not need

    pixels, labels = load_digits(return_X_y=True)
    images, labels = np.asarray(pixels, np.uint8).reshape(-1, 1, 8, 8), np.asarray(labels, np.int64)
    # RandomState's stream is frozen by NumPy's policy: the split stays the same in every release.
    order = np.random.RandomState(0).permutation(len(images))
    test, train = order[:360], order[360:]
    return _Raw(images[train], labels[train], images[test], labels[test], classes=10, white=16)


# MNIST: IDX files
def _mnist(folders: list[Path]) -> _Raw:
    x_train, y_train = _idx_pair(folders, "train")
    x_test, y_test = _idx_pair(folders, "t10k")
    if x_train.shape[1:] != x_test.shape[1:]:
        problem = f"training images are {x_train.shape[1:]}, test images {x_test.shape[1:]}"
        raise DataError(folders[0], problem, "keep the four files of one data set together")
    return _Raw(x_train[:, None], y_train, x_test[:, None], y_test, classes=10)


def _idx_pair(folders: list[Path], prefix: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (N, H, W) and labels (N,) of one split."""
    images_path = _find_idx(folders, f"{prefix}-images-idx3-ubyte")
    labels_path = _find_idx(folders, f"{prefix}-labels-idx1-ubyte")
    images, labels = _read_idx(images_path, ndim=3), _read_idx(labels_path, ndim=1)
    if len(images) != len(labels):
        problem = f"{len(labels)} labels for the {len(images)} images of {images_path.name}"
        raise DataError(labels_path, problem, "keep the four files of one data set together", 4)
    _check_labels(labels, 10, labels_path, first=8, stride=1)
    return images, labels


def _find_idx(folders: list[Path], stem: str) -> Path:
    for folder in folders:
        for path in (folder / stem, folder / f"{stem}.gz"):
            if path.is_file():
                return path
    wanted = "{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]"
    raise DataError(folders[0], f"holds neither {stem} nor {stem}.gz", f"put the four files {wanted} there")


def _read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes: magic 00 00 08 ndim, `ndim` big-endian sizes, the bytes. Offsets are unpacked."""
    data, remedy = unpack(path), "the file is damaged or cut off: fetch it again"
    header = 4 + 4 * ndim
    if len(data) < header:
        raise DataError(path, f"the IDX header of {header} bytes is cut off", remedy, len(data))
    if data[:4] != bytes((0, 0, 8, ndim)):
        problem = f"IDX magic 0x{data[:4].hex()} where 0x{0x800 + ndim:08x} is wanted"
        raise DataError(path, problem, "put the right file under this name, or fetch it again", 0)
    sizes = struct.unpack(f">{ndim}I", data[4:header])
    promised = header + math.prod(sizes)
    if len(data) != promised:
        problem = f"the header promises {promised:,} bytes and {len(data):,} are there"
        raise DataError(path, problem, remedy, min(len(data), promised))
    if promised == header:
        raise DataError(path, "holds no images or labels", "put the whole file there", 4)
    return np.frombuffer(data, np.uint8, offset=header).reshape(sizes)


# CIFAR-10: the binary version
def _cifar10(folders: list[Path]) -> _Raw:
    source = _cifar_source(folders)
    files = _read_folder(source) if source.is_dir() else _read_tar(source)
    train_names = sorted((name for name in files if name != "test_batch"), key=lambda name: int(name.split("_")[-1]))
    if not train_names or "test_batch" not in files:
        missing = "test_batch.bin" if train_names else "data_batch_1.bin"
        remedy = "give the whole binary version of CIFAR-10 (cifar-10-binary.tar.gz or its folder)"
        raise DataError(source, f"{missing} is missing or behind a cut", remedy)
    records = {name: _cifar_records(source / f"{name}.bin", files[name]) for name in files}
    train, test = np.concatenate([records[name] for name in train_names]), records["test_batch"]
    x_train, x_test = (part[:, 1:].reshape(-1, 3, 32, 32) for part in (train, test))
    note = "" if len(train) >= 50_000 else f"{len(train) / 1000:g}k-image subset"
    return _Raw(x_train, train[:, 0], x_test, test[:, 0], classes=10, note=note)


def _cifar_source(folders: list[Path]) -> Path:
    """The folder with the batches, or the tar that holds them."""
    for folder in folders:
        for inner in (folder / _CIFAR_FOLDER, folder):
            if any(inner.glob("data_batch_*.bin")):
                return inner
        tars = [path for path in folder.iterdir() if path.name.endswith(_TAR_SUFFIXES) and path.is_file()]
        if tars:  # the Python version's tar may lie beside the binary one
            return min(tars, key=lambda path: ("binary" not in path.name, path.name))
    remedy = "put cifar-10-binary.tar.gz (.tar, .tar.xz) there"
    raise DataError(folders[0], f"holds neither {_CIFAR_FOLDER}/data_batch_1.bin nor a tar of it", remedy)


def _read_folder(folder: Path) -> dict[str, bytes]:
    matches = {path: _CIFAR_BATCH.search(path.name) for path in folder.iterdir() if path.is_file()}
    return {match[1]: path.read_bytes() for path, match in matches.items() if match}


def _read_tar(path: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    name = ""
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                match, name = _CIFAR_BATCH.search(member.name), member.name
                stream = tar.extractfile(member) if match and member.isfile() else None
                if match and stream:
                    files[match[1]] = stream.read()
    except DAMAGE as error:
        problem = f"the tar of {path.stat().st_size:,} bytes cannot be read {f'after {name}' if name else 'at all'}"
        raise DataError(path, f"{problem} ({error})", "it is damaged or cut off: fetch it again") from None
    return files


def _cifar_records(where: Path, data: bytes) -> NDArray[np.uint8]:
    """(N, 3073) bytes: label, then the R, G and B planes."""
    whole, rest = divmod(len(data), _CIFAR_RECORD)
    if rest or not whole:
        problem = f"{len(data):,} bytes are not a whole number of {_CIFAR_RECORD}-byte records" if data else "is empty"
        remedy = "the file is cut off or not CIFAR-10's binary version: fetch it again"
        raise DataError(where, problem, remedy, whole * _CIFAR_RECORD)
    records = np.frombuffer(data, np.uint8).reshape(whole, _CIFAR_RECORD)
    _check_labels(records[:, 0], 10, where, first=0, stride=_CIFAR_RECORD)
    return records


# Hugging Face datasets, imported only when asked for
def _hf(name: str, cache_dir: Path | None, limit: int | None) -> _Raw:
    train, test, note = _hf_splits(name, cache_dir)
    image, label = _hf_columns(name, train.features)
    classes = getattr(train.features[label], "num_classes", None)
    y_train, y_test = (_hf_labels(name, split, label, classes) for split in (train, test))
    kept = train.select(range(min(limit or len(train), len(train))))
    images = _hf_images(name, kept, image) + _hf_images(name, test, image)
    sizes = sorted({array.shape[1:] for array in images})
    if len(sizes) > 1:
        problem = f"its images have {len(sizes)} sizes, from {sizes[0]} to {sizes[-1]}"
        raise DataError(name, problem, "choose a data set of images of one size, or resize them first")
    channels = max(len(array) for array in images)  # gray becomes colour where any image is in colour
    x = np.stack([np.broadcast_to(array, (channels, *sizes[0])) for array in images])
    classes = classes or 1 + int(max(y_train.max(), y_test.max()))
    return _Raw(x[: len(kept)], y_train, x[len(kept) :], y_test, classes, note=note)


def _hf_splits(name: str, cache_dir: Path | None) -> tuple[Any, Any, str]:
    """The training and the test split, and what to say of the latter if it is another."""
    found = load_hf(name, cache_dir)
    test = next((split for split in ("test", "validation") if split in found), "")
    if "train" not in found or not test or not len(found["train"]) or not len(found[test]):
        remedy = "choose a data set with a train and a test (or validation) split that hold images"
        raise DataError(name, f"its splits are {', '.join(f'{k} ({len(v)} rows)' for k, v in found.items())}", remedy)
    return found["train"], found[test], "" if test == "test" else f"{test} split"


def _hf_columns(name: str, features: dict[str, Any]) -> tuple[str, str]:
    """The image column; the ClassLabel or integer column with a usual name, else the first ClassLabel."""
    from datasets import ClassLabel, Image

    images = [key for key, feature in features.items() if isinstance(feature, Image)]
    classes = [key for key, feature in features.items() if isinstance(feature, ClassLabel)]
    integers = [key for key, feature in features.items() if re.match("u?int", str(getattr(feature, "dtype", "")))]
    labels = [key for key in _HF_LABELS if key in classes + integers] or classes
    if not images or not labels:
        wanted = f"an image column and a label column (ClassLabel, or integers named {', '.join(_HF_LABELS)})"
        raise DataError(name, f"its columns are {', '.join(features)}", f"choose a data set with {wanted}")
    return images[0], labels[0]


def _hf_labels(name: str, split: Any, column: str, classes: int | None) -> NDArray[np.int64]:
    labels = list(split[column])
    for row, label in enumerate(labels):
        if label is None or label < 0 or (classes is not None and label >= classes):
            problem = f"label {label} in row {row} of split {split.split} is no class index"
            raise DataError(name, problem, "choose a data set whose test split is labelled")
    return np.array(labels, np.int64)


def _hf_images(name: str, split: Any, column: str) -> list[NDArray[np.uint8]]:
    """One (C, H, W) array of bytes for each row, C = 1 or 3."""
    images: list[NDArray[np.uint8]] = []
    try:
        for row in split.select_columns([column]):
            images.append(_pixels(row[column]))
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        problem = f"the image in row {len(images)} of split {split.split} cannot be read ({error})"
        raise DataError(name, problem, "choose a data set of 8-bit grayscale or colour images") from None
    return images


def _pixels(image: Any) -> NDArray[np.uint8]:
    if image is None:
        raise ValueError("the row is empty")
    if image.mode[0] in "IF":  # 16-bit, 32-bit, float: Pillow would clip to 255 without a word
        raise ValueError(f"mode {image.mode} has more than 8 bits")
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"), np.uint8)[None]
    return np.asarray(image.convert("RGB"), np.uint8).transpose(2, 0, 1)
