"""Compilation of kernels: at the first call with a dtype, cached on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from filelock import FileLock
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, InTreeCacheLocator
from numba.core.datamodel import models
from numba.core.extending import NativeValue, register_model, unbox

from .launch import TYPES

logger = logging.getLogger("ssm_kernels")
_lock = threading.Lock()
_is_announced: set[str] = set()
PATIENCE = 1.0
"""Seconds after which a compilation, or the wait for another process's, is announced, once in a process."""


class Memory(types.Array):
    """The numba type of the memory of a tensor: an array that is made of what `launch.memory_of` returns."""

    def __init__(self, dtype: types.Type, n_dims: int):
        # Of no particular layout, so that strides do not make another compilation.
        super().__init__(dtype, n_dims, "A", name=f"Memory({dtype}, {n_dims})")


register_model(Memory)(models.ArrayModel)


@unbox(Memory)
def _unbox(kind: Any, memory: Any, c: Any) -> NativeValue:
    """Make an array of (dtype, address, shape, strides, ...)."""
    builder, python = c.builder, c.pyapi
    integer = c.context.get_value_type(types.intp)
    size = ir.Constant(integer, kind.dtype.bitwidth // 8)

    def numbers(field: int) -> list[Any]:
        sequence = python.tuple_getitem(memory, field)
        return [python.long_as_longlong(python.tuple_getitem(sequence, i)) for i in range(kind.ndim)]

    array = cgutils.create_struct_proxy(kind)(c.context, builder)
    shape, strides = numbers(2), [builder.mul(n, size) for n in numbers(3)]
    array.shape, array.strides = (cgutils.pack_array(builder, m, ty=integer) for m in (shape, strides))
    array.itemsize, array.nitems = size, functools.reduce(builder.mul, shape, ir.Constant(integer, 1))
    address = python.long_as_longlong(python.tuple_getitem(memory, 1))
    array.data = builder.inttoptr(address, array.data.type)
    # Nothing counts references: the caller keeps the tensor.
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    array.parent = cgutils.get_null_value(array.parent.type)
    return NativeValue(array._getvalue())


class Kernel:
    """A function of arrays and numbers that is compiled when it first runs, and runs without the GIL.

    An argument is the memory of a tensor, of any dtype and strides, or it has the same type in all calls. There is a
    compilation for each combination of the tensors' dtypes.
    """

    def __init__(self, function: Callable):
        self._dispatcher = numba.njit(nogil=True, error_model="numpy")(function)
        self._compiled: dict[tuple[torch.dtype, ...], Callable] = {}
        self._cache: _Cache | None = None
        try:
            self._cache = self._dispatcher._cache = _Cache(function)  # pyright: ignore[reportAttributeAccessIssue]
        except RuntimeError as error:  # neither the user's folder nor the package's can be written
            logger.warning("kernels for the CPU are compiled in every process: %s", error)

    def __call__(self, *args):
        dtypes = tuple([x[0] for x in args if type(x) is tuple])
        compiled = self._compiled.get(dtypes)
        if compiled is None:
            compiled = self._compiled[dtypes] = self._compile(args)
        return compiled(*args)

    def _compile(self, args: tuple) -> Callable:
        # One thread compiles; those that wait for it find its result. A signal ends the wait for either lock.
        held = contextlib.ExitStack()
        try:
            held.enter_context(_lock)
            if self._cache:
                held.enter_context(self._cache.locked())
            path = self._dispatcher.stats.cache_path
            then = f"later processes find them in {path}" if path else "again in each process"
            held.enter_context(_announced("compiling kernels for the CPU takes some seconds; %s", then))
            # In a thread of its own, which goes on where a signal ends the wait for it. In this one what a handler
            # raises, such as KeyboardInterrupt, would be lost: LLVM calls Python through ctypes, which drops it.
            thread = ThreadPoolExecutor(1, "compile")
            compiling = thread.submit(self._dispatcher.compile, tuple(map(_type_of, args)))
            thread.shutdown(wait=False)
            compiling.add_done_callback(lambda _: held.close())
        except BaseException:
            held.close()
            raise
        return compiling.result()


@contextlib.contextmanager
def _announced(text: str, *args: str) -> Iterator[None]:
    """Log a text while a block runs, not after it: nothing else tells a user that the call has not hung."""
    timer = threading.Timer(PATIENCE, _announce, [text, *args])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _announce(text: str, *args: str) -> None:
    if text not in _is_announced:
        _is_announced.add(text)
        logger.warning(text, *args)


def _type_of(arg: object) -> types.Type:
    if isinstance(arg, tuple):
        dtype, _, shape = arg[:3]
        return Memory(numba.from_dtype(np.dtype(TYPES[dtype])), len(shape))
    return numba.typeof(arg)


class _Files(CompileResultCacheImpl):
    """Files of a kernel: in `NUMBA_CACHE_DIR` or the user's cache, and beside the package only where neither can be.

    An uninstaller would leave them there, and Python take the folder that they are in for the package.
    """

    # Sorting keeps the order of the others.
    _locator_classes = sorted(CompileResultCacheImpl._locator_classes, key=lambda kind: kind is InTreeCacheLocator)


class _Cache(FunctionCache):
    """numba's cache, keyed also by the files that kernels share: numba looks at the kernel's own file alone."""

    _impl_class = _Files

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the kernel's files against other processes, such as the ranks of a training.

        Those that wait find the result. numba writes the index of a kernel before the file that it names, and two
        writers may take the same name for kernels of different dtypes.
        """
        # Another thread may release it.
        lock = FileLock(Path(self.cache_path) / f"{self._impl.filename_base}.lock", thread_local=False)
        with contextlib.ExitStack() as stack:
            try:
                self._impl.locator.ensure_cache_path()
                with _announced("waiting for a process that compiles kernels for the CPU; it holds %s", lock.lock_file):
                    stack.enter_context(lock)
            except (OSError, NotImplementedError) as error:  # no room for a file, or no locks in this file system
                logger.warning("%s cannot be locked; only one process should compile: %s", lock.lock_file, error)
            yield

    def _index_key(self, sig, codegen):
        return *super()._index_key(sig, codegen), _digest()


@functools.cache
def _digest() -> str:
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    # Kernels share the parts in this folder, and those beside the kernels of any op.
    for path in sorted([*folder.glob("*.py"), *folder.parent.glob("*/numba/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
