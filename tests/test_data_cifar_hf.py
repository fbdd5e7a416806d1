# SPDX-License-Identifier: MIT
"""CIFAR-10 and Hugging Face data sets: what is read, and what is said of files that cannot be."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import random
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when `datasets` is imported, which is later than here

import numpy as np
import pytest
import torch
from datafiles import check_invariants, complaint, failure, real
from pc_runner.data import load_images


def test_real_cifar10_subset() -> None:
    images = load_images("cifar10", real("cifar10"))
    check_invariants(images)
    assert (len(images.x_train), len(images.x_test)) == (10_000, 1_000)
    assert (images.classes, images.shape, images.note) == (10, (3, 32, 32), "10k-image subset")
    assert images.y_train[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]  # frog, truck, truck, deer, car, ...
    assert images.y_test[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]  # cat, ship, ship, plane, frog, ...
    assert images.y_train.bincount().tolist() == [1005, 974, 1032, 1016, 999, 937, 1030, 1001, 1025, 981]
    first = (images.x_train[0].reshape(3, 32, 32)[:, 0, 0] * 255).round()
    assert first.tolist() == [59, 62, 63], "planes in the order R, G, B"
    means = images.x_train.reshape(-1, 3, 1024).mean((0, 2))
    assert means.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.005)  # of the whole set


def cifar_records(*labels: int) -> bytes:
    rng = np.random.default_rng(sum(labels))
    return b"".join(bytes((label,)) + rng.bytes(3072) for label in labels)


# out of order, and with a tenth batch: numbers count, not names
CIFAR = {
    "data_batch_10.bin": cifar_records(9),
    "data_batch_2.bin": cifar_records(3, 4, 5),
    "data_batch_1.bin": cifar_records(1, 2),
    "val_batch.bin": b"not read",
    "batches.meta.txt": b"airplane\n",
    "test_batch.bin": cifar_records(0, 7),
}


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


WAYS: dict[str, Callable[[Path], Any]] = {
    "tar": lambda folder: write_tar(folder / "c.tar", CIFAR),
    "tar.gz": lambda folder: write_tar(folder / "c.tar.gz", CIFAR, "w:gz"),
    "tar.xz": lambda folder: write_tar(folder / "c.tar.xz", CIFAR, "w:xz"),
    "folder": lambda folder: write_folder(folder / "cifar-10-batches-bin", CIFAR),
    "the folder itself": lambda folder: write_folder(folder, CIFAR),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inner", [".", "cifar10"])
def test_small_cifar10_from_tars_and_folders(way: str, inner: str, tmp_path: Path) -> None:
    (tmp_path / inner).mkdir(exist_ok=True)
    WAYS[way](tmp_path / inner)
    before = sorted(tmp_path.rglob("*"))
    images = load_images("cifar10", tmp_path)
    check_invariants(images)
    assert images.y_train.tolist() == [1, 2, 3, 4, 5, 9]
    assert images.y_test.tolist() == [0, 7]
    wanted = torch.tensor(list(CIFAR["data_batch_10.bin"][1:])) / 255
    assert torch.equal(images.x_train[-1], wanted)
    assert images.note == "0.006k-image subset"
    assert sorted(tmp_path.rglob("*")) == before, "nothing is unpacked to disk"


def test_cifar10_limit_crosses_batches_and_is_said(tmp_path: Path) -> None:
    write_tar(tmp_path / "c.tar", CIFAR)
    images = load_images("cifar10", tmp_path, limit=4)
    assert images.y_train.tolist() == [1, 2, 3, 4]
    assert images.note == "0.006k-image subset, first 4 of 6 training images"
    assert load_images("cifar10", tmp_path, limit=6).note == "0.006k-image subset"


def test_the_python_version_beside_the_binary_one_is_not_taken(tmp_path: Path) -> None:
    write_tar(tmp_path / "cifar-10-a-python.tar.gz", {"data_batch_1": b"pickle"}, "w:gz")
    assert "data_batch_1.bin is missing or behind a cut; give the whole binary" in failure("cifar10", tmp_path)
    write_tar(tmp_path / "cifar-10-binary.tar.gz", CIFAR, "w:gz")
    assert len(load_images("cifar10", tmp_path).x_train) == 6


BAD_CIFAR: dict[str, tuple[dict[str, bytes], str]] = {
    "cut": (CIFAR | {"data_batch_2.bin": CIFAR["data_batch_2.bin"][:-1]}, "9,218 bytes are not a whole number"),
    "cifar100": (CIFAR | {"data_batch_2.bin": bytes(2 * 3074)}, "3073-byte records (byte 6146); the file is cut off"),
    "empty": (CIFAR | {"data_batch_2.bin": b""}, "is empty (byte 0)"),
    "label": (
        CIFAR | {"data_batch_2.bin": cifar_records(1, 10)},
        "label 10 of image 1 is not in 0..9 (byte 3073); it is damaged or of another data set",
    ),
}


@pytest.mark.parametrize("way", ["tar", "folder"])
@pytest.mark.parametrize("case", BAD_CIFAR)
def test_bad_cifar_batches_name_file_offset_and_remedy(case: str, way: str, tmp_path: Path) -> None:
    files, message = BAD_CIFAR[case]
    source = write_tar(tmp_path / "c.tar", files) if way == "tar" else write_folder(tmp_path, files)
    text = failure("cifar10", tmp_path)
    assert text.startswith(f"{source / 'data_batch_2.bin'}: ")
    assert message in text


@pytest.mark.parametrize("way", ["tar", "folder"])
def test_no_test_batch(way: str, tmp_path: Path) -> None:
    files = {name: data for name, data in CIFAR.items() if name != "test_batch.bin"}
    source = write_tar(tmp_path / "c.tar", files) if way == "tar" else write_folder(tmp_path, files)
    assert failure("cifar10", tmp_path).startswith(f"{source}: test_batch.bin is missing or behind a cut; give")


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_tars_cut_or_damaged_anywhere_are_data_errors(suffix: str, tmp_path: Path) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    data = pack(write_tar(tmp_path / "whole", CIFAR).read_bytes())
    path = tmp_path / f"c.tar{suffix}"
    rng = random.Random(0)
    end = len(data) if suffix else 512 * 2 + sum(512 * (1 - -len(file) // 512) for file in CIFAR.values()) - 1024
    for _ in range(40):  # cuts: the plain tar still has all its batches when only the closing zeros go
        path.write_bytes(data[: rng.randrange(end)])
        assert failure("cifar10", tmp_path).startswith(str(path))
    for _ in range(60):
        damaged = bytearray(data)
        damaged[rng.choice([rng.randrange(600), rng.randrange(len(data))])] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        text = complaint("cifar10", tmp_path)  # None: a flipped pixel of a plain tar is not seen
        assert (text or str(path)).startswith(str(path))


def test_something_else_named_tar(tmp_path: Path) -> None:
    (tmp_path / "c.tar.gz").write_bytes(b"<html>404 Not Found</html>")
    assert "the tar of 26 bytes cannot be read at all" in failure("cifar10", tmp_path)


def test_a_link_in_the_tar_is_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        member = tarfile.TarInfo("data_batch_1.bin")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    assert "data_batch_1.bin is missing" in failure("cifar10", tmp_path)


# Hugging Face datasets: a local folder of parquet files stands for a name on the hub


def write_hf(folder: Path, features: dict[str, Any], **splits: dict[str, list[Any]]) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    folder.mkdir()
    for split, columns in splits.items():
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(folder / f"{split}.parquet")
    return f"hf:{folder}"


def pictures(n: int, mode: str = "L", size: tuple[int, int] = (4, 5)) -> list[Any]:
    """PIL images of `size` = (width, height)."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(n)
    channels = {"L": (), "RGB": (3,), "I;16": ()}[mode]
    shape, dtype = (size[1], size[0], *channels), np.uint16 if mode == "I;16" else np.uint8
    return [image.fromarray(rng.integers(0, 200, shape, dtype)) for _ in range(n)]


