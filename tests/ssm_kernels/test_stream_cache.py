"""Cached tensors belong to the stream that made them, on CPU tensors that stand for those of a GPU."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ssm_kernels._core import stream_cache, varlen
from ssm_kernels._core.stream_cache import cached_per_stream
from ssm_kernels._triton import segment_table
from ssm_kernels.causal_conv1d import pytorch

CPU = torch.device("cpu")
BOUNDS = torch.tensor([0, 5, 12])
TABLES = {
    "rows of a batch": lambda: segment_table.build_segment_table(3, 12, 4, None, None, CPU),
    "bounds on the CPU": lambda: segment_table.build_segment_table(1, 12, 4, BOUNDS, None, CPU),
    "bounds on the device": lambda: segment_table._build_on_device(1, 12, 4, BOUNDS),
    "blocks": lambda: varlen.make_blocks((0, 5), (5, 7), 4, CPU),
    "rows of a convolution": lambda: pytorch._positions((5, 7), 4, CPU),
}


class Device:
    """A GPU with streams, on which nothing is captured."""

    def __init__(self):
        self.stream, self.captured = 0, False


@pytest.fixture
def gpu(monkeypatch) -> Device:
    device = Device()
    for module in (stream_cache, segment_table):
        monkeypatch.setattr(module, "current_stream", lambda _: device.stream)
        monkeypatch.setattr(module, "is_captured", lambda _: device.captured)
    return device


def places(tables: object) -> set[int]:
    return {t.data_ptr() for t in tree_leaves(tables) if isinstance(t, Tensor) and t.numel()}


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
def test_a_stream_does_not_read_what_another_may_not_have_written_yet(gpu, make):
    first = make()
    assert make() is first
    gpu.stream = 1
    second = make()
    assert places(first) and not places(first) & places(second)
    gpu.stream = 0
    assert make() is first


def test_the_result_that_was_used_longest_ago_is_dropped(gpu):
    calls = []

    @cached_per_stream(maxsize=2)
    def make(n: int, device: torch.device) -> Tensor:
        calls.append((n, gpu.stream))
        return torch.zeros(n)

    for n, stream in ((1, 0), (2, 0), (1, 0), (1, 1), (1, 0), (2, 0)):
        gpu.stream = stream
        assert len(make(n, CPU)) == n
    assert calls == [(1, 0), (2, 0), (1, 1), (2, 0)]


def test_a_graph_keeps_what_it_reads_at_each_replay(gpu):
    @cached_per_stream(maxsize=1)
    def make(n: int, device: torch.device) -> Tensor:
        return torch.zeros(n)

    read, unread = (weakref.ref(make(n, CPU)) for n in (1, 2))  # 2 takes the place of 1
    assert read() is None
    read = weakref.ref(make(1, CPU))
    gpu.stream, gpu.captured = 1, True
    assert make(1, CPU) is read()
    gpu.captured = False
    make(3, CPU)
    gc.collect()
    assert read() is not None and unread() is None


def test_values_made_in_a_graph_are_not_cached(gpu):
    gpu.captured = True
    captured = segment_table.build_segment_table(5, 12, 4, None, None, CPU)
    gpu.captured = False
    made = segment_table.build_segment_table(5, 12, 4, None, None, CPU)
    assert not places(captured) & places(made)
