"""Checkpoints: complete or not there, the newest that is whole, and only for the run that wrote them."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import zlib

import pytest
import torch
from torch import nn

from vlmamba.train.checkpoint import Checkpoints
from vlmamba.train.config import StageConfig
from vlmamba.train.optim import make_optimizer

STAGE = StageConfig("test", ("",), lr=0.01)


class Training:
    """A model that has taken some steps, and its checkpoints."""

    def __init__(self, folder, n_steps=0, keep_last=2, model=None, run=None, may_change=()):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 200), nn.Linear(200, 3)) if model is None else model
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(self.parameters, STAGE)
        self.checkpoints = Checkpoints(
            folder, self.parameters, self.optimizer, keep_last, run or {"lr": 0.01}, may_change
        )
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


def test_a_checkpoint_holds_the_values_at_the_call(saved):
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


FILES = ["checkpoint.json", "rank-0000-of-0001.safetensors"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "emptied", "overwritten", "lost"])
def test_a_damaged_checkpoint_is_put_aside_with_the_reason(saved, caplog, file, damage):
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
    assert f"checkpoint {folder / 'step-00000006'} is damaged" in caplog.text
    assert file in (folder / "damaged-step-00000006" / "damage.txt").read_text()
    training.step()
    training.checkpoints.save(6)
    training.checkpoints.close()
    assert Training(folder).checkpoints.load() == 6
    assert folders(folder) == ["damaged-step-00000006", "step-00000005", "step-00000006"]


@pytest.mark.parametrize("file", FILES)
def test_no_flipped_bit_is_loaded(saved, file):
    folder, states = saved
    path = folder / "step-00000006" / file
    content = path.read_bytes()
    draw = random.Random(0)
    for n in range(40):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        training = Training(folder)
        assert training.checkpoints.load() == 5, n
        torch.testing.assert_close(training.state(), states[5], rtol=0, atol=0)
        os.replace(next(folder.glob("damaged-*")), path.parent)
        path.write_bytes(content)
    assert Training(folder).checkpoints.load() == 6


def test_where_all_checkpoints_are_damaged_the_model_is_unchanged(saved, caplog):
    folder, _ = saved
    for path in folder.glob("*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-300])
    training = Training(folder)
    before = training.state()
    assert training.checkpoints.load() == 0
    torch.testing.assert_close(training.state(), before, rtol=0, atol=0)
    assert caplog.text.count("is damaged") == 2


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(saved):
    folder, _ = saved
    path = folder / "step-00000006" / FILES[1]
    path.write_bytes(path.read_bytes()[:-1])
    training = Training(folder)
    assert training.checkpoints.load() == 5
    training.checkpoints.save(7)
    training.checkpoints.close()
    assert folders(folder) == ["damaged-step-00000006", "step-00000005", "step-00000007"]


def test_folders_that_the_run_did_not_write_are_left_alone(saved):
    folder, states = saved
    for name in ("step-best", "step-00000009-backup", "step-9"):
        os.makedirs(folder / name)
        (folder / name / "checkpoint.json").write_text("{}")
    training = Training(folder, keep_last=1)
    assert training.checkpoints.load() == 6
    training.checkpoints.save(7)
    training.checkpoints.close()
    assert folders(folder) == ["step-00000007", "step-00000009-backup", "step-9", "step-best"]


def test_a_copy_under_another_step_is_not_taken_for_one(saved):
    folder, _ = saved
    os.replace(folder / "step-00000005", folder / "step-00000008")
    assert Training(folder).checkpoints.load() == 6
    assert "it is of step 5" in (folder / "damaged-step-00000008" / "damage.txt").read_text()


def test_files_of_a_killed_save_are_removed_at_the_next_start(saved):
    folder, _ = saved
    left = folder / ".step-00000007.vlmamba-partial"
    left.mkdir()
    (left / FILES[1]).write_bytes(b"half")
    assert Training(folder).checkpoints.load() == 6
    assert folders(folder) == ["step-00000005", "step-00000006"]


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_with_pickles_is_refused_and_none_is_read(saved, monkeypatch):
    folder, _ = saved
    monkeypatch.setattr(pickle, "Unpickler", None)  # of whoever reads one
    old = folder / "step-00000009"
    old.mkdir()
    (old / ".metadata").write_bytes(pickle.dumps(Hostile(folder / "ran")))
    with pytest.raises(ValueError, match="step-00000009 is a checkpoint of an earlier version"):
        Training(folder).checkpoints.load()
    (old / ".metadata").unlink()
    (old / "checkpoint.json").write_bytes(pickle.dumps(Hostile(folder / "ran")))
    assert Training(folder).checkpoints.load() == 6
    assert not (folder / "ran").exists()


def test_a_checkpoint_names_no_file_outside_of_its_folder(saved):
    folder, _ = saved
    path = folder / "step-00000006" / "checkpoint.json"
    contents = json.loads(path.read_text().split("\n")[0])
    os.link(folder / "step-00000006" / FILES[1], folder / FILES[1])
    text = json.dumps(contents).replace(FILES[1], f"../{FILES[1]}")
    path.write_text(f"{text}\n{zlib.crc32(text.encode()):08x}\n")
    assert Training(folder).checkpoints.load() == 5
    assert "outside its folder" in (folder / "damaged-step-00000006" / "damage.txt").read_text()


@pytest.mark.parametrize("what", ["model.0.weight", "optimizer.0.weight.exp_avg_sq"])
def test_weights_that_are_not_finite_are_not_saved(saved, what):
    folder, states = saved
    training = Training(folder, 1)
    training.checkpoints._tensors()[what][0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=f"1 of 16 tensors .* not finite after step 7 .{what}.; no checkpoint"):
        training.checkpoints.save(7)
    training.checkpoints.close()
    assert folders(folder) == ["step-00000005", "step-00000006"]


def test_a_full_disk_is_reported_and_leaves_earlier_checkpoints(saved):
    folder, states = saved
    training = Training(folder, 1)
    before = folders(folder)
    # The system refuses to write beyond this, as it does on a full disk.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        training.checkpoints.save(7)
        with pytest.raises(OSError, match="could not save .*step-00000007; earlier checkpoints stay: File too"):
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


def test_a_checkpoint_of_another_run_is_refused_with_both_values(saved):
    with pytest.raises(ValueError, match="of another run:\n  lr: 0.01 in the checkpoint, 0.02 now\n.*--may-change lr"):
        Training(saved[0], run={"lr": 0.02}).checkpoints.load()
    assert Training(saved[0], run={"lr": 0.02}, may_change=("lr",)).checkpoints.load() == 6
    with pytest.raises(ValueError, match="seed: None in the checkpoint, 1 now") as error:
        Training(saved[0], run={"lr": 0.02, "seed": 1}).checkpoints.load()
    assert "--may-change" not in str(error.value)
