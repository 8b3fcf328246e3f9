"""Backward of SSD in Triton.

The state of each head passes forward through its sequence, the gradient of the state in reverse, both in one launch.
Every CHECKPOINT_CHUNKS chunks, the state before them and the gradient of the state after them are written. With these
checkpoints chunks are independent: one kernel computes the gradients of a head's own inputs, one those of B and C,
which several heads share. Each makes again, by one chunk's step, the states that no checkpoint holds. Sums over
programs are partial sums in buffers, added up at the end.

Where heads and sequences are too few to fill the device, sequences are divided into segments, as in the forward: a
first pass computes what each segment adds, and `state_passing` turns that into the states at its ends.

Memory: besides the results, the checkpoints take at most MAX_CHECKPOINT_BYTES or MAX_CHECKPOINT_RATIO times the memory
of x, whichever is more; further checkpoints take further rounds of the kernels. bfloat16 with N = 128 and chunks of 64
takes one round, whatever the length.
"""

# The stubs know neither launches nor what jit functions return.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import (
    FUSED_MULTIPLY_ADD,
    maxnreg_option,
    num_sms,
    on_device,
    with_contiguous_last_dim,
)
from ..._triton.primitives import LN2, and_scalar, load_segment, zero_padding
from ..._triton.segment_table import SegmentTable
from ..._triton.state_passing import state_passing
from ..arguments import ScanArguments, ScanGradients
from .chunk import (
    ScanInputs,
    Tiles,
    choose_tiles,
    chunk_decays,
    chunk_positions,
    decay_matrix,
    dot,
    group_direction,
    load_dt,
    load_head,
    scaled_operand,
    split_program,
    weighted_operand,
)

CHECKPOINT_CHUNKS = 2
"""Chunks from one checkpoint to the next. Halves the memory traffic of states, for one more product a chunk."""
MAX_CHECKPOINT_BYTES, MAX_CHECKPOINT_RATIO = 1 << 28, 2
"""Bound of the scratch memory for checkpoints: so many bytes or so many times the memory of x, whichever is more."""
CHECKPOINT_DTYPES = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16}
"""dtype of checkpoints: that to which products round them anyway."""
SCALE_ROWS: tl.constexpr = tl.constexpr(16)
"""Rows of a checkpoint in float16 that share a factor: those of the smallest tile, since the kernels' tiles differ."""
MIN_SEGMENT_CHECKPOINTS = 2
"""Checkpoints of a segment, at least: shorter segments would write as many states at their ends as checkpoints."""
STATE_REGISTERS = 255
"""Registers of a thread in the kernel that passes states, on NVIDIA: its shared memory leaves room for two programs."""
MIN_FULLNESS = 0.9
"""Share of the multiprocessors that should be at work, on average over the rounds of a launch."""


def backward(dy: Tensor, dfinal_states: Tensor | None, *args) -> ScanGradients:
    """Compute the gradients. Body of `ssd_triton_backward`; takes the fields of `ScanArguments` after dy, dfinal."""
    arguments = ScanArguments(*args)
    inputs = ScanInputs(arguments)
    dy = with_contiguous_last_dim(dy)
    dfinal_states = None if dfinal_states is None else dfinal_states.contiguous()
    if inputs.dot == tl.bfloat16:
        # A gate leaves it in float32, which takes registers in all kernels. Products round it to bfloat16 anyway.
        dy = dy.to(torch.bfloat16)
    tiles = choose_tiles(inputs, backward=True)
    state_tiles = _choose_state_tiles(inputs, tiles)
    checkpoints = inputs.build_segment_table(state_tiles.chunk_size)  # an entry for each checkpoint
    num_checkpoints = len(checkpoints.entries)
    segment_size = _segment_size(inputs, state_tiles)
    segments = inputs.build_segment_table(segment_size)

    # States and gradients where the segments start in either direction: the ends of sequences, or of segments.
    dinitial_states = inputs.states_like(dfinal_states)
    if segment_size >= inputs.length and not inputs.is_packed:
        ends = {
            "initial_states": inputs.initial_states, "initial_state_rows": segments.initial_state_rows,
            "dfinal_states": dfinal_states, "dfinal_state_rows": segments.final_state_rows,
            # Written always: without it Triton 3.7 takes shared memory that leaves room for one program, not two.
            "dinitial_states": dinitial_states, "dinitial_state_rows": segments.initial_state_rows,
        }  # fmt: skip
    else:
        segment_states, dsegment_states = (inputs.empty_states(len(segments.entries)) for _ in range(2))
        dt_sum = inputs.empty(len(segments.entries), inputs.heads)
        _launch_state_kernel(
            inputs, state_tiles, segments, checkpoints, dy, final_states=segment_states,
            dinitial_states=dsegment_states, dt_sum=dt_sum,
        )  # fmt: skip
        final_states = inputs.states_like(inputs.initial_states)
        state_passing(segments, segment_states, inputs.A, dt_sum, inputs.initial_states, final_states, reverse=False)
        state_passing(segments, dsegment_states, inputs.A, dt_sum, dfinal_states, dinitial_states, reverse=True)
        ends = {"initial_states": segment_states, "dfinal_states": dsegment_states}

    # Partial gradients, with a leading or a last dimension for the programs that share a sum.
    input_tiles, shared_tiles = _choose_input_tiles(inputs, tiles), _choose_shared_tiles(inputs, tiles)
    num_tiles = triton.cdiv(inputs.headdim, input_tiles.block_p)
    num_chunks = num_checkpoints * CHECKPOINT_CHUNKS
    dx = inputs.empty(*inputs.x.shape, dtype=inputs.x.dtype)  # (B, L, H, P)
    ddt = inputs.empty(num_tiles, *inputs.dt.shape)  # (tiles, B, L, H)
    dweights = None if inputs.input_weights is None else torch.empty_like(ddt)  # (tiles, B, L, H)
    # Zeros, for the unused chunks.
    dA = inputs.empty(num_chunks, inputs.heads, num_tiles).zero_()  # (chunks, H, tiles)
    D = arguments.D
    sums_of_D = 0 if D is None else inputs.headdim if D.shape[1] == inputs.headdim else num_tiles
    dD = inputs.empty(num_chunks, inputs.heads, sums_of_D).zero_()  # (chunks, H, P or tiles)

    at_once = _checkpoints_at_once(inputs, num_checkpoints)
    shape = (at_once, inputs.heads, inputs.headdim, inputs.d_state)
    checkpoint_dtype = CHECKPOINT_DTYPES.get(inputs.dot, inputs.state_dtype)
    checkpoint_states, dcheckpoint_states = (inputs.empty(*shape, dtype=checkpoint_dtype) for _ in range(2))
    scales = None
    if inputs.dot == tl.float16:
        scales = inputs.empty(at_once, inputs.heads, triton.cdiv(inputs.headdim, SCALE_ROWS.value), 2)
    steps = inputs.empty(at_once, inputs.heads, 3, state_tiles.chunk_size)
    splits = _choose_splits(at_once * CHECKPOINT_CHUNKS * inputs.groups, inputs)
    # A single sum is the gradient, in its dtype.
    B_dtype, C_dtype = (None, None) if splits > 1 else (inputs.B.dtype, inputs.C.dtype)
    dB = inputs.empty(splits, *inputs.B.shape, dtype=B_dtype)  # (splits, B, L, G, N)
    dC = inputs.empty(splits, *inputs.C.shape, dtype=C_dtype)

    for first in range(0, num_checkpoints, at_once):
        checkpoint_range = range(first, min(first + at_once, num_checkpoints))
        states = (checkpoint_states, dcheckpoint_states, scales, steps)
        _launch_state_kernel(
            inputs, state_tiles, segments, checkpoints, dy, checkpoint_states=checkpoint_states,
            dcheckpoint_states=dcheckpoint_states, scales=scales, steps=steps, checkpoint_range=checkpoint_range,
            **ends,
        )  # fmt: skip
        _launch_input_gradient(
            inputs, input_tiles, checkpoints, checkpoint_range, dy, *states, dx, ddt, dweights, dA, dD
        )
        _launch_shared_gradient(inputs, shared_tiles, checkpoints, checkpoint_range, dy, *states, dB, dC, splits)

    ddt, dB, dC = (t.sum(0) if len(t) > 1 else t[0] for t in (ddt, dB, dC))
    zero_padding(segments, dx, ddt, dB, dC)
    if dweights is None:
        dweights = ddt.new_empty(0)
    else:
        dweights = dweights.sum(0)
        zero_padding(segments, dweights)
    dD = dD.sum(0)
    if D is not None and D.shape[1] != inputs.headdim:
        dD = dD.sum(1, keepdim=True)  # (H, 1)
    return ScanGradients(
        x=dx,
        dt=ddt.to(arguments.dt.dtype),
        A=dA.sum((0, 2)).to(arguments.A.dtype),
        B=dB.to(arguments.B.dtype),
        C=dC.to(arguments.C.dtype),
        D=_gradient_of(D, dD),
        dt_bias=_gradient_of(arguments.dt_bias, ddt.sum((0, 1))),
        initial_states=_gradient_of(arguments.initial_states, dinitial_states),
        input_weights=_gradient_of(arguments.input_weights, dweights),
    )


