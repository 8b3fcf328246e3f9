"""What is measured: ops and blocks, at named shapes, by implementation.

An implementation is a function of nothing that runs the forward; `inputs` are what gradients are taken of.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ssm_kernels import use_backend
from ssm_kernels.modules import Mamba, Mamba2

from .cases import DTYPES, Case, Shape

OPS = ("selective_scan", "ssd", "causal_conv1d", "mamba_block", "mamba2_block")
IMPLEMENTATIONS = ("torch", "triton", "reference", "transformers")


def default_shape(op: str) -> Shape:
    """The shape of the project's stated figures."""
    return Shape(d_state=128) if op in ("ssd", "mamba2_block") else Shape()


class Workload(NamedTuple):
    run: Callable[[], Tensor]
    inputs: list[Tensor]


def build(
    op: str, impl: str, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> Workload:
    """One implementation on inputs (and weights) that depend on the seed alone.

    Raises:
        ValueError: no such op or implementation, or an implementation that does not have this op.
        ModuleNotFoundError: the implementation's package is not installed.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}; got {op!r}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}")
    if impl == "transformers" and importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError("transformers is not installed: pip install transformers")
    torch.manual_seed(seed)
    if op in ("mamba_block", "mamba2_block"):
        return _block(op, impl, shape, dtype, device)
    case = _case(op, shape, dtype)
    tensors = case.inputs(device, seed)
    if impl == "transformers":
        return Workload(_transformers_op(op, tensors), list(tensors.values()))
    return Workload(lambda: case.call(tensors, impl)[0], list(tensors.values()))


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


def _transformers_op(op: str, t: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """The pure-PyTorch functions that `transformers` runs where no kernels are installed, in its layout."""
    if op == "selective_scan":
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan

        def run() -> Tensor:
            u, dt, B, C, z = (t[k].transpose(1, 2) for k in ("u", "dt", "B", "C", "z"))
            return mamba_selective_scan(u, dt, t["A"], B, C, t["D"], z, delta_softplus=True).transpose(1, 2)

        return run
    if op == "ssd":
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

        def run() -> Tensor:
            out = mamba2_chunk_scan(t["x"], t["dt"], t["A"], t["B"], t["C"], chunk_size=256, D=t["D"], dt_softplus=True)
            return out[0] if isinstance(out, tuple) else out

        return run
    from transformers.models.mamba.modeling_mamba import causal_conv1d_fn

    return lambda: causal_conv1d_fn(t["x"].transpose(1, 2), t["weight"], t["bias"], activation="silu").transpose(1, 2)


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
    if impl != "transformers":

        def run() -> Tensor:
            with use_backend(impl):
                return block(x)

        return Workload(run, inputs)

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
