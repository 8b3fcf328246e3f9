"""Slots of a pool of states: which of them each sequence of a decoding step reads, and which it writes.

Letters: S sequences, T tokens of a sequence, M tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .state_format import decode_state, write_states
from .validation import has_readable_values

INTEGERS = (torch.int32, torch.int64)


class StepPlan(NamedTuple):
    """Slots of a step as kernels read them. Tokens are in one row, those of a sequence one after the other."""

    sources: Tensor
    """(S,) int64 slot that a sequence starts from; -1 where it is skipped."""
    destinations: Tensor
    """(M,) int64 slot that takes the state after a token; -1 where it is not kept."""
    bounds: Tensor
    """(S + 1,) int64: sequence s has the tokens bounds[s] to bounds[s + 1] - 1."""
    is_run: Tensor
    """(M,) bool: false for tokens of skipped sequences, and after the last bound."""
    sequence: Tensor
    """(M,) int64 sequence of each token; S after the last bound."""

    def blank(self, x: Tensor) -> Tensor:
        """Return x (B, T, ...) of M tokens with zeros at those that are not run."""
        return x.masked_fill(~self.is_run.view(*x.shape[:2], *[1] * (x.dim() - 2)), 0)

    def write(self, pool: Tensor, values: Tensor) -> None:
        """Write what each token leaves, (M, ...), to the slots of a pool that keep it."""
        destinations, values = self.destinations, values.to(pool.dtype)
        if has_readable_values(destinations):
            kept = (destinations >= 0).nonzero().squeeze(1)
            pool[destinations[kept]] = values[kept]
            return
        # Without a read by the host: each slot looks for the token that it keeps. Slot n takes what none keeps.
        n_slots, token = len(pool), torch.arange(len(destinations), device=pool.device)
        writer = token.new_full((n_slots + 1,), -1).scatter(0, destinations.where(destinations >= 0, n_slots), token)
        writer = writer[:n_slots].view(-1, *[1] * (pool.dim() - 1))
        pool.copy_(torch.where(writer >= 0, values[writer.flatten().clamp(min=0)], pool))

    def repeated(self, n: int) -> StepPlan:
        """Return the plan in which each token is n tokens, the last of which keeps the state."""
        destinations = self.destinations.new_full((len(self.destinations), n), -1)
        destinations[:, -1] = self.destinations
        return StepPlan(
            self.sources, destinations.flatten(), self.bounds * n, self.is_run.repeat_interleave(n),
            self.sequence.repeat_interleave(n),
        )  # fmt: skip


class StateSlots:
    """Slots of a pool that the sequences of a decoding step read their states from, and write them to.

    The states of a mixer or an op are then a pool with the slots first, and sequences join and leave a batch without a
    copy. A negative slot is padding. One object serves all layers of a model.

    With several tokens a step can keep the state after each; the next step starts from that after the accepted ones.
    So speculative decoding takes rejected tokens back:

    >>> import torch
    >>> from ssm_kernels import StateSlots
    >>> after_each = torch.tensor([[0, 1, 2]])  # the slots of one sequence
    >>> first = StateSlots(torch.tensor([7]), after_each)  # three tokens after the state in slot 7
    >>> second = StateSlots(after_each, num_accepted_tokens=torch.tensor([2]))  # starts from slot 1

    Args:
        state_indices: (S,) int32 or int64 slot that each sequence starts from; a sequence with a negative one is
            skipped: its output is zero, and no slot is read or written. With `num_accepted_tokens`, (S, T): the slots
            that the step before wrote.
        out_state_indices: (S,) slot that takes the state after a sequence's last token, or (S, T) after each; a
            negative one keeps no state. `state_indices` by default: states are updated in place.
        num_accepted_tokens: (S,) from 1 to T: a sequence starts from `state_indices[s, num_accepted_tokens[s] - 1]`.
        cu_seqlens: (S + 1,) bounds of sequences of unequal length, whose tokens are packed in one row. Tokens after
            the last bound are padding. Without it every sequence has the same number of tokens.

    Where values can be read (on a CPU), no slot may be written twice in a step, or written by one sequence and read by
    another. On a GPU nothing is read by the host, and such indices give results that depend on the order of programs.

    Raises:
        TypeError: an argument is no tensor of an integer type.
        ValueError: a shape, a device or a number of accepted tokens does not fit.
    """

    def __init__(
        self,
        state_indices: Tensor,
        out_state_indices: Tensor | None = None,
        num_accepted_tokens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ):
        arguments = {"state_indices": state_indices, "out_state_indices": out_state_indices,
                     "num_accepted_tokens": num_accepted_tokens, "cu_seqlens": cu_seqlens}  # fmt: skip
        for name, value in arguments.items():
            if value is not None or name == "state_indices":
                _check_integers(name, value, state_indices)
        n = state_indices.shape[0] if state_indices.dim() else 0
        has_accepted = num_accepted_tokens is not None
        _check_shape("state_indices", state_indices, (n, "T") if has_accepted else (n,))
        out = state_indices if out_state_indices is None else out_state_indices
        _check_shape("out_state_indices", out, (n, "T") if out.dim() == 2 else (n,))
        if num_accepted_tokens is not None:
            _check_shape("num_accepted_tokens", num_accepted_tokens, (n,))
            _check_range("num_accepted_tokens", num_accepted_tokens, 1, state_indices.shape[1])
            last = num_accepted_tokens.long() - 1  # (S,)
            state_indices = state_indices.gather(1, last.unsqueeze(1)).squeeze(1)  # (S,)
        if cu_seqlens is not None:
            _check_shape("cu_seqlens", cu_seqlens, (n + 1,))
        self.sources, self.out, self.cu_seqlens = state_indices.long(), out.long(), cu_seqlens
        self._plans: dict[tuple[int, int], StepPlan] = {}
        self._highest = -1
        if has_readable_values(out):
            self._highest = max((int(t.max()) for t in (self.sources, self.out) if t.numel()), default=-1)

    def plan(self, state: Tensor, batch: int, tokens: int) -> StepPlan:
        """Return the slots of a step of (batch, tokens, ...) on a pool.

        Args:
            state: the pool, with the slots first.
            batch, tokens: B and T of the step; with `cu_seqlens` 1 and M.

        Returns:
            the plan, which is made once for all layers.

        Raises:
            ValueError: another device, number of sequences or tokens, or slots that are not in the pool or that
                several sequences use.
        """
        if state.device != self.sources.device:
            raise ValueError(f"slots must be on {state.device} like the state, got {self.sources.device}")
        n_slots = len(state)
        if self._highest >= n_slots:
            raise ValueError(f"slots must be below {n_slots}, the number of slots of the state; got {self._highest}")
        if (batch, tokens) not in self._plans:
            self._plans[batch, tokens] = self._make_plan(batch, tokens)
        return self._plans[batch, tokens]

    def _make_plan(self, batch: int, tokens: int) -> StepPlan:
        n, device = len(self.sources), self.sources.device
        token = torch.arange(batch * tokens, device=device)  # (M,)
        if self.cu_seqlens is None:
            if batch != n:
                raise ValueError(f"state_indices must have an index for each of {batch} sequences, got {n}")
            bounds = torch.arange(n + 1, device=device) * tokens  # (S + 1,)
        elif batch != 1:
            raise ValueError(f"cu_seqlens needs a batch of one packed row, got batch {batch}")
        else:
            bounds = self.cu_seqlens.long()
            if has_readable_values(bounds):
                values = bounds.tolist()
                if values[0] != 0 or values[-1] > tokens or values != sorted(values):
                    raise ValueError(f"cu_seqlens must rise from 0 to at most {tokens} tokens, got {values}")
        # Sequence S takes what belongs to none: it is skipped.
        sequence = torch.searchsorted(bounds[1:].contiguous(), token, right=True)  # (M,)
        sources = torch.cat([self.sources.clamp(min=-1), self.sources.new_full((1,), -1)])  # (S + 1,)
        is_run = sources[sequence] >= 0
        out = torch.cat([self.out, self.out.new_full((1, *self.out.shape[1:]), -1)])  # (S + 1,) or (S + 1, T)
        last = torch.cat([bounds[1:], bounds.new_zeros(1)])[sequence] - 1  # (M,) last token of the sequence
        if out.dim() == 1:
            destinations = torch.where(token == last, out[sequence], -1)
        else:
            position = token - bounds[sequence]
            width = out.shape[1]
            if has_readable_values(position) and is_run.any() and (most := int(position[is_run].max())) >= width:
                raise ValueError(
                    f"out_state_indices must have a column for each of {most + 1} tokens of a sequence, got {width}"
                )
            destinations = out[sequence, position.clamp(max=width - 1)] if width else torch.full_like(token, -1)
        destinations = torch.where(is_run, destinations, -1).clamp(min=-1)
        plan = StepPlan(sources[:-1], destinations, bounds, is_run, sequence)
        if has_readable_values(destinations):
            _check_conflicts(plan)
        return plan


def _check_integers(name: str, value: object, like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of int32 or int64, got {type(value).__name__}")
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name} must be int32 or int64, got {str(value.dtype).removeprefix('torch.')}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like state_indices, got {value.device}")


def _check_shape(name: str, value: Tensor, shape: tuple[int | str, ...]) -> None:
    fits = value.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(value.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} must have shape ({expected}), got {tuple(value.shape)}")


def _check_range(name: str, value: Tensor, low: int, high: int) -> None:
    if has_readable_values(value) and value.numel():
        least, most = (int(x) for x in value.aminmax())
        if least < low or most > high:
            raise ValueError(f"{name} must be in [{low}, {high}], got values from {least} to {most}")


def _check_conflicts(plan: StepPlan) -> None:
    """Raise a ValueError where two tokens write one slot, or a sequence writes a slot that another one reads."""
    sources = plan.sources.tolist()
    writers: dict[int, int] = {}
    for s, slot in zip(plan.sequence.tolist(), plan.destinations.tolist(), strict=True):
        if slot < 0:
            continue
        if slot in writers:
            raise ValueError(f"out_state_indices must not name a slot twice, got slot {slot} for two states")
        writers[slot] = s
    for s, slot in enumerate(sources):
        if writers.get(slot, s) != s:
            raise ValueError(
                f"out_state_indices must not name a slot that another sequence reads: sequence {writers[slot]} writes"
                f" slot {slot}, from which sequence {s} starts"
            )


def plan_step(slots: StateSlots | None, state: Tensor, batch: int, tokens: int) -> StepPlan | None:
    """Return the plan of a step of (batch, tokens, ...), or None for one token of every state.

    Args:
        slots: slots of the step, or None where row b has state b.
        state: the pool, or a state with a row for each sequence.
        batch, tokens: B and T.
    """
    if slots is None:
        if tokens == 1:
            return None
        slots = StateSlots(torch.arange(batch, device=state.device))
    return slots.plan(state, batch, tokens)


PLAN_SCHEMA = "Tensor? sources, Tensor? destinations, Tensor? bounds"
"""The fields of a `StepPlan` that kernels take, in the language of `torch.library`."""


def plan_tensors(plan: StepPlan | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the arguments of `PLAN_SCHEMA`."""
    return (None, None, None) if plan is None else (plan.sources, plan.destinations, plan.bounds)