def hf_features(**labels: Any) -> dict[str, Any]:
    return {"image": pytest.importorskip("datasets").Image(), **labels}


def class_label(*names: str) -> Any:
    return pytest.importorskip("datasets").ClassLabel(names=list(names))


def integer(dtype: str = "int64") -> Any:
    return pytest.importorskip("datasets").Value(dtype)


def test_hf_grayscale_with_class_labels(tmp_path: Path) -> None:
    train, test = pictures(7), pictures(3)
    name = write_hf(
        tmp_path / "set",
        hf_features(label=class_label("a", "b", "c")),
        train={"image": train, "label": [0, 1, 0, 1, 0, 1, 0]},
        test={"image": test, "label": [1, 1, 0]},
    )
    images = load_images(name, tmp_path / "cache")
    check_invariants(images)
    assert (images.name, images.classes, images.shape, images.note) == (name, 3, (1, 5, 4), "")
    wanted = np.stack([np.asarray(image).reshape(-1) for image in train])
    assert torch.equal(images.x_train, torch.tensor(wanted) / 255)
    assert images.y_test.tolist() == [1, 1, 0]
    few = load_images(name, tmp_path / "cache", limit=2)
    assert torch.equal(few.x_train, images.x_train[:2])
    assert few.y_train.tolist() == [0, 1]
    assert (few.classes, few.note) == (3, "first 2 of 7 training images")