def _gradient_of(argument: Tensor | None, gradient: Tensor) -> Tensor:
    """The gradient in the argument's dtype, or an empty tensor where there is no argument."""
    return gradient.new_empty(0) if argument is None else gradient.to(argument.dtype)


def _choose_state_tiles(inputs: ScanInputs, tiles: Tiles) -> Tiles:
    """Tiles of the state kernel: a chunk for each checkpoint, and the whole head where its state fits in registers."""
    # On Blackwell, whose accumulators pass through registers, four warps would spill some.
    keep = not inputs.on_tensor_cores or inputs.has_tensor_memory
    tiles = tiles._replace(chunk_size=tiles.chunk_size * CHECKPOINT_CHUNKS, num_warps=tiles.num_warps if keep else 4)
    if inputs.rdna == 3:
        tiles = tiles._replace(num_warps=8)  # RDNA 3 holds operands twice: four warps would spill through the loop
    if not keep and tiles.block_n == 256 and inputs.is_hopper:
        # The other kernels take half the head. A product of Hopper has 64 rows: half the head would do without it.
        tiles = tiles._replace(block_p=max(16, min(64, triton.next_power_of_2(inputs.headdim))), num_warps=8)
    return tiles


def _choose_input_tiles(inputs: ScanInputs, tiles: Tiles) -> Tiles:
    """Tiles of the input gradient: on Hopper four warps, whose products have 64 rows, as a chunk has."""
    if not inputs.is_hopper or tiles.chunk_size != 64:
        return tiles
    # Positions along scan directions take registers too: with the entire head some would spill.
    block_p = min(tiles.block_p, 32) if inputs.directions else tiles.block_p
    return tiles._replace(block_p=block_p, num_warps=4)


def _choose_shared_tiles(inputs: ScanInputs, tiles: Tiles) -> Tiles:
    """Tiles of the gradients of B and C: on RDNA half a head, whose operands fit in registers."""
    return tiles._replace(block_p=min(tiles.block_p, 32)) if inputs.rdna else tiles


def _segment_size(inputs: ScanInputs, tiles: Tiles) -> int:
    """Steps of a segment: entire sequences where these fill the device, else whole intervals of checkpoints."""
    sequences = 1 if inputs.is_packed else inputs.batch  # packed sequences may be one long one
    wanted = triton.cdiv(2 * num_sms(inputs.device), max(1, sequences * inputs.num_head_tiles(tiles)))
    if wanted == 1 and not inputs.is_packed:
        return max(1, inputs.length)
    checkpoints = triton.cdiv(triton.cdiv(inputs.length, tiles.chunk_size), wanted)
    return max(MIN_SEGMENT_CHECKPOINTS, checkpoints) * tiles.chunk_size


