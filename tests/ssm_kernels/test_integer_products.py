"""Products of quantized matrices with vectors that are rounded to 16 bits."""

from __future__ import annotations

import pytest
import torch

from ssm_kernels.modules import QuantizedLinear

pytest.importorskip("numba")


from ssm_kernels._numba.compile import Kernel
from ssm_kernels._numba.launch import memory_of
from ssm_kernels._numba.vectors import block_rows_of, count_blocks, project, vectors_for


@Kernel
def multiply(elements, scales, x, out, batch, columns):
    """out (B, rows) = x (B, columns) times the transposed matrix."""
    matrix, rows = (elements, scales), out.size // batch
    vectors, block_rows = vectors_for(matrix, x, batch, columns, columns), block_rows_of(matrix, rows)
    for block in range(count_blocks(rows, block_rows)):
        for b in range(batch):
            project(matrix, x[:0], block, block_rows, rows, vectors, b, columns, out, b * rows, 0)


def product(layer, x):
    """x (B, columns) by the kernel: (B, rows)."""
    out = torch.zeros(len(x), layer.rows)
    tensors = (layer.qdata.data, layer.scale.data, x, out)
    multiply(*(memory_of(t.flatten()) for t in tensors), len(x), layer.columns)
    return out


def random_layer(columns, rows, bits):
    torch.manual_seed(0)
    layer = QuantizedLinear(columns, rows, bits)
    low, high = (-128, 128) if bits == 8 else (0, 256)
    layer.qdata.data = torch.randint(low, high, layer.qdata.shape).to(layer.qdata.dtype)
    layer.scale.data = torch.rand(layer.scale.shape).bfloat16() + 0.1
    return layer


# Rows that streams share unequally; columns of no whole vectors, of an odd and of an even number of groups.
@pytest.mark.parametrize(
    ("bits", "columns", "rows"), [(8, 33, 7), (8, 768, 300), (4, 32, 3), (4, 96, 41), (4, 768, 300)]
)
def test_products_are_those_of_the_dequantized_matrix(bits, columns, rows):
    layer = random_layer(columns, rows, bits)
    x = torch.randn(2, columns)
    x[1] *= 1e-20  # each vector has a scale of its own
    want = x.double() @ layer.dequantize(torch.float64).T
    # Rounding to 1 / 65,534 of the largest element, about 3 standard deviations here.
    for got, expected in zip(product(layer, x).double(), want, strict=True):
        assert (got - expected).norm() < 1e-4 * expected.norm()
    assert not product(layer, torch.zeros(1, columns)).any()


@pytest.mark.parametrize("bits", [8, 4])
def test_infinities_and_nans_are_not_rounded_away(bits):
    layer = random_layer(64, 9, bits)
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(1, 64)
        x[0, 40] = value
        assert not product(layer, x).isfinite().any()


def test_no_sum_overflows():
    layer = random_layer(20_000, 3, 8)
    layer.qdata.data.fill_(-128)
    want = -128 * 20_000 * layer.scale.float().T
    torch.testing.assert_close(product(layer, torch.ones(1, 20_000)), want, rtol=1e-4, atol=0)
