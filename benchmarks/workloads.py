"""What is measured: ops and blocks, at named shapes, by implementation.

An implementation is a function of nothing that runs the forward; `inputs` are what gradients are taken of.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ssm_kernels import causal_conv1d, selective_scan, ssd
from ssm_kernels.modules import Mamba, Mamba2

OPS = ("selective_scan", "ssd", "causal_conv1d", "mamba_block", "mamba2_block")
IMPLEMENTATIONS = ("torch", "reference", "transformers")


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem; an op reads those it has."""

    batch: int = 2
    length: int = 1024
    channels: int = 512
    """D of the selective scan and the convolution; blocks have this inner width."""
    d_state: int = 16
    heads: int = 8
    headdim: int = 64
    groups: int = 1
    width: int = 4
    """K of the convolution."""


def default_shape(op: str) -> Shape:
    """The shape of the project's stated figures."""
    return Shape(d_state=128) if op in ("ssd", "mamba2_block") else Shape()


class Workload(NamedTuple):
    run: Callable[[], Tensor]
    inputs: list[Tensor]


def build(op: str, impl: str, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Workload:
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
        return _block(op, impl, shape, dtype)
    tensors = _tensors(op, shape, dtype)
    run = _transformers_op(op, tensors) if impl == "transformers" else _own_op(op, tensors, impl)
    return Workload(run, list(tensors.values()))


def exact(op: str, shape: Shape, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """The reference's result in float64 on the same inputs, rounded to `dtype` first."""
    torch.manual_seed(seed)
    if op in ("mamba_block", "mamba2_block"):
        block, x = _own_block(op, shape, dtype)
        from ssm_kernels import use_backend

        with torch.no_grad(), use_backend("reference"):
            return block.double()(x.double())
    tensors = {k: v.detach().double() for k, v in _tensors(op, shape, dtype).items()}
    with torch.no_grad():
        return _own_op(op, tensors, "reference")()


def _tensors(op: str, shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    b, length, d, n = shape.batch, shape.length, shape.channels, shape.d_state

    def randn(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size).to(dtype).requires_grad_()

    if op == "causal_conv1d":
        return {"x": randn(b, length, d), "weight": randn(d, shape.width), "bias": randn(d)}
    if op == "selective_scan":
        A = -torch.arange(1.0, n + 1).repeat(d, 1)
        return {
            "u": randn(b, length, d),
            "dt": (torch.randn(b, length, d) - 4).to(dtype).requires_grad_(),
            "A": A.requires_grad_(),
            "B": randn(b, length, n),
            "C": randn(b, length, n),
            "D": randn(d, dtype=torch.float32),
            "z": randn(b, length, d),
        }
    return {
        "x": randn(b, length, shape.heads, shape.headdim),
        "dt": (torch.randn(b, length, shape.heads) - 4).to(dtype).requires_grad_(),
        "A": (-1 - 15 * torch.rand(shape.heads)).requires_grad_(),
        "B": randn(b, length, shape.groups, n),
        "C": randn(b, length, shape.groups, n),
        "D": randn(shape.heads, dtype=torch.float32),
    }


def _own_op(op: str, t: Mapping[str, Tensor], backend: str) -> Callable[[], Tensor]:
    if op == "causal_conv1d":
        return lambda: causal_conv1d(**t, activation="silu", backend=backend).y
    scan = selective_scan if op == "selective_scan" else ssd
    return lambda: scan(**t, dt_softplus=True, backend=backend).y


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


def _own_block(op: str, shape: Shape, dtype: torch.dtype) -> tuple[Mamba | Mamba2, Tensor]:
    width = shape.channels // 2
    if op == "mamba_block":
        block = Mamba(width, shape.d_state, shape.width)
    else:
        block = Mamba2(width, shape.d_state, shape.width, headdim=shape.headdim, ngroups=shape.groups)
    x = torch.randn(shape.batch, shape.length, width)
    return block.to(dtype), x.to(dtype).requires_grad_()


def _block(op: str, impl: str, shape: Shape, dtype: torch.dtype) -> Workload:
    block, x = _own_block(op, shape, dtype)
    inputs = [x, *block.parameters()]
    if impl != "transformers":
        from ssm_kernels import use_backend

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
    mixer = mixer.to(dtype)
    return Workload(lambda: mixer(x), [x, *mixer.parameters()])


def with_length(shape: Shape, length: int) -> Shape:
    return replace(shape, length=length)
