"""What is measured: ops and blocks, at named shapes, by implementation.

An implementation is a function of nothing that runs the forward; `inputs` are what gradients are taken of.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ssm_kernels import use_backend
from ssm_kernels.modules import Mamba, Mamba2

from .cases import DTYPES, WIDTHS, Case, Shape
from .peers import PACKAGES, peer

OPS = ("selective_scan", "ssd", "causal_conv1d", "mamba_block", "mamba2_block")
IMPLEMENTATIONS = ("torch", "triton", "reference", *PACKAGES)


def default_shape(op: str) -> Shape:
    """The shape of the project's stated figures."""
    return Shape(d_state=128) if op in ("ssd", "mamba2_block") else Shape()


SHAPES = ("default", *WIDTHS, "vision", "long")


def named_shape(op: str, name: str) -> Shape:
    """The sizes of a published model's layer at batch 8 and length 2,048, or one of three others.

    `default` has the project's stated figures; `vision` is a 2.7b layer on the patches of a 384-pixel image, `long`
    a 130m layer over one sequence of 65,536 steps.
    """
    if name == "default":
        return default_shape(op)
    inner = 2 * WIDTHS[{"vision": "2.7b", "long": "130m"}.get(name, name)]
    batch, length = {"vision": (8, 27 * 27), "long": (1, 65536)}.get(name, (8, 2048))
    return replace(default_shape(op), batch=batch, length=length, channels=inner, heads=inner // 64)


def case_of(op: str, shape: Shape, dtype: torch.dtype, **options: object) -> Case | None:
    """The case that `build` runs; None for a block, which is several."""
    return None if op in ("mamba_block", "mamba2_block") else replace(_case(op, shape, dtype), **options)


class Workload(NamedTuple):
    run: Callable[[], Tensor]
    inputs: list[Tensor]


def build(
    op: str,
    impl: str,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
    **options: object,
) -> Workload:
    """One implementation on inputs (and weights) that depend on the seed alone; an op's `options` are its case's.

    Raises:
        ValueError: no such op or implementation, or an implementation that does not have this op.
        ModuleNotFoundError: the implementation's package is not installed.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}; got {op!r}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}")
    torch.manual_seed(seed)
    if op in ("mamba_block", "mamba2_block"):
        return _block(op, impl, shape, dtype, device)
    return of_case(replace(_case(op, shape, dtype), **options), impl, device, seed)


def of_case(case: Case, impl: str, device: str, seed: int = 0) -> Workload:
    """One implementation of a case; raises as `build`."""
    tensors = case.inputs(device, seed)
    inputs = [t for t in tensors.values() if t.requires_grad or case.is_step]
    if impl in PACKAGES:
        return Workload(peer(impl, case, tensors), inputs)

    def run() -> Tensor:
        out = case.run(tensors, impl)
        return out[0] if isinstance(out, tuple) else out

    return Workload(run, inputs)


def exact(op: str, shape: Shape, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Tensor:
    """The reference's result in float64 on the same inputs, rounded to `dtype` first."""
    torch.manual_seed(seed)
    if op in ("mamba_block", "mamba2_block"):
        block, x = _own_block(op, shape, dtype, device)
        with torch.no_grad(), use_backend("reference"):
            return block.double()(x.double())
    case = _case(op, shape, dtype)
    with torch.no_grad():
        return case.call({k: v.double() for k, v in case.inputs(device, seed).items()}, "reference")[0]


def _case(op: str, shape: Shape, dtype: torch.dtype) -> Case:
    names = {kind: name for name, kind in DTYPES.items()}
    return Case(op, shape, names[dtype], z=op == "selective_scan")


def _own_block(op: str, shape: Shape, dtype: torch.dtype, device: str) -> tuple[Mamba | Mamba2, Tensor]:
    width = shape.channels // 2
    if op == "mamba_block":
        block = Mamba(width, shape.d_state, shape.width)
    else:
        block = Mamba2(width, shape.d_state, shape.width, headdim=shape.headdim, ngroups=shape.groups)
    x = torch.randn(shape.batch, shape.length, width)
    return block.to(device, dtype), x.to(device, dtype).requires_grad_()


def _block(op: str, impl: str, shape: Shape, dtype: torch.dtype, device: str) -> Workload:
    block, x = _own_block(op, shape, dtype, device)
    inputs = [x, *block.parameters()]
    if impl not in PACKAGES:

        def run() -> Tensor:
            with use_backend(impl):
                return block(x)

        return Workload(run, inputs)

    if impl != "transformers":
        raise ValueError(f"{impl} is not compared on {op}")
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError("transformers is not installed: pip install transformers")
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
    return Workload(lambda: mixer(x), [x, *mixer.parameters()])
