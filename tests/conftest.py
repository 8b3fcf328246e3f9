"""Settings of the whole suite: property-based tests draw the same examples every time."""

from __future__ import annotations

import hypothesis
import pytest
import torch

from ssm_kernels._triton import interpreting

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("default")
torch.set_num_threads(1)  # the suite runs in several processes


@pytest.fixture(scope="session")
def backend() -> str:
    """The implementation that the tests of the ops hold against the reference."""
    return "triton" if interpreting() else "torch"
