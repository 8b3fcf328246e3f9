"""Shared parts of the compiled CPU kernels: functions of vectors, and the pool of threads."""

from __future__ import annotations

import fcntl
import functools
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ssm_kernels import add_rms_norm, causal_conv1d, rms_norm, selective_scan, ssd
from ssm_kernels._numba import threads
from tests.ctrl_c import press_ctrl_c_when

np = pytest.importorskip("numpy")
numba = pytest.importorskip("numba")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_functions_are_right_to_two_roundings(dtype):
    from ssm_kernels._numba.functions import exp2, sigmoid, softplus
    from ssm_kernels._numba.lanes import load, store

    @numba.njit
    def run(x, power, plus, gate):
        for i in range(0, x.size, 64 // x.itemsize):
            store(power, i, exp2(load(x, i)))
            store(plus, i, softplus(load(x, i)))
            store(gate, i, sigmoid(load(x, i)))

    x = np.concatenate([np.linspace(-80, 80, 1600), np.linspace(-2, 2, 1600)]).astype(dtype)
    got = [np.empty_like(x) for _ in range(3)]
    run(x, *got)
    exact = x.astype(np.longdouble)
    want = (2**exact, np.log1p(np.exp(-abs(exact))) + np.maximum(exact, 0), 1 / (1 + np.exp(-exact)))
    for one, two in zip(got, want, strict=True):
        assert abs(one / two - 1).max() < 2.5 * np.finfo(dtype).eps

    edges = np.array([np.nan, np.inf, -np.inf, 1e4, -1e4, 0, -0.0, 1] * 2, dtype)
    got = [np.empty_like(edges) for _ in range(3)]
    run(edges, *got)
    for one, two in zip(got, ([np.inf, 0, np.inf, 0], [np.inf, 0, 1e4, 0], [1, 0, 1, 0]), strict=True):
        assert np.isnan(one[0]) and list(one[1:5]) == two


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_powers_of_products_are_the_same_bits_with_a_bound_and_without(dtype):
    from ssm_kernels._numba.functions import exp2_product
    from ssm_kernels._numba.lanes import load, store

    @numba.njit
    def run(x, y, is_bounded, out):
        for i in range(0, x.size, 64 // x.itemsize):
            store(out, i, exp2_product(load(x, i), load(y, i), is_bounded))

    x, y = np.linspace(-6, 6, 1600).astype(dtype), np.linspace(1, 20, 1600).astype(dtype)
    bounded, other = np.empty_like(x), np.empty_like(x)
    run(x, y, True, bounded)
    run(x, y, False, other)
    assert (bounded == other).all()
    assert abs(bounded / 2 ** (x.astype(np.longdouble) * y) - 1).max() < 2.5 * np.finfo(dtype).eps

    # Up to the largest numbers: an infinity there, times a state of 0, would be NaN.
    x = np.linspace(0.9, 1, 1600).astype(dtype) * (np.finfo(dtype).maxexp - 0.05)
    run(x, np.ones_like(x), False, other)
    assert abs(other / 2 ** x.astype(np.longdouble) - 1).max() < 2.5 * np.finfo(dtype).eps

    x = np.array([1e30, -1e30, np.inf, -np.inf, np.nan, 2000, -2000, 0] * 2, dtype)
    out = np.empty_like(x)
    run(x, np.ones_like(x), False, out)
    assert np.isnan(out[4]) and list(np.delete(out[:8], 4)) == [np.inf, 0, np.inf, 0, np.inf, 0, 1]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names a processor of x86-64")
def test_functions_are_right_on_a_processor_without_avx_512(tmp_path):
    settings = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "two_roundings or powers"]
    done = subprocess.run(words, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("...."), done.stdout[-2000:]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_vectors_are_summed_together(dtype):
    from ssm_kernels._numba.lanes import add_totals, larger_sizes, largest, load

    @numba.njit
    def run(target, source):
        add_totals(target, 0, source, 0)
        return largest(larger_sizes(load(source, 0), load(source, 0)))

    lanes = 64 // np.dtype(dtype).itemsize
    source = np.random.default_rng(0).standard_normal((lanes, lanes)).astype(dtype)
    target = np.arange(lanes).astype(dtype)
    largest_size = run(target, source.reshape(-1))
    np.testing.assert_allclose(target, np.arange(lanes) + source.sum(1), rtol=1e-5)
    assert largest_size == abs(source[0]).max()


def test_parts_of_a_memory_follow_each_other():
    from ssm_kernels._numba.lanes import aligned_empty, clear, element, keep, parts, set_element

    @numba.njit
    def sizes(like):
        memory = aligned_empty(like, 96)
        clear(memory, 0, 96)
        first, second, third = parts(memory, np.int64(32), 3)
        for i in range(32):
            set_element(second, i, element(first, i) + 1.0)
        set_element(third, 31, 2.0)
        result = memory[:32].sum(), memory[32:64].sum(), memory[64:95].sum(), memory[95]
        keep(memory)
        return result

    assert sizes(np.empty(0, np.float32)) == (0, 32, 0, 2)


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_every_tile_runs_once_while_several_threads_call(four_threads):
    wrong = []

    def call(n_tiles):
        counts = [0] * n_tiles

        def run(first, end):
            time.sleep(0.001)
            for i in range(first, end):
                counts[i] += 1

        threads.run_tiles(run, n_tiles, 100 * threads.MIN_WORK)
        if counts != [1] * n_tiles:
            wrong.append(counts)

    callers = [threading.Thread(target=call, args=(n,)) for n in (1, 3, 17, 40, 64)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_an_error_in_a_thread_is_raised_by_the_caller(four_threads):
    def run(first, end):
        if first:
            raise KeyError(first)

    with pytest.raises(KeyError):
        threads.run_tiles(run, 64, 100 * threads.MIN_WORK)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_process_has_a_pool_of_its_own(four_threads):
    done = []
    threads.run_tiles(lambda first, end: done.extend(range(first, end)), 16, 100 * threads.MIN_WORK)
    child = os.fork()
    if not child:
        done.clear()
        threads.run_tiles(lambda first, end: done.extend(range(first, end)), 16, 100 * threads.MIN_WORK)
        os._exit(sorted(done) != list(range(16)))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
def test_ops_start_no_openmp_threads():
    """They would spin for milliseconds after PyTorch's part of an op, on the cores that the kernels' threads want."""
    B, L, D, N, H = 2, 1024, 64, 32, 2
    u, dt, z = (torch.rand(B, L, D) for _ in range(3))
    A, bias, taps = -torch.rand(D, N), torch.rand(D), torch.rand(D, 4)
    x, heads_dt, decay = u.view(B, L, H, D // H), dt[..., :H], -torch.rand(H)
    b, c = (torch.rand(B, L, 1, N) for _ in range(2))
    ops = {
        "selective_scan": lambda *args: selective_scan(*args, dt_softplus=True, backend="numba").y,
        "ssd": lambda *args: ssd(*args, backend="numba").y,
        "causal_conv1d": lambda *args: causal_conv1d(*args, activation="silu", backend="numba").y,
        "rms_norm": lambda x, weight, z: rms_norm(x, weight, z=z, backend="numba"),
        "add_rms_norm": lambda *args: add_rms_norm(*args, backend="numba").y,
    }
    arguments = {
        "selective_scan": (u, dt, A, b, c, bias, z, bias),
        "ssd": (x, heads_dt, decay, b, c),
        "causal_conv1d": (u, taps, bias),
        "rms_norm": (u, bias, z),
        "add_rms_norm": (u, bias, z),
    }
    calls = {}
    for name, op in ops.items():
        args = [x.clone().requires_grad_() for x in arguments[name]]
        calls[name] = functools.partial(run_with_gradients, op, args, torch.ones(args[0].shape))
        calls[name]()  # compiles
    started = {}

    def run(name):
        torch.set_num_threads(2)
        before = set(os.listdir("/proc/self/task"))
        calls[name]()
        of_python = {str(thread.native_id) for thread in threading.enumerate()}  # the kernels' own threads
        started[name] = set(os.listdir("/proc/self/task")) - before - of_python

    before = torch.get_num_threads()
    for name in ops:
        # OpenMP gives each thread that calls it a team of its own.
        caller = threading.Thread(target=run, args=(name,))
        caller.start()
        caller.join()
    torch.set_num_threads(before)
    assert started == dict.fromkeys(ops, set())


def run_with_gradients(op, args, dy):
    return torch.autograd.grad(op(*args), args, dy)


SLOW = """
import time
import numpy as np
from ssm_kernels._numba import compile as compiling
from ssm_kernels._numba.launch import __file__ as file
compiling.PATIENCE = {patience}
namespace = {{}}
for name in ("one", "two"):
    exec(compile(f"def {{name}}(x): x[0] += 1", file, "exec"), namespace)
    kernel = compiling.Kernel(namespace[name])
    slow = kernel._dispatcher.compile
    kernel._dispatcher.compile = lambda types: (time.sleep(0.2), slow(types))[1]
    kernel(np.zeros(1))
"""


@pytest.mark.parametrize("patience, times", [(0.05, 1), (60.0, 0)])
def test_a_slow_compilation_is_announced_once_on_stderr_while_it_runs(tmp_path, patience, times):
    run = subprocess.run(
        [sys.executable, "-c", SLOW.format(patience=patience)], env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stderr.count("compiling kernels for the CPU takes some seconds") == times
    assert run.stderr.count(f"later processes find them in {tmp_path}") == times


TWO_DTYPES = """
import pathlib, sys, time
import torch
from numba.core import caching
from ssm_kernels._numba.compile import Kernel
from ssm_kernels._numba.launch import __file__ as file, memory_of
here, first, dtypes = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[2:]
namespace = {"__name__": "ssm_kernels._numba.launch"}
exec(compile("def add(x): x[0] += 0.5", file, "exec"), namespace)
kernel = Kernel(namespace["add"])
exec(compile(f"def warm_up_{first}(x): x[0] = 0", file, "exec"), namespace)
Kernel(namespace[f"warm_up_{first}"])(memory_of(torch.ones(1)))

def wait_for(name, seconds):
    end = time.monotonic() + seconds
    while not (here / name).exists() and time.monotonic() < end:
        time.sleep(0.01)
    return (here / name).exists()

def save(*args, save=caching.IndexDataCacheFile._save_index):
    (here / "has-chosen").touch()
    if wait_for("other-reads", 3):
        wait_for("other-is-done", 200)
    save(*args)

def load(*args, load=caching.IndexDataCacheFile.load):
    (here / "other-reads").touch()
    return load(*args)

if first == "float32":
    caching.IndexDataCacheFile._save_index = save
else:
    wait_for("has-chosen", 200)
    caching.IndexDataCacheFile.load = load
for dtype in dtypes:
    x = torch.ones(4, dtype=getattr(torch, dtype))
    kernel(memory_of(x))
    assert x.tolist() == [1.5, 1, 1, 1], x
(here / "other-is-done").touch()
print(sum(kernel._dispatcher.stats.cache_misses.values()))
"""


def test_of_two_processes_one_compiles_and_the_other_takes_its_result(tmp_path):
    """numba chooses a file's name from the index before it writes that, so that two could choose the same one."""
    environment, pipe = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}, subprocess.PIPE
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_DTYPES, str(tmp_path), *dtypes],
            env=environment, stdout=pipe, stderr=pipe, text=True,
        )
        for dtypes in (["float32", "float64"], ["float64", "float32"])
    ]  # fmt: skip
    results = [process.communicate(timeout=300) for process in processes]
    assert sum(int(stdout) for stdout, _ in results) == 2, results


def test_where_files_cannot_be_locked_kernels_are_compiled_with_a_warning(tmp_path, monkeypatch, caplog):
    from numba.core import config

    from ssm_kernels._numba import compile as compiling

    class Lock:
        lock_file = "run.lock"

        def __init__(self, path, **options): ...

        def __enter__(self):
            raise NotImplementedError("no flock")

        def __exit__(self, *error): ...

    def run(x):
        x[0] += 0.5

    monkeypatch.setattr(compiling, "FileLock", Lock)
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    x = np.ones(1)
    compiling.Kernel(run)(x)
    assert x == 1.5
    assert "run.lock cannot be locked; only one process should compile: no flock" in caplog.text


def test_kernels_are_cached_outside_of_the_package_where_an_uninstaller_would_leave_them(tmp_path):
    """A folder that is left in site-packages shadows an editable install."""
    code = """
import pathlib, ssm_kernels
from ssm_kernels._numba.compile import Kernel
from ssm_kernels._numba.launch import __file__ as file
namespace = {}
exec(compile("def add(x): x[0] += 1", file, "exec"), namespace)
print(Kernel(namespace["add"])._dispatcher.stats.cache_path)
"""
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    (tmp_path / "file").touch()
    for cache, is_beside in ((tmp_path / "cache", False), (tmp_path / "file" / "cache", True)):
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment | {"XDG_CACHE_HOME": str(cache)}, text=True,
            capture_output=True, check=True,
        )  # fmt: skip
        folder = Path(run.stdout.strip())
        assert folder.is_relative_to(Path(threads.__file__).parent) == is_beside
        assert folder.is_relative_to(cache) != is_beside


