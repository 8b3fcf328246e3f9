"""Launches of a call, recorded on meta tensors: kernel, grid, arguments, and the compilation that each asks for."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..cases import Case
from ..compile_report import ARCHITECTURES, Request, intercepted, passes, request_of, value_of
from ..devices import MACHINES
from ..peers import bind_peer

Scalar = int | float | bool


@dataclass(frozen=True)
class Pointer:
    """A tensor argument."""

    size: int
    """Bytes of its distinct elements."""
    data: bytes | None
    """Memory from its first element on, where it is a small tensor of integers whose values are known."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel. Launches that an autotuner chooses from have the same `choice`."""

    mode: str
    """The pass of the call: `fwd`, `train-fwd`, `bwd` or `step`."""
    request: Request
    grid: tuple[int, int, int]
    parameters: tuple[tuple[str, Pointer | Scalar | None], ...]
    """Parameters of the machine code in their order, by name; None for one whose value is not known."""
    choice: int | None = None
    configuration: str = ""
    """Options that an autotuner would choose."""


@dataclass(frozen=True)
class Operation:
    """An operation of PyTorch on the device, such as the sum of partial sums."""

    mode: str
    name: str
    read: int
    """Bytes."""
    written: int
    """Bytes."""


@dataclass
class Recording:
    """Launches of a call, and the operations of PyTorch between them."""

    launches: list[Launch] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


def record_launches(case: Case, target: str, peer: str | None = None) -> Recording:
    """Record the launches of a case: forward, forward in training, backward; or of a decoding step.

    Args:
        case: the call.
        target: a key of `ARCHITECTURES`.
        peer: a package of `peers.PACKAGES` whose Triton kernels are recorded instead of this project's.

    Returns:
        The launches, in order. Of an autotuned kernel every configuration is recorded.

    Raises:
        ModuleNotFoundError: the peer is not installed.
        ValueError: the peer does not have the op.
    """
    recorder = _Recorder(target, str(case))
    call = None
    if peer is not None:
        call = lambda inputs: (bind_peer(peer, case, inputs)(),)  # noqa: E731
    with recorder.recording(), _pretended_device(target) if peer else contextlib.nullcontext():
        inputs = case.inputs("meta")
        recorder.operations.clear()
        for mode in passes(case, inputs, call):
            recorder.end_of_pass(mode)
    return recorder.recording_


class _Recorder:
    def __init__(self, target: str, case: str):
        self.target, self.case = target, case
        self.recording_ = Recording()
        self.request: Request | None = None
        self.pending: list[Launch] = []
        self.operations: list[tuple[str, int, int]] = []
        self.choices = 0
        self.alternatives: list[Launch] | None = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.jit import JITFunction

        run, recorder = JITFunction.run, self

        def recorded(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            recorder.request = None
            out = run(kernel, *args, grid=grid, warmup=warmup, **kwargs)
            if not warmup:
                recorder.keep(kernel, grid, args, kwargs)
            return out

        def run_every_configuration(tuner: Any, *args: Any, **kwargs: Any) -> None:
            """Launch each configuration that the tuner would time; the launches are alternatives."""
            tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
            recorder.choices += 1
            outer, recorder.alternatives = recorder.alternatives, []
            for config in tuner.prune_configs(kwargs):
                before = len(recorder.alternatives)
                tuner.fn.run(*args, **kwargs, **config.all_kwargs())
                recorder.name_configuration(before, str(config))
                # Callers may read it; results do not depend on which one it is.
                tuner.best_config = getattr(tuner, "best_config", config)
            found, recorder.alternatives = recorder.alternatives, outer
            recorder.pending += found

        with (
            mock.patch.object(JITFunction, "run", recorded),
            mock.patch.object(Autotuner, "run", run_every_configuration),
            _CountOperations(self.operations),
            intercepted(ARCHITECTURES[self.target], self._hook),
        ):
            yield

    def _hook(self, *, fn: Any, compile: Any, **_: Any) -> bool:
        self.request = request_of(fn, compile, self.target, self.case)[1]
        return True

    def keep(self, kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        assert self.request is not None, "the launcher did not ask for a compilation"
        names = {p.name for p in kernel.params}
        bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in names})
        bound.apply_defaults()
        grid = grid(bound.arguments) if callable(grid) else grid
        dims = tuple(int(n) for n in grid)
        parameters: list[tuple[str, Pointer | Scalar | None]] = []
        for name, kind in self.request.signature.items():
            _flatten(name, kind, bound.arguments[name], parameters)
        choice = None if self.alternatives is None else self.choices
        launch = Launch("", self.request, (*dims, 1, 1)[:3], tuple(parameters), choice)  # type: ignore[arg-type]
        (self.pending if self.alternatives is None else self.alternatives).append(launch)

    def name_configuration(self, start: int, name: str) -> None:
        assert self.alternatives is not None
        for i in range(start, len(self.alternatives)):
            self.alternatives[i] = replace(self.alternatives[i], configuration=name)

    def end_of_pass(self, mode: str) -> None:
        self.recording_.launches += [replace(launch, mode=mode) for launch in self.pending]
        self.recording_.operations += [Operation(mode, *operation) for operation in self.operations]
        self.pending = []
        self.operations.clear()


