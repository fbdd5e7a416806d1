# SPDX-License-Identifier: MIT
"""Text: which sentences end up in which split, and one clear line for everything that can be wrong with a file."""

from __future__ import annotations

import gzip
import lzma
import os
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when `datasets` is imported, which is later than here

import pytest
from datafiles import real
from pc_runner.sources import DataError
from pc_runner.text import Corpus, load_corpus


def failure(name: str, data_dir: Path | None = None, **options: Any) -> str:
    """The message of the DataError, which must be one line with a remedy."""
    with pytest.raises(DataError) as caught:
        load_corpus(name, data_dir, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert "; " in text
    return text


def splits(corpus: Corpus) -> tuple[list[str], list[str], list[str]]:
    return corpus.train, corpus.dev, corpus.test


def check_invariants(corpus: Corpus) -> None:
    for sentences in splits(corpus):
        assert sentences
        assert all(type(sentence) is str and sentence and sentence == sentence.strip() for sentence in sentences)
        assert not any("\n" in sentence for sentence in sentences)


# pydoc


def test_pydoc() -> None:
    corpus = load_corpus("pydoc")
    check_invariants(corpus)
    everything = [sentence for part in splits(corpus) for sentence in part]
    assert len(set(everything)) == len(everything), "no sentence twice, hence none in two splits"
    assert len(corpus.train) > 1500
    assert all(len(part) > 150 for part in (corpus.dev, corpus.test))
    assert "Lambda expressions (sometimes called lambda forms) are used to create anonymous functions." in everything
    assert corpus.note == f"pydoc text of Python {'.'.join(map(str, sys.version_info[:3]))}"
    assert splits(load_corpus("pydoc")) == splits(corpus)


TOPICS = {
    "b": 'The "b" statement\n*****************\n\n   b_stmt ::= "b" expression. Not prose.\n\n'
    "It is a first sentence\nover two lines.  And this is a second one!\n\n   b = 1  # Never mind this one.\n",
    "a": "* An item of the list.\n* (Another item, *nested* and numbered.)\n\n  1. A number before the text.\n\n"
    "Too short.\n\nno capital letter begins this.\n\nThis one does not end\n\n+---+\n| A table is no prose. |\n\n"
    "[1] A footnote is a sentence:\n\nIt is a first sentence\nover two lines.\n",
}
PROSE = [
    "An item of the list.",
    "(Another item, *nested* and numbered.)",
    "A number before the text.",
    "A footnote is a sentence:",
    "It is a first sentence over two lines.",
    "And this is a second one!",
]


def pretend(monkeypatch: pytest.MonkeyPatch, topics: object) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", SimpleNamespace(topics=topics))  # type: ignore[arg-type]


def test_pydoc_prose_and_where_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    more = [f"This is sentence number {i}." for i in range(100)]
    pretend(monkeypatch, TOPICS | {"c": "\n\n".join(more)})
    corpus = load_corpus("pydoc")
    tenths = {sentence: sha256(sentence.encode()).digest()[0] % 10 for sentence in PROSE + more}
    assert corpus.test == [sentence for sentence, tenth in tenths.items() if tenth == 0]
    assert corpus.dev == [sentence for sentence, tenth in tenths.items() if tenth == 1]
    assert corpus.train == [sentence for sentence, tenth in tenths.items() if tenth > 1]


def test_pydoc_sentences_keep_their_split_when_others_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data.topics import topics

    whole = load_corpus("pydoc")
    pretend(monkeypatch, {key: topics[key] for key in sorted(topics)[::2]})  # as in another release of Python
    for part, there in zip(splits(load_corpus("pydoc")), splits(whole), strict=True):
        assert part
        assert set(part) <= set(there)


@pytest.mark.parametrize("module", [None, SimpleNamespace(), SimpleNamespace(topics={"with": ["lines"]})])
def test_a_python_without_the_topics(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    text = failure("pydoc")
    assert text.startswith("pydoc: this Python has no texts in pydoc_data.topics (")
    assert text.endswith("; install the whole standard library of Python, or use data 'files'")


# files

TEXT = {"train": "one\n\n two \r\nthree", "dev": "vier\n", "test": "fünf\u2028sechs\x0csieben\nacht\n"}
WANTED = (["one", "two", "three"], ["vier"], ["fünf\u2028sechs\x0csieben", "acht"])
PACK: dict[str, Callable[[bytes], bytes]] = {".txt": bytes, ".txt.gz": gzip.compress, ".xz": lzma.compress}


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


LAYOUTS = {
    "names": {"train": "train{}", "dev": "dev{}", "test": "test{}"},
    "longer names": {"train": "train-00-of-01{}", "dev": "valid_a{}", "test": "test.en{}"},
    "folders": {"train": "train/b/a{}", "dev": "validation/c{}", "test": "test/train{}"},
}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_by_their_usual_names(layout: str, suffix: str, tmp_path: Path) -> None:
    write(tmp_path, {LAYOUTS[layout][role].format(suffix): PACK[suffix](TEXT[role].encode()) for role in TEXT})
    write(tmp_path, {"README.md": "not read", "training.txt": "not read", "train/notes.md": "not read"})
    before = sorted(tmp_path.rglob("*"))
    corpus = load_corpus("files", str(tmp_path))
    check_invariants(corpus)
    assert splits(corpus) == WANTED
    assert (corpus.name, corpus.note) == ("files", "")
    assert sorted(tmp_path.rglob("*")) == before, "nothing is unpacked to disk"


def test_files_by_patterns_in_their_order(tmp_path: Path) -> None:
    write(
        tmp_path, {"a.txt": "a", "b10": "b10", "b2": lzma.compress(b"b2"), "c[1]": "c", "x/d": "\ufeffd", ".b0": "no"}
    )
    roles = {"train": ["b*", "a.txt"], "dev": ["**/d"], "test": ["c*"]}
    assert splits(load_corpus("files", tmp_path, roles=roles)) == (["b10", "b2", "a"], ["d"], ["c"])


def test_usual_names_with_marks_of_patterns(tmp_path: Path) -> None:
    write(tmp_path, {"train-[1].txt": "a", "train-1.txt": "b", "dev-*.txt": "c", "test-?.txt": "d"})
    assert splits(load_corpus("files", tmp_path)) == (["b", "a"], ["c"], ["d"])


GOOD: dict[str, str | bytes] = {"train.txt": "a\nb\n", "dev.txt": "c\n", "test.txt": "d\n"}
THREE = {"train": ["train*"], "dev": ["dev*"], "test": ["test*"]}

# what is changed, roles, the message behind the folder
BAD_FILES: dict[str, tuple[dict[str, str | bytes], Any, str]] = {
    "two splits": ({}, THREE | {"dev": ["t*.txt"]}, "/train.txt: is in two splits, train and dev; give every file one"),
    "no match": ({}, THREE | {"dev": ["dev*", "more*"]}, ": no file matches 'more*'; put the dev text there"),
    "absolute": ({}, THREE | {"dev": ["/dev*"]}, ": '/dev*' is no pattern (Non-relative patterns are unsupported);"),
    "packed too": (
        {"train.txt.xz": lzma.compress(b"a\nb\n")},
        None,
        "/train.txt.xz: lies beside train.txt, which is the same text; remove one of the two",
    ),
    "packed for test": (
        {"train.txt.gz": gzip.compress(b"a\nb\n")},
        {"train": ["train.txt"], "dev": ["dev*"], "test": ["*.gz"]},
        "/train.txt.gz: lies beside train.txt, which is the same text",
    ),
    "latin-1": (
        {"dev.txt": "c\nGr\xfc\xdfe\n".encode("latin-1")},
        None,
        "/dev.txt: is not UTF-8 (invalid start byte) (byte 4); it is no text, or in another encoding: convert it",
    ),
    "gzip cut": ({"dev.txt": gzip.compress(b"c" * 99)[:20]}, None, "/dev.txt: the gzip file of 20 bytes cannot be "),
    "xz cut": ({"dev.txt": lzma.compress(b"c" * 99)[:40]}, None, "/dev.txt: the xz file of 40 bytes cannot be unp"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_name_file_problem_and_remedy(case: str, tmp_path: Path) -> None:
    files, roles, message = BAD_FILES[case]
    write(tmp_path, GOOD | files)
    assert failure("files", tmp_path, roles=roles).startswith(f"{tmp_path}{message}")


@pytest.mark.parametrize("role", ["train", "dev", "test"])
def test_each_missing_or_empty_split_is_named(role: str, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD | {f"{role}.txt": "\n \n"}) / f"{role}.txt"
    assert (
        failure("files", tmp_path) == f"files: its {role} split holds no sentence; put text there, one sentence a line"
    )
    path.unlink()
    text = failure("files", tmp_path)
    assert text.startswith(f"{tmp_path}: holds no {role} files; name them {role}.txt (.gz, .xz) or put them into")


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_packed_files_cut_or_damaged_anywhere_are_data_errors(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = write(tmp_path, GOOD) / "dev.txt"
    data = pack("Drei Sätze.\nVier, fünf.\n".encode() * 9)
    for cut in range(6, len(data)):
        path.write_bytes(data[:cut])
        assert failure("files", tmp_path).startswith(f"{path}: ")
    rng = random.Random(0)
    for _ in range(200):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with suppress(DataError):  # a flipped bit of gzip's time stamp is not seen
            assert len(load_corpus("files", tmp_path).dev) == 18


@pytest.mark.parametrize("roles", [{"train": ["a"]}, THREE | {"more": ["a"]}, THREE | {"dev": "dev.txt"}])
def test_roles_that_are_none(roles: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^roles: wanted a list of patterns for each of train, dev and test, got \{"):
        load_corpus("files", write(tmp_path, GOOD), roles=roles)


def test_roles_are_for_files_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^roles: wanted None for 'pydoc', got \{.*; they are for 'files'$"):
        load_corpus("pydoc", tmp_path, roles=THREE)


def test_sentences_that_two_splits_share_are_said(tmp_path: Path) -> None:
    write(tmp_path, {"train.txt": "a\nb\na\n", "dev.txt": "c\nb\nb\n", "test.txt": "d\n"})
    corpus = load_corpus("files", tmp_path)
    assert splits(corpus) == (["a", "b", "a"], ["c", "b", "b"], ["d"])
    assert corpus.note == "2 of 3 dev sentences are also in train"
    assert load_corpus("files", tmp_path, limit=1).note == "first 1 training sentences"


# names, folders, limits


@pytest.mark.parametrize("name", ["PYDOC", "", "mnist", "hf:", "hf"])
def test_unknown_names_list_the_valid_ones(name: str) -> None:
    assert failure(name) == f"data {name!r}: unknown name; use one of pydoc, files, 1bw, hf:NAME"


@pytest.mark.parametrize("name", ["files", "1bw"])
def test_folders_that_are_none(name: str, tmp_path: Path) -> None:
    assert failure(name) == (
        f"{name}: no data folder was given; name the folder that holds the {name} files (--data-dir)"
    )
    assert failure(name, tmp_path / "gone").startswith(f"{tmp_path / 'gone'}: is not a folder; name the folder")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # chmod does not stop root, who runs the tests in a container
    assert failure("files", tmp_path) == (
        f"{tmp_path / 'train.txt'}: Permission denied; check the path and its permissions"
    )


def test_limit_keeps_the_first_and_may_exceed(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    one, two, more = (load_corpus("files", tmp_path, limit) for limit in (1, 2, 3))
    assert splits(one) == (["a"], ["c"], ["d"])
    assert one.note == "first 1 training sentences"
    assert splits(two) == splits(more) == (["a", "b"], ["c"], ["d"])
    assert two.note == more.note == ""


@pytest.mark.parametrize(("limit", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_limits(limit: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^limit must be "):
        load_corpus("pydoc", limit=limit)


# 1bw


def test_real_1bw() -> None:
    corpus = load_corpus("1bw", real("text"))
    check_invariants(corpus)
    assert (len(corpus.train), len(corpus.dev), len(corpus.test)) == (12_216 + 29_999, 6_119, 6_075)
    assert corpus.train[0].startswith("But now , it 's looking like the page that list Reps who won 't talk")
    assert corpus.train[6_111] == "Mora , of Sylmar , did the same ."
    assert corpus.train[12_216].startswith("Head of Puerto Rico 's Republican Party calls Hinchcliffe")
    assert corpus.dev[0].startswith("Three men were hanged in public soon after dawn on Saturday")
    assert corpus.test[0].startswith("Having a little flexibility on that issue would go a long way")
    train, dev, test = map(set, splits(corpus))
    assert train.isdisjoint(dev | test)
    assert dev.isdisjoint(test)
    assert corpus.note == (
        "trained on two held-out shards, not on the benchmark's 99, "
        "and on leipzig-eng_news_2024_30K.tokenized.shuffled.txt.xz"
    )
    assert splits(load_corpus("1bw", real("text") / "text", limit=5))[0] == corpus.train[:5]


SHARDS = {"00010": "a\n", "00011": "b\n", "00013": "c\n", "00000": "d\n", "00001": "not read\n"}


@pytest.mark.parametrize("inner", [".", "text"])
def test_small_1bw(inner: str, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    write(tmp_path / inner, {f"news.en.heldout-{n}-of-00050": text for n, text in SHARDS.items()})
    corpus = load_corpus("1bw", tmp_path)
    assert splits(corpus) == (["a", "b"], ["c"], ["d"])
    assert corpus.note == "trained on two held-out shards, not on the benchmark's 99"
    write(tmp_path / inner, {"leipzig-b.txt.gz": gzip.compress(b"f\n"), "leipzig-a.txt": "e\n"})
    corpus = load_corpus("1bw", tmp_path)
    assert corpus.note.endswith(", and on leipzig-a.txt and leipzig-b.txt.gz")
    assert corpus.train == ["a", "b", "e", "f"]
    (tmp_path / inner / "news.en.heldout-00013-of-00050").unlink()
    text = failure("1bw", tmp_path)
    assert "no file matches 'news.en.heldout-00013-of-00050*'; put the dev text there, or correct the name" in text
