"""Cross scan: every backend against the tables of positions, and the two directions against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssm_kernels import BIDIRECTIONAL, CROSS, cross_merge, cross_scan
from ssm_kernels.testing import assert_agrees

GRIDS = {
    "batch": st.integers(0, 2),
    "height": st.integers(1, 5),
    "width": st.integers(1, 5),
    "routes": st.lists(st.sampled_from(CROSS), min_size=1, max_size=5),
}


@given(**GRIDS, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_agrees_with_the_reference(batch, height, width, routes, dtype):
    x = torch.randn(batch, height, width, 3, dtype=torch.float64).to(dtype)
    assert_agrees(cross_scan, {"x": x}, {"routes": routes}, backend="torch")
    y = torch.randn(batch, len(routes), height * width, 3, dtype=torch.float64).to(dtype)
    assert_agrees(cross_merge, {"y": y}, {"height": height, "width": width, "routes": routes}, backend="torch")


@given(**GRIDS)
def test_merge_is_the_adjoint_of_scan(batch, height, width, routes):
    x = torch.randn(batch, height, width, 3, dtype=torch.float64)
    y = torch.randn(batch, len(routes), height * width, 3, dtype=torch.float64)
    one = (cross_scan(x, routes) * y).sum()
    two = (x * cross_merge(y, height, width, routes)).sum()
    torch.testing.assert_close(one, two)


def test_routes_of_a_small_grid():
    x = torch.arange(6.0).view(1, 2, 3, 1)  # 0 1 2 / 3 4 5
    rows, columns, rows_reversed, columns_reversed = cross_scan(x, CROSS)[0, :, :, 0].tolist()
    assert rows == [0, 1, 2, 3, 4, 5]
    assert columns == [0, 3, 1, 4, 2, 5]
    assert rows_reversed == rows[::-1]
    assert columns_reversed == columns[::-1]
    assert cross_scan(x, BIDIRECTIONAL)[0, :, :, 0].tolist() == [rows, rows_reversed]


def test_bad_arguments_are_named():
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="routes must be a sequence of names among"):
        cross_scan(x, ["diagonal"])
    with pytest.raises(ValueError, match="routes must be"):
        cross_scan(x, "rows")
    with pytest.raises(ValueError, match=r"y must have shape \(B, 4, 9, D\)"):
        cross_merge(torch.zeros(1, 4, 6, 4), 3, 3)
