"""Break real trainings in random ways, and look for anything lost or silently wrong.

    python -m tests.soak --minutes 10 --seed 0

A small VLM goes through both stages on shards of easy-VQA, over and over. Each try draws a fault from its seed and its
number (`--only N` does that one again); afterwards the same command must end with the metrics and the model of an
undisturbed run, to the bit, or must have refused by name. A kill comes at a drawn number of changes to files, and a
drawn moment later. The table of tried and survived is printed at the end; a failure keeps its folder, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from vlmamba.cli import main as vlmamba
from vlmamba.commands import train_stages  # noqa: F401  imported once here, for all forked runs
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import VLM, ImageProcessor, LMConfig, Tokenizer, VisionConfig, ViTConfig, VLMConfig
from vlmamba.train import easy_vqa
from vlmamba.train.records import Record

FORK = multiprocessing.get_context("fork")
N_RECORDS = 48
WATCHED = {"open", "os.rename", "os.truncate", "os.remove", "os.mkdir", "os.rmdir"}
"""Audit events that change files, or open them to be changed."""
STAGES = ("align", "finetune")


class Ended(NamedTuple):
    """The end of one command."""

    status: int
    output: str
    changes: int
    """Changes to files that the command began."""


class Failure(Exception):
    """Something was lost, or wrong without a word."""


@dataclasses.dataclass
class Fault:
    """Sends a signal after so many changes to files, and a moment."""

    after: int
    delay: float
    number: int = signal.SIGKILL


class Soak:
    """The files that all tries share, and the undisturbed run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shards = folder / "shards"
        self.base, self.other_base = folder / "base", folder / "other-base"
        write_shards(self.shards)
        write_base(self.base, seed=0)
        write_base(self.other_base, seed=1)
        self.reference = folder / "reference"
        ended = self.train(self.reference)
        check(ended.status == 0, f"the undisturbed run ended with {ended.status}: {ended.output}")
        self.changes = ended.changes
        self.metrics = {s: (self.reference / s / "metrics.jsonl").read_bytes() for s in STAGES}
        self.model = (self.reference / "model" / "model.safetensors").read_bytes()

    def start(self, output: Path, *options: str, fault: Fault | None = None, limit: int | None = None, **changed: Path):
        """Start the command in a process of its own. `changed` may name another `base` or `data`."""
        base, data = changed.get("base", self.base), changed.get("data", self.shards)
        arguments = [
            "train", base, data, "--output", output, "--stage", "both", "--epochs", 2, "--batch-size", 8, "--lr", 0.01,
            "--save-every", 3, "--workers", 1, "--device", "cpu", *options,
        ]  # fmt: skip
        told, tell = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_child, args=(list(map(str, arguments)), fault, limit, tell))
        process.start()
        tell.close()
        return process, told

    def wait(self, process, told) -> Ended:
        output, changes = "", 0
        with contextlib.suppress(EOFError):
            output, changes = told.recv()
        process.join()
        return Ended(process.exitcode, output, changes)

    def train(self, output: Path, *options: str, **arguments) -> Ended:
        return self.wait(*self.start(output, *options, **arguments))

    def finish(self, output: Path) -> None:
        """Run the command to its end, and hold what it leaves against the undisturbed run."""
        ended = self.train(output)
        check(ended.status == 0, f"the command that goes on ended with {ended.status}: {ended.output}")
        for stage in STAGES:
            check((output / stage / "metrics.jsonl").read_bytes() == self.metrics[stage], f"metrics of {stage} differ")
        check((output / "model" / "model.safetensors").read_bytes() == self.model, "the model differs")
        litter = [p for p in output.rglob("*") if "partial" in p.name]
        check(not litter, f"litter is left: {litter}")

    def draw(self, rng: random.Random, number: int = signal.SIGKILL) -> Fault:
        return Fault(rng.randrange(self.changes), rng.choice([0, 0, rng.random() * 0.05]), number)


def check(is_right: bool, told: str) -> None:
    if not is_right:
        raise Failure(told)


def check_refused(ended: Ended, *told: str) -> None:
    check(ended.status == 1, f"ended with {ended.status} instead of 1: {ended.output}")
    check(any(re.search(t, ended.output) for t in told), f"refused without {told}: {ended.output}")


def check_untouched(output: Path, before: dict[str, bytes], told: str) -> None:
    """Assert that the files are as before; those that a killed process left half written may be gone."""
    after = tree(output)
    changed = [name for name, content in before.items() if after.get(name) != content and "partial" not in name]
    check(not changed, f"{told}: files of the run have changed: {changed}")


def killed(soak: Soak, output: Path, rng: random.Random) -> None:
    """kill -9, up to three times"""
    for _ in range(rng.randint(1, 3)):
        ended = soak.train(output, fault=soak.draw(rng))
        check(ended.status in (0, -signal.SIGKILL), f"ended with {ended.status}: {ended.output}")
    soak.finish(output)


