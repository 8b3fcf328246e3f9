"""One sequence on two ranks: each holds half of the steps, and outputs and gradients are those of one process.

python examples/context_parallel.py
"""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ssm_kernels import SequenceSharding, context_parallel
from ssm_kernels.modules import Mamba2

RANKS, LENGTH, WIDTH = 2, 101, 32


def run_rank(rank: int, rendezvous: str) -> None:
    """Run a rank's steps and compare them with all steps in one process."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same weights and inputs on every rank
    mixer, hidden = Mamba2(WIDTH, d_state=16, headdim=16), torch.randn(1, LENGTH, WIDTH)

    sharding = SequenceSharding.even(LENGTH)
    with context_parallel(sharding):
        out = mixer(sharding.shard(hidden))  # (1, LENGTH of this rank, WIDTH)
        out.square().sum().backward()
    # The gradient of a weight is the sum of the ranks' parts.
    gradient = mixer.in_proj.weight.grad
    assert gradient is not None
    dist.all_reduce(gradient)

    whole = mixer(hidden)
    mixer.zero_grad()
    whole.square().sum().backward()
    torch.testing.assert_close(out, whole[:, slice(*sharding.span)], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradient, mixer.in_proj.weight.grad, atol=1e-3, rtol=1e-3)
    print(f"rank {rank}: steps {sharding.span[0]} to {sharding.span[1]}, outputs and gradients agree", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (f"{folder}/rendezvous",), RANKS)
