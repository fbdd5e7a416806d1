# SPDX-License-Identifier: MIT
"""Data: the real sets as they are known, and one clear line for everything that can be wrong with a file."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when `datasets` is imported, which is later than here

import numpy as np
import pytest
import torch
from datafiles import check_invariants, complaint, failure, real
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pc_runner.data import batches, count_batches, load_images


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
