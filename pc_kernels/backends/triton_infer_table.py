# SPDX-License-Identifier: MIT
"""What the T-step kernels read about a chain: the fields of a node, its flags, and the tables of a stage.

Everything of a call lies in ONE allocation, the workspace: the tables first, then the buffers. Sizes and offsets are
counted in words of 4 bytes. Node 0 is the input, node l in 1..L the node that layer l predicts; its fields are
FIELDS int64 numbers. A stage is a move of the light cone (the README's section 3): which nodes the tiles of each
phase belong to. Lists of tiles are given by where each node's tiles end, so that a program finds its own by one
vector comparison.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import triton.language as tl

# a node's fields, in order
_FIELDS = (
    "WIDTH",  # D, entries of a sample
    "LD",  # entries from a sample to the next, in every buffer of the node; zeros beyond the width
    "FED",  # V, entries of what it passes on
    "WEIGHT_LD",  # entries from a row of the weight to the next
    "ACTIVATION",
    "ENERGY",
    "FEED",
    "FLAGS",
    "WEIGHT",  # (D, V of the node below), zero-padded, as the products read it; offsets from here on
    "WEIGHT_EXACT",  # in float32
    "BIAS",
    "LOG_VAR",
    "A",
    "MU",
    "PHI",
    "V",  # what the products read: v, or its last difference in `bf16_delta`
    "V_EXACT",  # `bf16_delta`: v in float32
    "DELTA",
    "DELTA_READ",  # delta as the products read it
    "VELOCITY",
    "BACK",  # W^T delta of the layer above, between a tile's phase and the rows' phase
    "MASK",
    "HOLD",
    "NOISE",
    "INDEX",
    "RATE",  # two numbers: lr * lr_scale, momentum
)
FIELDS = tl.constexpr(len(_FIELDS))
FIELD: dict[str, int] = {name: i for i, name in enumerate(_FIELDS)}

WIDTH = tl.constexpr(FIELD["WIDTH"])
LD = tl.constexpr(FIELD["LD"])
FED = tl.constexpr(FIELD["FED"])
WEIGHT_LD = tl.constexpr(FIELD["WEIGHT_LD"])
ACTIVATION = tl.constexpr(FIELD["ACTIVATION"])
ENERGY = tl.constexpr(FIELD["ENERGY"])
FEED = tl.constexpr(FIELD["FEED"])
FLAGS = tl.constexpr(FIELD["FLAGS"])
WEIGHT = tl.constexpr(FIELD["WEIGHT"])
WEIGHT_EXACT = tl.constexpr(FIELD["WEIGHT_EXACT"])
BIAS = tl.constexpr(FIELD["BIAS"])
LOG_VAR = tl.constexpr(FIELD["LOG_VAR"])
A = tl.constexpr(FIELD["A"])
MU = tl.constexpr(FIELD["MU"])
PHI = tl.constexpr(FIELD["PHI"])
V = tl.constexpr(FIELD["V"])
V_EXACT = tl.constexpr(FIELD["V_EXACT"])
DELTA = tl.constexpr(FIELD["DELTA"])
DELTA_READ = tl.constexpr(FIELD["DELTA_READ"])
VELOCITY = tl.constexpr(FIELD["VELOCITY"])
BACK = tl.constexpr(FIELD["BACK"])
MASK = tl.constexpr(FIELD["MASK"])
HOLD = tl.constexpr(FIELD["HOLD"])
NOISE = tl.constexpr(FIELD["NOISE"])
INDEX = tl.constexpr(FIELD["INDEX"])
RATE = tl.constexpr(FIELD["RATE"])

# flags of a node
NATURAL = tl.constexpr(1)
CLAMPED = tl.constexpr(2)
PASSES_PHI = tl.constexpr(4)  # v is phi itself: the identity, or a target that stands in place of its feed
GIVEN = tl.constexpr(8)  # phi is given at t = 0
INDEXED = tl.constexpr(16)  # the target is a class index
MASKED = tl.constexpr(32)
HELD = tl.constexpr(64)
ROW_PREDICT = tl.constexpr(128)  # its errors need a whole row, and a tile does not hold one
ROW_UPDATE = tl.constexpr(256)  # its update does
PAIRED = tl.constexpr(512)  # gaussian_full: means and log variances
STILL = tl.constexpr(1024)  # never moves
OUTPUT = tl.constexpr(2048)  # the last node: passes nothing on
TARGETED = tl.constexpr(4096)  # clamped, and the family's target has a form of its own

# what a node does in a stage
MOVES = tl.constexpr(1)
FEEDBACK = tl.constexpr(2)  # the product W^T delta of the layer above is not zero
REFRESHES = tl.constexpr(4)  # its own move changes its delta, and no product does
REFRESHES_AT_END = tl.constexpr(8)  # the same, and nobody reads that delta before the last move

# a stage: five lists of NODES int32 (NODES: the number of layers, padded to a power of two)
UPDATES = tl.constexpr(0)  # ends of the nodes' tiles in the update phase
UPDATE_ROWS = tl.constexpr(1)
PREDICTS = tl.constexpr(2)
PREDICT_ROWS = tl.constexpr(3)
ROLES = tl.constexpr(4)  # MOVES | ...
STAGE_LISTS = tl.constexpr(5)
NO_END = 2**31 - 1

# phases: one launch of tiles each, or all of them in one
START = tl.constexpr(0)
START_ROWS = tl.constexpr(1)
UPDATE = tl.constexpr(2)
UPDATE_ROWS_PHASE = tl.constexpr(3)
PREDICT = tl.constexpr(4)
PREDICT_ROWS_PHASE = tl.constexpr(5)
ALL = tl.constexpr(6)

# precisions of the products
FP32 = tl.constexpr(0)
TF32 = tl.constexpr(1)
BF16 = tl.constexpr(2)
BF16_DELTA = tl.constexpr(3)
PRECISION_CODES = {"fp32": 0, "tf32": 1, "bf16": 2, "bf16_delta": 3}

# signals: the first words of the workspace
FIRST = tl.constexpr(0)  # step * (L + 1) + layer of the first non-finite state; NO_END: none
ARRIVED = tl.constexpr(1)  # programs that have come to the grid's barriers


@dataclass(frozen=True)
class Form:
    """What a call needs compiled: one constexpr instead of a dozen. Sets are bit sets of codes (triton_math.present).

    ENERGIES, TARGETS: families, and those among the clamped that have a form of their own. ACTIVATIONS, FEEDS.
    DIAGONAL (gaussian_diag), PROBABILITIES (categorical_probs), CATEGORICAL, EUCLIDEAN_CATEGORICAL, SOFTMAX,
    SOFTMAX_FEED, EUCLIDEAN_SOFTMAX_FEED, PAIRS (gaussian_full): whether some node is so.
    ROW_PREDICTS, ROW_UPDATES: whether there are phases of rows. NODES: layers, padded to a power of two.
    """

    PRECISION: int
    ENERGIES: int
    TARGETS: int
    ACTIVATIONS: int
    FEEDS: int
    DIAGONAL: bool
    PROBABILITIES: bool
    CATEGORICAL: bool
    EUCLIDEAN_CATEGORICAL: bool
    SOFTMAX: bool
    SOFTMAX_FEED: bool
    EUCLIDEAN_SOFTMAX_FEED: bool
    PAIRS: bool
    ROW_PREDICTS: bool
    ROW_UPDATES: bool
    MOMENTUM: bool
    TRACE: bool
    MASKS: bool
    NODES: int
    REVERSE: bool
    INTERPRETED: bool

    def __repr__(self) -> str:  # becomes part of symbol names: letters, digits and underscores alone
        return "_".join(["form", *(str(int(entry)) for entry in astuple(self))])
