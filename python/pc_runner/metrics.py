# SPDX-License-Identifier: MIT
"""Numbers of a run as JSON lines: one dict a line, on disk as soon as it is known, each line once after a resume.

A line counts when it is whole. A process killed while writing leaves a torn last line; readers here pass over it and
writers remove it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pc_runner.checkpoint import write_atomically


class MetricsLog:
    """Append rows to a JSON-lines file, and to TensorBoard beside it if asked. A context manager.

    Args:
        path: the file; its folder is made. A file that is there is appended to.
        resume_step: continue a run from this step: rows whose `step` is larger are dropped first, as the resumed run
            writes them again. Rows without a `step` stay. None: all rows stay; -1: start anew.
        tensorboard: also write every number of a row that has a `step` as a scalar to the folder `tensorboard` beside
            the file.

    Raises:
        ValueError: `tensorboard=True` and the package is missing; or a line of the file is not a JSON object.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None, *, tensorboard: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._board = _summary_writer(self.path.parent / "tensorboard", resume_step) if tensorboard else None
        try:
            if resume_step is not None:
                _drop_after(self.path, resume_step)
            _mend(self.path)
        except BaseException:
            self._close_board()
            raise
        self._file = open(self.path, "ab")  # noqa: SIM115 closed by close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and hand it to the operating system: it survives the death of the process.

        Raises:
            TypeError: a value that JSON has no word for; nothing is written. Zero-dimensional tensors and NumPy
                scalars are written as numbers, NaN and infinities as Python's `NaN` and `Infinity`.
        """
        self._file.write(_line(row))
        self._file.flush()
        if self._board is not None and "step" in row:
            for name, value in row.items():
                if name != "step" and _is_number(value):
                    self._board.add_scalar(name, float(value), int(row["step"]))

    def close(self) -> None:
        """Close the file and TensorBoard's; a second call does nothing."""
        self._file.close()
        self._close_board()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None


def append_json(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append one row to a JSON-lines file, made with its folder if missing; a torn last line is removed first.

    Raises:
        TypeError: a value that JSON has no word for; nothing is written.
    """
    line, path = _line(row), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    with open(path, "ab") as file:
        file.write(line)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, in order; none if it does not exist. A torn last line is passed over.

    Raises:
        ValueError: another line is not a JSON object; the message names the file and the line.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    last = _row(lines.pop())  # after the last newline: nothing, a torn line, or a whole one somebody edited
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None and line.strip():
            raise ValueError(f"{path}: line {number} is not a JSON object; mend or remove that line")
        rows += [] if row is None else [row]
    return rows if last is None else [*rows, last]


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(row), default=_plain).encode() + b"\n"


def _plain(value: Any) -> Any:
    """What `json` asks for values it does not know: a 0-d tensor or NumPy scalar becomes a Python number."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON; give plain numbers, strings, lists or dicts")


def _is_number(value: Any) -> bool:
    if isinstance(value, Real):
        return not isinstance(value, bool)
    return hasattr(value, "item") and getattr(value, "ndim", None) == 0


def _row(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, or None."""
    try:
        row = json.loads(line)
    except ValueError:  # torn, or not UTF-8
        return None
    return row if isinstance(row, dict) else None


def _drop_after(path: Path, step: int) -> None:
    """Rewrite the file without the rows that came after `step`; left alone where there are none."""
    rows = read_rows(path)
    kept = [row for row in rows if not (_is_number(row.get("step")) and row["step"] > step)]
    if len(kept) < len(rows):
        write_atomically(path, b"".join(map(_line, kept)))


def _mend(path: Path) -> None:
    """Make the file end in a newline: a torn last line is cut off, a whole one is ended."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        start = _last_line_start(file.fileno())
        file.seek(start)
        tail = file.read()
        if not tail:
            return
        if _row(tail) is None:
            file.truncate(start)
        else:
            file.write(b"\n")


def _last_line_start(descriptor: int) -> int:
    """The offset after the file's last newline, found from the end: logs grow long and every append asks."""
    end, block = os.fstat(descriptor).st_size, 4096
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _summary_writer(folder: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        remedy = "pip install 'pc-kernels[tensorboard]', or leave tensorboard off"
        raise ValueError(f"tensorboard was asked for and cannot be imported ({error}); {remedy}") from None
    return SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)
