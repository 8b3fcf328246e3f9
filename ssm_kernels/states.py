"""Operations on the recurrent states of mixers and language models.

A state is a named tuple of tensors with the sequences first (`modules.MixerState`, `Mamba3States`), or a list of them,
one for each layer, as a language model has it. Functions return a new state of the same kind. Gradients flow through
them, save for `detach` and files.

>>> import torch
>>> from ssm_kernels import states
>>> from ssm_kernels.modules import Mamba
>>> mixer = Mamba(16)
>>> y, state = mixer(torch.randn(2, 5, 16), return_state=True)
>>> state = states.reset(states.detach(state), torch.tensor([False, True]))  # the second row starts a new sequence
>>> y, state = mixer(torch.randn(2, 3, 16), state, return_state=True)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ._core.state_format import NARROW_DTYPES
from .mamba3 import Mamba3States
from .modules.state import NARROW_STATES, LayerState, MixerState, NarrowMamba3States, NarrowMixerState

State = TypeVar("State", MixerState, NarrowMixerState, Mamba3States, NarrowMamba3States, list[LayerState])
"""State of one mixer, or of each layer of a model."""
Layer = TypeVar("Layer", bound="LayerState")

FORMAT, VERSION = "ssm_kernels.state", "1"
"""Metadata of a file of a state."""


def detach(state: State) -> State:
    """Return the state without its history, for truncated back-propagation through time.

    Args:
        state: a state; the result shares its memory.

    Returns:
        the same values, without gradients.
    """
    return _map(Tensor.detach, state)


def clone(state: State) -> State:
    """Return a copy, which a forward in place does not change.

    Args:
        state: a state.

    Returns:
        the copy.
    """
    return _map(Tensor.clone, state)


def to(state: State, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
    """Move a state to a device, or to the dtypes of the states of a model in `dtype`.

    Args:
        state: a state.
        device: of every layer; each keeps its own by default.
        dtype: a floating-point dtype. The scan's part is at least float32, as in a model of that dtype, or stays in
            its narrow format.

    Returns:
        the moved state.

    Raises:
        TypeError: `dtype` is not a floating-point dtype.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")

    if isinstance(state, list):
        return [_moved(layer, device, dtype) for layer in state]
    return _moved(state, device, dtype)


def reset(state: State, rows: Tensor) -> State:
    """Set the sequences of a mask to the state before their first token.

    Args:
        state: a state of B sequences.
        rows: (B,) bool, True where a new sequence starts.

    Returns:
        the state, zero in these rows. No gradient flows through them.

    Raises:
        TypeError: `rows` is not a bool tensor.
        ValueError: `rows` is not of shape (B,).
    """
    if not isinstance(rows, Tensor) or rows.dtype != torch.bool:
        got = str(rows.dtype) if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows must be a tensor of torch.bool, got {got}")

    def clear(t: Tensor) -> Tensor:
        if rows.shape != t.shape[:1]:
            raise ValueError(f"rows must have shape ({t.shape[0]},), one a sequence; got {tuple(rows.shape)}")
        return t.masked_fill(rows.to(t.device).view(-1, *[1] * (t.dim() - 1)), 0)

    return _map(clear, state)


def select(state: State, rows: slice | Sequence[int] | Tensor) -> State:
    """Take some sequences, in the order given.

    Args:
        state: a state of B sequences.
        rows: a slice, whose result shares the memory of `state`; or indices, or a mask (B,) of bool.

    Returns:
        the state of these sequences.

    Raises:
        IndexError: a row outside of the batch.
    """
    index = rows if isinstance(rows, (slice, Tensor)) else torch.tensor(rows, dtype=torch.int64)
    return _map(lambda t: t[index.to(t.device) if isinstance(index, Tensor) else index], state)


def repeat(state: State, n: int) -> State:
    """Repeat each sequence for n continuations, which are neighbors: rows 0, 0, 1, 1, ... for n = 2.

    Args:
        state: a state of B sequences.
        n: continuations of each.

    Returns:
        a state of B n sequences.

    Raises:
        ValueError: n is negative.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    return _map(lambda t: t.repeat_interleave(n, dim=0), state)


def named(state: LayerState | Sequence[LayerState]) -> dict[str, Tensor]:
    """Name the tensors of a state, in their order: `3.ssm` in layer 3 of a model, `ssm` in a mixer.

    Args:
        state: a state.

    Returns:
        the tensors by name.
    """
    if isinstance(state, (MixerState, Mamba3States, *NARROW_STATES)):
        return state._asdict()
    return {f"{i}.{field}": t for i, layer in enumerate(state) for field, t in layer._asdict().items()}


def save(state: State, path: str | Path) -> None:
    """Write a state to a safetensors file, which `load` reads.

    Args:
        state: a state, of any layers.
        path: file to write; it appears under this name when it is complete.
    """
    from safetensors.torch import save_file

    # Copies: the format refuses tensors that share memory, as slices of one batch do.
    tensors = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in named(state).items()}
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    save_file(tensors, unfinished, {"format": FORMAT, "version": VERSION})
    os.replace(unfinished, path)


class _HasState(Protocol):
    """A mixer or a language model."""

    # (batch), and the dtype for a state in a narrow format
    def new_state(self, *args: Any) -> Any: ...


def load(path: str | Path, model: _HasState) -> Any:
    """Read the state that `save` wrote, for a mixer or a language model.

    Args:
        path: the file.
        model: mixer or model that the state is for; its tensors tell the devices.

    Returns:
        the state, in the dtypes of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a state file, a format that this version does not read, or the state of another model.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as e:
        raise ValueError(f"{path} is not a safetensors file: {e}") from e
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a state that ssm_kernels.states.save wrote")
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path} has version {metadata.get('version')} of the format; this library reads {VERSION}")
    batches = {t.shape[0] for t in tensors.values()}
    narrow = next((t.dtype for name, t in tensors.items() if t.dtype in NARROW_DTYPES and name.endswith("ssm")), None)
    batch = batches.pop() if len(batches) == 1 else 0
    like = model.new_state(batch) if narrow is None else model.new_state(batch, narrow)
    want = {name: tuple(t.shape) for name, t in named(like).items()}
    have = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            raise ValueError(
                f"{path} is the state of another model: {name} is {have.get(name, 'missing')} there, and "
                f"{want.get(name, 'missing')} here"
            )
    parts = iter(tensors[name].to(t.device) for name, t in named(like).items())
    return _map(lambda _: next(parts), like)


def _moved(layer: Layer, device: torch.device | str | None, dtype: torch.dtype | None) -> Layer:
    wide = None if dtype is None else torch.promote_types(dtype, torch.float32)
    kept = ("ssm", "ssm_scale", "rand_seed") if isinstance(layer, NARROW_STATES) else ()
    dtypes = {name: None if name in kept else dtype if name == "conv" else wide for name in layer._fields}
    return layer._make(t.to(device=device, dtype=dtypes[name]) for name, t in layer._asdict().items())


def _map(function: Callable[[Tensor], Tensor], state: State) -> State:
    if isinstance(state, list):
        return [type(layer)(*map(function, layer)) for layer in state]
    return type(state)(*map(function, state))
