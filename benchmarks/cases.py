"""Calls of the ops: sizes, dtype and options. One table for tests, benchmarks, the compile report and the emulator::

case = Case("ssd", Shape(batch=1, length=2048, heads=24, d_state=128), "bf16", dt_bias=True)
y, final_states = case.call(case.inputs("cuda"), backend="triton")
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import ssm_kernels
from ssm_kernels import Backend, Mamba3Output, Mamba3States, StateSlots, decode_state, encode_state

from .shapes import INPUTS, OPS, SIZES, WIDTHS, Shape

DIRECTIONS = len(ssm_kernels.CROSS)
"""Scan directions of the ops on a grid, by default."""
MAMBA3_IN_FLOAT32 = (
    "dt", "A", "B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o", "initial_states", "states",
)  # fmt: skip
"""Inputs of Mamba-3 that the mixer has in float32 under autocast."""
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
STATE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


class StepOutput(NamedTuple):
    """Result of a case of a decoding step."""

    y: Tensor
    state: Tensor


class StoredState(NamedTuple):
    """The state of a case in a narrow format."""

    name: str
    state: Tensor
    scale: Tensor | None


class Mamba3Results(NamedTuple):
    """Result of a case of `mamba3` or of its step: y, and the state's parts with angles that do not jump at 2 pi."""

    y: Tensor
    cos: Tensor
    sin: Tensor
    ssm: Tensor
    B: Tensor
    x: Tensor


