"""Random tensors, and functions of the ops, that the tests of the kernels share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vlmamba.benchmarks.cases import Case, StepOutput


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


def pure(step: Callable[..., Tensor]) -> Callable[..., StepOutput]:
    """Return a decoding step that updates a copy of its state and returns it, for `assert_agrees`."""

    def run(state: Tensor, **arguments) -> StepOutput:
        state = state.clone()
        return StepOutput(step(state, **arguments), state)

    return run


def draw_inputs(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Draw the floating-point inputs of a case.

    All are normal but A, which is uniform in (-3, 0): steps and decays vary more than those of the models, which
    `Case.inputs` draws.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, size: tuple[int, ...]) -> Tensor:
        if name == "A":
            return -torch.rand(size, generator=generator, dtype=torch.float64) * 3
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return {name: draw(name, size).to(dtype) for name, size in case.sizes().items()}
