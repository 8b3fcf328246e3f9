"""Segment tables: every step once, no segment across a bound, and the same table however bounds are given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssm_kernels._triton import segment_table
from ssm_kernels._triton.segment_table import build_segment_table, max_segments

CPU = torch.device("cpu")


@given(lengths=st.lists(st.integers(0, 9), max_size=6), size=st.integers(1, 5))
def test_packed_sequences_are_covered_once(lengths, size):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    segments = build_segment_table(1, sum(lengths), size, bounds, None, CPU)
    assert len(segments.entries) == max_segments(1, sum(lengths), len(lengths), size, True)
    steps = []
    for number, (row, begin, end, sequence) in enumerate(segments.entries.tolist()):
        if sequence < 0:
            assert number >= segments.first_segment[-1]
            continue
        assert row == 0 and 0 < end - begin <= size
        assert bounds[sequence] <= begin and end <= bounds[sequence + 1]
        assert (begin - bounds[sequence]) % size == 0
        assert segments.first_segment[sequence] <= number < segments.first_segment[sequence + 1]
        steps += range(begin, end)
    assert steps == list(range(sum(lengths)))
    assert segments.initial_state_rows.tolist() == segments.final_state_rows.tolist() == list(range(len(lengths)))


@given(lengths=st.lists(st.integers(0, 9), max_size=6), size=st.integers(1, 5), padding=st.integers(0, 7))
def test_bounds_on_a_device_give_the_same_table(lengths, size, padding):
    """The path of a GPU, which does not look at the values, on CPU tensors."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    length = sum(lengths) + padding
    there = segment_table._build_on_device(1, length, size, bounds)
    here = build_segment_table(1, length, size, bounds, None, CPU)
    assert all(torch.equal(a, b) for a, b in zip(there[2:], here[2:], strict=True))
    assert there.gaps.tolist() == [[sum(lengths), length]]
    assert here.gaps.tolist() == ([[sum(lengths), length]] if padding else [])


def test_segments_of_bounds_on_a_device_are_built_once_and_again_after_a_change():
    bounds = torch.tensor([0, 4, 9])
    once = segment_table._build_on_device(1, 9, 4, bounds)
    assert segment_table._build_on_device(1, 9, 4, bounds) is once
    assert segment_table._build_on_device(1, 9, 3, bounds) is not once
    bounds[1] = 5
    assert segment_table._build_on_device(1, 9, 4, bounds).entries[1].tolist() == [0, 4, 5, 0]


@pytest.mark.parametrize("bounds", [[0, 5, 3, 7], [1, 7], [0, 8], [0, 8, 7]])
def test_wrong_bounds_on_a_device_are_found_there(bounds):
    with pytest.raises(RuntimeError, match="cu_seqlens must run from 0 to L = 7 at most"):
        segment_table._build_on_device(1, 7, 4, torch.tensor(bounds))


def test_rows_and_seq_idx():
    segments = build_segment_table(2, 5, 2, None, torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 2]]), CPU)
    real = segments.entries[segments.entries[:, 3] >= 0].tolist()
    assert real == [[0, 0, 2, 0], [0, 2, 4, 1], [0, 4, 5, 1], [1, 0, 2, 2], [1, 2, 4, 2], [1, 4, 5, 2]]
    assert segments.initial_state_rows.tolist() == [0, -1, 1]
    assert segments.final_state_rows.tolist() == [-1, 0, 1]
    dense = build_segment_table(2, 5, 2, None, None, CPU)
    assert dense.entries[:, :3].tolist() == [[b, t, min(t + 2, 5)] for b in range(2) for t in (0, 2, 4)]


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (3, 0), (0, 0)])
def test_texts_within_the_context_are_unchanged(batch, length):
    segments = build_segment_table(batch, length, 4, None, None, CPU)
    assert segments.entries.shape == (0, 4)
    assert segments.first_segment.tolist() == [0] * (batch + 1)
