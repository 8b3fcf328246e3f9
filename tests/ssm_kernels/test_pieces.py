"""Sequences cut in pieces: every step once, no piece across a bound, and the same table however bounds are given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssm_kernels import _pieces
from ssm_kernels._pieces import cut, max_pieces

CPU = torch.device("cpu")


@given(lengths=st.lists(st.integers(0, 9), max_size=6), size=st.integers(1, 5))
def test_packed_sequences_are_covered_once(lengths, size):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    pieces = cut(1, sum(lengths), size, bounds, None, CPU)
    assert len(pieces.table) == max_pieces(1, sum(lengths), len(lengths), size, True)
    steps = []
    for number, (row, begin, end, sequence) in enumerate(pieces.table.tolist()):
        if sequence < 0:
            assert number >= pieces.first[-1]
            continue
        assert row == 0 and 0 < end - begin <= size
        assert bounds[sequence] <= begin and end <= bounds[sequence + 1]
        assert (begin - bounds[sequence]) % size == 0
        assert pieces.first[sequence] <= number < pieces.first[sequence + 1]
        steps += range(begin, end)
    assert steps == list(range(sum(lengths)))
    assert pieces.initial_row.tolist() == pieces.final_row.tolist() == list(range(len(lengths)))


@given(lengths=st.lists(st.integers(0, 9), max_size=6), size=st.integers(1, 5), padding=st.integers(0, 7))
def test_bounds_on_a_device_give_the_same_table(lengths, size, padding):
    """The path of a GPU, which does not look at the values, on CPU tensors."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    length = sum(lengths) + padding
    there = _pieces._cut_on_device(1, length, size, bounds)
    here = cut(1, length, size, bounds, None, CPU)
    assert all(torch.equal(a, b) for a, b in zip(there[2:], here[2:], strict=True))
    assert there.gaps.tolist() == [[sum(lengths), length]]
    assert here.gaps.tolist() == ([[sum(lengths), length]] if padding else [])


def test_bounds_on_a_device_are_cut_once_and_again_when_changed():
    bounds = torch.tensor([0, 4, 9])
    once = _pieces._cut_on_device(1, 9, 4, bounds)
    assert _pieces._cut_on_device(1, 9, 4, bounds) is once
    assert _pieces._cut_on_device(1, 9, 3, bounds) is not once
    bounds[1] = 5
    assert _pieces._cut_on_device(1, 9, 4, bounds).table[1].tolist() == [0, 4, 5, 0]


@pytest.mark.parametrize("bounds", [[0, 5, 3, 7], [1, 7], [0, 8], [0, 8, 7]])
def test_wrong_bounds_on_a_device_are_found_there(bounds):
    with pytest.raises(RuntimeError, match="cu_seqlens must run from 0 to L = 7 at most"):
        _pieces._cut_on_device(1, 7, 4, torch.tensor(bounds))


def test_rows_and_seq_idx():
    pieces = cut(2, 5, 2, None, torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 2]]), CPU)
    real = pieces.table[pieces.table[:, 3] >= 0].tolist()
    assert real == [[0, 0, 2, 0], [0, 2, 4, 1], [0, 4, 5, 1], [1, 0, 2, 2], [1, 2, 4, 2], [1, 4, 5, 2]]
    assert pieces.initial_row.tolist() == [0, -1, 1]
    assert pieces.final_row.tolist() == [-1, 0, 1]
    dense = cut(2, 5, 2, None, None, CPU)
    assert dense.table[:, :3].tolist() == [[b, t, min(t + 2, 5)] for b in range(2) for t in (0, 2, 4)]


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_cut(batch, length):
    pieces = cut(batch, length, 4, None, None, CPU)
    assert pieces.table.shape == (0, 4)
    assert pieces.first.tolist() == [0] * (batch + 1)
