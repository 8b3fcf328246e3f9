"""Compilation of kernels: at the first call with a dtype, cached on disk."""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
from numba.core import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, InTreeCacheLocator

logger = logging.getLogger("ssm_kernels")
_lock = threading.Lock()
_is_announced = threading.Event()
PATIENCE = 1.0
"""Seconds of a compilation after which it is announced, once in a process."""


class Kernel:
    """A function of arrays and numbers that is compiled when it first runs, and runs without the GIL.

    An argument has the same type in all calls, or is an array of the same number of dimensions. Arrays may have any
    dtypes and strides; there is a compilation for each combination of dtypes.
    """

    def __init__(self, function: Callable):
        self._dispatcher = numba.njit(nogil=True, error_model="numpy")(function)
        self._compiled: dict[tuple[np.dtype, ...], Callable] = {}
        try:
            self._dispatcher._cache = _Cache(function)  # pyright: ignore[reportAttributeAccessIssue]
        except RuntimeError as error:  # neither the user's folder nor the package's can be written
            logger.warning("kernels for the CPU are compiled in every process: %s", error)

    def __call__(self, *args):
        dtypes = tuple([x.dtype for x in args if type(x) is np.ndarray])
        compiled = self._compiled.get(dtypes)
        if compiled is None:
            compiled = self._compiled[dtypes] = self._compile(args)
        return compiled(*args)

    def _compile(self, args: tuple) -> Callable:
        # One thread compiles; those that wait for it find its result.
        with _lock:
            # While it runs, not after it: nothing else tells a user that the call has not hung.
            timer = threading.Timer(PATIENCE, _announce, [self._dispatcher.stats.cache_path])
            timer.daemon = True
            timer.start()
            try:
                return self._dispatcher.compile(tuple(map(_type_of, args)))
            finally:
                timer.cancel()


def _announce(path: str | None) -> None:
    if not _is_announced.is_set():
        _is_announced.set()
        then = f"later processes find them in {path}" if path else "again in each process"
        logger.warning("compiling kernels for the CPU takes some seconds; %s", then)


def _type_of(arg: object) -> types.Type:
    kind = numba.typeof(arg)
    # Of no particular layout, so that strides do not make another compilation.
    return types.Array(kind.dtype, kind.ndim, "A") if isinstance(kind, types.Array) else kind


class _Files(CompileResultCacheImpl):
    """Files of a kernel: in `NUMBA_CACHE_DIR` or the user's cache, and beside the package only where neither can be.

    An uninstaller would leave them there, and Python take the folder that they are in for the package.
    """

    # Sorting keeps the order of the others.
    _locator_classes = sorted(CompileResultCacheImpl._locator_classes, key=lambda kind: kind is InTreeCacheLocator)


class _Cache(FunctionCache):
    """numba's cache, keyed also by the files that kernels share: numba looks at the kernel's own file alone."""

    _impl_class = _Files

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
