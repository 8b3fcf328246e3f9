"""Several processes that train one model: `torchrun` starts them, and each holds a share of the weights (FSDP2)."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
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

from ..connectors import SS2D
from ..model.vlm import VLM
from ..model.weights import dtype_of

logger = logging.getLogger("vlmamba.train")
T = TypeVar("T")
# Of a block's output that is a view; nothing here is added to it in place.
warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)

FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""With 1, ranks that start again do not find the addresses of those that died (torch 2.13)."""


@contextlib.contextmanager
def processes(device: str | torch.device = "cpu") -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, and leave them in the end. Started otherwise, this is the only one.

    Gives the device of this process: where `device` is a GPU, the one of its place on the machine.
    """
    device = torch.device(device)
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) and os.environ.get(FRESH_STORE) != "1":
        logger.warning("ranks that start again may fail to find each other: set %s=1 before torchrun", FRESH_STORE)
    # gloo in any case: figures and checkpoints pass from rank to rank on the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    except Exception:
        raise  # no farewell: the other ranks may wait where this one will not come
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def rank() -> int:
    """Number of this process; the first is 0, and writes what is written once."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(*values: float) -> list[float]:
    """Each value summed over all ranks, which must all call this."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gather_over_ranks(value: T) -> list[T]:
    """The values of all ranks, which must all call this."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_first_rank(function: Callable[[], T]) -> T:
    """Call a function on rank 0, and give its result to all ranks; what it raises is raised on all of them."""
    if world_size() == 1:
        return function()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = function()
        except Exception as e:
            told[1] = e
    dist.broadcast_object_list(told, 0, device=torch.device("cpu"))
    if told[1] is not None:
        raise told[1]
    return told[0]


def context_group(size: int) -> dist.ProcessGroup | None:
    """The `size` neighbouring ranks that split their batches with this one; None where each has its own.

    Raises:
        ValueError: `size` does not divide the number of ranks.
    """
    if world_size() % size:
        raise ValueError(f"context_parallel must divide the {world_size()} ranks, got {size}")
    return None if size == 1 else dist.new_subgroups(size)[0]


def shard(model: nn.Module, device: torch.device, precision: Literal["fp32", "bf16"]) -> nn.Module:
    """A copy of a model, of which each rank holds a share, with the weights of rank 0.

    Only rank 0's model needs weights: that of the others may be on the `meta` device, and of any dtype. The copy is
    filled parameter by parameter, so that no device ever holds all of them. With `bf16` blocks are gathered in bfloat16
    and gradients are summed in float32; inputs are not cast, so that a float32 residual stays so. What a scan is most
    sensitive to (A_log, D, the bias of the step size) is small: each rank has it whole, in float32 (see
    `average_replicated_gradients`).

    Raises:
        ValueError: the ranks have different models.
        RuntimeError: this PyTorch does not average gradients over the ranks (see `check_gradient_average`).
    """
    own = {n: (tuple(p.shape), p.dtype) for n, p in model.named_parameters()}
    described = [own]
    dist.broadcast_object_list(described, 0, device=torch.device("cpu"))
    first = described[0]
    other = [n for n in own.keys() | first.keys() if n not in own or n not in first or own[n][0] != first[n][0]]
    if other:
        raise ValueError(f"the model of rank {rank()} is not that of rank 0: {', '.join(sorted(other))}")
    mesh = init_device_mesh(device.type, (world_size(),))
    check_gradient_average(mesh)
    hollow = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=first[n][1], device="meta"), p.requires_grad)
        for n, p in model.named_parameters()
    }
    sharded = copy.deepcopy(model, hollow)
    whole = {p for n, p in sharded.named_parameters() if dtype_of(n, torch.float32, torch.bfloat16) == torch.float32}
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in [*blocks(sharded), sharded]:
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=whole)
    sharded.to_empty(device=device)

    if isinstance(sharded, VLM):
        sharded.always_encodes = True
        for name in ("generate", "score"):
            register_fsdp_forward_method(sharded, name)
    originals = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in [*sharded.named_parameters(), *sharded.named_buffers()]:
            full = (
                originals[name].to(device)
                if rank() == 0
                else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            )
            dist.broadcast(full, 0)
            if isinstance(tensor, DTensor):
                full = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.copy_(full)
    return sharded


def check_gradient_average(mesh: DeviceMesh) -> None:
    """Check that FSDP averages gradients over the ranks of a mesh, by one step of a layer with a weight for each rank.

    With torch 2.8 and gloo, gradients come out as the sum over the ranks, and nothing says so.

    Raises:
        RuntimeError: they are no average; raised on every rank.
    """
    ranks = mesh.size()
    layer = nn.Linear(1, ranks, bias=False, device=mesh.device_type)
    fully_shard(layer, mesh=mesh)
    inputs = torch.full((1, 1), mesh.get_local_rank() + 1.0, device=mesh.device_type)  # the gradient of each weight
    layer(inputs).sum().backward()
    found = layer.weight.grad.full_tensor().flatten()  # (ranks,)
    average = (ranks + 1) / 2
    if not torch.allclose(found, torch.full_like(found, average)):
        raise RuntimeError(
            f"gradients must be averaged over {ranks} ranks: their average is {average}, and torch {torch.__version__} "
            f"on {mesh.device_type} gives {found.tolist()}; 2.9.0 is the first release that averages on a CPU"
        )


@torch.no_grad()
def gather_into(model: nn.Module, trained: dict[str, nn.Parameter]) -> None:
    """Give a model the parameters that its sharded copy has learned. A model on the `meta` device stays empty."""
    own = dict(model.named_parameters())
    for name, p in trained.items():
        full = p.full_tensor() if isinstance(p, DTensor) else p
        if not own[name].is_meta:
            own[name].copy_(full)


def average_replicated_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average over ranks the gradients of parameters that each rank has whole, as FSDP does those that it shards."""
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    if world_size() == 1 or not whole:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in whole]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for p, g in zip(whole, flat.split([g.numel() for g in gradients]), strict=True):
        p.grad = g.view_as(p)


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def blocks(model: nn.Module) -> list[nn.Module]:
    """What is gathered, or computed again, as one: layers, encoders and their blocks, scans. Inner ones come first."""
    found: list[nn.Module] = []
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.ModuleList):
            found.extend(module)
        elif isinstance(module, SS2D):
            found.append(module)
    return found


@contextlib.contextmanager
def recomputed_blocks(model: nn.Module) -> Iterator[None]:
    """Within, the innermost blocks keep their inputs alone, and the backward computes the rest again."""
    found = blocks(model)
    innermost = [b for b in found if not any(m in found for m in b.modules() if m is not b)]
    for block in innermost:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in innermost:
            del block.forward
