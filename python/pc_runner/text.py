# SPDX-License-Identifier: MIT
"""Sentences behind one door: `load_corpus` gives three lists of them whatever files they came from.

What can be wrong with a file ends in one `DataError`, as in `data.py`. Nothing is unpacked to disk.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pc_runner.sources import DataError, check_int, data_folders, load_hf, unpack

NAMES = ("pydoc", "files", "1bw", "hf:NAME")
ROLES = ("train", "dev", "test")

_ALIASES = {"train": ("train",), "dev": ("dev", "valid", "validation"), "test": ("test",)}
_SUFFIXES = (".txt", ".xz", ".gz")
_HF_TEXT = ("text", "sentence", "content")
_HF_CHUNK = 10_000  # rows that become Python strings at a time


@dataclass(frozen=True, eq=False)
class Corpus:
    """Sentences, split in three. None is empty; a line of a file is a sentence, white space at its ends removed.

    Attributes:
        name: what `load_corpus` was asked for.
        train, dev, test: the sentences, in the order of the files.
        note: what must be said beside every perplexity (a subset, sentences that two splits share); may be empty.
    """

    name: str
    train: list[str]
    dev: list[str]
    test: list[str]
    note: str


class _Raw(NamedTuple):
    """The lines of each split, empty ones included, read as they are asked for."""

    train: Iterable[str]
    dev: Iterable[str]
    test: Iterable[str]
    note: str = ""


def load_corpus(
    name: str,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    roles: Mapping[str, Sequence[str]] | None = None,
) -> Corpus:
    """Load sentences for a language model.

    Args:
        name: `pydoc` (the language reference that every CPython carries for `help()`: about 1,900 training sentences,
            each one always in the same split); `files` (text in UTF-8, plain, .gz or .xz, in `data_dir`, split by
            file); `1bw` (held-out shards 00010, 00011 | 00013 | 00000 of the 1 Billion Word Benchmark, and further
            training text `leipzig-*` if it is there, in `data_dir` or `data_dir/text`); or `hf:NAME`, a Hugging Face
            `datasets` name (`load_hf`: `hf:lm1b@refs/convert/parquet`) or a local folder, for which `data_dir` is the
            cache. Without a validation split there, the last twentieth of the training rows is dev.
        data_dir: where the files are; `pydoc` needs none.
        limit: keep the first `limit` training sentences (None: all). Dev and test are always whole.
        roles: for `files`, the patterns (`Path.glob`, relative to `data_dir`) of each split's files. None: .txt, .gz
            and .xz files in folders `train`, `dev` (`valid`, `validation`) and `test`, or so named (`train-01.txt.xz`).

    Raises:
        DataError: a name that is not one of `NAMES`, or files that are missing, cut off, malformed, or in two splits.
        ValueError: `limit` below 1, `roles` of another name. TypeError: `limit` not an int.
    """
    if limit is not None:
        check_int("limit", limit, least=1)
    if roles is not None and name != "files":
        raise ValueError(f"roles: wanted None for {name!r}, got {roles!r}; they are for 'files'")
    try:
        raw = _load_raw(name, None if data_dir is None else Path(data_dir).expanduser(), roles)
        train = list(islice(_sentences(raw.train), None if limit is None else limit + 1))
        dev, test = list(_sentences(raw.dev)), list(_sentences(raw.test))
    except OSError as error:  # a folder that may not be read, a disk that fails
        where, problem = error.filename or data_dir, error.strerror or str(error)
        raise DataError(where, problem, "check the path and its permissions") from None
    notes = [raw.note] if raw.note else []
    if limit is not None and limit < len(train):
        notes.append(f"first {limit:,} training sentences")
        del train[limit:]
    for role, sentences in zip(ROLES, (train, dev, test), strict=True):
        if not sentences:
            raise DataError(name, f"its {role} split holds no sentence", "put text there, one sentence a line")
    seen = set(train)
    for role, sentences in (("dev", dev), ("test", test)):
        if shared := sum(sentence in seen for sentence in sentences):
            notes.append(f"{shared:,} of {len(sentences):,} {role} sentences are also in train")
    return Corpus(name, train, dev, test, ", ".join(notes))


def _load_raw(name: str, data_dir: Path | None, roles: Mapping[str, Sequence[str]] | None) -> _Raw:
    if name == "pydoc":
        return _pydoc()
    if name == "files":
        return _files(data_folders(name, data_dir)[0], roles)
    if name == "1bw":
        return _1bw(data_folders(name, data_dir, inner="text"))
    if isinstance(name, str) and re.match("hf:.", name):
        return _hf(name, data_dir)
    raise DataError(f"data {name!r}", "unknown name", f"use one of {', '.join(NAMES)}")


def _sentences(lines: Iterable[str]) -> Iterator[str]:
    return (sentence for line in lines if (sentence := line.strip()))


# pydoc: CPython's own language reference
_BLOCK = re.compile(r"\n\s*\n|\n(?=\s*\* )")  # paragraphs and the items of lists
_MARK = re.compile(r"^(?:\*|\d+\.|\[\d+\]) ")  # what stands before the text of an item or a footnote
_NO_PROSE = re.compile(r"::=|>>>|\*{4}|={4}|-{4}|\|  | # ")  # grammar, sessions, headings, tables, code
_SENTENCE_END = re.compile(r'(?<=[.!?])\s+(?=["“(*]?[A-Z])')
_SENTENCE = re.compile(r'["“(*]*[A-Z].*[.!?:][)"”*]*')


def _pydoc() -> _Raw:
    """A sentence's own hash picks its split: it keeps it in every release of Python, and repetitions stay together."""
    try:
        topics: dict[str, str] = dict(import_module("pydoc_data.topics").topics)
        prose = [sentence for topic in sorted(topics) for sentence in _prose(topics[topic])]
    except (ImportError, AttributeError, TypeError) as error:  # left out by a distribution, or laid out anew
        remedy = "install the whole standard library of Python, or use data 'files'"
        raise DataError("pydoc", f"this Python has no texts in pydoc_data.topics ({error})", remedy) from None
    splits: dict[str, list[str]] = {role: [] for role in ROLES}
    for sentence in dict.fromkeys(prose):
        tenth = hashlib.sha256(sentence.encode()).digest()[0] % 10
        splits[{0: "test", 1: "dev"}.get(tenth, "train")].append(sentence)
    return _Raw(**splits, note=f"pydoc text of Python {platform.python_version()}")


