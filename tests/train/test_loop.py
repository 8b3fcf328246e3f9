"""The loop: exact resume after any kind of end, freezing, accumulation, clear failures."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vlmamba.model import hub
from vlmamba.train import loop
from vlmamba.train.checkpoint import Checkpoints
from vlmamba.train.config import StageConfig
from vlmamba.train.errors import BrokenDataError
from vlmamba.train.loop import Interrupted, train_stage
from vlmamba.train.optim import clip_gradients, freeze_all_but, learning_rate, make_optimizer
from vlmamba.train.sampler import samples_of_step
from vlmamba.train.track import read_metrics

STAGE = StageConfig("test", ("",), lr=0.01, epochs=4, batch_size=8, save_every=5, weight_decay=0.1)


class Output(NamedTuple):
    loss: torch.Tensor
    n_targets: int


@dataclass
class Points:
    x: torch.Tensor

    def to(self, device):
        return Points(self.x.to(device))

    @property
    def n_targets(self):
        return len(self.x)

    n_tokens = n_targets


class Regression(nn.Module):
    """Learns a line, with dropout so that the random state matters."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 16), nn.Linear(16, 1)

    def forward(self, batch):
        y = self.b(nn.functional.dropout(torch.tanh(self.a(batch.x)), 0.1, self.training))
        return Output((y[:, 0] - batch.x.sum(1)).square().mean(), len(batch.x))


class Data:
    def __init__(self, n=40, delay=0.0):
        self.x, self.delay = torch.randn(n, 3, generator=torch.Generator().manual_seed(1)), delay

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        time.sleep(self.delay)
        return self.x[i]


def collate(samples):
    return Points(torch.stack(samples))


def train(folder, stage=STAGE, data=None, model=None):
    torch.manual_seed(0)
    model = Regression() if model is None else model
    train_stage(model, stage, data or Data(), collate, folder)
    return model


def losses(folder):
    return [m["loss"] for m in read_metrics(folder)]


def test_a_stage_lowers_the_loss_and_records_it(tmp_path):
    train(tmp_path)
    curve = losses(tmp_path)
    assert len(curve) == STAGE.steps(40) == 20
    assert sum(curve[-5:]) < 0.7 * sum(curve[:5])
    assert [m["step"] for m in read_metrics(tmp_path)] == list(range(20))
    assert len(list(tmp_path.glob("step-*"))) == STAGE.keep_last


def test_a_finished_stage_is_restored_and_not_trained_again(tmp_path, capsys):
    first = train(tmp_path)
    capsys.readouterr()
    again = train(tmp_path)
    assert "test: finished already, 20 steps" in capsys.readouterr().out
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    assert len(losses(tmp_path)) == 20


def run_until(folder, lines, number):
    """Train in a process of its own, and send a signal once so many steps are recorded; its exit status."""
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(folder,), kwargs={"data": Data(delay=0.004)}
    )
    process.start()
    metrics = folder / "metrics.jsonl"
    while process.is_alive() and (not metrics.exists() or metrics.read_text().count("\n") < lines):
        time.sleep(0.002)
    if process.is_alive() and number is not None:
        os.kill(process.pid, number)
    process.join()
    return process.exitcode


