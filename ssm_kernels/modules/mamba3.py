"""The Mamba-3 mixer."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from .._core.invariant import softplus
from .._core.slots import StateSlots
from ..mamba3 import Mamba3States, mamba3, mamba3_step
from .norm import RMSNorm
from .parameters import initial_dt_bias, without_weight_decay
from .state import (
    NarrowMamba3States,
    check_digits,
    check_narrow,
    check_no_gradients,
    check_slots,
    copied,
    count_writes,
    format_options,
    is_decoding_step,
    narrow_parts,
    read_ssm,
    write_ssm,
)


class Mamba3MixerOutput(NamedTuple):
    """Result of the mixer with `return_state=True`."""

    y: Tensor
    """(B, L, D)"""
    state: Mamba3States
    """State after the last step of each sequence. Gradients flow through it."""


class Mamba3(nn.Module):
    """The Mamba-3 mixer (arXiv 2603.15569, section 3), with the parameter names of `mamba_ssm`'s.

    It has no convolution: the trapezoid sees two inputs, and B and C have biases.

    Args:
        d_model: width D of the input and the output.
        d_state: state size N.
        expand: E / D.
        headdim: channels P of a head.
        ngroups: groups G of B and C.
        rope_fraction: share of the state's entries that rotate, 0.5 or 1.
        dt_min, dt_max, dt_init_floor: range of the step sizes at initialization.
        A_floor: least rate of decay, -A.
        is_outproj_norm: normalize each head before the gate, in place of the gate alone.
        is_mimo: several inputs and outputs a head.
        mimo_rank: R, their number.
        chunk_size: steps that the scan treats as one matrix product. Results do not depend on it.
        norm_eps: epsilon of the norms of B, C and the output.

    Raises:
        ValueError: sizes do not fit; the message names the argument.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        chunk_size: int = 64,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.d_model, self.d_state, self.expand = d_model, d_state, expand
        self.d_inner, self.headdim, self.ngroups = int(expand * d_model), headdim, ngroups
        if self.d_inner != expand * d_model or self.d_inner % headdim:
            raise ValueError(f"headdim must divide expand * d_model = {expand * d_model}, got {headdim}")
        self.nheads = self.d_inner // headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups must divide the {self.nheads} heads, got {ngroups}")
        if rope_fraction not in (0.5, 1.0):
            raise ValueError(f"rope_fraction must be 0.5 or 1, got {rope_fraction}")
        # Two entries for each angle.
        self.num_rope_angles = int(d_state * rope_fraction) // 2
        if not self.num_rope_angles or (is_mimo and d_state % 2):
            raise ValueError(f"d_state must be at least {int(2 / rope_fraction)}, and even with is_mimo, got {d_state}")
        self.A_floor, self.chunk_size = A_floor, chunk_size
        self.is_outproj_norm, self.is_mimo = is_outproj_norm, is_mimo
        self.mimo_rank = rank = mimo_rank if is_mimo else 1
        # z, x, B, C, dt, A, trap, angles: see `split_projected`.
        self._sizes = [
            self.d_inner, self.d_inner, rank * ngroups * d_state, rank * ngroups * d_state, self.nheads, self.nheads,
            self.nheads, self.num_rope_angles,
        ]  # fmt: skip
        self.in_proj = nn.Linear(d_model, sum(self._sizes), bias=False)
        self.dt_bias = without_weight_decay(initial_dt_bias((self.nheads,), dt_min, dt_max, dt_init_floor))
        self.B_bias = nn.Parameter(torch.ones(self.nheads, rank, d_state))
        self.C_bias = nn.Parameter(torch.ones(self.nheads, rank, d_state))
        self.B_norm, self.C_norm = RMSNorm(d_state, norm_eps), RMSNorm(d_state, norm_eps)
        if is_mimo:
            self.mimo_x = nn.Parameter(torch.full((self.nheads, rank, headdim), 1 / rank))
            self.mimo_z = nn.Parameter(torch.ones(self.nheads, rank, headdim))
            self.mimo_o = nn.Parameter(torch.full((self.nheads, rank, headdim), 1 / rank))
        self.D = without_weight_decay(torch.ones(self.nheads))
        if is_outproj_norm:
            self.norm = RMSNorm(self.d_inner, norm_eps, headdim, norm_before_gate=True)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    @overload
    def new_state(self, batch: int) -> Mamba3States: ...

    @overload
    def new_state(self, batch: int, dtype: torch.dtype | None) -> Mamba3States | NarrowMamba3States: ...

    def new_state(self, batch: int, dtype: torch.dtype | None = None) -> Mamba3States | NarrowMamba3States:
        """Make the state before the first token.

        Args:
            batch: number of sequences.
            dtype: of `ssm`: bfloat16, float16 or int8 for `NarrowMamba3States`; float32, or float64 in a model of that
                dtype, by default.

        Returns:
            zeros on the mixer's device, at least float32 otherwise.

        Raises:
            TypeError: another dtype.
        """
        H, P, N = self.nheads, self.headdim, self.d_state
        shapes = ((H, self.num_rope_angles), (H, P, N), (self.mimo_rank, H, N), (H, P))
        wide = torch.promote_types(self.B_bias.dtype, torch.float32)
        states = Mamba3States(*(self.B_bias.new_zeros(batch, *shape, dtype=wide) for shape in shapes))
        if dtype in (None, wide):
            return states
        ssm, ssm_scale, rand_seed = narrow_parts(states.ssm, dtype)
        return NarrowMamba3States(states.angles, ssm, states.B, states.x, ssm_scale, rand_seed)

    @overload
    def forward(
        self,
        hidden: Tensor,
        state: Mamba3States | NarrowMamba3States | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        slots: StateSlots | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        hidden: Tensor,
        state: Mamba3States | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: Literal[True],
    ) -> Mamba3MixerOutput: ...

    def forward(
        self,
        hidden: Tensor,
        state: Mamba3States | NarrowMamba3States | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: bool = False,
        slots: StateSlots | None = None,
    ) -> Tensor | Mamba3MixerOutput:
        """Mix over time.

        Args:
            hidden: (B, L, D).
            state: state before the first step, one row for each sequence; zeros by default. Without `return_state` it
                is updated in place, without gradients.
            cu_seqlens: (S + 1,) bounds of sequences packed in one row.
            return_state: return the final state too, with gradients, and leave `state` as it is.
            slots: take this forward as a decoding step of a few tokens on slots of `state`, which is then a pool. No
                gradients: call it within `torch.no_grad()`.

        Returns:
            (B, L, D); with `return_state`, a `Mamba3MixerOutput`.

        Raises:
            TypeError, ValueError: `state` or `slots` does not fit; the message names the part.
        """
        if slots is not None:
            check_slots(state, cu_seqlens, return_state)
        _check_state(state, self.B_bias.dtype, return_state)
        projected = self.in_proj(hidden)
        z, *inputs = self.scan_inputs(projected)
        gate = None if self.is_outproj_norm else z
        if state is not None and (slots is not None or is_decoding_step(projected, cu_seqlens)):
            final = Mamba3States(state.angles, state.ssm, state.B, state.x)
            final = copied(final) if return_state else final
            y = mamba3_step(
                final, *inputs, **self._parameters_of_scan(gate), slots=slots, **format_options(state, slots)
            )
            count_writes(state, slots, *hidden.shape[:2])
        else:
            start = None if state is None else Mamba3States(state.angles, read_ssm(state), state.B, state.x)
            if start is not None and not return_state and torch.is_grad_enabled():
                start = copied(start)  # a backward may need it as it was
            y, final = mamba3(
                *inputs, **self._parameters_of_scan(gate), initial_states=start, chunk_size=self.chunk_size,
                cu_seqlens=cu_seqlens,
            )  # fmt: skip
            if state is not None and not return_state:
                for part, end in ((state.angles, final.angles), (state.B, final.B), (state.x, final.x)):
                    part.copy_(end.detach())
                write_ssm(state, final.ssm)
        y = self.out_proj(self.gate(y, z).to(projected.dtype))
        return Mamba3MixerOutput(y, final) if return_state else y

    def split_projected(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Split the output of `in_proj`.

        Args:
            projected: (..., 2 E + 2 R G N + 3 H + K).

        Returns:
            z and x (..., E), B and C (..., R G N), dt, A and trap (..., H), and the angles (..., K).
        """
        return projected.split(self._sizes, dim=-1)

    def scan_inputs(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Compute the gate and the inputs of the scan from the output of `in_proj`.

        Args:
            projected: (B, L, ...), see `split_projected`.

        Returns:
            z, x (B, L, H, P), dt, A (B, L, H), B, C (B, L, G, N) or (B, L, R, G, N), trap (B, L, H), angles (B, L, K).
        """
        z, x, B, C, dt, A, trap, angles = self.split_projected(projected)
        z, x = (t.unflatten(-1, (self.nheads, self.headdim)) for t in (z, x))
        ranks = (self.mimo_rank,) if self.is_mimo else ()
        B, C = (t.unflatten(-1, (*ranks, self.ngroups, self.d_state)) for t in (B, C))
        compute = torch.promote_types(projected.dtype, torch.float32)
        dt = softplus(dt.to(compute) + self.dt_bias.to(compute))
        A = -softplus(A.to(compute)).clamp(min=self.A_floor)
        return z, x, dt, A, self.B_norm(B), self.C_norm(C), trap, angles

    def _parameters_of_scan(self, z: Tensor | None) -> dict[str, Any]:
        if not self.is_mimo:
            return {"B_bias": self.B_bias[:, 0], "C_bias": self.C_bias[:, 0], "D": self.D, "z": z}
        parameters = {"B_bias": self.B_bias, "C_bias": self.C_bias, "D": self.D, "z": z, "mimo_x": self.mimo_x}
        if not self.is_outproj_norm:  # a norm is of each rank, before the projection of the outputs
            parameters |= {"mimo_z": self.mimo_z, "mimo_o": self.mimo_o}
        return parameters

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        """Return the input of `out_proj`: the scan's output, normalized and gated where the scan did not.

        Args:
            y: (..., H, P) output of the scan; (..., R, H, P) with a norm in MIMO.
            z: (..., H, P) gate.

        Returns:
            (..., E).
        """
        if not self.is_outproj_norm:
            return y.flatten(-2)
        if not self.is_mimo:
            return self.norm(y.flatten(-2), z.flatten(-2))
        z = z.unsqueeze(-3) * self.mimo_z.transpose(0, 1).to(z.dtype)  # (..., R, H, P)
        y = self.norm(y.flatten(-2), z.flatten(-2)).unflatten(-1, (self.nheads, self.headdim))
        return (y * self.mimo_o.transpose(0, 1).to(y.dtype)).sum(-3).flatten(-2)


def _check_state(state: object, dtype: torch.dtype, return_state: bool) -> None:
    """Check what the op does not: the type, dtypes that lose digits, and gradients of a state updated in place."""
    if state is None:
        return
    if not isinstance(state, (Mamba3States, NarrowMamba3States)):
        raise TypeError(f"state must be a Mamba3States, got {type(state).__name__}")
    if isinstance(state, NarrowMamba3States):
        check_narrow(state, not return_state)
    for name in Mamba3States._fields:
        if name != "ssm" or isinstance(state, Mamba3States):
            check_digits(f"state.{name}", getattr(state, name), torch.promote_types(dtype, torch.float32))
    if not return_state:
        check_no_gradients(state)