def stopped(soak: Soak, output: Path, rng: random.Random) -> None:
    """SIGTERM or Ctrl-C"""
    number, status = rng.choice([(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    ended = soak.train(output, fault=soak.draw(rng, number))
    # Outside of a stage SIGTERM ends the process itself.
    check(ended.status in (0, status, -number), f"ended with {ended.status}: {ended.output}")
    soak.finish(output)


def model_saved_again(soak: Soak, output: Path, rng: random.Random) -> None:
    """kill -9 while a finished model is saved again"""
    shutil.copytree(soak.reference, output)
    (output / "model" / "notes.txt").write_text("somebody's own")
    fault = soak.draw(rng)
    fault.after %= 60  # a run that only restores and saves makes fewer changes
    soak.train(output, fault=fault)
    again = VLM.from_pretrained(output / "model").state_dict()
    first = VLM.from_pretrained(soak.reference / "model").state_dict()
    check(all(torch.equal(again[n], p) for n, p in first.items()), "the model in the folder is not whole")
    check((output / "model" / "notes.txt").exists(), "a file of somebody's is gone")
    soak.finish(output)


def checkpoint_damaged(soak: Soak, output: Path, rng: random.Random) -> None:
    """a bit flipped in a checkpoint"""
    while not (found := sorted(output.glob("*/step-*/*"))):
        soak.train(output, fault=soak.draw(rng))
    newest = max(found, key=lambda p: (p.parent.parent.name == "finetune", p.parent.name)).parent
    file = rng.choice(sorted(newest.iterdir()))
    where = flip(file, rng)
    soak.finish(output)
    check((newest.parent / f"damaged-{newest.name}" / "damage.txt").exists(), f"{where} was not noticed")


def shard_damaged(soak: Soak, output: Path, rng: random.Random) -> None:
    """a bit flipped in a shard, before the run"""
    shards = copied_shards(soak, output)
    shard = rng.choice(sorted(shards.iterdir()))
    where = flip(shard, rng)
    ended = soak.train(output, data=shards)
    if ended.status == 0:
        card = (output / "model" / "README.md").read_text()
        check(card.count(f"| records | {N_RECORDS} |") == 2, f"{where}: records are gone without a word")
    else:
        check_refused(ended, re.escape(shard.name))


def shard_changed(soak: Soak, output: Path, rng: random.Random) -> None:
    """a bit flipped in a shard, between a start and a resume"""
    shards = copied_shards(soak, output)
    while not list(output.glob("*/step-*/checkpoint.json")):
        soak.train(output, data=shards, fault=soak.draw(rng))
    before = tree(output)
    shard = rng.choice(sorted(shards.iterdir()))
    where = flip(shard, rng)
    ended = soak.train(output, data=shards)
    check_refused(ended, "data: ", re.escape(shard.name))
    check_untouched(output, before, where)


def disk_full(soak: Soak, output: Path, rng: random.Random) -> None:
    """full disk (files cannot grow)"""
    ended = soak.train(output, limit=rng.randrange(200, 2 * len(soak.model)))
    check(ended.status == 0 or "vlmamba: " in ended.output, f"ended with {ended.status}: {ended.output}")
    check(ended.status in (0, 1) and "Traceback" not in ended.output, f"a traceback: {ended.output}")
    soak.finish(output)


def small_disk(soak: Soak, output: Path, rng: random.Random) -> None:
    """full disk (a small file system)"""
    size = rng.randrange(16, 2 * sum(p.stat().st_size for p in soak.reference.rglob("*") if p.is_file()) // 1024)
    with tmpfs(output, size):
        ended = soak.train(output)
        check(ended.status in (0, 1) and "Traceback" not in ended.output, f"{size} KiB: {ended.status} {ended.output}")
        subprocess.run(["mount", "-o", "remount,size=1g", str(output)], check=True)
        soak.finish(output)


def worker_killed(soak: Soak, output: Path, rng: random.Random) -> None:
    """kill -9 of a process that prepares data"""
    process, told = soak.start(output)
    time.sleep(rng.random() * 3)
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
        break
    ended = soak.wait(process, told)
    if ended.status:
        check_refused(ended, "a process that prepares data for stage .* (died|ended)")
    soak.finish(output)


def second_run(soak: Soak, output: Path, rng: random.Random) -> None:
    """a second run on the same output"""
    first = soak.start(output)
    while not (output / ".lock").exists() or not (output / ".lock").read_text():
        time.sleep(0.01)
    time.sleep(rng.random() * 0.5)
    second = soak.train(output)
    ended = soak.wait(*first)
    check(ended.status == 0, f"the first run ended with {ended.status}: {ended.output}")
    if second.status:
        check_refused(second, r"in use by another run \(process \d+ on ")
    soak.finish(output)


def another_run(soak: Soak, output: Path, rng: random.Random) -> None:
    """a resume with another setting, base or data"""
    while not list(output.glob("*/step-*/checkpoint.json")):
        soak.train(output, fault=soak.draw(rng))
    before = tree(output)
    kind = rng.choice(["option", "base", "data"])
    if kind == "option":
        name, value = rng.choice(
            [("--seed", "5"), ("--batch-size", "4"), ("--lr", "0.5"), ("--epochs", "1"), ("--betas", "0.8", "0.9")]
        )[:2]
        options = (name, value, "0.9") if name == "--betas" else (name, value)
        check_refused(soak.train(output, *options), name[2:].replace("-", "_") + ": .* in the checkpoint, .* now")
    elif kind == "base":
        check_refused(soak.train(output, base=soak.other_base), "weights: .* in the checkpoint, .* now")
    else:
        shards = copied_shards(soak, output)
        next(iter(sorted(shards.iterdir()))).unlink()
        check_refused(soak.train(output, data=shards), "data: .* in the checkpoint, .* now")
    check_untouched(output, before, kind)
    soak.finish(output)


KINDS: list[Callable[[Soak, Path, random.Random], None]] = [
    killed, stopped, model_saved_again, checkpoint_damaged, shard_damaged, shard_changed, disk_full, second_run,
    worker_killed, another_run,
]  # fmt: skip


def _child(arguments: list[str], fault: Fault | None, limit: int | None, tell) -> None:
    """Run the command in this process; what it prints and how many files it changed is sent in the end."""
    said, changes, parent = io.StringIO(), 0, os.getpid()

    def watch(event: str, details: tuple) -> None:
        nonlocal changes
        if event not in WATCHED or os.getpid() != parent:
            return
        if event == "open" and not (isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if fault is not None and changes == fault.after:
            if fault.delay:
                threading.Timer(fault.delay, os.kill, (parent, fault.number)).start()
            else:
                os.kill(parent, fault.number)
        changes += 1

    os.setsid()
    sys.addaudithook(watch)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    status = 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            vlmamba(arguments)
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 1
            if isinstance(e.code, str):
                said.write(e.code)
        except BaseException as e:
            status = 1
            said.write(f"Traceback: {type(e).__name__}: {e}")
    tell.send((said.getvalue()[-3000:], changes))
    tell.close()
    os._exit(status)


def write_shards(folder: Path) -> None:
    """The first images of easy-VQA, each with one question, in two shards as WebDataset writes them."""
    folder.mkdir()
    records: dict[Path, Record] = {}
    for record in easy_vqa.load("train"):
        records.setdefault(record.images[0], record)
        if len(records) == N_RECORDS:
            break
    for s in range(2):
        with tarfile.open(folder / f"shard-{s}.tar", "w") as tar:
            for i, (image, record) in list(enumerate(records.items()))[s::2]:
                names = {"user": "human", "assistant": "gpt"}
                turns = [{"from": names[t.role], "value": t.text} for t in record.turns]
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
                text = json.dumps({"image": f"{i:05}{image.suffix}", "conversations": turns}).encode()
                for name, content in ((f"{i:05}.json", text), (f"{i:05}{image.suffix}", image.read_bytes())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def write_base(folder: Path, seed: int) -> None:
    """A model small enough for a step in some hundredths of a second."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(["What color is the shape?", "yes", "no", "red", "blue", "circle"], vocab_size=280)
    vision = VisionConfig(
        ViTConfig(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_width=16), ImageProcessor(16)
    )
    connector = ConnectorConfig("vss-l2", "bidirectional", d_state=4, expand=1)
    config = VLMConfig(LMConfig(16, 1, 280, d_state=4), (vision,), connector, template="qa")
    VLM(config, tokenizer).save_pretrained(folder)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    with contextlib.suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def flip(path: Path, rng: random.Random) -> str:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    at, bit = rng.randrange(len(content)), rng.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at} of {path.name}"


def copied_shards(soak: Soak, output: Path) -> Path:
    return Path(shutil.copytree(soak.shards, output.with_name(output.name + "-shards")))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a run, but for its locks."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@contextlib.contextmanager
def tmpfs(folder: Path, kibibytes: int) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a small file system."""
    with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError, OSError), tmpfs(folder, 16):
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description="Break real trainings in random ways.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="do this one try")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    end = time.monotonic() + 60 * options.minutes
    soak = Soak(folder)
    kinds = [*KINDS, *([small_disk] if can_mount(folder / "mount") else [])]
    results = {kind: [0, 0] for kind in kinds}
    failures = []
    for number in [options.only] if options.only is not None else range(10**9):
        if options.only is None and time.monotonic() > end:
            break
        # In turn, so that any length of time tries all kinds equally often.
        kind, rng = kinds[number % len(kinds)], random.Random(f"{options.seed} {number}")
        output = folder / f"try-{number}"
        results[kind][0] += 1
        try:
            kind(soak, output, rng)
        except Failure as e:
            failures.append(f"try {number}, {kind.__doc__}: {e} (in {output})")
            print(failures[-1], flush=True)
        else:
            results[kind][1] += 1
            shutil.rmtree(output, ignore_errors=True)  # a run that is refused makes none
            shutil.rmtree(output.with_name(output.name + "-shards"), ignore_errors=True)
    width = max(len(kind.__doc__) for kind in kinds)
    print(f"{'fault':<{width}}  tried  survived")
    for kind, (tried, survived) in results.items():
        print(f"{kind.__doc__:<{width}}  {tried:>5}  {survived:>8}")
    print(f"seed {options.seed}, {sum(t for t, _ in results.values())} tries, {len(failures)} failed")
    if failures:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
