"""Arguments that every op checks alike: integers of any type, and NaN by the type of its error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ssm_kernels import (
    NonFiniteError,
    cross_merge,
    cross_selective_scan,
    cross_ssd,
    rms_norm,
    selective_scan,
    selective_scan_step,
    ssd,
    ssd_step,
)

ONES = torch.ones


def call_ssd(chunk_size):
    return ssd(ONES(1, 4, 2, 4), ONES(1, 4, 2), -ONES(2), ONES(1, 4, 1, 4), ONES(1, 4, 1, 4), chunk_size=chunk_size).y


def call_cross_ssd(chunk_size):
    grid = (1, 2, 2, 4)
    matrices = ONES(*grid, 1, 4), ONES(*grid, 1, 4)
    return cross_ssd(ONES(*grid, 2, 4), ONES(*grid, 2), -ONES(4, 2), *matrices, chunk_size=chunk_size)


INTEGERS = {
    "ssd, chunk_size": (call_ssd, 2, 0),
    "cross_ssd, chunk_size": (call_cross_ssd, 2, 0),
    "rms_norm, group_size": (lambda n: rms_norm(ONES(3, 4), ONES(4), group_size=n), 2, 0),
    "cross_merge, height": (lambda n: cross_merge(ONES(1, 4, 6, 2), n, 3), 2, -2),
    "cross_merge, width": (lambda n: cross_merge(ONES(1, 4, 6, 2), 3, n), 2, -2),
}


@pytest.mark.parametrize("call", INTEGERS)
@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint16, np.array, torch.tensor])
def test_integers_of_any_type(call, kind):
    op, good, _ = INTEGERS[call]
    torch.testing.assert_close(op(kind(good)), op(good))


@pytest.mark.parametrize("call", INTEGERS)
def test_values_that_are_no_integers_are_named(call):
    op, good, low = INTEGERS[call]
    name = call.split(", ")[1]
    for wrong in (True, np.True_, torch.tensor(True), float(good), str(good), np.float64(good)):
        with pytest.raises(TypeError, match=f"{name} must be an integer, got "):
            op(wrong)
    for wrong in (low, np.int64(low)):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least"):
            op(wrong)


def test_two_negative_sizes_are_no_grid():
    with pytest.raises(ValueError, match="height must be an integer of at least 0, got -2"):
        cross_merge(ONES(1, 4, 6, 2), -2, -3)


NAN = torch.full((2,), torch.nan)


@pytest.mark.parametrize(
    "call",
    [
        lambda: selective_scan(ONES(1, 1, 2), NAN[None, None], -ONES(2, 3), ONES(1, 1, 3), ONES(1, 1, 3)),
        lambda: selective_scan_step(ONES(1, 2, 3), ONES(1, 2), NAN[None], -ONES(2, 3), ONES(2, 3), ONES(2, 3)),
        lambda: ssd(ONES(1, 1, 2, 4), NAN[None, None], -ONES(2), ONES(1, 1, 1, 3), ONES(1, 1, 1, 3)),
        lambda: ssd_step(ONES(1, 2, 4, 3), ONES(1, 2, 4), NAN[None], -ONES(2), ONES(1, 1, 3), ONES(1, 1, 3)),
        lambda: cross_selective_scan(
            ONES(1, 1, 1, 2), NAN.expand(1, 1, 1, 4, 2), -ONES(4, 2, 3), ONES(1, 1, 1, 4, 3), ONES(1, 1, 1, 4, 3)
        ),
        lambda: cross_ssd(
            ONES(1, 1, 1, 4, 2, 4), NAN.expand(1, 1, 1, 4, 2), -ONES(4, 2), ONES(1, 1, 1, 4, 1, 3),
            ONES(1, 1, 1, 4, 1, 3),
        ),
    ],
)  # fmt: skip
def test_nan_has_an_error_of_its_own(call):
    assert issubclass(NonFiniteError, ValueError)
    with pytest.raises(NonFiniteError, match="dt must not hold NaN"):
        call()
