# SPDX-License-Identifier: MIT
"""Sentences as tokens: a SentencePiece tokeniser trained on the training split, and next-token samples of one length.

For a sentence of tokens t1..tn and samples of L places, padding elsewhere:

    n < L:   inputs  = [bos, t1, ..., tn]          targets = [t1, ..., tn, eos]
    n >= L:  inputs  = [bos, t1, ..., t(L-1)]      targets = [t1, ..., tL]       (cut: its end is no target)
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from pc_runner.checkpoint import write_atomically
from pc_runner.sources import DataError, check_int
from pc_runner.text import ROLES, Corpus

UNKNOWN, BOS, EOS, PAD = 0, 1, 2, 3
_SPECIAL = 4  # how many of a vocabulary's pieces stand for no text

# All that decides the tokeniser beside text, vocabulary and version; the rest is SentencePiece's default.
_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "unk_id": UNKNOWN,
    "bos_id": BOS,
    "eos_id": EOS,
    "pad_id": PAD,
    "hard_vocab_limit": False,  # a small text makes fewer pieces
    "num_threads": 1,
    "shuffle_input_sentence": False,
    "input_sentence_size": 0,  # all
    "max_sentence_length": 1 << 20,  # bytes; longer ones are left out of the training
    "minloglevel": 2,  # errors come as exceptions
}
_FORMAT = 1  # of the cache file and of the rows in it
_SLOW = 10_000_000  # characters of training text that take more than two seconds


class Tokeniser:
    """A SentencePiece model.

    Args:
        model_proto: the model's bytes, as `train_tokeniser` or the attribute of the same name gives them.

    Attributes:
        model_proto: bytes that make the same tokeniser again: what a checkpoint must keep.
        vocabulary: number of token ids, `UNKNOWN`, `BOS`, `EOS` and `PAD` among them.

    Raises:
        DataError: `sentencepiece` is missing, or the bytes are no model of `train_tokeniser`.
    """

    def __init__(self, model_proto: bytes) -> None:
        package = _sentencepiece()
        remedy = "take the bytes of Tokeniser.model_proto or of an undamaged checkpoint"
        self._model = package.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model_proto)
        except (RuntimeError, TypeError) as error:
            raise DataError("tokeniser", f"the bytes are no SentencePiece model ({error})", remedy) from None
        ids = tuple(getattr(self._model, f"{name}_id")() for name in ("unk", "bos", "eos", "pad"))
        if ids != (UNKNOWN, BOS, EOS, PAD):
            wanted = (UNKNOWN, BOS, EOS, PAD)
            raise DataError("tokeniser", f"its unknown, bos, eos and pad are {ids}, not {wanted}", remedy)
        self.model_proto = bytes(model_proto)
        self.vocabulary: int = self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, however many, without `BOS` and `EOS`."""
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; `BOS`, `EOS` and `PAD` give none. Raises ValueError for an id not in the vocabulary."""
        return self._model.decode([self._known(i) for i in ids])

    def piece(self, token: int) -> str:
        """One token as it is written in the vocabulary: `▁` is the space before a word, `<pad>` a special token."""
        return self._model.id_to_piece(self._known(token))

    def rows(self, sentences: Sequence[str], length: int) -> NDArray[np.int32]:
        """(N, length + 1): BOS, the tokens, EOS if it fits, PAD."""
        rows = np.full((len(sentences), length + 1), PAD, np.int32)
        rows[:, 0] = BOS
        for row, ids in zip(rows, self._model.encode(list(sentences)), strict=True):
            kept = [*ids, EOS][:length]
            row[1 : 1 + len(kept)] = kept
        return rows

    def prompt(self, ids: Sequence[int], length: int) -> tuple[Tensor, int]:
        """The inputs of one sample, (1, length) int64, that begins with these tokens, and the place that predicts what
        follows: `BOS` and at most the last length - 1 of them, then `PAD`."""
        seen = [BOS, *ids[max(0, len(ids) - (length - 1)) :]]
        return torch.tensor([seen + [PAD] * (length - len(seen))]), len(seen) - 1

    def _known(self, token: int) -> int:
        if not 0 <= token < self.vocabulary:
            raise ValueError(f"token: wanted an id in 0..{self.vocabulary - 1}, got {token}; use this tokeniser's ids")
        return int(token)


@dataclass(frozen=True, eq=False)
class Samples:
    """Next-token samples, one sentence each, laid out as the module's text says.

    Attributes:
        inputs, targets: (N, length) int64 token ids.
        mask: (N, length) bool, True where there is a target. The inputs of all other places are `PAD`.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor

    @staticmethod
    def of(rows: Tensor) -> Samples:
        """rows: (N, length + 1), as `Tokeniser.rows` makes them."""
        inputs, targets = rows[:, :-1].to(torch.int64), rows[:, 1:].to(torch.int64)
        mask = targets != PAD
        return Samples(torch.where(mask, inputs, PAD), targets, mask)

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def cut(self) -> int:
        """How many sentences are longer than a sample: those whose end is no target."""
        return len(self) - int((self.targets == EOS).any(1).sum())


