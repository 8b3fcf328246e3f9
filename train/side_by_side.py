"""Functions that run side by side, each in a process of its own, with one terminal and one fate."""

from __future__ import annotations

import codecs
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

from tqdm import tqdm

from .errors import Interrupted, picklable
from .log_lines import show_warnings
from .signals import handling, processes_hidden_from_ctrl_c

LOG_INTERVAL = 30.0
"""Seconds between the lines of a progress bar where the output is no terminal."""


@dataclass(frozen=True)
class Job:
    """A function to run in a process of its own."""

    name: str
    """Label of its output."""
    function: Callable[..., None]
    """A function at the top level of a module: the process imports it."""
    args: tuple[Any, ...] = ()


class _Failure(NamedTuple):
    """Error that ended a job."""

    error: BaseException
    trace: str


class _Running(NamedTuple):
    """A job's process and the pipes from it."""

    job: Job
    process: Any
    output: Connection
    """Its stdout and stderr."""
    outcome: Connection
    """None or a `_Failure`, once."""


def run_side_by_side(jobs: Sequence[Job]) -> None:
    """Run all jobs at the same time, and wait for them.

    Each line that a job prints is shown with its name, and its progress bar has a row of its own. SIGTERM and Ctrl-C
    are passed on to the jobs as SIGTERM, on which a stage of training saves a checkpoint; a second Ctrl-C ends them at
    once. Where a job fails, the others get a SIGTERM too.

    Args:
        jobs: with different names.

    Raises:
        Exception: the error of the first job that failed; its cause has the traceback in the job's process.
        ChildProcessError: a job's process ended without an error of its own, as when memory runs out.
        Interrupted: a signal ended the jobs, or one of them.
    """
    running: list[_Running] = []
    failures: dict[str, _Failure] = {}
    with _Display([job.name for job in jobs]) as display, _passing_signals_on(running) as received:
        for job in jobs:
            running.append(_start(job, display.columns))
            if received:  # it came while this one started
                running[-1].process.terminate()
                break
        for name, failure in _follow(running, display):
            failures[name] = failure
            for other in running:
                other.process.terminate()
    # After the display, whose rows an error message would be among.
    _raise_for(failures, received)


def _start(job: Job, columns: int) -> _Running:
    # A fork would copy locks and threads of PyTorch in whatever state they are.
    context = multiprocessing.get_context("spawn")
    (output, output_end), (outcome, outcome_end) = context.Pipe(duplex=False), context.Pipe(duplex=False)
    (job_end, start), packed = context.Pipe(duplex=False), _Packed(job)
    process = context.Process(target=_run, args=(packed, job_end, columns, output_end, outcome_end), name=job.name)
    with processes_hidden_from_ctrl_c():  # it gets a SIGTERM in its place
        process.start()
    # With the child's copies alone, a pipe ends when the child does.
    for end in (job_end, output_end, outcome_end):
        end.close()
    threading.Thread(target=packed.send, args=(start,), daemon=True).start()
    return _Running(job, process, output, outcome)


class _Packed:
    """A job as bytes, which are pickled while a process is started: events can be pickled only then.

    They are sent when it has started. Otherwise its start would wait until it has imported the job's modules, and for
    ever if it ended before.
    """

    def __init__(self, job: Job):
        self.job, self.data = job, b""

    def __reduce__(self) -> tuple[Any, ...]:
        self.data = bytes(ForkingPickler.dumps(self.job))
        return type(None), ()

    def send(self, start: Connection) -> None:
        """Send the job to its process, which may have ended."""
        with contextlib.suppress(BrokenPipeError), start:
            start.send_bytes(self.data)


def _run(_: None, start: Connection, columns: int, output: Connection, outcome: Connection) -> None:
    """Run a job in its process."""
    os.environ["COLUMNS"] = str(columns)  # the width of its progress bars, which do not see the terminal
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    show_warnings()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    failure = None
    try:
        job = pickle.loads(start.recv_bytes())
        job.function(*job.args)
    except BaseException as e:  # also a signal's, which the parent reports
        failure = _Failure(picklable(e), traceback.format_exc())
    # A parent that was killed reads nothing.
    with contextlib.suppress(BrokenPipeError):
        outcome.send(failure)


