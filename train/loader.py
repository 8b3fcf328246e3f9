"""Batches prepared ahead of the loop: the same whatever the number of workers, and from any step on.

What a step holds is a function of the seed and the step (`samples_of_step`), so that a stage that goes on from a
checkpoint needs no state of its data: it begins with the very next sample.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..model.files import continue_json_lines, json_lines
from .config import StageConfig
from .errors import BrokenDataError, ChangedDataError, WorkerDiedError
from .sampler import samples_of_step

FEWEST_SEEN = 1000
"""`max_broken` is a share of at least so many samples: among the first ten, one that is broken is no tenth."""


class Samples(Protocol):
    """What is trained on: numbered samples. One that raises a ValueError or an OSError is broken.

    A `ChangedDataError` and errors of other kinds are no fault of the sample, and end the iteration.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class StepData:
    """What one rank runs in one step."""

    micro_batches: list[Any]
    n_samples: int
    """Samples in them."""
    wait: float
    """Seconds that the loop stood still for them."""


class _Job(NamedTuple):
    """One micro batch to prepare."""

    step: int
    begin: int
    """Place of its first sample in the step."""
    indices: list[int]
    allowed: int
    """Broken samples that the rank may have met by the end of the step."""


class _Prepared(NamedTuple):
    batch: Any
    broken: list[tuple[int, str]]
    """Index and reason."""
    error: Exception | None = None
    """What ended the preparation. It is handed over as a value, so that an exception of the data loader itself can only
    mean that a process died."""
    trace: str = ""
    """Where the error arose, as text."""


