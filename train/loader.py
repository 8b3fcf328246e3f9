"""Data loader: batches prepared ahead of the training loop, independent of the number of workers.

The samples of a step are a function of the seed and the step (`samples_of_step`), so that a resume needs no state of
the data: it starts with the very next sample.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
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
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..model.files import continue_json_lines, json_lines
from .config import StageConfig
from .errors import BrokenDataError, ChangedDataError, WorkerDiedError, picklable
from .sampler import samples_of_step

MIN_SAMPLES_SEEN = 1000
"""`max_broken` is a fraction of at least this many samples, so that one broken sample at the start is not too many."""


class Samples(Protocol):
    """Training set: samples by index. A sample that raises a ValueError or an OSError is broken.

    A `ChangedDataError` and other exceptions are not the sample's fault, and end the iteration.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class StepData:
    """Batches of one rank in one step."""

    micro_batches: list[Any]
    n_samples: int
    """Number of samples in them."""
    wait: float
    """Seconds that the training loop waited for them."""


class _MicroBatch(NamedTuple):
    """Samples of one micro batch, to be prepared by a worker."""

    step: int
    start: int
    """Position of its first sample in the step."""
    indices: list[int]
    allowed: int
    """Broken samples that the rank may have had by the end of the step."""


class _Prepared(NamedTuple):
    """A prepared micro batch, or the error that ended its preparation."""

    batch: Any
    broken: list[tuple[int, str]]
    """Index and reason."""
    error: BaseException | None = None
    """Returned as a value, so that an exception of the data loader itself can only mean that a worker died."""
    trace: str = ""
    """Traceback of the error in the worker."""


