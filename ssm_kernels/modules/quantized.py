"""Linear layers and embeddings whose weights are integers of 8 or 4 bits with scales: weight-only quantization.

A layer makes the weights that it multiplies by from integers and scales, in the dtype of its input; with 8 bits, the
scales of rows multiply the product instead. `fuse_step` multiplies the integers themselves, by activations of 16 bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32
"""Weights of a row that share a scale, in 4 bits. In 8 bits a row has one scale."""
HALF_GROUP = GROUP // 2
OFFSET = 8
"""Added to integers of 4 bits, so that they are in [0, 15]."""
STORED = {4: torch.uint8, 8: torch.int8}
"""Dtype that holds integers of so many bits."""


class QuantizedMatrix(nn.Module):
    """A matrix (rows, columns) of integers times scales.

    `qdata` holds, with 8 bits, int8 (rows, columns); with 4 bits, two integers a byte, uint8 (rows, columns / 2): byte
    j of the 16 of a group has integer j + `OFFSET` of the group in its lower half, and integer j + 16 in its upper one.
    `scale` is bfloat16, (rows, 1) or (rows, columns / `GROUP`). Both are parameters without gradients.

    Args:
        rows, columns: shape of the matrix.
        bits: of an integer, 4 or 8.

    Raises:
        ValueError: `bits` is not 4 or 8, or `GROUP` does not divide `columns` where it must.
    """

    def __init__(self, rows: int, columns: int, bits: int):
        super().__init__()
        if bits not in STORED:
            raise ValueError(f"bits must be 4 or 8, got {bits}")
        if bits == 4 and columns % GROUP:
            raise ValueError(f"columns must be a multiple of {GROUP} with 4 bits, got {columns}")
        self.rows, self.columns, self.bits = rows, columns, bits
        shape, groups = ((rows, columns), 1) if bits == 8 else ((rows, columns // 2), columns // GROUP)
        self.qdata = nn.Parameter(torch.zeros(shape, dtype=STORED[bits]), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(rows, groups, dtype=torch.bfloat16), requires_grad=False)

    def dequantize(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """Return the matrix in floating point.

        Args:
            dtype: of the result.
            rows: indices of rows, of any shape; all by default.

        Returns:
            (rows, columns), or (*indices, columns).
        """
        qdata, scale = (self.qdata, self.scale) if rows is None else (self.qdata[rows], self.scale[rows])
        # float16 has fewer exponents than a scale.
        compute = torch.float32 if dtype == torch.float16 else dtype
        if self.bits == 8:
            return (qdata.to(compute) * scale.to(compute)).to(dtype)
        pairs = qdata.unflatten(-1, (-1, HALF_GROUP))  # (..., groups, 16)
        integers = torch.cat([pairs & 15, pairs >> 4], dim=-1).to(torch.int8) - OFFSET  # (..., groups, 32)
        return (integers.to(compute) * scale.to(compute).unsqueeze(-1)).flatten(-2).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, bits={self.bits}"


class QuantizedLinear(QuantizedMatrix):
    """A linear layer with a quantized weight (out, in). Gradients reach its input and its bias.

    Args:
        in_features, out_features: sizes of the input and the output.
        bits: of an integer.
        bias: has a bias, in floating point.
    """

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool = False):
        super().__init__(out_features, in_features, bits)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight and add the bias.

        Args:
            x: (..., in).

        Returns:
            (..., out), in the dtype of `x` or of autocast.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        y = _Product.apply(x, self) if needs_gradient else self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Multiply by the weight.

        Args:
            x: (..., in).

        Returns:
            (..., out), in the dtype of `x`.
        """
        # A sum of 8-bit integers times activations may exceed float16.
        if self.bits == 4 or x.dtype == torch.float16:
            return F.linear(x, self.dequantize(x.dtype))
        return F.linear(x, self.qdata.to(x.dtype)) * self.scale.to(x.dtype).flatten()


class QuantizedEmbedding(QuantizedMatrix):
    """An embedding with a quantized table (tokens, width).

    Args:
        num_embeddings, embedding_dim: sizes of the table.
        bits: of an integer.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int):
        super().__init__(num_embeddings, embedding_dim, bits)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens.

        Args:
            tokens: integers of any shape.

        Returns:
            (*shape, width), in float32.
        """
        return self.dequantize(torch.float32, tokens)


class _Product(torch.autograd.Function):
    """x W^T, with W made again in the backward rather than saved."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dy @ ctx.layer.dequantize(dy.dtype), None
