"""The loader: the same steps whatever the workers, the ranks and the first step; broken samples; faults."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from vlmamba.train.config import StageConfig
from vlmamba.train.data import BrokenDataError
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
        ({"rank": 2, "world_size": 2}, r"rank must lie in \[0, world_size = 2\), got 2"),
        ({"samples": ""}, "stage 'test' has no samples"),
    ],
)
def test_what_cannot_be_shared_is_refused(options, message):
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


def test_a_worker_that_dies_is_said_and_nothing_hangs():
    start = time.perf_counter()
    with pytest.raises(ChildProcessError, match="prepares data for stage 'test' died.*fewer workers .now 2."):
        steps(replace(STAGE, workers=2), Deadly())
    assert time.perf_counter() - start < 30


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
    [({"workers": -1}, "workers of stage 'test' must lie in"), ({"max_broken": 1.5}, "max_broken of stage")],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        replace(STAGE, **change)
