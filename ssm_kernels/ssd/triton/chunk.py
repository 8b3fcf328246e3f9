"""One chunk of SSD: the inputs, tile sizes and jit functions that the forward, the backward and the step share.

Letters: B batch, L length, H heads, P head dimension, N state, G groups, S sequences, M segments, Q steps of a chunk.
Kernels measure time in units of log2: `exp(dt A) = exp2(dt a)` with a = A log2(e).
"""

# The stubs know neither launches nor what jit functions return.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import capability, pack_directions, with_contiguous_last_dim
from ..._triton.primitives import (
    LOG2E,
    compute_type,
    d_softplus,
    dot_type,
    grid_offset,
    softplus,
    unpack_direction,
)
from ..._triton.segment_table import SegmentTable, build_segment_table
from ..arguments import ScanArguments

CHUNKS_PER_SEGMENT = 4
"""Chunks of a segment of the forward, at least: more of them need fewer states in memory, and make fewer programs."""


class Tiles(NamedTuple):
    """Tile sizes of the kernels. Chosen from the compiler's register counts; not measured on a GPU."""

    chunk_size: int
    block_p: int
    block_n: int
    num_warps: int

    def options(self) -> dict[str, int]:
        """Launch options of the kernels."""
        return {
            "Q": self.chunk_size,
            "BLOCK_P": self.block_p,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
        }


class ScanInputs:
    """Tensors of one call with contiguous last dimensions, its sizes, and the compile-time options of its kernels."""

    def __init__(self, arguments: ScanArguments):
        x, B, C = arguments.x, arguments.B, arguments.C
        self.batch, self.length, self.heads, self.headdim = x.shape
        self.groups, self.d_state = B.shape[2:]
        self.x, self.B, self.C = (with_contiguous_last_dim(t) for t in (x, B, C))
        self.dt = arguments.dt
        self.input_weights = arguments.input_weights
        self.weight_strides = None if self.input_weights is None else self.input_weights.stride()
        self.A = arguments.A.contiguous()
        D = arguments.D
        self.D = None if D is None else with_contiguous_last_dim(D).expand(self.heads, self.headdim)
        self.dt_bias = None if arguments.dt_bias is None else arguments.dt_bias.contiguous()
        self.initial_states = None if arguments.initial_states is None else arguments.initial_states.contiguous()
        self.cu_seqlens, self.seq_idx = arguments.cu_seqlens, arguments.seq_idx
        self.is_packed = self.cu_seqlens is not None or self.seq_idx is not None
        self.num_state_rows = self.batch if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        self.directions, self.height = pack_directions(arguments.directions), arguments.height
        self.chunk_size = arguments.chunk_size
        self.device = x.device
        self.state_dtype = torch.promote_types(x.dtype, torch.float32)
        self.dot = dot_type(x.dtype, B.dtype, C.dtype)
        self.on_tensor_cores = self.dot not in (tl.float32, tl.float64)
        _, version = capability(self.device)
        self.is_hopper = version == 90
        self.has_tensor_memory = version in (100, 103)  # tensor cores of the fifth generation
        self.rdna = {"gfx11": 3, "gfx12": 4}.get(str(version)[:5])  # generation; None elsewhere
        self.constants: dict[str, Any] = {
            "H": self.heads, "P": self.headdim, "N": self.d_state, "G": self.groups,
            "NUM_DIRECTIONS": len(arguments.directions),
            **dt_constants(arguments.dt_bias, arguments.dt_softplus, arguments.dt_min, arguments.dt_max),
            "DOT": self.dot,
            "COMPUTE": compute_type(x.dtype),
        }  # fmt: skip

    def build_segment_table(self, size: int) -> SegmentTable:
        """Divide the sequences into segments of `size` steps."""
        return build_segment_table(self.batch, self.length, size, self.cu_seqlens, self.seq_idx, self.device)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialized tensor, by default in the dtype of the states."""
        return torch.empty(shape, dtype=dtype or self.state_dtype, device=self.device)

    def empty_states(self, rows: int) -> Tensor:
        """Uninitialized states, (rows, H, P, N)."""
        return self.empty(rows, self.heads, self.headdim, self.d_state)

    def states_like(self, initial_states: Tensor | None) -> Tensor:
        """Buffer for the states at the other end of the sequences, (rows, H, P, N).

        It holds the initial states, or zeros, where a sequence may have no steps: its final state is the initial one.
        """
        if not self.is_packed and self.length:
            return self.empty_states(self.num_state_rows)
        if initial_states is None:
            return self.empty_states(self.num_state_rows).zero_()
        return initial_states.to(self.state_dtype, copy=True)

    def num_head_tiles(self, tiles: Tiles) -> int:
        """Programs of one segment: heads x tiles of P."""
        return self.heads * triton.cdiv(self.headdim, tiles.block_p)


def dt_constants(dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float) -> dict[str, Any]:
    """Compile-time options of `load_dt`. A softplus needs no limit of (0, inf)."""
    return {
        "HAS_DT_BIAS": dt_bias is not None,
        "DT_SOFTPLUS": dt_softplus,
        "HAS_DT_LIMIT": not (dt_softplus and (dt_min, dt_max) == (0.0, float("inf"))),
        "DT_MIN": dt_min,
        "DT_MAX": dt_max,
    }


def choose_tiles(inputs: ScanInputs, backward: bool) -> Tiles:
    """The largest tiles that fit in registers on this architecture, no larger than the inputs."""
    block_n = max(16, triton.next_power_of_2(inputs.d_state))
    if not inputs.on_tensor_cores:
        chunk_size, state_elements, num_warps = 16, 16 * block_n, 8
    elif capability(inputs.device)[0] == "hip":
        # Products on RDNA hold their operands in registers. With half a chunk the forward's loop spills none on RDNA 4;
        # on RDNA 3, which holds each operand twice, it spills as much, and executes a quarter more.
        chunk_size, state_elements, num_warps = 16 if inputs.rdna == 4 and not backward else 32, 8192, 4
    elif inputs.has_tensor_memory:
        chunk_size, state_elements, num_warps = 64, 8192, 8
    elif backward and block_n > (256 if inputs.is_hopper else 128):
        chunk_size, state_elements, num_warps = 16, 32 * block_n, 8
    elif backward:
        chunk_size, state_elements, num_warps = 64 if inputs.is_hopper else 32, 8192, 8
    elif inputs.is_hopper:
        # A product of Hopper has 64 rows for 4 warps, and the scores have 64 rows: of 8 warps, 4 would do the work of
        # the others again. State and scores fill the registers of 4 warps, and two blocks are resident.
        chunk_size, state_elements, num_warps = 64, 8192, 4
    else:
        # Products have 16 rows for a warp: 8 warps share the columns too. 4 warps take a tenth fewer instructions, and
        # spill where the state has 8192 elements.
        chunk_size = 32 if block_n <= 128 else 16
        state_elements, num_warps = 64 * block_n, 8 if block_n > 64 else 4
    if inputs.dot == tl.float16 and not backward:
        state_elements //= 2  # for what `scaled_operand` needs
    block_p = max(16, min(64, triton.next_power_of_2(inputs.headdim), state_elements // block_n))
    chunk_size = max(16, min(chunk_size, triton.next_power_of_2(inputs.chunk_size)))
    return Tiles(chunk_size, block_p, block_n, num_warps)


# --- jit functions ----------------------------------------------------------------------------------------------


@triton.jit
def split_program(program, H: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Segment (or chunk), head and tile of P of a program; the tile runs fastest."""
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    return program // (H * TILES), program // TILES % H, program % TILES


