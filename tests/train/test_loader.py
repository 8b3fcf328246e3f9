"""The loader: the same steps whatever the workers, the ranks and the first step; broken samples; faults."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import pytest
import torch

from tests.makers import save_images
from tests.train.makers import tiny_vlm
from vlmamba.model import Tokenizer, Turn
from vlmamba.model.prompt import TEMPLATES
from vlmamba.train.config import StageConfig
from vlmamba.train.errors import BrokenDataError, ChangedDataError, DataError, WorkerDiedError
from vlmamba.train.loader import Loader
from vlmamba.train.sampler import samples_of_step

STAGE = StageConfig("test", ("",), lr=0.01, batch_size=12, micro_batch_size=5, seed=3)


class Numbers:
    """Sample i is the number i and a random one; those in `broken` cannot be read."""

    def __init__(self, broken=()):
        self.broken = set(broken)

    def __len__(self):
        return 50

    def __getitem__(self, index):
        if index in self.broken:
            raise ValueError(f"number {index} is broken")
        return torch.tensor([index, torch.rand(())])


def steps(stage=STAGE, samples=None, first_step=0, **options):
    loader = Loader(samples or Numbers(), stage, torch.stack, first_step=first_step, n_steps=8, **options)
    return list(loader)


def same(one, two):
    pairs = [p for a, b in zip(one, two, strict=True) for p in zip(a.micro_batches, b.micro_batches, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def indices(found):
    return [[int(i) for batch in step.micro_batches for i in batch[:, 0]] for step in found]


def test_steps_hold_the_sampler_s_samples_in_micro_batches():
    found = steps()
    assert indices(found) == [samples_of_step(50, 12, 3, step) for step in range(8)]
    assert [[len(b) for b in s.micro_batches] for s in found] == [[5, 5, 2]] * 8
    assert {s.n_samples for s in found} == {12}


def test_workers_and_the_first_step_change_nothing():
    state = torch.get_rng_state()
    whole = steps()
    for workers in (1, 2):
        assert same(steps(replace(STAGE, workers=workers)), whole)
        assert same(steps(replace(STAGE, workers=workers), first_step=5), whole[5:])
    assert same(steps(first_step=3), whole[3:])
    assert torch.equal(torch.get_rng_state(), state)
    drawn = torch.cat([b[:, 1] for s in whole for b in s.micro_batches])
    assert len(drawn.unique()) == len(drawn)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_a_step_equally(world_size):
    shares = [indices(steps(rank=r, world_size=world_size)) for r in range(world_size)]
    for step, whole in enumerate(indices(steps())):
        assert [share[step] for share in shares] == [whole[r::world_size] for r in range(world_size)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 5}, "batch_size of stage 'test' must be a multiple of the number of ranks.*12 for 5 ranks"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size = 2\), got 2"),
        ({"samples": ""}, "stage 'test' has no samples"),
    ],
)
def test_bad_options_of_a_loader_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Loader(**{"samples": Numbers(), "stage": STAGE, "collate": list, "first_step": 0, "n_steps": 1, **options})


def test_the_first_broken_sample_is_an_error_that_names_it(tmp_path):
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        with pytest.raises(BrokenDataError, match="1 of .* number 7: number 7 is broken; all .*broken.jsonl"):
            steps(replace(STAGE, workers=workers), Numbers({7}), folder=folder)
        (line,) = (folder / "broken.jsonl").read_text().splitlines()
        assert json.loads(line)["index"] == 7


def test_broken_samples_are_replaced_and_reported_the_same_with_workers_and_after_a_resume(tmp_path):
    broken, stage = {7, 8, 20, 49, 0}, replace(STAGE, max_broken=0.1)
    whole = steps(stage, Numbers(broken), folder=tmp_path / "whole")
    report = (tmp_path / "whole" / "broken.jsonl").read_text()
    assert not broken & {i for step in indices(whole) for i in step}
    for step, wanted in enumerate(samples_of_step(50, 12, 3, s) for s in range(8)):
        replaced = {7: 9, 8: 9, 20: 21, 49: 1, 0: 1}
        assert indices(whole)[step] == [replaced.get(i, i) for i in wanted]
    named = [json.loads(line) for line in report.splitlines()]
    assert {n["index"] for n in named} == broken
    assert named[0]["reason"] == f"number {named[0]['index']} is broken"

    iterator = iter(Loader(Numbers(broken), stage, torch.stack, first_step=0, n_steps=8, folder=tmp_path / "cut"))
    for _ in range(5):
        next(iterator)
    with open(tmp_path / "cut" / "broken.jsonl", "a") as file:
        file.write('{"step": 5, "ind')  # killed while it wrote
    again = steps(replace(stage, workers=2), Numbers(broken), first_step=3, folder=tmp_path / "cut")
    assert same(again, whole[3:])
    assert (tmp_path / "cut" / "broken.jsonl").read_text() == report


def test_too_many_broken_samples_are_an_error_at_the_same_step(tmp_path):
    stage = replace(STAGE, max_broken=0.005)  # 5 of the first 1,000
    for workers in (0, 2):
        with pytest.raises(BrokenDataError, match=r"of [\d]+ samples of stage 'test' .* max_broken = 0.005 allows"):
            steps(replace(stage, workers=workers), Numbers(range(9)), folder=tmp_path / str(workers))
    zero, two = ((tmp_path / w / "broken.jsonl").read_text() for w in "02")
    assert zero == two and len(zero.splitlines()) > 5
    with pytest.raises(BrokenDataError):  # nothing is whole: no endless search
        steps(stage, Numbers(range(50)))


def test_errors_of_another_kind_are_not_taken_for_broken_data():
    class Faulty(Numbers):
        def __getitem__(self, index):
            raise TypeError("a fault in the program")

    for workers in (0, 1):
        with pytest.raises(TypeError, match="a fault in the program"):
            steps(replace(STAGE, workers=workers, max_broken=0.5), Faulty())


class Deadly(Numbers):
    parent = os.getpid()

    def __getitem__(self, index):
        if index == 7 and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_worker_that_dies_is_reported_and_nothing_hangs():
    with pytest.raises(WorkerDiedError, match="prepares data for stage 'test' ended by signal SIGKILL.*workers .now 2"):
        steps(replace(STAGE, workers=2), Deadly())


def test_a_worker_s_death_does_not_show_in_the_middle_of_a_step():
    """The loop's own code runs undisturbed; the death is said when the next batch is asked for."""
    iterator = iter(Loader(Numbers(), replace(STAGE, workers=2), torch.stack, first_step=0, n_steps=8))
    next(iterator)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.5)  # PyTorch's handler of SIGCHLD would raise here
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        list(iterator)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker"),
        EOFError("x"),
        FileNotFoundError("x"),
        ConnectionResetError("x"),
        KeyError("x"),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_of_a_worker_is_not_taken_for_its_death(error, workers):
    def collate(samples):
        raise error

    with pytest.raises(type(error)) as raised:
        list(Loader(Numbers(), replace(STAGE, workers=workers), collate, first_step=0, n_steps=2))
    assert raised.value.args == error.args and not isinstance(raised.value, WorkerDiedError)
    assert not workers or "in collate" in str(raised.value.__cause__)


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def test_an_exception_that_cannot_be_pickled_is_reported_by_its_text():
    def collate(samples):
        raise Unpicklable("out of", "paint")

    with pytest.raises(RuntimeError, match="Unpicklable: out of paint"):
        list(Loader(Numbers(), replace(STAGE, workers=1), collate, first_step=0, n_steps=2))