def test_killed_at_any_step_the_curve_is_the_same_to_the_bit(tmp_path):
    train(tmp_path / "whole")
    for steps in (2, 6, 9, 13, 16):
        assert run_until(tmp_path / "killed", steps, signal.SIGKILL) == -signal.SIGKILL
    assert run_until(tmp_path / "killed", 10**9, None) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_sigterm_saves_and_ends_cleanly(tmp_path):
    train(tmp_path / "whole")
    assert run_until(tmp_path / "stopped", 7, signal.SIGTERM) == 143
    newest = max(tmp_path.glob("stopped/step-*/checkpoint.json")).parent.name
    assert int(newest.removeprefix("step-")) == len(losses(tmp_path / "stopped")) < 20
    train(tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_second_sigterm_does_not_end_the_writing_of_a_checkpoint(tmp_path, monkeypatch):
    wait = Checkpoints.wait

    def slowly(checkpoints):
        if checkpoints.writing is not None:
            os.kill(os.getpid(), signal.SIGTERM)
        wait(checkpoints)

    monkeypatch.setattr(Checkpoints, "wait", slowly)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        train_stage(
            Regression(), STAGE, Data(), collate, tmp_path, on_step=lambda *_: os.kill(os.getpid(), signal.SIGTERM)
        )
    assert (tmp_path / "step-00000002" / "checkpoint.json").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_batch(tmp_path):
    data = Data()
    data.x[3] = torch.nan
    with pytest.raises(FloatingPointError, match="has a loss of nan .* the worst batch is saved in .*bad-batch-0.pt"):
        train(tmp_path, replace(STAGE, micro_batch_size=2), data=data)
    bad = torch.load(tmp_path / "bad-batch-0.pt", weights_only=True)["x"]
    assert len(bad) == 2 and bad.isnan().any()


def test_a_loss_that_explodes_stops_before_the_step_is_taken(tmp_path):
    data, model = Data(), Regression()
    data.x[3] *= 1e4
    with pytest.raises(FloatingPointError, match=r"max_loss is 25.* the worst batch is saved"):
        train(tmp_path, data=data, model=model)
    assert all(p.abs().max() < 10 for p in model.parameters())
    assert (torch.load(tmp_path / "bad-batch-0.pt", weights_only=True)["x"].abs() > 1e3).any()


def test_micro_batches_of_any_size_give_the_same_step(tmp_path):
    class Sums(Regression):
        def forward(self, batch):
            return Output((self.b(torch.tanh(self.a(batch.x)))[:, 0] - batch.x.sum(1)).square().mean(), len(batch.x))

    torch.manual_seed(0)
    one = Sums()
    two = Sums()
    two.load_state_dict(one.state_dict())
    train(tmp_path / "one", model=one)
    train(tmp_path / "two", replace(STAGE, micro_batch_size=3), model=two)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_only_the_named_parts_learn():
    model = Regression()
    assert set(freeze_all_but(model, ("b",))) == {"b.weight", "b.bias"}
    assert not model.a.weight.requires_grad
    with pytest.raises(ValueError, match="trainable names 'head'"):
        freeze_all_but(model, ("head",))


def test_trainable_weights_are_float32_and_frozen_ones_unchanged(tmp_path):
    model = Regression().bfloat16()
    train(tmp_path, replace(STAGE, trainable=("b",), precision="bf16"), model=model)
    assert {n: p.dtype for n, p in model.named_parameters()} == {
        "a.weight": torch.bfloat16, "a.bias": torch.bfloat16, "b.weight": torch.float32, "b.bias": torch.float32,
    }  # fmt: skip


def test_each_step_is_reported_with_the_model(tmp_path):
    seen = []
    model = Regression()
    train_stage(model, STAGE, Data(), collate, tmp_path, on_step=lambda step, m: seen.append((step, m is model)))
    assert seen == [(step, True) for step in range(20)]


def test_gradients_are_clipped_to_the_largest_norm():
    model = Regression()
    model(collate(list(Data().x))).loss.backward()
    parameters = list(model.parameters())
    before = [p.grad.clone() for p in parameters]
    norm = torch.cat([g.flatten() for g in before]).norm().item()
    assert clip_gradients(parameters, 2 * norm) == pytest.approx(norm)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))
    assert clip_gradients(parameters, norm / 4) == pytest.approx(norm)
    for p, g in zip(parameters, before, strict=True):
        torch.testing.assert_close(p.grad, g / 4)


def test_vectors_do_not_decay():
    groups = make_optimizer(dict(Regression().named_parameters()), STAGE).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.1, 2), (0.0, 2)]