class Loader:
    """The steps of one rank, from `first_step` up to `n_steps`, each once.

    A rank takes every `world_size`-th sample of a step, so that all of them together run the same samples whatever
    their number. `stage.workers` processes prepare up to two micro batches each ahead of the loop; with 0 the loop
    prepares what it runs. Random numbers that `samples` or `collate` draw from torch depend on the stage's seed, the
    step and the place in it alone, and leave the loop's own as they are.

    A broken sample is replaced by the next one that is whole, and a line in `folder/broken.jsonl` (for rank r above 0
    `folder/broken-r.jsonl`) has its step, index and reason.

    Args:
        samples: the training set.
        stage: its `batch_size`, `micro_batch_size` (of a rank), `seed`, `workers` and `max_broken` are read.
        collate: a list of samples to a batch.
        folder: of the stage; None keeps no report.

    Raises:
        ValueError: the batch cannot be shared equally, or there is nothing to train on.
        BrokenDataError: while iterating: more than `stage.max_broken` of the samples that this rank has seen are
            broken.
        ChangedDataError: while iterating: a file of data is not the one that was read at the start.
        WorkerDiedError: while iterating: a worker died.

        These three are a `DataError`. They are raised between steps, never within one: the loop's model is that of the
        last whole step, and can be saved.
    """

    def __init__(
        self,
        samples: Samples,
        stage: StageConfig,
        collate: Callable[[Sequence[Any]], Any],
        *,
        first_step: int,
        n_steps: int,
        rank: int = 0,
        world_size: int = 1,
        folder: str | Path | None = None,
    ):
        if not len(samples):
            raise ValueError(f"stage {stage.name!r} has no samples to train on")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size = {world_size}), got {rank}")
        if stage.batch_size % world_size:
            raise ValueError(
                f"batch_size of stage {stage.name!r} must be a multiple of the number of ranks, so that each has "
                f"equally many samples: got {stage.batch_size} for {world_size} ranks"
            )
        self.samples, self.stage, self.collate = samples, stage, collate
        self.first_step, self.n_steps = first_step, n_steps
        self.rank, self.world_size = rank, world_size
        self.n_samples = stage.batch_size // world_size
        self.report = None
        if folder is not None:
            self.report = Path(folder) / ("broken.jsonl" if rank == 0 else f"broken-{rank}.jsonl")

    def __iter__(self) -> Generator[StepData, None, None]:
        n_broken = self._kept_reports()
        n_micro_batches = -(-self.n_samples // self._micro_batch_size)
        prepared = self._start()
        with _deaths_told_by_next(prepared):
            yield from self._steps(prepared, n_micro_batches, n_broken)

    def _steps(self, prepared: Iterator[_Prepared], n_micro_batches: int, n_broken: int) -> Iterator[StepData]:
        for step in range(self.first_step, self.n_steps):
            start = time.perf_counter()
            ready = [self._next(prepared) for _ in range(n_micro_batches)]
            wait = time.perf_counter() - start
            broken = [b for p in ready for b in p.broken]
            if broken:
                n_broken += len(broken)
                self._report(step, broken)
                if n_broken > self._allowed(step):
                    raise BrokenDataError(self._too_many(step, n_broken, *broken[-1]))
            yield StepData([p.batch for p in ready], self.n_samples, wait)

    @property
    def _micro_batch_size(self) -> int:
        return min(self.stage.micro_batch_size or self.n_samples, self.n_samples)

    def _start(self) -> Iterator[_Prepared]:
        workers = self.stage.workers
        engine = DataLoader(
            _Preparation(self.samples, self.collate, self.stage.seed),
            batch_size=None,
            sampler=_Jobs(self),
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=functools.partial(_outlive_signals, loop=os.getpid()),
            generator=torch.Generator(),  # it draws a seed for its workers, which must not come from the loop's
        )
        before = set(multiprocessing.active_children())
        prepared = iter(engine)
        self._workers = [p for p in multiprocessing.active_children() if p not in before]
        return prepared

    def _next(self, prepared: Iterator[_Prepared]) -> _Prepared:
        try:
            got = next(prepared)
        except (RuntimeError, OSError, EOFError) as e:
            # The last two where it died with a batch that it had announced and not yet handed over.
            ended = multiprocessing.connection.wait([p.sentinel for p in self._workers], timeout=5)
            for process in self._workers:
                if process.sentinel in ended:
                    process.join()  # its end shows a moment before its status
                    raise WorkerDiedError(self._obituary(process.exitcode)) from e
            raise
        if got.error is not None:
            raise got.error from (RuntimeError(f"in a worker:\n{got.trace}") if got.trace else None)
        return got

    def _obituary(self, exit_code: int) -> str:
        how = f"with status {exit_code}" if exit_code >= 0 else f"by signal {signal.Signals(-exit_code).name}"
        text = f"a process that prepares data for stage {self.stage.name!r} ended {how}"
        if exit_code == -signal.SIGKILL:
            text += (
                f". The system kills one so where memory runs out: then fewer workers (now {self.stage.workers}) or a "
                "smaller micro_batch_size help"
            )
        return text

    def jobs(self) -> Iterator[_Job]:
        """The micro batches of this rank, in their order."""
        size, stage = self._micro_batch_size, self.stage
        for step in range(self.first_step, self.n_steps):
            chosen = samples_of_step(len(self.samples), stage.batch_size, stage.seed, step)
            mine = chosen[self.rank :: self.world_size]
            for k in range(0, len(mine), size):
                yield _Job(step, self.rank + k * self.world_size, mine[k : k + size], self._allowed(step))

    def _allowed(self, step: int) -> int:
        return int(self.stage.max_broken * max((step + 1) * self.n_samples, FEWEST_SEEN))

    def _too_many(self, step: int, n_broken: int, index: int, reason: str) -> str:
        where = "" if self.report is None else f"; all of them are named in {self.report}"
        return (
            f"{n_broken:,} of {(step + 1) * self.n_samples:,} samples of stage {self.stage.name!r} are broken, which "
            f"is more than max_broken = {self.stage.max_broken} allows. The last is number {index}: {reason}{where}"
        )

    def _report(self, step: int, broken: list[tuple[int, str]]) -> None:
        if self.report is not None:
            self.report.parent.mkdir(parents=True, exist_ok=True)
            with open(self.report, "a", encoding="utf-8") as file:
                for index, reason in broken:
                    file.write(json.dumps({"step": step, "index": index, "reason": reason}) + "\n")

    def _kept_reports(self) -> int:
        """Drop what was reported of steps that will be taken again; how many reports are left."""
        if self.report is None or not self.report.exists():
            return 0
        continue_json_lines(self.report, lambda line: line.get("step", -1) < self.first_step).close()
        return sum(1 for _ in json_lines(self.report))


class _Jobs:
    """The loader's jobs as a sampler."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __iter__(self) -> Iterator[_Job]:
        return self.loader.jobs()


class _Preparation:
    """What a worker does: a job to a micro batch."""

    def __init__(self, samples: Samples, collate: Callable[[Sequence[Any]], Any], seed: int):
        self.samples, self.collate, self.seed = samples, collate, seed

    def __getitem__(self, job: _Job) -> _Prepared:
        is_worker = torch.utils.data.get_worker_info() is not None
        try:
            prepared = self._prepare(job)
            if is_worker:
                _share(prepared.batch)
            return prepared
        except Exception as e:
            if not is_worker:
                return _Prepared(None, [], e)
            return _Prepared(None, [], _picklable(e), traceback.format_exc())

    def _prepare(self, job: _Job) -> _Prepared:
        seed = np.random.SeedSequence((self.seed, job.step, job.begin)).generate_state(1)[0]
        broken: list[tuple[int, str]] = []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            samples = []
            for index in job.indices:
                while len(broken) <= job.allowed:
                    try:
                        samples.append(self.samples[index])
                        break
                    except ChangedDataError:
                        raise
                    except (ValueError, OSError) as e:
                        broken.append((index, str(e)))
                        index = (index + 1) % len(self.samples)
                else:  # the loader will raise
                    return _Prepared(None, broken)
            return _Prepared(self.collate(samples), broken)


def _share(value: Any) -> None:
    """Move the tensors of a batch to shared memory, as handing it over would do in a thread whose errors are lost: the
    loop would wait for ever.

    Raises:
        OSError: there is no room.
    """
    if isinstance(value, Tensor):
        try:
            value.share_memory_()
        except RuntimeError as e:
            raise OSError(f"no shared memory for a batch: {e}. With workers=0 none is needed") from e
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _share(getattr(value, field.name))
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            _share(inner)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextlib.contextmanager
def _deaths_told_by_next(prepared: Any) -> Iterator[None]:
    """Within, the death of a worker is told when a batch is asked for. PyTorch's own handler of SIGCHLD raises wherever
    the loop is, in the middle of an optimizer step too.

    Args:
        prepared: iterator of a DataLoader. Its workers are ended before the handler is back, which would see the dead.
    """
    try:
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except ValueError:  # not the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        if hasattr(prepared, "_shutdown_workers"):
            prepared._shutdown_workers()
        signal.signal(signal.SIGCHLD, handler)


def _as_it_is(prepared: _Prepared) -> _Prepared:
    return prepared


def _outlive_signals(worker: int, loop: int) -> None:
    """Ctrl-C and SIGTERM reach all processes of a group; the loop may still need data, and itself ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_loop_says, args=(loop,), daemon=True).start()


def _end_when_the_loop_says(loop: int) -> None:
    # A worker's parent need not be the loop: it may be a server that forks.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != loop:
        pass
    os._exit(0)