@dataclass(frozen=True, eq=False)
class Tokens:
    """A corpus in tokens.

    Attributes:
        name, note: of the corpus; the note also says where the vocabulary is smaller than asked for.
        train, dev, test: the samples, in the order of the corpus's sentences.
        tokeniser: what made them, for `encode`, `decode` and `model_proto`.
    """

    name: str
    note: str
    train: Samples
    dev: Samples
    test: Samples
    tokeniser: Tokeniser

    @property
    def vocabulary(self) -> int:
        """Number of token ids: every id in the samples is below it."""
        return self.tokeniser.vocabulary

    @property
    def pad(self) -> int:
        """The token of places without text, `PAD`."""
        return PAD

    @property
    def length(self) -> int:
        """Places of a sample."""
        return self.train.inputs.shape[1]


def tokenise(
    corpus: Corpus,
    vocabulary: int = 8001,
    length: int = 32,
    cache: str | Path | None = None,
    report: Callable[[str], None] | None = None,
) -> Tokens:
    """Train a tokeniser on the training split and cut every sentence to `length` tokens. The same bits every time.

    Args:
        vocabulary: number of token ids wanted; where the training text makes fewer, `Tokens.vocabulary` is smaller and
            the note says so. A corpus with another `limit` has another tokeniser, hence another perplexity.
        length: places of a sample.
        cache: folder for the result (`user_cache()`), made if need be; a file in it is found again by the text, the
            settings and SentencePiece's version. None: nothing is kept.
        report: called with a line when this takes seconds, and when a damaged file of the cache is made anew.

    Raises:
        DataError: `sentencepiece` is missing, the vocabulary is too small for the text, or the cache cannot be written.
        ValueError, TypeError: `vocabulary` or `length` out of range.
    """
    check_int("vocabulary", vocabulary, least=_SPECIAL + 1)
    check_int("length", length, least=1)
    path = None if cache is None else Path(cache).expanduser() / f"text-{_key(corpus, vocabulary, length)}.safetensors"
    tensors = None if path is None else _cached(path, report)
    if tensors is None:
        tensors = _make(corpus, vocabulary, length, report)
        if path is not None:
            _keep(path, tensors)
    tokeniser = Tokeniser(tensors["model"].numpy().tobytes())
    notes = [corpus.note] if corpus.note else []
    if tokeniser.vocabulary < vocabulary:
        notes.append(f"vocabulary of {tokeniser.vocabulary:,}: the training text makes no {vocabulary:,} pieces")
    samples = {role: Samples.of(tensors[role]) for role in ROLES}
    return Tokens(name=corpus.name, note=", ".join(notes), tokeniser=tokeniser, **samples)


def train_tokeniser(sentences: Sequence[str], vocabulary: int) -> Tokeniser:
    """Train a byte-pair encoding of at most `vocabulary` pieces: the same sentences give the same bytes.

    Raises:
        DataError: `sentencepiece` is missing, or cannot make such a vocabulary of these sentences.
    """
    package, proto = _sentencepiece(), io.BytesIO()
    try:
        package.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=proto, vocab_size=vocabulary, **_SETTINGS
        )
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        cause = str(error).partition("] ")[2].strip() or error  # behind the place in SentencePiece's source
        problem = f"no vocabulary of {vocabulary:,} can be made of {len(sentences):,} training sentences ({cause})"
        raise DataError("tokeniser", problem, "choose another vocabulary, or give more text") from None
    return Tokeniser(proto.getvalue())


def user_cache() -> Path:
    """The folder for what can be made again: `$XDG_CACHE_HOME/pc-kernels`, or `~/.cache/pc-kernels`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pc-kernels"


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        problem = f"`sentencepiece` cannot be imported ({error})"
        raise DataError("tokeniser", problem, "pip install 'pc-kernels[lm]'") from None
    return sentencepiece


def _make(corpus: Corpus, vocabulary: int, length: int, report: Callable[[str], None] | None) -> dict[str, Tensor]:
    """The rows of each split, (N, length + 1) int32, and the tokeniser's bytes, (n,) uint8."""
    if report and sum(map(len, corpus.train)) > _SLOW:
        report(f"training a tokeniser on {len(corpus.train):,} sentences of {corpus.name}, once")
    tokeniser = train_tokeniser(corpus.train, vocabulary)
    arrays: dict[str, NDArray[Any]] = {role: tokeniser.rows(getattr(corpus, role), length) for role in ROLES}
    arrays["model"] = np.frombuffer(bytearray(tokeniser.model_proto), np.uint8)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


# the cache: one safetensors file, whose name says what it was made of and whose metadata what must be in it
def _key(corpus: Corpus, vocabulary: int, length: int) -> str:
    settings = {**_SETTINGS, "vocab_size": vocabulary, "length": length, "format": _FORMAT}
    digest = hashlib.sha256(json.dumps([settings, _sentencepiece().__version__]).encode())
    for role in ROLES:
        digest.update(json.dumps(getattr(corpus, role)).encode())
    return digest.hexdigest()[:32]


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _keep(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, safetensors.torch.save(tensors, metadata={"sha256": _digest(tensors)}))
    except OSError as error:
        problem = f"the cache cannot be written ({error.strerror or error})"
        raise DataError(path, problem, "see to its folder, permissions and disk space, or choose another") from None


def _cached(path: Path, report: Callable[[str], None] | None) -> dict[str, Tensor] | None:
    """What `_keep` wrote, None if there is nothing or if it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in (*ROLES, "model")}
            if (file.metadata() or {}).get("sha256") == _digest(tensors):
                return tensors
    except FileNotFoundError:
        return None
    except (OSError, safetensors.SafetensorError):
        pass
    if report:
        report(f"{path}: damaged; it is made anew")
    return None
