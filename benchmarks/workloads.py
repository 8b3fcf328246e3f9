"""Implementations of ops and blocks, ready to run, at named shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ssm_kernels import Backend, use_backend
from ssm_kernels.modules import Mamba, Mamba2

from .cases import DTYPES, Case
from .options import Impl, Op
from .peers import PACKAGES, bind_peer, check_installed, own_layout
from .shapes import BLOCKS, WIDTHS, Shape

SIDE = 27
"""Patches along a side of a 384-pixel image."""


def named_shape(op: str, name: str) -> Shape:
    """The sizes of a published model's layer at batch 8 and length 2,048, or one of four others.

    `default` is the shape of the project's published figures, `tiny` one where a call's fixed cost is most of its time,
    `vision` a 2.7b layer on the patches of a 384-pixel image, `long` a 130m layer over one sequence of 65,536 steps.
    The ops on a grid take 27 x 27 patches, 32 x 32 in `default` and 256 x 256 in `long`.
    """
    on_grid = op.startswith("cross_")
    by_heads = ("ssd", "ssd_step", "cross_ssd", "mamba3", "mamba3_step", "mamba2_block")
    shape = Shape(d_state=128) if op in by_heads else Shape()
    if name == "default":
        return replace(shape, height=32) if on_grid else shape
    if name == "tiny":
        return Shape(1, 8, 64, 16, heads=4, headdim=16, height=2 if on_grid else 1)
    width = WIDTHS[{"vision": "2.7b", "long": "130m"}.get(name, name)]
    channels = width if op == "add_rms_norm" else 2 * width  # the residual stream's
    patches = SIDE * SIDE
    batch, length = {"vision": (8, patches), "long": (1, 65536)}.get(name, (8, patches if on_grid else 2048))
    height = 1 if not on_grid else 256 if name == "long" else SIDE
    return replace(shape, batch=batch, length=length, channels=channels, heads=2 * width // 64, height=height)


class Workload(NamedTuple):
    run: Callable[[], Tensor]
    """The forward; returns y."""
    inputs: list[Tensor]
    """Tensors that gradients are taken of."""


def build(
    op: str,
    impl: str,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
    **options: Any,
) -> Workload:
    """An implementation on inputs (and weights) that depend on the seed alone; an op's `options` are its case's.

    Raises:
        ValueError: no such op or implementation, or an implementation that does not have this op.
        ModuleNotFoundError: the implementation's package is not installed.
    """
    for name, value, known in (("op", op, Op), ("impl", impl, Impl)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}; got {value!r}")
    torch.manual_seed(seed)
    if op in BLOCKS:
        return _build_block(op, impl, shape, dtype, device)
    return build_case(named_case(op, shape, dtype, **options), impl, device, seed)


def build_case(case: Case, impl: str, device: str, seed: int = 0) -> Workload:
    """An implementation of a case; raises as `build`."""
    return _build_call(case, impl, case.inputs(device, seed))


def build_float64(op: str, shape: Shape, dtype: torch.dtype, backend: Backend, device: str = "cpu") -> Workload:
    """A backend in float64 on the inputs that `build` draws, rounded to `dtype` first."""
    torch.manual_seed(0)
    if op in BLOCKS:
        block, x = _own_block(op, shape, dtype, device)
        return _run_block(block.double(), x.detach().double().requires_grad_(), backend)
    case = named_case(op, shape, dtype)
    return _build_call(case, backend, {k: _double(v) for k, v in case.inputs(device).items()})


def named_case(op: str, shape: Shape, dtype: torch.dtype, **options: Any) -> Case:
    """The case of an op that `build` runs: with a gate where the published models have one."""
    names = {kind: name for name, kind in DTYPES.items()}
    gated = op in ("selective_scan", "selective_scan_step", "mamba3", "mamba3_step", "rms_norm")
    return replace(Case(op, shape, names[dtype], z=gated), **options)


def _double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t


def _build_call(case: Case, impl: str, tensors: Mapping[str, Tensor]) -> Workload:
    if impl in PACKAGES:
        tensors = own_layout(impl, case, tensors)
    inputs = [t for t in tensors.values() if t.requires_grad or case.is_step]
    if impl in PACKAGES:
        return Workload(bind_peer(impl, case, tensors), inputs)

    def run() -> Tensor:
        out = case.run(tensors, _backend(impl))
        return out[0] if isinstance(out, tuple) else out

    if impl == "compiled":
        return Workload(torch.compile(run, dynamic=False, fullgraph=True), inputs)
    return Workload(run, inputs)


def _backend(impl: str) -> Any:
    """The `backend` of one of this project's implementations."""
    return {"ours": "auto", "compiled": "reference"}.get(impl, impl)


def _own_block(op: str, shape: Shape, dtype: torch.dtype, device: str) -> tuple[Mamba | Mamba2, Tensor]:
    width = shape.channels // 2
    if op == "mamba_block":
        block = Mamba(width, shape.d_state, shape.width)
    else:
        block = Mamba2(width, shape.d_state, shape.width, headdim=shape.headdim, ngroups=shape.groups)
    x = torch.randn(shape.batch, shape.length, width)  # (B, L, D)
    return block.to(device, dtype), x.to(device, dtype).requires_grad_()


def _build_block(op: str, impl: str, shape: Shape, dtype: torch.dtype, device: str) -> Workload:
    block, x = _own_block(op, shape, dtype, device)
    if impl not in PACKAGES and impl != "compiled":
        return _run_block(block, x, _backend(impl))
    if impl != "transformers":
        raise ValueError(f"{impl} is not compared on {op}")
    check_installed("transformers")
    import transformers
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    width = shape.channels // 2
    if op == "mamba_block":
        config = transformers.MambaConfig(
            hidden_size=width, state_size=shape.d_state, conv_kernel=shape.width, use_mambapy=False
        )
        mixer = MambaMixer(config, layer_idx=0)
    else:
        config = transformers.Mamba2Config(
            hidden_size=width, state_size=shape.d_state, conv_kernel=shape.width, head_dim=shape.headdim,
            num_heads=shape.channels // shape.headdim, n_groups=shape.groups, chunk_size=256,
        )  # fmt: skip
        mixer = Mamba2Mixer(config, layer_idx=0)
    mixer.load_state_dict(block.state_dict())
    mixer = mixer.to(device, dtype)
    theirs = dict(mixer.named_parameters())
    return Workload(lambda: mixer(x), [x, *(theirs[name] for name, _ in block.named_parameters())])


def _run_block(block: Mamba | Mamba2, x: Tensor, backend: Backend) -> Workload:
    def run() -> Tensor:
        with use_backend(backend):
            return block(x)

    return Workload(run, [x, *block.parameters()])
