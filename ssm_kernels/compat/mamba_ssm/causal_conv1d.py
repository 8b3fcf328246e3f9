"""The functions of `causal_conv1d` 1.6, with their signatures and layouts: channels before length.

Letters: B batch, L length, D channels, K convolution width, W inputs that a state holds, S sequences in a pack,
T steps of all sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.validation import check_tensor
from ...causal_conv1d import causal_conv1d
from ._shared import INDICES, StateRows, _rows, check_activation, time_before_channels


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve over time.

    Args:
        x: (B, D, L).
        weight: (D, K).
        bias: (D,).
        seq_idx: (B, L) number of the sequence of each step; where negative, y is zero. Excludes states.
        initial_states: (B, D, K - 1).
        return_final_states: return the last K - 1 inputs too.
        final_states_out: (B, D, K - 1) to write the final states to.
        activation: None, `"silu"` or `"swish"`.

    Returns:
        y (B, D, L); with `return_final_states`, y and the final states (B, D, K - 1).

    Raises:
        ValueError: arguments exclude each other, or a shape does not fit.
    """
    if seq_idx is not None and (initial_states is not None or return_final_states):
        name = "return_final_states" if return_final_states else "initial_states"
        raise ValueError(f"{name} cannot be combined with seq_idx")
    if final_states_out is not None and not return_final_states:
        raise ValueError("final_states_out needs return_final_states=True")
    states = time_before_channels("initial_states", initial_states)
    y, final_states = causal_conv1d(
        time_before_channels("x", x), weight, bias, check_activation(activation), states, seq_idx=seq_idx
    )  # fmt: skip
    y, final_states = y.transpose(1, 2), final_states.transpose(1, 2)  # (B, D, L), (B, D, K - 1)
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0).unsqueeze(1), 0)
    if final_states_out is not None:
        check_tensor("final_states_out", final_states_out, tuple(final_states.shape), like=x)
        final_states = final_states_out.copy_(final_states)
    return (y, final_states) if return_final_states else y


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve one step or a few, and update `conv_state` in place. No gradients.

    Args:
        x: (B, D), or (B, D, L).
        conv_state: (B, D, W), the last W >= K - 1 inputs.
        weight, bias, activation: as in `causal_conv1d_fn`.
        cache_seqlens: (B,) inputs so far; `conv_state` is then a ring buffer, whose next entry is that modulo W.
        conv_state_indices: (B,) rows of `conv_state`, which may then have more of them. A negative one is padding: y is
            0 there and no state is changed.

    Returns:
        y, of the shape of x.
    """
    if isinstance(x, Tensor) and x.dim() == 2:
        y = causal_conv1d_update(
            x.unsqueeze(-1), conv_state, weight, bias, activation, cache_seqlens, conv_state_indices
        )
        return y.squeeze(-1)  # (B, D)
    check_tensor("x", x, ("B", "D", "L"))
    check_tensor("weight", weight, (x.shape[1], "K"), like=x)
    rows = _rows("conv_state_indices", conv_state_indices, conv_state, x)
    check_tensor("conv_state", conv_state, (rows, x.shape[1], "W"), like=x)
    length, before, size = x.shape[2], weight.shape[1] - 1, conv_state.shape[2]
    if size < before:
        raise ValueError(f"conv_state must hold at least K - 1 = {before} inputs, got {size}")
    chosen = None if conv_state_indices is None else StateRows.of(conv_state_indices)
    old = conv_state if chosen is None else conv_state[chosen.rows]  # (B, D, W)
    if cache_seqlens is None:
        window = old[..., size - before :]
        new = torch.cat([old, x.to(old.dtype)], dim=-1)[..., length:]
    else:
        check_tensor("cache_seqlens", cache_seqlens, (x.shape[0],), like=x, dtypes=INDICES)

        def entries(first: int, last: int) -> Tensor:
            """Entries of the ring buffer for steps `first` to `last` of x, (B, D, steps)."""
            steps = cache_seqlens.long()[:, None] + torch.arange(first, last, device=x.device)
            return (steps % size).unsqueeze(1).expand(-1, x.shape[1], -1)

        window = old.gather(2, entries(-before, 0))  # (B, D, K - 1)
        # Inputs beyond the buffer's size would write to one entry twice, in no order: the oldest are left out.
        first = max(length - size, 0)
        new = old.scatter(2, entries(first, length), x[..., first:].to(old.dtype))
    y = causal_conv1d(x.transpose(1, 2), weight, bias, check_activation(activation), window.transpose(1, 2)).y
    y = y.transpose(1, 2)  # (B, D, L)
    if chosen is None:
        conv_state.copy_(new)
        return y
    chosen.write(conv_state, old, new)
    return chosen.blank(y)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """Collect the last inputs of each sequence of a pack, as `causal_conv1d_update` continues from.

    Args:
        x: (T, D), the sequences packed.
        cu_seqlens: (S + 1,) their bounds, from 0.
        state_len: W, inputs to collect from each.

    Returns:
        (S, D, W), with zeros before a sequence that is shorter than W.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_tensor("x", x, ("T", "D"))
    check_tensor("cu_seqlens", cu_seqlens, ("S + 1",), like=x, dtypes=INDICES)
    if state_len < 1:
        raise ValueError(f"state_len must be at least 1, got {state_len}")
    first, last = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()  # (S, 1) each
    step = last + torch.arange(-state_len, 0, device=x.device)  # (S, W)
    padded = F.pad(x, (0, 0, 1, 0))  # (1 + T, D): step -1 is zeros
    return padded[torch.where(step >= first, step + 1, 0)].transpose(1, 2)  # (S, D, W)


