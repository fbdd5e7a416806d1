# SPDX-License-Identifier: MIT
"""Data: the real sets as they are known, and one clear line for everything that can be wrong with a file."""

from __future__ import annotations

import gzip
import hashlib
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
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pc_runner.data import DataError, Images, batches, count_batches, load_images

SHARED = Path(__file__).parents[1].parent / "shared" / "data"


def real(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"the real {name} files are not at {SHARED / name}")
    return SHARED


def check_invariants(images: Images) -> None:
    channels, height, width = images.shape
    for x, y in ((images.x_train, images.y_train), (images.x_test, images.y_test)):
        assert x.shape == (len(y), channels * height * width)
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert x.is_contiguous()
        assert float(x.min()) >= 0
        assert float(x.max()) <= 1
        assert int(y.min()) >= 0
        assert int(y.max()) < images.classes


def failure(name: str, data_dir: Path | None, limit: int | None = None) -> str:
    """The message of the DataError, which must be one line with a remedy."""
    with pytest.raises(DataError) as caught:
        load_images(name, data_dir, limit)
    text = str(caught.value)
    assert "\n" not in text
    assert "; " in text
    return text


def complaint(name: str, data_dir: Path) -> str | None:
    """The message of the DataError, None if a valid set was loaded."""
    try:
        check_invariants(load_images(name, data_dir))
    except DataError as error:
        return str(error)
    return None


# digits


def test_digits() -> None:
    images = load_images("digits")
    check_invariants(images)
    assert (len(images.x_train), len(images.x_test)) == (1437, 360)
    assert (images.classes, images.shape, images.note) == (10, (1, 8, 8), "")
    assert float(images.x_train.max()) == 1
    counts = images.y_train.bincount() + images.y_test.bincount()
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # scikit-learn's documentation
    assert int(images.y_test.bincount().min()) >= 25, "the split is shuffled: every class is tested"


def test_digits_split_is_the_same_each_time_and_cuts_nothing_apart() -> None:
    from sklearn.datasets import load_digits

    a, b = load_images("digits"), load_images("digits")
    assert torch.equal(a.x_train, b.x_train)
    assert torch.equal(a.y_test, b.y_test)
    pixels, labels = load_digits(return_X_y=True)
    rows = torch.cat([torch.cat([a.x_train * 16, a.x_test * 16]), torch.cat([a.y_train, a.y_test])[:, None]], 1)
    wanted = np.concatenate([np.asarray(pixels), np.asarray(labels)[:, None]], 1)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, wanted.tolist()))


# MNIST

MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}