class Loader:
    """Iterator of the steps of one rank, from `first_step` up to `n_steps`.

    A rank takes every `world_size`-th sample of a step, so that the samples of a step do not depend on the number of
    ranks. `stage.workers` processes prepare up to two micro batches each ahead of the loop; with 0 they are prepared in
    the loop. Random numbers that `samples` or `collate` draw from torch depend on the stage's seed, the step and the
    position in it alone, and do not advance the loop's generator.

    A broken sample is replaced by the next valid one, and a line in `folder/broken.jsonl` (for rank r above 0
    `folder/broken-r.jsonl`) has its step, index and reason.

    Args:
        samples: the training set.
        stage: its `batch_size`, `micro_batch_size` (of a rank), `seed`, `workers` and `max_broken` are used.
        collate: maps a list of samples to a batch.
        first_step: step to start at.
        n_steps: number of steps of the stage.
        rank: index of this rank's share of each batch.
        world_size: number of shares.
        folder: folder of the stage; None writes no report.

    Raises:
        ValueError: the batch cannot be divided equally, or there are no samples.
        BrokenDataError: while iterating: more than `stage.max_broken` of the samples of this rank are broken.
        ChangedDataError: while iterating: a data file has changed since it was indexed.
        WorkerDiedError: while iterating: a worker died.

        The last three are a `DataError`. They are raised between steps, never within one: the model is that of the last
        complete step, and can be saved.
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
            raise ValueError(f"rank must be in [0, world_size = {world_size}), got {rank}")
        if stage.batch_size % world_size:
            raise ValueError(
                f"batch_size of stage {stage.name!r} must be a multiple of the number of ranks, so that each has "
                f"equally many samples: got {stage.batch_size} for {world_size} ranks"
            )
        self.samples, self.stage, self.collate = samples, stage, collate
        self.first_step, self.n_steps = first_step, n_steps
        self.rank, self.world_size = rank, world_size
        self.n_samples = stage.batch_size // world_size  # of this rank in a step
        # One report a rank: several processes do not append to the same file.
        self.report = None
        if folder is not None:
            self.report = Path(folder) / ("broken.jsonl" if rank == 0 else f"broken-{rank}.jsonl")

    def __iter__(self) -> Generator[StepData, None, None]:
        # Broken samples count over the entire stage, also over interruptions.
        n_broken = self._resume_report()
        n_micro_batches = -(-self.n_samples // self._micro_batch_size)  # the last may be smaller
        prepared = self._start()
        with _worker_deaths_raise_in_next(prepared):
            yield from self._steps(prepared, n_micro_batches, n_broken)

    def _steps(self, prepared: Iterator[_Prepared], n_micro_batches: int, n_broken: int) -> Iterator[StepData]:
        for step in range(self.first_step, self.n_steps):
            start = time.perf_counter()
            ready = [self._next(prepared) for _ in range(n_micro_batches)]
            wait = time.perf_counter() - start  # near 0 where the workers keep up
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
        # A sampler of micro batches and batch_size=None: the DataLoader only distributes them and keeps their order.
        engine = DataLoader(
            _Preparation(self.samples, self.collate, self.stage.seed),
            batch_size=None,
            sampler=_MicroBatches(self),
            num_workers=workers,
            collate_fn=_identity,
            worker_init_fn=functools.partial(_ignore_group_signals, loop=os.getpid()),
            generator=torch.Generator(),  # for the seeds of its workers, which must not advance the loop's generator
        )
        # The DataLoader does not publish its processes, whose exit status is wanted.
        earlier = set(multiprocessing.active_children())
        prepared = iter(engine)
        self._workers = [p for p in multiprocessing.active_children() if p not in earlier]
        return prepared

    def _next(self, prepared: Iterator[_Prepared]) -> _Prepared:
        try:
            got = next(prepared)
        except (RuntimeError, OSError, EOFError) as e:
            # OSError and EOFError if it died between announcing a batch and passing it on.
            ended = multiprocessing.connection.wait([p.sentinel for p in self._workers], timeout=5)
            for process in self._workers:
                if process.sentinel in ended:
                    process.join()  # the sentinel is ready a moment before the exit code
                    raise WorkerDiedError(self._death_message(process.exitcode or 0)) from e
            raise
        # The worker's traceback becomes the cause of its error.
        if got.error is not None:
            raise got.error from (RuntimeError(f"in a worker:\n{got.trace}") if got.trace else None)
        return got

    def _death_message(self, exit_code: int) -> str:
        how = f"with status {exit_code}" if exit_code >= 0 else f"by signal {signal.Signals(-exit_code).name}"
        text = f"a process that prepares data for stage {self.stage.name!r} ended {how}"
        if exit_code == -signal.SIGKILL:
            text += (
                f". The system does this where memory runs out: use fewer workers (now {self.stage.workers}) or a "
                "smaller micro_batch_size"
            )
        return text

    def micro_batches(self) -> Iterator[_MicroBatch]:
        """Yield the micro batches of this rank, in order."""
        size, stage = self._micro_batch_size, self.stage
        # Rank r has samples r, r + world_size, ... of the step; a micro batch has consecutive ones of these.
        for step in range(self.first_step, self.n_steps):
            chosen = samples_of_step(len(self.samples), stage.batch_size, stage.seed, step)
            mine = chosen[self.rank :: self.world_size]
            for k in range(0, len(mine), size):
                yield _MicroBatch(step, self.rank + k * self.world_size, mine[k : k + size], self._allowed(step))

    def _allowed(self, step: int) -> int:
        return int(self.stage.max_broken * max((step + 1) * self.n_samples, MIN_SAMPLES_SEEN))

    def _too_many(self, step: int, n_broken: int, index: int, reason: str) -> str:
        where = "" if self.report is None else f"; all of them are in {self.report}"
        return (
            f"{n_broken:,} of {(step + 1) * self.n_samples:,} samples of stage {self.stage.name!r} are broken, "
            f"more than max_broken = {self.stage.max_broken} allows. The last is number {index}: {reason}{where}"
        )

    def _report(self, step: int, broken: list[tuple[int, str]]) -> None:
        if self.report is not None:
            self.report.parent.mkdir(parents=True, exist_ok=True)
            with open(self.report, "a", encoding="utf-8") as file:
                for index, reason in broken:
                    file.write(json.dumps({"step": step, "index": index, "reason": reason}) + "\n")

    def _resume_report(self) -> int:
        """Drop reports of steps that will be taken again, and return the number of the others."""
        if self.report is None or not self.report.exists():
            return 0
        continue_json_lines(self.report, lambda line: line.get("step", -1) < self.first_step).close()
        return sum(1 for _ in json_lines(self.report))


class _MicroBatches:
    """Sampler of a loader's micro batches."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __iter__(self) -> Iterator[_MicroBatch]:
        return self.loader.micro_batches()


