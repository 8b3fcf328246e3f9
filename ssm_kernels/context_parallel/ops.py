"""The ops on a rank's shard: what `causal_conv1d`, `selective_scan` and `ssd` run within `context_parallel`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.discretization import step_size
from .._core.sharding import local, sharded_version_of
from .._core.validation import check_tensor
from ..causal_conv1d import CausalConv1dOutput, causal_conv1d
from ..selective_scan import SelectiveScanOutput, selective_scan
from ..ssd import SSDOutput, ssd
from .exchange import all_gather, depend_on
from .halo import conv_halo
from .sharding import RankShard, SequenceSharding

local_causal_conv1d, local_selective_scan, local_ssd = local(causal_conv1d), local(selective_scan), local(ssd)


Arguments = dict[str, Any]
"""Arguments of a call of an op by name, defaults filled in."""


@sharded_version_of(causal_conv1d)
def sharded_causal_conv1d(sharding: SequenceSharding, arguments: Arguments) -> CausalConv1dOutput:
    """Convolve this rank's shard, after a halo exchange."""
    _refuse_seq_idx(arguments)
    weight = arguments["weight"]
    check_tensor("weight", weight, ("D", "K"))
    x, initial_states, cu_seqlens = conv_halo(
        sharding, arguments["x"], weight.shape[1], arguments["initial_states"], arguments["cu_seqlens"]
    )
    exchanged = {"x": x, "initial_states": initial_states, "cu_seqlens": cu_seqlens}
    return local_causal_conv1d(**(arguments | exchanged))


@sharded_version_of(selective_scan)
def sharded_selective_scan(sharding: SequenceSharding, arguments: Arguments) -> SelectiveScanOutput:
    """Scan this rank's shard from the state that the ranks before it leave."""
    _refuse_seq_idx(arguments)
    u, A = arguments["u"], arguments["A"]
    check_tensor("u", u, ("B", "L", "D"))
    check_tensor("A", A, (u.shape[2], "N"), like=u)

    def log_decay(dt_sum: Tensor) -> Tensor:
        return dt_sum.unsqueeze(-1) * A.to(dt_sum.dtype)  # (B, D) -> (B, D, N)

    shard = RankShard.of(sharding, "u", u, arguments["cu_seqlens"])
    op = _ShardScan(local_selective_scan, arguments, u, log_decay, tuple(A.shape))
    return SelectiveScanOutput(*_scan_shard(shard, op, arguments["initial_states"]))


@sharded_version_of(ssd)
def sharded_ssd(sharding: SequenceSharding, arguments: Arguments) -> SSDOutput:
    """Scan this rank's shard from the state that the ranks before it leave."""
    _refuse_seq_idx(arguments)
    x, A, B = arguments["x"], arguments["A"], arguments["B"]
    check_tensor("x", x, ("B", "L", "H", "P"))
    check_tensor("A", A, (x.shape[2],), like=x)
    check_tensor("B", B, (*x.shape[:2], "G", "N"), like=x)

    def log_decay(dt_sum: Tensor) -> Tensor:
        return (dt_sum * A.to(dt_sum.dtype))[..., None, None]  # (B, H) -> (B, H, 1, 1)

    shard = RankShard.of(sharding, "x", x, arguments["cu_seqlens"])
    op = _ShardScan(local_ssd, arguments, x, log_decay, (*x.shape[2:], B.shape[3]))  # states (B, H, P, N)
    return SSDOutput(*_scan_shard(shard, op, arguments["initial_states"]))


def _refuse_seq_idx(arguments: Arguments) -> None:
    if arguments["seq_idx"] is not None:
        raise ValueError("seq_idx must be None within context_parallel: pass cu_seqlens, of the complete sequence")


# --- scan of a shard --------------------------------------------------------------------------------------------