def token_seeds(rand_seed: Tensor | None, plan: StepPlan | None, batch: int, tokens: int) -> Tensor | None:
    """Return the seed of each token, (M,) int64: that of its sequence plus its position in the step.

    Args:
        rand_seed: (S,) or (1,) int64 seeds of sequences, or None.
        plan: slots of the step, or None where every row of the batch has `tokens` tokens.
        batch, tokens: B and T.
    """
    if rand_seed is None:
        return None
    position = torch.arange(tokens, device=rand_seed.device)
    if plan is None:
        return (rand_seed.unsqueeze(1) + position).expand(batch, tokens).flatten()
    n = len(plan.sources)
    first = torch.cat([plan.bounds[:-1], plan.bounds.new_zeros(1)])[plan.sequence]  # (M,)
    seeds = torch.cat([rand_seed.expand(n), rand_seed.new_zeros(1)])[plan.sequence]
    return seeds + torch.arange(batch * tokens, device=rand_seed.device) - first


def step_all(
    step: Callable[..., Tensor],
    state: Tensor,
    inputs: Sequence[Tensor | None],
    state_scale: Tensor | None,
    seeds: Tensor | None,
) -> Tensor:
    """Run a step of PyTorch operations on every row of a state.

    Args:
        step: `step(state, *inputs) -> y`; updates the state, in the dtype of the computation, in place.
        state: (B, ...), updated.
        inputs: (B, ...), or None.
        state_scale: scales of the state, for int8.
        seeds: (B,), or None.
    """
    h = decode_state(state, state_scale)
    y = step(h, *inputs)
    if h is not state:
        write_states(state, state_scale, slice(None), h, seeds)
    return y


