# SPDX-License-Identifier: MIT
"""What the tests of data sets share: where the real files are, and how a load fails."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when `datasets` is imported, which is later than here

import pytest
import torch
from pc_runner.data import DataError, Images, load_images

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
