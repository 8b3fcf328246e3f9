"""SSD in Triton: registration of the ops. The modules with kernels are imported when an op first runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.library import Gradient, define_op, lazy_function
from ..._core.transforms import Fold, backward_formula, transformable
from ..._core.varlen import without_padding
from ..._triton.device import check_float64_products
from ..arguments import SCHEMA, TENSORS, ScanArguments, ScanGradients
from ..registration import FOLDED, StepKernel, formula, gradients_fake


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    directions: tuple[int, ...] = (),
    height: int = 1,
    input_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan with arguments in the canonical form of `reference.ssd`, and the same results.

    Args:
        chunk_size: most steps of a chunk.
        directions: codes of scan directions in `cross_scan.CROSS`. With them, L is a row-major grid, and the G groups
            are as many equal runs as there are directions: each run is scanned along its own direction.
        height: rows of that grid.

    Raises:
        RuntimeError: see `check_float64_products`.
    """
    check_float64_products(x.dtype, "ssd")
    # The gate is not in the kernels: Mamba-2 has its own in the norm, and here it would cost them registers.
    # PyTorch's silu is one launch on a GPU, that of `skip_and_gate` several.
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    arguments = ScanArguments(
        x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_min=dt_limit[0],
        dt_max=dt_limit[1], initial_states=initial_states, chunk_size=chunk_size, cu_seqlens=cu_seqlens,
        seq_idx=seq_idx, directions=list(directions), height=height, out_dtype=x.dtype if z is None else compute_dtype,
        input_weights=input_weights,
    )  # fmt: skip
    y, final_states = _scan(*arguments)
    if z is not None:
        z = without_padding(z, cu_seqlens, seq_idx)
        y = (y * F.silu(z.to(compute_dtype))).to(x.dtype)
    return y, final_states


def _save(ctx, inputs, outputs):
    ctx.save_for_backward(*(getattr(inputs, name) for name in TENSORS))
    ctx.options = ScanArguments(*inputs)._replace(**dict.fromkeys(TENSORS))


def _gradients(ctx, dy, dfinal_states):
    arguments: ScanArguments = ctx.options._replace(**dict(zip(TENSORS, ctx.saved_tensors, strict=True)))
    if dy is None:
        dy = arguments.x.new_zeros(arguments.x.shape, dtype=arguments.out_dtype)
    grads = ScanGradients(*_backward_scan(dy, dfinal_states, *arguments))._asdict()
    # The op returns an empty tensor for an argument that is None.
    return {name: grad for name, grad in grads.items() if getattr(arguments, name) is not None}


def _forward_fake(*args):
    arguments = ScanArguments(*args)
    x, B, cu_seqlens = arguments.x, arguments.B, arguments.cu_seqlens
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    state_dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(x.shape, dtype=arguments.out_dtype)
    return y, x.new_empty((rows, *x.shape[2:], B.shape[3]), dtype=state_dtype)


def _backward_fake(dy, dfinal_states, *args):
    return gradients_fake(ScanArguments(*args), dy)


# In training nothing depends on the final states: zeros for them would be written and read as states are.
_gradient = Gradient(_save, _gradients, formula, 2, materialize_grads=False)
_forward_op = define_op(
    f"ssd_triton({SCHEMA}) -> (Tensor, Tensor)",
    lazy_function(f"{__name__}.forward", "forward"),
    _forward_fake,
    _gradient,
)
_backward_op = define_op(
    f"ssd_triton_backward(Tensor dy, Tensor? dfinal_states, {SCHEMA})"
    f" -> ({', '.join(['Tensor'] * len(ScanGradients._fields))})",
    lazy_function(f"{__name__}.backward", "backward"),
    _backward_fake,
)
_scan = transformable(_forward_op, Fold(FOLDED, ("x", "initial_states"), ("directions",)), _gradient)
_backward_scan = transformable(
    _backward_op,
    Fold(FOLDED, ScanGradients._fields, ("directions",)),
    backward_formula(formula, ScanGradients._fields, ("dy", "dfinal_states")),
)
step_kernel = StepKernel("ssd_triton_step", __name__)
ssd_step = step_kernel.ssd_step