def step_by_slots(
    step: Callable[..., Tensor],
    state: Tensor,
    plan: StepPlan,
    y: Tensor,
    inputs: Sequence[Tensor | None],
    state_scale: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Run a step of PyTorch operations on slots, token by token. On a GPU it synchronizes.

    Args:
        step: `step(state, *inputs) -> y` for one token of n sequences; updates the state (n, ...) in place.
        state: pool, updated.
        plan: slots of the step.
        y: (M, ...) zeros.
        inputs: (M, ...) of each token, or None.
        state_scale: scales of the pool, for int8.
        seeds: (M,) of each token, or None.

    Returns:
        y with the outputs of the tokens that are run.
    """
    if y.is_meta:  # no slot has a number
        return y
    sequences = (plan.sources >= 0).nonzero().squeeze(1)  # (n,)
    sources = plan.sources[sequences]
    h = decode_state(state[sources], None if state_scale is None else state_scale[sources])  # (n, ...), a copy
    starts, lengths = plan.bounds[sequences], plan.bounds.diff()[sequences]
    for t in range(int(lengths.max()) if len(lengths) else 0):
        active = (lengths > t).nonzero().squeeze(1)
        tokens = starts[active] + t
        h_t = h[active]
        y[tokens] = step(h_t, *(None if x is None else x[tokens] for x in inputs))
        destinations = plan.destinations[tokens]
        kept = (destinations >= 0).nonzero().squeeze(1)
        h_t[kept] = write_states(
            state, state_scale, destinations[kept], h_t[kept], None if seeds is None else seeds[tokens[kept]]
        )
        h[active] = h_t
    return y
