"""Checkpoints of a stage in safetensors and JSON: the trained parameters, the optimizer and the step.

    step-00000200/
        rank-0000-of-0002.safetensors   rows of sharded tensors; rank 0's file has the replicated tensors too
        rank-0001-of-0002.safetensors
        checkpoint.json                 step, identity of the run, checksums of the files, rows of each tensor in them

Each rank writes its file, and any number of ranks can read them. A checkpoint is written under a temporary name, and
renamed when all of it is on the disk. It has no random state: that of a step is a function of the seed, the step and
the rank. Nothing in it is a pickle.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..model.files import PARTIAL, remove_partials, sync, write_atomic
from ..model.weights import save_tensors
from .config import Changeable
from .distributed import gather_over_ranks, local, on_first_rank, rank, world_size
from .identity import differences

logger = logging.getLogger("vlmamba.train")

CONTENTS = "checkpoint.json"
FORMAT = 1
READ_BYTES = 4 << 20
"""Bytes read at once for a checksum."""
_NAME = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """Checkpoints in folders `folder/step-N`, written in the background.

    Only trainable parameters are saved: the others are those that the stage starts with.

    Args:
        folder: folder of the stage.
        parameters: trainable parameters by name, sharded or not.
        optimizer: AdamW optimizer of the parameters.
        keep_last: number of checkpoints to keep.
        run: identity of the run, saved in each checkpoint.
        may_change: names in `run` that may differ from those of the checkpoint that is loaded.
    """

    def __init__(
        self,
        folder: Path,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.AdamW,
        keep_last: int,
        run: Mapping[str, Any],
        may_change: tuple[Changeable, ...] = (),
    ):
        self.folder, self.parameters, self.optimizer, self.keep_last = folder, parameters, optimizer, keep_last
        self.run, self.may_change = run, may_change
        self.newest = 0
        """Step of the checkpoint that was loaded or saved last."""
        # A group of its own: the writing thread must not interleave with the collectives of the training loop.
        self.group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None

    def load(self) -> int:
        """Restore the newest checkpoint that is not damaged.

        The checksum of every file is verified first. A damaged checkpoint is renamed to `damaged-step-N`, and
        `damage.txt` in it has the reason.

        Returns:
            The step of the checkpoint; 0 where there is none.

        Raises:
            ValueError: the checkpoint is of another run (the message has what differs) or of an earlier version.
        """
        on_first_rank(self._clean)
        # From the newest to the oldest, until one is intact on all ranks.
        while True:
            found = on_first_rank(self._find)
            if found is None:
                return 0
            path, contents = found
            damage = [d for found_by_rank in gather_over_ranks(_damage(path, contents)) for d in found_by_rank]
            if not damage:
                break
            on_first_rank(lambda path=path, damage=damage: _set_aside(path, damage[0]))
        self._check_run(path, contents)
        self._check_fit(path, contents["tensors"])
        # The number of ranks may have changed, so each reads its rows from any of the files.
        with contextlib.ExitStack() as stack:
            files = {f: stack.enter_context(safe_open(path / f, framework="pt")) for f in contents["files"]}
            for name, tensor in self._tensors().items():
                _read(files, name, contents["tensors"][name]["parts"], tensor)
        self.newest = contents["step"]
        return self.newest

    def save(self, step: int) -> None:
        """Copy parameters and optimizer state, and start to write them. Waits for the previous checkpoint.

        Raises:
            FloatingPointError: a parameter or a moment of the optimizer is not finite. Nothing is written.
            OSError: the previous checkpoint could not be written.
        """
        self.wait()
        tensors = self._tensors()
        non_finite = gather_over_ranks([name for name, t in tensors.items() if not local(t).isfinite().all()])
        bad = list(dict.fromkeys(name for names in non_finite for name in names))
        # Checked on all ranks before anything is written: a checkpoint that cannot be trained from is worse than none.
        if bad:
            raise FloatingPointError(
                f"{len(bad)} of {len(tensors)} tensors of weights and optimizer are not finite after step {step} "
                f"({', '.join(bad[:3])}{', …' * (len(bad) > 3)}); no checkpoint of it is written"
            )
        # Replicated tensors are equal on all ranks, so rank 0 alone writes them. Copies, since training goes on.
        mine = {n: t for n, t in tensors.items() if rank() == 0 or isinstance(t, DTensor)}
        copies = {n: local(t).to("cpu", copy=True).contiguous() for n, t in mine.items()}
        rows = {n: (str(t.dtype), list(t.shape), _rows(t)[0]) for n, t in mine.items()}
        self.newest = step
        # The files are written while training goes on; an error is raised by the next `wait`.
        self.writing = self.thread.submit(self._write, step, copies, rows)

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete, then delete all but the newest `keep_last`.

        Raises:
            OSError: it could not be written; earlier checkpoints stay.
        """
        if self.writing is None:
            return
        written, self.writing = self.writing, None
        written.result()
        if rank() == 0:
            complete = [path for path in _folders(self.folder) if (path / CONTENTS).exists()]
            for old in complete[: -self.keep_last]:
                # Renamed first: a partly deleted checkpoint must not look like one.
                gone = old.with_name(f".{old.name}{PARTIAL}")
                os.replace(old, gone)
                shutil.rmtree(gone)

    def close(self) -> None:
        """Wait for the checkpoint being written, and destroy the process group."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()
        if isinstance(self.group, dist.ProcessGroup):
            dist.destroy_process_group(self.group)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[p].items()}
        return tensors

    def _clean(self) -> None:
        """Delete partly written files of a killed run."""
        if self.folder.is_dir():
            remove_partials(self.folder)

    def _find(self) -> tuple[Path, dict[str, Any]] | None:
        """Find the newest checkpoint and read its contents; those whose contents are damaged are set aside."""
        for path in reversed(_folders(self.folder)):
            if (path / ".metadata").exists() and not (path / CONTENTS).exists():
                raise ValueError(
                    f"{path} is a checkpoint of an earlier version, which this one does not read: name another output "
                    f"folder, or delete {self.folder} to start over"
                )
            try:
                return path, _contents(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                _set_aside(path, f"{CONTENTS}: {getattr(e, 'strerror', None) or e}")
        return None

    def _check_run(self, path: Path, contents: Mapping[str, Any]) -> None:
        found = differences(contents["run"], self.run)
        found = {name: text for name, text in found.items() if name not in self.may_change}
        if found:
            changeable = [name for name in found if name in get_args(Changeable)]
            hint = f". To resume it with another {' and '.join(changeable)}: --may-change {' '.join(changeable)}"
            raise ValueError(
                f"checkpoint {path} is of another run:\n  "
                + "\n  ".join(f"{name}: {text}" for name, text in found.items())
                + f"\nName another output folder, or delete {self.folder} to start over"
                + (hint if len(changeable) == len(found) else "")
            )

    def _check_fit(self, path: Path, stored: Mapping[str, Any]) -> None:
        # Messages name parameters as the model does.
        own = {n.removeprefix("model."): t for n, t in self._tensors().items()}
        stored = {n.removeprefix("model."): t for n, t in stored.items()}
        problems = [f"missing: {n}" for n in own if n not in stored]
        problems += [f"unexpected: {n}" for n in stored if n not in own]
        problems += [
            f"{what} of {n}: {saved} in the checkpoint, {current} in the model"
            for n, t in own.items()
            if n in stored
            for what, saved, current in (
                ("shape", tuple(stored[n]["shape"]), tuple(t.shape)),
                ("dtype", stored[n]["dtype"], str(t.dtype)),
            )
            if saved != current
        ]
        if problems:
            raise ValueError(f"checkpoint {path} is of another model or stage:\n  " + "\n  ".join(problems))

    def _write(self, step: int, tensors: dict[str, Tensor], rows: dict[str, tuple[str, list[int], int]]) -> None:
        """Write this rank's file; rank 0 then writes the contents and renames the folder.

        Args:
            step: steps taken.
            tensors: this rank's shards.
            rows: dtype, global shape and first row of each.
        """
        path = self.folder / f"step-{step:08d}"
        partial = self.folder / f".{path.name}{PARTIAL}"
        file = f"rank-{rank():04d}-of-{world_size():04d}.safetensors"
        with self._failing_together(path, partial):
            if rank() == 0:
                partial.mkdir(parents=True)
        with self._failing_together(path, partial):
            save_tensors(tensors, partial / file)
            sync(partial / file)
        written = self._gather((file, (partial / file).stat().st_size, _crc32(partial / file), rows))
        with self._failing_together(path, partial):
            if rank() == 0:
                stored: dict[str, Any] = {}
                for name, _, _, rows_of_rank in written:
                    for tensor, (dtype, shape, start) in rows_of_rank.items():
                        entry = stored.setdefault(tensor, {"dtype": dtype, "shape": shape, "parts": []})
                        entry["parts"].append([name, start])
                files = {name: {"bytes": size, "crc32": crc} for name, size, crc, _ in written}
                contents = {"format": FORMAT, "step": step, "run": self.run, "files": files, "tensors": stored}
                text = json.dumps(contents)
                write_atomic(partial / CONTENTS, f"{text}\n{zlib.crc32(text.encode()):08x}\n")
                # Contents reach the disk before the name, and the name before anything is deleted.
                sync(partial)
                os.replace(partial, path)
                sync(self.folder)

    @contextlib.contextmanager
    def _failing_together(self, path: Path, partial: Path) -> Iterator[None]:
        """Raise an OSError of any rank within the block on all ranks, so that none waits for one that failed."""
        problem = None
        try:
            yield
        except OSError as e:
            problem = e.errno, e.strerror
        problems = [p for p in self._gather(problem) if p is not None]
        if problems:
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            number, reason = problems[0]
            raise OSError(number, f"could not save {path}; earlier checkpoints stay: {reason}")

    def _gather(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        values = [None] * world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values


def _folders(folder: Path) -> list[Path]:
    """Folders with the name of a checkpoint, the oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _contents(path: Path) -> dict[str, Any]:
    """Read `checkpoint.json`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OSError: it is damaged.
    """
    text, _, checksum = (path / CONTENTS).read_text(encoding="utf-8").partition("\n")
    # The second line is the CRC-32 of the first.
    if checksum != f"{zlib.crc32(text.encode()):08x}\n":
        raise ValueError("its checksum is wrong")
    contents = json.loads(text)
    if contents["format"] != FORMAT:
        raise ValueError(f"its format is {contents['format']}, and only {FORMAT} is supported")
    if contents["step"] != int(path.name.removeprefix("step-")):
        raise ValueError(f"it is of step {contents['step']}")
    # A name with a folder in it would read outside of the checkpoint.
    for file in contents["files"]:
        if Path(file).name != file:
            raise ValueError(f"it names a file outside its folder: {file!r}")
    return contents