@triton.jit
def group_direction(directions, group, G: tl.constexpr, NUM_DIRECTIONS: tl.constexpr):
    """Scan direction of a group: the groups are NUM_DIRECTIONS equal runs. 0 in a scan in time."""
    if NUM_DIRECTIONS:
        return unpack_direction(directions, group // (G // NUM_DIRECTIONS))
    else:  # not after the branch: two types of result would not compile
        return 0


@triton.jit
def step_positions(steps, direction, length, height, NUM_DIRECTIONS: tl.constexpr):
    """Positions in the batch row of steps along a scan direction, int64."""
    positions = grid_offset(steps, direction, length, height) if NUM_DIRECTIONS > 0 else steps
    return positions.to(tl.int64)


@triton.jit
def chunk_positions(first, end, direction, length, height, Q: tl.constexpr, NUM_DIRECTIONS: tl.constexpr):
    """Positions in the batch row of the steps from `first` on, (Q,) int64, and the mask of those before `end`."""
    steps = first + tl.arange(0, Q)
    return step_positions(steps, direction, length, height, NUM_DIRECTIONS), steps < end


@triton.jit
def load_head(A_ptr, dt_bias_ptr, head, HAS_DT_BIAS: tl.constexpr, COMPUTE: tl.constexpr):
    """a = A log2(e) and the dt bias of one head."""
    # By way of `tl.full`, since a Python float alone is taken as float32.
    a = tl.load(A_ptr + head).to(COMPUTE) * tl.full((), LOG2E, COMPUTE)
    dt_bias = tl.load(dt_bias_ptr + head).to(COMPUTE) if HAS_DT_BIAS else 0.0
    return a, dt_bias


@triton.jit
def load_dt(
    dt_ptrs, mask_q, dt_bias, DT_SOFTPLUS: tl.constexpr, HAS_DT_LIMIT: tl.constexpr, DT_MIN: tl.constexpr,
    DT_MAX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Load dt of a chunk, (Q,), 0 outside the mask, and apply bias, softplus and limits.

    Returns:
        dt and its derivative with respect to the raw input.
    """
    raw = tl.load(dt_ptrs, mask_q, other=0.0).to(COMPUTE) + dt_bias
    dt, dt_derivative = raw, tl.full(raw.shape, 1.0, COMPUTE)
    if DT_SOFTPLUS:
        dt, dt_derivative = softplus(raw), d_softplus(raw)
    if HAS_DT_LIMIT:
        dt_min, dt_max = tl.full((), DT_MIN, COMPUTE), tl.full((), DT_MAX, COMPUTE)
        dt_derivative = tl.where((dt >= dt_min) & (dt <= dt_max), dt_derivative, 0.0)
        dt = tl.minimum(tl.maximum(dt, dt_min), dt_max)
    return tl.where(mask_q, dt, 0.0), tl.where(mask_q, dt_derivative, 0.0)


@triton.jit
def dot(a, b, COMPUTE: tl.constexpr):
    """Matrix product, summed in COMPUTE."""
    # float32 operands are not split in parts of tf32: three rounds of it would not fit in registers.
    return tl.dot(a, b, input_precision="ieee", out_dtype=COMPUTE)


@triton.jit
def scaled_operand(value, DOT: tl.constexpr):
    """A computed tile as an operand of matrix products, and the factor of the product with it.

    float16 ends at 65,504, which states, scores and weighted inputs may exceed although the results do not: the tile is
    divided by the power of two below its largest element. Inputs in float16 and other types need no factor.
    """
    scale = 1.0
    if DOT == tl.float16 and value.dtype != tl.float16:
        scale, inverse = power_of_two(value)
        value *= inverse
    return value.to(DOT), scale


@triton.jit
def weighted_operand(x, weights, DOT: tl.constexpr, COMPUTE: tl.constexpr):
    """`scaled_operand` of the rows of x, (Q, P), times weights, (Q,)."""
    if DOT == tl.float16 and x.dtype == tl.float16:
        # With weights of at most 1 the products are no larger than x, and fewer numbers are compared.
        scale, inverse = power_of_two(weights)
        return (x.to(COMPUTE) * (weights * (0.5 * inverse))[:, None]).to(DOT), 2 * scale
    else:
        return scaled_operand(x.to(COMPUTE) * weights[:, None], DOT)


@triton.jit
def power_of_two(value):
    """The power of two at or below the largest magnitude in a float32 tile, and its reciprocal."""
    exponent = tl.max(tl.abs(value)).to(tl.int32, bitcast=True) & 0x7F800000
    # An infinity must not reach the rest of the tile by way of the factor.
    exponent = tl.where(exponent == 0x7F800000, 0x3F800000, exponent)
    return exponent.to(tl.float32, bitcast=True), (0x7F000000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def sum_log_decays(dt, a, Q: tl.constexpr, COMPUTE: tl.constexpr):
    """Cumulative sums of the log decays dt a over the Q steps of a chunk, the first dimension.

    They are two parts. The coarse part sums multiples of UNIT, exactly; the fine part sums the remainders. So a
    difference of two cumulative sums is as exact as the terms between them.

    Returns:
        coarse and fine, like dt, and the totals of both, which do not wait for the cumulative sums.
    """
    # exp2 of it overflows, exp2 of its negative is 0.
    MAX_LOG_DECAY: tl.constexpr = 1100.0 if COMPUTE == tl.float64 else 150.0
    # So that Q MAX_LOG_DECAY / UNIT fits in the significand.
    UNIT: tl.constexpr = Q * (2.0**-42 if COMPUTE == tl.float64 else 2.0**-16)
    max_log_decay = tl.full((), MAX_LOG_DECAY, COMPUTE)
    log_decay = tl.minimum(tl.maximum(dt * a, -max_log_decay), max_log_decay)
    multiples = tl.floor(log_decay * (1 / UNIT)) * UNIT
    remainders = log_decay - multiples
    coarse, fine = tl.cumsum(multiples, axis=0), tl.cumsum(remainders, axis=0)
    return coarse, fine, tl.sum(multiples, axis=0), tl.sum(remainders, axis=0)


@triton.jit
def chunk_decays(dt, a, Q: tl.constexpr, COMPUTE: tl.constexpr):
    """Cumulative log decays of a chunk, as `sum_log_decays`, and its decays from the start, to the end and across.

    Returns:
        coarse, fine (Q,); decay_from_start (Q,), up to and with step i; decay_to_end (Q,), after step j; chunk_decay.
    """
    coarse, fine, coarse_total, fine_total = sum_log_decays(dt, a, Q, COMPUTE)
    decay_to_end = tl.exp2((coarse_total - coarse) + (fine_total - fine))
    return coarse, fine, tl.exp2(coarse + fine), decay_to_end, tl.exp2(coarse_total + fine_total)


@triton.jit
def coarse_decay_matrix(coarse, Q: tl.constexpr):
    """`decay_matrix` by the coarse cumulative sums alone, (Q, Q)."""
    i, j = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    return tl.exp2(tl.where(i >= j, coarse[:, None] - coarse[None, :], float("-inf")))


@triton.jit
def decay_matrix(coarse, fine, Q: tl.constexpr):
    """L of listing 1, (Q, Q): the decay from after step j up to step i, 0 for j > i."""
    return coarse_decay_matrix(coarse, Q) * tl.exp2(fine)[:, None] * tl.exp2(-fine)[None, :]
