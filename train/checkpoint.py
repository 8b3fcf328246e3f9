"""Checkpoints of a stage by `torch.distributed.checkpoint`: what it has learned, the optimizer and the step.

Each rank writes its share, and any number of ranks reads it. There is no random state in them: that of a step follows
from the seed, the step and the rank.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from .distributed import rank, world_size

logger = logging.getLogger("vlmamba.train")
# PyTorch says so even where it is told.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)

COMPLETE = ".metadata"
"""The file that PyTorch writes last, and under its name only when all ranks have written theirs."""


class Checkpoints:
    """The folders `folder/step-N`, written while the training goes on.

    Only the parameters that learn are kept: the others are those that the stage began with.

    Args:
        parameters: by name; this rank's shares where they are sharded.
        optimizer: an AdamW over them.
        keep_last: complete checkpoints that are kept.
    """

    def __init__(self, folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, keep_last: int):
        self.folder, self.parameters, self.optimizer, self.keep_last = folder, parameters, optimizer, keep_last
        # Of its own: the thread that writes must not take part in what the loop sends.
        self.group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self.writing: tuple[Path, Future] | None = None

    def load(self) -> int:
        """Restore the newest checkpoint that is whole, and give its step; 0 where there is none.

        A checkpoint that is damaged is left out with a warning.

        Raises:
            ValueError: a whole checkpoint belongs to another model; every name that does not fit is listed.
        """
        for path in reversed(self._complete()):
            try:
                stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
                shapes = {n.removeprefix("model."): m.size for n, m in stored.items() if n.startswith("model.")}
            except Exception as e:  # unpickling raises many kinds for a damaged file
                _warn_of_damage(path, e)
                continue
            problems = [f"missing: {n}" for n in self.parameters if n not in shapes]
            problems += [f"unexpected: {n}" for n in shapes if n not in self.parameters]
            problems += [
                f"shape of {n}: {tuple(shapes[n])} in the checkpoint, {tuple(p.shape)} in the model"
                for n, p in self.parameters.items()
                if n in shapes and shapes[n] != p.shape
            ]
            if problems:
                raise ValueError(f"checkpoint {path} is of another model or stage:\n  " + "\n  ".join(problems))
            own = self._tensors()
            # Beside the model, so that half of a damaged checkpoint does not get into it.
            read = {name: torch.empty_like(t) for name, t in own.items()} | {"step": torch.zeros((), dtype=torch.int64)}
            try:
                dcp.load(read, checkpoint_id=path, process_group=self.group)
            except CheckpointException as e:
                _warn_of_damage(path, _first_failure(e))
                continue
            for name, tensor in own.items():
                tensor.copy_(read[name])
            return int(read["step"])
        return 0

    def save(self, step: int) -> None:
        """Copy everything, and begin to write it; the one before is waited for.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        path = self.folder / f"step-{step:08d}"
        if rank() == 0 and path.exists():  # damaged, or not complete
            _delete(path)
        if self.group is not None:
            dist.barrier(self.group)
        state = self._tensors() | {"step": torch.tensor(step)}
        self.writing = path, dcp.async_save(state, checkpoint_id=path, process_group=self.group)

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete, then delete all but the newest few.

        Raises:
            OSError: it could not be written; those before are as they were.
        """
        if self.writing is None:
            return
        (path, written), self.writing = self.writing, None
        try:
            written.result()
        except CheckpointException as e:
            if rank() == 0:
                _delete(path)
            cause = _first_failure(e)
            reason = getattr(cause, "strerror", None) or cause
            raise OSError(
                getattr(cause, "errno", None), f"could not save {path}; those before are as they were: {reason}"
            ) from cause
        if rank() == 0:
            for old in self._complete()[: -self.keep_last]:
                _delete(old)

    def close(self) -> None:
        """Wait, and leave the other ranks."""
        self.wait()
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[p].items()}
        return tensors

    def _complete(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob(f"step-*/{COMPLETE}"))


def _delete(path: Path) -> None:
    (path / COMPLETE).unlink(missing_ok=True)  # first, so that what is left is not taken for a checkpoint
    shutil.rmtree(path, ignore_errors=True)


def _first_failure(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]


def _warn_of_damage(path: Path, error: BaseException) -> None:
    if rank() == 0:
        reason = str(error).split("\n")[0]
        logger.warning("checkpoint %s is damaged (%s); trying the one before it", path, reason)
