"""Batch-invariant functions: they round an element the same wherever it is in a tensor.

On a CPU PyTorch's own `silu`, `sigmoid` and `softplus` run vector code over most of a tensor, and scalar code that
rounds differently over its last elements and over strided ones; `exp`, `log1p` and arithmetic do not. BLAS multiplies a
batch of one matrix by another routine than a batch of several, and its rounding depends on the alignment of the
operands too.

A compiled or exported graph uses PyTorch's own: an exported one would hold the steps of a Function here, which have no
gradient in place, and a wrong one where they overflow. So do transforms of `torch.func`, forward-mode AD, and the
gradients of gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .transforms import is_transformed


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), without gradients."""
    return x.neg().exp_().add_(1).reciprocal_()


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x))."""
    if torch.compiler.is_compiling() or is_transformed():
        return F.silu(x)
    return _SiLU.apply(x)


def silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of `silu` at x."""
    s = sigmoid(x)
    d_silu = (1 - s).mul_(x).add_(1).mul_(s)  # s (1 + x (1 - s))
    return d_silu.mul_(dy)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), accurate for x of any size."""
    if torch.compiler.is_compiling() or is_transformed():
        return -F.logsigmoid(-x)
    return _Softplus.apply(x)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """(..., m, k) @ (..., k, n) with the same batch dimensions."""
    if a.device.type != "cpu" or torch.compiler.is_compiling():
        return a @ b
    a, b = _aligned(a), _aligned(b)
    batch = a.shape[:-2]
    if batch.numel() != 1:
        return a @ b
    # A batch of two, so that BLAS takes the routine that it takes for larger ones.
    pair = (m.reshape(1, *m.shape[-2:]).expand(2, -1, -1) for m in (a, b))
    return torch.bmm(*pair)[0].view(*batch, a.shape[-2], b.shape[-1])


def _aligned(m: Tensor) -> Tensor:
    """Return contiguous matrices that start at a multiple of 64 bytes.

    Whether PyTorch copies other matrices depends on how many there are.
    """
    if type(m) is not Tensor:  # a fake tensor has no address
        return m
    is_dense = m.is_contiguous() or m.mT.is_contiguous()
    return m if is_dense and m.data_ptr() % 64 == 0 else m.clone(memory_format=torch.contiguous_format)


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        # x / (1 + exp(-x)); `neg` makes the one copy, on which the other steps work in place
        return x / x.neg().exp_().add_(1)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # the steps of `silu_backward` are in place, and have no derivative
            s = torch.sigmoid(x)
            return dy * (s * (1 + x * (1 - s)))
        return silu_backward(dy, x)


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        # log1p(exp(-|x|)) + max(x, 0), which no x overflows
        return x.abs().neg_().exp_().log1p_().add_(x.clamp(min=0))

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        # softplus' = sigmoid
        return dy * (torch.sigmoid(x) if torch.is_grad_enabled() else sigmoid(x))
