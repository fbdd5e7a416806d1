# SPDX-License-Identifier: MIT
"""From the description of a call to what the kernels read: the workspace's layout, the tables, the form. Pure Python.

Nothing here depends on addresses or data, so a layout serves every call of the same shapes, families and settings.
"""

from __future__ import annotations

import struct
from functools import cached_property
from typing import NamedTuple

from pc_kernels.backends import triton_infer_copy as copies
from pc_kernels.backends import triton_infer_table as table
from pc_kernels.backends.triton_infer_call import Call, power_of_two, up_to
from pc_kernels.backends.triton_infer_table import FIELD, Form
from pc_kernels.backends.triton_launches import PERSISTENT, row_launch
from pc_kernels.backends.triton_math import ACTIVATION_CODES, ENERGY_CODES, HAS_OWN_TARGET, SAMPLE_FEED, present
from pc_kernels.schedule import Cone, Move, sources

COPIED = 1024  # entries a program copies
ALIGN = 64  # words: every buffer starts on a 256-byte line


class Copies(NamedTuple):
    """A launch that copies: its first address, where its tables lie, jobs padded to a power of two, programs."""

    first: int
    jobs_at: int
    ends_at: int
    jobs: int
    items: int


def _wide_words(values: list[int]) -> list[int]:
    """int64 numbers as pairs of int32 words."""
    return list(struct.unpack(f"={2 * len(values)}i", struct.pack(f"={len(values)}q", *values)))


def _float_words(values: list[float]) -> list[int]:
    """float32 numbers as int32 words."""
    return list(struct.unpack(f"={len(values)}i", struct.pack(f"={len(values)}f", *values)))


