"""Distributed training: `torchrun` starts the processes, and each holds a shard of the weights (FSDP2)."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from ..connectors import SS2D, DirectionalMamba
from ..model.vlm import VLM
from ..model.weights import dtype_of
from .errors import Interrupted
from .signals import handling

logger = logging.getLogger("vlmamba.train")
T = TypeVar("T")
# It warns of blocks whose output is a view, which must not be changed in place. Nothing here does.
warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)

FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Set to 1, restarted ranks do not read the addresses of those that died (torch 2.13)."""


@contextlib.contextmanager
def processes(device: str | torch.device = "cpu") -> Iterator[torch.device]:
    """Join the process group of `torchrun`, and leave it at the end. Without `torchrun` this is the only process.

    Args:
        device: type of the devices to train on.

    Yields:
        The device of this process: for GPUs, the one of its local rank.
    """
    device = torch.device(device)
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) and os.environ.get(FRESH_STORE) != "1":
        logger.warning("restarted ranks may fail to find each other: set %s=1 before torchrun", FRESH_STORE)
    # Outside of a stage, which has its own handlers, a signal ends a rank by itself: one that waits for another would
    # not run a handler.
    with handling((signal.SIGINT, signal.SIGTERM), signal.SIG_DFL):
        # gloo in any case: metrics and the names of checkpoints are exchanged on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        # After any other exception destroying the group would wait for the other ranks, which may be in a collective
        # that this one never joins.
        try:
            yield device
        except Interrupted:  # on all ranks, after the same step
            dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def rank() -> int:
    """Rank of this process. Rank 0 writes what is written once."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(*values: float) -> list[float]:
    """Sum each value over all ranks. A collective: every rank must call it."""
    if world_size() == 1:
        return list(values)
    # float64, so that sums of token counts are exact.
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gather_over_ranks(value: T) -> list[T]:
    """Gather the values of all ranks, in their order. A collective: every rank must call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_first_rank(function: Callable[[], T]) -> T:
    """Call a function on rank 0, and return its result or raise its exception on all ranks."""
    if world_size() == 1:
        return function()
    result: list[Any] = [None, None]  # value, exception
    if rank() == 0:
        try:
            result[0] = function()
        except Exception as e:
            result[1] = e
    dist.broadcast_object_list(result, 0, device=torch.device("cpu"))
    if result[1] is not None:
        raise result[1]
    return result[0]


def context_group(size: int) -> dist.ProcessGroup | None:
    """Make the groups of `size` consecutive ranks that split their batches along the tokens.

    Returns:
        The group of this rank; None where each rank has batches of its own.

    Raises:
        ValueError: `size` does not divide the number of ranks.
    """
    if world_size() % size:
        raise ValueError(f"context_parallel must divide the {world_size()} ranks, got {size}")
    if size == 1:
        return None
    group = dist.new_subgroups(size)[0]
    assert isinstance(group, dist.ProcessGroup)  # every rank is in one
    return group


def shard(model: nn.Module, device: torch.device, precision: Literal["fp32", "bf16"]) -> nn.Module:
    """Copy a model, with the weights of rank 0, and shard the copy over the ranks.

    Only rank 0's model needs weights: those of the others may be on the `meta` device, and of any dtype. The copy is
    filled parameter by parameter, so that no device ever holds all of them. With `bf16` blocks are gathered in bfloat16
    and gradients are reduced in float32; inputs are not cast, so that a float32 residual stays so. The parameters that
    a scan is most sensitive to (A_log, D, the bias of dt) are small: every rank has all of them in float32 (see
    `average_replicated_gradients`).

    Args:
        model: model of this rank, which does not change.
        device: device of this rank.
        precision: `bf16` gathers blocks in bfloat16.

    Returns:
        The sharded copy.

    Raises:
        ValueError: the ranks have different models.
        RuntimeError: this PyTorch does not average gradients over the ranks (see `check_gradient_average`).
    """
    # Names, shapes and dtypes of rank 0, to compare with and to take the dtypes from.
    own = {n: (tuple(p.shape), p.dtype) for n, p in model.named_parameters()}
    described = [own]
    dist.broadcast_object_list(described, 0, device=torch.device("cpu"))
    first = described[0]
    other = [n for n in own.keys() | first.keys() if n not in own or n not in first or own[n][0] != first[n][0]]
    if other:
        raise ValueError(f"the model of rank {rank()} is not that of rank 0: {', '.join(sorted(other))}")
    mesh = init_device_mesh(device.type, (world_size(),))
    check_gradient_average(mesh)
    # deepcopy takes these parameters, which have no memory, in place of the model's own.
    empty = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=first[n][1], device="meta"), p.requires_grad)
        for n, p in model.named_parameters()
    }
    sharded = copy.deepcopy(model, empty)
    in_float32 = {n for n in own if dtype_of(n, torch.float32, torch.bfloat16) == torch.float32}
    replicated = {p for n, p in sharded.named_parameters() if n in in_float32}
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # Inner blocks first: the parameters of each become one all-gather, the rest belong to the module around them.
    for module in [*blocks(sharded), sharded]:
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=replicated)
    sharded.to_empty(device=device)

    if isinstance(sharded, VLM):
        # Every rank must gather the encoders' weights in the same steps, also one whose batch has no image.
        sharded.always_encodes = True
        for name in ("generate", "score"):
            register_fsdp_forward_method(sharded, name)
    # Broadcast one parameter at a time, and keep this rank's rows.
    originals = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in [*sharded.named_parameters(), *sharded.named_buffers()]:
            if rank() == 0:
                full = originals[name].to(device)
            else:
                full = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            dist.broadcast(full, 0)
            if isinstance(tensor, DTensor):
                full = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.copy_(full)
    return sharded


