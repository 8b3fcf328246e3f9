"""The one communication of the sharded ops: an all-gather whose backward is an all-to-all."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather(message: Tensor, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather the message of every rank.

    Args:
        message: (...), of the same shape on every rank.
        x: input of the op, which the graph of the exchange leads back to on every rank.
        group: process group.

    Returns:
        (W, ...) messages in order of rank.
    """
    # A shard may require no gradient, and yet other ranks wait for it in the backward.
    anchor = torch.empty(0, requires_grad=True)
    return _AllGather.apply(message, x, anchor, group)


def depend_on(y: Tensor, received: Tensor) -> Tensor:
    """Return `y`, made to depend on what was received: so the backward of the exchange runs on every rank."""
    return _DependOn.apply(y, received)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, message, x, anchor, group):
        ctx.group = group
        received = message.new_empty(dist.get_world_size(group), *message.shape)  # (W, ...)
        dist.all_gather(list(received), message.contiguous(), group=group)
        return received

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dreceived):
        dmessages = torch.empty_like(dreceived, memory_format=torch.contiguous_format)
        dist.all_to_all_single(dmessages, dreceived.contiguous(), group=ctx.group)
        dmessage = dmessages.sum(0)  # (W, ...) -> (...)
        dx = danchor = dgroup = None
        return dmessage, dx, danchor, dgroup


class _DependOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, received):
        # `torch.utils.checkpoint` stops recomputing at the last saved tensor: this one comes after the exchange.
        ctx.save_for_backward(received.new_empty(0))
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        _ = ctx.saved_tensors
        dreceived = None
        return dy, dreceived