@dataclass(frozen=True)
class Case:
    """One call of a public op; an op reads the options it has."""

    op: str
    shape: Shape = Shape()
    dtype: str = "fp32"
    z: bool = False
    D: bool = True
    wide_D: bool = False
    """D of SSD has a value per head and channel, not per head."""
    dt_bias: bool = False
    dt_softplus: bool = True
    dt_limit: bool = False
    """Bounds on SSD's dt that clamp some of its values."""
    silu: bool = True
    """The convolution's activation."""
    norm_before_gate: bool = False
    initial_states: bool = False
    constant: bool = False
    """B and C of the selective scan constant in time."""
    sequences: int = 0
    """Number of sequences packed in the batch's one row, by `cu_seqlens`; 0 is a batch that is not packed."""
    seq_idx: bool = False
    """Each row of the batch holds two sequences, by `seq_idx`."""
    channels_first: bool = False
    """Inputs are transposed views of (B, channels, L)."""
    chunk_size: int = 64
    slots: bool = False
    """A step on slots of a pool of states."""
    state_dtype: str = ""
    """Format in which a step keeps a float32 state of a scan: bf16, fp16 or int8. It is encoded in each call."""
    rand_seed: bool = False
    """That state is rounded stochastically, not to the nearest."""

    def __str__(self) -> str:
        """The sizes that the op reads, and the options that differ from their defaults: unique to the case."""
        sizes = [f"{name}={getattr(self.shape, name)}" for name in SIZES[self.op]]
        options = [(f, getattr(self, f.name)) for f in fields(self) if f.name not in ("op", "shape", "dtype")]
        chosen = [f.name if value is True else f"{f.name}={value}" for f, value in options if value != f.default]
        return " ".join([self.op, self.dtype, *sizes, *chosen])

    @property
    def is_step(self) -> bool:
        return self.op.endswith("_step")

    @property
    def folder(self) -> str:
        """Folder of `ssm_kernels` that holds the op's kernels."""
        folders = {"rms_norm": "norm", "add_rms_norm": "norm", "cross_scan": "cross_scan", "cross_merge": "cross_scan"}
        op = self.op.removesuffix("_step").removeprefix("cross_")
        return folders.get(self.op, "ssd" if op == "mamba3" else op)

    @property
    def is_mamba3(self) -> bool:
        return self.op.startswith("mamba3")

    @property
    def state_names(self) -> tuple[str, ...]:
        """Inputs that a step updates in place."""
        return tuple(name for name in INPUTS[self.op] if name.startswith("state"))

    @property
    def result_names(self) -> tuple[str, ...]:
        """Names of the results of `call`."""
        if self.is_mamba3:
            return Mamba3Results._fields
        if self.is_step:
            return StepOutput._fields
        kind = typing.get_type_hints(getattr(ssm_kernels, self.op))["return"]
        return getattr(kind, "_fields", ("y",))

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that are not tensors."""
        if self.is_mamba3:
            return {} if self.is_step else {"chunk_size": self.chunk_size}
        if self.folder == "selective_scan":
            return {"dt_softplus": self.dt_softplus}
        if self.folder == "ssd":
            limit = {"dt_limit": (0.01, 0.05)} if self.dt_limit else {}
            return {"dt_softplus": self.dt_softplus} | limit | ({} if self.is_step else {"chunk_size": self.chunk_size})
        if self.folder == "causal_conv1d":
            return {"activation": "silu" if self.silu else None}
        if self.op == "rms_norm":
            group_size = self.shape.channels // self.shape.groups
            return {"group_size": group_size, "norm_before_gate": self.norm_before_gate}
        if self.op == "cross_merge":
            return {"height": self.shape.height, "width": self.shape.length // self.shape.height}
        return {}

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """Tensor arguments by name, drawn from the seed; those of floating point require gradients, but for a step."""
        device = torch.device(device)
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        drawn = {name: _draw(self, name, size, device, generator) for name, size in self.sizes().items()}
        return drawn | self._packing(device)

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the floating-point inputs by name."""
        s = self.shape
        extents = {
            "B": s.batch, "R": self.sequences or s.batch, "L": s.length, "h": s.height, "w": s.length // s.height,
            "hw": s.length, "K": DIRECTIONS, "D": s.channels, "H": s.heads, "P": s.headdim, "N": s.d_state,
            "G": s.groups, "W": s.width, "W-1": s.width - 1,
            "M": s.rank, "J": s.d_state // 4,
        }  # fmt: skip
        found = {}
        for name, shape in INPUTS[self.op].items():
            if not self._has(name):
                continue
            dims = shape.split()
            if "G" in dims or name in ("B_bias", "C_bias"):
                dims = [dim for dim in dims if dim != "M" or s.rank > 1]  # MIMO alone has an axis of ranks there
            if name in ("B", "C") and self.folder == "selective_scan":
                if self.constant:
                    dims = ["D", "N"]
                # A step tells B and C that are constant in time by their two dimensions, so it keeps its groups.
                elif s.groups == 1 and not self.is_step and "G" in dims:
                    dims.remove("G")
            if name == "D" and self.wide_D and "H" in dims:
                dims.append("P")
            found[name] = tuple(extents[dim] for dim in dims)
        return found

    def _has(self, name: str) -> bool:
        """The case has this input of its op."""
        if name.startswith("mimo_"):
            return self.shape.rank > 1 and (self.z or name != "mimo_z")
        return getattr(self, name.partition(".")[0], True)

    def _packing(self, device: torch.device) -> dict[str, Tensor]:
        """Tensors that delimit packed sequences."""
        batch, length = self.shape.batch, self.shape.length
        if self.seq_idx:
            position = torch.arange(length, device=device, dtype=torch.int32)
            return {"seq_idx": (position >= length // 3).int().expand(batch, length)}  # (B, L)
        if self.sequences:
            # Of unequal lengths; the first of more than two is empty.
            shares = (torch.arange(self.sequences + 1, device=device) / self.sequences).square()
            bounds = (shares * (shares > shares[1] * (self.sequences > 2)) * length).round().int()
            return {"cu_seqlens": bounds}  # (S + 1,)
        return {}

    def run(self, inputs: Mapping[str, Tensor], backend: Backend = "auto") -> Tensor | tuple[Tensor, ...]:
        """Call the op, by default on the backend of `use_backend`; a step updates its state in place.

        Returns:
            the op's results, those of Mamba-3 as `y` and the parts of the states.
        """
        options, batch, device = self.options, self.shape.batch, next(iter(inputs.values())).device
        if self.slots:
            # Row b of the batch has slot b, which is what a step without slots does.
            options["slots"] = StateSlots(torch.arange(batch, device=device))
        stored = self._stored(inputs)
        if stored is not None:
            options["state_scale"] = stored.scale
            options["rand_seed"] = torch.tensor([5], device=device) if self.rand_seed else None
        op = getattr(ssm_kernels, self.op)
        named = inputs if stored is None else {**inputs, stored.name: stored.state}
        out = op(**arguments(named), **options, backend=backend)
        if stored is not None:
            inputs[stored.name].copy_(decode_state(stored.state, stored.scale))
        return (out.y, *out.final_states) if isinstance(out, Mamba3Output) else out

    def _stored(self, inputs: Mapping[str, Tensor]) -> StoredState | None:
        """The state in the case's format; None where it is kept as it is, as for a comparison in float64."""
        name = "states.ssm" if self.is_mamba3 else "state"
        if not self.state_dtype or inputs[name].dtype != torch.float32:
            return None
        return StoredState(name, *encode_state(inputs[name], STATE_DTYPES[self.state_dtype], None))

    def function(self, *, backend: Backend, **inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The op as `ssm_kernels.testing.assert_agrees` calls it: a step updates and returns a copy of its state."""
        states = {name: inputs[name].clone() for name in self.state_names}
        return self.named(self.run(inputs | states, backend), states)

    def named(self, out: Any, states: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Results of `run`, or of a function like it, with names.

        Args:
            out: the results.
            states: those that a step updated.
        """
        if self.is_step:
            out = (out, *states.values())
        if self.is_mamba3:
            y, angles, *others = out
            return Mamba3Results(y, angles.cos(), angles.sin(), *others)
        return StepOutput(*out) if self.is_step else out

    def call(self, inputs: Mapping[str, Tensor], backend: Backend = "auto") -> tuple[Tensor, ...]:
        """Call the op on a copy of a step's state; the results are always a tuple."""
        out = self.function(backend=backend, **inputs)
        return out if isinstance(out, tuple) else (out,)


def arguments(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of an op from a case's inputs: the parts `states.ssm` and so on of a state are one argument."""
    found: dict[str, Any] = {name: value for name, value in inputs.items() if "." not in name}
    for name in dict.fromkeys(name.partition(".")[0] for name in inputs if "." in name):
        found[name] = Mamba3States(*(inputs[f"{name}.{part}"] for part in Mamba3States._fields))
    return found


def _draw(case: Case, name: str, size: tuple[int, ...], device: torch.device, generator) -> Tensor:
    """Random values in the range, dtype and memory layout that they have in the models."""
    value = torch.randn(size, device=device, generator=generator)
    if name == "dt":
        value = value - 4  # softplus of it is about 0.02
        value = value if case.dt_softplus and not case.is_mamba3 else torch.nn.functional.softplus(value)
    elif name == "A" and case.is_mamba3:
        value = -torch.nn.functional.softplus(value)  # (B, L, H)
    elif name == "A" and case.folder == "selective_scan":
        # S4D-real initialization: A_n = -(n + 1)
        value = -torch.arange(1.0, size[-1] + 1, device=device).repeat(*size[:-1], 1)  # (D, N)
    elif name == "A":
        # Mamba-2 initializes -A uniformly in [1, 16].
        value = -1 - 15 * torch.rand(size, device=device, generator=generator)  # (H,)
    dtype = DTYPES[case.dtype]
    in_float32 = MAMBA3_IN_FLOAT32 if case.is_mamba3 else ("A", "D", "dt_bias", "initial_states", "state")
    kind = name.partition(".")[0]
    if name == "residual" or case.folder in ("selective_scan", "ssd") and kind in in_float32:
        dtype = torch.promote_types(dtype, torch.float32)
    value = value.to(dtype)
    if case.channels_first and value.dim() == 3 and size[1] == case.shape.length:
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
    return value.requires_grad_(not case.is_step)


VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "selective_scan": (
        {"z": True}, {"D": False}, {"dt_bias": True}, {"dt_softplus": False}, {"initial_states": True},
        {"constant": True}, {"channels_first": True, "z": True}, {"sequences": 5}, {"seq_idx": True},
        {"sequences": 5, "initial_states": True, "z": True, "dt_bias": True},
    ),
    "ssd": (
        {"z": True}, {"D": False}, {"wide_D": True}, {"dt_bias": True}, {"dt_softplus": False}, {"dt_limit": True},
        {"initial_states": True}, {"sequences": 5}, {"seq_idx": True},
        {"sequences": 5, "initial_states": True, "z": True, "dt_bias": True},
    ),
    "mamba3": (
        {"z": True}, {"D": False}, {"initial_states": True}, {"sequences": 5}, {"seq_idx": True},
        {"sequences": 5, "initial_states": True, "z": True},
    ),
    "causal_conv1d": (
        {"silu": False}, {"initial_states": True}, {"channels_first": True}, {"sequences": 5}, {"seq_idx": True},
        {"sequences": 5, "initial_states": True},
    ),
    "rms_norm": ({"z": True}, {"z": True, "norm_before_gate": True}),
    "add_rms_norm": (),
    "cross_scan": (),
    "cross_merge": (),
    "cross_causal_conv1d": ({"silu": False},),
    "cross_selective_scan": ({"D": False}, {"dt_bias": True}, {"dt_softplus": False}),
    "cross_ssd": ({"D": False}, {"wide_D": True}, {"dt_bias": True, "dt_limit": True}),
    "selective_scan_step": (
        {"state_dtype": "bf16", "rand_seed": True}, {"state_dtype": "fp16", "rand_seed": True, "slots": True},
        {"state_dtype": "int8", "rand_seed": True}, {"state_dtype": "int8", "slots": True},
        {"z": True}, {"dt_bias": True}, {"constant": True},
    ),
    "ssd_step": (
        {"state_dtype": "bf16", "rand_seed": True}, {"state_dtype": "fp16", "rand_seed": True, "slots": True},
        {"state_dtype": "int8", "rand_seed": True}, {"state_dtype": "int8", "slots": True},
        {"z": True}, {"wide_D": True}, {"dt_bias": True, "dt_limit": True},
    ),
    "mamba3_step": ({"slots": True}, {"state_dtype": "int8", "rand_seed": True, "slots": True}, {"z": True}),
    "causal_conv1d_step": ({"silu": False}, {"slots": True}),
}  # fmt: skip
"""Options that each op has, one at a time and then together. Packing needs a batch of one row."""


def variants(case: Case) -> list[Case]:
    """The case, and the case with each of its op's options."""
    found = [case]
    for options in VARIANTS[case.op]:
        shape = replace(case.shape, batch=1) if "sequences" in options else case.shape
        found.append(replace(case, shape=shape, **options))
    return found


def layer(family: str, size: str, dtype: str = "bf16", batch: int = 8, length: int = 2048) -> list[Case]:
    """The ops of one layer of a published model, in training and in decoding, as `ssm_kernels.modules` calls them.

    Mamba-3 has no published models: its layers are those of `mamba_ssm`'s defaults at the widths of the others, with
    one input a head and with four, whose chunks hold as many steps of SSD.
    """
    width = WIDTHS[size]
    inner = 2 * width
    shape = Shape(batch, length, inner)
    add_norm = Case("add_rms_norm", replace(shape, channels=width), dtype)
    if family == "mamba":
        options = {"dtype": dtype, "z": True, "dt_bias": True}
        conv = Case("causal_conv1d", shape, dtype)
        return [
            Case("selective_scan", shape, **options), conv, add_norm,
            Case("selective_scan_step", shape, **options), replace(conv, op="causal_conv1d_step"),
        ]  # fmt: skip
    if family == "mamba3":
        shape = replace(shape, d_state=128, heads=inner // 64)
        ranks = [Case("mamba3", replace(shape, rank=rank), dtype, z=True) for rank in (1, 4)]
        return [*ranks, add_norm, *(replace(case, op="mamba3_step") for case in ranks)]
    scan = Case("ssd", replace(shape, d_state=128, heads=inner // 64), dtype, dt_bias=True)
    conv = Case("causal_conv1d", replace(shape, channels=inner + 2 * 128), dtype)
    return [
        scan, conv, add_norm, Case("rms_norm", shape, dtype, z=True),
        replace(scan, op="ssd_step"), replace(conv, op="causal_conv1d_step"),
    ]  # fmt: skip


def connector(dtype: str = "bf16", batch: int = 8, side: int = 27) -> list[Case]:
    """The ops of the connectors at a 2.7b model's width, on the grid of patches of a 384-pixel encoder."""
    shape = Shape(batch, side * side, 2 * 2560, height=side)
    heads = replace(shape, d_state=128, heads=80)
    return [
        Case("cross_scan", shape, dtype), Case("cross_merge", shape, dtype),
        Case("cross_selective_scan", shape, dtype, dt_bias=True), Case("cross_ssd", heads, dtype, dt_bias=True),
        Case("cross_causal_conv1d", replace(shape, channels=shape.channels + 2 * 128), dtype),
    ]  # fmt: skip


def published(dtype: str = "bf16", sizes: tuple[str, ...] = tuple(WIDTHS)) -> list[Case]:
    """The ops of the published models and of the connectors, without repetition."""
    layers = [case for family in ("mamba", "mamba2", "mamba3") for size in sizes for case in layer(family, size, dtype)]
    return list(dict.fromkeys(layers + connector(dtype)))


def shipped() -> list[Case]:
    """Configurations of the compile report: a small and the largest model, float32, options, other state sizes.

    The options are those that need most registers at once and those that change the memory layout; the others compute
    less.
    """
    found = published("bf16", ("130m", "2.7b")) + layer("mamba", "2.7b", "fp32") + layer("mamba2", "2.7b", "fp32")
    largest = {case.op: case for case in reversed(published("bf16", ("2.7b",)))}
    for case in largest.values():
        found += [v for v in variants(case) if v.wide_D or v.constant or v.channels_first or v == variants(case)[-1]]
    found += [_with_sizes(largest["selective_scan"], d_state=n) for n in (64, 128, 256)]
    found += [_with_sizes(largest["ssd"], d_state=n, headdim=p) for n, p in ((64, 64), (256, 64), (128, 128))]
    found += [Case("rms_norm", Shape(8, 256, n), "bf16", z=True) for n in (16384, 32768)]
    found += [Case("add_rms_norm", Shape(8, 256, n), "bf16") for n in (16384, 32768)]
    return list(dict.fromkeys(found))


def _with_sizes(case: Case, **sizes: int) -> Case:
    return replace(case, shape=replace(case.shape, **sizes))


def realistic(dtype: str) -> list[Case]:
    """Published sizes for which a GPU runs the torch backend in float64 in seconds; dense, packed and on a grid."""
    layers = [c for family in ("mamba", "mamba2", "mamba3") for c in layer(family, "130m", dtype, batch=2)]
    packed = [
        replace(case, shape=replace(case.shape, batch=1, length=5000), sequences=7, initial_states=True)
        for case in layers
        if case.op in ("selective_scan", "ssd", "mamba3", "causal_conv1d")
    ]
    return list(dict.fromkeys(layers + packed + connector(dtype, batch=1)))


def by_length() -> list[Case]:
    """SSD of the 2.7b model at lengths of 2,048 to 131,072, batch 1."""
    return [layer("mamba2", "2.7b", batch=1, length=2**i)[0] for i in (11, 13, 15, 17)]


def tiny(dtype: str = "fp32") -> list[Case]:
    """One call of each op, small enough for the interpreter."""
    shape = Shape(batch=1, length=6, channels=8, d_state=4, heads=2, headdim=4, height=2)
    return [Case(op, shape, dtype) for op in OPS]


def small(dtype: str) -> list[Case]:
    """Every option of every op at small, odd sizes, for comparison with the step-by-step reference."""
    shape = Shape(batch=2, length=203, channels=72, groups=1)
    grid = replace(shape, length=91, height=7)
    scan = replace(shape, heads=6, headdim=16, d_state=24, groups=2)
    cases = []
    for case in (
        Case("selective_scan", shape), Case("ssd", scan, chunk_size=32), Case("causal_conv1d", shape),
        Case("rms_norm", replace(shape, groups=3)), Case("add_rms_norm", shape),
        Case("cross_scan", grid), Case("cross_merge", grid), Case("cross_causal_conv1d", grid),
        Case("cross_selective_scan", grid), Case("cross_ssd", replace(scan, length=91, height=7), chunk_size=32),
        Case("selective_scan_step", shape), Case("ssd_step", scan), Case("causal_conv1d_step", shape),
        Case("mamba3", replace(scan, length=67), chunk_size=32), Case("mamba3_step", scan),
    ):  # fmt: skip
        cases += variants(replace(case, dtype=dtype))
    cases.append(Case("selective_scan", replace(shape, groups=4, d_state=5), dtype, z=True))
    cases.append(Case("selective_scan", replace(shape, length=70, d_state=256), dtype))
    cases.append(Case("causal_conv1d", replace(shape, width=2), dtype))
    mimo = replace(scan, length=67, rank=3)
    cases += [Case("mamba3", mimo, dtype, z=True), Case("mamba3_step", mimo, dtype, z=True)]
    return cases


def emulated(dtype: str, tiles: Literal["small", "published"] = "small") -> list[Case]:
    """Each op and its options at sizes of a tile or two, for the emulator of compiled kernels.

    `published` has the head and state sizes of the published models, so that the kernels take the shipped tiles.
    """
    shape = Shape(batch=1, length=40, channels=64, d_state=16, heads=2, headdim=16, height=5)
    if tiles == "published":
        shape = Shape(batch=1, length=70, channels=128, d_state=128, heads=2, headdim=64, height=7)
    scan = replace(shape, d_state=16)
    shapes = {op: scan if "selective_scan" in op else shape for op in OPS}
    if tiles == "published":
        shapes |= {"add_rms_norm": replace(shape, channels=2560), "rms_norm": replace(shape, channels=5120)}
    cases = [variant for op in OPS for variant in variants(Case(op, shapes[op], dtype))]
    mimo = replace(shape, length=shape.length // 2, rank=2)
    return cases + [Case(op, mimo, dtype, z=True) for op in ("mamba3", "mamba3_step")]


def correctness() -> list[Case]:
    """Cases for the tests on a GPU: every option at small sizes in every dtype, and realistic sizes."""
    return [c for dtype in ("bf16", "fp32") for c in small(dtype) + realistic(dtype)] + small("fp16") + small("fp64")


def check_ops(ops: tuple[str, ...]) -> None:
    """Check names of ops.

    Raises:
        ValueError: there is no such op.
    """
    if unknown := [op for op in ops if op not in OPS]:
        raise ValueError(f"op must be among {', '.join(OPS)}; got {', '.join(unknown)}")
