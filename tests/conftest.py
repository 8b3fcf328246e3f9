"""Settings of the whole suite: property-based tests draw the same examples every time."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from ssm_kernels._triton import interpreting

# The interpreter takes seconds for what the other backends do in milliseconds.
examples = 5 if interpreting() else 25
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=examples)
hypothesis.settings.load_profile("default")
torch.set_num_threads(1)  # the suite runs in several processes


@pytest.fixture(scope="session")
def backend() -> str:
    """The implementation that the tests of the ops hold against the reference."""
    return "triton" if interpreting() else "torch"


@pytest.fixture(scope="session", autouse=True)
def boolean_masks() -> Iterator[None]:
    """In the interpreter, the masks of all loads and stores are boolean: from Triton 3.9 on no other is taken."""
    if not interpreting():
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    def checked(access, position):
        def check(builder, *args, **kwargs):
            dtype = args[position].data.dtype
            assert dtype.kind == "b", f"a mask is {dtype}, not bool: combine tile and scalar with `and_scalar`"
            return access(builder, *args, **kwargs)

        return check

    with pytest.MonkeyPatch.context() as patch:
        for name, position in {"create_masked_load": 1, "create_masked_store": 2}.items():
            patch.setattr(InterpreterBuilder, name, checked(getattr(InterpreterBuilder, name), position))
        yield


@pytest.fixture
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every `torch.empty` gives NaN, so that what a kernel leaves out shows, between bands that it must not touch."""
    band, given = 64, []
    empty = torch.empty

    def guarded(*size, dtype=None, device=None):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        whole = torch.full((shape.numel() + 2 * band,), torch.nan, dtype=dtype, device=device)
        given.append(whole)
        return whole[band : band + shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    yield
    monkeypatch.setattr(torch, "empty", empty)
    assert given, "nothing was allocated by torch.empty"
    for whole in given:
        inside = whole[band:-band]
        assert whole[:band].isnan().all() and whole[-band:].isnan().all(), f"written outside of {tuple(inside.shape)}"
        assert not inside.isnan().any(), f"not written inside of {tuple(inside.shape)}"
