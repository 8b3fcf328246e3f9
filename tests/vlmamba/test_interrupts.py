"""Ctrl-C and SIGTERM end a command at any moment, with its exit status and without a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SIGNALS = pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
START = """
import atexit, os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from {package}.cli import main
def press():
    os.kill(os.getpid(), {number})
"""


def end_of(code: str, number: int, package: str = "vlmamba", *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command in a process that presses a key itself."""
    code = START.format(package=package, number=int(number)) + code + "\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=50, check=False
    )
    return done.returncode, done.stdout, done.stderr


RUN = """
from vlmamba.commands.inspect import Inspect
def run(self):
    {body}
    print("ran on")
Inspect.run = run
"""
IMPORTING = """
class Finder:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            press()
            time.sleep({seconds})
sys.meta_path.insert(0, Finder())
"""
IN_IMPORT = """
    try:
        import numpy
    except BaseException:
        print("lost")
    time.sleep(10)
"""


@pytest.mark.parametrize(("package", "program"), [("vlmamba", "vlmamba"), ("vlmamba.benchmarks", "ssm-bench")])
def test_a_signal_ends_the_import_of_the_commands(package, program):
    code = IMPORTING.format(module="tyro", seconds=10)
    assert end_of(code, signal.SIGINT, package, "--help") == (130, "", f"\n{program}: stopped\n")
    assert end_of(code, signal.SIGTERM, package, "--help") == (143, "", "")


@SIGNALS
def test_a_signal_waits_for_the_end_of_an_import_of_numpy(number, status):
    """PyTorch goes on without a numpy whose import failed."""
    code = IMPORTING.format(module="numpy", seconds=0.1) + RUN.format(body=IN_IMPORT)
    assert end_of(code, number, "vlmamba", "inspect", "x")[:2] == (status, "")


GOES_ON = """
    from vlmamba.interrupts import after_imports
    signal.signal(signal.SIGINT, after_imports)
    try:
        import json.tool
        time.sleep(10)
    except KeyboardInterrupt:
        print("json.tool" in sys.modules)
"""


def test_where_a_program_continues_no_import_is_interrupted():
    """A package whose import was interrupted lacks parts of itself when it is imported again."""
    code = IMPORTING.format(module="json.tool", seconds=0.1) + RUN.format(body=GOES_ON)
    assert end_of(code, signal.SIGINT, "vlmamba", "inspect", "x") == (0, "True\nran on\n", "")


IN_FINALIZER = """
    class Old:
        def __del__(self):
            press()
            time.sleep(0.1)
    Old()
    time.sleep(10)
"""
BESIDE_THREAD = """
    thread = threading.Thread(target=time.sleep, args=[20])
    thread.start()
    atexit.register(print, "last words")
    press()
    time.sleep(10)
"""
TWICE = """
    atexit.register(lambda: (press(), time.sleep(20)))
    press()
    time.sleep(10)
"""


@SIGNALS
def test_a_signal_whose_exception_is_dropped_comes_again(number, status):
    """In a finalizer, as in a callback from C, Python prints what a handler raises, and goes on."""
    told = "\nvlmamba: stopped\n" if number == signal.SIGINT else ""
    assert end_of(RUN.format(body=IN_FINALIZER), number, "vlmamba", "inspect", "x") == (status, "", told)


@SIGNALS
def test_threads_are_not_waited_for(number, status):
    found = end_of(RUN.format(body=BESIDE_THREAD), number, "vlmamba", "inspect", "x")
    assert found[:2] == (status, "last words\n")


@SIGNALS
def test_a_second_signal_ends_what_is_left(number, status):
    assert end_of(RUN.format(body=TWICE), number, "vlmamba", "inspect", "x")[:2] == (-number, "")