def check_gradient_average(mesh: DeviceMesh) -> None:
    """Check that FSDP averages gradients over the ranks of a mesh, by one step of a layer with a weight for each rank.

    With torch 2.8 and gloo, gradients are silently the sum over the ranks.

    Raises:
        RuntimeError: they are not the average; raised on every rank.
    """
    ranks = mesh.size()
    layer = nn.Linear(1, ranks, bias=False, device=mesh.device_type)
    fully_shard(layer, mesh=mesh)
    # The gradient of a weight is its input: rank + 1, whose mean over the ranks is (ranks + 1) / 2.
    inputs = torch.full((1, 1), mesh.get_local_rank() + 1.0, device=mesh.device_type)  # (1, 1)
    layer(inputs).sum().backward()
    gradient = layer.weight.grad
    assert isinstance(gradient, DTensor)
    found = gradient.full_tensor().flatten()  # (ranks,)
    average = (ranks + 1) / 2
    if not torch.allclose(found, torch.full_like(found, average)):
        raise RuntimeError(
            f"gradients must be averaged over {ranks} ranks: their average is {average}, and torch {torch.__version__} "
            f"on {mesh.device_type} computes {found.tolist()}; 2.9.0 is the first release that averages on a CPU"
        )


@torch.no_grad()
def gather_into(model: nn.Module, trained: dict[str, nn.Parameter]) -> None:
    """Copy the trained parameters of its sharded copy to a model. Parameters on the `meta` device are left out."""
    own = dict(model.named_parameters())
    for name, p in trained.items():
        full = p.full_tensor() if isinstance(p, DTensor) else p
        if not own[name].is_meta:
            own[name].copy_(full)


def average_replicated_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that FSDP does not shard over the ranks, in place."""
    replicated = [p for p in parameters if not isinstance(p, DTensor)]
    if world_size() == 1 or not replicated:
        return
    # One all-reduce for all of them. A parameter that this rank's batch did not use has a gradient of zero.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in replicated]
    flat = torch.cat([g.flatten() for g in gradients])  # (elements,)
    dist.all_reduce(flat)
    flat /= world_size()
    for p, g in zip(replicated, flat.split([g.numel() for g in gradients]), strict=True):
        p.grad = g.view_as(p)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def blocks(model: nn.Module) -> list[nn.Module]:
    """Units of sharding and recomputation: layers, encoders and their blocks, scans. Inner ones come first."""
    found: list[nn.Module] = []
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.ModuleList):
            found.extend(module)
        elif isinstance(module, SS2D | DirectionalMamba):
            found.append(module)
    return found


@contextlib.contextmanager
def recomputed_blocks(model: nn.Module) -> Iterator[None]:
    """Activation checkpointing: save only the inputs of the innermost blocks, and recompute the rest in backward."""
    found = blocks(model)
    # Nested checkpoints would run a block a third time.
    innermost = [b for b in found if not any(m in found for m in b.modules() if m is not b)]
    for block in innermost:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in innermost:
            del block.forward  # the class's own again