def test_hf_colour_integer_labels_validation_split(tmp_path: Path) -> None:
    train, mixed = pictures(4, "RGB"), [*pictures(1, "L"), *pictures(1, "RGB")]
    name = write_hf(
        tmp_path / "set",
        hf_features(coarse_label=class_label("x", "y"), fine_label=integer("uint8")),
        train={"image": train, "coarse_label": [0, 0, 1, 1], "fine_label": [0, 1, 2, 6]},
        validation={"image": mixed, "coarse_label": [0, 1], "fine_label": [3, 4]},
    )
    images = load_images(name, tmp_path / "cache")
    check_invariants(images)
    assert (images.classes, images.shape, images.note) == (7, (3, 5, 4), "validation split")
    planes = torch.tensor(np.asarray(train[0])).permute(2, 0, 1)
    assert torch.equal(images.x_train[0].reshape(3, 5, 4), planes / 255)
    gray = torch.tensor(np.asarray(mixed[0])) / 255
    assert torch.equal(images.x_test[0].reshape(3, 5, 4), gray.expand(3, 5, 4)), "gray among colour becomes colour"


def bad_hf(case: str, folder: Path) -> str:
    """A data set with one thing wrong."""
    labels = {"image": pictures(2), "label": [0, 1]}
    features = hf_features(label=integer())
    if case == "one split":
        return write_hf(folder, features, train=labels)
    if case == "no image":
        return write_hf(folder, {"label": integer()}, train={"label": [0]}, test={"label": [0]})
    if case == "no label":
        columns = {"image": pictures(2), "score": [0, 1]}
        return write_hf(folder, hf_features(score=integer()), train=columns, test=columns)
    if case == "unlabelled test":
        return write_hf(folder, features, train=labels, test=labels | {"label": [0, -1]})
    if case == "null label":
        return write_hf(folder, features, train=labels | {"label": [0, None]}, test=labels)
    if case == "two sizes":
        return write_hf(folder, features, train=labels, test=labels | {"image": pictures(2, size=(6, 6))})
    if case == "no picture":
        return write_hf(folder, features, train=labels | {"image": [*pictures(1), None]}, test=labels)
    if case == "16 bits":
        return write_hf(folder, features, train=labels | {"image": pictures(2, "I;16")}, test=labels)
    assert case == "damaged picture"
    broken = [{"bytes": b"\x89PNG\r\n\x1a\nnothing", "path": None}] * 2
    return write_hf(folder, features, train=labels | {"image": broken}, test=labels)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("one split", "its splits are train (2 rows); choose a data set with a train and a test"),
        ("no image", "its columns are label; choose a data set with an image column and a label column"),
        ("no label", "its columns are image, score; choose a data set with an image column and a label column"),
        ("unlabelled test", "label -1 in row 1 of split test is no class index"),
        ("null label", "label None in row 1 of split train is no class index"),
        ("two sizes", "its images have 2 sizes, from (5, 4) to (6, 6); choose a data set of images of one size"),
        ("no picture", "the image in row 1 of split train cannot be read (the row is empty)"),
        ("16 bits", "the image in row 0 of split train cannot be read (mode I;16 has more than 8 bits)"),
        ("damaged picture", "the image in row 0 of split train cannot be read"),
    ],
)
def test_bad_hf_data_sets(case: str, message: str, tmp_path: Path) -> None:
    name = bad_hf(case, tmp_path / "set")
    assert failure(name, tmp_path / "cache").startswith(f"{name}: {message}")


def test_hf_that_cannot_be_loaded(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    assert "no/such-set: cannot be loaded" in failure("hf:no/such-set", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    assert "cannot be loaded" in failure(f"hf:{tmp_path / 'set'}", tmp_path / "cache")
    (tmp_path / "set" / "train.parquet").write_bytes(b"PAR1, cut off")
    assert "cannot be loaded" in failure(f"hf:{tmp_path / 'set'}", tmp_path / "cache")


def test_hf_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    text = failure("hf:ylecun/mnist", None)
    assert text.startswith("hf:ylecun/mnist: `datasets` cannot be imported")
    assert text.endswith("; pip install 'pc-kernels[hf]'")


# names, folders, limits