def _damage(path: Path, contents: Mapping[str, Any]) -> list[str]:
    """Verify the files of a checkpoint; they are divided among the ranks.

    Returns:
        Errors that this rank found.
    """
    found = []
    for file in list(contents["files"])[rank() :: world_size()]:
        stored = contents["files"][file]
        try:
            size = (path / file).stat().st_size
            if size != stored["bytes"]:
                found.append(f"{file} has {size:,} bytes, not {stored['bytes']:,}")
            elif _crc32(path / file) != stored["crc32"]:
                found.append(f"the checksum of {file} is wrong")
        except OSError as e:
            found.append(f"{file}: {e.strerror}")
    return found


def _set_aside(path: Path, reason: str) -> None:
    aside, n = path.with_name(f"damaged-{path.name}"), 1
    while aside.exists():
        n += 1
        aside = path.with_name(f"damaged-{path.name}-{n}")
    os.replace(path, aside)
    write_atomic(aside / "damage.txt", reason + "\n")
    logger.warning(
        "checkpoint %s is damaged (%s) and was renamed to %s; trying the one before it", path, reason, aside.name
    )


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            value = zlib.crc32(block, value)
    return value


def _rows(tensor: Tensor) -> tuple[int, int]:
    """First row and number of rows of a tensor on this rank."""
    if not isinstance(tensor, DTensor):
        return 0, len(tensor) if tensor.dim() else 1
    if tuple(tensor.placements) != (Shard(0),):
        raise ValueError(f"a checkpoint holds tensors that are sharded by rows, got {tensor.placements}")
    # DTensor divides rows as torch.chunk does: ceil(rows / ranks) each, the last ranks have fewer.
    rows = -(-len(tensor) // world_size())
    return min(rank() * rows, len(tensor)), len(local(tensor))


def _read(files: Mapping[str, Any], name: str, parts: list[tuple[str, int]], tensor: Tensor) -> None:
    """Fill this rank's rows of a tensor from the files that hold them."""
    mine = local(tensor)
    if tensor.dim() == 0:
        mine.copy_(files[parts[0][0]].get_tensor(name))
        return
    start, rows = _rows(tensor)
    left = rows
    for file, first in parts:
        part = files[file].get_slice(name)
        # Rows [low, high) of the tensor are both in this file and on this rank.
        low, high = max(start, first), min(start + rows, first + part.get_shape()[0])
        if low < high:
            mine[low - start : high - start].copy_(part[low - first : high - first])
            left -= high - low
    if left:
        raise ValueError(f"the checkpoint lacks {left} rows of {name}")