def _prose(text: str) -> Iterator[str]:
    """The sentences of at least four words, each on one line, without code, grammar, headings and tables."""
    for block in _BLOCK.split(text):
        paragraph = " ".join(block.split())
        if _NO_PROSE.search(paragraph):
            continue
        for piece in _SENTENCE_END.split(_MARK.sub("", paragraph)):
            if _SENTENCE.fullmatch(piece) and piece.count(" ") >= 3:
                yield piece


# files: one role each
def _files(folder: Path, roles: Mapping[str, Sequence[str]] | None, note: str = "") -> _Raw:
    if roles is None:
        roles = {role: _usual_names(folder, role) for role in ROLES}
    if set(roles) != set(ROLES) or any(isinstance(patterns, str) for patterns in roles.values()):
        wanted = "a list of patterns for each of train, dev and test"
        raise ValueError(f"roles: wanted {wanted}, got {roles!r}; write {{'train': ['a*.txt'], ...}}")
    role_of: dict[Path, str] = {}
    for role in ROLES:
        for path in _matches(folder, role, roles[role]):
            if role_of.setdefault(path, role) != role:
                remedy = "give every file one split"
                raise DataError(path, f"is in two splits, {role_of[path]} and {role}", remedy)
    plain: dict[Path, Path] = {}
    for path in role_of:  # the same text packed and unpacked would count twice, or be trained on and tested
        if (other := plain.setdefault(_unpacked_name(path), path)) != path:
            raise DataError(path, f"lies beside {other.name}, which is the same text", "remove one of the two")
    return _Raw(*(_read([path for path in role_of if role_of[path] == role]) for role in ROLES), note=note)


def _unpacked_name(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".gz", ".xz") else path


