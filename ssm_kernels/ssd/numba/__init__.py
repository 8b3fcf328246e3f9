"""SSD in numba on a CPU: registration of the ops. The modules with kernels are imported when an op first runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..._core.discretization import skip_and_gate
from ..._core.library import Gradient, define_op, lazy_function, unknown_size
from ..._core.transforms import Fold, backward_formula, may_need_gradients, transformable
from ..._core.varlen import max_blocks, without_padding
from ..arguments import SCHEMA, TENSORS, ScanArguments, ScanGradients
from ..registration import FOLDED, StepKernel, formula, gradients_fake

CHECKPOINT_INTERVAL = 256
"""Steps between two states that the forward saves for the backward, which recomputes the states between them."""


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
        chunk_size: not used; chunks have the size that is fast here.
        directions: codes of scan directions in `cross_scan.CROSS`. With them, L is a row-major grid, and the G groups
            are as many equal runs as there are directions: each run is scanned along its own direction.
        height: rows of that grid.
    """
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    arguments = ScanArguments(
        x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_min=dt_limit[0],
        dt_max=dt_limit[1], initial_states=initial_states, chunk_size=chunk_size, cu_seqlens=cu_seqlens,
        seq_idx=seq_idx, directions=list(directions), height=height, out_dtype=x.dtype if z is None else compute_dtype,
        input_weights=input_weights,
    )  # fmt: skip
    # Inside the op autograd is off: whether to save states is decided here.
    y, final_states, _ = _scan(*arguments, may_need_gradients(arguments))
    if z is not None:
        y = skip_and_gate(y, x, None, without_padding(z, cu_seqlens, seq_idx))
    return y, final_states


def _save(ctx, inputs, outputs):
    if not inputs.save_states:
        raise RuntimeError("this graph was traced without gradients, and saved nothing that they need: trace it again")
    *arguments, _ = inputs
    _, _, checkpoint_states = outputs
    ctx.save_for_backward(*(getattr(inputs, name) for name in TENSORS), checkpoint_states)
    ctx.options = ScanArguments(*arguments)._replace(**dict.fromkeys(TENSORS))


def _gradients(ctx, dy, dfinal_states):
    *tensors, checkpoint_states = ctx.saved_tensors
    arguments: ScanArguments = ctx.options._replace(**dict(zip(TENSORS, tensors, strict=True)))
    grads = ScanGradients(*_backward_scan(dy, dfinal_states, checkpoint_states, *arguments))._asdict()
    # The op returns an empty tensor for an argument that is None.
    return {name: grad for name, grad in grads.items() if getattr(arguments, name) is not None}


def _forward_fake(*args):
    *arguments, save_states = args
    arguments = ScanArguments(*arguments)
    x, B, cu_seqlens = arguments.x, arguments.B, arguments.cu_seqlens
    heads, headdim = x.shape[2:]
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    dtype = torch.promote_types(x.dtype, torch.float32)
    checkpoints = 0
    if save_states:
        # With `seq_idx` the number of sequences depends on values.
        checkpoints = unknown_size(x) if arguments.seq_idx is not None else max_blocks(x, rows, CHECKPOINT_INTERVAL)
    y = x.new_empty(x.shape, dtype=arguments.out_dtype)
    final_states = x.new_empty(rows, heads, headdim, B.shape[3], dtype=dtype)
    return y, final_states, x.new_empty(checkpoints, heads, B.shape[3], headdim, dtype=dtype)


def _backward_fake(dy, dfinal_states, checkpoint_states, *args):
    return gradients_fake(ScanArguments(*args), dy)


def _saved(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        _, _, states = _scan(*(arguments[name] for name in ScanArguments._fields), True)
    return {"checkpoint_states": states}


_gradient = Gradient(_save, _gradients, formula, 2)
_forward_op = define_op(
    f"ssd_numba({SCHEMA}, bool save_states) -> (Tensor, Tensor, Tensor)",
    lazy_function(f"{__name__}.forward", "forward"),
    _forward_fake,
    _gradient,
)
_backward_op = define_op(
    f"ssd_numba_backward(Tensor dy, Tensor dfinal_states, Tensor checkpoint_states, {SCHEMA})"
    f" -> ({', '.join(['Tensor'] * len(ScanGradients._fields))})",
    lazy_function(f"{__name__}.backward", "backward"),
    _backward_fake,
)
_scan = transformable(_forward_op, Fold(FOLDED, ("x", "initial_states", None), ("directions",)), _gradient)
_backward_scan = transformable(
    _backward_op,
    Fold(FOLDED, ScanGradients._fields, ("directions",), _saved),
    backward_formula(formula, ScanGradients._fields, ("dy", "dfinal_states")),
)
step_kernel = StepKernel("ssd_numba_step", __name__)
ssd_step = step_kernel.ssd_step
