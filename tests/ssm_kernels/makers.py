"""Random tensors, and functions of the ops, that the tests of the kernels share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    """Draw a normal float64 tensor by its number of elements and the seed."""
    generator = torch.Generator().manual_seed(seed * 1000 + math.prod(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def leaf(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Draw a tensor that requires its gradient."""
    return (scale * random_tensor(*shape, seed=seed)).requires_grad_()


def negative_leaf(*shape: int, seed: int = 0) -> Tensor:
    """Draw a tensor of negative elements that requires its gradient: A of a scan."""
    return (-random_tensor(*shape, seed=seed).exp()).requires_grad_()


class StepOutput(NamedTuple):
    """Results of a decoding step."""

    y: Tensor
    state: Tensor


def pure(step: Callable[..., Tensor]) -> Callable[..., StepOutput]:
    """Return a decoding step that updates a copy of its state and returns it, for `assert_agrees`."""

    def run(state: Tensor, **arguments) -> StepOutput:
        state = state.clone()
        return StepOutput(step(state, **arguments), state)

    return run