class _Preparation(Dataset[_Prepared]):
    """Dataset that maps a micro batch to its prepared form, in a worker."""

    def __init__(self, samples: Samples, collate: Callable[[Sequence[Any]], Any], seed: int):
        self.samples, self.collate, self.seed = samples, collate, seed

    def __getitem__(self, micro_batch: _MicroBatch) -> _Prepared:
        is_worker = get_worker_info() is not None
        try:
            prepared = self._prepare(micro_batch)
            if is_worker:
                _share(prepared.batch)
            return prepared
        except Exception as e:
            if not is_worker:
                return _Prepared(None, [], e)  # it has its own traceback
            return _Prepared(None, [], picklable(e), traceback.format_exc())

    def _prepare(self, micro_batch: _MicroBatch) -> _Prepared:
        seed = np.random.SeedSequence((self.seed, micro_batch.step, micro_batch.start)).generate_state(1)[0]
        broken: list[tuple[int, str]] = []
        # A generator for each micro batch: with 0 workers it must not advance the loop's, and with several the
        # numbers must not depend on which worker prepares what.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            samples = []
            for index in micro_batch.indices:
                while len(broken) <= micro_batch.allowed:
                    try:
                        samples.append(self.samples[index])
                        break
                    except ChangedDataError:
                        raise
                    except (ValueError, OSError) as e:
                        broken.append((index, str(e)))
                        index = (index + 1) % len(self.samples)
                else:  # too many are broken, and the loader will raise
                    return _Prepared(None, broken)
            return _Prepared(self.collate(samples), broken)


def _share(value: Any) -> None:
    """Move the tensors of a batch to shared memory.

    The queue would do it in a thread whose errors are lost, and the loop would wait for ever.

    Raises:
        OSError: there is not enough shared memory.
    """
    if isinstance(value, Tensor):
        try:
            value.share_memory_()
        except RuntimeError as e:
            raise OSError(f"no shared memory for a batch: {e}. workers=0 needs none") from e
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _share(getattr(value, field.name))
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            _share(inner)


@contextlib.contextmanager
def _worker_deaths_raise_in_next(prepared: Any) -> Iterator[None]:
    """Let the death of a worker raise in `next(prepared)` alone.

    PyTorch's handler of SIGCHLD raises wherever the training loop is, also in the middle of an optimizer step.

    Args:
        prepared: iterator of a DataLoader. Its workers are stopped before the handler is restored, which would see
            them.
    """
    try:
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except ValueError:  # only the main thread can handle signals
        yield
        return
    try:
        yield
    finally:
        if hasattr(prepared, "_shutdown_workers"):
            prepared._shutdown_workers()
        signal.signal(signal.SIGCHLD, handler)


def _identity(prepared: Any) -> Any:
    return prepared


def _ignore_group_signals(worker: int, loop: int) -> None:
    """Let a worker survive Ctrl-C and SIGTERM, which reach the entire process group: the loop may still need data.

    Args:
        worker: number of the worker, which the DataLoader passes.
        loop: process id of the training loop, whose SIGTERM alone ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # SIGTERM is blocked, and a thread waits for one whose sender is the loop. macOS has no sigwaitinfo.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_from, args=(loop,), daemon=True).start()


def _exit_on_sigterm_from(loop: int) -> None:
    # Its id, since the parent of a worker may be a fork server.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != loop:
        pass
    os._exit(0)