class Layout:
    """The workspace of a call. Attributes: `fields` (per node, the input first), `form`, `rows` and `row_block` (of the
    phases of rows), `moves`, `tables` (int32 words, at `tables_at`), offsets `*_at`, `size` in words, `packs` and
    `collects` (the launches that copy in and out)."""

    def __init__(self, call: Call):
        self.call = call
        launch = call.choice.launch
        self.pad = max(launch.block_n, launch.block_k)
        self.block_rows, self.rows, self.row_warps = row_launch(call.widest_row)
        self.row_block = power_of_two(16, min(self.block_rows, max(call.widest_row, 1)))
        self.padded_batch = up_to(max(launch.block_m, self.rows), call.batch)
        self.moves, self.moving_steps = self._moves()
        self.form = self._form()
        self.products = call.size + sum(move.products for move in self._all_moves())
        self.size = 0
        self.signals_at = self._take(ALIGN)
        self.rates_at = self._take(2 * self.form.NODES)
        self.jobs: list[list[int]] = []
        self.outputs: list[list[int]] = []
        self.slots = 0
        self.fields = [self._input_node(), *(self._node(l) for l in range(call.size)), [0] * len(FIELD)]
        self.parts = max(self.row_items, *(self.tiles(w) for w in call.widths)) if call.trace else 0
        self.energies_at = self._take((call.steps + 1) * call.size * self.parts)
        self._fill_jobs()
        self._place_tables()

    # -- the light cone ------------------------------------------------------------------------------------------

    def _moves(self) -> tuple[list[Move], int]:
        """The moves until they repeat themselves, and how many steps move anything."""
        call = self.call
        cone = Cone(*sources(call.energies, call.clamped, [state != "" for state in call.states]))
        moves: list[Move] = []
        while len(moves) < max(call.steps, 1):
            move = cone.advance()
            if moves and move == moves[-1]:
                break
            moves.append(move)
        return moves, call.steps if any(moves[-1].moves) else 0

    def _all_moves(self) -> list[Move]:
        return [self.moves[min(t, len(self.moves)) - 1] for t in range(1, self.moving_steps + 1)]

    def recorded(self) -> list[int]:
        """Per entry of the trace (steps + 1, layers): the step at which that energy was last computed."""
        rows = [[0] * self.call.size]
        for t in range(1, self.call.steps + 1):
            move = self.moves[min(t, len(self.moves)) - 1]
            refresh = move.refresh if t <= self.moving_steps else [False] * self.call.size
            rows.append([t if fresh else before for fresh, before in zip(refresh, rows[-1], strict=True)])
        return [entry for row in rows for entry in row]

    # -- tiles ---------------------------------------------------------------------------------------------------

    def tiles(self, width: int) -> int:
        launch = self.call.choice.launch
        return -(-self.call.batch // launch.block_m) * -(-width // launch.block_n)

    @property
    def row_items(self) -> int:
        return -(-self.call.batch // self.rows)

    def stage(self, move: Move) -> list[int]:
        """A stage's lists: ends of the tiles of each phase, and the nodes' roles."""
        call, n = self.call, self.call.size
        predicted = [l > 0 and move.moves[l - 1] for l in range(n)]
        counts = [
            [self.tiles(call.fed(l)) if move.moves[l] else 0 for l in range(n)],
            [self.row_items if move.moves[l] and call.row_update(l) else 0 for l in range(n)],
            [self.tiles(call.widths[l]) if predicted[l] else 0 for l in range(n)],
            [self.row_items if move.refresh[l] and call.row_predict(l) else 0 for l in range(n)],
        ]
        lists = [self._padded([sum(count[: l + 1]) for l in range(n)], table.NO_END) for count in counts]
        roles = [self._role(l, move, predicted[l]) for l in range(n)]
        return [word for entry in [*lists, self._padded(roles, 0)] for word in entry]

    def _role(self, l: int, move: Move, predicted: bool) -> int:
        if not move.moves[l]:
            return 0
        role = table.MOVES.value | (table.FEEDBACK.value if move.feedback[l] else 0)
        if predicted or self.call.row_predict(l):
            return role
        return role | (table.REFRESHES_AT_END if l == 0 else table.REFRESHES).value

    def _padded(self, values: list[int], filler: int) -> list[int]:
        return values + [filler] * (self.form.NODES - len(values))

    def totals(self, step: int) -> tuple[int, int, int, int]:
        """Items of the phases UPDATE, UPDATE_ROWS, PREDICT, PREDICT_ROWS at a step."""
        stage = self.stages[min(step, len(self.stages)) - 1]
        n = self.form.NODES
        counts = [stage[kind * n + self.call.size - 1] for kind in range(4)]
        return counts[0], counts[1], counts[2], counts[3]

    @cached_property
    def stages(self) -> list[list[int]]:
        return [self.stage(move) for move in self.moves]

    def starts(self, l: int) -> tuple[int, int]:
        """Items of the phases START and START_ROWS of a layer."""
        by_rows = self.call.row_predict(l) or self.call.row_update(l)
        return self.tiles(self.call.widths[l]), self.row_items if by_rows else 0

    @property
    def most_items(self) -> int:
        """Of the phase with the most: more programs have nothing to do."""
        starts = [max(self.starts(l)) for l in range(self.call.size)]
        return max(*starts, *(max(self.totals(t + 1)) for t in range(len(self.stages))))

    # -- what has to be compiled ---------------------------------------------------------------------------------

    def _form(self) -> Form:
        call = self.call
        layers = range(call.size)
        targeted = {ENERGY_CODES[call.energies[l]] for l in layers if self._targeted(l)}
        entries = {ENERGY_CODES[call.energies[l]] for l in layers if not self._targeted(l)}
        fed = [l for l in layers if not call.last(l)]
        euclidean = [l for l in fed if call.rules[l] == "euclidean"]
        return Form(
            PRECISION=table.PRECISION_CODES[call.precision],
            ENERGIES=present(entries),
            TARGETS=present(targeted),
            ACTIVATIONS=present({ACTIVATION_CODES[name] for name in call.activations}),
            FEEDS=present({self._feed(l) for l in layers}),
            DIAGONAL="gaussian_diag" in call.energies,
            PROBABILITIES="categorical_probs" in call.energies,
            CATEGORICAL="categorical" in call.energies,
            EUCLIDEAN_CATEGORICAL=any(call.euclidean_categorical(l) and not call.clamped[l] for l in layers),
            SOFTMAX="softmax" in call.activations,
            SOFTMAX_FEED=any(call.feeds[l] == "softmax" and not call.passes_phi(l) for l in fed),
            EUCLIDEAN_SOFTMAX_FEED=any(call.feeds[l] == "softmax" and not call.clamped[l] for l in euclidean),
            PAIRS=any(call.paired(l) for l in layers),
            ROW_PREDICTS=any(call.row_predict(l) for l in layers),
            ROW_UPDATES=any(call.row_update(l) for l in layers),
            MOMENTUM=call.momentum,
            TRACE=call.trace,
            MASKS=any(call.masks) or any(call.holds),
            NODES=power_of_two(2, call.size),
            REVERSE=call.choice.reverse,
            INTERPRETED=call.interpreted,
        )

    def _targeted(self, l: int) -> bool:
        return self.call.clamped[l] and self.call.energies[l] in HAS_OWN_TARGET

    def _feed(self, l: int) -> int:
        if self.call.last(l):
            return ACTIVATION_CODES["identity"]
        return SAMPLE_FEED if self.call.feeds[l] == "sample" else ACTIVATION_CODES[self.call.feeds[l]]

    # -- memory --------------------------------------------------------------------------------------------------

    def _take(self, words: int) -> int:
        at = self.size
        self.size += up_to(ALIGN, max(words, 1))
        return at

    def _low(self, words: int) -> int:
        """Room for a buffer of operands: half of it for bfloat16."""
        return self._take(-(-words // 2) if self.call.precision in ("bf16", "bf16_delta") else words)

    def _input_node(self) -> list[int]:
        call = self.call
        fields = dict.fromkeys(FIELD, 0)
        ld = up_to(self.pad, call.inputs)
        fields.update(WIDTH=call.inputs, LD=ld, FED=call.inputs)
        if call.precision == "bf16_delta":
            fields["V_EXACT"] = self._take(self.padded_batch * ld)
        else:
            fields["V"] = self._low(self.padded_batch * ld)
        return list(fields.values())

    def _ld(self, l: int) -> int:
        """Whole tiles; whole rows where a phase of rows takes the node (gaussian_full masks its loads instead)."""
        by_rows = (self.call.row_predict(l) or self.call.row_update(l)) and not self.call.paired(l)
        return up_to(self.pad, max(self.call.widths[l], self.row_block if by_rows else 0))

    def _node(self, l: int) -> list[int]:
        call = self.call
        ld, width = self._ld(l), call.widths[l]
        entries = self.padded_batch * ld
        below = call.inputs if l == 0 else call.fed(l - 1)
        f = dict.fromkeys(FIELD, 0)
        f.update(WIDTH=width, LD=ld, FED=call.fed(l), WEIGHT_LD=up_to(self.pad, below), FLAGS=self._flags(l))
        f.update(ACTIVATION=ACTIVATION_CODES[call.activations[l]], ENERGY=ENERGY_CODES[call.energies[l]])
        f.update(FEED=self._feed(l), RATE=self.rates_at + 2 * l)
        weights = up_to(self.pad, width) * f["WEIGHT_LD"]
        exact = call.precision == "bf16_delta"
        if not (exact and l == 0):  # that product is done once, in float32
            f["WEIGHT"] = self._low(weights)
        f["WEIGHT_EXACT"] = self._take(weights) if exact else 0
        f["BIAS"] = self._take(ld)
        f["LOG_VAR"] = self._take(ld) if call.energies[l] == "gaussian_diag" else 0
        for name in ("A", "MU", "PHI", "DELTA"):
            f[name] = self._take(entries)
        f["DELTA_READ"] = f["DELTA"] if call.precision == "fp32" else self._low(entries)
        f["V"] = f["PHI"]
        if not call.last(l) and not (call.precision == "fp32" and call.passes_phi(l)):
            f["V"] = self._low(entries)
        f["V_EXACT"] = self._take(entries) if exact and not call.last(l) else 0
        f["VELOCITY"] = self._take(entries) if call.momentum and not call.clamped[l] else 0
        f["BACK"] = self._take(entries) if call.row_update(l) else 0
        f["MASK"] = self._take(entries // 4) if call.masks[l] else 0
        f["HOLD"] = self._take(entries // 4) if call.holds[l] else 0
        f["NOISE"] = self._take(entries) if call.noise[l] else 0
        f["INDEX"] = self._take(self.padded_batch) if call.states[l] == "index" else 0
        return list(f.values())

    def _flags(self, l: int) -> int:
        call = self.call
        moves = self.moving_steps > 0 and self.moves[-1].moves[l]
        chosen = {
            table.NATURAL: call.rules[l] == "natural",
            table.CLAMPED: call.clamped[l],
            table.PASSES_PHI: call.passes_phi(l),
            table.GIVEN: call.states[l] != "",
            table.INDEXED: call.states[l] == "index",
            table.MASKED: call.masks[l],
            table.HELD: call.holds[l],
            table.ROW_PREDICT: call.row_predict(l),
            table.ROW_UPDATE: call.row_update(l),
            table.PAIRED: call.paired(l),
            table.STILL: not moves,
            table.OUTPUT: call.last(l),
            table.TARGETED: self._targeted(l),
        }
        return sum(flag.value for flag, there in chosen.items() if there)

    # -- copies in and out ---------------------------------------------------------------------------------------

    def _fill_jobs(self) -> None:
        """Copies in, in the order of triton_plan.tensors_of; then what starts at zero; and copies out."""
        call = self.call
        low = {"tf32": copies.TO_TF32, "bf16": copies.TO_BF16, "bf16_delta": copies.TO_BF16}.get(
            call.precision, copies.FLOAT
        )
        exact = call.precision == "bf16_delta"
        x = self.fields[0]
        self._bring(copies.FLOAT if exact else low, call.batch, call.inputs, x, "V_EXACT" if exact else "V")
        for l in range(call.size):
            self._bring_node(l, low, exact)
        if self.parts:  # zeros: a node's tiles and its rows leave different numbers of partial sums
            entries = (call.steps + 1) * call.size * self.parts
            self.jobs.append([0, copies.ZERO.value, entries, entries, self.energies_at, entries])
        for l in range(call.size):
            f = self.fields[l + 1]
            for wanted, name in ((not call.clamped[l], "PHI"), (True, "DELTA")):
                if wanted:
                    job = [len(self.outputs), 0, call.widths[l], call.batch * call.widths[l], f[FIELD[name]]]
                    self.outputs.append([*job, f[FIELD["LD"]]])

    def _bring_node(self, l: int, low: object, exact: bool) -> None:
        call, f = self.call, self.fields[l + 1]
        width, below = call.widths[l], call.inputs if l == 0 else call.fed(l - 1)
        half = call.paired(l) and call.clamped[l]
        phi_width = width // 2 if half else width
        if exact:
            self._bring(copies.FLOAT, width, below, f, "WEIGHT_EXACT", keep_slot=l > 0)
        if not (exact and l == 0):
            self._bring(low, width, below, f, "WEIGHT")
        if call.biases[l]:
            self._bring(copies.FLOAT, 1, width, f, "BIAS")
        if call.energies[l] == "gaussian_diag":
            self._bring(copies.FLOAT, 1, width, f, "LOG_VAR")
        if call.states[l]:
            index = call.states[l] == "index"
            rows, columns = (1, call.batch) if index else (call.batch, phi_width)
            self._bring(copies.INDICES if index else copies.FLOAT, rows, columns, f, "INDEX" if index else "PHI")
        if call.masks[l]:
            self._bring(copies.BYTES, call.batch, phi_width, f, "MASK")
        if call.holds[l]:
            self._bring(copies.BYTES, call.batch, phi_width, f, "HOLD")
        if call.noise[l]:
            self._bring(copies.FLOAT, call.batch, width // 2, f, "NOISE")
        if f[FIELD["VELOCITY"]]:
            self._bring(copies.ZERO, self.padded_batch, f[FIELD["LD"]], f, "VELOCITY", keep_slot=True)

    def _bring(self, kind, rows: int, columns: int, fields: list[int], name: str, keep_slot: bool = False) -> None:
        ld = fields[FIELD["WEIGHT_LD" if name.startswith("WEIGHT") else "LD"]]
        self.jobs.append(
            [0 if kind is copies.ZERO else self.slots, kind.value, columns, rows * columns, fields[FIELD[name]], ld]
        )
        self.slots += 0 if keep_slot else 1

    # -- tables --------------------------------------------------------------------------------------------------

    def _place_tables(self) -> None:
        """The tables, in one block at the end, written once."""
        self.tables_at = self.size
        self.tables: list[int] = []
        self.scales_at = self._write(_float_words([*self.call.lr_scales] + [0.0] * (self.form.NODES - self.call.size)))
        self.table_at = self._write(_wide_words([entry for fields in self.fields for entry in fields]))
        self.stages_at = self._write([word for stage in self.stages for word in stage])
        self.recorded_at = self._write(self.recorded() if self.call.trace else [])
        self.packs = self._copies(self.jobs)
        self.collects = self._copies(self.outputs)
        self._end_tables()

    def _write(self, words: list[int]) -> int:
        at = self._take(len(words))
        self.tables += words + [0] * (self.size - at - len(words))
        return at

    def _end_tables(self) -> None:
        self.size += up_to(copies.WORDS, len(self.tables)) - len(self.tables)
        self.tables += [0] * (self.size - self.tables_at - len(self.tables))

    def _copies(self, jobs: list[list[int]]) -> list[Copies]:
        """Launches of at most copies.SLOTS addresses each."""
        launches = []
        for first in range(0, max(job[0] for job in jobs) + 1, copies.SLOTS):
            mine = [[job[0] - first, *job[1:]] for job in jobs if first <= job[0] < first + copies.SLOTS]
            ends, total = [], 0
            for job in mine:
                total += -(-job[3] // COPIED)
                ends.append(total)
            count = power_of_two(2, len(mine))
            ends_at = self._write(ends + [table.NO_END] * (count - len(ends)))
            jobs_at = self._write(_wide_words([entry for job in mine for entry in job]))
            launches.append(Copies(first, jobs_at, ends_at, count, total))
        return launches

    @property
    def persistent(self) -> bool:
        return self.call.choice.schedule == PERSISTENT
