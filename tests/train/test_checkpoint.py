"""Checkpoints: complete or not there, the newest that is whole, and only for the model that wrote them."""

from __future__ import annotations

import resource
from dataclasses import replace

import pytest
import torch
from torch import nn

from vlmamba.train.checkpoint import Checkpoints
from vlmamba.train.config import StageConfig
from vlmamba.train.optim import make_optimizer

# PyTorch says so even where it is told.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STAGE = StageConfig("test", ("",), lr=0.01)


class Training:
    """A model that has taken some steps, and its checkpoints."""

    def __init__(self, folder, n_steps=0, keep_last=2, model=None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 200), nn.Linear(200, 3)) if model is None else model
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(self.parameters, STAGE)
        self.checkpoints = Checkpoints(folder, self.parameters, self.optimizer, keep_last)
        for _ in range(n_steps):
            self.step()

    def step(self):
        self.model(torch.ones(2, 3)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self):
        return {n: t.clone() for n, t in self.checkpoints._tensors().items()}


def folders(folder):
    return sorted(p.name for p in folder.glob("*"))


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 5 and 6, and the states then."""
    training = Training(tmp_path, 5)
    training.checkpoints.save(5)
    states = {5: training.state()}
    training.step()
    training.checkpoints.save(6)
    states[6] = training.state()
    training.checkpoints.close()
    return tmp_path, states


def test_what_is_saved_is_what_was_there_when_it_was_asked_for(saved):
    folder, states = saved
    fresh = Training(folder)
    assert fresh.checkpoints.load() == 6
    torch.testing.assert_close(fresh.state(), states[6], rtol=0, atol=0)
    fresh.optimizer.zero_grad()
    fresh.step()
    torch.testing.assert_close(fresh.state(), Training(folder / "none", 7).state(), rtol=0, atol=0)


def test_the_newest_few_are_kept(saved):
    folder, _ = saved
    training = Training(folder, keep_last=1)
    training.checkpoints.save(7)
    training.checkpoints.close()
    assert folders(folder) == ["step-00000007"]


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "overwritten", "lost"])
def test_a_damaged_checkpoint_is_left_out_and_said(saved, caplog, file, damage):
    folder, states = saved
    path = folder / "step-00000006" / file
    content = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-300], "emptied": b"", "overwritten": bytes(len(content))}[damage])
    training = Training(folder)
    assert training.checkpoints.load() == 5
    torch.testing.assert_close(training.state(), states[5], rtol=0, atol=0)
    incomplete = (file, damage) == (".metadata", "lost")
    assert (f"checkpoint {folder / 'step-00000006'} is damaged" in caplog.text) != incomplete
    training.step()
    training.checkpoints.save(6)
    training.checkpoints.close()
    assert Training(folder).checkpoints.load() == 6


def test_where_all_are_damaged_the_model_is_as_it_was(saved, caplog):
    folder, _ = saved
    for path in folder.glob("*/*.distcp"):
        path.write_bytes(path.read_bytes()[:-300])
    training = Training(folder)
    before = training.state()
    assert training.checkpoints.load() == 0
    torch.testing.assert_close(training.state(), before, rtol=0, atol=0)
    assert caplog.text.count("is damaged") == 2


def test_a_full_disk_is_told_and_leaves_those_before(saved):
    folder, states = saved
    training = Training(folder, 1)
    before = folders(folder)
    # The system refuses to write beyond this, as it does on a full disk.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        training.checkpoints.save(7)
        with pytest.raises(OSError, match="could not save .*step-00000007; those before are as they were: File too"):
            training.checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert folders(folder) == before
    assert training.checkpoints.load() == 6
    torch.testing.assert_close(training.state(), states[6], rtol=0, atol=0)


def test_a_checkpoint_of_another_model_lists_every_name(saved):
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(3, 3, bias=False))
    other[1].bias = None
    with pytest.raises(ValueError, match="of another model or stage") as error:
        Training(saved[0], model=other).checkpoints.load()
    for line in (
        "missing: 2.weight",
        "unexpected: 1.bias",
        "shape of 0.weight: (200, 3) in the checkpoint, (5, 3) in the model",
    ):
        assert line in str(error.value)


def test_weight_decay_may_change_at_a_resume(saved):
    training = Training(saved[0])
    training.optimizer = make_optimizer(training.parameters, replace(STAGE, weight_decay=0.1))
    assert Checkpoints(saved[0], training.parameters, training.optimizer, 2).load() == 6
    assert training.optimizer.param_groups[0]["weight_decay"] == 0.1