def test_ctrl_c_during_a_compilation_is_not_lost(tmp_path, monkeypatch):
    """LLVM gives the code that it made to a Python function, whose exceptions ctypes prints and drops."""
    from llvmlite.binding.executionengine import ExecutionEngine
    from numba.core import config

    from ssm_kernels._numba.compile import Kernel

    find, presses = ExecutionEngine._find_module_ptr, iter([signal.SIGINT])

    def press(self, pointer):
        for number in presses:
            os.kill(os.getpid(), number)
            time.sleep(0.1)  # for the main thread to handle it
        return find(self, pointer)

    def run(x):
        x[0] += 0.5

    monkeypatch.setattr(ExecutionEngine, "_find_module_ptr", press)
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    kernel, x = Kernel(run), np.ones(1)
    with pytest.raises(KeyboardInterrupt):
        kernel(x)
    assert x == 1
    kernel(x)
    assert x == 1.5


@pytest.fixture
def held_kernel(tmp_path, monkeypatch):
    """A kernel, with its files in a folder of the test's own, and an event that its compilation waits for."""
    from numba.core import config

    from ssm_kernels._numba import compile as compiling

    def run(x):
        x[0] += 0.5

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "PATIENCE", 0.05)
    monkeypatch.setattr(compiling, "_is_announced", set())
    kernel, may_end = compiling.Kernel(run), threading.Event()
    compile_now = kernel._dispatcher.compile
    monkeypatch.setattr(kernel._dispatcher, "compile", lambda types: may_end.wait(60) and compile_now(types))
    return kernel, may_end


def test_ctrl_c_does_not_wait_for_a_compilation(held_kernel, caplog):
    """It goes on, and the next call takes its result."""
    (kernel, may_end), x = held_kernel, np.ones(1)
    press_ctrl_c_when(lambda: "compiling kernels for the CPU takes some seconds" in caplog.text)
    with pytest.raises(KeyboardInterrupt):
        kernel(x)
    assert not kernel._dispatcher.signatures
    may_end.set()
    kernel(x)
    assert x == 1.5 and len(kernel._dispatcher.stats.cache_misses) == 1


def test_the_wait_for_another_process_is_announced_and_ends_by_ctrl_c(held_kernel, caplog):
    kernel, may_end = held_kernel
    cache, waiting = kernel._cache, "waiting for a process that compiles kernels for the CPU; it holds"
    path = Path(cache.cache_path) / f"{cache._impl.filename_base}.lock"
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        press_ctrl_c_when(lambda: waiting in caplog.text)
        with pytest.raises(KeyboardInterrupt):
            kernel(np.ones(1))
    assert f"{waiting} {path}" in caplog.text
    assert "takes some seconds" not in caplog.text
    may_end.set()
    kernel(np.ones(1))
    assert len(kernel._dispatcher.stats.cache_misses) == 1