def test_a_file_that_changes_is_no_broken_sample():
    class Changed(Numbers):
        def __getitem__(self, index):
            raise ChangedDataError("d.jsonl has changed since it was read")

    for workers in (0, 1):
        with pytest.raises(ChangedDataError, match="d.jsonl has changed"):
            steps(replace(STAGE, workers=workers, max_broken=0.9), Changed())


def test_errors_that_end_the_data_of_a_run_are_of_one_type():
    for error in (BrokenDataError, ChangedDataError, WorkerDiedError):
        assert issubclass(error, DataError) and issubclass(error, ValueError | OSError)


STARTED = """
import sys, torch
from pathlib import Path
from vlmamba.model.batch import collate
from vlmamba.model.prompt import TEMPLATES
from vlmamba.model import VLM, Tokenizer
from vlmamba.train.config import StageConfig
from vlmamba.train.records import read_llava
from vlmamba.train.samples import Conversations
from vlmamba.train.loader import Loader
from vlmamba.train.recipes import tiny_config

def main():
    folder, method = Path(sys.argv[1]), sys.argv[2]
    torch.multiprocessing.set_start_method(method)
    tokenizer = Tokenizer.train(["red blue"], 280)
    model = VLM(tiny_config("vl-mamba", tokenizer.vocab_size), tokenizer)
    model.template = TEMPLATES[sys.argv[3]]
    samples = Conversations(read_llava([folder / "d.json", folder / "s.tar"]), model, keep_samples=True)
    steps = []
    for workers in (0, 2):
        stage = StageConfig("s", ("",), lr=1.0, batch_size=3, micro_batch_size=2, workers=workers)
        loader = Loader(samples, stage, collate, first_step=0, n_steps=3)
        steps.append([b for step in loader for b in step.micro_batches])
    for one, other in zip(*steps, strict=True):
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)
        assert all(map(torch.equal, one.images, other.images))
    print("the same")

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_workers_that_are_not_forked_prepare_the_same(tmp_path, method):
    (image,) = save_images(tmp_path, ["red"])
    turns = [{"from": "human", "value": "<image>\nred"}, {"from": "gpt", "value": "blue"}]
    (tmp_path / "d.json").write_text(json.dumps([{"image": image.name, "conversations": turns}] * 5))
    (tmp_path / "0.json").write_text(json.dumps({"conversations": turns}))
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(tmp_path / "0.json", "0.json")
        tar.add(image, "0.png")
    (tmp_path / "run.py").write_text(STARTED)
    template = {"spawn": "caption", "forkserver": "qa", "fork": "zephyr"}[method]
    run = subprocess.run(
        [sys.executable, tmp_path / "run.py", tmp_path, method, template], capture_output=True, text=True, timeout=300
    )
    assert run.stdout == "the same\n", run.stderr


def test_arguments_of_a_worker_can_be_pickled():
    tokenizer = Tokenizer.train(["red blue"], 280)
    for template in TEMPLATES.values():
        model = tiny_vlm("ml-mamba", tokenizer)
        model.template = template
        again = pickle.loads(pickle.dumps(model))
        turns = [Turn("user", "red"), Turn("assistant", "blue")]
        assert again.template.encode(again.tokenizer, turns) == template.encode(tokenizer, turns)
        assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


class Signalled(Numbers):
    """Sends its own worker what a whole group of processes is sent when it shall stop."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


def test_workers_outlive_the_signals_that_stop_the_loop():
    assert same(steps(replace(STAGE, workers=2), Signalled()), steps())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"workers": -1}, "workers of stage 'test' must be in"), ({"max_broken": 1.5}, "max_broken of stage")],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        replace(STAGE, **change)


class NoRoom(Numbers):
    """Samples whose worker cannot make shared memory."""

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
        return super().__getitem__(index)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit holds for shared memory on Linux")
def test_a_worker_without_shared_memory_is_an_error_and_no_endless_wait():
    def too_long(number, frame):
        raise TimeoutError("the loop waits for a batch that is lost")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        with pytest.raises(OSError, match="no shared memory for a batch: .*workers=0 needs none"):
            steps(replace(STAGE, workers=1), NoRoom())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
