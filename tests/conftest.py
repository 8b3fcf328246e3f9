"""Settings of the whole suite: property-based tests draw the same examples every time."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from packaging.version import Version

from ssm_kernels import use_backend
from ssm_kernels.testing import is_interpreted

# The interpreter takes seconds for what the other backends do in milliseconds.
examples = 5 if is_interpreted() else 25
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=examples)
hypothesis.settings.load_profile("default")
torch.set_num_threads(1)  # the suite runs in several processes


def find_builtins_once() -> None:
    """Let the interpreter list the builtins of Triton's modules once, not at each call: a third of its time."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch(package: Any, *options: Any) -> None:
        for name in builtins(package):
            member = getattr(package, name)
            if is_builtin(member):  # else it is replaced already
                interpreter._patch_attr(package, name, member, *options)

    interpreter._patch_builtin = patch


if is_interpreted():
    find_builtins_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the slow tests first; skip what runs in the interpreter where Triton's cannot read NumPy's arrays."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    rest = [item for item in items if not item.get_closest_marker("slow")]
    # Two processes begin with a half of the list each. A slow test that starts last would run beside an idle one.
    (slow_1, slow_2), (rest_1, rest_2) = halves(slow), halves(rest)
    items[:] = [*slow_1, *rest_1, *slow_2, *rest_2]
    if not is_interpreted():
        return
    # They make a Python number of an array of one dimension, which NumPy 2.4 refuses.
    triton, numpy = (Version(importlib.metadata.version(name)) for name in ("triton", "numpy"))
    if triton < Version("3.7") and numpy >= Version("2.4"):
        skip = pytest.mark.skip(reason=f"the interpreter of Triton {triton} fails with NumPy {numpy}, from 2.4 on")
        for item in items:
            item.add_marker(skip)


def halves(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    middle = len(items) // 2
    return items[:middle], items[middle:]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip a test of matrix products in float64 where Triton has none, with the op's own message."""
    try:
        return (yield)
    except RuntimeError as error:
        if "in float64 needs Triton 3.5" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def skip_ignored_norm_groups() -> Callable[[Any], None]:
    """Skip a test of a configuration whose norm groups `transformers` ignores: Mamba-2's before 5.23.

    Python 3.10 has no later release than 5.20.2.
    """
    version = importlib.metadata.version("transformers")

    def skip(config: Any) -> None:
        if getattr(config, "n_groups", 1) > 1 and Version(version) < Version("5.23"):
            pytest.skip(f"transformers {version} ignores the norm groups of Mamba-2; 5.23 is the first that does not")

    return skip


@pytest.fixture(scope="session")
def backend() -> str:
    """The implementation that the tests of the ops hold against the reference."""
    return "triton" if is_interpreted() else "torch"


@pytest.fixture
def default_backend(backend: str) -> Iterator[None]:
    """Make the implementation under test the one that ops choose by `auto`."""
    with use_backend(backend):
        yield


@pytest.fixture(params=["under test", "reference"])
def default_or_reference(request: pytest.FixtureRequest, backend: str) -> Iterator[None]:
    """Run a test twice: on the implementation under test, and on the reference."""
    with use_backend(backend if request.param == "under test" else "reference"):
        yield


@pytest.fixture(scope="module", params=["triton"] if is_interpreted() else ["torch", "numba"])
def compiled_or_not(request: pytest.FixtureRequest) -> str:
    """Every implementation of an op that has kernels in numba too; its tests take this one as their `backend`."""
    if request.param == "numba":
        pytest.importorskip("numba")
    return request.param


@pytest.fixture(scope="session", autouse=True)
def boolean_masks() -> Iterator[None]:
    """In the interpreter, the masks of all loads and stores are boolean: from Triton 3.9 on no other is taken."""
    if not is_interpreted():
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
