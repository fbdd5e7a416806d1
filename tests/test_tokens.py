# SPDX-License-Identifier: MIT
"""Tokens: the tokeniser's bytes, the layout of a sample, and a cache that is never believed when it is damaged."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from datafiles import real
from pc_runner import tokens as tokens_module
from pc_runner.sources import DataError
from pc_runner.text import Corpus, load_corpus
from pc_runner.tokens import BOS, EOS, PAD, UNKNOWN, Samples, Tokeniser, Tokens, tokenise, train_tokeniser, user_cache

sentencepiece = pytest.importorskip("sentencepiece")


def corpus_of(train: list[str], dev: list[str] | None = None, test: list[str] | None = None) -> Corpus:
    return Corpus("small", train, dev or ["a b"], test or ["b a"], "")


def pydoc(**changes: Any) -> Corpus:
    return replace(load_corpus("pydoc"), **changes)


def failure(*arguments: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        tokenise(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert "; " in text
    return text


def same(a: Tokens, b: Tokens) -> bool:
    parts = [(getattr(a, role), getattr(b, role)) for role in ("train", "dev", "test")]
    tensors = [(getattr(x, key), getattr(y, key)) for x, y in parts for key in ("inputs", "targets", "mask")]
    return a.tokeniser.model_proto == b.tokeniser.model_proto and all(torch.equal(x, y) for x, y in tensors)


# the layout


def test_layout_by_hand() -> None:
    """Four places; sentences of 0, 1, 3, 4 and 6 tokens, words of one letter."""
    tokens = tokenise(
        corpus_of(["a", "a b a", "a b b a", "b a b a b b"], dev=["\u200b", "a ☃"]), vocabulary=9, length=4
    )
    coder = tokens.tokeniser
    a, b, space = (next(i for i in range(9) if coder.piece(i) == piece) for piece in ("▁a", "▁b", "▁"))
    assert (UNKNOWN, BOS, EOS, PAD, tokens.pad) == (0, 1, 2, 3, 3)
    assert [coder.piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert tokens.train.inputs.tolist() == [[1, a, 3, 3], [1, a, b, a], [1, a, b, b], [1, b, a, b]]
    assert tokens.train.targets.tolist() == [[a, 2, 3, 3], [a, b, a, 2], [a, b, b, a], [b, a, b, a]]
    assert tokens.train.mask.tolist() == [[True, True, False, False], *[[True] * 4] * 3]
    assert tokens.train.cut == 2, "four tokens fit, their end does not"
    assert tokens.dev.inputs.tolist() == [[1, 3, 3, 3], [1, a, space, 0]], "a line that normalises to nothing"
    assert tokens.dev.targets.tolist() == [[2, 3, 3, 3], [a, space, 0, 2]]
    assert (len(tokens.train), len(tokens.dev), len(tokens.test), tokens.length) == (4, 2, 1, 4)


@pytest.mark.parametrize("length", [1, 2, 32])
def test_every_sentence_of_pydoc_is_laid_out_as_said(length: int) -> None:
    corpus = pydoc()
    tokens = tokenise(corpus, vocabulary=1000, length=length)
    assert tokens.vocabulary == 1000
    assert tokens.note == corpus.note
    for role in ("train", "dev", "test"):
        samples, sentences = getattr(tokens, role), getattr(corpus, role)
        assert samples.inputs.shape == samples.targets.shape == samples.mask.shape == (len(sentences), length)
        assert samples.inputs.dtype == samples.targets.dtype == torch.int64
        assert samples.mask.dtype == torch.bool
        cut = 0
        for i, sentence in enumerate(sentences):
            ids = tokens.tokeniser.encode(sentence)
            targets = [*ids, EOS][:length]
            inputs = [BOS, *ids][: len(targets)]
            padding = [PAD] * (length - len(targets))
            assert samples.inputs[i].tolist() == inputs + padding
            assert samples.targets[i].tolist() == targets + padding
            assert samples.mask[i].tolist() == [True] * len(targets) + [False] * len(padding)
            cut += len(ids) >= length
        assert samples.cut == cut


def test_samples_take_the_end_out_of_the_inputs() -> None:
    samples = Samples.of(torch.tensor([[1, 7, 2, 3], [1, 7, 8, 9]], dtype=torch.int32))
    assert samples.inputs.tolist() == [[1, 7, 3], [1, 7, 8]]
    assert samples.targets.tolist() == [[7, 2, 3], [7, 8, 9]]


# the tokeniser

PRINT_DIGEST = """
import hashlib
from pc_runner.text import load_corpus
from pc_runner.tokens import train_tokeniser
print(hashlib.sha256(train_tokeniser(load_corpus("pydoc").train, 2000).model_proto).hexdigest())
"""


def test_two_trainings_give_the_same_bytes_in_any_process() -> None:
    train = load_corpus("pydoc").train
    first, second = (train_tokeniser(train, 2000).model_proto for _ in range(2))
    assert first == second
    assert first != train_tokeniser(train[1:], 2000).model_proto
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", PRINT_DIGEST]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == sha256(first).hexdigest()


def test_the_tokeniser_sees_the_training_split_alone() -> None:
    whole, other = tokenise(pydoc(), 500), tokenise(pydoc(dev=["☃ ☂ ☁ dev"] * 500, test=["☀"] * 500), 500)
    assert whole.tokeniser.model_proto == other.tokeniser.model_proto
    assert bool((other.dev.targets == UNKNOWN).any())


def test_text_comes_back() -> None:
    coder = train_tokeniser(load_corpus("pydoc").train, 1000)
    text = "The expression is evaluated; if it is false, the loop terminates."
    ids = coder.encode(text)
    assert len(ids) < len(text) / 3
    assert coder.decode(ids) == coder.decode([BOS, *ids, EOS, PAD, PAD]) == text
    assert "".join(map(coder.piece, ids)).replace("▁", " ").strip() == text
    again = Tokeniser(coder.model_proto)
    assert (again.encode(text), again.vocabulary) == (ids, 1000)
    assert coder.encode("") == []
    assert coder.decode([]) == ""
    for token in (-1, 1000):
        with pytest.raises(ValueError, match=rf"^token: wanted an id in 0..999, got {token}; "):
            coder.decode([5, token])
        with pytest.raises(ValueError, match=rf"^token: wanted an id in 0..999, got {token}; "):
            coder.piece(token)


def test_prompts_are_laid_out_as_samples() -> None:
    coder = train_tokeniser(load_corpus("pydoc").train, 1000)
    ids = coder.encode("if it is false")
    n = len(ids)
    assert n >= 4
    inputs, last = coder.prompt(ids, n + 2)
    assert inputs.dtype == torch.int64
    assert (inputs.tolist(), last) == ([[BOS, *ids, PAD]], n)
    assert coder.prompt(ids, n + 1)[0].tolist() == [[BOS, *ids]]
    inputs, last = coder.prompt(ids, 3)
    assert (inputs.tolist(), last) == ([[BOS, *ids[-2:]]], 2), "what is near decides"
    assert coder.prompt([], 3)[0].tolist() == [[BOS, PAD, PAD]]
    assert coder.prompt(ids, 1)[0].tolist() == [[BOS]]


@pytest.mark.parametrize("proto", [b"", b"no model", bytes(99), None])
def test_bytes_that_are_no_tokeniser(proto: Any) -> None:
    with pytest.raises(DataError, match=r"^tokeniser: the bytes are no SentencePiece model \(.*\); take the bytes of "):
        Tokeniser(proto)


def test_a_tokeniser_of_another_numbering() -> None:
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"]), model_writer=proto, vocab_size=7, model_type="bpe", minloglevel=2
    )
    with pytest.raises(DataError, match=r"its unknown, bos, eos and pad are \(0, 1, 2, -1\), not \(0, 1, 2, 3\); "):
        Tokeniser(proto.getvalue())


def test_a_small_text_makes_a_small_vocabulary() -> None:
    tokens = tokenise(corpus_of(["ab ab", "ab b"]))
    pieces = [tokens.tokeniser.piece(i) for i in range(tokens.vocabulary)]
    assert sorted(pieces) == sorted(["<unk>", "<s>", "</s>", "<pad>", "▁", "a", "b", "ab", "▁ab", "▁a", "▁b"])
    assert tokens.note == "vocabulary of 11: the training text makes no 8,001 pieces"
    assert tokens.train.targets.max() < 11


def test_vocabularies_that_cannot_be() -> None:
    text = failure(pydoc(), 20)
    assert text.startswith("tokeniser: no vocabulary of 20 can be made of 1,")
    assert "is smaller than required_chars. 20 vs " in text
    assert text.endswith("; choose another vocabulary, or give more text")
    assert "no vocabulary of 8,001 can be made of 1 training sentences" in failure(corpus_of(["\u200b"]))
    assert "no vocabulary of 1,099,511,627,776 can be made" in failure(pydoc(), 2**40)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vocabulary": 4}, ValueError, "vocabulary must be >= 5, got 4"),
        ({"vocabulary": 1e3}, TypeError, "vocabulary must be an int, got float 1000.0"),
        ({"length": 0}, ValueError, "length must be >= 1, got 0"),
        ({"length": True}, TypeError, "length must be an int, got bool True"),
    ],
)
def test_settings_out_of_range(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        tokenise(corpus_of(["a"]), **options)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    for cache in (None, tmp_path):
        text = failure(corpus_of(["a"]), cache=cache)
        assert text.startswith("tokeniser: `sentencepiece` cannot be imported (")
        assert text.endswith("; pip install 'pc-kernels[lm]'")


def test_a_line_where_it_takes_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines: list[str] = []
    tokenise(corpus_of(["a b c"]), report=lines.append)
    assert lines == []
    monkeypatch.setattr(tokens_module, "_SLOW", 4)
    for _ in range(2):  # the second time from the cache
        tokenise(corpus_of(["a b c"]), cache=tmp_path, report=lines.append)
    assert lines == ["training a tokeniser on 1 sentences of small, once"]


# the cache


def test_cache_hits_do_not_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, corpus = tmp_path / "new" / "folder", pydoc()
    made = tokenise(corpus, 500, cache=cache)
    assert same(made, tokenise(corpus, 500)), "with a cache and without"
    assert len(list(cache.iterdir())) == 1, "one file, nothing temporary"

    def refuse(*_: Any) -> Tokeniser:
        raise AssertionError("trained again")

    monkeypatch.setattr(tokens_module, "train_tokeniser", refuse)
    found = tokenise(pydoc(), 500, cache=str(cache))
    assert same(made, found)
    assert (found.name, found.note, found.length) == (made.name, made.note, 32)


def test_cache_misses_where_anything_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = corpus_of(["a b", "c"])
    others = [
        (corpus_of(["a bc"]), {}),
        (corpus_of(["a b", "d"]), {}),
        (corpus_of(["a b", "c"], dev=["a"]), {}),
        (corpus_of(["a b", "c"], test=["a"]), {}),
        (corpus_of(["a b"], dev=["c", "a b"]), {}),
        (base, {"vocabulary": 9}),
        (base, {"length": 31}),
    ]
    for corpus, options in [(base, {}), *others]:
        assert same(tokenise(corpus, cache=tmp_path, **options), tokenise(corpus, **options))
    assert len(list(tmp_path.iterdir())) == 1 + len(others)
    monkeypatch.setattr(sentencepiece, "__version__", "0.0")
    tokenise(base, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 + len(others)


def test_damaged_files_are_made_anew_and_said(tmp_path: Path) -> None:
    corpus = corpus_of(["a b c", "d e"])
    wanted = tokenise(corpus, cache=tmp_path)
    path = next(tmp_path.iterdir())
    data = path.read_bytes()
    rng = random.Random(0)
    cuts = [data[:cut] for cut in (0, 1, 7, 8, 100, len(data) // 2, len(data) - 1)]
    flips = [bytearray(data) for _ in range(40)]
    for flipped in flips:
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    for damaged in (*cuts, b"something else", data + b"\0", *flips):
        path.write_bytes(damaged)
        lines: list[str] = []
        assert same(tokenise(corpus, cache=tmp_path, report=lines.append), wanted)
        assert lines == [f"{path}: damaged; it is made anew"]
        assert path.read_bytes() == data
    assert same(tokenise(corpus, cache=tmp_path), wanted)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text = failure(corpus_of(["a"]), cache=tmp_path / "file")
    assert text.startswith(f"{tmp_path / 'file'}/text-")
    assert "the cache cannot be " in text
    assert "; see to its folder" in text


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "pc-kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache() == Path.home() / ".cache" / "pc-kernels"


# real data


def test_real_1bw(tmp_path: Path) -> None:
    corpus = load_corpus("1bw", real("text"))
    tokens = tokenise(corpus, cache=tmp_path)
    assert same(tokens, tokenise(corpus, cache=tmp_path))
    assert (tokens.vocabulary, tokens.length, tokens.note) == (8001, 32, corpus.note)
    assert [len(tokens.train), len(tokens.dev), len(tokens.test)] == [42_215, 6_119, 6_075]
    for samples in (tokens.train, tokens.dev, tokens.test):
        assert int(samples.targets.max()) < 8001
        unknown = int((samples.targets == UNKNOWN).sum()) / int(samples.mask.sum())
        assert unknown < 0.002
        assert 26 < int(samples.mask.sum()) / len(samples) < 27
        assert 0.42 < samples.cut / len(samples) < 0.48
    sentence = corpus.test[2]
    row = tokens.test.targets[2]
    assert tokens.tokeniser.decode(row.tolist()) == sentence
    assert int(row[len(tokens.tokeniser.encode(sentence))]) == EOS