class _CountOperations(TorchDispatchMode):
    """Notes operations that move at least a few thousand bytes; views, and tensors without values, move none."""

    def __init__(self, operations: list[tuple[str, int, int]]):
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and not name.startswith(("empty", "new_empty")):
            fills = name in ("zeros", "zero_", "fill_", "full", "zeros_like", "ones", "new_zeros", "copy_")
            sources = [t for t in tree_leaves((args[1:] if fills else args, kwargs)) if isinstance(t, Tensor)]
            read, written = (
                sum(_distinct_bytes(t) for t in tensors if t.is_meta)
                for tensors in (sources, [t for t in tree_leaves(out) if isinstance(t, Tensor)])
            )
            if read + written >= LEAST_BYTES:
                self.operations.append((name, read, written))
        return out


LEAST_BYTES = 1 << 14
"""Bytes below which an operation of PyTorch is a matter of tables, which are kept from call to call."""


def _flatten(name: str, kind: Any, value: Any, into: list[tuple[str, Pointer | Scalar | None]]) -> None:
    """Append the parameters of an argument: several for a tuple, none for a constant."""
    if isinstance(kind, (tuple, list)):
        for i, (k, v) in enumerate(zip(kind, value, strict=True)):
            _flatten(f"{name}[{i}]", k, v, into)
    elif kind == "constexpr":
        pass
    elif isinstance(value, Tensor):
        into.append((name.removesuffix("_ptr"), _pointer(value)))
    elif isinstance(value, (bool, int)):
        into.append((name, int(value)))
    else:  # a float does not decide how often a loop runs; nothing else of a descriptor is known
        into.append((name, None))


def _distinct_bytes(tensor: Tensor) -> int:
    """Bytes of the elements of a tensor; those of an expanded dimension are the same."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


def _pointer(tensor: Tensor) -> Pointer:
    value, data = value_of(tensor), None
    if value is not None and not value.is_floating_point() and value.dtype != torch.bool:
        storage = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
        data = storage[value.storage_offset() * value.element_size() :].numpy().tobytes()
    return Pointer(_distinct_bytes(tensor), data)


@contextlib.contextmanager
def stub_extensions() -> Iterator[None]:
    """Let `mamba_ssm` be imported where its CUDA extension is not built: its Triton kernels do not use it."""
    name = "selective_scan_cuda"
    is_missing = name not in sys.modules and importlib.util.find_spec(name) is None
    if is_missing:
        sys.modules[name] = types.ModuleType(name)
    try:
        yield
    finally:
        if is_missing:
            del sys.modules[name]


@contextlib.contextmanager
def _pretended_device(target: str) -> Iterator[None]:
    """Let a peer ask for the properties of the current device, and select it, where there is none."""
    architecture = ARCHITECTURES[target]
    major, minor = divmod(int(architecture.arch), 10)
    name = next((name for name, machine in MACHINES.items() if machine.target == target), target)
    properties = types.SimpleNamespace(
        name=f"NVIDIA {name}", major=major, minor=minor, multi_processor_count=architecture.num_sms, warp_size=32,
        shared_memory_per_block_optin=architecture.shared_block, total_memory=80 << 30,
    )  # fmt: skip
    answers = {
        "device": contextlib.nullcontext(), "current_device": 0, "device_count": 1, "is_available": True,
        "get_device_name": properties.name, "get_device_capability": (major, minor),
        "get_device_properties": properties,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(stub_extensions())
        for function, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, function, lambda *_, answer=answer, **__: answer))
        yield