def _usual_names(folder: Path, role: str) -> list[str]:
    """The files of a split, by the folders' and the files' own names."""
    found = [
        path.relative_to(folder).as_posix()
        for alias in _ALIASES[role]
        for pattern in (f"{alias}/**/*", f"{alias}[._-]*")
        for path in folder.glob(pattern)
        if path.suffix in _SUFFIXES and path.is_file()
    ]
    if not found:
        remedy = f"name them {role}.txt (.gz, .xz) or put them into a folder {role}, for each of {', '.join(ROLES)}"
        raise DataError(folder, f"holds no {role} files", remedy)
    return [re.sub(r"([*?[])", r"[\1]", name) for name in sorted(found)]


def _matches(folder: Path, role: str, patterns: Sequence[str]) -> list[Path]:
    """The files that match, in the order of the patterns and of their paths. Every pattern must match one."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        try:
            paths = [path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith(".")]
        except (ValueError, NotImplementedError) as error:
            raise DataError(folder, f"{pattern!r} is no pattern ({error})", "write it relative, as a*.txt") from None
        if not paths:
            raise DataError(folder, f"no file matches {pattern!r}", f"put the {role} text there, or correct the name")
        found |= dict.fromkeys(sorted(paths))
    return list(found)


def _read(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        data = unpack(path)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            remedy = "it is no text, or in another encoding: convert it (iconv -t utf-8)"
            raise DataError(path, f"is not UTF-8 ({error.reason})", remedy, error.start) from None
        yield from text.removeprefix("\ufeff").split("\n")  # not splitlines: U+2028 and \f do not end a sentence


# 1bw: shards of the 1 Billion Word Benchmark's held-out set
_1BW_SHARDS = {"train": ("00010", "00011"), "dev": ("00013",), "test": ("00000",)}


def _1bw(folders: list[Path]) -> _Raw:
    folder = next((folder for folder in folders if any(folder.glob("news.en.heldout-*"))), folders[0])
    roles = {role: [f"news.en.heldout-{n}-of-00050*" for n in shards] for role, shards in _1BW_SHARDS.items()}
    note = "trained on two held-out shards, not on the benchmark's 99"
    if more := sorted(path.name for path in folder.glob("leipzig-*") if path.is_file()):
        roles["train"].append("leipzig-*")
        note = f"{note}, and on {' and '.join(more)}"
    return _files(folder, roles, note)


# Hugging Face datasets
def _hf(name: str, cache_dir: Path | None) -> _Raw:
    found = load_hf(name, cache_dir)
    dev, test = ("validation" if "validation" in found else ""), ("test" if "test" in found else "validation")
    if not all(split in found and len(found[split]) for split in ("train", test)):
        rows = ", ".join(f"{split} ({len(rows)} rows)" for split, rows in found.items())
        remedy = "choose a data set with a train and a test (or validation) split that hold text"
        raise DataError(name, f"its splits are {rows}", remedy)
    column = _hf_column(name, found["train"].features)
    notes = [] if test == "test" else ["validation split as test"]
    train_rows, dev_rows = found["train"], found[dev] if dev and dev != test else None
    if dev_rows is None:
        first = len(train_rows) - max(1, min(len(found[test]), len(train_rows) // 20))
        train_rows, dev_rows = train_rows.select(range(first)), train_rows.select(range(first, len(train_rows)))
        notes.append(f"last {len(dev_rows):,} training rows as dev")
    parts = (_hf_lines(name, rows, column) for rows in (train_rows, dev_rows, found[test]))
    return _Raw(*parts, note=", ".join(notes))


def _hf_column(name: str, features: Mapping[str, Any]) -> str:
    """The string column with a usual name, else the only one."""
    texts = [key for key, feature in features.items() if str(getattr(feature, "dtype", "")).endswith("string")]
    usual = [key for key in _HF_TEXT if key in texts]
    if not usual and len(texts) != 1:
        wanted = f"one column of strings, or one of strings named {', '.join(_HF_TEXT)}"
        raise DataError(name, f"its columns are {', '.join(features)}", f"choose a data set with {wanted}")
    return (usual or texts)[0]


def _hf_lines(name: str, rows: Any, column: str) -> Iterator[str]:
    """The lines of every row; a row without a value counts as an empty line."""
    if column not in rows.features:
        problem = f"split {rows.split} has no column {column} ({', '.join(rows.features)})"
        raise DataError(name, problem, "choose a data set whose splits are alike")
    for start in range(0, len(rows), _HF_CHUNK):
        for text in rows[start : start + _HF_CHUNK][column]:
            yield from (text or "").split("\n")
