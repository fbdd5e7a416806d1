# SPDX-License-Identifier: MIT
"""What images and text share on their way in: the one error, packed files, folders, Hugging Face's loader."""

from __future__ import annotations

import gzip
import lzma
import tarfile
import zlib
from pathlib import Path
from typing import Any

DAMAGE = (EOFError, OSError, lzma.LZMAError, tarfile.TarError, zlib.error)  # what a decompressor says of bad input
_PACKERS = {b"\x1f\x8b": ("gzip", gzip.decompress), b"\xfd7zXZ\0": ("xz", lzma.decompress)}


class DataError(ValueError):
    """Data that cannot be had. `str()` is one line: the file, what is wrong, the byte where known, the remedy."""

    def __init__(self, where: object, problem: str, remedy: str, offset: int | None = None) -> None:
        at = "" if offset is None else f" (byte {offset})"
        super().__init__(" ".join(f"{where}: {problem}{at}; {remedy}".splitlines()))


def check_int(name: str, value: object, least: int) -> None:
    """Raise TypeError or ValueError unless `value` is an int of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}; pass a whole number >= {least}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}; pass a whole number >= {least}")


def unpack(path: Path) -> bytes:
    """The bytes of a file, unpacked if it is gzip or xz: told by its first bytes, as browsers unpack but keep the name.

    Raises:
        DataError: the packed file is damaged or cut off. OSError: the file cannot be read.
    """
    data = path.read_bytes()
    packer, decompress = next((value for magic, value in _PACKERS.items() if data.startswith(magic)), ("", bytes))
    try:
        return decompress(data)
    except DAMAGE as error:
        problem = f"the {packer} file of {len(data):,} bytes cannot be unpacked ({error})"
        end = len(data) if isinstance(error, EOFError) else None
        raise DataError(path, problem, "it is damaged or cut off: fetch it again", end) from None


def data_folders(name: str, data_dir: Path | None, inner: str = "") -> list[Path]:
    """Where the files of `name` may be: `data_dir` and `data_dir/inner` (empty: `name`), as far as they exist."""
    if data_dir is None:
        raise DataError(name, "no data folder was given", f"name the folder that holds the {name} files (--data-dir)")
    if not data_dir.is_dir():
        raise DataError(data_dir, "is not a folder", f"name the folder that holds the {name} files (--data-dir)")
    return [folder for folder in (data_dir, data_dir / (inner or name)) if folder.is_dir()]


def load_hf(name: str, cache_dir: Path | None) -> dict[Any, Any]:
    """The splits of a Hugging Face data set, by name.

    name: "hf:" and a local folder, or NAME[:CONFIGURATION][@REVISION] on the hub. Data sets whose repository is a
        script are refused by `datasets` >= 4; the hub keeps them converted as NAME@refs/convert/parquet.

    Raises:
        DataError: `datasets` is missing, or cannot load it.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(name, f"`datasets` cannot be imported ({error})", "pip install 'pc-kernels[hf]'") from None
    path, config, revision = name.removeprefix("hf:"), None, None
    if not Path(path).exists():  # neither mark can be part of a name on the hub
        path, _, revision = path.partition("@")
        path, _, config = path.partition(":")
    try:
        return datasets.load_dataset(
            path, config or None, cache_dir=str(cache_dir) if cache_dir else None, revision=revision or None
        )
    except Exception as error:  # network, hub, parquet, cache: `datasets` has no common base class
        problem = f"cannot be loaded ({type(error).__name__}: {error})"
        script = "scripts are no longer supported" in str(error)
        remedy = "check the name, the network, or the files of a local folder"
        raise DataError(name, problem, f"use hf:{path}@refs/convert/parquet" if script else remedy) from None