def _checkpoints_at_once(inputs: ScanInputs, num_checkpoints: int) -> int:
    """Checkpoints that fit in the scratch memory; those of entire sequences where possible, each being scanned once."""
    element_bytes = torch.finfo(CHECKPOINT_DTYPES.get(inputs.dot, inputs.state_dtype)).bits // 8
    checkpoint_bytes = 2 * inputs.heads * inputs.headdim * inputs.d_state * element_bytes
    max_bytes = max(MAX_CHECKPOINT_BYTES, MAX_CHECKPOINT_RATIO * inputs.x.numel() * inputs.x.element_size())
    at_once = max(1, min(num_checkpoints, max_bytes // max(1, checkpoint_bytes)))
    if not inputs.is_packed and inputs.batch:
        a_row = num_checkpoints // inputs.batch
        at_once -= at_once % a_row if at_once > a_row > 0 else 0
    return at_once


def _choose_splits(programs: int, inputs: ScanInputs) -> int:
    """Programs among which the kernel for B and C divides the heads of a group: the fewest that fill the device.

    One of them takes all registers of a multiprocessor. Each has sums of its own, so that more of them take memory.
    """
    sms = num_sms(inputs.device)

    def fullness(splits: int) -> float:
        return programs * splits / (triton.cdiv(programs * splits, sms) * sms)

    choices = range(1, max(2, min(inputs.heads // inputs.groups, 2 * sms) + 1))
    return next((splits for splits in choices if fullness(splits) >= MIN_FULLNESS), max(choices, key=fullness))


def _launch_state_kernel(
    inputs: ScanInputs,
    tiles: Tiles,
    segments: SegmentTable,
    checkpoints: SegmentTable,
    dy: Tensor,
    *,
    initial_states: Tensor | None = None,
    initial_state_rows: Tensor | None = None,
    dfinal_states: Tensor | None = None,
    dfinal_state_rows: Tensor | None = None,
    final_states: Tensor | None = None,
    dinitial_states: Tensor | None = None,
    dinitial_state_rows: Tensor | None = None,
    dt_sum: Tensor | None = None,
    checkpoint_states: Tensor | None = None,
    dcheckpoint_states: Tensor | None = None,
    scales: Tensor | None = None,
    steps: Tensor | None = None,
    checkpoint_range: range = range(0),
) -> None:
    """Pass states and their gradients through all segments, writing the outputs that are passed."""
    num_programs = len(segments.entries) * inputs.num_head_tiles(tiles)
    if not num_programs:
        return
    x, dt, B, C = inputs.x, inputs.dt, inputs.B, inputs.C
    with on_device(dy):
        _state_kernel[(num_programs, 2)](
            x, dt, inputs.A, B, C, inputs.dt_bias, inputs.input_weights, dy, initial_states, initial_state_rows,
            dfinal_states, dfinal_state_rows, final_states, dinitial_states, dinitial_state_rows, dt_sum,
            checkpoint_states, dcheckpoint_states, scales, steps, segments.entries, checkpoints.first_segment,
            checkpoints.sequence_starts, checkpoint_range.start, len(checkpoint_range), inputs.length, inputs.height,
            inputs.directions, x.stride(), dt.stride(), B.stride(), C.stride(), dy.stride(), inputs.weight_strides,
            num_stages=2, **tiles.options(), **inputs.constants, **maxnreg_option(STATE_REGISTERS, inputs.device),
            **FUSED_MULTIPLY_ADD,
        )  # fmt: skip


@triton.jit
def _state_kernel(
    x_ptr,  # (B, L, H, P)
    dt_ptr,  # (B, L, H)
    A_ptr,  # (H,)
    B_ptr, C_ptr,  # (B, L, G, N)
    dt_bias_ptr,  # (H,)
    weights_ptr,  # (B, L, H), or None
    dy_ptr,  # (B, L, H, P)
    initial_states_ptr, initial_state_rows_ptr,  # (rows, H, P, N), (S,)
    dfinal_states_ptr, dfinal_state_rows_ptr,  # (rows, H, P, N), (S,)
    final_states_ptr,  # (M, H, P, N), written
    dinitial_states_ptr, dinitial_state_rows_ptr,  # (rows, H, P, N), written; (S,)
    dt_sum_ptr,  # (M, H), written
    checkpoint_states_ptr, dcheckpoint_states_ptr,  # (checkpoints of this launch, H, P, N), written
    scales_ptr,  # (checkpoints of this launch, H, P / SCALE_ROWS, 2): factors of checkpoints in float16, written
    steps_ptr,  # (checkpoints of this launch, H, 3, Q), written: the weights of inputs, dt by default, and both sums
    segments_ptr,  # (M, 4)
    first_checkpoint_ptr,  # (S + 1,)
    sequence_starts_ptr,  # (S,)
    checkpoint_offset, num_checkpoints, length, height, directions,
    x_strides, dt_strides, B_strides, C_strides, dy_strides, weight_strides,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, NUM_DIRECTIONS: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, HAS_DT_BIAS: tl.constexpr, HAS_DT_LIMIT: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr, DT_MIN: tl.constexpr, DT_MAX: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Pass the state of BLOCK_P channels of one head forward through one segment, or its gradient in reverse.

    Grid: (segments x heads x tiles of P, 2: states, gradients). Tiles: x, dy (Q, BLOCK_P); B, C (Q, BLOCK_N); state
    (BLOCK_P, BLOCK_N). Q is the distance of checkpoints.

    States start from `initial_states` and gradients from `dfinal_states`, or from zero. Rows of states belong to
    sequences, by the tables of rows; where these are None, they belong to segments. Only the checkpoints from
    `checkpoint_offset` on, `num_checkpoints` of them, are written.
    """
    segment, head, tile = split_program(tl.program_id(0), H, P, BLOCK_P)
    batch, start, end, sequence = load_segment(segments_ptr, segment)
    if sequence < 0:
        return
    checkpoint = tl.load(first_checkpoint_ptr + sequence) - checkpoint_offset  # row of the checkpoint at `start`
    checkpoint += (start - tl.load(sequence_starts_ptr + sequence)) // Q
    if checkpoint_states_ptr is not None:
        if (checkpoint >= num_checkpoints) | (checkpoint + tl.cdiv(end - start, Q) <= 0):
            return  # another launch writes the checkpoints of this segment
    group = head // (H // G)
    direction = group_direction(directions, group, G, NUM_DIRECTIONS)
    a, dt_bias = load_head(A_ptr, dt_bias_ptr, head, HAS_DT_BIAS, COMPUTE)
    if tl.program_id(1) == 0:
        _pass_states(
            x_ptr, dt_ptr, a, B_ptr, dt_bias, initial_states_ptr, initial_state_rows_ptr, final_states_ptr, None,
            dt_sum_ptr, checkpoint_states_ptr, scales_ptr, steps_ptr, batch, start, end, sequence, segment, head, tile,
            group, direction, checkpoint, num_checkpoints, length, height, x_strides, dt_strides, B_strides,
            weights_ptr, weight_strides, H, P, N, NUM_DIRECTIONS, Q, BLOCK_P, BLOCK_N, HAS_DT_LIMIT, DT_SOFTPLUS,
            DT_MIN, DT_MAX, DOT, COMPUTE, False,
        )  # fmt: skip
    else:
        _pass_states(
            dy_ptr, dt_ptr, a, C_ptr, dt_bias, dfinal_states_ptr, dfinal_state_rows_ptr, dinitial_states_ptr,
            dinitial_state_rows_ptr, None, dcheckpoint_states_ptr, scales_ptr, None, batch, start, end, sequence,
            segment, head, tile, group, direction, checkpoint, num_checkpoints, length, height, dy_strides, dt_strides,
            C_strides, None, None, H, P, N, NUM_DIRECTIONS, Q, BLOCK_P, BLOCK_N, HAS_DT_LIMIT, DT_SOFTPLUS, DT_MIN,
            DT_MAX, DOT, COMPUTE, True,
        )  # fmt: skip


@triton.jit
def _pass_states(
    x_ptr, dt_ptr, a, B_ptr, dt_bias, initial_states_ptr, initial_rows_ptr, final_states_ptr, final_rows_ptr,
    dt_sum_ptr, checkpoint_states_ptr, scales_ptr, steps_ptr, batch, start, end, sequence, segment, head, tile, group,
    direction, checkpoint, num_checkpoints, length, height, x_strides, dt_strides, B_strides, weights_ptr,
    weight_strides,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, NUM_DIRECTIONS: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, HAS_DT_LIMIT: tl.constexpr, DT_SOFTPLUS: tl.constexpr,
    DT_MIN: tl.constexpr, DT_MAX: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Pass a state through one segment, writing it before each chunk; with REVERSE, from the last chunk to the first.

    Forward, x and B add to the state (listing 1, steps 2 and 3). In reverse x is dy and B is C, which add to the
    gradient of the state (the transpose of steps 3 and 4).
    """
    p, n = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p, mask_n = p < P, n < N
    state_offsets = head.to(tl.int64) * (P * N) + p[:, None] * N + n[None, :]
    mask_state = mask_p[:, None] & mask_n[None, :]
    x_ptr += batch * x_strides[0] + head.to(tl.int64) * x_strides[2]
    dt_ptr += batch * dt_strides[0] + head.to(tl.int64) * dt_strides[2]
    if weights_ptr is not None:
        weights_ptr += batch * weight_strides[0] + head.to(tl.int64) * weight_strides[2]
    B_ptr += batch * B_strides[0] + group.to(tl.int64) * B_strides[2]

    state = tl.zeros((BLOCK_P, BLOCK_N), COMPUTE)
    if initial_states_ptr is not None:
        row = (segment if initial_rows_ptr is None else tl.load(initial_rows_ptr + sequence)).to(tl.int64)
        initial_state_ptrs = initial_states_ptr + row * (H * P * N) + state_offsets
        state = tl.load(initial_state_ptrs, and_scalar(mask_state, row >= 0), other=0.0).to(COMPUTE)
    dt_sum = tl.zeros((), COMPUTE)
    num_chunks = (end - start + Q - 1) // Q
    for i in range(num_chunks):
        chunk = num_chunks - 1 - i if REVERSE else i
        if checkpoint_states_ptr is not None:
            in_range = (checkpoint + chunk >= 0) & (checkpoint + chunk < num_checkpoints)
            checkpoint_row = (checkpoint + chunk).to(tl.int64) * H
            checkpoint_ptrs = checkpoint_states_ptr + checkpoint_row * (P * N) + state_offsets
            operand, scale = scaled_operand(state, checkpoint_states_ptr.dtype.element_ty)
            tl.store(checkpoint_ptrs, operand, and_scalar(mask_state, in_range))
            if scales_ptr is not None:
                rows = tile * (BLOCK_P // SCALE_ROWS) + tl.arange(0, BLOCK_P // SCALE_ROWS)
                SCALES: tl.constexpr = (P + SCALE_ROWS - 1) // SCALE_ROWS
                scale_ptrs = scales_ptr + ((checkpoint_row + head) * SCALES + rows) * 2 + (1 if REVERSE else 0)
                tl.store(scale_ptrs, tl.full(rows.shape, 0.0, tl.float32) + scale, and_scalar(rows < SCALES, in_range))
        positions, mask_q = chunk_positions(start + chunk * Q, end, direction, length, height, Q, NUM_DIRECTIONS)
        mask_x, mask_B = mask_q[:, None] & mask_p[None, :], mask_q[:, None] & mask_n[None, :]
        dt_ptrs = dt_ptr + positions * dt_strides[1]
        dt, _ = load_dt(dt_ptrs, mask_q, dt_bias, DT_SOFTPLUS, HAS_DT_LIMIT, DT_MIN, DT_MAX, COMPUTE)
        coarse, fine, decay_from_start, decay_to_end, chunk_decay = chunk_decays(dt, a, Q, COMPUTE)
        input_weights = dt
        if weights_ptr is not None:
            input_weights = tl.load(weights_ptr + positions * weight_strides[1], mask_q, other=0.0).to(COMPUTE)
        if steps_ptr is not None:
            if in_range & (tile == 0):
                step_ptrs = steps_ptr + (checkpoint_row + head) * (3 * Q) + tl.arange(0, Q)
                tl.store(step_ptrs, input_weights)
                tl.store(step_ptrs + Q, coarse)
                tl.store(step_ptrs + 2 * Q, fine)
        x = load_rows(x_ptr, positions, x_strides[1], p, mask_x)  # (Q, P)
        B = load_rows(B_ptr, positions, B_strides[1], n, mask_B).to(DOT)  # (Q, N)
        weights = decay_from_start if REVERSE else input_weights * decay_to_end
        state = advance_state(state, x, weights, B, chunk_decay, DOT, COMPUTE)
        dt_sum += tl.sum(dt, axis=0)

    if final_states_ptr is not None:
        row = (segment if final_rows_ptr is None else tl.load(final_rows_ptr + sequence)).to(tl.int64)
        final_state_ptrs = final_states_ptr + row * (H * P * N) + state_offsets
        tl.store(final_state_ptrs, state.to(final_states_ptr.dtype.element_ty), and_scalar(mask_state, row >= 0))
    if dt_sum_ptr is not None:
        if tile == 0:
            tl.store(dt_sum_ptr + segment.to(tl.int64) * H + head, dt_sum)


@triton.jit
def advance_state(state, x, weights, B, chunk_decay, DOT: tl.constexpr, COMPUTE: tl.constexpr):
    """A state (P, N) after a chunk: decayed, and with the products of x (Q, P) times weights (Q,) and B (Q, N)."""
    weighted, scale = weighted_operand(x, weights, DOT, COMPUTE)  # (Q, P)
    return state * chunk_decay + dot(tl.trans(weighted), B, COMPUTE) * scale


@triton.jit
def load_rows(ptr, positions, stride, columns, mask):
    """Load a tile (rows, columns) of a tensor whose last dimension is contiguous, zeros outside the mask."""
    return tl.load(ptr + positions[:, None] * stride + columns[None, :], mask, other=0.0)


@triton.jit
def load_scales(scales_ptr, checkpoint_head, first_p, P: tl.constexpr):
    """Load the factors of products with a checkpoint's state and gradient of a state, rows from `first_p` on."""
    scale, dscale = 1.0, 1.0
    if scales_ptr is not None:
        SCALES: tl.constexpr = (P + SCALE_ROWS - 1) // SCALE_ROWS
        scales_ptr += (checkpoint_head * SCALES + first_p // SCALE_ROWS) * 2
        scale, dscale = tl.load(scales_ptr), tl.load(scales_ptr + 1)
    return scale, dscale


@triton.jit
def load_decays(steps_ptr, first, Q: tl.constexpr, CHUNKS: tl.constexpr):
    """Load what the state kernel wrote of the chunk that is `first` steps after a checkpoint, for one head.

    Returns:
        the weights of inputs (Q,), those of dt by default, and the results of `chunk_decays`.
    """
    SIZE: tl.constexpr = CHUNKS * Q
    step_ptrs = steps_ptr + first + tl.arange(0, Q)
    # The sums run from the checkpoint on.
    last_ptr = steps_ptr + first + (Q - 1)
    coarse_before = tl.load(steps_ptr + SIZE + first - 1, first > 0, other=0.0)
    fine_before = tl.load(steps_ptr + 2 * SIZE + first - 1, first > 0, other=0.0)
    dt = tl.load(step_ptrs)
    coarse, fine = tl.load(step_ptrs + SIZE) - coarse_before, tl.load(step_ptrs + 2 * SIZE) - fine_before
    coarse_total, fine_total = tl.load(last_ptr + SIZE) - coarse_before, tl.load(last_ptr + 2 * SIZE) - fine_before
    decay_to_end = tl.exp2((coarse_total - coarse) + (fine_total - fine))
    return dt, coarse, fine, tl.exp2(coarse + fine), decay_to_end, tl.exp2(coarse_total + fine_total)


@triton.jit
def sum_rows(x, y, mask, DOT: tl.constexpr):
    """Sum of x * y over the columns, (Q,)."""
    products = x * y
    if DOT == tl.float32 or DOT == tl.float64:
        # In small tiles a thread holds one product, and the compiler would fuse it into the addition of that of another
        # thread: threads that should hold the same sum would round it differently. It fuses no selection.
        products = tl.where(mask, products, 0.0)
    return tl.sum(products, axis=1)


@triton.jit
def suffix_sums(terms, Q: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr):
    """Sum the terms (Q, Q) of each column from a row to the last: a product with a triangle of ones.

    Operands of 16 bits are the terms as a sum of two parts in bfloat16, which has the range of float32. They keep 16
    bits of a term, whose own operands had 8 or 11.
    """
    is_after = tl.arange(0, Q)[:, None] <= tl.arange(0, Q)[None, :]  # (k, i): i >= k
    if DOT == tl.float32 or DOT == tl.float64:
        sums = dot(tl.where(is_after, tl.full((Q, Q), 1.0, COMPUTE), 0.0), terms, COMPUTE)
    else:
        ones = tl.where(is_after, tl.full((Q, Q), 1.0, tl.bfloat16), tl.zeros((Q, Q), tl.bfloat16))
        high = (terms.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)  # the upper 16 bits
        low = terms - high
        sums = dot(ones, high.to(tl.bfloat16), COMPUTE) + dot(ones, low.to(tl.bfloat16), COMPUTE)
    return sums


def _launch_input_gradient(
    inputs: ScanInputs,
    tiles: Tiles,
    checkpoints: SegmentTable,
    checkpoint_range: range,
    dy: Tensor,
    checkpoint_states: Tensor,
    dcheckpoint_states: Tensor,
    scales: Tensor | None,
    steps: Tensor,
    dx: Tensor,
    ddt: Tensor,
    dweights: Tensor | None,
    dA: Tensor,
    dD: Tensor,
) -> None:
    """Write the gradients of x, dt, the weights of inputs, A and D for the chunks of some checkpoints."""
    x, dt, B, C, D = inputs.x, inputs.dt, inputs.B, inputs.C, inputs.D
    num_programs = len(checkpoint_range) * CHECKPOINT_CHUNKS * inputs.num_head_tiles(tiles)
    with on_device(x):
        _input_gradient_kernel[(num_programs,)](
            x, dt, inputs.A, B, C, D, inputs.dt_bias, dy, checkpoint_states, dcheckpoint_states, scales, steps, dx,
            ddt, dweights, dA, dD, checkpoints.entries,
            checkpoint_range.start, inputs.length, inputs.height, inputs.directions,
            x.stride(), dt.stride(), B.stride(), C.stride(), dy.stride(), None if D is None else D.stride(),
            inputs.batch * inputs.length,
            HAS_D=D is not None, WIDE_D=dD.shape[2] == inputs.headdim, CHECKPOINT_CHUNKS=CHECKPOINT_CHUNKS,
            num_stages=1, **tiles.options(), **inputs.constants,
            **FUSED_MULTIPLY_ADD,
        )  # fmt: skip


@triton.jit
def _input_gradient_kernel(
    x_ptr,  # (B, L, H, P)
    dt_ptr,  # (B, L, H)
    A_ptr,  # (H,)
    B_ptr, C_ptr,  # (B, L, G, N)
    D_ptr,  # (H, P)
    dt_bias_ptr,  # (H,)
    dy_ptr,  # (B, L, H, P)
    checkpoint_states_ptr, dcheckpoint_states_ptr,  # (checkpoints of this launch, H, P, N)
    scales_ptr,  # (checkpoints of this launch, H, P / SCALE_ROWS, 2), or None
    steps_ptr,  # (checkpoints of this launch, H, 3, CHECKPOINT_CHUNKS * Q)
    dx_ptr,  # (B, L, H, P), written
    ddt_ptr,  # (tiles, B, L, H), written
    dweights_ptr,  # (tiles, B, L, H), written; None where dt is the weight of inputs too
    dA_ptr,  # (checkpoints * CHECKPOINT_CHUNKS, H, tiles), written
    dD_ptr,  # (checkpoints * CHECKPOINT_CHUNKS, H, P) with WIDE_D, else (..., tiles), written
    checkpoints_ptr,  # (checkpoints, 4)
    checkpoint_offset, length, height, directions,
    x_strides, dt_strides, B_strides, C_strides, dy_strides, D_strides, num_positions,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, NUM_DIRECTIONS: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, CHECKPOINT_CHUNKS: tl.constexpr, HAS_D: tl.constexpr,
    WIDE_D: tl.constexpr, HAS_DT_BIAS: tl.constexpr, HAS_DT_LIMIT: tl.constexpr, DT_SOFTPLUS: tl.constexpr,
    DT_MIN: tl.constexpr, DT_MAX: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute all gradients but those of B and C, of one chunk and BLOCK_P channels of one head.

    Grid: checkpoints x CHECKPOINT_CHUNKS x heads x tiles of P. Tiles: x, dy (Q, BLOCK_P); B, C (Q, BLOCK_N); states
    (BLOCK_P, BLOCK_N); scores (Q, Q).

    dx is complete; ddt is one partial sum a tile of P; dA and dD are one partial sum a chunk (and tile).
    `num_positions` is B * L.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    chunk, head, tile = split_program(tl.program_id(0), H, P, BLOCK_P)
    checkpoint = chunk // CHECKPOINT_CHUNKS
    batch, start, end, sequence = load_segment(checkpoints_ptr, checkpoint_offset + checkpoint)
    first = start + chunk % CHECKPOINT_CHUNKS * Q
    if first >= end:
        return
    group = head // (H // G)
    direction = group_direction(directions, group, G, NUM_DIRECTIONS)
    p, n = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p, mask_n = p < P, n < N
    a, dt_bias = load_head(A_ptr, dt_bias_ptr, head, HAS_DT_BIAS, COMPUTE)
    dt_ptr += batch * dt_strides[0] + head.to(tl.int64) * dt_strides[2]
    x_ptr += batch * x_strides[0] + head.to(tl.int64) * x_strides[2]
    dy_ptr += batch * dy_strides[0] + head.to(tl.int64) * dy_strides[2]
    B_ptr += batch * B_strides[0] + group.to(tl.int64) * B_strides[2]
    C_ptr += batch * C_strides[0] + group.to(tl.int64) * C_strides[2]
    checkpoint_head = checkpoint.to(tl.int64) * H + head
    state_offsets = checkpoint_head * (P * N) + p[:, None] * N + n[None, :]
    mask_state = mask_p[:, None] & mask_n[None, :]
    state = tl.load(checkpoint_states_ptr + state_offsets, mask_state, other=0.0).to(DOT)  # (P, N)
    dstate = tl.load(dcheckpoint_states_ptr + state_offsets, mask_state, other=0.0).to(DOT)  # (P, N)
    state_scale, dstate_scale = load_scales(scales_ptr, checkpoint_head, tile * BLOCK_P, P)
    steps_ptr += checkpoint_head * (3 * CHECKPOINT_CHUNKS * Q)

    # The state before the chunk and the gradient of the state after it: of two chunks, the checkpoint holds the one
    # for the first chunk and the other for the second, and the rest is one step from there through the other chunk.
    if first > start:
        positions, mask_q = chunk_positions(start, end, direction, length, height, Q, NUM_DIRECTIONS)
        mask_x, mask_B = mask_q[:, None] & mask_p[None, :], mask_q[:, None] & mask_n[None, :]
        dt, _, _, _, decay_to_end, chunk_decay = load_decays(steps_ptr, 0, Q, CHECKPOINT_CHUNKS)
        x = load_rows(x_ptr, positions, x_strides[1], p, mask_x)
        B = load_rows(B_ptr, positions, B_strides[1], n, mask_B).to(DOT)
        state = state.to(COMPUTE) * state_scale
        state = advance_state(state, x, dt * decay_to_end, B, chunk_decay, DOT, COMPUTE)
        state, state_scale = scaled_operand(state, DOT)
    elif first + Q < end:
        positions, mask_q = chunk_positions(first + Q, end, direction, length, height, Q, NUM_DIRECTIONS)
        mask_x, mask_B = mask_q[:, None] & mask_p[None, :], mask_q[:, None] & mask_n[None, :]
        _, _, _, decay_from_start, _, chunk_decay = load_decays(steps_ptr, Q, Q, CHECKPOINT_CHUNKS)
        dy = load_rows(dy_ptr, positions, dy_strides[1], p, mask_x)
        C = load_rows(C_ptr, positions, C_strides[1], n, mask_B).to(DOT)
        dstate = dstate.to(COMPUTE) * dstate_scale
        dstate = advance_state(dstate, dy, decay_from_start, C, chunk_decay, DOT, COMPUTE)
        dstate, dstate_scale = scaled_operand(dstate, DOT)

    positions, mask_q = chunk_positions(first, end, direction, length, height, Q, NUM_DIRECTIONS)
    mask_x, mask_B = mask_q[:, None] & mask_p[None, :], mask_q[:, None] & mask_n[None, :]
    dt, coarse, fine, decay_from_start, decay_to_end, chunk_decay = load_decays(
        steps_ptr, first - start, Q, CHECKPOINT_CHUNKS
    )
    x = load_rows(x_ptr, positions, x_strides[1], p, mask_x)  # (Q, P)
    dy = load_rows(dy_ptr, positions, dy_strides[1], p, mask_x)  # (Q, P)
    B = load_rows(B_ptr, positions, B_strides[1], n, mask_B).to(DOT)  # (Q, N)
    C = load_rows(C_ptr, positions, C_strides[1], n, mask_B).to(DOT)  # (Q, N)

    chunk_row = (checkpoint_offset.to(tl.int64) * CHECKPOINT_CHUNKS + chunk) * H + head
    if HAS_D:
        if WIDE_D:
            tl.store(dD_ptr + chunk_row * P + p, tl.sum(dy.to(COMPUTE) * x.to(COMPUTE), axis=0), mask_p)
        else:
            column = sum_rows(x.to(COMPUTE), dy.to(COMPUTE), mask_x, DOT)[:, None]
            tl.store(dD_ptr + chunk_row * TILES + tile + tl.arange(0, 1), tl.sum(column, axis=0))

    # The log decay dt A of step k acts on all that passes from before k to k or later: from the state before the chunk
    # to the state after it, from the former to output i >= k, from input j < k to output i >= k, and from input j < k
    # to the state after. Sums of the terms themselves, not differences of running totals, which would cancel.
    if DOT == tl.float32 or DOT == tl.float64:
        products = state * dstate  # (P, N)
    else:  # tensor cores read the states from shared memory: of the product the diagonal is wanted
        p_0, p_1 = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_P)[None, :]
        products = tl.where(p_0 == p_1, dot(state, tl.trans(dstate), COMPUTE), 0.0)  # (P, P)
    dlog_decay = tl.sum(products) * state_scale * dstate_scale * chunk_decay
    # Listing 1, step 4, again.
    y_of_state = dot(C, tl.trans(state), COMPUTE)  # (Q, P)
    from_state = sum_rows(dy.to(COMPUTE), y_of_state, mask_x, DOT) * (decay_from_start * state_scale)  # (Q,)
    dlog_decay += tl.cumsum(from_state, axis=0, reverse=True)
    # Gradient of dt x through the state after the chunk: transpose of listing 1, step 2.
    ddt_x = dot(B, tl.trans(dstate), COMPUTE)
    ddt_x *= (decay_to_end * dstate_scale)[:, None]  # (Q, P)
    input_to_state = sum_rows(x.to(COMPUTE), ddt_x, mask_x, DOT) * dt  # (Q,)

    masked_scores = dot(C, tl.trans(B), COMPUTE)
    masked_scores *= decay_matrix(coarse, fine, Q)  # (Q, Q)
    dy_operand, dy_scale = scaled_operand(dy, DOT)
    dmasked_scores = dot(dy_operand, tl.trans(x.to(DOT)), COMPUTE) * dy_scale  # (Q, Q), by dt of the input
    i, j = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    # Entry (k, j): from input j to all outputs i >= k.
    from_input = suffix_sums(dmasked_scores * masked_scores, Q, DOT, COMPUTE)
    from_input = from_input * dt[None, :] + input_to_state[None, :]
    dlog_decay += tl.sum(tl.where(i > j, from_input, 0.0), axis=1)  # (Q,)
    # Gradient of dt x through the outputs of the chunk: transpose of listing 1, step 1.
    masked_scores, scale = scaled_operand(masked_scores, DOT)
    ddt_x += dot(tl.trans(masked_scores), dy_operand, COMPUTE) * (scale * dy_scale)
    ddt_input = sum_rows(x.to(COMPUTE), ddt_x, mask_x, DOT)  # (Q,)

    # Loaded again: held since then, the positions of the rows would not fit in registers.
    batch, start, end, _ = load_segment(checkpoints_ptr, checkpoint_offset + checkpoint)
    first = start + chunk % CHECKPOINT_CHUNKS * Q
    positions, mask_q = chunk_positions(first, end, direction, length, height, Q, NUM_DIRECTIONS)
    dt_ptrs = dt_ptr + positions * dt_strides[1]
    step, dt_derivative = load_dt(dt_ptrs, mask_q, dt_bias, DT_SOFTPLUS, HAS_DT_LIMIT, DT_MIN, DT_MAX, COMPUTE)
    ddt_offsets = ((tile.to(tl.int64) * num_positions + batch * length) + positions) * H + head
    ddt = dlog_decay * (a * tl.full((), LN2, COMPUTE))
    if dweights_ptr is None:
        ddt = ddt_input + ddt
        step = dt
    else:
        tl.store(dweights_ptr + ddt_offsets, ddt_input, mask_q)
    tl.store(ddt_ptr + ddt_offsets, ddt * dt_derivative, mask_q)
    dx = ddt_x * dt[:, None]  # (Q, P)
    if HAS_D:
        if WIDE_D:
            D = tl.load(D_ptr + head * D_strides[0] + p * D_strides[1], mask_p, other=0.0).to(COMPUTE)  # (P,)
            dx += D[None, :] * dy.to(COMPUTE)
        else:
            dx += tl.load(D_ptr + head * D_strides[0]).to(COMPUTE) * dy.to(COMPUTE)
    dx_offsets = (((batch * length + positions) * H + head) * P)[:, None] + p[None, :]
    tl.store(dx_ptr + dx_offsets, dx.to(dx_ptr.dtype.element_ty), mask_q[:, None] & mask_p[None, :])
    tl.store(dA_ptr + chunk_row * TILES + tile + tl.arange(0, 1), tl.sum((dlog_decay * step)[:, None], axis=0))


def _launch_shared_gradient(
    inputs: ScanInputs,
    tiles: Tiles,
    checkpoints: SegmentTable,
    checkpoint_range: range,
    dy: Tensor,
    checkpoint_states: Tensor,
    dcheckpoint_states: Tensor,
    scales: Tensor | None,
    steps: Tensor,
    dB: Tensor,
    dC: Tensor,
    splits: int,
) -> None:
    """Write the gradients of B and C, which the heads of a group share, for the chunks of some checkpoints."""
    x, dt, B, C = inputs.x, inputs.dt, inputs.B, inputs.C
    num_programs = len(checkpoint_range) * CHECKPOINT_CHUNKS * inputs.groups * splits
    with on_device(x):
        _shared_gradient_kernel[(num_programs,)](
            x, dt, inputs.A, B, C, inputs.dt_bias, dy, checkpoint_states, dcheckpoint_states, scales, steps, dB, dC,
            checkpoints.entries,
            checkpoint_range.start, inputs.length, inputs.height, inputs.directions,
            x.stride(), dt.stride(), B.stride(), C.stride(), dy.stride(), inputs.batch * inputs.length,
            SPLITS=splits, CHECKPOINT_CHUNKS=CHECKPOINT_CHUNKS, num_stages=1, **tiles.options(), **inputs.constants,
            **FUSED_MULTIPLY_ADD,
        )  # fmt: skip


@triton.jit
def _shared_gradient_kernel(
    x_ptr,  # (B, L, H, P)
    dt_ptr,  # (B, L, H)
    A_ptr,  # (H,)
    B_ptr, C_ptr,  # (B, L, G, N)
    dt_bias_ptr,  # (H,)
    dy_ptr,  # (B, L, H, P)
    checkpoint_states_ptr, dcheckpoint_states_ptr,  # (checkpoints of this launch, H, P, N)
    scales_ptr,  # (checkpoints of this launch, H, P / SCALE_ROWS, 2), or None
    steps_ptr,  # (checkpoints of this launch, H, 3, CHECKPOINT_CHUNKS * Q)
    dB_ptr, dC_ptr,  # (SPLITS, B, L, G, N), written
    checkpoints_ptr,  # (checkpoints, 4)
    checkpoint_offset, length, height, directions,
    x_strides, dt_strides, B_strides, C_strides, dy_strides, num_positions,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, NUM_DIRECTIONS: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, CHECKPOINT_CHUNKS: tl.constexpr, SPLITS: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, HAS_DT_LIMIT: tl.constexpr, DT_SOFTPLUS: tl.constexpr, DT_MIN: tl.constexpr,
    DT_MAX: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of B and C of one chunk, summed over some heads of a group: one partial sum a split.

    Grid: checkpoints x CHECKPOINT_CHUNKS x groups x SPLITS. Tiles: x, dy (Q, BLOCK_P); B, C, dB, dC (Q, BLOCK_N);
    states (BLOCK_P, BLOCK_N); scores (Q, Q). `num_positions` is B * L.

    The checkpoint's two chunks are a pair: from its first chunk to the outputs of its second leads a matrix of scores
    whose decays are those of the rows times those of the columns, `cross_scores`. So no state between the two is
    needed. `near` is this program's chunk, `far` the other of the pair.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    HEADS: tl.constexpr = H // G
    program = tl.program_id(0)
    chunk, group, split = program // (G * SPLITS), program // SPLITS % G, program % SPLITS
    checkpoint = chunk // CHECKPOINT_CHUNKS
    batch, start, end, sequence = load_segment(checkpoints_ptr, checkpoint_offset + checkpoint)
    first = start + chunk % CHECKPOINT_CHUNKS * Q
    if first >= end:
        return
    is_second = first > start
    far_first = tl.where(is_second, start, first + Q)
    direction = group_direction(directions, group, G, NUM_DIRECTIONS)
    n = tl.arange(0, BLOCK_N)
    positions, mask_q = chunk_positions(first, end, direction, length, height, Q, NUM_DIRECTIONS)
    far_positions, far_mask_q = chunk_positions(far_first, end, direction, length, height, Q, NUM_DIRECTIONS)
    mask_B, far_mask_B = mask_q[:, None] & (n < N)[None, :], far_mask_q[:, None] & (n < N)[None, :]
    x_ptr += batch * x_strides[0]
    dt_ptr += batch * dt_strides[0]
    dy_ptr += batch * dy_strides[0]

    dB, dC = tl.zeros((Q, BLOCK_N), COMPUTE), tl.zeros((Q, BLOCK_N), COMPUTE)
    dscores, dcross_scores = tl.zeros((Q, Q), COMPUTE), tl.zeros((Q, Q), COMPUTE)
    for head_tile in range(split * HEADS // SPLITS * TILES, (split + 1) * HEADS // SPLITS * TILES):
        head = tl.cast(group * HEADS + head_tile // TILES, tl.int64)
        first_p = head_tile % TILES * BLOCK_P
        p = first_p + tl.arange(0, BLOCK_P)
        mask_x, far_mask_x = mask_q[:, None] & (p < P)[None, :], far_mask_q[:, None] & (p < P)[None, :]

        checkpoint_head = checkpoint.to(tl.int64) * H + head
        head_steps_ptr = steps_ptr + checkpoint_head * (3 * CHECKPOINT_CHUNKS * Q)
        dt, coarse, fine, decay_from_start, decay_to_end, _ = load_decays(
            head_steps_ptr, first - start, Q, CHECKPOINT_CHUNKS
        )
        far_dt, _, _, far_decay_from_start, far_decay_to_end, far_decay = load_decays(
            head_steps_ptr, far_first - start, Q, CHECKPOINT_CHUNKS
        )

        x = load_rows(x_ptr + head * x_strides[2], positions, x_strides[1], p, mask_x)  # (Q, P)
        dy = load_rows(dy_ptr + head * dy_strides[2], positions, dy_strides[1], p, mask_x)  # (Q, P)
        state_offsets = checkpoint_head * (P * N) + p[:, None] * N + n[None, :]
        mask_state = (p < P)[:, None] & (n < N)[None, :]
        state = tl.load(checkpoint_states_ptr + state_offsets, mask_state, other=0.0).to(DOT)  # (P, N)
        dstate = tl.load(dcheckpoint_states_ptr + state_offsets, mask_state, other=0.0).to(DOT)  # (P, N)
        state_scale, dstate_scale = load_scales(scales_ptr, checkpoint_head, first_p, P)

        # Listing 1, step 1: scores = C B^T, which all heads of the group share.
        dy_operand, scale = scaled_operand(dy, DOT)
        dmasked_scores = dot(dy_operand, tl.trans(x.to(DOT)), COMPUTE) * scale
        dscores += dmasked_scores * decay_matrix(coarse, fine, Q) * dt[None, :]  # (Q, Q)
        # Step 4: C meets the state before the chunk. Step 2: B writes to the state after the chunk.
        input_weights = dt * decay_to_end
        if is_second:
            far_x = load_rows(x_ptr + head * x_strides[2], far_positions, x_strides[1], p, far_mask_x)
            far, far_scale = weighted_operand(far_x, far_dt * far_decay_to_end, DOT, COMPUTE)  # (Q, P)
            near, near_scale = weighted_operand(dy, decay_from_start, DOT, COMPUTE)
        else:
            far_dy = load_rows(dy_ptr + head * dy_strides[2], far_positions, dy_strides[1], p, far_mask_x)
            far, far_scale = weighted_operand(far_dy, far_decay_from_start, DOT, COMPUTE)
            near, near_scale = weighted_operand(x, input_weights, DOT, COMPUTE)
        dcross_scores += dot(near, tl.trans(far), COMPUTE) * (near_scale * far_scale)  # (Q, Q)
        decayed_dy, scale = weighted_operand(dy, decay_from_start * tl.where(is_second, far_decay, 1.0), DOT, COMPUTE)
        dC += dot(decayed_dy, state, COMPUTE) * (scale * state_scale)  # (Q, N)
        decayed_input, scale = weighted_operand(x, input_weights * tl.where(is_second, 1.0, far_decay), DOT, COMPUTE)
        dB += dot(decayed_input, dstate, COMPUTE) * (scale * dstate_scale)  # (Q, N)

    B_ptr += batch * B_strides[0] + group.to(tl.int64) * B_strides[2]
    C_ptr += batch * C_strides[0] + group.to(tl.int64) * C_strides[2]
    if is_second:
        far_B = load_rows(B_ptr, far_positions, B_strides[1], n, far_mask_B).to(DOT)
        operand, scale = scaled_operand(dcross_scores, DOT)
        dC += dot(operand, far_B, COMPUTE) * scale
    else:
        far_C = load_rows(C_ptr, far_positions, C_strides[1], n, far_mask_B).to(DOT)
        operand, scale = scaled_operand(dcross_scores, DOT)
        dB += dot(operand, far_C, COMPUTE) * scale
    B = load_rows(B_ptr, positions, B_strides[1], n, mask_B).to(DOT)  # (Q, N)
    if HEADS == 1:
        # Triton 3.7 lets warps store the operand in tensor memory from which others load dmasked_scores still.
        tl.debug_barrier()
    dscores, scale = scaled_operand(dscores, DOT)
    dC += dot(dscores, B, COMPUTE) * scale
    C = load_rows(C_ptr, positions, C_strides[1], n, mask_B).to(DOT)  # (Q, N)
    dB += dot(tl.trans(dscores), C, COMPUTE) * scale
    offsets = ((split.to(tl.int64) * num_positions + batch * length + positions) * G + group)[:, None] * N + n[None, :]
    tl.store(dB_ptr + offsets, dB.to(dB_ptr.dtype.element_ty), mask_B)
    tl.store(dC_ptr + offsets, dC.to(dC_ptr.dtype.element_ty), mask_B)