def _end_with_parent() -> None:
    """Save and end where the parent was killed: nobody would see the rest, and a new run needs the folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _follow(running: Sequence[_Running], display: _Display) -> Iterator[tuple[str, _Failure]]:
    """Show what the jobs print until all have ended; yield those that failed."""
    # The end of its output is the end of a job: the process holds the only other end of the pipe.
    by_pipe = {r.output: r for r in running}
    while by_pipe:
        for pipe in multiprocessing.connection.wait(list(by_pipe)):
            assert isinstance(pipe, Connection)
            data = os.read(pipe.fileno(), 1 << 16)
            # No data is the end of the pipe.
            if data:
                display.show(by_pipe[pipe].job.name, data)
                continue
            ended = by_pipe.pop(pipe)
            failure = _outcome(ended)
            if failure is not None:
                yield ended.job.name, failure


def _outcome(ended: _Running) -> _Failure | None:
    try:
        failure = ended.outcome.recv()
    except EOFError:  # it ended without a word
        ended.process.join()
        code = ended.process.exitcode
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        if code == -signal.SIGTERM:  # between two stages, where there is nothing to save
            return _Failure(Interrupted(128 + signal.SIGTERM), "")
        return _Failure(ChildProcessError(f"the process of {ended.job.name} ended {how}"), "")
    ended.process.join()
    return failure


def _raise_for(failures: dict[str, _Failure], received: Sequence[int]) -> None:
    """Raise the first error that is not a consequence of a signal, else for the signal."""
    for name, (error, trace) in failures.items():
        if isinstance(error, Exception):
            raise error from RuntimeError(f"in the process of {name}:\n{trace}")
    if received:
        raise Interrupted(128 + received[0])
    for error, _ in failures.values():  # a signal to one job alone
        raise error


@contextlib.contextmanager
def _passing_signals_on(running: Sequence[_Running]) -> Iterator[list[int]]:
    """Pass SIGTERM and Ctrl-C on to the jobs, and collect them."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        again = bool(received) and number == signal.SIGINT
        received.append(number)
        for r in running:
            (r.process.kill if again else r.process.terminate)()

    with handling((signal.SIGTERM, signal.SIGINT), handle):
        yield received


class _Display:
    """Lines and progress bars of several jobs on stderr, each with the job's name before it.

    Args:
        names: of the jobs.
    """

    def __init__(self, names: Sequence[str]):
        self.width = max(map(len, names))
        self.columns = shutil.get_terminal_size().columns - self.width - 3
        """Width of a job's own output."""
        self.decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in names}
        self.unfinished = dict.fromkeys(names, "")
        self.bars: dict[str, tqdm] = {}
        self.logged = dict.fromkeys(names, time.monotonic())
        if sys.stderr.isatty():
            self.bars = {
                name: tqdm(bar_format="{desc}", position=i, leave=False) for i, name in enumerate(names)
            }  # fmt: skip

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in reversed(self.bars.values()):
            bar.close()

    def show(self, name: str, data: bytes) -> None:
        """Show bytes that a job has printed.

        Args:
            name: of the job.
            data: text, with lines that end in a line feed, and progress bars that start with a carriage return.
        """
        # Bytes of half a character wait in the decoder, and half a line in `unfinished`.
        text = self.unfinished[name] + self.decoders[name].decode(data)
        *lines, rest = text.split("\n")
        for line in lines:
            self._line(name, line.rpartition("\r")[2])
        # Of a bar's states only the newest is shown.
        self.unfinished[name] = rest[rest.rfind("\r") :] if "\r" in rest else rest
        state = self.unfinished[name].removeprefix("\r").strip()
        if not state:
            return
        if name in self.bars:
            self.bars[name].set_description_str(self._labelled(name, state)[: self.columns + self.width + 2])
        elif time.monotonic() - self.logged[name] >= LOG_INTERVAL:
            self._line(name, state)

    def _line(self, name: str, line: str) -> None:
        if line.strip():
            tqdm.write(self._labelled(name, line.rstrip()), file=sys.stderr)
            self.logged[name] = time.monotonic()

    def _labelled(self, name: str, text: str) -> str:
        return f"{name:<{self.width}} | {text}"