def test_learning_rate_rises_and_falls():
    rates = [learning_rate(replace(STAGE, warmup_ratio=0.1), s, 100) for s in range(100)]
    assert rates[0] == pytest.approx(0.001)
    assert rates[9] == pytest.approx(0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-5


def test_an_epoch_shows_every_sample_once():
    seen = [i for step in range(5) for i in samples_of_step(40, 8, 3, step)]
    assert sorted(seen) == list(range(40))
    assert [i for step in range(5, 10) for i in samples_of_step(40, 8, 3, step)] != seen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr of stage 'test' must be in .0, 1000000., got 0.0"),
        ({"lr": torch.inf}, "lr of stage 'test' must be in .0, 1000000., got inf"),
        ({"epochs": torch.nan}, "epochs of stage 'test' must be in .*, got nan"),
        ({"betas": (0.9, 1.0)}, "betas of stage .* must be in"),
        ({"weight_decay": torch.inf}, "weight_decay of stage .* must be a finite number"),
        ({"max_loss": 0.0}, "max_loss of stage 'test' must be positive"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"warmup_ratio": 2.0}, "warmup_ratio of stage .test. must be in"),
        ({"trainable": ()}, "must have at least one prefix"),
        ({"precision": "fp8"}, "precision of stage .test. must be one of"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(STAGE, **change)


def test_metrics_are_standard_json(tmp_path):
    train(tmp_path)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == {"step", "loss", "lr", "grad_norm"}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "model"
    for text in ("one", "two"):
        with hub.replacing_folder(target) as staged:
            (staged / "file").write_text(text)
    assert (target / "file").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def stopped_at(step, number):
    """An `on_step` that sends this process a signal after a step."""
    return lambda done, model: os.kill(os.getpid(), number) if done == step else None


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_the_last_step_stops_before_what_comes_next(tmp_path, number, status):
    with pytest.raises(Interrupted) as stopped:
        train_stage(Regression(), STAGE, Data(), collate, tmp_path, on_step=stopped_at(19, number))
    assert stopped.value.code == status
    assert (tmp_path / "step-00000020" / "checkpoint.json").exists()


def test_a_signal_while_the_last_checkpoint_is_written_stops_too(tmp_path, monkeypatch):
    close = Checkpoints.close

    def signalled(checkpoints):
        os.kill(os.getpid(), signal.SIGTERM)
        close(checkpoints)

    monkeypatch.setattr(Checkpoints, "close", signalled)
    with pytest.raises(Interrupted):
        train(tmp_path)
    assert (tmp_path / "step-00000020" / "checkpoint.json").exists()


class FailsFrom(Data):
    """Raises an error from some access on, as a file that has changed does."""

    def __init__(self, left, error):
        super().__init__()
        self.left, self.error = left, error

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().__getitem__(i)


@pytest.mark.parametrize("error", [ValueError("file has changed"), OSError("gone"), RuntimeError("a worker died")])
def test_progress_is_saved_before_data_that_fail_end_the_run(tmp_path, error):
    train(tmp_path / "whole")
    seen_before = 40  # by the identity of the run
    with pytest.raises(RuntimeError if isinstance(error, RuntimeError) else BrokenDataError, match=str(error)):
        train(tmp_path / "failed", data=FailsFrom(seen_before + 7 * 8 + 3, error))
    assert (tmp_path / "failed" / "step-00000007" / "checkpoint.json").exists()
    train(tmp_path / "failed")
    assert losses(tmp_path / "failed") == losses(tmp_path / "whole")


def weights_that_are_not_finite(step, model):
    if step == 12:
        model.b.weight.data[0, 3] = torch.inf


def test_no_checkpoint_holds_weights_that_are_not_finite_and_the_advice_can_be_followed(tmp_path):
    with pytest.raises(FloatingPointError, match="after step 13 .model.b.weight.; no checkpoint .* --may-change lr"):
        torch.manual_seed(0)
        stage = replace(STAGE, save_every=1, max_loss=1e30)
        train_stage(Regression(), stage, Data(), collate, tmp_path, on_step=weights_that_are_not_finite)
    assert max(p.name for p in tmp_path.glob("step-*")) == "step-00000012"
    lower = replace(stage, lr=0.001)
    with pytest.raises(ValueError, match="lr: 0.01 in the checkpoint, 0.001 now(.|\n)*--may-change lr"):
        train(tmp_path, lower)
    torch.manual_seed(0)
    train_stage(Regression(), lower, Data(), collate, tmp_path, may_change=["lr"])
    assert [m["step"] for m in read_metrics(tmp_path)] == list(range(20))
    assert max(m["lr"] for m in read_metrics(tmp_path)[12:]) <= 0.001
    train(tmp_path, lower)  # the newest checkpoints are of the changed run


def test_a_step_as_large_as_it_gets_ends_with_an_error_and_no_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError):
        train(tmp_path, replace(STAGE, lr=1e6, warmup_ratio=0.0, save_every=1, max_loss=torch.inf))
    for path in tmp_path.glob("step-*/*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values())


def test_weights_that_a_merge_makes_infinite_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "merge_lora", lambda model: model.a.bias.data.fill_(torch.inf))
    with pytest.raises(FloatingPointError, match="leaves 1 of 4 weights that are not finite: a.bias"):
        train(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: 0 in the checkpoint, 1 now"),
        ({"batch_size": 4}, "batch_size: 8 in the checkpoint, 4 now"),
        ({"epochs": 2.0}, "epochs: 4 in the checkpoint, 2.0 now"),
        ({"lr": 0.02}, "lr: 0.01 in the checkpoint, 0.02 now"),
    ],
)
def test_another_run_is_refused_by_name_with_both_values(tmp_path, change, message):
    train(tmp_path)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, replace(STAGE, **change))