def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """`causal_conv1d_varlen_states`, sequence by sequence.

    Args:
        x: (T, D). cu_seqlens: (S + 1,).
        state_len: W, inputs to collect from each sequence.

    Returns:
        (S, D, W).
    """
    bounds = cu_seqlens.tolist()
    states = x.new_zeros(len(bounds) - 1, x.shape[1], state_len)
    for s, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        inputs = x[max(first, last - state_len) : last]
        states[s, :, state_len - len(inputs) :] = inputs.T  # (D, W)
    return states


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d_fn` by PyTorch's own convolution, in float32 at least. It takes no `seq_idx`, as the original.

    Args:
        x: (B, D, L). weight: (D, K). bias: (D,). initial_states, final_states_out: (B, D, K - 1).
        return_final_states, activation: as in `causal_conv1d_fn`.

    Returns:
        y (B, D, L); with `return_final_states`, y and the final states (B, D, K - 1).
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    before = weight.shape[1] - 1
    start = x.new_zeros(*x.shape[:2], before) if initial_states is None else initial_states.to(x.dtype)
    padded = torch.cat([start, x], dim=-1)  # (B, D, K - 1 + L)
    taps = weight.to(compute).unsqueeze(1)  # (D, 1, K)
    y = F.conv1d(padded.to(compute), taps, None if bias is None else bias.to(compute), groups=len(weight))
    y = (y if check_activation(activation) is None else F.silu(y)).to(x.dtype)
    if not return_final_states:
        return y
    final_states = padded[..., padded.shape[-1] - before :]  # (B, D, K - 1)
    return y, final_states if final_states_out is None else final_states_out.copy_(final_states)


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update`, step by step. `conv_state` is updated in place.

    Args:
        x: (B, D), or (B, D, L). conv_state: (B, D, W). weight: (D, K). bias: (D,).
        activation, cache_seqlens: as in `causal_conv1d_update`.

    Returns:
        y, of the shape of x.
    """
    if x.dim() == 2:
        y = causal_conv1d_update_ref(x.unsqueeze(-1), conv_state, weight, bias, activation, cache_seqlens)
        return y.squeeze(-1)
    compute = torch.promote_types(x.dtype, torch.float32)
    size, width = conv_state.shape[-1], weight.shape[1]
    seen = torch.zeros(len(x), dtype=torch.long) if cache_seqlens is None else cache_seqlens.long()
    ys = []
    for t in range(x.shape[-1]):
        if cache_seqlens is None:
            recent = torch.cat([conv_state[..., size - (width - 1) :], x[..., t : t + 1].to(conv_state.dtype)], -1)
            conv_state.copy_(torch.cat([conv_state, x[..., t : t + 1].to(conv_state.dtype)], -1)[..., 1:])
        else:
            rows = torch.arange(len(x), device=x.device)
            steps = (seen + t)[:, None] + torch.arange(1 - width, 0, device=x.device)  # (B, K - 1)
            old = conv_state[rows[:, None], :, steps % size].transpose(1, 2)  # (B, D, K - 1)
            recent = torch.cat([old, x[..., t : t + 1].to(old.dtype)], -1)  # (B, D, K)
            conv_state[rows, :, (seen + t) % size] = x[..., t].to(conv_state.dtype)
        y = (recent.to(compute) * weight.to(compute)).sum(-1)  # (B, D)
        y = y if bias is None else y + bias.to(compute)
        ys.append(y if check_activation(activation) is None else F.silu(y))
    return torch.stack(ys, -1).to(x.dtype)
