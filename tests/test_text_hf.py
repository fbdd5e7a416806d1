# SPDX-License-Identifier: MIT
"""Text of Hugging Face `datasets`: a local folder of parquet files stands for a name on the hub."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when `datasets` is imported, which is later than here

import pytest
from pc_runner import text as text_module
from pc_runner.text import load_corpus
from test_text import failure, splits

Split = dict[str, list[Any]]


def write_hf(folder: Path, **parts: Split) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    folder.mkdir()
    for split, columns in parts.items():
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
    return f"hf:{folder}"


def test_three_splits_lines_and_empty_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_HF_CHUNK", 2)
    name = write_hf(
        tmp_path / "set",
        train={"text": ["one", "", " two \n\nthree\r\n", None, "four"], "label": [0, 1, 2, 3, 4]},
        validation={"text": ["five"], "label": [0]},
        test={"text": ["six\u2028seven"], "label": [0]},
    )
    corpus = load_corpus(name, tmp_path / "cache")
    assert splits(corpus) == (["one", "two", "three", "four"], ["five"], ["six\u2028seven"])
    assert (corpus.name, corpus.note) == (name, "")
    few = load_corpus(name, tmp_path / "cache", limit=2)
    assert splits(few) == (["one", "two"], ["five"], ["six\u2028seven"])
    assert few.note == "first 2 training sentences"


def test_without_validation_the_last_training_rows_are_dev(tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(100)]
    name = write_hf(tmp_path / "set", train={"text": rows}, test={"text": [f"test {i}" for i in range(50)]})
    corpus = load_corpus(name, tmp_path / "cache", limit=3)
    assert splits(corpus)[:2] == (rows[:3], rows[95:])
    assert corpus.note == "last 5 training rows as dev, first 3 training sentences"
    assert load_corpus(name, tmp_path / "cache").train == rows[:95]


def test_without_test_validation_is_test(tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(100)]
    name = write_hf(tmp_path / "set", train={"text": rows}, validation={"text": ["a", "b"]})
    corpus = load_corpus(name, tmp_path / "cache")
    assert splits(corpus) == (rows[:98], rows[98:], ["a", "b"])
    assert corpus.note == "validation split as test, last 2 training rows as dev"


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"title": ["t"], "sentence": ["s"]}, "s"),
        ({"content": ["c"], "text": ["t"], "sentence": ["s"]}, "t"),
        ({"id": [1], "whatever": ["w"]}, "w"),
    ],
)
def test_the_column_of_text(columns: Split, wanted: str, tmp_path: Path) -> None:
    name = write_hf(tmp_path / "set", train=columns, validation=columns, test=columns)
    corpus = load_corpus(name, tmp_path / "cache")
    assert splits(corpus) == ([wanted], [wanted], [wanted])
    assert corpus.note == "1 of 1 dev sentences are also in train, 1 of 1 test sentences are also in train"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": {"text": ["a"]}}, "its splits are train (1 rows); choose a data set with a train and a test"),
        ({"train": {"id": [1]}, "test": {"id": [1]}}, "its columns are id; choose a data set with one column of str"),
        (
            {"train": {"question": ["a"], "answer": ["b"]}, "test": {"question": ["a"], "answer": ["b"]}},
            "its columns are question, answer; choose a data set with one column of strings, or one of strings named "
            "text, sentence, content",
        ),
        ({"train": {"text": [["a"]]}, "test": {"text": [["a"]]}}, "its columns are text; choose a data set with one"),
        ({"train": {"text": ["a"]}, "test": {"text": ["b"]}}, "its train split holds no sentence; put text there"),
    ],
)
def test_bad_hf_data_sets(parts: dict[str, Split], message: str, tmp_path: Path) -> None:
    name = write_hf(tmp_path / "set", **parts)
    assert failure(name, tmp_path / "cache").startswith(f"{name}: {message}")


def test_hf_that_cannot_be_loaded(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    assert "no/such-set@v1: cannot be loaded" in failure("hf:no/such-set@v1", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").write_bytes(b"PAR1, cut off")
    assert "cannot be loaded" in failure(f"hf:{tmp_path / 'set'}", tmp_path / "cache")


def test_hf_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    text = failure("hf:lm1b")
    assert text.startswith("hf:lm1b: `datasets` cannot be imported")
    assert text.endswith("; pip install 'pc-kernels[hf]'")


def test_configuration_revision_and_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load_dataset(path: str, name: str | None, *, cache_dir: str | None, revision: str | None) -> Any:
        asked.append((path, name, revision, cache_dir))
        if revision is None:  # what datasets 4 and 5 say
            raise RuntimeError("Dataset scripts are no longer supported, but found lm1b.py")
        split = datasets.Dataset.from_dict({"text": ["a b", "c d"]})
        return datasets.DatasetDict(train=split, test=split.select([0]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert failure("hf:lm1b").endswith("found lm1b.py); use hf:lm1b@refs/convert/parquet")
    corpus = load_corpus("hf:lm1b:plain_text@refs/convert/parquet", tmp_path)
    assert splits(corpus) == (["a b"], ["c d"], ["a b"])
    assert asked == [("lm1b", None, None, None), ("lm1b", "plain_text", "refs/convert/parquet", str(tmp_path))]
