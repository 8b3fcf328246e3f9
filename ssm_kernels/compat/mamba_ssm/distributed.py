"""`mamba_ssm.distributed`: names that copies of Mamba-2 import, and use with a `process_group`.

They can be imported, so that such a copy runs on one device. Each use of one is refused: tensor parallelism is not
offered. `ssm_kernels.context_parallel` shards long sequences over devices.
"""

from __future__ import annotations

from typing import NoReturn

_ADVICE = "tensor parallelism is not offered; ssm_kernels.context_parallel splits long sequences over devices"


class ColumnParallelLinear:
    """A linear layer whose outputs are sharded over devices.

    Raises:
        NotImplementedError: always.
    """

    def __init__(self, *args, **kwargs):
        _refuse("ColumnParallelLinear")


class RowParallelLinear:
    """A linear layer whose inputs are sharded over devices.

    Raises:
        NotImplementedError: always.
    """

    def __init__(self, *args, **kwargs):
        _refuse("RowParallelLinear")


def all_reduce(*args, **kwargs) -> NoReturn:
    """Sum over devices, with a gradient.

    Raises:
        NotImplementedError: always.
    """
    _refuse("all_reduce")


def reduce_scatter(*args, **kwargs) -> NoReturn:
    """Sum over devices, and leave a shard on each, with a gradient.

    Raises:
        NotImplementedError: always.
    """
    _refuse("reduce_scatter")


def _refuse(name: str) -> NoReturn:
    raise NotImplementedError(f"mamba_ssm.distributed's {name}: {_ADVICE}")