class _ShardScan(NamedTuple):
    """A scan over this rank's steps."""

    op: Callable[..., tuple[Tensor, Tensor]]
    arguments: Arguments
    x: Tensor
    """(B, L, D) or (B, L, H, P) input."""
    log_decay: Callable[[Tensor], Tensor]
    """Logarithm of the factor by which a sum of step sizes decays a state."""
    state_shape: tuple[int, ...]

    @property
    def n_decays(self) -> int:
        """Step sizes of a step: D or H."""
        return self.x.shape[2]

    def scan(self, steps: slice, initial_states: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scan some of the steps: y, and the final states."""
        timed = {
            name: value[:, steps]
            for name, value in self.arguments.items()
            # B or C (D, N) is constant in time.
            if name in ("u", "x", "dt", "B", "C", "z", "input_weights") and value is not None and value.dim() > 2
        }
        packing = {"initial_states": initial_states, "cu_seqlens": cu_seqlens}
        return self.op(**(self.arguments | timed | packing))

    def final_states_from_zero(self) -> Tensor:
        """States after all steps here from zero states, (B, *state_shape)."""
        # y is not used.
        without = {"C": self.arguments["C"].detach(), "D": None, "z": None, "initial_states": None, "cu_seqlens": None}
        return self.op(**(self.arguments | without))[1]

    def dt_sum(self) -> Tensor:
        """Sum of the step sizes here, (B, n_decays)."""
        a, compute = self.arguments, torch.promote_types(self.x.dtype, torch.float32)
        return _DtSum.apply(a["dt"], a["dt_bias"], a["dt_softplus"], compute, a.get("dt_limit"))


def _scan_shard(shard: RankShard, op: _ShardScan, initial_states: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scan this rank's steps.

    Args:
        shard: this rank's shard.
        op: the scan.
        initial_states: (B or S, *state_shape) before the complete sequence, or None.

    Returns:
        y of this rank's steps, and the states after them, (B or S, *state_shape).
    """
    x = op.x
    shard.check_states(initial_states, x, op.state_shape)
    compute = torch.promote_types(x.dtype, torch.float32)
    first, last = shard.started
    ys, final_states = [], []

    # 1. Sequences that start here depend on no other rank.
    last_started = None
    if last > first:
        steps = slice(shard.incoming_length, None)
        cu_seqlens = None
        if last - first > 1:
            assert shard.cu_seqlens is not None
            cu_seqlens = shard.cu_seqlens[first : last + 1] - shard.incoming_length
        y, ends = op.scan(
            steps, None if initial_states is None else initial_states[shard.rows(first, last)], cu_seqlens
        )
        ys, final_states = [y], [ends]
        last_started = ends[-shard.batch :]  # (B, *state_shape)

    # 2. Tell the later ranks the end of the sequence that continues there: (B, M), a state and a sum of steps.
    if shard.outgoing is None or x.shape[1] == 0:
        message = x.new_zeros(shard.batch, math.prod(op.state_shape) + op.n_decays, dtype=compute)
    elif shard.outgoing == shard.incoming:
        message = torch.cat([op.final_states_from_zero().flatten(1), op.dt_sum().flatten(1)], 1)
    else:
        assert last_started is not None
        message = F.pad(last_started.flatten(1), (0, op.n_decays))
    messages = all_gather(message, x, shard.sharding.group)  # (W, B, M)

    # 3. The sequence that comes from earlier ranks.
    if shard.incoming is not None:
        before = _incoming_states(shard, shard.incoming, messages, op)  # (B, *state_shape)
        y, ends = op.scan(slice(0, shard.incoming_length), before, None)
        ys, final_states = [y, *ys], [ends, *final_states]

    def untouched(start: int, end: int) -> Tensor:
        """States of sequences without a step here."""
        rows = shard.rows(start, end)
        if initial_states is not None:
            return initial_states[rows].to(compute)
        return x.new_zeros(rows.stop - rows.start, *op.state_shape, dtype=compute)

    y = torch.cat(ys, 1) if len(ys) > 1 else ys[0] if ys else torch.zeros_like(x)
    n_before = first if shard.incoming is None else shard.incoming
    final_states = [untouched(0, n_before), *final_states, untouched(last, shard.n_sequences)]
    final_states = [s for s in final_states if len(s)]  # most often one, which need not be copied
    all_states = final_states[0] if len(final_states) == 1 else torch.cat(final_states or [untouched(0, 0)])
    if initial_states is not None:  # which may come from an exchange, and have no use on this rank
        y, all_states = depend_on(y, initial_states), depend_on(all_states, initial_states)
    return depend_on(y, messages), depend_on(all_states, messages)


def _incoming_states(shard: RankShard, incoming: int, messages: Tensor, op: _ShardScan) -> Tensor:
    """Combine the messages (W, B, M) of earlier ranks into the states before this shard, (B, *state_shape)."""
    size = math.prod(op.state_shape)
    first_rank = shard.owner(shard.bounds[incoming])
    states = messages[first_rank, :, :size].unflatten(1, op.state_shape)
    for rank in range(first_rank + 1, shard.rank):
        if shard.sharding.lengths[rank]:
            end, dt_sum = messages[rank].split([size, op.n_decays], 1)
            # exp(A sum dt) h + e: the recurrence (arXiv 2312.00752, equation 2) over all steps of a rank
            states = _Decayed.apply(states, op.log_decay(dt_sum)) + end.unflatten(1, op.state_shape)
    return states


class _Decayed(torch.autograd.Function):
    """States times exp(log_decay), (B, *state_shape).

    A state of 0 stays 0, and so does a gradient, also where the growing decays of a rank multiply to infinity.
    """

    @staticmethod
    def forward(ctx, states, log_decay):
        decayed = torch.where(states == 0, states, states * log_decay.exp())
        ctx.save_for_backward(log_decay, decayed)
        return decayed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        log_decay, decayed = ctx.saved_tensors
        dstates = torch.where(gradient == 0, gradient, gradient * log_decay.exp())
        return dstates, (gradient * decayed).sum_to_size(log_decay.shape)


class _DtSum(torch.autograd.Function):
    """Sum of the step sizes over time, (B, L, ...) -> (B, ...). It saves the raw `dt` alone."""

    @staticmethod
    def forward(ctx, dt, dt_bias, *options):
        ctx.save_for_backward(dt, dt_bias)
        ctx.options = options
        return step_size(dt, dt_bias, *options).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dsum):
        dt, dt_bias = ctx.saved_tensors
        inputs = [t.detach().requires_grad_() for t in (dt, dt_bias) if t is not None]
        with torch.enable_grad():
            total = step_size(inputs[0], inputs[1] if dt_bias is not None else None, *ctx.options).sum(1)
        ddt, *dbias = torch.autograd.grad(total, inputs, dsum)
        dsoftplus = ddtype = dlimit = None
        return ddt, dbias[0] if dbias else None, dsoftplus, ddtype, dlimit