def test_real_mnist() -> None:
    folder = real("mnist")
    for name, md5 in MNIST_MD5.items():
        assert hashlib.md5((folder / "mnist" / name).read_bytes()).hexdigest() == md5
    images = load_images("mnist", folder)
    check_invariants(images)
    assert (len(images.x_train), len(images.x_test)) == (60_000, 10_000)
    assert (images.classes, images.shape, images.note) == (10, (1, 28, 28), "")
    assert images.y_train.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert images.y_test.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert images.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert images.y_test[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert float(images.x_train.mean(dtype=torch.float64)) == pytest.approx(0.1307, abs=5e-5)  # the well-known
    assert float(images.x_train.std()) == pytest.approx(0.3081, abs=5e-5)  # normalisation constants


def test_real_mnist_in_the_folder_itself_and_limited() -> None:
    images = load_images("mnist", real("mnist") / "mnist", limit=100)
    assert images.x_train.shape == (100, 784)
    assert images.y_train.shape == (100,)
    assert len(images.x_test) == 10_000
    assert images.note == "first 100 of 60,000 training images"


Arrays = dict[str, NDArray[np.uint8]]


def mnist_arrays() -> Arrays:
    rng = np.random.default_rng(0)
    arrays: Arrays = {}
    for prefix, n in (("train", 7), ("t10k", 4)):
        arrays[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 3, 2), np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = rng.integers(0, 10, n, np.uint8)
    return arrays


def idx(array: NDArray[np.uint8]) -> bytes:
    """An IDX file, written by the format's description."""
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


def write_mnist(folder: Path, arrays: Arrays | None = None, pack: Callable[[bytes], bytes] = bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (arrays or mnist_arrays()).items():
        (folder / (name if pack is bytes else f"{name}.gz")).write_bytes(pack(idx(array)))
    return folder


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("inner", [".", "mnist"])
def test_small_mnist_raw_and_packed(pack: Callable[[bytes], bytes], inner: str, tmp_path: Path) -> None:
    arrays = mnist_arrays()
    write_mnist(tmp_path / inner, arrays, pack)
    images = load_images("mnist", str(tmp_path))
    check_invariants(images)
    assert images.shape == (1, 3, 2)
    wanted = torch.tensor(arrays["train-images-idx3-ubyte"]).reshape(7, 6) / 255
    assert torch.equal(images.x_train, wanted)
    assert images.y_test.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()


def test_a_file_that_was_unpacked_but_kept_its_gz_name(tmp_path: Path) -> None:
    for path in list(write_mnist(tmp_path).iterdir()):
        path.rename(path.with_name(path.name + ".gz"))
    assert len(load_images("mnist", tmp_path).x_train) == 7


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
GOOD = {name: idx(array) for name, array in mnist_arrays().items()}

# file name, what is in it, the message after "FILE: "
BAD_IDX: dict[str, tuple[str, bytes, str]] = {
    "empty": (TRAIN_IMAGES, b"", "the IDX header of 16 bytes is cut off (byte 0); the file is damaged"),
    "header cut": (TRAIN_IMAGES, GOOD[TRAIN_IMAGES][:11], "the IDX header of 16 bytes is cut off (byte 11)"),
    "wrong magic": (TRAIN_LABELS, GOOD[TRAIN_IMAGES], "IDX magic 0x00000803 where 0x00000801 is wanted (byte 0)"),
    "float IDX": (
        TRAIN_IMAGES,
        b"\0\0\x0d\3" + GOOD[TRAIN_IMAGES][4:],
        "IDX magic 0x00000d03 where 0x00000803 is wanted (byte 0); put the right file under this name",
    ),
    "body cut": (TRAIN_IMAGES, GOOD[TRAIN_IMAGES][:-1], "the header promises 58 bytes and 57 are there (byte 57)"),
    "too long": (TRAIN_LABELS, GOOD[TRAIN_LABELS] + b"\0\0", "the header promises 15 bytes and 17 are there (byte 15)"),
    "huge counts": (
        TRAIN_IMAGES,
        GOOD[TRAIN_IMAGES][:4] + b"\xff" * 12 + GOOD[TRAIN_IMAGES][16:],
        "the header promises 79,228,162,458,924,105,385,300,197,391 bytes and 58 are there (byte 58)",
    ),
    "no images": (TRAIN_IMAGES, idx(np.zeros((0, 3, 2), np.uint8)), "holds no images or labels (byte 4)"),
    "label 10": (
        TRAIN_LABELS,
        idx(np.array([1, 2, 10, 3, 4, 5, 99], np.uint8)),
        "label 10 of image 2 is not in 0..9 (byte 10); it is damaged or of another data set",
    ),
    "other count": (
        TRAIN_LABELS,
        idx(np.zeros(6, np.uint8)),
        f"6 labels for the 7 images of {TRAIN_IMAGES} (byte 4); keep the four files of one data set together",
    ),
    "gzip cut": (TRAIN_IMAGES, gzip.compress(GOOD[TRAIN_IMAGES])[:30], "the gzip file of 30 bytes cannot be unpacked"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_names_file_offset_and_remedy(case: str, tmp_path: Path) -> None:
    name, data, message = BAD_IDX[case]
    write_mnist(tmp_path)
    (tmp_path / name).write_bytes(data)
    assert failure("mnist", tmp_path).startswith(f"{tmp_path / name}: {message}")


def test_test_images_of_another_size(tmp_path: Path) -> None:
    write_mnist(tmp_path, mnist_arrays() | {"t10k-images-idx3-ubyte": np.zeros((4, 5, 5), np.uint8)})
    assert "training images are (3, 2), test images (5, 5); keep the four" in failure("mnist", tmp_path)


@pytest.mark.parametrize("name", GOOD)
def test_each_missing_idx_file_is_named(name: str, tmp_path: Path) -> None:
    (write_mnist(tmp_path) / name).unlink()
    assert failure("mnist", tmp_path).startswith(f"{tmp_path}: holds neither {name} nor {name}.gz; put the four files")


@pytest.mark.parametrize("data", [GOOD[TRAIN_IMAGES], gzip.compress(GOOD[TRAIN_IMAGES])], ids=["raw", "gzip"])
def test_an_idx_file_cut_at_any_offset_is_a_data_error(data: bytes, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    for cut in range(len(data)):
        (tmp_path / TRAIN_IMAGES).write_bytes(data[:cut])
        assert str(tmp_path / TRAIN_IMAGES) in failure("mnist", tmp_path)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(GOOD)),
    packed=st.booleans(),
    patches=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 80),
    extra=st.binary(max_size=4),
)
def test_corrupt_idx_files_load_or_raise_data_error(
    name: str, packed: bool, patches: list[tuple[int, int]], cut: int, extra: bytes, tmp_path_factory: Any
) -> None:
    folder = write_mnist(tmp_path_factory.getbasetemp() / "corrupt")
    data = bytearray(gzip.compress(GOOD[name]) if packed else GOOD[name])
    for offset, value in patches:
        data[min(offset, len(data) - 1)] = value
    (folder / name).write_bytes(bytes(data[:cut]) + extra)
    assert (complaint("mnist", folder) or str(folder)).startswith(str(folder))


# CIFAR-10


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


@pytest.mark.parametrize("name", ["MNIST", "", "imagenet", "hf:", "hf"])
def test_unknown_names_list_the_valid_ones(name: str) -> None:
    assert failure(name, None) == f"data {name!r}: unknown name; use one of digits, mnist, cifar10, hf:NAME"


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_folders_that_are_none(name: str, tmp_path: Path) -> None:
    assert failure(name, None) == (
        f"{name}: no data folder was given; name the folder that holds the {name} files (--data-dir)"
    )
    assert failure(name, tmp_path / "gone").startswith(f"{tmp_path / 'gone'}: is not a folder; name the folder")
    (tmp_path / "file").touch()
    assert failure(name, tmp_path / "file").startswith(f"{tmp_path / 'file'}: is not a folder; name the folder")
    assert failure(name, tmp_path).startswith(f"{tmp_path}: holds neither ")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # chmod does not stop root, who runs the tests in a container
    path = tmp_path / TRAIN_IMAGES
    assert failure("mnist", tmp_path) == f"{path}: Permission denied; check the path and its permissions"


@pytest.mark.parametrize("limit", [0, -1])
def test_limits_below_one(limit: int) -> None:
    with pytest.raises(ValueError, match=rf"^limit must be >= 1, got {limit}; pass a whole number >= 1$"):
        load_images("digits", limit=limit)


@pytest.mark.parametrize("limit", [1.5, "10", True])
def test_limits_that_are_no_int(limit: Any) -> None:
    with pytest.raises(TypeError, match=r"^limit must be an int, got "):
        load_images("digits", limit=limit)


def test_limit_keeps_the_first_and_may_exceed() -> None:
    whole, some, more = (load_images("digits", limit=limit) for limit in (None, 10, 10_000))
    assert torch.equal(some.x_train, whole.x_train[:10])
    assert torch.equal(some.x_test, whole.x_test)
    assert some.note == "first 10 of 1,437 training images"
    assert torch.equal(more.x_train, whole.x_train)
    assert more.note == ""


# batches


@given(n=st.integers(0, 50), size=st.integers(1, 60), seed=st.integers(0, 2**64), epoch=st.integers(0, 9))
def test_batches_cover_all_once_and_skip_drops_the_first(n: int, size: int, seed: int, epoch: int) -> None:
    whole = list(batches(n, size, seed=seed, epoch=epoch))
    assert len(whole) == count_batches(n, size) == (n + size - 1) // size
    assert all(batch.dtype == torch.int64 and len(batch) == size for batch in whole[:-1])
    assert sorted(torch.cat([torch.empty(0, dtype=torch.int64), *whole]).tolist()) == list(range(n))
    for skip in range(len(whole) + 2):
        rest = list(batches(n, size, seed=seed, epoch=epoch, skip=skip))
        assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in whole[skip:]]


def test_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(torch.cat(list(batches(100, 7, seed=seed, epoch=epoch))).tolist())

    orders = {order(seed, epoch) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25, "seed 0's epoch 1 is not seed 1's epoch 0"
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert order(0, 1) in orders
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not moved"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": -1}, ValueError, "n must be >= 0, got -1"),
        ({"n": 2.0}, TypeError, "n must be an int, got float 2.0"),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"batch_size": "8"}, TypeError, "batch_size must be an int, got str '8'"),
        ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
        ({"epoch": -1}, ValueError, "epoch must be >= 0, got -1"),
        ({"skip": -1}, ValueError, "skip must be >= 0, got -1"),
        ({"skip": True}, TypeError, "skip must be an int, got bool True"),
    ],
)
def test_bad_batch_arguments_raise_at_the_call(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        batches(**({"n": 10, "batch_size": 3, "seed": 0, "epoch": 0} | arguments))