def test_another_base_and_other_data_are_refused_and_nothing_is_touched(tmp_path):
    train(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    other = Data()
    other.x[11] += 1
    with pytest.raises(ValueError, match="prepared samples: 40 compared in the checkpoint, 1 of them"):
        train(tmp_path, data=other)
    with pytest.raises(ValueError, match="number of samples: 40 in the checkpoint, 39 now"):
        train(tmp_path, replace(STAGE, epochs=4.1), data=Data(39))
    with pytest.raises(ValueError, match="weights: [0-9a-f]{64} in the checkpoint, [0-9a-f]{64} now"):
        torch.manual_seed(1)
        train_stage(Regression(), STAGE, Data(), collate, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_settings_that_keep_the_steps_may_differ_at_a_resume(tmp_path):
    train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        torch.manual_seed(0)
        train_stage(Regression(), STAGE, Data(), collate, tmp_path / "cut", on_step=stopped_at(8, signal.SIGTERM))
    train(tmp_path / "cut", replace(STAGE, workers=1, save_every=3, keep_last=1, max_loss=20.0, max_broken=0.1))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_more_epochs_resume_on_request_and_fewer_are_refused(tmp_path):
    train(tmp_path)
    torch.manual_seed(0)
    longer = replace(STAGE, epochs=5)
    train_stage(Regression(), longer, Data(), collate, tmp_path, may_change=["epochs"])
    assert len(losses(tmp_path)) == 25
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="is of step 25, beyond the 20 steps to take"):
        train_stage(Regression(), STAGE, Data(), collate, tmp_path, may_change=["epochs"])
    with pytest.raises(ValueError, match="may_change must be some of lr, .*; got batch_size"):
        train_stage(Regression(), STAGE, Data(), collate, tmp_path, may_change=["batch_size"])


class Deadly(Data):
    """Kills the worker when it prepares two samples ahead of the fourth step, while the loop is in the third."""

    parent, left = os.getpid(), 3 * 8 + 2

    def __getitem__(self, i):
        if os.getpid() != self.parent:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def test_progress_is_saved_before_a_dead_worker_ends_the_run(tmp_path):
    in_step = []
    with pytest.raises(ChildProcessError, match="that prepares data for stage .test. ended by signal SIGKILL"):
        torch.manual_seed(0)
        train_stage(
            Regression(), replace(STAGE, workers=1, micro_batch_size=1), Deadly(), collate, tmp_path / "dead",
            on_step=lambda step, model: in_step.append(time.sleep(0.3)),
        )  # fmt: skip
    assert (tmp_path / "dead" / f"step-{len(in_step):08}" / "checkpoint.json").exists()
    assert len(in_step) == 3
    train(tmp_path / "dead", replace(STAGE, micro_batch_size=1))
    train(tmp_path / "whole", replace(STAGE, micro_batch_size=1))
    assert losses(tmp_path / "dead") == losses(tmp_path / "whole")
